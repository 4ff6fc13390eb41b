"""`edgekit inspect --stage`: the graph at a stage of a compile, node by node, and as a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgekit.cli.show import count, size
from edgekit.errors import OutputError
from edgekit.graph.cost import cost
from edgekit.graph.diff import module_of, operator_name
from edgekit.graph.files import save_model
from edgekit.recipe import Recipe
from edgekit.stages import StageGraph, graph_at


def inspect_stage(recipe: Recipe, stage: str, out: Path | None = None, force: bool = False) -> dict[str, Any]:
    """Describes the graph at a stage, and writes it where a file is named.

    Args:
        recipe: What to compile and how.
        stage: `canonical`, a pass, or `lowered` (see `edgekit.stages.graph_at`).
        out: The `.onnx` file to write, or None.
        force: Whether a file that exists is replaced.

    Raises:
        EdgekitError: There is no such stage, the graph cannot be made, or the file cannot be written.
    """
    if out is not None:
        _require_writable(out, force)
    found = graph_at(recipe, stage)
    whole = cost(found.graph)
    nodes = list(found.graph.graph.all_nodes())
    return {
        "model": recipe.model,
        "stage": found.stage,
        "target": found.target,
        "passes": [{"spec": spec, "rewrites": rewrites} for spec, rewrites in found.passes.items()],
        "parameters": whole.parameters,
        "macs": whole.macs,
        "complete": whole.complete,
        "bytes": whole.bytes,
        "operators": dict(Counter(map(operator_name, nodes)).most_common()),
        "native_operators": found.native,
        "nodes": [
            {
                "name": row.name,
                "operator": operator_name(node),
                "module": row.module,
                "shape": None if row.output_shape is None else list(row.output_shape),
                "parameters": row.parameters,
                "macs": row.macs,
                "bytes": row.bytes,
            }
            for node, row in zip(nodes, whole.per_node, strict=True)
        ],
        "notes": found.notes,
        "files": [] if out is None else _write(found, out),
    }


def _require_writable(out: Path, force: bool) -> None:
    if out.suffix != ".onnx":
        raise OutputError(f"'{out.name}' is not the name of an ONNX file", where=str(out), fix="let it end in .onnx")
    if not out.parent.is_dir():
        raise OutputError("there is no such folder", where=str(out.parent), fix="make it first")
    if out.is_dir() or (out.exists() and not force):
        raise OutputError("the file exists already", where=str(out), fix="name another, or replace it by --force")


def _write(found: StageGraph, out: Path) -> list[str]:
    try:
        return [str(file) for file in save_model(found.graph, out)]
    except OSError as error:
        out.unlink(missing_ok=True)
        raise OutputError(f"the file cannot be written: {error.strerror or error}", where=str(out), fix="check the free space") from error


def stage_table(found: dict[str, Any]) -> RenderableType:
    """What `inspect_stage` found, as tables; they fit 80 columns."""
    title = Text(found["model"], style="bold")
    title.append(f" · stage {found['stage']}" + (f" · {found['target']}" if found["target"] else ""))
    passes = [f"{item['spec']} ({item['rewrites']} rewrites)" for item in found["passes"]]
    total = f"{len(found['nodes'])} nodes · {count(found['parameters'])} parameters · {count(found['macs'])} MACs · {size(found['bytes'])}"
    if not found["complete"]:
        total += " (MACs of some nodes are not known)"
    parts: list[RenderableType] = [title]
    if passes:
        parts.append(Text(f"passes: {', '.join(passes)}"))
    parts += [Text(total), _nodes(found["nodes"]), Text(f"operators: {_counts(found['operators'])}")]
    if found["native_operators"]:
        parts.append(Text(f"in the target's file: {_counts(found['native_operators'])}"))
    parts += [Text(f"note: {note}", style="yellow") for note in found["notes"]]
    parts += [Text(f"written to {file}") for file in found["files"]]
    return Group(*parts)


def _nodes(nodes: Sequence[dict[str, Any]]) -> Table:
    """One row a node. A module is named once for the nodes that follow one another in it; a node called as its operator is not named."""
    table = Table(title="graph", title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("module", "operator", "node", "output"):
        table.add_column(heading, overflow="fold", no_wrap=heading == "operator")
    for heading in ("para-\nmeters", "MACs", "bytes"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for node in nodes:
        module = module_of(node["name"], node["module"])
        name = node["name"].removeprefix(f"{module}/").rpartition("/")[2] if node["module"] else node["name"]
        shape = "?" if node["shape"] is None else "×".join(map(str, node["shape"])) or "scalar"
        numbers = [count(node["parameters"]) if node["parameters"] else "", count(node["macs"]) if node["macs"] else ""]
        table.add_row(
            escape(module if module != last else ""),
            escape(node["operator"]),
            escape(name if name != node["operator"] else ""),
            shape,
            *numbers,
            size(node["bytes"]) if node["bytes"] else "",
        )
        last = module
    return table


def _counts(counts: dict[str, int]) -> str:
    return " · ".join(f"{name} {number}" for name, number in counts.items()) or "none"
