"""A mean over the tokens that a mask keeps, as sentence encoders write it: sum(x · mask) / max(sum(mask), ε)."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.shapes import static_shape

_VIEWS = frozenset({"Cast", "Expand", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_AT_LEAST = frozenset({"Add", "Clip", "Max"})
"""What keeps the number of tokens from being 0: with a constant beside it."""


def mask_sum(total: ir.Node, of_tokens: Container[ir.Value], axis: int) -> tuple[ir.Node, int] | None:
    """Finds what a sum over tokens is divided by, where that counts the same tokens.

    Args:
        total: The ReduceSum of tokens times mask.
        of_tokens: The values that are computed from the tokens and have an entry for each.
        axis: The axis of the tokens in what it sums.

    Returns:
        The ReduceSum of the mask, and the axis that it sums; None where `total` is no such mean, or something else reads one of the sums.
    """
    product = total.inputs[0].producer() if total.inputs[0] is not None else None
    division = _onward(total)
    if product is None or product.op_type != "Mul" or division is None:
        return None
    masks = [value for value in product.inputs if value is not None and value not in of_tokens]
    count = _back(division.inputs[1])
    if len(masks) != 1 or count is None or _root(count.inputs[0]) is not _root(masks[0]):
        return None
    shape, summed, wanted = static_shape(count.inputs[0]), static_shape(total.inputs[0]), constant_array(count.inputs[1])
    if shape is None or summed is None or wanted is None or wanted.size != 1:
        return None
    place = int(wanted.item()) % len(shape)
    return (count, place) if shape[place] == summed[axis] else None


def _onward(node: ir.Node) -> ir.Node | None:
    """The division that alone reads what a node gives, as its dividend."""
    while is_used_once(node.outputs[0]):
        node, index = next(iter(node.outputs[0].uses()))
        if node.op_type == "Div":
            return node if index == 0 else None
        if node.op_type not in _VIEWS or index:
            return None
    return None


def _back(value: ir.Value | None) -> ir.Node | None:
    """The sum along given axes that a divisor is, perhaps with a bound; nothing else reads it."""
    while value is not None and is_used_once(value):
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "ReduceSum":
            return node if len(node.inputs) == 2 and node.inputs[1] is not None else None
        data = [one for one in node.inputs if one is not None and constant_array(one) is None]
        if node.op_type not in _VIEWS | _AT_LEAST or len(data) != 1:
            return None
        value = data[0]
    return None


def _root(value: ir.Value | None) -> ir.Value | None:
    """What a value is another view of."""
    while value is not None and (node := value.producer()) is not None and node.op_type in _VIEWS:
        value = node.inputs[0]
    return value
