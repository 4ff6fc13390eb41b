"""Normalizations of the evaluator against float64 formulas and coremltools' value inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.targets.coreml.reference.operators.normalization import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred, run

Array = np.ndarray[Any, Any]


def _random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(0.3, 1.5, shape).astype(np.float32)


def test_signatures() -> None:
    check_signatures(TABLE)


def _along(values: Array, rank: int) -> Array:
    return values.reshape(-1, *[1] * (rank - 2)).astype(np.float64)


@pytest.mark.parametrize("given", [{}, {"gamma"}, {"beta"}, {"gamma", "beta", "epsilon"}])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5, 3, 2), (2, 2, 2, 3, 1)])
def test_batch_norm(shape: tuple[int, ...], given: set[str]) -> None:
    x, mean, variance, gamma, beta = _random(*shape), *(_random(shape[1]) + at for at in range(4))
    variance = np.abs(variance)
    chosen = {name: value for name, value in {"gamma": gamma, "beta": beta, "epsilon": 0.1}.items() if name in given}
    result = call(TABLE["batch_norm"], x=x, mean=mean, variance=variance, **chosen)
    rank = len(shape)
    expected = (x - _along(mean, rank)) / np.sqrt(_along(variance, rank) + chosen.get("epsilon", 1e-5))
    expected = expected * _along(gamma if "gamma" in given else np.ones(1), rank) + _along(beta if "beta" in given else np.zeros(1), rank)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", [{}, {"gamma"}, {"beta"}, {"gamma", "beta", "epsilon"}])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 5, 3, 2), (1, 2, 1, 1)])
def test_instance_norm(shape: tuple[int, ...], given: set[str]) -> None:
    x, gamma, beta = _random(*shape), _random(shape[1]), _random(shape[1]) + 1
    chosen = {name: value for name, value in {"gamma": gamma, "beta": beta, "epsilon": 0.2}.items() if name in given}
    axes, rank = tuple(range(2, len(shape))), len(shape)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(axes, keepdims=True)) / np.sqrt(wide.var(axes, keepdims=True) + chosen.get("epsilon", 1e-5))
    expected = expected * _along(gamma if "gamma" in given else np.ones(1), rank) + _along(beta if "beta" in given else np.zeros(1), rank)
    np.testing.assert_allclose(call(TABLE["instance_norm"], x=x, **chosen), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (2, 1, 2, 3, 2)])
@pytest.mark.parametrize("epsilon", [None, 0.5])
def test_l2_norm(shape: tuple[int, ...], epsilon: float | None) -> None:
    x = _random(*shape)
    given = {} if epsilon is None else {"epsilon": epsilon}
    result = call(TABLE["l2_norm"], x=x, **given)
    wide = x.astype(np.float64)
    np.testing.assert_allclose(result, wide / np.sqrt((wide**2).sum((-3, -2, -1), keepdims=True) + (epsilon or 1e-6)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result, inferred("l2_norm", x=x, **given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((3, 4, 5), [-1]), ((3, 4, 5), [1, 2]), ((3, 4, 5), [2, 1]), ((3, 4, 5), [1]), ((3, 4, 5), [0, -1]), ((2, 3, 4, 2), [1, -2]),
        ((4,), [0]), ((2, 1, 3), [1]), ((2, 3), None),
    ],
)  # fmt: skip
def test_layer_norm(shape: tuple[int, ...], axes: list[int] | None, affine: bool) -> None:
    x = _random(*shape)
    over = sorted(axis % len(shape) for axis in (range(len(shape)) if axes is None else axes))
    inner = [shape[axis] for axis in over]
    gamma, beta = _random(*inner), _random(*inner) - 1
    given: dict[str, Any] = {} if axes is None else {"axes": np.array(axes, np.int32)}
    given |= {"gamma": gamma, "beta": beta, "epsilon": 0.03} if affine else {}
    result = call(TABLE["layer_norm"], x=x, **given)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(tuple(over), keepdims=True)) / np.sqrt(wide.var(tuple(over), keepdims=True) + given.get("epsilon", 1e-5))
    if affine:
        spread = [size if axis in over else 1 for axis, size in enumerate(shape)]
        expected = expected * gamma.reshape(spread) + beta.reshape(spread)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
    if axes is not None:  # coremltools' inference fails on its own default, a range
        np.testing.assert_allclose(result, inferred("layer_norm", x=x, **given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(2, 6, 3), (1, 4, 3, 2)])
def test_local_response_norm(shape: tuple[int, ...], size: int) -> None:
    # The values in coremltools' own test of rank 3 have each channel normalized by itself alone, against the documentation.
    x = _random(*shape)
    result = call(TABLE["local_response_norm"], x=x, size=size, alpha=0.3, beta=0.6, k=1.5)
    expected = np.zeros(shape)
    for channel in range(shape[1]):
        around = x[:, max(0, channel - size // 2) : channel + (size - 1) // 2 + 1].astype(np.float64)
        expected[:, channel] = x[:, channel] / (1.5 + 0.3 / size * (around**2).sum(1)) ** 0.6
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_in_a_program() -> None:
    from coremltools.converters.mil.mil import Builder as mb

    x, gamma = _random(1, 2, 4), _random(4)
    (result,) = run(lambda x: mb.layer_norm(x=x, axes=[-1], gamma=gamma, beta=gamma, epsilon=1e-3), {"x": x}, "iOS17", TABLE)
    wide = x.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-3) * gamma + gamma
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)
