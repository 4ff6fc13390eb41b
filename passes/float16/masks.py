"""Additive masks of -1e6, -1e9, the lowest float32 or -inf: clamped to -3e4, which float16 holds, and masks as exactly.

A masked score gets probability 0 in float32 as long as it lies 110 below the row's largest, since exp(-110) is 0. With the scores of the
calibration data within ±B, that is so if 3e4 - 2·B > 110. It fails in rows in which every score is masked: what is left of the scores
there depends on the constant. Such rows are ruled out, or shown to stay what they are, or the mask is refused by name:

1. Masks that are constants are looked at, all masks of one softmax together.
2. `Where(condition, scores, c)` right before the softmax, c finite: a row of c alone is uniform whatever c is.

Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.fusions.matching import made_by, operands
from edgekit.graph.ranges import FLOAT16_MAX
from edgekit.graph.shapes import static_shape
from edgekit.passes.float16.places import Places

CLAMP = -30000.0
"""What masks become; two of them added stay within float16."""
_EXP_IS_ZERO = 110.0
_DEPTH = 4


@dataclass(frozen=True)
class _Mask:
    """A constant that hides scores.

    Attributes:
        node: The Add, Where or Attention that reads it.
        index: At which input.
        array: Its numbers.
        condition: For a Where, the condition's array where it is constant.
        where_it_counts: For a Where, the value of the condition that picks the constant; None for an Add.
    """

    node: ir.Node
    index: int
    array: np.ndarray
    condition: np.ndarray | None = None
    where_it_counts: bool | None = None

    @property
    def too_low(self) -> np.ndarray:
        """Which of its numbers float16 does not hold, or holds as -inf."""
        return np.asarray(self.array < -FLOAT16_MAX)

    def hidden(self) -> np.ndarray | None:
        """Which scores it hides, in a shape that broadcasts to theirs; None where that is known only when the model runs."""
        hidden = np.asarray(self.array <= CLAMP)
        if self.where_it_counts is None:
            return hidden
        return None if self.condition is None else hidden & (self.condition == self.where_it_counts)


def stabilize_masks(places: Places) -> int:
    """Clamps masks; returns how many places read one."""
    clamped: dict[ir.Value, ir.Value] = {}
    count = 0
    for node in places.nodes("Softmax"):
        x = node.inputs[0]
        masks = _masks(x, _DEPTH)
        shape = static_shape(x)
        if not any(mask.too_low.any() for mask in masks):
            continue
        axis = node.attributes.get_int("axis", -1)
        why = _unproven_bound(places, _bound(places, x, _DEPTH)) or _unproven_rows(masks, shape, axis, x)
        count += _clamp(places, masks, clamped, why)
    for node in places.nodes("Attention"):
        array = constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
        if array is None or array.dtype.kind != "f" or not (array < -FLOAT16_MAX).any():
            continue
        mask = _Mask(node, 3, array)
        why = _unproven_bound(places, _attention_bound(places, node)) or _unproven_attention_rows(node, mask)
        count += _clamp(places, [mask], clamped, why)
    return count


def _masks(value: ir.Value | None, depth: int) -> list[_Mask]:
    """The constants that are added to, or put in the place of, scores before `value`."""
    node = made_by(value, "Add", "Where") if depth else None
    if node is None:
        return []
    found: list[_Mask] = []
    first = 0 if node.op_type == "Add" else 1
    condition = constant_array(node.inputs[0]) if node.op_type == "Where" else None
    for index in range(first, len(node.inputs)):
        operand = node.inputs[index]
        array = constant_array(operand)
        if array is not None and array.dtype.kind == "f":
            found.append(_Mask(node, index, array, condition, None if node.op_type == "Add" else index == 1))
        elif operand is not None and is_used_once(operand):
            found.extend(_masks(operand, depth - 1))
    return found


def _bound(places: Places, value: ir.Value | None, depth: int) -> float:
    """The largest magnitude of scores that no mask hides; infinite where it is not known."""
    array = constant_array(value)
    if array is not None:
        seen = array[array > CLAMP]
        return float(np.abs(seen).max(initial=0.0))
    node = made_by(value, "Add", "Where") if depth else None
    if node is not None and _masks(value, depth):
        if node.op_type == "Add":
            return sum(_bound(places, operand, depth - 1) for operand in operands(node))
        return max(_bound(places, operand, depth - 1) for operand in operands(node)[1:])
    return places.largest(value) if places.knows(value) else math.inf


def _unproven_bound(places: Places, bound: float) -> str | None:
    if not places.measured or math.isinf(bound):
        return "how large the scores are is not known without calibration data"
    if -CLAMP - 2 * bound <= _EXP_IS_ZERO:
        return f"scores reach {bound:.4g}, too close to a mask that float16 holds"
    return None


def _unproven_rows(masks: list[_Mask], shape: tuple[int, ...] | None, axis: int, x: ir.Value | None) -> str | None:
    hidden = [mask.hidden() for mask in masks]
    known = [item for item in hidden if item is not None]
    if len(known) < len(hidden):
        (mask, *others) = masks
        uniform = np.isfinite(mask.array).all() and mask.array.size == 1
        if not others and mask.where_it_counts is not None and mask.node.outputs[0] is x and uniform:
            return None
        return "rows in which every score is masked would change, and whether there are any is known only when the model runs"
    if shape is None:
        return "the shape of the scores is not static"
    return _whole_rows(known, shape, axis)


def _whole_rows(hidden: list[np.ndarray], shape: tuple[int, ...], axis: int) -> str | None:
    """Whether all masks together leave a score in each row."""
    rank = max(len(shape), *(item.ndim for item in hidden))
    axis = axis % len(shape) + rank - len(shape)
    together = np.zeros((1,) * rank, bool)
    for item in hidden:
        together = together | item.reshape((1,) * (rank - item.ndim) + item.shape)
    rows = int(together.all(axis=axis).sum())  # where it broadcasts along the row, it hides all of it
    return f"it masks every score of {rows} rows, which would change" if rows else None


def _attention_bound(places: Places, node: ir.Node) -> float:
    """|q·k|·scale <= E·max|q|·max|k|·scale, E being the length of a head."""
    q, k = node.inputs[0], node.inputs[1]
    shape = static_shape(q)
    if shape is None or not places.knows(q) or not places.knows(k):
        return math.inf
    heads = node.attributes.get_int("q_num_heads", 1) if len(shape) == 3 else 1
    length = shape[-1] // heads
    return length * places.largest(q) * places.largest(k) * node.attributes.get_float("scale", 1 / math.sqrt(length))


def _unproven_attention_rows(node: ir.Node, mask: _Mask) -> str | None:
    if node.attributes.get_float("softcap", 0.0) or any(value is not None for value in node.inputs[4:]):
        return "masks of an Attention with softcap, cache or padding are not looked into"
    hidden = [mask.too_low]
    if node.attributes.get_int("is_causal", 0):
        rows, columns = (1, 1, *mask.array.shape)[-2:]
        hidden.append(~np.tri(rows, columns, dtype=bool))
    return _whole_rows(hidden, mask.array.shape, -1) if mask.array.ndim else "its shape is not that of the scores"


def _clamp(places: Places, masks: list[_Mask], clamped: dict[ir.Value, ir.Value], why: str | None) -> int:
    count = 0
    for mask in masks:
        old = mask.node.inputs[mask.index]
        name = mask.node.name or mask.node.op_type
        if old is None or not mask.too_low.any() or mask.node in places.handled or places.context.skips(name):
            continue
        places.handled.add(mask.node)
        if why is not None:
            lowest = float(mask.array.min())
            places.context.refuse(name, f'its mask of {lowest:.4g} stays: {why}; or keep it: to-float16{{keep=["{name}"]}}')
            continue
        if old not in clamped:
            array = np.where(mask.too_low, np.asarray(CLAMP, mask.array.dtype), mask.array)
            clamped[old] = places.editor.add_initializer(f"{old.name}.clamped", array, made_from=[old])
        mask.node.replace_input_with(mask.index, clamped[old])
        places.editor.drop_unused([old])
        places.context.applied(name)
        count += 1
    return count
