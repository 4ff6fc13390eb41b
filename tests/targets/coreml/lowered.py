"""Lowers a small ONNX graph to a package, runs it in the evaluator and holds the result against ONNX's own reference."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx.reference import ReferenceEvaluator

from edgekit.targets.coreml.compression import Storage
from edgekit.targets.coreml.convert import Converted, Options, convert
from edgekit.targets.coreml.executable import load_package
from edgekit.targets.coreml.interface import METADATA, Wishes
from edgekit.targets.coreml.legalize import legalize


def lower(
    model: onnx.ModelProto, half: bool = False, version: str = "", storage: Storage | None = None, wishes: Wishes | None = None
) -> Converted:
    """Legalizes and converts a model whose shapes are static."""
    graph = ir.from_proto(model)
    legalize(graph)
    return convert(graph, Options(half, version, storage, wishes or Wishes()))


def run(converted: Converted, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Saves the package, opens it again and runs it once."""
    converted.model.user_defined_metadata[METADATA] = converted.interface.to_json()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mlpackage"
        converted.model.save(str(path))
        return load_package(path, 1).run(inputs)


def check(
    text: str | onnx.ModelProto,
    inputs: dict[str, np.ndarray],
    *,
    half: bool = False,
    version: str = "",
    tolerance: float = 0.0,
    runtime: bool = False,
    **constants: Any,
) -> Converted:
    """Holds the lowered graph against ONNX's reference evaluator, or ONNX Runtime; `constants` become initializers of the text's graph.

    The tolerance is relative to the largest magnitude of each output: 1e-5 in float32, 2 % in float16.
    """
    model = onnx.parser.parse_model(text) if isinstance(text, str) else text
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    reference = ort.InferenceSession(model.SerializeToString()) if runtime else ReferenceEvaluator(model)
    expected = dict(zip([value.name for value in model.graph.output], reference.run(None, inputs), strict=True))
    converted = lower(model, half, version)
    limit = tolerance or (0.02 if half else 1e-5)
    for name, got in run(converted, inputs).items():
        wanted = np.asarray(expected[name])
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype), name
        scale = max(float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0)), 1e-3) if wanted.dtype.kind == "f" else 0
        np.testing.assert_allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=0, atol=limit * scale, err_msg=name)
    return converted
