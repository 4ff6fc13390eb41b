"""Tables that a person reads at a glance."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text


def count(number: float) -> str:
    """Prints a count with its unit prefix: `1.26 G`, `330.2 k`."""
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.4g}{unit}"
    return f"{number:g}"


def size(number: float) -> str:
    """Prints bytes: `1.3 MB`."""
    for factor, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= factor:
            return f"{number / factor:.3g} {unit}"
    return f"{number:g} B"


def report_table(report: dict[str, Any], verbose: bool = False) -> RenderableType:
    """The whole report of a compile, as it ends on the terminal."""
    parts: list[RenderableType] = [_stages(report), _passes(report), _artifact(report)]
    if report["latency"]:
        parts.append(latency_table(report["latency"]))
    parts += [Text(f"note: {note}", style="yellow") for note in report["notes"]]
    if verbose:
        parts += [_refusals(report)]
    return Group(*parts)


def _stages(report: dict[str, Any]) -> RenderableType:
    text = Text("stages  ", style="bold")
    text.append(" · ".join(f"{stage['name']} {stage['seconds']:.2f} s" for stage in report["stages"]), style="not bold")
    return text


def _decibel(parity: dict[str, Any]) -> str:
    return "identical" if parity["sqnr_db"] is None else f"{parity['sqnr_db']:.1f}"


def _error(parity: dict[str, Any]) -> str:
    return "inf" if parity["max_abs_error"] is None else f"{parity['max_abs_error']:.2g}"


def _agreement(parity: dict[str, Any]) -> str:
    return "–" if parity["top1_agreement"] is None else f"{100 * parity['top1_agreement']:.1f} %"


def _metric(metric: dict[str, Any] | None) -> str:
    if metric is None:
        return "–"
    text = f"{100 * metric['value']:.2f} %"
    if "difference" in metric:
        low, high = (100 * bound for bound in metric["ci95"])
        text += f" ({100 * metric['difference']:+.2f}, [{low:+.2f}, {high:+.2f}])"
    return text


def _passes(report: dict[str, Any]) -> RenderableType:
    model, artifact = report["model"], report["artifact"]
    metric = next((m for m in (model["metric"], artifact["metric"]) if m is not None), None)
    accuracy = f"accuracy, n = {metric['samples']}\n(points, 95 % interval)" if metric else "accuracy"
    table = Table(title=f"{escape(model['name'])} → {report['target']['name']} {report['target']['precision']}", title_justify="left")
    table.add_column("step")
    table.add_column("rewrites", justify="right")
    for heading in ("parameters", "MACs", "weights", "max abs error", "SQNR dB", "top-1 agreement", accuracy):
        table.add_column(heading, justify="right")
    sizes = (count(model["parameters"]), count(model["macs"]), size(model["bytes"]))
    table.add_row(f"original ({escape(model['source'])})", "", *sizes, "", "", "", _metric(model["metric"]))
    canonical = report["canonical"]["parity"]
    table.add_row("canonical graph", "", "", "", "", _error(canonical), _decibel(canonical), _agreement(canonical), "")
    for item in report["passes"]:
        name = escape(f"{item['spec']} ({item['effect']})")
        cost = (count(item["parameters"]), count(item["macs"]), size(item["bytes"]))
        parity = item["parity"]
        if item["undone"]:
            table.add_row(name, "undone", *cost, "", "", "", escape(item["undone"]))
        elif parity is None:
            table.add_row(name, "no match", *cost, "–", "–", "–", "–")
        else:
            measured = (_error(parity), _decibel(parity), _agreement(parity), _metric(item["metric"]))
            table.add_row(name, str(item["rewrites"]), *cost, *measured)
    parity = artifact["parity"]
    measured = (_error(parity), _decibel(parity), _agreement(parity), _metric(artifact["metric"]))
    table.add_row("artifact against the original", "", "", "", size(artifact["bytes"]), *measured, style="bold")
    return table


def _artifact(report: dict[str, Any]) -> RenderableType:
    facts = ", ".join(f"{key} {value}" for key, value in report["target"]["facts"].items())
    text = Text(f"data    {report['data']['source']}, {report['data']['calibration']} calibration inputs; every pass is compared with ")
    text.append("the graph before it, the artifact with the original's own outputs")
    if facts:
        text.append(f"\nruntime {facts}")
    return text


def latency_table(latency: dict[str, Any]) -> RenderableType:
    """Latency of the result, beside the baseline if there is one."""
    threads = f"{latency['threads']} thread{'s' if latency['threads'] != 1 else ''}"
    title = f"latency on {escape(latency['device'])}, {threads}, {latency['runs']} runs each, in turn"
    table = Table(title=title, title_justify="left")
    for heading in ("", "median ms", "p90 ms", "p99 ms"):
        table.add_column(heading, justify="right" if heading else "left")
    keys = ("median_ms", "p90_ms", "p99_ms")
    if latency["baseline_median_ms"] is not None:
        table.add_row("baseline (uncompressed, same target)", *(_ms(latency.get(f"baseline_{key}")) for key in keys))
    table.add_row("result", *(_ms(latency[key]) for key in keys), style="bold")
    if latency["speedup"] is None:
        return table
    low, high = latency["speedup_ci95"]
    verdict = Text(f"{latency['speedup']:.2f}× the baseline's speed, 95 % interval [{low:.2f}, {high:.2f}]", style="bold")
    if low <= 1 <= high:
        verdict.append(": no difference within noise", style="yellow")
    return Group(table, verdict)


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _refusals(report: dict[str, Any]) -> RenderableType:
    table = Table(title="left alone", title_justify="left")
    for heading in ("pass", "node", "why"):
        table.add_column(heading)
    for item in report["passes"]:
        for refusal in item["refusals"]:
            table.add_row(escape(item["spec"]), escape(refusal["where"]), escape(refusal["why"]))
    return table


def rows_table(title: str, headings: list[str], rows: list[list[str]], right: tuple[int, ...] = ()) -> Table:
    """A plain table; columns whose positions are in `right` are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for position, heading in enumerate(headings):
        table.add_column(heading, justify="right" if position in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def console() -> Console:
    """The console for results, on standard output."""
    return Console()
