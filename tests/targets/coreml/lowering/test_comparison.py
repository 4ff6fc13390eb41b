"""Comparisons, logic and choice as ONNX's reference computes them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowering.expressions import check_all, lower_all, values

COMPARISONS = [f"{name}(x, y)" for name in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")]
SPECIAL = np.asarray([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], dtype=np.float32)


def _booleans(*shape: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).integers(0, 2, shape), dtype=np.bool_)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32, np.int64, np.uint8, np.int8])
def test_comparisons_with_broadcast(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 3, shape).astype(dtype) for shape in ((2, 3, 4), (3, 1)))
    check_all(COMPARISONS, {"x": x, "y": y})


def test_comparisons_of_special_values() -> None:
    x, y = (np.asarray(side, dtype=np.float32) for side in zip(*itertools.product(SPECIAL, SPECIAL), strict=True))
    check_all([*COMPARISONS, "IsNaN(x)", "IsInf(x)"], {"x": x, "y": y})


@pytest.mark.parametrize(("positive", "negative"), list(itertools.product((0, 1), repeat=2)))
@pytest.mark.parametrize("half", [False, True])
def test_is_inf_of_either_sign(positive: int, negative: int, half: bool) -> None:
    text = f"IsInf<detect_positive: int = {positive}, detect_negative: int = {negative}>(x)"
    check_all([text, "IsNaN(x)"], {"x": SPECIAL}, half=half)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3), (3,)), ((2, 1), (1, 3)), ((), (4,))])
def test_logic(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = _booleans(*shapes[0]), _booleans(*shapes[1], seed=1)
    check_all(["And(x, y)", "Or(x, y)", "Xor(x, y)", "Not(x)", "Equal(x, y)", "And(x, constant)"], {"x": x, "y": y}, constant=y)


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.bool_])
@pytest.mark.parametrize("shapes", [((2, 3), (2, 3), (2, 3)), ((2, 3, 4), (4,), ()), ((3, 1), (1, 4), (2, 3, 4)), ((5,), (), (1,))])
def test_where_with_every_broadcast(dtype: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
    rng = np.random.default_rng(2)
    x, y = (np.asarray(rng.integers(-3, 4, shape)).astype(dtype) for shape in shapes[1:])
    texts = ["Where(c, x, y)", "Where(c, known_x, y)", "Where(c, x, known_y)", "Where(c, known_x, known_y)"]
    check_all(texts, {"c": _booleans(*shapes[0]), "x": x, "y": y}, known_x=x, known_y=y)


def test_where_keeps_what_is_not_chosen_out() -> None:
    x = np.asarray([np.nan, np.inf, 1.0, -np.inf], dtype=np.float32)
    check_all(["Where(c, x, zero)"], {"c": np.asarray([False, False, True, True]), "x": x}, zero=np.float32(0))


def test_float16() -> None:
    check_all([*COMPARISONS, "Where(c, x, y)"], {"c": _booleans(3, 4), "x": values(3, 4), "y": values(4, seed=1)}, half=True)


def test_an_integer_of_more_than_32_bits_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="32 bits"):
        lower_all(["Less(x, y)"], {"x": np.ones(3, np.int64)}, y=np.int64(2**40))
