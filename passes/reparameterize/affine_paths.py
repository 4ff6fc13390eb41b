"""Carries an affine map past the operators that it commutes with: layout operators, averages over other axes, interpolation.

A map on a value is an `Affine` whose arrays have the rank of the value and broadcast to its shape: `[1, C, 1, 1]` for channels of a map,
`[1, 1, C]` for features of tokens. Layout operators move the numbers of the map as they move the elements of the value; so the channel
axis is followed through any Reshape, also one that splits it into heads. Operators that mix elements along an axis let a map pass that
does not vary along it: the weights of an average sum to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine import AffineNode
from edgekit.passes.reparameterize.batch_norm import Affine

Shape = tuple[int, ...]


def on_value(found: AffineNode) -> Affine:
    """Returns the map of a node with the rank of what it maps, which must be known."""
    if found.x.shape is None:
        raise ValueError(f"the rank of what {_called(found.node)} reads is not known")
    rank = len(found.x.shape)
    return _each(found.map, lambda array: array.reshape([-1 if axis == found.axis else 1 for axis in range(rank)]))


def along(a: Affine, axis: int, size: int) -> Affine | None:
    """Returns scale and shift per place of `axis`, `[size]`; None where one varies along another axis or is not so long."""
    for array in (a.scale, a.shift):
        if array.size not in (1, size) or array.size != array.shape[axis]:
            return None
    return _each(a, lambda array: np.broadcast_to(array.reshape(-1), (size,)))


def compact(a: Affine) -> Affine:
    """Shortens to 1 the axes along which scale or shift do not vary."""
    return _each(a, _shortened)


def is_identity(a: Affine) -> bool:
    """True for the map that changes nothing."""
    return bool((a.scale == 1).all() and not a.shift.any())


def passes_through(node: ir.Node) -> bool:
    """True for the operators that some map commutes with."""
    return node.domain == "" and node.op_type in _FORWARD


def forward(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | str:
    """Returns the map on each output, given that on each input (None: an input that is not mapped), or why there is none.

    With these maps, node(a ⊙ x + c) = a' ⊙ node(x) + c'. Only for nodes that `passes_through`.
    """
    shapes = [static_shape(value) for value in (*node.inputs[:1], *node.outputs[:1])]
    if None in shapes:
        return f"the shapes around {_called(node)} are not known"
    result = _FORWARD[node.op_type](node, maps)
    if result is None:
        return f"the map does not commute with {_called(node)}"
    return [compact(a) for a in result]


def backward(node: ir.Node, a: Affine) -> Affine | str:
    """Returns the map on the first input that gives the map `a` on the only output that is read, or why there is none.

    With it, a ⊙ node(x) + c = node(a' ⊙ x + c').
    """
    shape, made = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if node.domain != "" or node.op_type not in _BACKWARD:
        return f"it is made by {_called(node)}"
    if shape is None or made is None:
        return f"the shapes around {_called(node)} are not known"
    result = _BACKWARD[node.op_type](node, a, shape, made)
    return f"the map does not commute with {_called(node)}" if result is None else compact(result)


def constant_pad(node: ir.Node, a: Affine) -> float | None:
    """Returns the value that a Pad by a constant must have where the map `a` is taken off its input, or None when it is not one number.

    The new value v' is the one that the map sends to the old value: a·v' + c = v (a = 1, c = 0 leave it).
    """
    axes, constant = _padded_axes(node), constant_array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else 0.0
    if axes is None or constant is None or _varies(a, axes) or not a.scale.all():
        return None
    values = (float(np.asarray(constant).reshape(-1)[0]) - a.shift) / a.scale
    return one_number(values)


def one_number(values: np.ndarray) -> float | None:
    """Returns the number that all of `values` are but for rounding in float64, or None."""
    first = float(values.reshape(-1)[0])
    return first if np.allclose(values, first, rtol=1e-12, atol=0) else None


def is_constant_pad(node: ir.Node) -> bool:
    """True for a Pad that writes one value."""
    return node.op_type == "Pad" and node.domain == "" and node.attributes.get_string("mode", "constant") == "constant"


def _each(a: Affine, function: Callable[[np.ndarray], np.ndarray]) -> Affine:
    return Affine(function(a.scale), function(a.shift))


def _called(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"


def _shortened(array: np.ndarray) -> np.ndarray:
    for axis, length in enumerate(array.shape):
        first = array.take([0], axis)
        if length > 1 and (array == first).all():
            array = first
    return array


def _varies(a: Affine, axes: Sequence[int]) -> bool:
    return any(array.shape[axis] != 1 for array in (a.scale, a.shift) for axis in axes)


def _stretched(array: np.ndarray, shape: Shape, axes: Sequence[int]) -> np.ndarray:
    """Broadcasts `array` along `axes` to the lengths of `shape`."""
    target = [shape[axis] if axis in axes else length for axis, length in enumerate(array.shape)]
    return np.broadcast_to(array, target)


def _shape(value: ir.Value | None) -> Shape:
    shape = static_shape(value)
    if shape is None:
        raise ValueError("forward and backward look at values of known shape")
    return shape


def _ints(value: ir.Value | None) -> list[int] | None:
    array = constant_array(value)
    return None if array is None else [int(number) for number in array.reshape(-1)]


def _only(maps: Sequence[Affine | None]) -> Affine:
    """The map on the first input; nodes with several mapped inputs are Concat alone."""
    assert maps[0] is not None
    return maps[0]


def _transpose(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    return [_each(_only(maps), lambda array: array.transpose(_perm(node, array.ndim)))]


def _perm(node: ir.Node, rank: int) -> list[int]:
    return list(node.attributes.get_ints("perm", ())) or list(range(rank))[::-1]


def _reshape(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    shape, made = _shape(node.inputs[0]), static_shape(node.outputs[0])
    return None if made is None else [_reshaped(_only(maps), shape, made)]


def _reshaped(a: Affine, shape: Shape, made: Shape) -> Affine:
    def move(array: np.ndarray) -> np.ndarray:
        return np.full((1,) * len(made), array.item()) if array.size == 1 else np.broadcast_to(array, shape).reshape(made)

    return _each(a, move)


def _identity(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    return [_only(maps)]


def _slice(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    shape, given = _shape(node.inputs[0]), [_ints(value) for value in node.inputs[1:]]
    if any(numbers is None for value, numbers in zip(node.inputs[1:], given, strict=True) if value is not None):
        return None
    starts, ends = given[0] or [], given[1] or []
    axes = [axis % len(shape) for axis in (given[2] if len(given) > 2 and given[2] else range(len(starts)))]
    steps = given[3] if len(given) > 3 and given[3] else [1] * len(starts)
    windows = [slice(None)] * len(shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        windows[axis] = slice(start, end, step)
    return [_each(_only(maps), lambda array: _stretched(array, shape, axes)[tuple(windows)])]


def _gather(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    shape, indices = _shape(node.inputs[0]), constant_array(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(shape)
    if maps[0] is None or indices is None:
        return None
    return [_each(maps[0], lambda array: np.take(_stretched(array, shape, [axis]), indices.astype(np.int64), axis))]


def _split(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    shape = _shape(node.inputs[0])
    axis = node.attributes.get_int("axis", 0) % len(shape)
    parts = [static_shape(output) for output in node.outputs]
    if None in parts:
        return None
    ends = np.cumsum([part[axis] for part in parts if part is not None])[:-1]
    scales, shifts = (np.split(_stretched(array, shape, [axis]), ends, axis) for array in (_only(maps).scale, _only(maps).shift))
    return [Affine(scale, shift) for scale, shift in zip(scales, shifts, strict=True)]


def _concat(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    shapes = [static_shape(value) for value in node.inputs]
    if None in shapes:
        return None
    rank = len(shapes[0] or ())
    axis = node.attributes.get_int("axis") % rank
    ones = np.ones((1,) * rank)
    parts = [a if a is not None else Affine(ones, ones * 0) for a in maps]

    def joined(arrays: list[np.ndarray]) -> np.ndarray:
        lengths = [max(array.shape[place] for array in arrays) for place in range(rank)]  # 1 where no part varies
        full = [[(shape or ())[axis] if place == axis else length for place, length in enumerate(lengths)] for shape in shapes]
        return np.concatenate([np.broadcast_to(array, shape) for array, shape in zip(arrays, full, strict=True)], axis)

    return [Affine(joined([a.scale for a in parts]), joined([a.shift for a in parts]))]


def _expand(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    made = static_shape(node.outputs[0])
    if made is None or maps[0] is None:
        return None
    return [_each(maps[0], lambda array: array.reshape((1,) * (len(made) - array.ndim) + array.shape))]


def _depth_to_space(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    return [_each(_only(maps), lambda array: _unfolded(node, np.broadcast_to(array, _shape(node.inputs[0]))))]


def _space_to_depth(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    return [_each(_only(maps), lambda array: _folded(np.broadcast_to(array, _shape(node.inputs[0])), node, "DCR"))]


def _unfolded(node: ir.Node, array: np.ndarray, order: str = "") -> np.ndarray:
    """`[N, C·r², H, W]` ─► `[N, C, H·r, W·r]`; the channels are (r, r, C) for DCR and (C, r, r) for CRD."""
    block = node.attributes.get_int("blocksize")
    n, channels, h, w = array.shape
    c = channels // block**2
    if (order or node.attributes.get_string("mode", "DCR")) == "DCR":
        parts = array.reshape(n, block, block, c, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        parts = array.reshape(n, c, block, block, h, w).transpose(0, 1, 4, 2, 5, 3)
    return parts.reshape(n, c, h * block, w * block)


def _folded(array: np.ndarray, node: ir.Node, order: str) -> np.ndarray:
    """The inverse of `_unfolded`."""
    block = node.attributes.get_int("blocksize")
    n, c, height, width = array.shape
    parts = array.reshape(n, c, height // block, block, width // block, block)
    order_of_axes = (0, 3, 5, 1, 2, 4) if order == "DCR" else (0, 1, 3, 5, 2, 4)
    return parts.transpose(order_of_axes).reshape(n, c * block**2, height // block, width // block)


# Averages, maxima, interpolation: they mix along some axes


def _mixing(node: ir.Node, maps: Sequence[Affine | None]) -> list[Affine] | None:
    a = maps[0]
    if a is None or not _mixes_exactly(node, a):
        return None
    if node.op_type != "ReduceMean" or node.attributes.get_int("keepdims", 1) != 0:
        return [a]
    gone = tuple(_mixed_axes(node) or ())
    return [_each(a, lambda array: array.reshape([length for place, length in enumerate(array.shape) if place not in gone]))]


def _mixing_back(node: ir.Node, a: Affine, shape: Shape, made: Shape) -> Affine | None:
    if node.op_type == "ReduceMean" and node.attributes.get_int("keepdims", 1) == 0:
        axes = _mixed_axes(node)
        if axes is None:
            return None
        a = _each(a, lambda array: np.expand_dims(array, tuple(axes)))
    return a if _mixes_exactly(node, a) else None


def _mixes_exactly(node: ir.Node, a: Affine) -> bool:
    axes = _mixed_axes(node)
    if axes is None or _varies(a, axes):
        return False
    pure_scale = not a.shift.any()
    if node.op_type == "AveragePool":
        return pure_scale or _divides_by_real_elements(node)
    if node.op_type == "MaxPool":
        return bool((a.scale > 0).all())
    if node.op_type == "Relu":
        return pure_scale and bool((a.scale > 0).all())
    return True


def _mixed_axes(node: ir.Node) -> list[int] | None:
    """The axes along which elements are mixed, or None when that cannot be told."""
    shape, made = _shape(node.inputs[0]), static_shape(node.outputs[0])
    rank = len(shape)
    if node.op_type in ("AveragePool", "MaxPool", "GlobalAveragePool"):
        extra_read = any(output.uses() or output.is_graph_output() for output in node.outputs[1:])
        return None if extra_read else list(range(2, rank))
    if node.op_type == "Relu":
        return []
    if node.op_type == "Resize":
        return _resized_axes(node, shape, made) if made is not None and _interpolates(node) else None
    if node.op_type == "Pad":
        return _padded_axes(node)
    return _averaged_axes(node, rank)


def _averaged_axes(mean: ir.Node, rank: int) -> list[int] | None:
    axes_value = mean.inputs[1] if len(mean.inputs) > 1 else None
    axes = _ints(axes_value)
    if axes_value is not None and axes is None:
        return None
    if not axes:
        return [] if mean.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    return [axis % rank for axis in axes]


def _divides_by_real_elements(pool: ir.Node) -> bool:
    """An average whose divisor counts no padding, so that its weights sum to one everywhere."""
    if not pool.attributes.get_int("count_include_pad", 0):
        return True
    padded = any(pool.attributes.get_ints("pads", ())) or pool.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return not padded and not pool.attributes.get_int("ceil_mode", 0)


def _interpolates(resize: ir.Node) -> bool:
    """Interpolation whose weights sum to one; tf_crop_and_resize writes a constant outside of the source."""
    return resize.attributes.get_string("coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"


def _resized_axes(resize: ir.Node, shape: Shape, made: Shape) -> list[int] | None:
    scales_value = resize.inputs[2] if len(resize.inputs) > 2 else None
    scales = constant_array(scales_value)
    if scales_value is not None and scales is None:
        return None
    axes = [axis % len(shape) for axis in resize.attributes.get_ints("axes", ())] or list(range(len(shape)))
    if scales is not None and scales.size:
        return [axis for axis, scale in zip(axes, scales.reshape(-1), strict=True) if scale != 1]
    return [axis for axis in axes if shape[axis] != made[axis]]


def _padded_axes(pad: ir.Node) -> list[int] | None:
    shape, pads = static_shape(pad.inputs[0]), _ints(pad.inputs[1])
    axes_value = pad.inputs[3] if len(pad.inputs) > 3 else None
    axes = _ints(axes_value)
    if shape is None or pads is None or (axes_value is not None and axes is None):
        return None
    axes = [axis % len(shape) for axis in axes] if axes is not None else list(range(len(shape)))
    return [axis for axis, begin, end in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True) if begin or end]


def _transpose_back(node: ir.Node, a: Affine, shape: Shape, made: Shape) -> Affine | None:
    return _each(a, lambda array: array.transpose(np.argsort(_perm(node, array.ndim))))


def _reshape_back(node: ir.Node, a: Affine, shape: Shape, made: Shape) -> Affine | None:
    return _reshaped(a, made, shape)


def _depth_to_space_back(node: ir.Node, a: Affine, shape: Shape, made: Shape) -> Affine | None:
    order = node.attributes.get_string("mode", "DCR")
    return _each(a, lambda array: _folded(np.broadcast_to(array, made), node, order))


def _space_to_depth_back(node: ir.Node, a: Affine, shape: Shape, made: Shape) -> Affine | None:
    return _each(a, lambda array: _unfolded(node, np.broadcast_to(array, made), "DCR"))


_RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_MIXING = ("AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMean", "Relu", "Resize")

_FORWARD: dict[str, Callable[[ir.Node, Sequence[Affine | None]], list[Affine] | None]] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(_MIXING, _mixing),
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Gather": _gather,
    "Identity": _identity,
    "Pad": _mixing,  # reflected, repeated and wrapped; of a constant pad see `constant_pad`
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Transpose": _transpose,
}

_BACKWARD: dict[str, Callable[[ir.Node, Affine, Shape, Shape], Affine | None]] = {
    **dict.fromkeys(_RESHAPES, _reshape_back),
    **dict.fromkeys(_MIXING, _mixing_back),
    "DepthToSpace": _depth_to_space_back,
    "SpaceToDepth": _space_to_depth_back,
    "Transpose": _transpose_back,
}
