"""Elementwise operators of the evaluator against coremltools' value inference and float64 formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.targets.coreml.reference.operators.elementwise import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred

FLOAT_BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "floor_div": np.floor_divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,
    "mul": np.multiply,
    "pow": lambda x, y: np.power(np.abs(x), y),
    "real_div": np.divide,
    "sub": np.subtract,
}
COMPARISONS = {
    "equal": np.equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "not_equal": np.not_equal,
}
LOGIC = {"logical_and": np.logical_and, "logical_or": np.logical_or, "logical_xor": np.logical_xor}
UNARY: dict[str, tuple[Callable[[Any], Any], float, float]] = {
    "abs": (np.abs, -5, 5),
    "acos": (np.arccos, -1, 1),
    "asin": (np.arcsin, -1, 1),
    "atan": (np.arctan, -5, 5),
    "atanh": (np.arctanh, -0.99, 0.99),
    "ceil": (np.ceil, -5, 5),
    "cos": (np.cos, -5, 5),
    "cosh": (np.cosh, -5, 5),
    "erf": (np.vectorize(math.erf, otypes=[float]), -3, 3),
    "exp": (np.exp, -10, 10),
    "exp2": (np.exp2, -10, 10),
    "floor": (np.floor, -5, 5),
    "round": (np.round, -5, 5),
    "sign": (np.sign, -1, 1),
    "sin": (np.sin, -5, 5),
    "sinh": (np.sinh, -5, 5),
    "sqrt": (np.sqrt, 0, 9),
    "square": (np.square, -5, 5),
    "tan": (np.tan, -1.4, 1.4),
    "tanh": (np.tanh, -4, 4),
}
"""By operator: its function in numpy, and the range of the values that it is tested on."""
SHAPES = [((2, 3, 4), (2, 3, 4)), ((3, 1, 4), (2, 1)), ((), (3,)), ((5,), ()), ((1, 1), (4, 1, 3)), ((), ())]


def _values(shape: tuple[int, ...], seed: int, low: float = -4, high: float = 4) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).uniform(low, high, shape), np.float32)


def _integers(shape: tuple[int, ...], seed: int, low: int = -9, high: int = 10) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).integers(low, high, shape), np.int32)


def _operands(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    x, y = _values(shapes[0], 1), _values(shapes[1], 2)
    return (np.abs(x), y) if name == "pow" else (x, y)


def test_every_operator_of_the_table_is_tested() -> None:
    others = {"cast", "clip", "inverse", "log", "logical_not", "rsqrt", "select", "threshold"}
    assert set(TABLE) == {*FLOAT_BINARY, *COMPARISONS, *LOGIC, *UNARY, *others}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", FLOAT_BINARY)
def test_arithmetic_of_floats(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = _operands(name, shapes)
    result = call(TABLE[name], x=x, y=y)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, FLOAT_BINARY[name](x.astype(np.float64), y.astype(np.float64)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result, inferred(name, x=x, y=y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shapes", SHAPES[:3])
@pytest.mark.parametrize("name", FLOAT_BINARY)
def test_arithmetic_of_integers_stays_in_integers(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = _integers(shapes[0], 3), _integers(shapes[1], 4)
    y = np.asarray(np.abs(y) % 4 if name == "pow" else np.where(y == 0, -3, y), np.int32)
    result = call(TABLE[name], x=x, y=y)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, inferred(name, x=x, y=y))


def test_integer_divisions_round_as_documented() -> None:
    x, y = np.array([7, -7, 7, -7], np.int32), np.array([2, 2, -2, -2], np.int32)
    assert call(TABLE["floor_div"], x=x, y=y).tolist() == [3, -4, -4, 3]
    assert call(TABLE["real_div"], x=x, y=y).tolist() == [3, -3, -3, 3]
    assert call(TABLE["mod"], x=x, y=y).tolist() == [1, 1, -1, -1]
    wide = np.array([2**31 - 1, 2**24 + 1], np.int32)
    assert call(TABLE["real_div"], x=wide, y=np.int32(1)).tolist() == wide.tolist()


def test_integer_division_by_zero_fails() -> None:
    for name in ("floor_div", "real_div", "mod"):
        with pytest.raises(RuntimeError):
            call(TABLE[name], x=np.array([1], np.int32), y=np.array([0], np.int32))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str, shapes: tuple[tuple[int, ...], tuple[int, ...]], kind: Any) -> None:
    x, y = (_integers(shape, seed, 0, 3).astype(kind) for seed, shape in enumerate(shapes, 5))
    result = call(TABLE[name], x=x, y=y)
    assert result.dtype == np.bool_
    np.testing.assert_array_equal(result, COMPARISONS[name](x, y))
    np.testing.assert_array_equal(result, inferred(name, x=x, y=y))


@pytest.mark.parametrize("name", LOGIC)
def test_logic(name: str) -> None:
    x, y = np.array([[False], [True]]), np.array([False, True])
    np.testing.assert_array_equal(call(TABLE[name], x=x, y=y), LOGIC[name](x, y))
    np.testing.assert_array_equal(call(TABLE[name], x=x, y=y), inferred(name, x=x, y=y))


def test_logical_not() -> None:
    assert call(TABLE["logical_not"], x=np.array([True, False])).tolist() == [False, True]


def test_maximum_and_minimum_show_nan() -> None:
    x, y = np.array([np.nan, 1.0], np.float32), np.array([1.0, np.nan], np.float32)
    assert np.isnan(call(TABLE["maximum"], x=x, y=y)).all()
    assert np.isnan(call(TABLE["minimum"], x=x, y=y)).all()


@pytest.mark.parametrize("shape", [(4, 5), (), (1, 3, 1)])
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_floats(name: str, shape: tuple[int, ...]) -> None:
    function, low, high = UNARY[name]
    x = _values(shape, 7, low, high)
    result = call(TABLE[name], x=x)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, function(x.astype(np.float64)), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(result, inferred(name, x=x), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["abs", "sign", "square", "exp2"])
def test_functions_of_integers(name: str) -> None:
    x = _integers((3, 4), 8)
    np.testing.assert_array_equal(call(TABLE[name], x=x).astype(np.int32), inferred(name, x=x))


def test_round_goes_to_even_from_halfway() -> None:
    assert call(TABLE["round"], x=np.array([0.5, 1.5, 2.5, -0.5, -1.5], np.float32)).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize(
    ("name", "default", "formula"),
    [
        ("inverse", 1e-4, lambda x, epsilon: 1 / (x + epsilon)),
        ("log", 1e-45, lambda x, epsilon: np.log(x + epsilon)),
        ("rsqrt", 1e-12, lambda x, epsilon: 1 / np.sqrt(x + epsilon)),
    ],
)
@pytest.mark.parametrize("target", ["iOS15", "iOS17"])
def test_functions_with_an_epsilon(name: str, default: float, formula: Callable[[Any, float], Any], target: str) -> None:
    x = _values((3, 4), 9, 0, 2)
    for given, epsilon in (({}, default), ({"epsilon": np.float32(0.5)}, 0.5), ({"epsilon": np.float32(0)}, 0.0)):
        result = call(TABLE[name], x=x, **given)
        np.testing.assert_allclose(result, formula(x.astype(np.float64), epsilon), rtol=1e-5)
        np.testing.assert_allclose(result, inferred(name, target, x=x, **given), rtol=1e-5)


def test_logarithm_of_zero_is_finite_by_default() -> None:
    assert call(TABLE["log"], x=np.float32(0)) == pytest.approx(math.log(2.0**-149))


def test_clip_and_threshold() -> None:
    x = _values((4, 5), 10)
    alpha, beta = np.float32(-1.5), np.float32(2)
    np.testing.assert_array_equal(call(TABLE["clip"], x=x, alpha=alpha, beta=beta), np.clip(x, -1.5, 2))
    np.testing.assert_array_equal(call(TABLE["clip"], x=x, alpha=alpha, beta=beta), inferred("clip", x=x, alpha=alpha, beta=beta))
    np.testing.assert_array_equal(call(TABLE["clip"], x=x, alpha=beta, beta=alpha), inferred("clip", x=x, alpha=beta, beta=alpha))
    np.testing.assert_array_equal(call(TABLE["threshold"], x=x, alpha=alpha), inferred("threshold", x=x, alpha=alpha))
    whole = _integers((6,), 11)
    np.testing.assert_array_equal(call(TABLE["threshold"], x=whole, alpha=np.int32(2)), np.maximum(whole, 2))


SOURCES = [np.array([0.0, 1.9, -1.9, 100.0, 0.25], np.float32), np.array([0, 3, -3, 100], np.int32), np.array([True, False])]


@pytest.mark.parametrize("dtype", ["int32", "fp16", "fp32", "bool", "int8", "int16", "uint8", "uint16"])
@pytest.mark.parametrize("x", SOURCES, ids=["float", "int", "bool"])
def test_cast(x: np.ndarray, dtype: str) -> None:
    x = np.abs(x) if dtype.startswith("u") and x.dtype != np.bool_ else x
    np.testing.assert_array_equal(call(TABLE["cast"], x=x, dtype=dtype), inferred("cast", "iOS17", x=x, dtype=dtype))


def test_cast_of_what_the_type_cannot_hold() -> None:
    x = np.array([3e9, -3e9, 300.0, -1.0, np.nan, np.inf], np.float32)
    assert call(TABLE["cast"], x=x, dtype="int32").tolist() == [2**31 - 1, -(2**31), 300, -1, 0, 2**31 - 1]
    assert call(TABLE["cast"], x=x, dtype="uint8").tolist() == [255, 0, 255, 0, 0, 255]
    assert call(TABLE["cast"], x=x, dtype="uint16").tolist() == [65535, 0, 300, 0, 0, 65535]
    assert np.isinf(call(TABLE["cast"], x=x[:1], dtype="fp16")).all()
    with pytest.raises(ValueError, match="no type 'fp8'"):
        call(TABLE["cast"], x=x, dtype="fp8")


@pytest.mark.parametrize(("cond", "a", "b"), [((2, 3), (2, 3), (2, 3)), ((3, 1), (1, 4), ()), ((), (2,), (2,)), ((2, 1, 3), (3,), (2, 3))])
def test_select(cond: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    chosen = np.asarray(_values(cond, 12) > 0)
    first, second = _values(a, 13), _values(b, 14)
    np.testing.assert_array_equal(call(TABLE["select"], cond=chosen, a=first, b=second), np.where(chosen, first, second))
    whole = _integers(a, 15)
    np.testing.assert_array_equal(call(TABLE["select"], cond=chosen, a=whole, b=-whole), np.where(chosen, whole, -whole))


def test_select_without_values_gives_indices() -> None:
    cond = np.array([[True, False, True], [False, False, True]])
    assert TABLE["select"](cond=torch.from_numpy(cond)).tolist() == np.argwhere(cond).tolist()


def test_parameters_of_every_version() -> None:
    check_signatures(TABLE)
