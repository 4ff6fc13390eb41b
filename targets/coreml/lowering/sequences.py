"""Sequences and optionals whose length is known when the program is written: lists of variables, which leave nothing in the program."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering


def _item(b: Lowering, node: ir.Node, index: int) -> Any:
    """An input as it is: a variable, an array, or a list of these."""
    array = b.known(node, index)
    if array is not None:
        return array
    value = node.inputs[index]
    assert value is not None
    return b.values[value]


def _items(b: Lowering, node: ir.Node, index: int = 0) -> list[Any]:
    """An input that is a sequence.

    Raises:
        UnsupportedOpError: Its length is only known when the model runs.
    """
    value = node.inputs[index]
    items = b.values.get(value) if value is not None else None
    if not isinstance(items, list):
        raise b.refuse("a sequence whose length is only known when the model runs", "use tensors of a fixed shape")
    return items


def _position(b: Lowering, node: ir.Node, index: int, count: int, last: int) -> int:
    """A place in a sequence of `count`, given as a constant of at most `last`, which is also what is meant where none is given."""
    if not b.has(node, index):
        return last
    place = int(b.need_known(node, index, "position"))
    if not -count <= place <= last:
        raise b.refuse(f"position {place} of {count}", "give a position inside the sequence")
    return place + count if place < 0 else place


def _sequence_construct(b: Lowering, node: ir.Node) -> Any:
    return ([_item(b, node, index) for index in range(len(node.inputs))],)


def _sequence_empty(b: Lowering, node: ir.Node) -> Any:
    return ([],)


def _sequence_at(b: Lowering, node: ir.Node) -> Any:
    items = _items(b, node)
    return items[_position(b, node, 1, len(items), len(items) - 1)]


def _sequence_insert(b: Lowering, node: ir.Node) -> Any:
    items = list(_items(b, node))
    items.insert(_position(b, node, 2, len(items), len(items)), _item(b, node, 1))
    return (items,)


def _sequence_erase(b: Lowering, node: ir.Node) -> Any:
    items = list(_items(b, node))
    del items[_position(b, node, 1, len(items), len(items) - 1)]
    return (items,)


def _sequence_length(b: Lowering, node: ir.Node) -> Any:
    return np.asarray(len(_items(b, node)), np.int64)


def _split_to_sequence(b: Lowering, node: ir.Node) -> Any:
    shape = b.shape(node)
    axis = node.attributes.get_int("axis", 0) % len(shape)
    sizes = _split_sizes(b, node, shape[axis])
    bounds = np.cumsum([0, *sizes])
    parts = [_part(b, node, axis, int(first), int(last)) for first, last in itertools.pairwise(bounds)]
    if not b.has(node, 1) and not node.attributes.get_int("keepdims", 1):
        parts = [b.op("squeeze", x=part, axes=[axis]) for part in parts]
    return (parts,)


def _split_sizes(b: Lowering, node: ir.Node, whole: int) -> list[int]:
    if not b.has(node, 1):
        return [1] * whole
    split = b.need_known(node, 1, "split")
    if split.ndim:
        return [int(size) for size in split]
    return [min(int(split), whole - first) for first in range(0, whole, int(split))]


def _part(b: Lowering, node: ir.Node, axis: int, first: int, last: int) -> Any:
    begin, end = [0] * b.rank(node), list(b.shape(node))
    begin[axis], end[axis] = first, last
    x = b.x(node)
    if b.dtype(node) != ir.DataType.BOOL:
        return b.op("slice_by_index", x=x, begin=begin, end=end)
    return b.op("cast", x=b.op("slice_by_index", x=b.op("cast", x=x, dtype="int32"), begin=begin, end=end), dtype="bool")


def _concat_from_sequence(b: Lowering, node: ir.Node) -> Any:
    items = _items(b, node)
    axis = node.attributes.get_int("axis", 0)
    if not items:
        raise b.refuse("an empty sequence that is concatenated", "remove the node")
    values = [b.var(item) for item in items]
    is_bool = node.outputs[0].dtype == ir.DataType.BOOL
    if is_bool:
        values = [b.op("cast", x=value, dtype="int32") for value in values]
    name = "stack" if node.attributes.get_int("new_axis", 0) else "concat"
    y = b.op(name, values=values, axis=axis)
    return b.op("cast", x=y, dtype="bool") if is_bool else y


def _sequence_map(b: Lowering, node: ir.Node) -> Any:
    raise b.refuse("SequenceMap", "apply the body to each tensor")


def _optional(b: Lowering, node: ir.Node) -> Any:
    if not b.has(node, 0):
        raise b.refuse("an optional without a value", "remove the branch that reads it")
    found = _item(b, node, 0)
    return (found,) if isinstance(found, list) else found


def _optional_has_element(b: Lowering, node: ir.Node) -> Any:
    return np.asarray(b.has(node, 0))


TABLE = {
    "ConcatFromSequence": _concat_from_sequence,
    "Optional": _optional,
    "OptionalGetElement": _optional,
    "OptionalHasElement": _optional_has_element,
    "SequenceAt": _sequence_at,
    "SequenceConstruct": _sequence_construct,
    "SequenceEmpty": _sequence_empty,
    "SequenceErase": _sequence_erase,
    "SequenceInsert": _sequence_insert,
    "SequenceLength": _sequence_length,
    "SequenceMap": _sequence_map,
    "SplitToSequence": _split_to_sequence,
}
