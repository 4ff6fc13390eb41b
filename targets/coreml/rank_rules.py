"""One rule for each kind of operator: which axes it tells apart, and how it is written on groups of axes.

A rule returns the node's results in any shape of rank 5 at most with the right elements in the right order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgekit.targets.coreml.rank_contractions import einsum, matmul
from edgekit.targets.coreml.rank_groups import FREE, MAX_RANK, Grouping, Role, Shape, align, group_axes
from edgekit.targets.coreml.rank_rewriter import Rewriter, rank

Rule = Callable[[Rewriter], Sequence[ir.Value]]


def _view(rewriter: Rewriter) -> list[ir.Value]:
    """What leaves the elements and their order: no operator at all."""
    return [rewriter.carrier(rewriter.need(0))]


def _constant(rewriter: Rewriter) -> list[ir.Value]:
    """Readers regroup it."""
    return [rewriter.node.outputs[0]]


def _filled(rewriter: Rewriter) -> list[ir.Value]:
    size = (math.prod(rewriter.shape(rewriter.node.outputs[0])),)
    return rewriter.again([rewriter.constant(size, "shape")], [size])


def _shape(rewriter: Rewriter) -> list[ir.Value]:
    attributes = rewriter.node.attributes
    shape = rewriter.shape(rewriter.need(0))
    return [rewriter.constant(shape[attributes.get_int("start", 0) : attributes.get_int("end", len(shape))], "shape")]


def _size(rewriter: Rewriter) -> list[ir.Value]:
    return [rewriter.constant([math.prod(rewriter.shape(rewriter.need(0)))], "size")]


def _elementwise(rewriter: Rewriter) -> list[ir.Value]:
    """Operands that are broadcast to the result: neighbours that are both there or both broadcast, in each operand, are one."""
    node = rewriter.node
    shape = rewriter.shape(node.outputs[0])
    present = [value for value in node.inputs if value is not None]
    shapes = [align(rewriter.shape(value), len(shape)) for value in present]
    operands, grouping = rewriter.broadcast(present, shapes, [shape] * len(present), [FREE] * len(shape))
    given = iter(operands)
    inputs = [None if value is None else next(given) for value in node.inputs]
    return rewriter.again(inputs, [grouping.shape(shape)] * len(node.outputs))


def _cast_like(rewriter: Rewriter) -> list[ir.Value]:
    """The second operand gives its dtype alone."""
    value, like = rewriter.carrier(rewriter.need(0)), rewriter.carrier(rewriter.need(1))
    value = rewriter.regroup(value, _low(rewriter, value))
    return rewriter.again([value, rewriter.regroup(like, _low(rewriter, like))], [rewriter.shape(value)])


def _low(rewriter: Rewriter, value: ir.Value) -> Shape:
    """A shape of rank 5 at most for a value: its own, or that of a vector."""
    shape = rewriter.shape(value)
    return shape if len(shape) <= MAX_RANK else (math.prod(shape),)


def _reduction(rewriter: Rewriter) -> list[ir.Value]:
    """The reduced axes are brought together by a transpose where they leave more than 5 groups, so that one reduction remains."""
    value, keep = rewriter.need(0), rewriter.node.attributes.get_int("noop_with_empty_axes", 0)
    shape = rewriter.shape(value)
    given = rewriter.known(1, "axes") or ([] if keep else list(range(len(shape))))
    axes = sorted({axis % len(shape) for axis in given})
    result = tuple(1 if axis in axes else size for axis, size in enumerate(shape))
    roles: list[Role] = ["reduced" if axis in axes else FREE for axis in range(len(shape))]
    grouping = group_axes([shape, result], roles)
    if grouping.rank > MAX_RANK:
        perm = [axis for axis in range(len(shape)) if axis not in axes] + axes
        value = rewriter.transpose(value, shape, perm)
        shape, result, roles = _permuted(shape, perm), _permuted(result, perm), [roles[axis] for axis in perm]
        grouping = group_axes([shape, result], roles)
    grouping = rewriter.refine(grouping, value, shape)
    operands = [rewriter.regroup(value, grouping.shape(shape)), rewriter.constant(grouping.places("reduced"), "axes")]
    return rewriter.again(operands, [grouping.shape(result)], {"keepdims": 1})


def _permuted(shape: Shape, perm: Sequence[int]) -> Shape:
    return tuple(shape[axis] for axis in perm)


def _along(default: int, *tensors: int) -> Rule:
    """The rule of operators that tell one axis, given by an attribute, apart.

    Args:
        default: The axis where the attribute is left out.
        tensors: The inputs that have that axis; none: all.
    """

    def rule(rewriter: Rewriter) -> list[ir.Value]:
        node = rewriter.node
        first = rewriter.shape(rewriter.need(0))
        axis = node.attributes.get_int("axis", default) % len(first)
        return _along_axis(rewriter, axis, tensors or range(len(node.inputs)))

    return rule


def _along_axis(rewriter: Rewriter, axis: int, tensors: Sequence[int]) -> list[ir.Value]:
    """Writes the operator with `axis` alone, and so every axis whose length differs among the inputs `tensors`."""
    node = rewriter.node
    shapes = {index: rewriter.shape(rewriter.need(index)) for index in tensors}
    results = [_with_axis(rewriter.result(output, shapes[0]), axis, len(shapes[0])) for output in node.outputs]
    roles: list[Role] = [
        FREE if index != axis and len(set(sizes)) == 1 else index for index, sizes in enumerate(zip(*shapes.values(), strict=True))
    ]
    grouping = group_axes(list(shapes.values()), roles)
    if grouping.rank > MAX_RANK:
        raise rewriter.refuse(f"that tells {grouping.rank} groups of axes apart", "slice the operands to one shape before it")
    grouping = rewriter.refine(grouping, rewriter.need(0), shapes[0])
    inputs = [
        rewriter.regroup(value, grouping.shape(shapes[index])) if value is not None and index in shapes else value
        for index, value in enumerate(node.inputs)
    ]
    attributes = {"axis": grouping.place(axis)} if node.op_type != "CumSum" else {}
    if node.op_type == "CumSum":
        inputs[1] = rewriter.regroup(rewriter.constant([grouping.place(axis)], "axis"), ())
    if node.op_type in ("ArgMax", "ArgMin"):
        attributes["keepdims"] = 1
    return rewriter.again(inputs, [grouping.shape(result) for result in results], attributes)


def _with_axis(shape: Shape, axis: int, rank: int) -> Shape:
    """The shape of a result, with the axis that it lost as 1."""
    return shape if len(shape) == rank else (*shape[:axis], 1, *shape[axis:])


def _cumulative(rewriter: Rewriter) -> list[ir.Value]:
    axis = rewriter.known(1, "axis") or [0]
    return _along_axis(rewriter, axis[0] % rank(rewriter.need(0)), [0])


def _quantization(rewriter: Rewriter) -> list[ir.Value]:
    """One scale for all tells no axes apart; scales along an axis, or for blocks of one, tell that axis apart."""
    scale = rewriter.shape(rewriter.need(1))
    shape = rewriter.shape(rewriter.need(0))
    if math.prod(scale) == 1:
        value = rewriter.carrier(rewriter.need(0))
        value = rewriter.regroup(value, _low(rewriter, value))
        scales = [None if scale is None else rewriter.regroup(scale, ()) for scale in rewriter.node.inputs[1:]]
        return rewriter.again([value, *scales], [rewriter.shape(value)], dropped=["axis", "block_size"])
    tensors = [0] if len(scale) == 1 else [index for index, value in enumerate(rewriter.node.inputs) if value is not None]
    return _along_axis(rewriter, rewriter.node.attributes.get_int("axis", 1) % len(shape), tensors)


def _gather(rewriter: Rewriter) -> list[ir.Value]:
    """[before, axis, after] by a vector of indices."""
    data, indices = rewriter.need(0), rewriter.need(1)
    shape, count = rewriter.shape(data), (math.prod(rewriter.shape(indices)),)
    axis = rewriter.node.attributes.get_int("axis", 0) % len(shape)
    before, after = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
    operands = [rewriter.regroup(data, (before, shape[axis], after)), rewriter.regroup(indices, count)]
    return rewriter.again(operands, [(before, *count, after)], {"axis": 1})


def _gather_nd(rewriter: Rewriter) -> list[ir.Value]:
    """[batch, indexed axes, rest] by [batch, tuples of indices]."""
    shape, tuples = rewriter.shape(rewriter.need(0)), rewriter.shape(rewriter.need(1))
    batch, width = rewriter.node.attributes.get_int("batch_dims", 0), tuples[-1]
    lead = (math.prod(shape[:batch]),) if batch else ()
    data = (*lead, *shape[batch : batch + width], math.prod(shape[batch + width :]))
    indices = (*lead, math.prod(tuples[batch:-1]), width)
    if len(data) > MAX_RANK:
        raise rewriter.refuse(f"by tuples of {width} indices", "compute one index into merged axes")
    operands = [rewriter.regroup(rewriter.need(0), data), rewriter.regroup(rewriter.need(1), indices)]
    return rewriter.again(operands, [(*indices[:-1], data[-1])], {"batch_dims": len(lead)})


def _scatter_nd(rewriter: Rewriter) -> list[ir.Value]:
    """[indexed axes, rest] by tuples of indices."""
    shape, tuples = rewriter.shape(rewriter.need(0)), rewriter.shape(rewriter.need(1))
    width, count = tuples[-1], math.prod(tuples[:-1])
    data = (*shape[:width], math.prod(shape[width:]))
    if len(data) > MAX_RANK:
        raise rewriter.refuse(f"by tuples of {width} indices", "compute one index into merged axes")
    shapes = (data, (count, width), (count, data[-1]))
    return rewriter.again([rewriter.regroup(rewriter.need(index), wanted) for index, wanted in enumerate(shapes)], [data])


def _slice(rewriter: Rewriter) -> list[ir.Value]:
    """Axes that are taken whole are joined."""
    value = rewriter.need(0)
    shape, target = rewriter.shape(value), rewriter.shape(rewriter.node.outputs[0])
    starts, ends = rewriter.known(1, "starts") or [], rewriter.known(2, "ends") or []
    axes = [axis % len(shape) for axis in rewriter.known(3, "axes") or range(len(starts))]
    steps = rewriter.known(4, "steps") or [1] * len(starts)
    ranges = {axis: part for axis, *part in zip(axes, starts, ends, steps, strict=True)}

    def write(part: ir.Value, grouping: Grouping, result: Shape) -> ir.Value:
        chosen = [axis for axis in ranges if axis in grouping.roles]
        parameters = [
            rewriter.constant([ranges[axis][index] for axis in chosen], name) for index, name in enumerate(("starts", "ends", "steps"))
        ]
        places = rewriter.constant([grouping.place(axis) for axis in chosen], "axes")
        return rewriter.again([part, *parameters[:2], places, parameters[2]], [grouping.shape(result)])[0]

    cut = {axis: target[axis] for axis, (_, _, step) in ranges.items() if step != 1 or target[axis] != shape[axis]}
    return [rewriter.axiswise(value, shape, cut, write)]


def _pad(rewriter: Rewriter) -> list[ir.Value]:
    """Axes that are not padded are joined; in every mode, axes may be padded one after the other."""
    value = rewriter.need(0)
    shape, target = rewriter.shape(value), rewriter.shape(rewriter.node.outputs[0])
    pads = rewriter.known(1, "pads") or []
    axes = [axis % len(shape) for axis in rewriter.known(3, "axes") or range(len(pads) // 2)]
    amounts = {axis: (pads[index], pads[index + len(axes)]) for index, axis in enumerate(axes)}

    def write(part: ir.Value, grouping: Grouping, result: Shape) -> ir.Value:
        sizes = [[0] * grouping.rank, [0] * grouping.rank]
        for axis in (axis for axis in amounts if axis in grouping.roles):
            for side in (0, 1):
                sizes[side][grouping.place(axis)] = amounts[axis][side]
        return rewriter.again([part, rewriter.constant(sizes[0] + sizes[1], "pads"), rewriter.input(2)], [grouping.shape(result)])[0]

    return [rewriter.axiswise(value, shape, {axis: target[axis] for axis, sides in amounts.items() if any(sides)}, write)]


def _tile(rewriter: Rewriter) -> list[ir.Value]:
    """Axes that are not repeated are joined."""
    value = rewriter.need(0)
    shape, repeats = rewriter.shape(value), rewriter.known(1, "repeats") or []

    def write(part: ir.Value, grouping: Grouping, result: Shape) -> ir.Value:
        counts = [1] * grouping.rank
        for axis in (axis for axis in range(len(shape)) if axis in grouping.roles):
            counts[grouping.place(axis)] = repeats[axis]
        return rewriter.again([part, rewriter.constant(counts, "repeats")], [grouping.shape(result)])[0]

    return [rewriter.axiswise(value, shape, {axis: shape[axis] * count for axis, count in enumerate(repeats) if count != 1}, write)]


def _expand(rewriter: Rewriter) -> list[ir.Value]:
    target = rewriter.shape(rewriter.node.outputs[0])
    return [rewriter.expand(rewriter.need(0), align(rewriter.shape(rewriter.need(0)), len(target)), target)]


def _transpose(rewriter: Rewriter) -> list[ir.Value]:
    shape = rewriter.shape(rewriter.need(0))
    perm = rewriter.node.attributes.get_ints("perm", None) or tuple(reversed(range(len(shape))))
    return [rewriter.transpose(rewriter.need(0), shape, perm)]


def _normalization(rewriter: Rewriter) -> list[ir.Value]:
    """LayerNormalization and RMSNormalization: the normalized axes are one, and so are those before."""
    node = rewriter.node
    shape = rewriter.shape(rewriter.need(0))
    axis = node.attributes.get_int("axis", -1) % len(shape)
    present = [value for value in node.inputs if value is not None]
    roles: list[Role] = [FREE if index < axis else "normalized" for index in range(len(shape))]
    shapes = [align(rewriter.shape(value), len(shape)) for value in present]
    operands, grouping = rewriter.broadcast(present, shapes, [shape] * len(present), roles)
    results = [grouping.shape(rewriter.result(output, shape)) for output in node.outputs]
    return rewriter.again(operands, results, {"axis": grouping.places("normalized")[0]})


def _trailing(count: int) -> Rule:
    """The rule of operators on the last `count` axes, which are alone; those before are batch."""

    def rule(rewriter: Rewriter) -> list[ir.Value]:
        shape = rewriter.shape(rewriter.need(0))
        last = len(shape) - count
        return _structured(rewriter, [FREE if axis < last else axis for axis in range(len(shape))])

    return rule


def _channels(rewriter: Rewriter) -> list[ir.Value]:
    """Operators on [N, C, spatial axes] that do not tell the spatial axes apart."""
    return _structured(rewriter, [0, 1, *["spatial"] * (rank(rewriter.need(0)) - 2)])


def _structured(rewriter: Rewriter, roles: Sequence[Role]) -> list[ir.Value]:
    """Writes the operator with its first input, and the results of that rank, in groups by `roles`."""
    value = rewriter.need(0)
    shape = rewriter.shape(value)
    grouping = rewriter.refine(group_axes([shape], roles), value, shape)
    results = [rewriter.result(output, shape) for output in rewriter.node.outputs]
    shapes = [grouping.shape(result) if len(result) == len(shape) else result for result in results]
    return rewriter.again([rewriter.regroup(value, grouping.shape(shape)), *rewriter.node.inputs[1:]], shapes)


_ELEMENTWISE = (
    "Abs", "Acos", "Acosh", "Add", "And", "Asin", "Asinh", "Atan", "Atanh", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr",
    "BitwiseXor", "Cast", "Ceil", "Celu", "Clip", "Cos", "Cosh", "Div", "Dropout", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu",
    "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean",
    "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign",
    "Sin", "Sinh", "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Where", "Xor",
)  # fmt: skip
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
_CHANNELS = (
    "BatchNormalization", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GroupNormalization", "InstanceNormalization", "LRN",
)  # fmt: skip

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCTIONS), _reduction),
    **dict.fromkeys(_CHANNELS, _channels),
    **dict.fromkeys(("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"), _view),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalization),
    **dict.fromkeys(("DequantizeLinear", "QuantizeLinear"), _quantization),
    **dict.fromkeys(("ArgMax", "ArgMin", "Split"), _along(0, 0)),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "LpNormalization", "Softmax", "TopK"), _along(-1, 0)),
    "CastLike": _cast_like,
    "Concat": _along(0),
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "CumSum": _cumulative,
    "Einsum": einsum,
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": _along(0, 0, 1),
    "GatherND": _gather_nd,
    "MatMul": matmul,
    "Pad": _pad,
    "ScatterElements": _along(0, 0, 1, 2),
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trailing(2),
}
"""What can be rewritten; an operator that is not here tells its axes apart, and is refused."""

NEAREST: dict[str, str] = {
    **dict.fromkeys(("Conv", "ConvTranspose"), "write it as a sum over slices of one spatial axis, each with 3 spatial axes at most"),
    **dict.fromkeys(("AveragePool", "LpPool", "MaxPool"), "pool over 3 spatial axes first and over the others after a Reshape"),
    "Resize": "merge the axes that keep their length by a Reshape before it",
    "NonZero": "apply it to a Reshape to one axis, and compute the indices from that one by Div and Mod",
    "OneHot": "apply it to a Reshape of the indices to one axis, and reshape its result",
}
"""What to write instead of operators that have no rule."""
