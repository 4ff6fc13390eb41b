"""Activations of the evaluator against coremltools' value inference and float64 formulas of the documentation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekit.targets.coreml.reference.operators.activation import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred

_erf = np.vectorize(math.erf, otypes=[float])


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _softmax(x: Any, axis: int = -1) -> Any:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)


def _channels(vector: Any, x: Any) -> Any:
    return np.asarray(vector, np.float64).reshape([-1] + [1] * (x.ndim - 2))


Formula = Callable[..., Any]
CASES: list[tuple[str, dict[str, Any], Formula]] = [
    ("clamped_relu", {"alpha": 0.3, "beta": 2.0}, lambda x, alpha, beta: np.minimum(beta, np.where(x >= 0, x, alpha * x))),
    ("elu", {"alpha": 1.7}, lambda x, alpha: np.where(x > 0, x, alpha * np.expm1(x))),
    ("gelu", {}, lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    ("gelu", {"mode": "EXACT"}, lambda x, mode: 0.5 * x * (1 + _erf(x / math.sqrt(2)))),
    ("gelu", {"mode": "TANH_APPROXIMATION"}, lambda x, mode: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ("gelu", {"mode": "SIGMOID_APPROXIMATION"}, lambda x, mode: x * _sigmoid(1.702 * x)),
    ("leaky_relu", {"alpha": 0.2}, lambda x, alpha: np.where(x >= 0, x, alpha * x)),
    ("leaky_relu", {"alpha": -2.0}, lambda x, alpha: np.where(x >= 0, x, alpha * x)),
    ("linear_activation", {"alpha": 0.3, "beta": -1.5}, lambda x, alpha, beta: alpha * x + beta),
    ("relu", {}, lambda x: np.maximum(x, 0)),
    ("relu6", {}, lambda x: np.clip(x, 0, 6)),
    ("scaled_tanh", {"alpha": 1.7, "beta": 0.6}, lambda x, alpha, beta: alpha * np.tanh(beta * x)),
    ("sigmoid", {}, _sigmoid),
    ("sigmoid_hard", {"alpha": 0.2, "beta": 0.4}, lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1)),
    ("silu", {}, lambda x: x * _sigmoid(x)),
    ("softmax", {}, _softmax),
    ("softplus", {}, lambda x: np.logaddexp(0, x)),
    ("softsign", {}, lambda x: x / (1 + np.abs(x))),
    ("thresholded_relu", {"alpha": 1.1}, lambda x, alpha: np.where(x >= alpha, x, 0)),
    ("thresholded_relu", {"alpha": -1.1}, lambda x, alpha: np.where(x >= alpha, x, 0)),
]


def _typed(parameters: dict[str, Any]) -> dict[str, Any]:
    return {name: value if isinstance(value, (str, int)) else np.asarray(value, np.float32) for name, value in parameters.items()}


def test_every_operator_of_the_table_is_tested() -> None:
    assert set(TABLE) == {name for name, _, _ in CASES} | {"prelu", "softplus_parametric"}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (7,), (1, 1, 6)])
@pytest.mark.parametrize(("name", "parameters", "formula"), CASES, ids=lambda value: str(value) if isinstance(value, (str, dict)) else "")
def test_formula(name: str, parameters: dict[str, Any], formula: Formula, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(len(shape)).normal(0, 4, shape).astype(np.float32)
    result = call(TABLE[name], x=x, **_typed(parameters))
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, formula(x.astype(np.float64), **parameters), rtol=1e-5, atol=1e-6)
    other = inferred(
        name, "iOS17", x=x.copy(), **{key: value if isinstance(value, str) else np.float32(value) for key, value in parameters.items()}
    )
    assert (other is None) == (name == "silu")  # coremltools infers every activation but this
    if other is not None:
        np.testing.assert_allclose(result, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "parameters", "formula"), CASES, ids=lambda value: str(value) if isinstance(value, (str, dict)) else "")
def test_large_values_and_scalars(name: str, parameters: dict[str, Any], formula: Formula) -> None:
    for value in (-90.0, -30.0, -1e-4, 0.0, 1e-4, 30.0, 90.0):
        shape = (1,) if name == "softmax" else ()
        result = call(TABLE[name], x=np.full(shape, value, np.float32), **_typed(parameters))
        np.testing.assert_allclose(result, formula(np.full(shape, np.float32(value), np.float64), **parameters), rtol=1e-5, atol=1e-12)


def test_clamped_relu_with_a_negative_bound() -> None:
    # coremltools infers min(max(x, 0), beta) + min(min(x, 0) * alpha, beta), which adds a negative beta twice; its documentation does not.
    result = call(TABLE["clamped_relu"], x=np.array([-1.0, 0.0, 3.0], np.float32), alpha=np.float32(0.5), beta=np.float32(-0.7))
    np.testing.assert_allclose(result, [-0.7, -0.7, -0.7])


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_softmax_along_an_axis(axis: int) -> None:
    x = np.random.default_rng(0).normal(0, 20, (3, 4, 5)).astype(np.float32)
    result = call(TABLE["softmax"], x=x, axis=axis)
    np.testing.assert_allclose(result, _softmax(x.astype(np.float64), axis), rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(result, inferred("softmax", x=x, axis=axis), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5), (1, 3, 2, 2, 2)])
def test_prelu(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(1).normal(0, 2, shape).astype(np.float32)
    for alpha in (np.full(3, 0.2, np.float32), np.array([0.1, -0.5, 2], np.float32)):
        result = call(TABLE["prelu"], x=x, alpha=alpha)
        np.testing.assert_allclose(result, np.where(x > 0, x, _channels(alpha, x) * x), rtol=1e-6)
        if len(shape) == 4 or alpha[0] == alpha[1]:  # others coremltools does not build
            np.testing.assert_allclose(result, inferred("prelu", x=x, alpha=alpha), rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 3, 2)])
def test_softplus_parametric(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(2).normal(0, 4, shape).astype(np.float32)
    alpha, beta = np.array([0.5, -2, 1], np.float32), np.array([1, 0.3, -1.5], np.float32)
    result = call(TABLE["softplus_parametric"], x=x, alpha=alpha, beta=beta)
    np.testing.assert_allclose(result, _channels(alpha, x) * np.logaddexp(0, _channels(beta, x) * x), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(result, inferred("softplus_parametric", x=x, alpha=alpha, beta=beta), rtol=1e-4, atol=1e-6)


def test_gelu_of_an_unknown_mode() -> None:
    with pytest.raises(ValueError, match="no mode 'FAST'"):
        call(TABLE["gelu"], x=np.zeros(1, np.float32), mode="FAST")


def test_parameters_of_every_version() -> None:
    check_signatures(TABLE)
