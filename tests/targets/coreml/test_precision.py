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


@pytest.mark.parametrize("moved", [
    "b = Slice(p, begin, end, axis)", "b = Tile(p, reps)", "n = Where(m, zero, high) b = Neg(n)",
    "h = Where(m, zero, lower) b = Mul(h, part)",
    "u = Unsqueeze(p, axis) b = Squeeze(u, axis)", "b = Gather<axis = 0>(p, rows)",
])  # fmt: skip
def test_masks_that_are_moved_before_they_are_added(moved: str) -> None:
    constants = {
        "zero": np.float32(0), "low": np.float32(-1e9), "high": np.float32(1e9), "lower": np.float32(-2e9), "part": np.float32(0.5),
        "begin": np.array([0]), "end": np.array([2]), "axis": np.array([0]), "reps": np.array([1, 1]), "rows": np.array([0, 1]),
    }  # fmt: skip
    body = f"m = Greater(x, zero) p = Where(m, zero, low) {moved} s = Add(x, b) y = Softmax(s)"
    x = np.array([[1, 2, -1, -2], [-1, -2, -3, -4]], np.float32)  # all of the second row is masked
    used = {name: array for name, array in constants.items() if name in body.replace("(", " ").replace(")", " ").replace(",", " ").split()}
    check(text(body), {"x": x}, half=True, **used)


@pytest.mark.parametrize("body", [
    "s = Mul(x, x) r = ReduceSum(s, axis) e = Add(r, eight) q = Sqrt(e) y = Div(x, q)",
    "r = ReduceL2(x, axis) q = Clip(r, twelve) y = Div(x, q)",
    "s = Mul(x, x) e = Add(s, eight) y = Log(e)",
])  # fmt: skip
def test_guards_that_float16_has_no_number_for(body: str) -> None:
    """A row of zeros is divided by its guard, not by zero."""
    constants = {"axis": np.array([1]), "eight": np.float32(1e-8), "twelve": np.float32(1e-12)}
    x = np.array([[1, 2, -1, 0.5], [0, 0, 0, 0]], np.float32)
    check(text(body), {"x": x}, half=True, **{name: array for name, array in constants.items() if name in body})
