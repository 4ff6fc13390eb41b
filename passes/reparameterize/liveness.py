"""Which parts of every value are ever read, propagated backwards from the graph's outputs, and which nodes compute less because of it.

The result is a plan and changes nothing. A node may be planned in several parts: a fused projection of queries, keys and values is needed
for one row in the columns of the queries and for all rows in the other columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from edgekit.graph.check import subgraphs
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.boxes import WHOLE, Box, contains, per_axis, size_of, tidy, union
from edgekit.passes.reparameterize.liveness_rules import MULTIPLYING, RULES, Narrowing, Operands
from edgekit.passes.reparameterize.views import view


@dataclass(frozen=True)
class Plan:
    """How much of each value is computed.

    Attributes:
        parts: Per value that a node makes and that is needed, the parts in which it is computed: usually one. A value that is not here is
            not computed; a node none of whose values are here goes.
        savings: Nodes that go, multiply less or need less of their weights, in graph order.
        refusals: Why a node computes more than is read of it, by its name.
    """

    parts: dict[ir.Value, list[Narrowing]]
    savings: list[ir.Node]
    refusals: dict[str, str] = field(default_factory=dict)


def plan(graph: ir.Graph, kept: Iterable[ir.Node] = ()) -> Plan:
    """Plans to compute what is read, and no less than everything where nothing is saved by it.

    Args:
        graph: The graph, in topological order, with static shapes.
        kept: Nodes that are to stay as they are.
    """
    whole = set(kept)
    refusals: dict[str, str] | None = None
    while True:
        found = _Backwards(whole)
        for node in reversed(graph):
            found.visit(node)
        refusals = found.refusals if refusals is None else refusals  # of the first round, when everything was tried
        gains, savings = _gains(graph, found.parts)
        idle = {node for node in graph if node not in whole and node not in gains and _is_narrowed(node, found.parts)}
        if not idle:
            return Plan(found.parts, savings, refusals)
        whole |= idle


def serving(parts: list[Narrowing], box: Box, shape: tuple[int, ...]) -> Narrowing:
    """Returns the smallest of the planned parts of a value of `shape` that contains `box`."""
    return min((part for part in parts if contains(part.output, box)), key=lambda part: size_of(part.output, shape))


class _Backwards:
    """Collects what is read of each value while nodes are visited from the last to the first."""

    def __init__(self, whole: Collection[ir.Node]) -> None:
        self.parts: dict[ir.Value, list[Narrowing]] = {}
        self.refusals: dict[str, str] = {}
        self._whole = whole
        self._wanted: defaultdict[ir.Value, list[Box]] = defaultdict(list)

    def visit(self, node: ir.Node) -> None:
        """Decides in which parts the outputs of `node` are computed, and what it therefore reads."""
        wanted = {output: self._read_of(output, node) for output in node.outputs}
        stays = node in self._whole or any(subgraphs(node))
        if not stays and not any(wanted.values()):
            return
        separate = node.op_type == "Split" or len(node.outputs) == 1
        for index, output in enumerate(node.outputs):
            if stays or not separate or static_shape(output) is None:
                parts = [_everything(node)]
            elif not wanted[output]:
                continue
            else:
                parts = self._in_parts(node, index, wanted[output])
            self.parts[output] = parts
            for part in parts:
                for value, box in zip(node.inputs, part.inputs, strict=True):
                    if value is not None and box is not None:
                        self._wanted[value].append(box)

    def _read_of(self, value: ir.Value, node: ir.Node) -> list[Box]:
        outside = value.is_graph_output() or any(use.node.graph is not node.graph for use in value.uses())
        return [WHOLE] if outside else self._wanted.pop(value, [])

    def _in_parts(self, node: ir.Node, index: int, boxes: list[Box]) -> list[Narrowing]:
        """Joins what is read into as few parts as compute no more elements than the parts alone; never more than everything."""
        shape = static_shape(node.outputs[index])
        assert shape is not None
        parts: list[Narrowing] = []
        for box in dict.fromkeys(boxes):
            part, joining = self._narrowed(node, index, box), True
            while joining:
                joining = False
                for other in parts:
                    joined = self._narrowed(node, index, union(part.output, other.output, shape))
                    if size_of(joined.output, shape) <= size_of(part.output, shape) + size_of(other.output, shape):
                        parts.remove(other)
                        part, joining = joined, True
                        break
            parts.append(part)
        if len(parts) > 1 and _copies_weights(node, parts):
            box = parts[0].output
            for part in parts[1:]:
                box = union(box, part.output, shape)
            parts = [self._narrowed(node, index, box)]
        if len(parts) > 1 and sum(size_of(part.output, shape) for part in parts) >= size_of(WHOLE, shape):
            parts = [self._narrowed(node, index, WHOLE)]
        return parts

    def _narrowed(self, node: ir.Node, index: int, box: Box) -> Narrowing:
        """Returns how the node computes `box` of an output; a larger part where a condition forbids to slice a weight."""
        part = _rule(node, index, box)
        if part is None:
            if box:
                self.refusals[_name(node)] = (
                    f"only a part of its result is read, but {node.op_type} is not known to be computable in part here"
                )
            return _everything(node)
        why = why_not_sliced(node, part)
        if why is None:
            return part
        self.refusals[_name(node)] = f"only a part of its result is read, but {why}"
        shape = static_shape(node.outputs[index])
        assert shape is not None
        wider = []
        for axis, places in enumerate(part.output):
            if places is not None:
                candidate = _rule(node, index, tidy((*part.output[:axis], None, *part.output[axis + 1 :]), shape))
                if candidate is not None and why_not_sliced(node, candidate) is None:
                    wider.append(candidate)
        return min(wider, key=lambda part: size_of(part.output, shape), default=_everything(node))


def _rule(node: ir.Node, index: int, box: Box) -> Narrowing | None:
    """Asks the operator's rule; None where it has none, or its shapes are not known."""
    output = static_shape(node.outputs[index])
    shapes = [() if value is None else static_shape(value) for value in node.inputs]
    known = tuple(shape for shape in shapes if shape is not None)
    if output is None or len(known) != len(shapes) or 0 in output:
        return None if box else _everything(node)
    seen = view(node, index) if node.inputs and not _is_weight(node.inputs[0]) else None
    if seen is not None:
        rest = [WHOLE] * (len(node.inputs) - 1)
        return Narrowing(box, (tidy(seen.needs(box, len(output)), seen.source), *rest))
    if not box:
        return _everything(node)
    rule = RULES.get(node.op_type) if node.domain == "" else None
    found = rule(Operands(node, known, output), per_axis(box, len(output))) if rule is not None else None
    if found is None:
        return None
    part = tidy(found.output, output)
    if not part:
        return _everything(node)
    inputs = tuple(None if box is None else box and tidy(box, shape) for box, shape in zip(found.inputs, known, strict=True))
    return Narrowing(part, inputs, found.attributes, found.constants)


def _everything(node: ir.Node) -> Narrowing:
    return Narrowing(WHOLE, (WHOLE,) * len(node.inputs))


def why_not_sliced(node: ir.Node, part: Narrowing) -> str | None:
    """Returns why a weight that `part` reads in part must stay as it is, or None."""
    for value, box in zip(node.inputs, part.inputs, strict=True):
        if not box or value is None or not _is_weight(value):
            continue
        if value.is_graph_input() or value.const_value is None:
            return f"its weight '{value.name}' is a graph input"
        if len(value.uses()) > 1 and _is_matrix(value):
            return f"its weight '{value.name}' is read elsewhere too: a copy would take more memory"
    return None


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _is_matrix(value: ir.Value) -> bool:
    """True for constants of more than one axis; a vector may be copied for the rows that it saves."""
    return sum(size > 1 for size in static_shape(value) or ()) > 1


def _copies_weights(node: ir.Node, parts: list[Narrowing]) -> bool:
    """True when the parts together hold more of a weight than the node does now."""
    return any(held > 1 for held in _shares_held(node, parts))


def _shares_held(node: ir.Node, parts: list[Narrowing]) -> Iterator[float]:
    """Yields, for each weight of more than one axis, how much of it the parts need: 1 is all of it once."""
    for index, value in enumerate(node.inputs):
        shape = static_shape(value)
        if value is not None and shape and _is_weight(value) and _is_matrix(value):
            boxes = {part.inputs[index] for part in parts}
            yield sum(size_of(box, shape) for box in boxes if box is not None) / size_of(WHOLE, shape)


def _gains(graph: ir.Graph, parts: dict[ir.Value, list[Narrowing]]) -> tuple[set[ir.Node], list[ir.Node]]:
    """Returns the nodes whose narrowing saves something at them or at a node before them, and those where it is saved."""
    gains: set[ir.Node] = set()
    savings: list[ir.Node] = []
    for node in graph:
        if _saves(node, parts):
            savings.append(node)
            gains.add(node)
        elif any(producer in gains for producer in _narrowed_producers(node, parts)):
            gains.add(node)
    return gains, savings


def _saves(node: ir.Node, parts: dict[ir.Value, list[Narrowing]]) -> bool:
    """True when the node goes, multiplies less than before, or needs less of a weight that no other node reads."""
    own = [part for output in node.outputs for part in parts.get(output, [])]
    if not own:
        return True
    if node.op_type in MULTIPLYING and node.domain == "":
        shape = static_shape(node.outputs[0])
        if shape is not None and sum(size_of(part.output, shape) for part in own) < size_of(WHOLE, shape):
            return True
    shared = any(value is not None and _is_weight(value) and len(value.uses()) > 1 for value in node.inputs)
    return not shared and any(held < 1 for held in _shares_held(node, own))


def _narrowed_producers(node: ir.Node, parts: dict[ir.Value, list[Narrowing]]) -> Iterator[ir.Node]:
    """Yields the nodes that compute less, as far as this node lets them."""
    own = [part for output in node.outputs for part in parts.get(output, [])]
    for index, value in enumerate(node.inputs):
        producer = value.producer() if value is not None else None
        if value is None or producer is None:
            continue
        shape = static_shape(value) or ()
        boxes = [part.inputs[index] for part in own]
        if all(box is None for box in boxes) or any(
            box is not None and serving(parts[value], box, shape).output for box in boxes if value in parts
        ):
            yield producer


def _is_narrowed(node: ir.Node, parts: dict[ir.Value, list[Narrowing]]) -> bool:
    """True when the node computes a part only, or reads a part only. Nodes that go altogether are not."""
    own = [part for output in node.outputs for part in parts.get(output, [])]
    return any(part.output or any(box != WHOLE for box in part.inputs) for part in own)


def _name(node: ir.Node) -> str:
    return node.name or node.op_type
