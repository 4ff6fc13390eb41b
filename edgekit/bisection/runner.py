"""Running graphs, parts of graphs and what a target made of them, in the worker process."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit import native
from edgekit.contracts import Arrays, Target
from edgekit.errors import UnsupportedOpError
from edgekit.evaluate import cast_feeds, in_worker
from edgekit.graph.files import save_model
from edgekit.isolation import Worker


class Runner:
    """Runs what a bisection looks at.

    Args:
        worker: The process for native code.
        folder: An existing folder for temporary files.
        threads: Threads to run on.
    """

    def __init__(self, worker: Worker, folder: Path, threads: int) -> None:
        self.worker = worker
        self.folder = folder
        self.threads = threads

    def values(self, model: ir.Model, feed: Arrays) -> Arrays:
        """Every value of the main graph by name: inputs, initializers and results, in one run.

        Raises:
            UnsupportedOpError, LoweringError: Neither the interpreter nor ONNX Runtime runs the graph.
        """
        (feed,) = cast_feeds([feed], model)
        try:
            return self._call("values", values_by_interpreter, model, feed)  # type: ignore[no-any-return]
        except UnsupportedOpError:
            exposed = model.clone()
            given = {output.name for output in exposed.graph.outputs}
            exposed.graph.outputs.extend(
                output for node in exposed.graph for output in node.outputs if output.name and output.name not in given and output.type
            )
            found: Arrays = self._call("values", _run_onnx, exposed, feed)
            constants = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
            return {**constants, **feed, **found}

    def run(self, model: ir.Model, feed: Mapping[str, Any]) -> Arrays:
        """The outputs of a graph in the interpreter, which rounds every value to its type."""
        return self._call("run", outputs_by_interpreter, model, dict(feed))  # type: ignore[no-any-return]

    def lowered(self, target: Target, model: ir.Model, feed: Arrays) -> Arrays:
        """The outputs of a graph as `target` computes it.

        Raises:
            UnsupportedOpError, LoweringError: The target refuses the graph, or crashed.
        """
        (feed,) = cast_feeds([feed], model)
        folder = Path(tempfile.mkdtemp(prefix="lowered-", dir=self.folder))
        try:
            save_model(model, folder / "source.onnx")
            place = folder / "out"
            place.mkdir()
            in_worker(self.worker, f"lower to {target.name}", native.lower, target, folder / "source.onnx", place)
            outputs, _ = in_worker(self.worker, f"run on {target.name}", native.run_lowered, target, place, [feed], self.threads)
            return outputs[0]  # type: ignore[no-any-return]
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _call(self, stage: str, function: Any, model: ir.Model, feed: Arrays) -> Any:
        folder = Path(tempfile.mkdtemp(prefix="run-", dir=self.folder))
        try:
            path = folder / "part.onnx"
            save_model(model, path)
            return in_worker(self.worker, stage, function, path, feed, self.threads)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def annotate(model: ir.Model, values: Arrays) -> None:
    """Gives results whose type or shape could not be inferred those that they had in a run, so that the graph can be cut there."""
    for node in model.graph:
        for output in node.outputs:
            if (array := values.get(output.name or "")) is None:
                continue
            if output.dtype in (None, ir.DataType.UNDEFINED):
                output.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            if output.shape is None:
                output.shape = ir.Shape(array.shape)


def values_by_interpreter(path: Path, feed: Arrays, threads: int) -> Arrays:
    """Every tensor of a file's main graph by name, in the interpreter."""
    import torch

    from edgekit.graph.interpreter import Interpreter
    from edgekit.graph.interpreter.values import to_array

    torch.set_num_threads(threads)
    found: Arrays = {}

    def keep(name: str, tensor: torch.Tensor) -> None:
        found[name] = to_array(tensor.clone())

    with torch.no_grad():
        Interpreter(path)(feed, keep)
    return found


def outputs_by_interpreter(path: Path, feed: Arrays, threads: int) -> Arrays:
    """The outputs of a file in the interpreter."""
    return native.run_rounded(path, [feed], threads)[0]


def _run_onnx(path: Path, feed: Arrays, threads: int) -> Arrays:
    return native.run_onnx(path, [feed], threads)[0]


def rounded(array: np.ndarray, precision: str) -> np.ndarray:
    """`array` as `precision` holds it, in its own dtype again."""
    import ml_dtypes

    types: dict[str, Any] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
    if precision not in types or array.dtype.kind != "f":
        return array
    with np.errstate(over="ignore", under="ignore"):
        result: np.ndarray = array.astype(types[precision]).astype(array.dtype)
    return result
