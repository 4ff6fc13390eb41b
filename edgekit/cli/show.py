"""Tables that a person reads at a glance."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from edgekit.cli.parity import census_table, parity_tables


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
    """The whole report of a compile, as it ends on the terminal; it fits 80 columns."""
    parts: list[RenderableType] = [_title(report), _stages(report), _sizes(report), _numbers(report)]
    if report["latency"]:
        parts.append(latency_table(report["latency"]))
    parts += [Text(f"note: {note}", style="yellow") for note in report["notes"]]
    if verbose:
        parts += [parity_tables(report), census_table(report), _refusals(report)]
    return Group(*parts)


def _title(report: dict[str, Any]) -> RenderableType:
    model, target = report["model"], report["target"]
    text = Text(f"{model['name']} → {target['name']} {target['precision']}", style="bold")
    text.append(
        f"\n{count(model['parameters'])} parameters · {count(model['macs'])} MACs · {size(model['bytes'])} of weights", style="not bold"
    )
    if target["facts"]:
        text.append("\n" + " · ".join(f"{key.replace('_', ' ')} {value}" for key, value in target["facts"].items()), style="not bold")
    return text


def _stages(report: dict[str, Any]) -> RenderableType:
    stages = [f"{stage['name']} {stage['seconds']:.2f} s" for stage in report["stages"]]
    total = sum(stage["seconds"] for stage in report["stages"])
    return Text(" · ".join(stages) + f" · together {total:.1f} s", style="dim")


def _step(item: dict[str, Any]) -> str:
    return escape(f"{item['spec']} ({item['effect']})")


def _sizes(report: dict[str, Any]) -> RenderableType:
    model, artifact = report["model"], report["artifact"]
    table = Table(title="what was rewritten", title_justify="left")
    table.add_column("step", overflow="fold")
    for heading in ("rewrites", "parameters", "MACs", "weights"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("original", "", count(model["parameters"]), count(model["macs"]), size(model["bytes"]))
    for item in report["passes"]:
        rewrites = "undone" if item["undone"] else str(item["rewrites"]) if item["rewrites"] else "no match"
        table.add_row(_step(item), rewrites, count(item["parameters"]), count(item["macs"]), size(item["bytes"]))
        for rule, fired in () if item["undone"] else item.get("rules", {}).items():
            table.add_row(f"  {rule}", str(fired), style="dim")
    table.add_row("artifact on disk", "", "", "", size(artifact["bytes"]), style="bold")
    return table


def _numbers(report: dict[str, Any]) -> RenderableType:
    model, artifact, data = report["model"], report["artifact"], report["data"]
    metric = model["metric"]
    table = Table(
        title=f"what it cost ({escape(data['source'])}, {data['calibration']} calibration inputs)",
        title_justify="left",
        caption="canonical against the exported graph, each pass against the graph before it, "
        + ("what was recovered against the canonical graph, " if report.get("recover") else "")
        + "the artifact against the original model's own outputs"
        + ("" if metric is None else f"; accuracy on {_samples(metric, data)}, points against the original"),
        caption_justify="left",
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("step", overflow="fold")
    headings = ["max abs\nerror", "SQNR\ndB", "top-1\nagree %"]
    if metric is not None:
        headings += ["top-1\n%", "points\n[95 % interval]"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)

    def add(name: str, parity: dict[str, Any] | None, result: dict[str, Any] | None, style: str = "") -> None:
        cells = ["", "", ""] if parity is None else [_error(parity), _decibel(parity), _agreement(parity)]
        table.add_row(name, *cells, *([] if metric is None else _metric(result)), style=style)

    if metric is not None:
        add("original", None, metric)
    add("canonical graph", report["canonical"]["parity"], None)
    for item in report["passes"]:
        if item["undone"]:
            table.add_row(escape(f"{item['spec']} was undone: {item['undone']}"))
        elif item["parity"] is not None:
            add(escape(item["spec"]), item["parity"], item["metric"])
    if recovered := next((row for row in report["parity_table"] if row["stage"] == "recover"), None):
        add("recover", recovered["data"]["previous"], None)
    add("artifact", artifact["parity"], artifact["metric"], "bold")
    for check in artifact.get("shapes", []):
        shapes = ", ".join(f"{name} {'×'.join(map(str, shape))}" for name, shape in check["inputs"].items())
        add(escape(f"  at {shapes}"), check["parity"], None)
    return table


def _samples(metric: dict[str, Any], data: dict[str, Any]) -> str:
    if data["held_out"]:
        return f"{metric['samples']} held-out samples"
    return f"{metric['samples']} samples, the calibration inputs among them"


def _decibel(parity: dict[str, Any]) -> str:
    return "no error" if parity["sqnr_db"] is None else f"{parity['sqnr_db']:.1f}"


def _error(parity: dict[str, Any]) -> str:
    return "inf" if parity["max_abs_error"] is None else f"{parity['max_abs_error']:.1e}"


def _agreement(parity: dict[str, Any]) -> str:
    return "–" if parity["top1_agreement"] is None else f"{100 * parity['top1_agreement']:.1f}"


def _metric(metric: dict[str, Any] | None) -> list[str]:
    if metric is None:
        return ["", ""]
    value = f"{100 * metric['value']:.2f}"
    if "difference" not in metric:
        return [value, ""]
    low, high = (100 * bound for bound in metric["ci95"])
    return [value, f"{100 * metric['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"]


def latency_table(latency: dict[str, Any]) -> RenderableType:
    """Latency of the result, beside the baseline if there is one."""
    threads = f"{latency['threads']} thread{'s' if latency['threads'] != 1 else ''}"
    title = f"latency on {escape(latency['device'])}, {threads}, {latency['runs']} runs each in turn"
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
    if not any(item["refusals"] for item in report["passes"]):
        return Text("nothing was left alone for a condition that failed")
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
