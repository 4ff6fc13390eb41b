"""Arithmetic on ONNX's integers, all of which MIL carries in int32: wraparound of the narrow types, division toward zero, bits.

int64 is taken to hold values of 32 bits. Narrow types wrap as ONNX's do. Results of uint32 and uint64 can leave int32 even where the
operands fit, so operators whose results grow or wrap are refused for them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.broadcasting import broadcast, reshaped
from edgekit.targets.coreml.lowering.builder import Lowering

_NARROW = {ir.DataType.INT8: 8, ir.DataType.UINT8: 8, ir.DataType.INT16: 16, ir.DataType.UINT16: 16}
"""Bits of the integers that are narrower than the int32 that carries them."""
_WIDE_UNSIGNED = frozenset({ir.DataType.UINT32, ir.DataType.UINT64})
_UNSIGNED = _WIDE_UNSIGNED | {ir.DataType.UINT8, ir.DataType.UINT16}


def is_unsigned(dtype: ir.DataType) -> bool:
    """Whether the dtype holds integers without sign."""
    return dtype in _UNSIGNED


def grows(b: Lowering, node: ir.Node) -> None:
    """Refuses the node where its results can leave int32 because its dtype, uint32 or uint64, wraps at another width.

    Raises:
        UnsupportedOpError: The node computes in uint32 or uint64.
    """
    if b.dtype(node) in _WIDE_UNSIGNED:
        raise b.refuse(
            f"{node.op_type} in {b.dtype(node).name}, whose results can leave 32-bit signed integers", "cast to int32 or to a float first"
        )


def wrap(b: Lowering, x: Any, dtype: ir.DataType) -> Any:
    """The integers `x` brought into the range of `dtype` by dropping their upper bits, as ONNX's narrow integers do."""
    bits = _NARROW.get(dtype)
    if bits is None:
        return x
    if dtype in _UNSIGNED:
        return b.op("mod", x=x, y=2**bits)
    half = 2 ** (bits - 1)
    return b.op("sub", x=b.op("mod", x=b.op("add", x=x, y=half), y=2**bits), y=half)


def divide(b: Lowering, x: Any, y: Any, unsigned: bool = False) -> Any:
    """The quotient rounded toward zero: MIL's floor_div, one more where a negative quotient was rounded down."""
    floored = b.op("floor_div", x=x, y=y)
    if unsigned:
        return floored
    rest = b.op("sub", x=x, y=b.op("mul", x=floored, y=y))
    rounded_down = b.op("logical_and", x=b.op("not_equal", x=rest, y=0), y=_signs_differ(b, x, y))
    return b.op("add", x=floored, y=b.op("cast", x=rounded_down, dtype="int32"))


def remainder(b: Lowering, x: Any, y: Any) -> Any:
    """The remainder with the sign of the dividend, as C's: MIL's mod has that of the divisor."""
    floored = b.op("mod", x=x, y=y)
    moved = b.op("logical_and", x=b.op("not_equal", x=floored, y=0), y=_signs_differ(b, x, y))
    return b.op("sub", x=floored, y=b.op("mul", x=y, y=b.op("cast", x=moved, dtype="int32")))


def _signs_differ(b: Lowering, x: Any, y: Any) -> Any:
    return b.op("logical_xor", x=b.op("less", x=x, y=0), y=b.op("less", x=y, y=0))


def power(b: Lowering, x: Any, exponent: int) -> Any:
    """`x` to a positive integer power, by squaring: exact in integers, and for negative numbers."""
    result = None
    while exponent:
        if exponent & 1:
            result = x if result is None else b.op("mul", x=result, y=x)
        exponent >>= 1
        x = b.op("square", x=x) if exponent else x
    return result


def bit_shift(b: Lowering, node: ir.Node) -> Any:
    """BitShift, as multiplication or division by a power of two, which is arithmetic for negative numbers.

    A distance that is negative or beyond the width shifts out all bits.
    """
    left = node.attributes.get_string("direction", "") == "LEFT"
    if left:
        grows(b, node)
    dtype = b.dtype(node)
    bits = _NARROW.get(dtype, 32)
    distance = b.known(node, 1)
    if distance is not None:
        inside = np.where((distance < 0) | (distance > bits), bits, distance).astype(np.int64)
        steps = tuple(b.var(step[inside]) for step in _steps(bits))
    else:
        places = b.op("minimum", x=b.x(node, 1), y=bits)
        places = b.op("select", cond=b.op("less", x=places, y=0), a=bits, b=places)
        steps = tuple(b.op("gather", x=b.var(step), indices=places, axis=0) for step in _steps(bits))
    x = b.x(node)
    for step in steps:
        x = b.op("mul" if left else "floor_div", x=x, y=step)
    return wrap(b, x, dtype)


def _steps(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Two factors of 2^i for each i up to `bits`: 2^31 itself is no int32."""
    places = np.arange(bits + 1)
    return (2 ** (places // 2)).astype(np.int32), (2 ** (places - places // 2)).astype(np.int32)


def bitwise_not(b: Lowering, node: ir.Node) -> Any:
    """BitwiseNot: -1 - x in two's complement, the largest number minus x without sign."""
    grows(b, node)
    dtype = b.dtype(node)
    return b.op("sub", x=2 ** _NARROW[dtype] - 1 if is_unsigned(dtype) else -1, y=b.x(node))


def bitwise(b: Lowering, node: ir.Node, both: str) -> Any:
    """BitwiseAnd, BitwiseOr, BitwiseXor on the bits of the two's complement, which become a last axis.

    MIL has no operators on bits. Those of x are floor(x / 2^i) mod 2, of negative numbers too; the last bit of a signed number weighs -2^i.
    """
    dtype, shape = b.dtype(node), b.out_shape(node)
    width = _NARROW.get(dtype, 32)
    size = math.prod(shape)
    weights = 2 ** np.arange(width, dtype=np.int64)
    if dtype not in _UNSIGNED or width == 32:
        weights[-1] *= -1
    steps = tuple(step[:width] for step in _steps(width))
    x, y = (_bits(b, reshaped(b, broadcast(b, b.x(node, index), shape), (size, 1)), steps) for index in (0, 1))
    bits = b.op("mod", x=b.op("add", x=x, y=y), y=2) if both == "xor" else b.op(both, x=x, y=y)
    return reshaped(b, b.op("reduce_sum", x=b.op("mul", x=bits, y=b.var(weights)), axes=[1], keep_dims=False), shape)


def _bits(b: Lowering, x: Any, steps: tuple[np.ndarray, ...]) -> Any:
    first, second = steps
    return b.op("mod", x=b.op("floor_div", x=b.op("floor_div", x=x, y=b.var(first)), y=b.var(second)), y=2)
