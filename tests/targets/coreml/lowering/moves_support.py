"""Small ONNX graphs as text, for the tests of operators that move elements."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import lower, run


def graph(inputs: str, outputs: str, body: str) -> str:
    """A model of opset 23 in ONNX's text format."""
    return f'<ir_version: 10, opset_import: ["" : 23]> g ({inputs}) => ({outputs}) {{ {body} }}'


def with_constants(text: str, constants: dict[str, Any]) -> onnx.ModelProto:
    """The model of a text, with arrays as initializers."""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    return model


def result(text: str, inputs: dict[str, np.ndarray], version: str = "", **constants: Any) -> np.ndarray:
    """The only output, where ONNX's reference evaluator is not the one to compare with."""
    (found,) = run(lower(with_constants(text, constants), version=version), inputs).values()
    return found


def refused(text: str, match: str, **constants: Any) -> None:
    """Holds that the graph is refused with a message that says why."""
    with pytest.raises(UnsupportedOpError, match=match):
        lower(with_constants(text, constants))


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
