"""The folder that a compile writes, and what can be done with it: run, verify, profile.

model.xml …        the target's native files
optimized.onnx     the graph that was lowered
baseline/          the same target's files of the uncompressed model, for timing beside it
parity.npz         inputs and the original model's outputs on them
recipe.toml        repeats the compile
report.json        what was measured (edgekit/report/schema.json)
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import native
from edgekit.contracts import Arrays, Executable, Target
from edgekit.errors import SourceError, UsageError
from edgekit.evaluate import in_worker
from edgekit.isolation import Worker
from edgekit.machine import available_threads
from edgekit.native import Timed
from edgekit.profile.host import latency
from edgekit.recipe import Recipe, load_recipe
from edgekit.verify import Parity, assert_close, compare, tolerance

BASELINE = "baseline"
OPTIMIZED = "optimized.onnx"
PARITY = "parity.npz"
RECIPE = "recipe.toml"
REPORT = "report.json"
TOKENS = "kept_tokens.png"
SCHEMA = 1
_OWN_FILES = {OPTIMIZED, f"{OPTIMIZED}.data", PARITY, RECIPE, REPORT, TOKENS}
_PARTS = ("inputs", "original", "expected")
_PARITY_BYTES = 64 * 2**20
"""Batches beyond this many bytes are not kept for a later check."""


class Artifact:
    """A compiled model on disk.

    Attributes:
        path: The folder.
        report: The dictionary of report.json, with the folder's absolute path.
    """

    def __init__(self, path: Path, report: dict[str, Any], recipe: Recipe) -> None:
        self.path = path
        self.report = {**report, "artifact": {**report["artifact"], "path": os.path.abspath(path)}}
        self.recipe = recipe
        self.keep: object = None  # a temporary folder lives as long as its artifact
        self._executable: Executable | None = None

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r})"

    @property
    def target(self) -> Target:
        """The target, with the options that it was compiled with."""
        return self.recipe.make_target()

    @property
    def threads(self) -> int:
        """Threads that it runs on."""
        return self.recipe.threads or available_threads()

    def run(self, inputs: Arrays) -> Arrays:
        """Runs the compiled model once in this process.

        Args:
            inputs: Arrays by input name, in the shapes and dtypes of `report["model"]["inputs"]`.

        Raises:
            DataError: An input is missing, unknown, or of another shape or dtype.
        """
        if self._executable is None:
            self._executable = self.target.load(self.path, self.threads)
        return self._executable.run(inputs)

    def verify(self) -> Parity:
        """Repeats the parity check on the inputs that were kept, in a process of its own.

        Returns:
            The artifact's outputs against those of the original model.

        Raises:
            SourceError: A file is missing, truncated or changed.
            ParityError: The outputs are no longer those of the graph that was lowered.
        """
        check_files(self.path, self.report)
        kept = load_parity(self.path / PARITY)
        with Worker() as worker:
            outputs, _ = in_worker(worker, "verify", native.run_lowered, self.target, self.path, kept.inputs, self.threads)
        assert_close(kept.expected, outputs, stage="the artifact", precision=self.report["artifact"]["precision"])
        return compare(kept.original, outputs)

    def profile(self, *, budget_s: float = 10.0, max_runs: int = 1000) -> dict[str, Any]:
        """Times the compiled model beside the baseline, the two in turn, on this machine.

        Args:
            budget_s: Seconds to measure for.
            max_runs: Runs at most of each.

        Returns:
            The dictionary `latency` of report.json.
        """
        check_files(self.path, self.report)
        kept = load_parity(self.path / PARITY)
        timed = {"result": Timed(self.target, self.path, kept.inputs[0])}
        if (self.path / BASELINE).is_dir():
            dtypes = {item["name"]: item["dtype"] for item in self.report["model"]["inputs"]}
            feed = {name: array.astype(dtypes[name]) for name, array in kept.inputs[0].items()}
            timed["baseline"] = Timed(self.target.uncompressed(), self.path / BASELINE, feed)
        with Worker() as worker:
            return latency(worker, timed, self.threads, budget_s, max_runs, self.recipe.seed)


def is_artifact(folder: Path) -> bool:
    """Whether a folder is one that a compile wrote, and holds nothing else: only then may another compile replace it."""
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        native_files = {name.split("/")[0] for name in report["artifact"]["files"]}
        known = isinstance(report["schema"], int)
        return known and {entry.name for entry in folder.iterdir()} <= {*native_files, *_OWN_FILES, BASELINE}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def open_artifact(path: Path) -> Artifact:
    """Opens a folder that `edgekit compile` wrote.

    Raises:
        SourceError: It is not an artifact, or its report is of another schema.
        RecipeError: Its recipe cannot be read, or its target is not known here.
    """
    where = str(path)
    if not path.is_dir():
        raise SourceError("there is no such artifact folder", where=where, fix="name the folder that edgekit compile wrote")
    try:
        report = json.loads((path / REPORT).read_text(encoding="utf-8"))
        schema = report["schema"]
    except FileNotFoundError as error:
        raise SourceError(
            "the folder is not an artifact: it has no report.json", where=where, fix="name the folder of a compile"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"report.json cannot be read: {error}", where=where, fix="compile again") from error
    if schema != SCHEMA:
        raise SourceError(
            f"the report is of schema {schema}, this edgekit reads schema {SCHEMA}",
            where=where,
            fix="compile again, or install its version",
        )
    _require_entries(report, where)
    return Artifact(path, report, load_recipe(path / RECIPE))


def _require_entries(report: dict[str, Any], where: str) -> None:
    """Checks the entries of a report that `Artifact` reads.

    Raises:
        SourceError: One is missing, or not of its kind.
    """
    try:
        artifact, inputs = report["artifact"], report["model"]["inputs"]
        entries: list[tuple[object, type]] = [(artifact["precision"], str)]
        entries += [(said[key], kind) for said in artifact["files"].values() for key, kind in (("bytes", int), ("sha256", str))]
        entries += [(item[key], str) for item in inputs for key in ("name", "dtype")]
        for value, kind in entries:
            if not isinstance(value, kind):
                raise TypeError(f"{value!r} is not of type {kind.__name__}")
        for kind_of_number in (artifact["precision"], *(item["dtype"] for item in inputs)):
            tolerance(kind_of_number)
    except KeyError as error:
        raise SourceError(f"report.json has no entry {error}", where=where, fix="compile again") from error
    except (TypeError, AttributeError) as error:
        raise SourceError(f"report.json is damaged: {error}", where=where, fix="compile again") from error
    except UsageError as error:
        raise SourceError(f"report.json is damaged: {error.what}", where=where, fix="compile again") from error


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Bytes and SHA-256 of each of the target's native files below `folder`, by relative name."""
    described = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in _OWN_FILES and not name.startswith((f"{BASELINE}/", ".")):
            described[name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return described


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_files(folder: Path, report: dict[str, Any]) -> None:
    """Holds the native files to what the report says of them.

    Raises:
        SourceError: A file is missing, truncated or changed.
    """
    for name, said in report["artifact"]["files"].items():
        file = folder / name
        if not file.is_file():
            raise SourceError("a file of the artifact is missing", where=str(file), fix="compile again")
        if file.stat().st_size != said["bytes"]:
            raise SourceError(
                f"a file of the artifact has {file.stat().st_size:,} bytes, {said['bytes']:,} were written",
                where=str(file),
                fix="compile again",
            )
        if _sha256(file) != said["sha256"]:
            raise SourceError("a file of the artifact was changed after it was written", where=str(file), fix="compile again")


@dataclass(frozen=True)
class KeptParity:
    """What a later check needs, one entry a batch.

    Attributes:
        inputs: The inputs.
        original: What the original model gave on them.
        expected: What the optimized graph gave on them, before it was lowered.
    """

    inputs: list[Arrays]
    original: list[Arrays]
    expected: list[Arrays]


def save_parity(path: Path, kept: KeptParity) -> None:
    """Writes as many batches as fit 64 MiB, but at least one."""
    arrays: dict[str, np.ndarray] = {}
    total = 0
    for index, batch in enumerate(zip(kept.inputs, kept.original, kept.expected, strict=True)):
        total += sum(array.nbytes for part in batch for array in part.values())
        if index and total > _PARITY_BYTES:
            break
        for part_name, part in zip(_PARTS, batch, strict=True):
            arrays |= {f"{part_name}/{index}/{name}": array for name, array in part.items()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def load_parity(path: Path) -> KeptParity:
    """Reads what `save_parity` wrote.

    Raises:
        SourceError: The file is missing or damaged.
    """
    parts: dict[str, dict[int, Arrays]] = {name: {} for name in _PARTS}
    try:
        with np.load(path, allow_pickle=False) as archive:
            for key in archive.files:
                part, index, name = key.split("/", 2)
                parts[part].setdefault(int(index), {})[name] = archive[key]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise SourceError(f"the kept inputs cannot be read: {error}", where=str(path), fix="compile again") from error
    if not parts["inputs"] or any(parts[name].keys() != parts["inputs"].keys() for name in _PARTS):
        raise SourceError("the kept inputs are not complete", where=str(path), fix="compile again")
    return KeptParity(*([parts[name][index] for index in sorted(parts[name])] for name in _PARTS))
