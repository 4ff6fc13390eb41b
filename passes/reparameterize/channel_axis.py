"""Follows one axis, that of the channels, through operators that treat all its places alike and do not mix them.

Add, Sub, Neg, Concat, Slice, Gather, Split, Reshape and its kin, Transpose, Expand, ReduceMean over other axes, and scaling by one number:
if the channels of all inputs sum to zero, so do those of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape

Shape = tuple[int, ...]
_Find = Callable[[ir.Node, Shape, Shape, int], int | None]
"""From node, shape of an input, shape of an output and axis of the output to the axis of that input."""


def inputs_at(node: ir.Node, output: ir.Value, axis: int) -> list[tuple[ir.Value, int]] | None:
    """Returns the inputs whose channels those of `output` are made of, each with its axis; None where the operator does more."""
    to = static_shape(output)
    indices = _sources(node)
    if indices is None or to is None:
        return None
    found: list[tuple[ir.Value, int]] = []
    for index in indices:
        value = node.inputs[index]
        shape = static_shape(value)
        at = None if shape is None or 0 in shape else _FINDERS[node.op_type](node, shape, to, axis)
        if value is None or shape is None or at is None or not 0 <= at < len(shape) or shape[at] != to[axis]:
            return None
        found.append((value, at))
    return found


def outputs_at(node: ir.Node, index: int, axis: int) -> list[tuple[ir.Value, int]] | None:
    """Returns all outputs with the axis on which the channels of input `index` are; None where the operator does more with them."""
    value = node.inputs[index]
    indices = _sources(node)
    if indices is None or index not in indices:
        return None
    found: list[tuple[ir.Value, int]] = []
    for output in node.outputs:
        to = static_shape(output)
        places = [at for at in range(len(to or ())) if (value, axis) in (inputs_at(node, output, at) or ())]
        if len(places) != 1:
            return None
        found.append((output, places[0]))
    return found


def _sources(node: ir.Node) -> Sequence[int] | None:
    """The inputs that the channels come from; None for an operator that mixes or distinguishes them."""
    if node.domain != "" or node.op_type not in _FINDERS:
        return None
    if node.op_type in ("Add", "Sub", "Concat", "Sum"):
        return range(len(node.inputs))
    if node.op_type in ("Mul", "Div"):
        numbers = [index for index, value in enumerate(node.inputs) if _is_number(value)]
        if node.op_type == "Div":
            return (0,) if 1 in numbers else None
        return (1 - numbers[0],) if len(numbers) == 1 else None
    return (0,)


def _is_number(value: ir.Value | None) -> bool:
    array = constant_array(value)
    return array is not None and array.size == 1


def _from_the_end(node: ir.Node, shape: Shape, to: Shape, axis: int) -> int | None:
    return axis - len(to) + len(shape)


def _concat(node: ir.Node, shape: Shape, to: Shape, axis: int) -> int | None:
    return None if node.attributes.get_int("axis", 0) % len(to) == axis else axis


def _split(node: ir.Node, shape: Shape, to: Shape, axis: int) -> int | None:
    return None if node.attributes.get_int("axis", 0) % len(to) == axis else axis


def _slice(node: ir.Node, shape: Shape, to: Shape, axis: int) -> int | None:
    starts, axes = (constant_array(node.inputs[index]) if index < len(node.inputs) else None for index in (1, 3))
    if starts is None or (axes is None and len(node.inputs) > 3 and node.inputs[3] is not None):
        return None
    sliced = range(starts.size) if axes is None else [int(number) % len(shape) for number in axes.reshape(-1)]
    return None if axis in sliced else axis


def _gather(node: ir.Node, shape: Shape, to: Shape, axis: int) -> int | None:
    along, indices = node.attributes.get_int("axis", 0) % len(shape), static_shape(node.inputs[1])
    if indices is None or along <= axis < along + len(indices):
        return None
    return axis if axis < along else axis - len(indices) + 1


def _reshape(node: ir.Node, shape: Shape, to: Shape, axis: int) -> int | None:
    """The axis of the same size with as many elements before it."""
    before = math.prod(to[:axis])
    return next((at for at, size in enumerate(shape) if size == to[axis] and math.prod(shape[:at]) == before), None)


def _transpose(node: ir.Node, shape: Shape, to: Shape, axis: int) -> int | None:
    return node.attributes.get_ints("perm", tuple(reversed(range(len(shape)))))[axis]


def _reduce_mean(node: ir.Node, shape: Shape, to: Shape, axis: int) -> int | None:
    axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or not axes.size:
        return None
    reduced = {int(number) % len(shape) for number in axes.reshape(-1)}
    kept = [at for at in range(len(shape)) if node.attributes.get_int("keepdims", 1) or at not in reduced]
    return None if kept[axis] in reduced else kept[axis]


_FINDERS: dict[str, _Find] = {
    "Add": _from_the_end,
    "Concat": _concat,
    "Div": _from_the_end,
    "Expand": _from_the_end,
    "Flatten": _reshape,
    "Gather": _gather,
    "Identity": _from_the_end,
    "Mul": _from_the_end,
    "Neg": _from_the_end,
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Sub": _from_the_end,
    "Sum": _from_the_end,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}
