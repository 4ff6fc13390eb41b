"""`edgekit doctor`: what is installed, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from typing import Any

from rich.table import Table

from edgekit.cli.show import rows_table
from edgekit.machine import available_threads, processor, version

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9_.-]+)(?:\[[^]]*\])?(?P<range>[^;]*)(?:;\s*extra\s*==\s*['\"](?P<extra>[^'\"]+)['\"])?")


def examine() -> list[dict[str, Any]]:
    """Looks at Python, the processor and every package that edgekit's metadata names.

    Returns:
        One dictionary a finding: `item`, `needed_by`, `found`, `ok`, `required`, `fix`.
    """
    findings = [
        _finding(
            "python", "edgekit", ".".join(map(str, sys.version_info[:3])), sys.version_info >= (3, 11), True, "install Python 3.11 or newer"
        ),
        _finding("processor", "", f"{processor()}, {available_threads()} threads", True, False, None),
    ]
    for requirement in importlib.metadata.requires("edgekit") or []:
        match = _REQUIREMENT.match(requirement)
        if match is None or match["name"] == "edgekit":
            continue
        name, extra = match["name"], match["extra"]
        installed = version(name)
        fitting = installed is not None and _fits(installed, match["range"].strip())
        wanted = f"edgekit[{extra}]" if extra else "edgekit"
        fix = None if fitting else f"pip install -c constraints.txt '{wanted}'"
        found = "not installed" if installed is None else installed if fitting else f"{installed}, needs {match['range'].strip()}"
        findings.append(_finding(name, extra or "edgekit", found, fitting, extra is None, fix))
    return findings


def _fits(installed: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return not wanted or SpecifierSet(wanted).contains(installed, prereleases=True)


def _finding(item: str, needed_by: str, found: str, ok: bool, required: bool, fix: str | None) -> dict[str, Any]:
    return {"item": item, "needed_by": needed_by, "found": found, "ok": ok, "required": required, "fix": None if ok else fix}


def doctor_table(found: list[dict[str, Any]]) -> Table:
    """The findings as a table."""
    rows = [[item["item"], item["needed_by"], item["found"], item["fix"] or ("ok" if item["ok"] else "")] for item in found]
    return rows_table("edgekit doctor", ["item", "needed by", "found", "what to do"], rows)
