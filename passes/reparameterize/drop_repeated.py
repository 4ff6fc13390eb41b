"""The pass `drop-repeated`: a function that is applied to what it does not change any more goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import made_by, scalar
from edgekit.graph.shapes import static_shape

_LARGEST_FLOOR = 1e-6
_DEEPEST = 16


@dataclass(frozen=True)
class DropRepeated(Pass):
    """Drop activations and L2 normalizations whose input they would not change.

    Before:  x ─ Relu ─ GlobalAveragePool ─ Relu ─► y
    After:   x ─ Relu ─ GlobalAveragePool ─► y

    Before:  x ─ ÷‖·‖ ─ Slice ─ ÷‖·‖ ─► y
    After:   x ─ Slice ─ ÷‖·‖ ─► y

    1. Relu or Abs of a value that is never negative: made by an activation or norm without negative results, and since then only moved,
       averaged, added up, multiplied with its like or compared.
    2. The first of two L2 normalizations over the last axis, where only the second reads it, perhaps through a Slice: a positive factor per
       vector cancels. Exact for vectors whose length is not below the floor that both forms keep away from zero with (1e-6 at most); a
       constant that is added to the length is no such floor. The zero vector gives what it gave: the first must have a floor where the
       second has one.

    Source: Zhou et al. 2023, "BT²: Backward-compatible Training with Basis Transformation" (its head normalizes twice).
    """

    name: ClassVar[str] = "drop-repeated"
    effect: ClassVar[Effect] = Effect.EXACT
    removes: ClassVar[frozenset[str]] = frozenset({"LpNormalization"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Drops in the main graph; returns how many nodes or normalizations went."""
        dropped = 0
        editor = GraphEditor(model)
        for node in list(model.graph):
            where = node.name or node.op_type
            if node.graph is None or node.domain != "" or context.skips(where):
                continue
            why = _drop_activation(node, editor) if node.op_type in ("Relu", "Abs") else _drop_normalization(node, editor)
            if why is None:
                dropped += 1
                context.applied(where)
            elif why:
                context.refuse(where, why)
        return dropped


_NO_MATCH = ""


def _drop_activation(node: ir.Node, editor: GraphEditor) -> str | None:
    x, y = node.inputs[0], node.outputs[0]
    if x is None or not _never_negative(x, _DEEPEST):
        return _NO_MATCH
    if y.is_graph_output() and (x.is_graph_output() or x.producer() is None):
        return "its input and its output are given out under different names, or its input is a constant"
    _bypass(y, x, editor)
    editor.remove([node])
    return None


def _bypass(old: ir.Value, new: ir.Value, editor: GraphEditor) -> None:
    """Lets everything that reads `old` read `new`."""
    if old.is_graph_output():
        editor.replace_value(old, new)
    else:
        old.replace_all_uses_with(new)


_POSITIVE = frozenset({"Relu", "Abs", "Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "ReduceL1", "ReduceL2", "ReduceSumSquare"})
_OF_ALL = frozenset({"Add", "Sum", "Mul", "Max", "Concat", "Mean", "Min"})
"""Never negative where no operand is."""
_OF_FIRST = frozenset(
    {
        "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum",
        "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Never negative where the first operand is not."""


def _never_negative(value: ir.Value, depth: int) -> bool:
    array = constant_array(value)
    if array is not None:
        return array.dtype.kind in "fV" and bool((array >= 0).all())
    node = value.producer()
    if node is None or node.domain != "" or depth == 0:
        return False
    if node.op_type in _POSITIVE:
        return True
    if node.op_type == "Clip":
        floor = scalar(node.inputs[1]) if len(node.inputs) > 1 else None
        return floor is not None and floor >= 0
    if node.op_type in _OF_ALL:
        return all(x is not None and _never_negative(x, depth - 1) for x in node.inputs)
    return node.op_type in _OF_FIRST and node.inputs[0] is not None and _never_negative(node.inputs[0], depth - 1)


@dataclass(frozen=True)
class _Normalization:
    """x / ‖x‖ over the last axis.

    Attributes:
        x: What is normalized.
        nodes: The nodes, the last first.
        floor: What the length is at least taken as; 0 where it is not limited, None where something is added to it.
    """

    x: ir.Value
    nodes: tuple[ir.Node, ...]
    floor: float | None

    @property
    def keeps_zero(self) -> bool:
        """True where the zero vector gives zero and not NaN."""
        return self.floor != 0 or self.nodes[0].op_type == "LpNormalization"


def _normalization(node: ir.Node | None) -> _Normalization | None:
    """Reads LpNormalization, or Div by ReduceL2 of its dividend, perhaps through Expand, Clip, Max and Add of a constant."""
    x = node.inputs[0] if node is not None and node.inputs else None
    shape = static_shape(x)
    if node is None or x is None or not shape:
        return None
    if made_by(node.outputs[0], "LpNormalization") is not None:
        axis, p = node.attributes.get_int("axis", -1), node.attributes.get_int("p", 2)
        return _Normalization(x, (node,), 0.0) if p == 2 and axis in (-1, len(shape) - 1) else None
    if made_by(node.outputs[0], "Div") is None or static_shape(node.outputs[0]) != shape:
        return None
    nodes, floor = [node], 0.0
    added = False
    value = node.inputs[1]
    while value is not None and is_used_once(value) and (step := made_by(value, "Expand", "Clip", "Max", "Add")) is not None:
        number = 0.0 if step.op_type == "Expand" else scalar(step.inputs[1]) if len(step.inputs) == 2 else None
        if number is None:
            return None
        added = added or (step.op_type == "Add" and number != 0)
        floor = max(floor, number)
        nodes.append(step)
        value = step.inputs[0]
    length = made_by(value, "ReduceL2") if value is not None and is_used_once(value) else None
    if length is None or length.inputs[0] is not x or not length.attributes.get_int("keepdims", 1):
        return None
    axes = constant_array(length.inputs[1]) if len(length.inputs) > 1 else None
    if axes is None or axes.reshape(-1).tolist() not in ([-1], [len(shape) - 1]):
        return None
    return _Normalization(x, (*nodes, length), None if added else floor)


def _drop_normalization(node: ir.Node, editor: GraphEditor) -> str | None:
    second = _normalization(node)
    if second is None:
        return _NO_MATCH
    value, readers = second.x, set(second.nodes)
    slices = []
    while (step := made_by(value, "Slice")) is not None and _read_only_by(value, readers) and step.inputs[0] is not None:
        slices.append(step)
        value, readers = step.inputs[0], {step}
    first = _normalization(value.producer())
    if first is None:
        return _NO_MATCH
    if not _read_only_by(value, readers):
        return "the normalization before it is read elsewhere"
    if first.floor is None or second.floor is None:
        return "a constant is added to the length: it would weigh differently without the normalization before"
    if max(first.floor, second.floor) > _LARGEST_FLOOR:
        return f"vectors shorter than {max(first.floor, second.floor):g} are not normalized: they would be without the normalization before"
    if second.keeps_zero and not first.keeps_zero:
        return "the zero vector gives NaN: it would give zero without the normalization before"
    _bypass(value, first.x, editor)
    editor.remove(first.nodes)
    return None


def _read_only_by(value: ir.Value, readers: set[ir.Node]) -> bool:
    return not value.is_graph_output() and all(use.node in readers for use in value.uses())
