"""Graphs of one or a few nodes as ONNX text, random arrays for them, and ONNX Runtime as the judge of what ONNX's reference lacks."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime

from edgekit.targets.coreml.convert import Converted
from tests.targets.coreml.lowered import lower, run


def text(body: str, inputs: str = "", outputs: str = "float[] y", opset: int = 23) -> str:
    """A model in ONNX's text format; the shapes of its outputs are inferred."""
    body = body.replace("<>", "")
    return f'<ir_version: 10, opset_import: ["" : {opset}]> graph ({inputs}) => ({outputs}) {{ {body} }}'


def model_of(source: str, **constants: np.ndarray) -> onnx.ModelProto:
    """The model of a text, with constants as initializers."""
    model = onnx.parser.parse_model(source)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    return model


def floats(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Normal numbers in float32."""
    return np.random.default_rng([seed, *shape]).normal(0, scale, shape).astype(np.float32)


def of_shape(shape: tuple[int, ...]) -> str:
    """The shape as ONNX's text has it."""
    return f"float[{','.join(map(str, shape))}]"


def agrees_with_runtime(
    source: str, inputs: dict[str, np.ndarray], *, half: bool = False, version: str = "", tolerance: float = 2e-5, **constants: np.ndarray
) -> Converted:
    """Holds the lowered model against ONNX Runtime; the tolerance is relative to each output's largest magnitude."""
    model = model_of(source, **constants)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in model.graph.output]
    converted = lower(model, half, version)
    got = run(converted, inputs)
    for name, wanted in zip(names, session.run(names, inputs), strict=True):
        assert got[name].shape == wanted.shape, name
        scale = max(float(np.abs(wanted).max()), 1e-3)
        np.testing.assert_allclose(got[name], wanted, rtol=0, atol=tolerance * scale, err_msg=name)
    return converted
