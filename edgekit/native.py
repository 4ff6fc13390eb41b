"""What runs in the worker process: everything that hands a graph to native code.

Functions here take and return plain data, since they are called through `edgekit.isolation.Worker`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgekit.contracts import Arrays, Shapes, Target
from edgekit.errors import LoweringError, UnsupportedOpError, UsageError
from edgekit.graph.files import INLINE_LIMIT

_OF_NO_USE = re.compile(r"\[ONNXRuntimeError\] : \d+ : \w+ : |Load model from .*?failed:|\S*/onnxruntime/core/\S+:\d+ .*?\) (?=[A-Z])")
"""What ONNX Runtime's messages say of its status codes, its source, and the file, which is a temporary one."""


def run_onnx(path: Path, feeds: Sequence[Arrays], threads: int) -> list[Arrays]:
    """Runs an ONNX file in ONNX Runtime, once per feed.

    Graph optimizations are off: the graph is computed as written, and a fault of the optimizer is not taken for one of a pass.

    Raises:
        UnsupportedOpError: ONNX Runtime has no kernel for an operator.
        LoweringError: ONNX Runtime refused the graph.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    data = path.with_name(f"{path.name}.data")
    if data.exists() and data.stat().st_size > INLINE_LIMIT:  # large weights: prepacked copies would double them in memory
        options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.x64quantprecision", "1")  # 8-bit products saturate otherwise on older processors
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return [dict(zip(names, session.run(names, feed), strict=True)) for feed in feeds]
    except Exception as error:  # ONNX Runtime's exception classes share no base
        text = _OF_NO_USE.sub("", str(error)).strip()
        kind = UnsupportedOpError if "NOT_IMPLEMENTED" in str(error) else LoweringError
        raise kind(
            f"ONNX Runtime cannot run the graph: {text.splitlines()[0][:300] if text else type(error).__name__}",
            fix="check the model with onnx.checker; every check of edgekit runs the graph in ONNX Runtime",
        ) from error


def run_rounded(path: Path, feeds: Sequence[Arrays], threads: int) -> list[Arrays]:
    """Runs an ONNX file in edgekit's interpreter, which rounds every value to the type that the graph gives it, once per feed.

    ONNX Runtime has few kernels of half precision for processors: it computes such graphs in float32, and what they lose or where
    they overflow would not be seen.

    Raises:
        UnsupportedOpError: The interpreter does not know an operator.
    """
    import torch

    from edgekit.graph.interpreter import Interpreter
    from edgekit.graph.interpreter.values import to_array

    torch.set_num_threads(threads)
    interpreter = Interpreter(path)
    with torch.no_grad():
        return [{name: to_array(value) for name, value in interpreter(feed).items()} for feed in feeds]


def lower(target: Target, onnx_path: Path, folder: Path) -> None:
    """Lowers an ONNX file into `folder` by `target`, legalized first."""
    import onnx_ir as ir

    model = ir.load(onnx_path)
    target.legalize(model)
    target.lower(model, folder)


def lower_sizes(target: Target, onnx_paths: Sequence[Path], shapes: Shapes, folder: Path) -> None:
    """Lowers one graph that was saved at several input shapes into `folder` by `target`, legalized first."""
    import onnx_ir as ir

    models = [ir.load(path) for path in onnx_paths]
    for model in models:
        target.legalize(model)
    target.lower_sizes(models, shapes, folder)


def annotate(target: Target, folder: Path, recipe: str) -> None:
    """Writes the text of the recipe into what `lower` wrote."""
    target.annotate(folder, recipe)


def run_lowered(target: Target, folder: Path, feeds: Sequence[Arrays], threads: int) -> tuple[list[Arrays], dict[str, str]]:
    """Loads what `lower` wrote and runs it once per feed; also returns what the runtime says of itself."""
    executable = target.load(folder, threads)
    return [executable.run(feed) for feed in feeds], dict(executable.facts)


def run_file(target: type[Target], path: Path, feeds: Sequence[Arrays], outputs: Sequence[str], threads: int) -> list[Arrays]:
    """Runs a file of a target's format that anybody wrote, under the names of the model that it is held against.

    Its inputs and outputs are taken by name, and where the names differ in order.

    Raises:
        UsageError: It has another number of inputs or outputs.
    """
    executable = target.load_file(path, threads)
    given = _renamed("inputs", list(feeds[0]), executable.inputs, path)
    back = _renamed("outputs", list(executable.outputs), outputs, path)
    return [
        {back[name]: array for name, array in executable.run({given[name]: array for name, array in feed.items()}).items()}
        for feed in feeds
    ]


def _renamed(kind: str, names: Sequence[str], wanted: Sequence[str], path: Path) -> dict[str, str]:
    if len(names) != len(wanted):
        raise UsageError(
            f"the two models have different {kind}: {', '.join(names)} and {', '.join(wanted)}",
            where=str(path),
            fix="compare models of the same interface",
        )
    return {name: name for name in names} if set(names) == set(wanted) else dict(zip(names, wanted, strict=True))


@dataclass(frozen=True)
class Timed:
    """A lowered model that is timed: the target that it was lowered by, its folder, and an input of its own dtypes."""

    target: Target
    folder: Path
    feed: Arrays


def time_lowered(timed: dict[str, Timed], threads: int, budget_s: float, max_runs: int, seed: int) -> dict[str, np.ndarray]:
    """Times several lowered models in turn in one process; returns milliseconds per run, `[runs]` each, by name."""
    from functools import partial

    from edgekit.profile.measure import time_in_turn

    candidates = {name: partial(one.target.load(one.folder, threads).run, one.feed) for name, one in timed.items()}
    return time_in_turn(candidates, budget_s=budget_s, max_runs=max_runs, rng=np.random.default_rng(seed))
