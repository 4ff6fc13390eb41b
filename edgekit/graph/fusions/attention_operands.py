"""Queries, keys and values of a decomposed attention, and how they become `[B, H, N, D]`.

A product of attention takes its operands transposed, scaled, with heads merged into the batch, or as letters of an Einsum. An `Operand`
is what is left of a value after scales and transpositions are taken off it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.fusions.attention_build import Builder, Dims, UnfitError, dims, elements, permutation

_LAYOUT = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten")


@dataclass(frozen=True)
class Operand:
    """A value that takes part in a product as `[..., rows, features]`.

    Attributes:
        value: Where it comes from.
        perm: The permutation of its axes that is still to be made; None for none.
        shape: Its shape after the permutation; axes of length 1 may stand in it that `value` lacks.
        factor: A positive number that it is multiplied by.
    """

    value: ir.Value
    shape: Dims
    perm: tuple[int, ...] | None = None
    factor: float = 1.0


def constant_scalar(value: ir.Value | None) -> float | None:
    """Returns the number in a constant of one element, else None."""
    array = constant_array(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def scaled(node: ir.Node) -> tuple[ir.Value, float] | None:
    """Returns the data and the factor of a Mul or Div by a constant number, None for any other node."""
    if node.domain != "" or node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
        return None
    first, second = node.inputs
    number = constant_scalar(second)
    if number is not None and first is not None and number != 0:
        data, factor = first, number if node.op_type == "Mul" else 1 / number
    elif node.op_type == "Mul" and (number := constant_scalar(first)) is not None and second is not None:
        data, factor = second, number
    else:
        return None
    return (data, factor) if np.isfinite(factor) and dims(data) == dims(node.outputs[0]) else None


def _peel(operand: Operand) -> Operand:
    """Takes scales and copies off an operand."""
    while (node := operand.value.producer()) is not None and node.domain == "":
        found = scaled(node)
        if found is not None and found[1] > 0:
            operand = replace(operand, value=found[0], factor=operand.factor * found[1])
        elif node.op_type in ("Identity", "Expand") and node.inputs[0] is not None and dims(node.inputs[0]) == dims(operand.value):
            operand = replace(operand, value=node.inputs[0])
        else:
            break
    return operand


def plain(value: ir.Value, peel: bool = True) -> Operand:
    """Returns the operand that `value`, `[..., rows, features]`, is; without `peel`, scales stay on it.

    Raises:
        UnfitError: Its shape is unknown or has fewer than two axes.
    """
    shape = dims(value)
    if shape is None or len(shape) < 2:
        raise UnfitError
    operand = Operand(value, shape)
    return _peel(operand) if peel else operand


def transposed(value: ir.Value, peel: bool = True) -> Operand:
    """Returns the operand whose transpose `value`, `[..., features, rows]`, is; without `peel`, scales stay on it.

    Raises:
        UnfitError: The shape of `value` is unknown or has fewer than two axes.
    """
    operand = plain(value, peel)
    shape = operand.shape
    swapped = (*shape[:-2], shape[-1], shape[-2])
    source = _swapped_as_three_axes(operand.value, swapped)
    if source is not None:
        operand = replace(operand, value=source, shape=swapped)
        return _peel(operand) if peel else operand
    perm = swap(len(shape))
    node = operand.value.producer()
    if node is not None and node.op_type == "Transpose" and node.domain == "" and node.inputs[0] is not None:
        inner = permutation(node)
        if inner is not None:
            operand = replace(operand, value=node.inputs[0])
            perm = tuple(inner[axis] for axis in perm)
    operand = replace(operand, shape=swapped, perm=None if perm == tuple(range(len(perm))) else perm)
    return _peel(operand) if peel else operand


def swap(rank: int) -> tuple[int, ...]:
    """Returns the permutation that swaps the last two of `rank` axes."""
    return (*range(rank - 2), rank - 1, rank - 2)


def _swapped_as_three_axes(value: ir.Value, wanted: Dims) -> ir.Value | None:
    """The source of Reshape–Transpose(0, 2, 1)–Reshape, which swaps the last two axes when only the leading ones are merged meanwhile."""
    last = value.producer()
    middle = last.inputs[0].producer() if last is not None and last.op_type == "Reshape" and last.inputs[0] is not None else None
    if middle is None or middle.op_type != "Transpose" or permutation(middle) != (0, 2, 1) or middle.inputs[0] is None:
        return None
    first = middle.inputs[0].producer()
    merged = dims(middle.inputs[0])
    if first is None or first.op_type != "Reshape" or merged is None or merged[1:] != wanted[-2:]:
        return None
    source = first.inputs[0]
    return source if source is not None and dims(source) == wanted else None


def lettered(value: ir.Value, letters: str, order: str, peel: bool = True) -> Operand:
    """Returns the operand of an Einsum, with its axes in the order of the letters `order`; those that it lacks have length 1.

    Without `peel`, scales stay on it.

    Raises:
        UnfitError: The shape of `value` is unknown or does not match its letters.
    """
    shape = dims(value)
    if shape is None or len(shape) != len(letters):
        raise UnfitError
    perm = tuple(letters.index(letter) for letter in order if letter in letters)
    sizes = tuple(shape[letters.index(letter)] if letter in letters else 1 for letter in order)
    operand = Operand(value, sizes, None if perm == tuple(range(len(perm))) else perm)
    return _peel(operand) if peel else operand


def absorb_scales(value: ir.Value | None) -> tuple[float, list[ir.Node]]:
    """Bypasses the scales that were applied before the heads were split, where nothing but `value` reads the result.

    Returns their product and the nodes that are now without use.
    """
    factor, dead = 1.0, []
    while value is not None and is_used_once(value) and (node := value.producer()) is not None and node.domain == "":
        found = scaled(node)
        if found is not None and found[1] > 0 and constant_array(found[0]) is None:
            value.replace_all_uses_with(found[0])
            factor *= found[1]
            dead.append(node)
            break
        value = node.inputs[0] if node.op_type in _LAYOUT else None
    return factor, dead


def own_heads(operand: Operand, lead: Dims, batch: int | str, heads: int | str) -> int | str:
    """Returns the number of heads that an operand of keys or values has before it is broadcast over the leading axes `lead`.

    `[B, 1, N, D]` against `[B, H]` has one, `[B, K, 1, N, D]` against `[B, K, G]` has K.
    """
    own = (*(1,) * (len(lead) + 2 - len(operand.shape)), *operand.shape[:-2])
    if len(lead) == 2 and own[0] in (1, batch):
        return own[1]
    if len(lead) == 3 and own[-1] == 1 and own[:2] == lead[:2] and own[0] == batch:
        return own[1]
    return heads


def to_heads(builder: Builder, operand: Operand, lead: Dims, batch: int | str, heads: int | str) -> ir.Value:
    """Makes an operand `[batch, heads, rows, features]`.

    Args:
        builder: Makes the nodes.
        operand: The operand.
        lead: The leading axes of the product that it takes part in.
        batch: The batch size to reach.
        heads: The number of heads to reach.

    Raises:
        UnfitError: That takes a reshape over symbolic dimensions.
    """
    value = operand.value if operand.perm is None else builder.transpose(operand.value, operand.perm)
    tail = operand.shape[-2:]
    target: Dims = (batch, heads, *tail)
    if dims(value) == target:
        return value
    own: Dims = (*(1,) * (len(lead) + 2 - len(operand.shape)), *operand.shape[:-2])
    if elements(own) != elements((batch, heads)):
        full: Dims = (batch, heads) if len(lead) == 2 else lead
        value = builder.expand(builder.reshape(value, (*own, *tail)), (*full, *tail))
    return builder.reshape(value, target)


def before_repetition(value: ir.Value) -> tuple[ir.Value, int] | None:
    """Undoes the repetition of key or value heads for grouped queries (Ainslie et al. 2023).

    Recognizes, for `[B, H, N, D]`: Reshape of an Expand or Tile of `[B, K, 1, N, D]`, Expand of `[B, 1, N, D]`, and Gather of the heads
    `0, 0, …, 1, 1, …`. Returns the value before and its number of heads K.
    """
    node, shape = value.producer(), dims(value)
    if node is None or node.domain != "" or shape is None or not node.inputs or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    before = dims(source)
    if node.op_type == "Gather":
        order = constant_array(node.inputs[1])
        axis = node.attributes.get_int("axis", 0)
        heads = before[1] if before is not None and len(before) == 4 else None
        if order is None or axis not in (1, -3) or not isinstance(heads, int) or order.ndim != 1 or order.size % heads:
            return None
        return (source, heads) if np.array_equal(order, np.repeat(np.arange(heads), order.size // heads)) else None
    if node.op_type == "Expand" and before == (shape[0], 1, *shape[2:]):
        return source, 1
    repeat = source.producer()
    if node.op_type != "Reshape" or repeat is None or repeat.op_type not in ("Expand", "Tile") or before is None or len(before) != 5:
        return None
    single = dims(repeat.inputs[0])
    if repeat.inputs[0] is None or not isinstance(before[1], int) or (before[0], *before[3:]) != (shape[0], *shape[2:]):
        return None
    return (repeat.inputs[0], before[1]) if single == (*before[:2], 1, *before[3:]) else None
