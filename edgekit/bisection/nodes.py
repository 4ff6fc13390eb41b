"""Level 3: the node. Between two graphs by their values, and between a graph and a target by cutting the graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.bisection.judge import Judge
from edgekit.bisection.matching import Names, counterparts, same_node
from edgekit.bisection.runner import Runner
from edgekit.bisection.search import Search
from edgekit.contracts import Arrays, Target
from edgekit.errors import LoweringError, UnsupportedOpError
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.parts import frontier, part, reads

_STRICTER = (1.0, 0.1, 0.01, 0.001)
"""A small fault may pass the limit only where a later node enlarges it: the limit is lowered until a node that was rewritten is found."""


@dataclass(frozen=True)
class NodeFound:
    """What level 3 found.

    Attributes:
        node: The node, of the graph that is at fault.
        output: Its output that is wrong, or the first after it that has a counterpart.
        region: All nodes between the last values that agree and `output`; the node among them.
        inputs: Names of the values that the region takes, per name that of the reference.
        changed: Whether the node was rewritten; otherwise its operands or the target are at fault.
        evaluations: Graphs that were run.
        bound: The most that it may take.
        alone: Whether the node alone is bad on the reference's operands; None where it was not tried.
    """

    node: ir.Node
    output: ir.Value
    region: tuple[ir.Node, ...]
    inputs: dict[str, str]
    changed: bool
    evaluations: int
    bound: int
    alone: bool | None = None

    @property
    def module(self) -> str:
        """Path of the PyTorch module that the node is of; empty where that is not known."""
        return self.node.metadata_props.get(MODULE_KEY, "")


@dataclass(frozen=True)
class Pair:
    """Two graphs that should agree, with all their values on one input.

    Attributes:
        good: The reference.
        bad: The graph at fault.
        good_values: Values of the reference by name.
        bad_values: Values of the graph at fault by name.
        names: Counterparts of the values of `bad` in `good`.
    """

    good: ir.Model
    bad: ir.Model
    good_values: Arrays
    bad_values: Arrays
    names: Names

    @classmethod
    def run(cls, good: ir.Model, bad: ir.Model, feed: Arrays, runner: Runner) -> Pair:
        """Runs both on one input."""
        return cls(good, bad, runner.values(good, feed), runner.values(bad, feed), counterparts(good, bad))


def find_node(pair: Pair, judge: Judge, precision: str, places: Sequence[str] = ()) -> NodeFound | None:
    """Finds the first node of `pair.bad` whose output differs from its counterpart's while everything before it agrees.

    Args:
        pair: The two graphs; each was run once.
        judge: What counts as a difference.
        precision: The lowest that either computes in.
        places: Names of the rewritten places, which are preferred where several nodes come into question.
    """
    found = None
    for slack in _STRICTER:
        candidate = _first_difference(pair, judge, precision, slack, places)
        found = found or candidate
        if candidate is not None and candidate.changed:
            return candidate
    return found


def _first_difference(pair: Pair, judge: Judge, precision: str, slack: float, places: Sequence[str]) -> NodeFound | None:
    agreeing: dict[ir.Value, str] = {}
    for value in pair.bad.graph.inputs:
        agreeing[value] = next(iter(pair.names.get(value.name or "", [value.name or ""])))
    for node in pair.bad.graph:
        for output in node.outputs:
            name = output.name or ""
            others = [other for other in pair.names.get(name, ()) if other in pair.good_values]
            if name not in pair.bad_values or not others:
                continue
            same = next((o for o in others if not judge.differs(pair.good_values[o], pair.bad_values[name], precision, slack)), None)
            if same is None:
                return _found(pair, output, agreeing, places)
            agreeing[output] = same
    return None


def _found(pair: Pair, output: ir.Value, agreeing: dict[ir.Value, str], places: Sequence[str]) -> NodeFound:
    inputs = frontier([output], agreeing)
    region = between(pair.bad, output, inputs)
    changed = [node for node in region if not _unchanged(node, pair)]
    named = [node for node in changed if node.name in places]
    known = {node.name for node in pair.good.graph}
    node = (named or [node for node in changed if node.name in known and node.op_type != "Cast"] or changed or list(region))[-1]
    return NodeFound(node, output, region, {value.name or "": agreeing[value] for value in inputs}, bool(changed), 2, 2)


def between(model: ir.Model, output: ir.Value, stops: Sequence[ir.Value]) -> tuple[ir.Node, ...]:
    """The nodes that `output` depends on, without those that `stops` depend on, in the order of the graph."""
    wanted: set[ir.Node] = set()
    stack = [output]
    while stack:
        producer = stack.pop().producer()
        if producer is not None and producer not in wanted:
            wanted.add(producer)
            stack += [value for value in reads(producer) if value not in stops]
    return tuple(node for node in model.graph if node in wanted)


def _unchanged(node: ir.Node, pair: Pair) -> bool:
    outputs = {output.name: output for other in pair.good.graph for output in other.outputs}
    for name in pair.names.get(node.outputs[0].name or "", ()):
        producer = outputs[name].producer() if name in outputs else None
        if producer is not None and same_node(producer, node, pair.good_values, pair.bad_values, pair.names):
            return True
    return False


def find_lowered_node(
    model: ir.Model, values: Arrays, feed: Arrays, target: Target, judge: Judge, precision: str, runner: Runner
) -> NodeFound | None:
    """Finds the node that a target computes wrongly. What a target computes inside is not seen, so the graph is cut at a position.

    The part before the cut gives out every value that is still needed after it, and is lowered and run by itself. A target may fuse
    otherwise there than in the whole graph: None, where no part by itself is bad.

    Args:
        model: The graph that was lowered.
        values: Its values in the interpreter.
        feed: The inputs.
        target: The target.
        judge: What counts as a difference.
        precision: The lowest that takes part.
        runner: Runs both.
    """
    nodes = [node for node in model.graph if any(output.name for output in node.outputs)]

    def is_bad(position: int) -> bool:
        cut = _cut(model, nodes, position)
        return bool(cut) and _differs(part(model, cut), values, target, judge, precision, runner)

    search = Search(len(nodes), is_bad, {0: False})
    position = search.first_bad()
    if not position:
        return None
    node = nodes[position - 1]
    stops = {value for value in reads(node) if not value.is_initializer()}
    outputs = [output for output in node.outputs if output.name and (output.uses() or output.is_graph_output())]
    alone = _differs(part(model, outputs, stops), values, target, judge, precision, runner)
    region, inputs = [node], list(stops)
    if not alone:  # it is wrong together with what stands before it
        region, inputs = _grow(model, nodes[:position], outputs, values, target, judge, precision, runner)
    same = {value.name or "": value.name or "" for value in inputs}
    return NodeFound(node, outputs[0], tuple(region), same, False, search.evaluations + 1, search.bound, alone)


def _cut(model: ir.Model, nodes: Sequence[ir.Node], position: int) -> list[ir.Value]:
    """The values made by the first `position` nodes that later nodes read or that the graph gives out."""
    inside = set(nodes[:position])
    return [
        output
        for node in nodes[:position]
        for output in node.outputs
        if output.name and (output.is_graph_output() or any(_top(use.node, model) not in inside for use in output.uses()))
    ]


def _top(node: ir.Node, model: ir.Model) -> ir.Node | None:
    """The node of the main graph that `node` stands in; None where it is in a subgraph, which reads its values late."""
    return node if node.graph is model.graph else None


def _differs(cut: ir.Model, values: Arrays, target: Target, judge: Judge, precision: str, runner: Runner) -> bool:
    feed = {value.name or "": values[value.name or ""] for value in cut.graph.inputs}
    try:
        found = runner.lowered(target, cut, feed)
    except (LoweringError, UnsupportedOpError):
        return True
    return any(judge.differs(values[name], array, precision) for name, array in found.items() if name in values)


def _grow(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    outputs: Sequence[ir.Value],
    values: Arrays,
    target: Target,
    judge: Judge,
    precision: str,
    runner: Runner,
) -> tuple[list[ir.Node], list[ir.Value]]:
    """The shortest of some tails of `nodes`, each twice as long as the one before, that is bad by itself on the reference's values."""
    length = 2
    while length < len(nodes):
        inside = set(nodes[-length:])
        stops = {value for node in inside for value in reads(node) if value.producer() not in inside and not value.is_initializer()}
        if _differs(part(model, outputs, stops), values, target, judge, precision, runner):
            inputs = frontier(outputs, stops)
            return list(between(model, outputs[0], inputs)), inputs
        length *= 2
    inputs = frontier(outputs)
    return list(between(model, outputs[0], inputs)), inputs
