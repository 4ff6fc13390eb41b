"""The parity table and the census of a report, as the terminal shows them."""

from __future__ import annotations

from typing import Any

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

DATA = "data"
"""Name of the user's data among the inputs; the others are kinds of adversarial inputs."""


def parity_tables(report: dict[str, Any]) -> RenderableType:
    """Every stage against the original model: one block on the data and one for each kind of adversarial input; it fits 80 columns."""
    rows = report.get("parity_table")
    if not rows:
        return Text("this report holds no parity table: it was written by an earlier edgekit")
    table = Table(
        title="parity with the original model, stage by stage",
        title_justify="left",
        caption="step: max rel error against the stage before; = where the stage changed nothing. Relative to the output's largest "
        "magnitude. Adversarial inputs: zeros, noise of 1e4, denormals; differences on large ones may be rounding that the model enlarges",
        caption_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("stage", overflow="fold")
    for heading in ("max abs\nerror", "max rel\nerror", "SQNR\ndB", "cosine", "top-1\nagree %", "step"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in _kinds(rows):
        table.add_section()
        table.add_row(f"on {kind}", style="bold")
        for index, row in enumerate(rows):
            compared = _compared(row, kind)
            if compared is None:
                cells = ["", "", "did not run", "", "", ""]
            elif index == 0:
                cells = ["", "", "reference", "", "", ""]
            else:
                known = _compared(rows[index - 1], kind) is not None
                cells = [*_measures(compared["original"]), _step(compared["previous"], compared["original"]) if known else ""]
            table.add_row(f"  {escape(row['stage'])}", *cells)
    return table


def _kinds(rows: list[dict[str, Any]]) -> list[str]:
    """The inputs: the data, then the kinds of adversarial inputs of the stage that ran on most."""
    adversarial = max((row["adversarial"] or [] for row in rows), key=len)
    return [DATA, *(item["input"] for item in adversarial)]


def _compared(row: dict[str, Any], kind: str) -> dict[str, Any] | None:
    if kind == DATA:
        found: dict[str, Any] = row["data"]
        return found
    return next((item for item in row["adversarial"] or [] if item["input"] == kind), None)


def _measures(parity: dict[str, Any] | None) -> list[str]:
    """max abs, max rel, SQNR, cosine and top-1 agreement."""
    if parity is None:
        return ["", "", "not comparable", "", ""]
    return [
        error(parity["max_abs_error"]),
        error(parity["max_rel_error"]),
        "no error" if parity["sqnr_db"] is None else f"{parity['sqnr_db']:.1f}",
        cosine(parity["cosine"]),
        "–" if parity["top1_agreement"] is None else f"{100 * parity['top1_agreement']:.1f}",
    ]


def _step(previous: dict[str, Any] | None, original: dict[str, Any] | None) -> str:
    if previous is not None:
        return error(previous["max_rel_error"])
    return "" if original is None else "="


def error(value: float | None) -> str:
    """Prints an error; in reports an infinite one is None."""
    return "inf" if value is None else "0" if value == 0 else f"{value:.1e}"


def cosine(value: float | None) -> str:
    """Prints a cosine; one near 1, where many digits are 9, by what it lacks: `1-3e-13`."""
    if value is None:
        return "–"
    return "1" if value == 1 else f"1-{1 - value:.0e}" if value > 0.999 else f"{value:.4f}"


def census_table(report: dict[str, Any]) -> RenderableType:
    """Whole operators before and after each pass, those whose number changed with an arrow."""
    table = Table(title="whole operators", title_justify="left")
    table.add_column("stage", overflow="fold")
    table.add_column("operators")
    passes = [item for item in report["passes"] if "census" in item]
    if not passes:
        return Text("no pass ran, so no whole operators were counted")
    table.add_row("canonical", _counts(passes[0]["census"]["before"]))
    for item in passes:
        before, after = item["census"]["before"], item["census"]["after"]
        changed = [
            f"{name} {before.get(name, 0)} → {after.get(name, 0)}"
            for name in sorted({*before, *after})
            if before.get(name) != after.get(name)
        ]
        table.add_row(escape(item["spec"]), " · ".join(changed) if changed else "all kept")
    table.add_row("optimized", _counts(passes[-1]["census"]["after"]), style="bold")
    return table


def _counts(counts: dict[str, int]) -> str:
    return " · ".join(f"{name} {number}" for name, number in counts.items()) or "none"
