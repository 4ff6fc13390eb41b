"""`edgekit inspect FILE` of a file that a target's format has everywhere, such as a `.mlpackage`: what its target says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from edgekit.cli.show import rows_table

PLACES = 3
"""How many places of the same finding are named."""


def described_file(model: str) -> dict[str, Any] | None:
    """What the target of the file's format says of it; None where the name is not that of such a file.

    Raises:
        SourceError, UnsupportedOpError: It cannot be read.
    """
    from edgekit.against import target_of

    path = Path(model)
    target = target_of(path)
    if target is None:
        return None
    from edgekit.evaluate import in_worker
    from edgekit.isolation import Worker

    with Worker() as worker:  # native code reads a file that anybody wrote
        return {"file": model, **in_worker(worker, f"read {path.name}", target.describe_file, path)}


def description_table(found: dict[str, Any]) -> RenderableType:
    """What `described_file` found, as tables."""
    facts = " · ".join(f"{key.replace('_', ' ')}: {value}" for key, value in found.get("facts", {}).items())
    operators = rows_table(
        "operators", ["operator", "count"], [[name, str(n)] for name, n in found.get("operators", {}).items()], right=(1,)
    )
    return Group(Text(found["file"], style="bold"), Text(facts), operators, findings_table(found.get("findings", [])))


def findings_table(findings: list[dict[str, Any]]) -> RenderableType:
    """Findings `{where, what, why, source}`, those that say the same in one row; the sources stand below, numbered."""
    if not findings:
        return Text("nothing was found that the rules name")
    places: dict[tuple[str, str, str, str], list[str]] = {}
    for item in findings:
        places.setdefault((item["what"], item.get("operator", ""), item["why"], item["source"]), []).append(item["where"])
    numbers = {source: number for number, source in enumerate(dict.fromkeys(item["source"] for item in findings), 1)}
    rows = [
        [what, operator, str(len(names)), f"{why} [{numbers[source]}]", _named(names)]
        for (what, operator, why, source), names in sorted(places.items(), key=lambda row: row[0][0])
    ]
    table = rows_table("what runs where", ["finding", "operator", "places", "why [source]", "where"], rows, right=(2,))
    return Group(table, *(Text(f"[{number}] {source}", style="dim") for source, number in numbers.items()))


def _named(names: list[str]) -> str:
    more = len(names) - PLACES
    return ", ".join(names[:PLACES]) + (f" and {more} more" if more > 0 else "")


def placement_table(placement: Any) -> RenderableType:
    """A target's report of a file, any object with a `describe` method, as the same tables; Core ML's own plan where it has one."""
    parts: list[RenderableType] = [description_table({"file": placement.path, **placement.describe()})]
    if placement.devices:
        rows = [[item.operation, item.operator, item.preferred, ", ".join(item.supported)] for item in placement.devices]
        parts.append(rows_table("Core ML's plan on this Mac", ["operation", "operator", "runs on", "could run on"], rows))
    return Group(*parts)
