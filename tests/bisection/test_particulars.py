"""Relations between a right and a wrong tensor are put into words, and none is claimed that does not hold."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.bisection.particulars import difference, particular

W = np.random.default_rng(0).normal(size=(6, 6)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(1, 4, 5, 5)).astype(np.float32)


@pytest.mark.parametrize(
    ("expected", "found", "says"),
    [
        (W, -W, "opposite sign"),
        (W, 0.5 * W, "constant factor 0.5"),
        (W, W + 2, "wrong by the constant +2"),
        (W, W.T, "axes in the order [1, 0]"),
        (W[:, :3], W[:, :3].T, "axes in the order [1, 0]"),
        (W, W[:4], "its shape is [4, 6] instead of [6, 6]"),
        (W, np.roll(W, 2, 0), "shifted by 2 along axis 0, the end to the start"),
        (W, W[[1, 0, 2, 3, 4, 5]], "permuted along axis 0: 2 slices, such as 0, which is 1"),
        (X, np.pad(X, ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1], "shifted by 1 along axis 2"),
        (W, W * np.array([1, 2, 3, 4, 5, 6]), "factor of its own at each index of axis 1"),
        (W, W * (np.arange(6) < 3), "are zero where they were not"),
        (W, np.where(W > 1, np.nan, W), "are NaN where they were finite"),
        (W, W + (np.arange(6) == 2) * W**2, "wrong only at 1 of 6 indices of axis 1: 2"),
        (W, W + np.random.default_rng(2).normal(size=(6, 6)), ""),
    ],
)
def test_a_relation_is_named(expected: np.ndarray, found: np.ndarray, says: str) -> None:
    text = particular(expected, found)
    assert (says in text) if says else text == ""


def test_the_range_of_float16() -> None:
    large, small = np.array([1.0, 7e4]), np.array([1e-9, 2e-9])
    assert "up to 70000" in particular(large, large.astype(np.float16).astype(float), half=True)
    assert "vanished: 2 of 2" in particular(small, small * 0, half=True)
    assert "denormal" in particular(np.array([1e-6, 3e-6]), np.array([1.01e-6, 3e-6]), half=True)


def test_the_place_of_the_largest_error() -> None:
    wrong = X.copy()
    wrong[0, 2, 3, 1] += 9
    found = difference(X, wrong)
    assert (found.index, found.channel) == ((0, 2, 3, 1), 2)
    assert found.found - found.expected == pytest.approx(9)
    assert difference(W, -W, weight=True).channel == difference(W, -W).index[0]
