"""Masks: clamped where they still mask exactly and no row is masked whole, refused by name elsewhere."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.contracts import Context
from edgekit.passes.float16.masks import CLAMP
from edgekit.passes.float16.stabilize import StabilizeFloat16

LOWEST = float(np.finfo(np.float32).min)
CAUSAL = ~np.tri(6, dtype=bool)
SCORES = np.random.default_rng(0).normal(0, 5, (2, 6, 6)).astype(np.float32)
ADD = "g (float[2,6,6] x) => (float[2,6,6] y) { a = Add(x, m)  y = Softmax(a) }"
WHERE = "g (float[2,6,6] x, bool[6,6] c) => (float[2,6,6] y) { a = Where(c, m, x)  y = Softmax(a) }"


def mask(hidden, number):
    return np.where(hidden, np.float32(number), np.float32(0))


def softmax(scores):
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


@pytest.mark.parametrize("number", [-1e6, -1e9, -np.inf, LOWEST])
def test_constant_mask_is_clamped_and_masks_exactly(stabilize, run, number):
    model, context, _, after = stabilize(ADD, {"x": SCORES}, {"m": mask(CAUSAL, number)})
    (initializer,) = [value for value in model.graph.initializers.values() if value.dtype.is_floating_point()]
    assert initializer.const_value.numpy().min() == CLAMP
    (found,) = run(model, {"x": SCORES})
    assert (found[:, CAUSAL] == 0).all()
    expected = softmax(np.where(CAUSAL, -np.inf, SCORES.astype(np.float64)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)
    assert after.overflows == ()
    assert context.refusals == []


@pytest.mark.parametrize("number", [-1e9, -np.inf, LOWEST])
def test_row_that_is_masked_whole_is_refused_by_name(stabilize, number):
    hidden = CAUSAL.copy()
    hidden[2] = True
    _, context, _, _ = stabilize(ADD, {"x": SCORES}, {"m": mask(hidden, number)}, rewrites=0)
    assert any(refusal.where == "Add_0" and "masks every score of 1 rows" in refusal.why for refusal in context.refusals)
    assert 'to-float16{keep=["Add_0"]}' in context.refusals[0].why


def test_two_masks_that_hide_a_row_together_are_refused(stabilize):
    text = "g (float[2,6,6] x) => (float[2,6,6] y) { b = Add(x, m)  a = Add(n, b)  y = Softmax(a) }"
    left = np.zeros((6, 6), bool)
    left[:, :3] = True
    _, context, _, _ = stabilize(text, {"x": SCORES}, {"m": mask(left, -1e9), "n": mask(~left, -1e9)}, rewrites=0)
    assert "masks every score of 6 rows" in context.refusals[0].why
    _model, context, _, _ = stabilize(text, {"x": SCORES}, {"m": mask(left & CAUSAL, -1e9), "n": mask(CAUSAL, -1e9)}, rewrites=2)
    assert context.refusals == []


def test_mask_along_the_row_that_broadcasts_is_refused(stabilize):
    column = np.zeros((6, 1), bool)
    column[1] = True
    _, context, _, _ = stabilize(ADD, {"x": SCORES}, {"m": mask(column, -1e9)}, rewrites=0)
    assert "masks every score of 1 rows" in context.refusals[0].why


def test_choice_of_a_number_right_before_the_softmax_may_mask_whole_rows(stabilize, run):
    hidden = CAUSAL.copy()
    hidden[2] = True
    feeds = {"x": SCORES, "c": hidden}
    model, _, _, after = stabilize(WHERE, feeds, {"m": np.float32(-1e9)})
    (found,) = run(model, feeds)
    np.testing.assert_array_equal(found[:, 2], np.float32(1 / 6))
    assert (found[:, [0, 1, 3, 4]][:, CAUSAL[[0, 1, 3, 4]]] == 0).all()
    assert after.overflows == ()


@pytest.mark.parametrize(("text", "number"), [
    (WHERE, -np.inf),  # a row that is masked whole is NaN now
    (WHERE.replace("y = Softmax(a)", "b = Add(a, t)  y = Softmax(b)"), -1e9),  # and t, but for its rounding, then
    ("g (float[2,6,6] x, bool[6,6] c) => (float[2,6,6] y) { w = Where(c, m, z)  a = Add(x, w)  y = Softmax(a) }", -1e9),
])  # fmt: skip
def test_choice_that_may_mask_whole_rows_otherwise_is_refused(build, text, number):
    arrays = {"m": np.float32(number), "t": SCORES[0], "z": np.float32(0)}
    model = build(text, {name: array for name, array in arrays.items() if f"{name})" in text or f" {name}," in text})
    context = Context(calibration=[{"x": SCORES, "c": CAUSAL}])
    assert StabilizeFloat16().apply(model, context) == 0
    assert any("known only when the model runs" in refusal.why and refusal.where.startswith("Where") for refusal in context.refusals)


def test_scores_too_large_for_a_clamped_mask_are_refused(stabilize):
    _, context, _, _ = stabilize(ADD, {"x": SCORES * 3000}, {"m": mask(CAUSAL, -1e9)}, rewrites=0)
    assert "too close to a mask" in context.refusals[0].why


def test_mask_stays_without_data(build):
    model, context = build(ADD, {"m": mask(CAUSAL, -1e9)}), Context()
    assert StabilizeFloat16().apply(model, context) == 0
    assert "not known without calibration data" in context.refusals[0].why


def test_mask_that_float16_holds_is_left_alone(stabilize):
    _, context, _, _ = stabilize(ADD, {"x": SCORES}, {"m": mask(CAUSAL, -1e4)}, rewrites=0)
    assert context.refusals == []


def test_mask_shared_with_another_reader_is_not_changed_there(stabilize, run):
    text = "g (float[2,6,6] x) => (float[2,6,6] y, float[6,6] z) { a = Add(x, m)  y = Softmax(a)  z = Neg(m) }"
    model, _, _, _ = stabilize(text, {"x": SCORES}, {"m": mask(CAUSAL, -1e6)})
    assert run(model, {"x": SCORES})[1].max() == 1e6


def test_mask_of_a_whole_attention(stabilize):
    text = "g (float[1,2,6,8] q, float[1,2,6,8] k, float[1,2,6,8] v) => (float[1,2,6,8] y) { y = Attention(q, k, v, m) }"
    rng = np.random.default_rng(1)
    feeds = {name: rng.normal(size=(1, 2, 6, 8)).astype(np.float32) for name in "qkv"}
    _model, _, _, after = stabilize(text, feeds, {"m": mask(CAUSAL, -1e9)})
    assert after.overflows == ()
    hidden = CAUSAL.copy()
    hidden[0] = True
    _, context, _, _ = stabilize(text, feeds, {"m": mask(hidden, -1e9)}, rewrites=0)
    assert "masks every score of 1 rows" in context.refusals[0].why
