"""The pass `drop-monotonic`: what does not change the order of the scores is not computed where only their order is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.shapes import static_shape

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class DropMonotonic(Pass):
    """Drop positive scales, shifts and the softmax before ArgMax and before a TopK of which only the indices are read.

    Before:  logits ─ Mul(1/T) ─ Softmax ─ ArgMax ─► class
    After:   logits ─ ArgMax ─► class

    Along the axis of the ArgMax (or TopK) the order of the elements, ties included, does not change under

    1. Softmax or LogSoftmax over the same axis;
    2. Mul or Div by a constant that is positive, finite and the same for all elements along the axis;
    3. Add of, or Sub of, a value that is the same along the axis (one number per row): a constant, which must be finite, or a computed one.

    Each goes when nothing else reads its result. ArgMin is left alone: of small probabilities, those that round to zero are alike, and
    the scores before the softmax are not. So are smallest elements in TopK.

    Source: Bridle 1990, "Probabilistic Interpretation of Feedforward Classification Network Outputs": the softmax preserves the rank order
    of its inputs and is a "smooth" version of picking the largest.
    """

    name: ClassVar[str] = "drop-monotonic"
    effect: ClassVar[Effect] = Effect.EXACT
    removes: ClassVar[frozenset[str]] = frozenset({"Softmax", "LogSoftmax"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Drops what is before every ArgMax and TopK; returns how many nodes disappeared."""
        editor: GraphEditor | None = None
        dropped = 0
        for node in list(model.graph):
            axis = _axis(node)
            where = node.name or node.op_type
            if axis is None or context.skips(where):
                continue
            steps, why = _steps(node, axis)
            if why is not None:
                context.refuse(where, why)
            if steps:
                editor = editor or GraphEditor(model)
                node.replace_input_with(0, steps[-1][1])
                editor.remove([step for step, _ in steps])
                context.applied(where)
                dropped += len(steps)
        return dropped


def _axis(node: ir.Node) -> int | None:
    """Returns the axis, not negative, along which a node reads only the order of its first input; None for other nodes."""
    shape = static_shape(node.inputs[0]) if node.inputs else None
    if node.domain != "" or shape is None or not shape:
        return None
    if node.op_type == "ArgMax":
        return node.attributes.get_int("axis", 0) % len(shape)
    if node.op_type != "TopK" or not node.attributes.get_int("largest", 1):
        return None
    values = node.outputs[0]
    return None if values.uses() or values.is_graph_output() else node.attributes.get_int("axis", -1) % len(shape)


def _steps(reader: ir.Node, axis: int) -> tuple[list[tuple[ir.Node, ir.Value]], str | None]:
    """Returns the nodes to drop with what each reads, the last one first, and why the one before them is not dropped where it nearly is."""
    found: list[tuple[ir.Node, ir.Value]] = []
    value = reader.inputs[0]
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "" or value.dtype not in _FLOATS:
            break
        inner = _order_of(node, axis)
        if inner is None:
            return found, _near_miss(node, axis)
        if not is_used_once(value):
            return found, f"the result of {node.op_type} '{node.name}' is read elsewhere"
        found.append((node, inner))
        value = inner
    return found, None


def _order_of(node: ir.Node, axis: int) -> ir.Value | None:
    """Returns the input whose order along `axis` the node's result has; None when that does not hold for any input."""
    shape = static_shape(node.outputs[0])
    if shape is None:
        return None
    if node.op_type in ("Softmax", "LogSoftmax"):
        return node.inputs[0] if node.attributes.get_int("axis", -1) % len(shape) == axis else None
    if node.op_type not in ("Add", "Sub", "Mul", "Div") or len(node.inputs) != 2:
        return None
    for index in (0, 1) if node.op_type in ("Add", "Mul") else (0,):
        x, other = node.inputs[index], node.inputs[1 - index]
        array = constant_array(other)
        if x is None or constant_array(x) is not None or static_shape(x) != shape or not _is_even(other, axis, len(shape)):
            continue
        if array is not None and not np.isfinite(array).all():
            continue
        if node.op_type in ("Add", "Sub") or (array is not None and (array > 0).all()):
            return x
    return None


def _is_even(value: ir.Value | None, axis: int, rank: int) -> bool:
    """Whether a value that is broadcast to `rank` axes is the same at all places along `axis`."""
    shape = static_shape(value)
    if shape is None:
        return False
    array, own = constant_array(value), axis - (rank - len(shape))
    if own < 0 or shape[own] == 1:
        return True
    return array is not None and bool((array == np.take(array, [0], own)).all())


def _near_miss(node: ir.Node, axis: int) -> str | None:
    if node.op_type in ("Softmax", "LogSoftmax"):
        return f"{node.op_type} '{node.name}' is over another axis than {axis}"
    if node.op_type in ("Mul", "Div") and any(constant_array(value) is not None for value in node.inputs):
        return f"the scale of {node.op_type} '{node.name}' is not one positive number along axis {axis}"
    return None
