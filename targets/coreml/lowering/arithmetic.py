"""Arithmetic, element by element."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import FLOATS, Lowering
from edgekit.targets.coreml.lowering.integers import bit_shift, bitwise, bitwise_not, divide, grows, is_unsigned, power, remainder, wrap

_INTEGERS = frozenset(getattr(ir.DataType, name) for name in ("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"))
_TINY = frozenset({ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.INT2, ir.DataType.UINT2})
_MOST_PRODUCTS = 4
"""Largest exponent of a float power that is written as products."""


def _unary(name: str) -> Callable[[Lowering, ir.Node], Any]:
    """Operators of MIL that compute what ONNX's do, on floats."""
    return lambda b, node: b.op(name, x=b.x(node))


def _growing(name: str) -> Callable[[Lowering, ir.Node], Any]:
    """Add, Sub, Mul: integers wrap."""

    def lower(b: Lowering, node: ir.Node) -> Any:
        grows(b, node)
        return wrap(b, b.op(name, x=b.x(node, 0), y=b.x(node, 1)), b.dtype(node))

    return lower


def _variadic(name: str) -> Callable[[Lowering, ir.Node], Any]:
    return lambda b, node: functools.reduce(lambda x, y: b.op(name, x=x, y=y), b.xs(node))


def _div(b: Lowering, node: ir.Node) -> Any:
    x, y = b.x(node, 0), b.x(node, 1)
    if b.is_float(node):
        return b.op("real_div", x=x, y=y)
    return wrap(b, divide(b, x, y, is_unsigned(b.dtype(node))), b.dtype(node))


def _mod(b: Lowering, node: ir.Node) -> Any:
    """Mod: MIL's has the sign of the divisor, as ONNX's has for fmod=0; for fmod=1 it is that of the dividend."""
    x, y = b.x(node, 0), b.x(node, 1)
    like_c = node.attributes.get_int("fmod", 0) == 1
    if not like_c or is_unsigned(b.dtype(node)):
        return b.op("mod", x=x, y=y)
    if not b.is_float(node):
        return remainder(b, x, y)
    rest = b.op("mod", x=b.op("abs", x=x), y=b.op("abs", x=y))
    return b.op("select", cond=b.op("less", x=x, y=0.0), a=_negative(b, rest, True), b=rest)


def _pow(b: Lowering, node: ir.Node) -> Any:
    exponent = _constant_exponent(b, node)
    if b.is_float(node):
        if exponent is not None and 1 <= exponent <= _MOST_PRODUCTS:
            return power(b, b.x(node), exponent)
        y = b.x(node, 1)
        return b.op("pow", x=b.x(node), y=y if b.is_float(node, 1) else b.op("cast", x=y, dtype=b.float_name))
    grows(b, node)
    if exponent is not None and exponent >= 1:
        return wrap(b, power(b, b.x(node), exponent), b.dtype(node))
    if b.known(node, 1) is not None or b.is_float(node, 1) or b.dtype(node) not in (ir.DataType.INT32, ir.DataType.INT64):
        raise b.refuse("Pow of integers with this exponent", "cast the base to float")
    return b.op("pow", x=b.x(node, 0), y=b.x(node, 1))


def _constant_exponent(b: Lowering, node: ir.Node) -> int | None:
    """The exponent where it is one known integer that does not widen the result."""
    array = b.known(node, 1)
    if array is None or array.size != 1 or array.ndim > b.rank(node):
        return None
    value = float(array.reshape(()))
    return int(value) if value.is_integer() and abs(value) < 64 else None


def _negative(b: Lowering, x: Any, is_float: bool) -> Any:
    return b.op("mul", x=x, y=-1.0 if is_float else -1)  # 0 - x would lose the sign of zero


def _neg(b: Lowering, node: ir.Node) -> Any:
    return wrap(b, _negative(b, b.x(node), b.is_float(node)), b.dtype(node))


def _abs(b: Lowering, node: ir.Node) -> Any:
    return b.x(node) if is_unsigned(b.dtype(node)) else wrap(b, b.op("abs", x=b.x(node)), b.dtype(node))


def _reciprocal(b: Lowering, node: ir.Node) -> Any:
    return b.op("real_div", x=1.0, y=b.x(node))  # MIL's inverse adds an epsilon, at least that of zero's sign


def _log(b: Lowering, node: ir.Node) -> Any:
    return b.op("log", x=b.x(node), epsilon=0.0)  # by default 1e-45 is added, and the log of 0 becomes finite


def _asinh(b: Lowering, node: ir.Node) -> Any:
    """Asinh: atanh(x / sqrt(x² + 1)) where |x| < 1, which is accurate there; beyond, sign(x) (log|x| + log(1 + sqrt(1 + 1/x²))).

    Neither overflows.
    """
    x = b.x(node)
    size = b.op("abs", x=x)
    small = b.op("less", x=size, y=1.0)
    within = b.op("select", cond=small, a=x, b=b.op("mul", x=x, y=0.0))
    near = b.op("atanh", x=b.op("real_div", x=within, y=b.op("sqrt", x=b.op("add", x=b.op("square", x=within), y=1.0))))
    far = b.op("mul", x=b.op("sign", x=x), y=_log_of_sum(b, b.op("select", cond=small, a=1.0, b=size), "add"))
    return b.op("select", cond=small, a=near, b=far)


def _acosh(b: Lowering, node: ir.Node) -> Any:
    """Acosh: 2 atanh(sqrt((x - 1) / (x + 1))) below 2, which is accurate there; beyond, log x + log(1 + sqrt(1 - 1/x²)).

    Neither overflows.
    """
    x = b.x(node)
    ratio = b.op("real_div", x=b.op("sub", x=x, y=1.0), y=b.op("add", x=x, y=1.0))
    near = b.op("mul", x=b.op("atanh", x=b.op("sqrt", x=ratio)), y=2.0)
    return b.op("select", cond=b.op("less", x=x, y=2.0), a=near, b=_log_of_sum(b, x, "sub"))


def _log_of_sum(b: Lowering, x: Any, sign: str) -> Any:
    """log x + log(1 + sqrt(1 ± 1/x²))."""
    inner = b.op(sign, x=1.0, y=b.op("square", x=b.op("real_div", x=1.0, y=x)))
    return b.op("add", x=b.op("log", x=x, epsilon=0.0), y=b.op("log", x=b.op("add", x=b.op("sqrt", x=inner), y=1.0), epsilon=0.0))


def _mean(b: Lowering, node: ir.Node) -> Any:
    total = _variadic("add")(b, node)
    return b.op("real_div", x=total, y=float(len(node.inputs))) if len(node.inputs) > 1 else total


def _cast(b: Lowering, node: ir.Node) -> Any:
    return _converted(b, node, ir.DataType(node.attributes["to"].as_int()))


def _cast_like(b: Lowering, node: ir.Node) -> Any:
    return _converted(b, node, b.dtype(node, 1))


def _converted(b: Lowering, node: ir.Node, to: ir.DataType) -> Any:
    """Cast: floats toward zero, integers to narrower ones by their lower bits, anything to bool by comparison with 0.

    What ONNX does with floats out of the range of the integer is undefined. No type of MIL rounds as bfloat16 and the floats of 8 bits do.
    """
    source = b.dtype(node)
    known = b.known(node, 0)
    if source in _TINY and known is not None and to in FLOATS | _INTEGERS:
        return known.astype(np.int32) if to in _INTEGERS and not is_unsigned(to) else known.astype(np.int32).astype(to.numpy())
    if source == to:
        return b.x(node)
    if (to == ir.DataType.BFLOAT16 and source != to) or to not in FLOATS | _INTEGERS | {ir.DataType.BOOL}:
        raise b.refuse(f"Cast to {to.name}", "cast to float, float16 or an integer of 8 bits or more")
    if source not in FLOATS | _INTEGERS | _TINY | {ir.DataType.BOOL}:
        raise b.refuse(f"Cast from {source.name}", "convert the constant beforehand")
    x = b.x(node)
    if to == ir.DataType.BOOL:
        return b.op("not_equal", x=x, y=0.0 if source in FLOATS else 0)
    if to in FLOATS:
        return x if source in FLOATS else b.op("cast", x=x, dtype=b.float_name)
    if source in FLOATS or source == ir.DataType.BOOL:
        return b.op("cast", x=x, dtype="int32")
    return wrap(b, x, to)


def _dropout(b: Lowering, node: ir.Node) -> Any:
    """Dropout as in inference: the data as they are, and a mask that keeps everything."""
    if b.has(node, 2) and bool(b.need_known(node, 2, "training_mode")):
        ratio = b.known(node, 1) if b.has(node, 1) else np.asarray(0.5)
        if ratio is None or float(ratio) != 0:
            raise b.refuse("Dropout in training mode", "export the model for inference")
    return b.x(node), np.ones(b.shape(node), dtype=np.bool_)


def _det(b: Lowering, node: ir.Node) -> Any:
    """Det of matrices of up to 4 rows, by cofactors."""
    x, size = b.x(node), b.shape(node)[-1]
    if size > 4:
        raise b.refuse(f"Det of {size} x {size} matrices", "compute it outside the model")
    lead = len(x.shape) - 2

    @functools.cache
    def entry(row: int, column: int) -> Any:
        begin, end = [0] * lead + [row, column], [0] * lead + [row + 1, column + 1]
        masks = [True] * lead + [False, False]
        return b.op(
            "slice_by_index", x=x, begin=begin, end=end, begin_mask=masks, end_mask=masks, squeeze_mask=[False] * lead + [True, True]
        )

    def minor(row: int, columns: tuple[int, ...]) -> Any:
        terms = [entry(row, columns[0])] if len(columns) == 1 else [
            b.op("mul", x=entry(row, column), y=minor(row + 1, columns[:at] + columns[at + 1 :])) for at, column in enumerate(columns)
        ]  # fmt: skip
        total = terms[0]
        for at, term in enumerate(terms[1:], 1):
            total = b.op("sub" if at % 2 else "add", x=total, y=term)
        return total

    return minor(0, tuple(range(size)))


_UNARY = {
    "Sqrt": "sqrt", "Exp": "exp", "Sin": "sin", "Cos": "cos", "Tan": "tan", "Asin": "asin", "Acos": "acos", "Atan": "atan", "Sinh": "sinh",
    "Cosh": "cosh", "Atanh": "atanh", "Erf": "erf", "Ceil": "ceil", "Floor": "floor", "Round": "round", "Sign": "sign",
}  # fmt: skip

TABLE: dict[str, Callable[[Lowering, ir.Node], Any]] = {
    **{name: _unary(mil) for name, mil in _UNARY.items()},
    "Add": _growing("add"),
    "Sub": _growing("sub"),
    "Mul": _growing("mul"),
    "Div": _div,
    "Mod": _mod,
    "Pow": _pow,
    "Neg": _neg,
    "Abs": _abs,
    "Reciprocal": _reciprocal,
    "Log": _log,
    "Asinh": _asinh,
    "Acosh": _acosh,
    "Max": _variadic("maximum"),
    "Min": _variadic("minimum"),
    "Sum": _variadic("add"),
    "Mean": _mean,
    "Cast": _cast,
    "CastLike": _cast_like,
    "BitShift": bit_shift,
    "BitwiseAnd": lambda b, node: bitwise(b, node, "mul"),
    "BitwiseOr": lambda b, node: bitwise(b, node, "maximum"),
    "BitwiseXor": lambda b, node: bitwise(b, node, "xor"),
    "BitwiseNot": bitwise_not,
    "Dropout": _dropout,
    "Det": _det,
}
