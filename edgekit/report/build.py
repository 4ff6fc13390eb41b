"""report.json: everything that a compile found out, in the form of `schema.json` beside this file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekit.artifact import SCHEMA, describe_files
from edgekit.contracts import Arrays
from edgekit.data import Declared, declared_inputs
from edgekit.evaluate import Outcome
from edgekit.flexible import ShapeCheck
from edgekit.graph.cost import Cost
from edgekit.metrics import Metric, difference
from edgekit.original import Original
from edgekit.parity_table import ParityRow
from edgekit.pipeline import PassResult
from edgekit.progress import StageTime
from edgekit.recipe import Recipe
from edgekit.recover.settings import Recovered
from edgekit.verify import Parity


@dataclass
class Compiled:
    """What the stages after opening found out.

    Attributes:
        original_cost: Of the uncompressed model's graph as the exporter gives it by default.
        canonical: The canonical graph's outputs against those of the graph as it was exported or read.
        passes: What each pass did.
        base: The uncompressed model's outcome, which every accuracy difference is taken from.
        lowered: The artifact's outcome.
        parity: The artifact's outputs against the original model's own.
        precision: The lowest precision that takes part in the artifact: in which values are held, computed or stored.
        inputs: What the optimized graph declares of its inputs.
        feed: One calibration batch in the dtypes of those.
        parity_table: The rows of the parity table.
        shapes: The artifact against the original model at each further shape of the inputs that was checked.
        pictures: Names of pictures in the artifact's folder.
        recovered: What was won back, None where that was not asked for.
        latency: The dictionary `latency`, or None where it was not measured.
    """

    original_cost: Cost
    canonical: Parity
    passes: list[PassResult]
    base: Outcome
    lowered: Outcome
    parity: Parity
    precision: str
    inputs: dict[str, Declared]
    feed: Arrays
    parity_table: list[ParityRow] = field(default_factory=list)
    shapes: list[ShapeCheck] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    recovered: Recovered | None = None
    latency: dict[str, Any] | None = None


def build_report(
    recipe: Recipe, original: Original, compiled: Compiled, stages: Sequence[StageTime], versions: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Puts the report together.

    Args:
        recipe: What was compiled and how.
        original: The uncompressed model.
        compiled: What the stages after opening found out.
        stages: The stages and their times.
        versions: Versions of the packages that took part.
        folder: The artifact's folder, complete but for the report.
    """
    base, lowered = compiled.base, compiled.lowered
    target = recipe.make_target()
    files = describe_files(folder)
    parameters = original.source.parameters()
    return {
        "schema": SCHEMA,
        "model": {
            "source": recipe.model,
            "name": original.source.name,
            "parameters": compiled.original_cost.parameters if parameters is None else parameters,
            "macs": compiled.original_cost.macs,
            "bytes": compiled.original_cost.bytes,
            "inputs": _inputs(declared_inputs(original.model)),
            "outputs": _outputs(original),
            "metric": _metric(base.test),
        },
        "target": {"name": target.name, "precision": target.precision, "facts": lowered.facts or {}},
        "data": {
            "source": original.data.origin,
            "calibration": len(original.data.calibration),
            "held_out": original.data.held_out,
        },
        "stages": [{"name": stage.name, "seconds": round(stage.seconds, 4)} for stage in stages],
        "canonical": {"parity": compiled.canonical.to_dict()},
        "passes": [_pass(result) for result in compiled.passes],
        "parity_table": [row.to_dict() for row in compiled.parity_table],
        "artifact": {
            "path": ".",
            "precision": compiled.precision,
            "inputs": _inputs(compiled.inputs),
            "bytes": sum(file["bytes"] for file in files.values()),
            "files": files,
            "parity": compiled.parity.to_dict(),
            "shapes": [check.to_dict() for check in compiled.shapes],
            "metric": _metric(lowered.test, base.test),
        },
        "latency": compiled.latency,
        "pictures": compiled.pictures,
        "recover": None if compiled.recovered is None else compiled.recovered.to_dict(),
        "notes": original.notes,
        "versions": versions,
    }


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Writes the report as JSON."""
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _inputs(inputs: dict[str, Declared]) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(declared.shape), "dtype": declared.dtype.name} for name, declared in inputs.items()]


def _outputs(original: Original) -> list[dict[str, Any]]:
    return [{"name": name, "shape": list(array.shape), "dtype": array.dtype.name} for name, array in original.reference[0].items()]


def _pass(result: PassResult) -> dict[str, Any]:
    return {
        "spec": result.spec,
        "effect": result.effect.value,
        "rewrites": result.rewrites,
        "rules": result.rules,
        "seconds": round(result.seconds, 4),
        "parity": None if result.parity is None else result.parity.to_dict(),
        "parameters": result.cost.parameters,
        "macs": result.cost.macs,
        "bytes": result.cost.bytes,
        "metric": None if result.metric is None else result.metric.to_dict(),
        "census": {"before": result.census_before, "after": result.census_after},
        "refusals": [{"where": refusal.where, "why": refusal.why} for refusal in result.refusals],
        "undone": result.undone,
        "trials": [trial.to_dict() for trial in result.trials],
    }


def _metric(correct: Any, base: Any = None) -> dict[str, Any] | None:
    """The metric as a dictionary: alone for the uncompressed model, with the paired difference to it for the artifact."""
    if correct is None:
        return None
    return Metric.of(correct).to_dict() if base is None else difference(base, correct).to_dict()
