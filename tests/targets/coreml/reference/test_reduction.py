"""Reductions of the evaluator against coremltools' value inference and float64 formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from edgekit.targets.coreml.reference.operators.reduction import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred

FORMULAS: dict[str, Callable[..., Any]] = {
    "reduce_l1_norm": lambda x, **over: np.sum(np.abs(x), **over),
    "reduce_l2_norm": lambda x, **over: np.sqrt(np.sum(x * x, **over)),
    "reduce_log_sum": lambda x, **over: np.log(np.sum(x, **over)),
    "reduce_log_sum_exp": lambda x, **over: np.log(np.sum(np.exp(x), **over)),
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **over: np.sum(x * x, **over),
}
INDICES = {"reduce_argmax": np.argmax, "reduce_argmin": np.argmin}
AXES: list[tuple[tuple[int, ...], list[int] | None]] = [
    ((2, 3, 4), None), ((2, 3, 4), [1]), ((2, 3, 4), [-1]), ((2, 3, 4), [0, 2]), ((2, 3, 4), [-1, -3]), ((2, 3, 4), [2, 0, 1]),
    ((5,), [0]), ((5,), None), ((1, 3, 1), [0, -1]), ((2, 1, 2, 2, 2), [1, 3]),
]  # fmt: skip


def _over(axes: list[int] | None, keep: bool | None) -> dict[str, Any]:
    given: dict[str, Any] = {} if axes is None else {"axes": np.array(axes, np.int32)}
    return given if keep is None else {**given, "keep_dims": keep}


def test_every_operator_of_the_table_is_tested() -> None:
    assert set(TABLE) == {*FORMULAS, *INDICES}


@pytest.mark.parametrize("keep", [None, False, True])
@pytest.mark.parametrize(("shape", "axes"), AXES)
@pytest.mark.parametrize("name", FORMULAS)
def test_of_floats(name: str, shape: tuple[int, ...], axes: list[int] | None, keep: bool | None) -> None:
    x = np.random.default_rng(len(shape)).normal(0.5, 1.5, shape).astype(np.float32)
    x = np.abs(x) if name == "reduce_log_sum" else x
    result = call(TABLE[name], x=x, **_over(axes, keep))
    expected = FORMULAS[name](x.astype(np.float64), axis=None if axes is None else tuple(axes), keepdims=bool(keep))
    assert result.dtype == np.float32
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("shape", "axes"), AXES[1:5])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("name", FORMULAS)
def test_against_coremltools(name: str, kind: Any, shape: tuple[int, ...], axes: list[int], keep: bool) -> None:
    # Not without axes: np.squeeze of the maximum fails in coremltools' logarithm of a sum of exponentials.
    x = np.random.default_rng(3).integers(1, 6, shape).astype(kind)
    result = call(TABLE[name], x=x, **_over(axes, keep))
    np.testing.assert_allclose(result.astype(kind), inferred(name, x=x, **_over(axes, keep)), rtol=1e-5)


def test_integers_are_summed_exactly() -> None:
    x = np.array([2**24 + 1, 2**24 + 3, -5], np.int32)
    assert call(TABLE["reduce_sum"], x=x) == 2**25 - 1
    assert int(call(TABLE["reduce_mean"], x=np.array([7, -8], np.int32))) == 0
    assert int(call(TABLE["reduce_mean"], x=np.array([2**30 + 1, 2**30 + 1], np.int32))) == 2**30 + 1


def test_log_sum_exp_does_not_overflow() -> None:
    x = np.array([1000.0, 1000.0, -1000.0], np.float32)
    np.testing.assert_allclose(call(TABLE["reduce_log_sum_exp"], x=x), 1000 + np.log(2))


def test_no_axes_given_reduce_nothing() -> None:
    x = np.array([[1.0, -2.0]], np.float32)
    none = np.zeros(0, np.int32)
    np.testing.assert_array_equal(call(TABLE["reduce_sum"], x=x, axes=none), x)
    np.testing.assert_array_equal(call(TABLE["reduce_l2_norm"], x=x, axes=none, keep_dims=True), np.abs(x))


@pytest.mark.parametrize("name", FORMULAS)
def test_of_a_scalar(name: str) -> None:
    np.testing.assert_allclose(call(TABLE[name], x=np.float32(3)), FORMULAS[name](np.float64(3)), rtol=1e-6)


@pytest.mark.parametrize("keep", [None, False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, 2, -1, -2])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("name", INDICES)
def test_indices(name: str, kind: Any, axis: int | None, keep: bool | None) -> None:
    x = np.random.default_rng(4).permutation(60).reshape(3, 4, 5).astype(kind)
    given: dict[str, Any] = {} if axis is None else {"axis": axis}
    given |= {} if keep is None else {"keep_dims": keep}
    result = call(TABLE[name], x=x, **given)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, INDICES[name](x, axis=-1 if axis is None else axis, keepdims=bool(keep)))
    np.testing.assert_array_equal(result, inferred(name, "iOS17", x=x, output_dtype="uint16", **given))


@pytest.mark.parametrize("name", INDICES)
def test_index_of_the_first_of_equal_values(name: str) -> None:
    assert call(TABLE[name], x=np.array([2.0, 2.0, 2.0], np.float32), output_dtype="uint16") == 0


def test_parameters_of_every_version() -> None:
    check_signatures(TABLE)
