"""Holds a file of a target's format, whoever wrote it, against an ONNX model: `edgekit verify X.mlpackage --against Y.onnx`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from edgekit import contracts, native
from edgekit.contracts import Arrays, Target
from edgekit.data import declared_inputs, load_data
from edgekit.errors import UsageError
from edgekit.evaluate import in_worker
from edgekit.graph.files import save_model
from edgekit.inputs import parse_inputs
from edgekit.isolation import Worker
from edgekit.stages import open_graph
from edgekit.verify import Parity, assert_close, compare


def format_of(path: Path) -> type[Target]:
    """The target whose format the file name says.

    Raises:
        UsageError: No target reads it.
    """
    target = target_of(path)
    if target is not None:
        return target
    raise UsageError(
        f"'{path}' is neither the folder of a compile nor a file that a target reads",
        where=str(path),
        fix=f"give an artifact's folder, or a file that ends in: {', '.join(_suffixes())}",
    )


def target_of(path: Path) -> type[Target] | None:
    """The target whose format the file name says; None: no target reads it."""
    return next((cls for suffix, cls in _suffixes().items() if path.name.endswith(suffix)), None)


def _suffixes() -> dict[str, type[Target]]:
    return {cls.suffix: cls for cls in contracts.targets.load_all()[0].values() if cls.suffix}


def verify_against(
    path: Path, model: str, *, data: str | None = None, inputs: Sequence[str] = (), samples: int = 8, seed: int = 0, precision: str = ""
) -> Parity:
    """Runs a file of a target's format and an ONNX model on the same inputs.

    Args:
        path: The file, such as `net.mlpackage`.
        model: The ONNX file, or another model as on the command line.
        data: As on the command line; None: seeded noise.
        inputs: Shapes of inputs, such as `x:1,3,224,224`.
        samples: How many inputs.
        seed: Seed of the noise.
        precision: The precision that the file computes in, which decides what is close enough; empty: only measure.

    Returns:
        The file's outputs against those of the model in ONNX Runtime.

    Raises:
        UsageError: No target reads the file, or its inputs or outputs cannot be those of the model.
        SourceError: The file or the model cannot be read.
        ParityError: A precision is given, and the outputs differ by more than it explains.
    """
    target = format_of(path)
    graph = open_graph(model, parse_inputs(inputs), seed=seed).graph
    feeds = load_data(data, declared_inputs(graph), calibration=samples, seed=seed).calibration
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder, Worker() as worker:
        source = save_model(graph, Path(folder) / "model.onnx")[0]
        expected = in_worker(worker, "run the model", native.run_onnx, source, feeds, 1)
        found: list[Arrays] = in_worker(worker, f"run {path.name}", native.run_file, target, path, feeds, list(expected[0]), 1)
    if precision:
        return assert_close(expected, found, stage=path.name, precision=precision)
    return compare(expected, found)
