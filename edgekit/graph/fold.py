"""Constant folding with bounds: what depends on constants alone becomes an initializer, and nothing huge is ever made.

`onnxscript.optimizer.fold_constants` makes the result before it looks at its size, and stops at the first malformed node. Graphs from
outside can ask for terabytes (`ConstantOfShape`, `Expand`), so here the size of a result is known before it is computed, only operators
whose time is proportional to their sizes are evaluated, and a node that fails stays as it is.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx.reference.ops
import onnx_ir as ir

from edgekit.graph import fold_general
from edgekit.graph.check import subgraphs
from edgekit.graph.parameters import inherit_by_folding
from edgekit.graph.shapes import static_shape

FILLED = "edgekit.filled"
"""Set in `value.meta` of a folded tensor that is one number repeated (an Expand): no weight of the model."""
TENSOR_LIMIT_BYTES = 64 << 20
"""No folded tensor is larger, unless it replaces constants of the same size."""
GROWTH_LIMIT_BYTES = 256 << 20
"""By how much folding may enlarge a model in all."""
_SLOW_LIMIT_ELEMENTS = 1 << 16
_MATMUL_LIMIT_MACS = 1 << 28

Bound = Callable[[ir.Node, Sequence[np.ndarray]], int]
"""Takes a node and its inputs (those that are large only as shapes) and returns how many elements it makes at most."""

_ELEMENTWISE = (
    *("Abs", "Add", "And", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Cast", "Ceil", "Clip", "Cos", "Div"),
    *("Equal", "Erf", "Exp", "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min"),
    *(
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sqrt",
        "Sub",
        "Sum",
        "Tan",
        "Tanh",
    ),
    *("Where", "Xor"),
)
_NOT_LARGER = (
    *("ArgMax", "ArgMin", "CumSum", "EyeLike", "Flatten", "Identity", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
    *("Reshape", "ScatterElements", "ScatterND", "Slice", "Softmax", "Split", "Squeeze", "Transpose", "Trilu", "Unsqueeze"),
)
_SLOW = frozenset({"Erf", "ScatterElements", "ScatterND"})
"""The reference implementation of these loops in Python."""


def _product(sizes: np.ndarray) -> int:
    return math.prod(abs(int(size)) for size in sizes.reshape(-1))


def _same_size(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    return math.prod(max(1, size) for size in arrays[0].shape)  # a reduction over an axis of size 0 is larger than its input


def _broadcast(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    return math.prod(np.broadcast_shapes(*(array.shape for array in arrays)))


def _expand(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    return math.prod(np.broadcast_shapes(arrays[0].shape, tuple(arrays[1].tolist())))


def _range(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    start, limit, delta = (float(array.item()) for array in arrays)
    return max(0, math.ceil((limit - start) / delta))


def _pad(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    longest = sum(abs(int(pad)) for pad in arrays[1].reshape(-1))
    return math.prod(size + longest for size in arrays[0].shape)


def _gather(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    along = int(arrays[0].shape[node.attributes.get_int("axis", 0)])
    return arrays[0].size // max(1, along) * arrays[1].size


def _gather_nd(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    data, indices = arrays
    first = node.attributes.get_int("batch_dims", 0) + indices.shape[-1]
    return math.prod(indices.shape[:-1]) * math.prod(data.shape[first:])


def _matmul(node: ir.Node, arrays: Sequence[np.ndarray]) -> int:
    a, b = arrays
    rows, columns = (a.shape[-2] if a.ndim > 1 else 1), (b.shape[-1] if b.ndim > 1 else 1)
    elements = math.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2])) * rows * columns
    if elements * a.shape[-1] > _MATMUL_LIMIT_MACS:
        raise ValueError("too much work for folding")
    return elements


_BOUNDS: dict[str, Bound] = {
    **dict.fromkeys(_ELEMENTWISE, _broadcast),
    **dict.fromkeys(_NOT_LARGER, _same_size),
    "Concat": lambda node, arrays: sum(array.size for array in arrays),
    "ConstantOfShape": lambda node, arrays: _product(arrays[0]),
    "Expand": _expand,
    "Gather": _gather,
    "GatherElements": lambda node, arrays: arrays[1].size,
    "GatherND": _gather_nd,
    "MatMul": _matmul,
    "NonZero": lambda node, arrays: arrays[0].size * max(1, arrays[0].ndim),
    "OneHot": lambda node, arrays: arrays[0].size * _product(arrays[1]),
    "Pad": _pad,
    "Range": _range,
    "Tile": lambda node, arrays: arrays[0].size * _product(arrays[1]),
}
"""For every operator that is folded, its bound. What is not here stays a node."""


@dataclass
class Budget:
    """By how many bytes folding may still enlarge the model; shared by all rounds over one model."""

    growth: int = GROWTH_LIMIT_BYTES


def fold_constants(model: ir.Model, budget: Budget) -> bool:
    """Folds, in place, nodes of the graph and its subgraphs whose inputs are constants; True when it changed something.

    Shape and Size of a value of static shape fold too, and CastLike becomes Cast. Nodes that make a graph output stay. Quantization
    operators are never folded: they say how a weight is stored.
    """
    return _fold_graph(model.graph, model.opset_imports.get("", 0), budget)


def _fold_graph(graph: ir.Graph, opset: int, budget: Budget) -> bool:
    changed = False
    for node in graph:
        for body in subgraphs(node):
            changed |= _fold_graph(body, opset, budget)
        if node.domain != "" or any(output.is_graph_output() for output in node.outputs):
            continue
        if node.op_type == "CastLike":
            changed |= _cast_like_to_cast(node)
        arrays = _fold_node(node, opset, budget)
        if arrays is None:
            continue
        _replace(node, arrays)
        changed = True
    return changed


def _cast_like_to_cast(node: ir.Node) -> bool:
    target = node.inputs[1].dtype if len(node.inputs) == 2 and node.inputs[1] is not None else None
    if target is None or target == ir.DataType.UNDEFINED:
        return False
    node.resize_inputs(1)
    node.op_type = "Cast"
    node.attributes["to"] = ir.AttrInt64("to", target.value)
    return True


def _fold_node(node: ir.Node, opset: int, budget: Budget) -> list[np.ndarray] | None:
    """Returns the values of the node's outputs, or None when it is not to be folded."""
    try:
        if node.op_type in ("Shape", "Size"):
            return _fold_shape(node)
        bound = _BOUNDS.get(node.op_type)
        if (
            (bound is None and node.op_type not in fold_general.GENERAL)
            or not node.inputs
            or not all(value is None or _is_constant(value) for value in node.inputs)
        ):
            return None
        if any(value is not None and value.dtype == ir.DataType.STRING for value in node.inputs):
            return None
        arrays = _folded(node, opset, bound, budget) if bound is not None else None
        if arrays is None and node.op_type in fold_general.GENERAL:
            arrays = _folded(node, opset, None, budget)
    except Exception:  # the evaluators raise anything on malformed nodes; such a node stays for the runtime to refuse
        return None
    return arrays


def _folded(node: ir.Node, opset: int, bound: Bound | None, budget: Budget) -> list[np.ndarray] | None:
    """Computes a node within the budget: by onnx's reference implementation under `bound`, without one by the interpreter."""
    elements = bound(node, _inputs(node)) if bound is not None else fold_general.output_elements(node, opset)
    growth = _growth(node, elements, is_slow=bound is not None and _is_slow(node)) if elements is not None else None
    if growth is None or growth > budget.growth:
        return None
    arrays = _as_declared(node, _evaluate(node, opset) if bound is not None else fold_general.evaluate(node, opset))
    if arrays is not None:
        budget.growth -= growth
    return arrays


def _is_constant(value: ir.Value) -> bool:
    return value.const_value is not None and value.is_initializer() and not value.is_graph_input()


def _fold_shape(node: ir.Node) -> list[np.ndarray] | None:
    shape = static_shape(node.inputs[0])
    if shape is None:
        return None
    if node.op_type == "Size":
        return [np.array(math.prod(shape), dtype=np.int64)]
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", None)
    return [np.array(shape[start:end], dtype=np.int64)]


def _is_slow(node: ir.Node) -> bool:
    return node.op_type in _SLOW or (node.op_type == "GatherND" and node.attributes.get_int("batch_dims", 0) != 0)


def _inputs(node: ir.Node) -> list[np.ndarray]:
    return [_sized(value.const_value) for value in node.inputs if value is not None and value.const_value is not None]


def _growth(node: ir.Node, elements: int, is_slow: bool) -> int | None:
    """Returns by how many bytes at most folding `node` enlarges the model, or None when a tensor would be too large.

    It is decided by sizes alone: only small inputs (target shapes, repeats, pads) are read.
    """
    constants = {value: value.const_value for value in node.inputs if value is not None and value.const_value is not None}
    if is_slow and max(elements, *(tensor.size for tensor in constants.values())) > _SLOW_LIMIT_ELEMENTS:
        return None
    dtype = node.outputs[0].dtype
    size = elements * (math.ceil(dtype.itemsize) if dtype is not None and dtype != ir.DataType.UNDEFINED else 8)
    freed = sum(tensor.nbytes for value, tensor in constants.items() if {use.node for use in value.uses()} == {node})
    largest = max([size, *(tensor.nbytes for tensor in constants.values())])
    if largest > TENSOR_LIMIT_BYTES and size > freed:
        return None
    return max(0, size - freed)


def _sized(tensor: ir.TensorProtocol) -> np.ndarray:
    """Returns the tensor when it is small, and otherwise a view of its shape that occupies no memory."""
    if tensor.nbytes <= 1 << 12:
        return tensor.numpy()
    return np.broadcast_to(np.zeros((), dtype=np.uint8), tensor.shape.numpy())


def _evaluate(node: ir.Node, opset: int) -> list[np.ndarray]:
    inputs = [value.const_value.numpy() if value is not None and value.const_value is not None else None for value in node.inputs]
    if node.op_type == "GatherElements" or (node.op_type == "GatherND" and not node.attributes.get_int("batch_dims", 0)):
        return [_gathered(node, *(array for array in inputs if array is not None))]
    attributes = {name: ir.to_proto(attr.as_tensor()) if attr.type == ir.AttributeType.TENSOR else attr.value
                  for name, attr in node.attributes.items()}  # fmt: skip
    with np.errstate(all="ignore"):
        results = onnx.reference.ops.load_op("", node.op_type, opset).eval(*inputs, **attributes)
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _gathered(node: ir.Node, data: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """GatherND and GatherElements by numpy: the reference implementation loops in Python."""
    if node.op_type == "GatherND":
        return np.asarray(data[tuple(np.moveaxis(indices, -1, 0))])
    axis = node.attributes.get_int("axis", 0) % data.ndim
    covered = data[tuple(slice(None) if at == axis else slice(size) for at, size in enumerate(indices.shape))]
    return np.take_along_axis(covered, indices, axis)


def _as_declared(node: ir.Node, results: Sequence[np.ndarray]) -> list[np.ndarray] | None:
    """Returns the results as arrays of memory of their own; None when they contradict the graph."""
    arrays = [np.ascontiguousarray(result) if np.ndim(result) else np.asarray(result) for result in results]
    if len(arrays) != len(node.outputs) or any(array.dtype == object for array in arrays):
        return None
    for output, array in zip(node.outputs, arrays, strict=True):
        if output.dtype not in (None, ir.DataType.UNDEFINED) and output.dtype != ir.DataType.from_numpy(array.dtype):
            return None  # the graph declares another dtype: leave the contradiction to the runtime
    return arrays


def _replace(node: ir.Node, arrays: list[np.ndarray]) -> None:
    graph = node.graph
    assert graph is not None
    inputs = [value for value in node.inputs if value is not None]
    outputs = list(node.outputs)
    name = _inherited_name(node)
    folded = []
    for output, array in zip(outputs, arrays, strict=True):
        tensor = ir.Tensor(array, name=output.name)
        initializer = ir.Value(name=output.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        if node.op_type == "Expand" and inputs[0].const_value is not None and inputs[0].const_value.size == 1:
            initializer.meta[FILLED] = True
        output.replace_all_uses_with(initializer)
        output.name = None
        graph.register_initializer(initializer)
        folded.append(initializer)
    graph.remove(node, safe=True)
    for value in inputs:
        if value.graph is None or value.uses() or value.is_graph_output():
            continue
        value.graph.initializers.pop(value.name or "", None)
        if isinstance(value.const_value, ir.ExternalTensor):
            with contextlib.suppress(BufferError):  # a reshaped weight still looks into the mapped file
                value.const_value.release()
    if name is not None and name not in graph.initializers:
        initializer.name = name
    inherit_by_folding(folded, inputs, node.op_type)


def _inherited_name(node: ir.Node) -> str | None:
    """A weight that was only moved about (transposed, reshaped, cast) keeps its name: it leads back to the PyTorch module."""
    if node.op_type not in ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Expand", "Flatten"):
        return None
    weight = node.inputs[0]
    return weight.name if weight is not None and {use.node for use in weight.uses()} == {node} and not weight.is_graph_output() else None
