"""`edgekit inspect`: what a model is made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.text import Text

from edgekit.cli.show import count, rows_table, size
from edgekit.data import declared_inputs
from edgekit.graph.cost import cost
from edgekit.inputs import parse_inputs
from edgekit.stages import canonical_graph, open_graph


def inspect_model(model: str, inputs: Sequence[str], weights: str | None, top: int) -> dict[str, Any]:
    """Counts a model's operators, parameters, MACs and bytes on its canonical graph.

    Args:
        model: As on the command line.
        inputs: Shapes of inputs.
        weights: Weights to load into the module.
        top: How many of the largest layers to give.

    Raises:
        EdgekitError: The model cannot be read or traced.
    """
    opened = open_graph(model, parse_inputs(inputs), weights)
    graph = canonical_graph(opened.graph)
    found = cost(graph)
    parameters = opened.source.parameters()
    largest = sorted(found.per_node, key=lambda node: (node.macs, node.parameters), reverse=True)[:top]
    return {
        "model": model,
        "parameters": found.parameters if parameters is None else parameters,
        "macs": found.macs,
        "complete": found.complete,
        "bytes": found.bytes,
        "inputs": [{"name": name, "shape": list(d.shape), "dtype": d.dtype.name} for name, d in declared_inputs(graph).items()],
        "operators": dict(Counter(_operator(node) for node in graph.graph).most_common()),
        "largest": [
            {
                "name": node.name,
                "operator": node.op_type,
                "macs": node.macs,
                "parameters": node.parameters,
                "bytes": node.bytes,
                "shape": None if node.output_shape is None else list(node.output_shape),
            }
            for node in largest
        ],
        "notes": opened.notes,
    }


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def inspection_table(found: dict[str, Any]) -> RenderableType:
    """What `inspect_model` found, as tables."""
    total = f"{count(found['parameters'])} parameters · {count(found['macs'])} MACs · {size(found['bytes'])} of weights"
    if not found["complete"]:
        total += " (MACs of some nodes are not known)"
    shapes = ", ".join(f"{item['name']} {item['shape']} {item['dtype']}" for item in found["inputs"])
    operators = rows_table("operators", ["operator", "count"], [[name, str(n)] for name, n in found["operators"].items()], right=(1,))
    rows = [
        [item["name"], item["operator"], count(item["macs"]), count(item["parameters"]), str(item["shape"] or "–")]
        for item in found["largest"]
    ]
    layers = rows_table("largest layers", ["node", "operator", "MACs", "parameters", "output"], rows, right=(2, 3))
    notes = [Text(f"note: {note}", style="yellow") for note in found["notes"]]
    return Group(Text(found["model"], style="bold"), Text(total), Text(f"inputs: {shapes}"), operators, layers, *notes)
