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
from edgekit.errors import TraceError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.check import check_model
from edgekit.graph.cost import cost
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.shapes import infer_shapes, pin_inputs
from edgekit.inputs import parse_inputs
from edgekit.original import example_pins, pin
from edgekit.source import Source, open_source
from edgekit.trace import EXPORTERS, trace


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
    specifications = parse_inputs(inputs)
    source = open_source(model, specifications, weights)
    graph = source.model
    if graph is None:
        graph = _traced(source)
        notes = check_model(graph, source.name)
        pin_inputs(graph, example_pins(graph, source))
    else:
        notes = check_model(graph, source.name)
        notes += pin(graph, specifications)
    infer_shapes(graph)
    graph = canonicalize(to_opset(graph, OPSET))
    infer_shapes(graph)
    found = cost(graph)
    parameters = source.parameters()
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
        "notes": [*source.notes, *notes],
    }


def _traced(source: Source) -> ir.Model:
    failures = []
    for exporter in EXPORTERS:
        try:
            return trace(source, exporter).model
        except TraceError as error:
            failures.append(error)
    raise failures[0]


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
