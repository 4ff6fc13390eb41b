"""Runs a compiled package under the ONNX graph's names, types and ranks: on a Mac in Core ML itself, elsewhere in the evaluator."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.contracts import Arrays, Executable
from edgekit.errors import LoweringError, UsageError
from edgekit.graph.feeds import check_feeds
from edgekit.targets.coreml.interface import METADATA, NEEDS, Interface, Port
from edgekit.targets.coreml.reference.evaluator import Evaluator
from edgekit.targets.coreml.reference.package import Package, open_package
from edgekit.targets.coreml.reference.types import numpy_dtype


class _Runner:
    """A package on Core ML itself on a Mac, elsewhere in the evaluator."""

    def __init__(self, package: Package, threads: int) -> None:
        self.facts = {"executed_by": "edgekit's evaluator of MIL programs (Core ML itself runs on Apple's systems only)"}
        self.evaluator = Evaluator(package)
        self._threads = threads
        self._model: Any = None
        if sys.platform == "darwin":
            import coremltools as ct

            self._model = ct.models.MLModel(str(package.path))
            self.facts = {"executed_by": "Core ML"}

    def run(self, feeds: Arrays, states: Arrays, images: dict[str, Port]) -> dict[str, Any]:
        """Runs once; `states` are changed in place."""
        if self._model is None:
            return self._evaluate(feeds, states)
        if states:
            raise LoweringError(
                "the package has states, which Core ML does not let a caller set", fix="check it without the option 'states'"
            )
        given = {name: _picture(array, images[name]) if name in images else array for name, array in feeds.items()}
        results: dict[str, Any] = self._model.predict(given)
        return results

    def _evaluate(self, feeds: Arrays, states: Arrays) -> dict[str, Any]:
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            return self.evaluator.run(feeds, states or None)
        finally:
            torch.set_num_threads(before)


def load_package(path: Path, threads: int) -> Executable:
    """Opens any package: one that edgekit wrote bears the names and types of its ONNX graph, another its own.

    Raises:
        SourceError: It cannot be read.
        UnsupportedOpError: It holds no ML Program, or an operator that the evaluator does not know.
    """
    package = open_package(path)
    text = package.spec.description.metadata.userDefined.get(METADATA)
    return CoreMlExecutable(package, Interface.from_json(text), threads) if text else ForeignExecutable(package, threads)


class CoreMlExecutable(Executable):
    """A package that edgekit wrote, ready to run under the names, types and ranks of its ONNX graph."""

    def __init__(self, package: Package, interface: Interface, threads: int) -> None:
        self._runner = _Runner(package, threads)
        self._interface = interface
        self._declared = {port.onnx: (np.dtype(port.onnx_dtype), _taken(port)) for port in interface.inputs}
        self.facts = self._runner.facts | _needs(package)
        self.inputs, self.outputs = tuple(self._declared), tuple(port.onnx for port in interface.outputs)

    def run(self, inputs: Arrays) -> Arrays:
        """Runs the model once; states start at what their inputs hold.

        Raises:
            UsageError: An input is missing, unknown, of another dtype or shape, or holds an integer beyond 32 bits.
            LoweringError: The package has states, which Core ML itself does not let a caller set.
        """
        check_feeds(self._declared, inputs)
        ports = self._interface.inputs
        feeds = {port.name: _to_port(inputs[port.onnx], port) for port in ports if not port.state}
        states = {port.name: _to_port(inputs[port.onnx], port) for port in ports if port.state}
        results = self._runner.run(feeds, states, {port.name: port for port in ports if port.colour})
        return {
            port.onnx: _from_port(states[port.name] if port.state else _result(results, port), port) for port in self._interface.outputs
        }


def _taken(port: Port) -> tuple[int | None, ...]:
    """The shape of the ONNX input, None for a size that varies."""
    return () if port.scalar else tuple(None if axis in port.flexible else size for axis, size in enumerate(port.shape))


def _needs(package: Package) -> dict[str, str]:
    """For which deployment target the package is written, and which operators asked for it."""
    needs = json.loads(package.spec.description.metadata.userDefined.get(NEEDS) or "{}")
    facts = {"deployment_target": needs["deployment_target"]} if needs else {}
    reasons = needs.get("needed_by", {}).get(needs.get("deployment_target", ""), [])
    return facts | ({"needed_by": "; ".join(reasons[:3]) + ("; …" if len(reasons) > 3 else "")} if reasons else {})


class ForeignExecutable(Executable):
    """A package that somebody else wrote, ready to run under its own names; its states start at zero in every run."""

    def __init__(self, package: Package, threads: int) -> None:
        self._runner = _Runner(package, threads)
        self._declared = {name: numpy_dtype(kind.dtype) for name, kind in self._runner.evaluator.inputs.items()}
        self.facts = self._runner.facts
        self.inputs, self.outputs = tuple(self._declared), tuple(self._runner.evaluator.outputs)

    def run(self, inputs: Arrays) -> Arrays:
        """Runs the model once; arrays are cast to the dtypes that the package declares.

        Raises:
            UsageError: An input is missing, unknown, or of another shape.
        """
        feeds = {name: array.astype(self._declared.get(name, array.dtype)) for name, array in inputs.items()}
        return {name: np.asarray(value) for name, value in self._runner.run(feeds, {}, {}).items() if not isinstance(value, (dict, str))}


def _to_port(array: np.ndarray, port: Port) -> np.ndarray:
    if array.dtype.kind in "iu" and array.size and (array.max() > 2**31 - 1 or array.min() < -(2**31)):
        raise UsageError(
            f"input '{port.onnx}' holds integers beyond 32 bits, which Core ML lacks",
            where=f"input '{port.onnx}'",
            fix="keep the values within int32, or use the target onnxruntime",
        )
    if port.colour:  # the pixels that Core ML scales and shifts to these numbers
        array = (array.astype(np.float64) - np.reshape(port.bias, (1, -1, 1, 1))) / port.scale
    return np.array(
        array.reshape(port.shape) if port.scalar else array, {"fp32": np.float32, "fp16": np.float16, "int32": np.int32}[port.dtype]
    )


def _picture(array: np.ndarray, port: Port) -> Any:
    """The image that Core ML itself takes: pixels are whole numbers there."""
    from PIL import Image

    pixels = np.clip(np.rint(array[0]), 0, 255).astype(np.uint8)
    if port.colour == "BGR":
        pixels = pixels[::-1]
    return Image.fromarray(pixels[0] if port.colour == "GRAYSCALE" else pixels.transpose(1, 2, 0))


def _result(results: dict[str, Any], port: Port) -> np.ndarray:
    """An output; of a classifier, the scores of the classes in order."""
    if not port.labels:
        array: np.ndarray = results[port.name]
        return array
    scores = next(value for value in results.values() if isinstance(value, dict))
    return np.array([scores[label] for label in port.labels], np.float32).reshape(port.shape)


def _from_port(array: np.ndarray, port: Port) -> np.ndarray:
    shaped = array.reshape(()) if port.scalar else array
    return shaped.astype(np.dtype(port.onnx_dtype))
