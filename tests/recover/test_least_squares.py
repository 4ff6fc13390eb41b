"""Refits in closed form against what they must give."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekit.recover.closed_form import Rows, ridge, scale_and_shift, shift


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 8, generator=generator, dtype=torch.float64) @ torch.randn(8, 8, generator=generator, dtype=torch.float64)
    return x + 1, torch.randn(8, 5, generator=generator, dtype=torch.float64), torch.randn(5, generator=generator, dtype=torch.float64), x


def test_what_is_linear_is_found(problem) -> None:
    x, weight, bias, _ = problem
    found, moved = ridge(Rows(x, x @ weight + bias), torch.zeros_like(weight), torch.zeros_like(bias), shrink=1e-12)
    torch.testing.assert_close(found, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(moved, bias, atol=1e-5, rtol=0)


def test_without_a_bias_there_is_none(problem) -> None:
    x, weight, _, _ = problem
    found, moved = ridge(Rows(x, x @ weight), torch.zeros_like(weight), None, shrink=1e-12)
    torch.testing.assert_close(found, weight, atol=1e-5, rtol=0)
    assert moved is None


def test_infinite_shrinking_keeps_the_weights(problem) -> None:
    x, weight, bias, _ = problem
    found, moved = ridge(Rows(x, torch.randn(400, 5, dtype=torch.float64)), weight, bias, shrink=1e15)
    torch.testing.assert_close(found, weight, atol=1e-9, rtol=0)
    assert moved is not None


def test_it_is_the_least_of_its_loss(problem) -> None:
    """Against numpy's least squares of the stacked problem: rows for the data, and rows that pull to the old weights."""
    x, weight, bias, _ = problem
    y = torch.randn(400, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, _ = ridge(Rows(x, y), weight, bias)
    a, b = (x - x.mean(0)).numpy(), (y - y.mean(0)).numpy()
    penalty = np.sqrt(1e-2 * np.mean(np.diag(a.T @ a)))
    expected = np.linalg.lstsq(np.vstack([a, penalty * np.eye(8)]), np.vstack([b, penalty * weight.numpy()]), rcond=None)[0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-9)


def test_scales_and_shifts_of_channels(problem) -> None:
    x, weight, bias, _ = problem
    factors = torch.tensor([0.6, 1.0, 1.4, 1.9, 0.9], dtype=torch.float64)
    found, moved = scale_and_shift(Rows(x, x @ weight * factors + 3), weight, bias)
    torch.testing.assert_close(found, weight * factors)
    torch.testing.assert_close(moved, torch.full_like(bias, 3.0))
    kept, moved = shift(Rows(x, x @ weight + 3), weight, bias)
    assert kept is weight
    torch.testing.assert_close(moved, torch.full_like(bias, 3.0))
