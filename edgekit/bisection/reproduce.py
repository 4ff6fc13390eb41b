"""The smallest file that shows the difference: the part at fault with its inputs, and a check that it does show it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgekit import native
from edgekit.bisection.judge import Judge
from edgekit.bisection.nodes import NodeFound
from edgekit.bisection.runner import Runner, outputs_by_interpreter
from edgekit.contracts import Arrays, Target
from edgekit.errors import LoweringError, UnsupportedOpError
from edgekit.evaluate import in_worker
from edgekit.graph.files import save_model
from edgekit.graph.parts import part
from edgekit.specs import format_spec
from edgekit.staging import staged

MODEL, INPUTS, EXPECTED, README = "reproduce.onnx", "inputs.npz", "expected.npz", "README.md"
_FILES = frozenset({MODEL, f"{MODEL}.data", INPUTS, EXPECTED, README})


@dataclass(frozen=True)
class Reproducer:
    """What was written.

    Attributes:
        path: The folder.
        nodes: How many nodes its graph has.
        shows: Whether the files, read again, show the difference.
    """

    path: Path
    nodes: int
    shows: bool


def is_reproducer(folder: Path) -> bool:
    """Whether a folder holds what `write_reproducer` writes and nothing else, so that it may be replaced."""
    names = {path.name for path in folder.iterdir()}
    return {MODEL, INPUTS, EXPECTED} <= names <= _FILES


def write_reproducer(
    out: Path, found: NodeFound, model: ir.Model, given: Arrays, expected: np.ndarray, judge: Judge, precision: str, runner: Runner,
    target: Target | None, headline: str, force: bool = False,
) -> Reproducer:  # fmt: skip
    """Writes a folder with the part at fault, its inputs and the right result.

    Args:
        out: The folder; it appears whole or not at all.
        found: The part.
        model: The graph that it is of.
        given: The right values of the part's inputs, by their names in `model`.
        expected: The right value of its output.
        judge: What counts as a difference.
        precision: The lowest that takes part.
        runner: Runs it.
        target: The target that computes it wrongly; None: the graph itself is wrong.
        headline: What it shows, for its README.
        force: Whether an earlier reproducer at `out` is replaced.

    Raises:
        OutputError: The folder exists, cannot be written, or the disk is full.
    """
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    cut = part(model, [found.output], {values[name] for name in found.inputs})
    name = found.output.name or "output"
    with staged(out, is_reproducer if force else None) as folder:
        save_model(cut, folder / MODEL)
        np.savez(folder / INPUTS, **_plain({value.name or "": given[value.name or ""] for value in cut.graph.inputs}))  # type: ignore[arg-type]
        np.savez(folder / EXPECTED, **_plain({name: expected}))  # type: ignore[arg-type]
        (folder / README).write_text(_readme(headline, target), encoding="utf-8")
        shows = _shows(folder, name, judge, precision, runner, target)
    return Reproducer(out, len(cut.graph), shows)


def _plain(arrays: Arrays) -> Arrays:
    """Types that numpy's files do not know (bfloat16) as float32."""
    return {name: array if array.dtype.kind in "biufc" else array.astype(np.float32) for name, array in arrays.items()}


def _shows(folder: Path, output: str, judge: Judge, precision: str, runner: Runner, target: Target | None) -> bool:
    with np.load(folder / INPUTS) as archive:
        feed = {name: archive[name] for name in archive.files}
    with np.load(folder / EXPECTED) as archive:
        expected = archive[output]
    try:
        if target is not None:
            lowered = folder.parent / f".{folder.name}-lowered"
            lowered.mkdir()
            try:
                in_worker(runner.worker, "reproduce", native.lower, target, folder / MODEL, lowered)
                found, _ = in_worker(runner.worker, "reproduce", native.run_lowered, target, lowered, [feed], runner.threads)
                result = found[0][output]
            finally:
                shutil.rmtree(lowered, ignore_errors=True)
        else:
            result = in_worker(runner.worker, "reproduce", outputs_by_interpreter, folder / MODEL, feed, runner.threads)[output]
    except (LoweringError, UnsupportedOpError):
        return True  # it does not run at all
    return judge.differs(expected, result, precision)


def _readme(headline: str, target: Target | None) -> str:
    run = f"""    import numpy, edgekit.graph
    inputs, expected = dict(numpy.load("{INPUTS}")), dict(numpy.load("{EXPECTED}"))
    found = edgekit.graph.run("{MODEL}", inputs)
    for name in found: print(name, abs(found[name].astype(float) - expected[name].astype(float)).max())
"""
    if target is not None:
        spec = format_spec(target.name, target)
        run = f"    edgekit bisect {MODEL} --target '{spec}' --no-passes --data {INPUTS}\n"
    return f"{headline}\n\nRun in this folder:\n\n{run}"
