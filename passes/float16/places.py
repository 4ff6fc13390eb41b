"""What the rules of `stabilize-float16` share: the ranges by value, powers of two that bring them down, and scaled copies of values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context
from edgekit.graph.constants import GraphEditor
from edgekit.graph.fusions.matching import insert, replace
from edgekit.graph.ranges import FLOAT16_MAX, OVERFLOW, ValueRange

LIMIT = FLOAT16_MAX / 4
"""What scaled values may reach: other inputs than the calibration data may be larger."""


class Places:
    """One application of the pass to one graph.

    Args:
        model: The graph, which the rules edit.
        context: The pass's context.
        ranges: The range of each value; empty without calibration data.
    """

    def __init__(self, model: ir.Model, context: Context, ranges: Iterable[ValueRange]) -> None:
        self.model = model
        self.context = context
        self.editor = GraphEditor(model)
        self.handled: set[ir.Node] = set()
        self._values: dict[str, ValueRange] = {}
        self._inside: dict[tuple[str, str], list[ValueRange]] = {}
        self.measured = False
        for item in ranges:
            self.measured |= not item.constant
            if item.internal is None:
                self._values[item.name] = item
            elif item.node:
                self._inside.setdefault((item.node, item.internal), []).append(item)

    def nodes(self, *op_types: str) -> list[ir.Node]:
        """The nodes of the main graph of these standard operators that may be rewritten and were not yet."""
        return [
            node
            for node in self.model.graph
            if node.domain == ""
            and node.op_type in op_types
            and node not in self.handled
            and node.outputs[0].dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE)
            and not self.context.skips(node.name or "")
        ]

    def largest(self, value: ir.Value | None) -> float:
        """The largest magnitude of a value on the calibration data; 0 where it is not known."""
        found = self._values.get(value.name or "") if value is not None else None
        return found.largest if found is not None else 0.0

    def smallest(self, value: ir.Value) -> float:
        """The smallest magnitude but 0 of a value on the calibration data; 0 where it is not known."""
        found = self._values.get(value.name or "")
        return found.smallest if found is not None else 0.0

    def knows(self, value: ir.Value | None) -> bool:
        """Whether the range of a value is known."""
        return value is not None and (value.name or "") in self._values

    def inside(self, node: ir.Node, *labels: str) -> float:
        """The largest magnitude of these values inside a whole operator; 0 where it has none."""
        return max((item.largest for label in labels for item in self._inside.get((node.name or "", label), ())), default=0.0)

    def smallest_inside(self, node: ir.Node, label: str) -> float:
        """The smallest magnitude but 0 of the values of this label inside a whole operator; 0 where it has none."""
        return min((item.smallest for item in self._inside.get((node.name or "", label), ())), default=0.0)

    def fits(self, value: ir.Value | None) -> bool:
        """Whether float16 holds a value as far as is known."""
        return self.largest(value) < OVERFLOW

    def number(self, like: ir.Value, number: float) -> ir.Value:
        """A constant number of the dtype of `like`."""
        assert like.dtype is not None
        return self.editor.add_initializer(f"{like.name}/number", np.asarray(number, like.dtype.numpy()))

    def add(self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value], **attributes: int | float | str | Sequence[int]) -> ir.Value:
        """Adds a node before `node`, of the shape of its first input, and returns its result."""
        new = insert(self.editor, node, [node], op_type, inputs, inputs[0].shape, attributes)
        self.handled.add(new)
        return new.outputs[0]

    def scaled(self, node: ir.Node, value: ir.Value, factor: float) -> ir.Value:
        """`value` times a number, computed before `node`."""
        return self.add(node, "Mul", [value, self.number(value, factor)])

    def copy(self, node: ir.Node, inputs: Sequence[ir.Value]) -> ir.Value:
        """The result of the operator of `node` on other inputs."""
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        new = insert(self.editor, node, [node], node.op_type, inputs, node.outputs[0].shape, attributes)
        self.handled.add(new)
        return new.outputs[0]

    def put(self, node: ir.Node, nodes: Sequence[ir.Node], op_type: str, inputs: Sequence[ir.Value]) -> None:
        """Puts one node in the place of `nodes`, which end in `node`, and notes the rewriting under its name."""
        where = node.name or node.op_type
        self.handled.add(replace(self.editor, node, nodes, op_type, inputs))
        self.handled.update(nodes)
        self.context.applied(where)


def power_below(number: float) -> float:
    """The largest power of two that is not above `number`, which is positive."""
    return float(2.0 ** math.floor(math.log2(number)))


def power_for(largest: float) -> float:
    """The power of two, at most 1, that brings `largest` to `LIMIT` or below."""
    return min(1.0, power_below(LIMIT / largest)) if largest else 1.0
