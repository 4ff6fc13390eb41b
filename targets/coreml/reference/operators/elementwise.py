"""MIL's elementwise operators: arithmetic, comparisons, logic, functions of one value, casts and selection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgekit.targets.coreml.reference.types import HELD, ValueType, rounded

Binary = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Unary = Callable[[torch.Tensor], torch.Tensor]


def _divided(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`x / y`. The result has the inputs' type, so that of integers is the quotient without its fraction."""
    return torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc")


def _floor_divided(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.div(x, y, rounding_mode="floor")


_BINARY: dict[str, Binary] = {
    "add": torch.add,
    "equal": torch.eq,
    "floor_div": _floor_divided,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "less": torch.lt,
    "less_equal": torch.le,
    "logical_and": torch.logical_and,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "mod": torch.remainder,
    "mul": torch.mul,
    "not_equal": torch.ne,
    "pow": torch.pow,
    "real_div": _divided,
    "sub": torch.sub,
}
"""Operators of `x` and `y`, which are broadcast. A NaN is never hidden, by `maximum` and `minimum` neither; `mod` has the sign of `y`."""

_UNARY: dict[str, Unary] = {
    "abs": torch.abs,
    "acos": torch.acos,
    "asin": torch.asin,
    "atan": torch.atan,
    "atanh": torch.atanh,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "cosh": torch.cosh,
    "erf": torch.erf,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "floor": torch.floor,
    "logical_not": torch.logical_not,
    "round": torch.round,
    "sign": torch.sign,
    "sin": torch.sin,
    "sinh": torch.sinh,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "tan": torch.tan,
    "tanh": torch.tanh,
}
"""Operators of `x` alone. `round` goes to the even neighbour from halfway; `exp2` of integers loses its fraction to the declared type."""


def _binary(function: Binary) -> Binary:
    def apply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return function(x, y)

    return apply


def _unary(function: Unary) -> Unary:
    def apply(x: torch.Tensor) -> torch.Tensor:
        return function(x)

    return apply


def _cast(x: torch.Tensor, dtype: str) -> torch.Tensor:
    """The values as `dtype`, without their fractions. What the type cannot hold, which is undocumented, becomes its nearest; NaN zero."""
    if dtype not in HELD:
        raise ValueError(f"there is no type '{dtype}' to cast to")
    kind = ValueType("tensor", dtype)
    if x.is_floating_point() and "int" in dtype:
        low, high = _integer_range(dtype)
        x = x.double().nan_to_num(0.0, high, low).clamp(low, high).to(torch.int64)
    return rounded(x, kind)


def _integer_range(dtype: str) -> tuple[int, int]:
    bits = int(dtype.strip("uint"))
    if dtype.startswith("u"):
        return 0, (1 << bits) - 1
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _clip(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x, alpha, beta)


def _inverse(x: torch.Tensor, epsilon: torch.Tensor | float = 1e-4) -> torch.Tensor:
    return torch.reciprocal(x + epsilon)


def _log(x: torch.Tensor, epsilon: torch.Tensor | float = 1e-45) -> torch.Tensor:
    return torch.log(x + epsilon)


def _rsqrt(x: torch.Tensor, epsilon: torch.Tensor | float = 1e-12) -> torch.Tensor:
    return torch.rsqrt(x + epsilon)


def _threshold(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x, alpha)


def _select(cond: torch.Tensor, a: torch.Tensor | None = None, b: torch.Tensor | None = None) -> torch.Tensor:
    """Elements of `a` where `cond` is true and of `b` elsewhere; without them the indices at which `cond` is true."""
    if a is None or b is None:
        return torch.nonzero(cond).to(torch.int32)
    return torch.where(cond, a, b)


TABLE: dict[str, Callable[..., Any]] = {
    **{name: _binary(function) for name, function in _BINARY.items()},
    **{name: _unary(function) for name, function in _UNARY.items()},
    "cast": _cast,
    "clip": _clip,
    "inverse": _inverse,
    "log": _log,
    "rsqrt": _rsqrt,
    "select": _select,
    "threshold": _threshold,
}
