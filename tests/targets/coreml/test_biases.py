"""Biases move into the products before them; everything else stays as it is."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.graph.shapes import infer_shapes
from edgekit.targets.coreml.biases import fuse_biases
from tests.targets.coreml.lowered import check

RNG = np.random.default_rng(0)
W, B = RNG.normal(size=(6, 4)).astype(np.float32), RNG.normal(size=4).astype(np.float32)


def text(body: str, shape: str = "2,3,6", outputs: str = "float[2,3,4] y") -> str:
    return f'<ir_version: 10, opset_import: ["" : 23]> g (float[{shape}] x) => ({outputs}) {{ {body} }}'


@pytest.mark.parametrize(
    "body", ["m = MatMul(x, w) y = Add(m, b)", "m = MatMul(x, w) y = Add(b, m)", "m = MatMul(x, w) n = Add(m, b) y = Relu(n)"]
)
@pytest.mark.parametrize("half", [False, True])
def test_one_linear_with_its_bias(body: str, half: bool) -> None:
    converted = check(text(body), {"x": RNG.normal(size=(2, 3, 6)).astype(np.float32)}, half=half, w=W, b=B)
    (function,) = converted.model.get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    kinds = [operation.type for operation in block.operations if operation.type != "const"]
    assert kinds.count("linear") == 1
    assert "add" not in kinds


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("m = MatMul(x, w) y = Add(m, b) z = Relu(m)", "float[2,3,4] y, float[2,3,4] z"),
        ("m = MatMul(x, w) y = Add(m, b)", "float[2,3,4] y, float[2,3,4] m"),
        ("m = MatMul(x, w) y = Add(m, c)", "float[2,3,4] y"),
        ("m = MatMul(x, w) r = Relu(m) y = Add(r, b)", "float[2,3,4] y"),
    ],
)
def test_what_stays(body: str, outputs: str) -> None:
    constants = {"w": W, "b": B, "c": RNG.normal(size=(3, 4)).astype(np.float32)}
    constants = {name: array for name, array in constants.items() if f" {name})" in body}
    model = onnx.parser.parse_model(text(body, outputs=outputs))
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in constants.items())
    graph = ir.from_proto(model)
    infer_shapes(graph)
    assert fuse_biases(graph) == 0
    check(text(body, outputs=outputs), {"x": RNG.normal(size=(2, 3, 6)).astype(np.float32)}, **constants)
