"""Nodes that would leave float16 stay in float32 when a graph is lowered in float16."""

from __future__ import annotations

import numpy as np
import pytest

from tests.targets.coreml.lowered import check

RNG = np.random.default_rng(0)


def text(body: str) -> str:
    return f'<ir_version: 10, opset_import: ["" : 23]> g (float[2,4] x) => (float[2,4] y) {{ {body} }}'


@pytest.mark.parametrize(
    "body", ["m = Mul(x, big) y = Div(m, big)", "a = Add(x, big) y = Sub(a, big)", "m = Mul(x, big) r = Reshape(m, s) y = Div(r, big)"]
)
def test_constants_beyond_float16(body: str) -> None:
    """x · 3e5 / 3e5: in float16 the product, and the constant itself, would be infinite or clipped."""
    constants = {"big": np.float32(3e5)} | ({"s": np.array([2, 4])} if "Reshape" in body else {})
    check(text(body), {"x": RNG.uniform(0.5, 2, (2, 4)).astype(np.float32)}, half=True, **constants)


@pytest.mark.parametrize("low", [-1e9, -3.4e38, -1e6])
def test_masked_scores(low: float) -> None:
    """A row that is masked whole is uniform, as in float32, and never NaN."""
    mask = np.array([[0, 0, low, low], [low] * 4], np.float32)
    check(text("s = Add(x, mask) y = Softmax(s)"), {"x": RNG.normal(size=(2, 4)).astype(np.float32)}, half=True, mask=mask)
