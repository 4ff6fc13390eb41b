"""Builds small graphs from ONNX's text form, traces modules, and runs both in ONNX Runtime, the independent reference."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.shapes import infer_shapes

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'


@pytest.fixture
def rng() -> np.random.Generator:
    """Seeded anew for each test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def build() -> Callable[..., ir.Model]:
    """Returns `build(text, arrays)`: a graph without header in ONNX's text form, with initializers, its shapes inferred."""

    def make(text: str, arrays: Mapping[str, np.ndarray] | None = None) -> ir.Model:
        proto = onnx.parser.parse_model(HEADER + text)
        proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in (arrays or {}).items())
        for index, node in enumerate(proto.graph.node):
            node.name = node.name or f"{node.op_type}_{index}"
        model = ir.from_proto(proto)
        infer_shapes(model)
        return model

    return make


@pytest.fixture(scope="session")
def run() -> Callable[..., list[np.ndarray]]:
    """Returns `run(model, feeds)`: the outputs in ONNX Runtime without its own graph optimizations, after ONNX's full check."""
    import onnxruntime

    def execute(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        results: list[np.ndarray] = session.run(None, dict(feeds))
        return results

    return execute


@pytest.fixture(scope="session")
def trace() -> Callable[..., ir.Model]:
    """Returns `trace(module, shape)`: the module's graph in canonical form, with batch norms that have random statistics."""

    def export(module: nn.Module, shape: tuple[int, ...]) -> ir.Model:
        torch.manual_seed(0)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(part.weight, -1, 1)
                nn.init.normal_(part.bias)
                part.running_mean.normal_()
                part.running_var.uniform_(0.1, 1.1)
        module.eval()
        program = torch.onnx.export(module, (torch.zeros(shape),), dynamo=True, opset_version=23, optimize=False, verbose=False)
        return canonicalize(program.model)

    return export


@pytest.fixture(scope="session")
def operators() -> Callable[[ir.Model], dict[str, int]]:
    """Returns a function that counts the operators of a graph."""
    return lambda model: dict(Counter(node.op_type for node in model.graph))


@pytest.fixture(scope="session")
def assert_equal_up_to_rounding() -> Callable[..., None]:
    """Returns a check of results against references: 1e-4 of the largest magnitude in float32, 1e-10 in float64."""

    def check(results: list[np.ndarray], references: list[np.ndarray]) -> None:
        for result, reference in zip(results, references, strict=True):
            assert result.shape == reference.shape
            assert result.dtype == reference.dtype
            bound = {"float32": 1e-4, "float64": 1e-10, "float16": 1e-2}[reference.dtype.name] * np.abs(reference).max()
            np.testing.assert_allclose(result, reference, rtol=0, atol=float(bound))

    return check
