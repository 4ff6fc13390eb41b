"""`edgekit diff`: which operators went and came between two models, by module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgekit.cli.show import count, size
from edgekit.graph.diff import diff_models
from edgekit.inputs import InputSpec, parse_inputs
from edgekit.stages import canonical_graph, open_graph


def diff_sources(first: str, second: str, inputs: Sequence[str] = (), depth: int | None = None) -> dict[str, Any]:
    """Compares two models: networks in their canonical form, ONNX files and artifacts as they are.

    Args:
        first: As on the command line, or the folder of an artifact.
        second: Likewise.
        inputs: Shapes of inputs, for both.
        depth: How many parts of a module's path count; None: all.

    Raises:
        EdgekitError: One cannot be read or traced.
    """
    specifications = parse_inputs(inputs)
    (before, notes), (after, more) = _graph(first, specifications), _graph(second, specifications)
    return {"a": first, "b": second, **diff_models(before, after, depth).to_dict(), "notes": list(dict.fromkeys([*notes, *more]))}


def _graph(model: str, inputs: Sequence[InputSpec]) -> tuple[ir.Model, list[str]]:
    opened = open_graph(model, inputs)
    return canonical_graph(opened.graph) if opened.traced else opened.graph, opened.notes


def diff_table(found: dict[str, Any]) -> RenderableType:
    """What `diff_sources` found, as a table that fits 80 columns."""
    notes = [Text(f"note: {note}", style="yellow") for note in found["notes"]]
    heading = Text(f"A  {found['a']}\nB  {found['b']}")
    if not found["modules"]:
        return Group(heading, Text(f"no difference in {found['unchanged']} modules"), *notes)
    table = Table(title="what went and came, by module", title_justify="left", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("module", overflow="fold")
    table.add_column("operator", no_wrap=True)
    for name in ("A", "B", "B−A", "para-\nmeters", "MACs", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for change in found["modules"]:
        _add(table, change["module"], change)
    table.add_section()
    _add(table, "total", found["total"], "bold")
    changed, unchanged = len(found["modules"]), found["unchanged"]
    summary = f"{changed} modules differ, {unchanged} do not · {_went(found['total'])}"
    return Group(heading, table, Text(summary), *notes)


def _add(table: Table, name: str, change: dict[str, Any], style: str = "") -> None:
    """The rows of one module: one an operator whose number changed; the other differences stand in the first."""
    numbers = [
        _difference(change["parameters"], count),
        _difference(change["macs"], count),
        _difference(change["bytes"], size),
    ]
    rows = [
        (escape(operator), str(pair["a"]), str(pair["b"]), f"{pair['b'] - pair['a']:+d}".replace("-", "−"))
        for operator, pair in change["operators"].items()
    ]
    for index, row in enumerate(rows or [("", "", "", "")]):
        table.add_row(escape(name) if index == 0 else "", *row, *(numbers if index == 0 else ["", "", ""]), style=style)


def _difference(pair: dict[str, int], show: Any) -> str:
    change = pair["b"] - pair["a"]
    return "" if change == 0 else f"{'+' if change > 0 else '−'}{show(abs(change))}"


def _went(total: dict[str, Any]) -> str:
    changes = [pair["b"] - pair["a"] for pair in total["operators"].values()]
    went, came = -sum(change for change in changes if change < 0), sum(change for change in changes if change > 0)
    totals = ", ".join(
        f"{label} {show(total[key]['a'])} → {show(total[key]['b'])}"
        for key, label, show in (("parameters", "parameters", count), ("macs", "MACs", count), ("bytes", "weights", size))
    )
    return f"{went} operators went, {came} came in all · {totals}"
