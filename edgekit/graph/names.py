"""One name for one thing: what shape inference and the version converters rely on, and what exporters do not always give.

PyTorch's exporter may call a value as a buffer is called. Inside an `ir.Model` that is harmless, since values are objects there; as soon as
the model is written out, the two are one.
"""

from __future__ import annotations

from collections import defaultdict

import onnx_ir as ir

from edgekit.graph.check import subgraphs


def unique_names(model: ir.Model) -> None:
    """Gives every node and value of the main graph and its subgraphs a name of its own; inputs and outputs of the graph keep theirs."""
    named = {*model.graph.inputs, *model.graph.outputs}
    existing = {output.name for node in model.graph.all_nodes() for output in node.outputs if output.name}
    existing |= {name for graph in model.graphs() for name in graph.initializers}
    values = _Names(existing, {value.name for value in named if value.name})
    nodes = _Names({node.name for node in model.graph.all_nodes() if node.name}, set())
    _name_graph(model.graph, named, values, nodes)


class _Names:
    """Hands out names. A name that somebody bears already goes to the first who claims it, never to another."""

    def __init__(self, existing: set[str], claimed: set[str]) -> None:
        self._existing = existing
        self._claimed = claimed
        self._count: dict[str, int] = defaultdict(int)

    def claim(self, wanted: str) -> str:
        name = wanted
        while name in self._claimed or (name != wanted and name in self._existing):
            self._count[wanted] += 1
            name = f"{wanted}_{self._count[wanted]}"
        self._claimed.add(name)
        return name


def _name_by_result(node: ir.Node) -> str:
    """A name by which the author of a graph without names of nodes finds the node again."""
    result = node.outputs[0].name if node.outputs else None
    return f"{result}/{node.op_type}" if result else f"node_{node.op_type}"


def _name_graph(graph: ir.Graph, named: set[ir.Value], values: _Names, nodes: _Names) -> None:
    def name_value(value: ir.Value, fallback: str) -> None:
        if value in named:
            return
        named.add(value)
        name = values.claim(value.name or fallback)
        if name != value.name:
            value.name = name

    for value in (*graph.inputs, *list(graph.initializers.values())):
        name_value(value, "value")
    for node in graph:
        node.name = nodes.claim(node.name or _name_by_result(node))
        for index, output in enumerate(node.outputs):
            if output.name or output.uses() or output.is_graph_output():  # an unused optional output stays without a name
                name_value(output, f"{node.name}_output_{index}")
        for body in subgraphs(node):
            _name_graph(body, named, values, nodes)
