"""Constants that only the interpreter computes well are folded, within bounds, and are what ONNX Runtime computes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.graph.canonicalize import canonicalize
from tests.graph.exporter_support import run
from tests.graph.test_dialects import parse, random

X = "float[1,3,4,4] x"
FOLDED = {
    "antialiased Resize": 'k = Resize<mode = "cubic", antialias = 1, coordinate_transformation_mode = "half_pixel">(image, , , sizes)',
    "linear Resize": 'k = Resize<mode = "linear">(image, , scales)',
    "Conv": "k = Conv<pads = [1, 1, 1, 1]>(image, kernel)",
    "LayerNormalization": "k = LayerNormalization(image, width, width)",
    "Gelu": "k = Gelu(image)",
    "ReduceL2": "k = ReduceL2(image, last)",
    "Einsum": 'k = Einsum<equation = "bchw,bcwv->bchv">(image, image)',
    "GatherND": "k = GatherND(image, corners)",
    "GatherElements": "k = GatherElements<axis = 3>(image, columns)",
}
ARRAYS = {
    "image": random(1, 3, 6, 6), "kernel": random(3, 3, 3, 3), "width": random(6), "last": np.array([-1]),
    "sizes": np.array([1, 3, 4, 4]), "scales": np.array([1, 1, 2, 2], np.float32),
    "corners": np.array([[[0, 0, 1], [0, 2, -1]]]), "columns": np.array([[[[5, 0], [-1, 3]]] * 2]),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_folded(name: str) -> None:
    nodes = f"{FOLDED[name]} s = ReduceSum<keepdims = 0>(k) z = Mul(s, x) f = Reshape(k, flat) y = Add(f, z)"
    model = parse(f"(float[1] x) => (float[N] y) {{ {nodes} }}", **ARRAYS, flat=np.array([-1]))
    x = np.array([0.3], np.float32)
    (before,) = run(model, {"x": x}).values()
    canonicalize(model)
    assert not set(Counter(node.op_type for node in model.graph)) - {"Add", "Mul", "ReduceSum"}
    (after,) = run(model, {"x": x}).values()
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


HUGE = {
    "Resize": ("k = Resize(image, , , many)", {"many": np.array([1, 3, 1 << 20, 1 << 20])}),
    "padded Conv": ("k = Conv<pads = [1000000, 1000000, 0, 0], strides = [1000000, 1000000]>(image, kernel)", {}),
    "Einsum": ('k = Einsum<equation = "a,b,c,d->">(long, long, long, long)', {"long": random(4096)}),
    "random numbers": ("k = RandomNormalLike(image)", {}),
}


@pytest.mark.parametrize("name", HUGE)
def test_what_is_huge_or_random_stays(name: str) -> None:
    nodes, arrays = HUGE[name]
    model = parse(f"(float x) => (float y) {{ {nodes} s = ReduceSum<keepdims = 0>(k) y = Add(s, x) }}", **ARRAYS, **arrays)
    canonicalize(model)
    assert name.split()[-1] in {node.op_type for node in model.graph} or "RandomNormalLike" in {node.op_type for node in model.graph}


def test_a_declared_shape_is_not_believed() -> None:
    model = parse("(float x) => (float y) { k = Resize(image, , , many) s = ReduceSum<keepdims = 0>(k) y = Add(s, x) }",
                  **ARRAYS, many=np.array([1, 3, 1 << 20, 1 << 20]))  # fmt: skip
    model.graph[0].outputs[0].shape = ir.Shape([1, 3, 2, 2])
    canonicalize(model)
    assert "Resize" in {node.op_type for node in model.graph}
