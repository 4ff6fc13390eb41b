"""Quantization to integers and back, and products of quantized tensors.

ONNX defines these operators with float32 scales, so they are computed in float32 also where the rest of the program is in float16; integers
are in int32. Apple's own quantize and dequantize work on 8 bits and constant scales only, and round as ONNX's do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.convolution import window
from edgekit.targets.coreml.lowering.quantized_constants import aligned, dequantized_constant

_RANGES = {
    ir.DataType.INT8: (-128, 127), ir.DataType.UINT8: (0, 255), ir.DataType.INT16: (-32768, 32767), ir.DataType.UINT16: (0, 65535),
    ir.DataType.INT4: (-8, 7), ir.DataType.UINT4: (0, 15), ir.DataType.INT2: (-2, 1), ir.DataType.UINT2: (0, 3),
}  # fmt: skip
_EXACT = 2**24
"""Sums of integers below this are exact in float32, whatever the order of the terms."""
_DIGIT = 16
"""Weights are split into digits of this base where the sums would be larger."""


@contextmanager
def _in_float32(b: Lowering) -> Iterator[None]:
    half, b.half = b.half, False
    try:
        yield
    finally:
        b.half = half


def _granularity(b: Lowering, node: ir.Node) -> tuple[int, int]:
    """The axis and the size of the blocks along it, 0 where the scale is not blocked."""
    rank = b.rank(node)
    axis = int(node.attributes.get_int("axis", 1))
    return (axis % rank if rank and -rank <= axis < rank else 0), int(node.attributes.get_int("block_size", 0))


def _parameter(b: Lowering, node: ir.Node, index: int) -> Any:
    """A scale or zero point as an array or MIL variable that broadcasts with the first input.

    Raises:
        UnsupportedOpError: It is computed and blocked.
    """
    shape, (axis, block) = b.shape(node), _granularity(b, node)
    array = b.known(node, index)
    if array is not None:
        return aligned(array.astype(np.float32 if b.is_float(node, index) else np.int32), shape, axis, block)
    if math.prod(b.shape(node, index)) == 1:
        return b.op("reshape", x=b.x(node, index), shape=[1] * len(shape)) if shape and b.shape(node, index) else b.x(node, index)
    if block:
        raise b.refuse("a blocked scale that is computed", "make it a constant of the graph")
    return b.op("reshape", x=b.x(node, index), shape=[-1 if place == axis else 1 for place in range(len(shape))])


def _quantize(b: Lowering, node: ir.Node) -> Any:
    """QuantizeLinear: round(x / scale), half to even, plus the zero point, saturated.

    The division is in the precision that the node says, which is that of the scale by default.
    """
    dtype = node.outputs[0].dtype or ir.DataType.UINT8
    if dtype not in _RANGES:
        raise b.refuse(f"QuantizeLinear to {dtype.name}", "quantize to an integer type")
    if not b.is_float(node):
        raise b.refuse(f"QuantizeLinear of {b.dtype(node).name}", "cast to float first")
    precision = ir.DataType(node.attributes.get_int("precision", 0) or b.dtype(node, 1))
    if precision == ir.DataType.BFLOAT16 or b.dtype(node) == ir.DataType.BFLOAT16:
        raise b.refuse("QuantizeLinear in BFLOAT16", "use float32 scales")
    with _in_float32(b):
        b.half = precision == ir.DataType.FLOAT16
        ratio = b.op("real_div", x=b.x(node), y=b.var(_parameter(b, node, 1)))
        b.half = False
        return _saturated(b, b.var(ratio), _parameter(b, node, 2) if b.has(node, 2) else None, dtype)


def _saturated(b: Lowering, ratio: Any, zero: Any, dtype: ir.DataType) -> Any:
    """round(ratio) + zero, brought into the range of `dtype`: in float32, which is exact where it is not cut off."""
    low, high = _RANGES[dtype]
    y = b.op("round", x=ratio)
    if zero is not None and not (isinstance(zero, np.ndarray) and not zero.any()):
        y = b.op("add", x=y, y=_as_float32(b, zero))
    return b.op("cast", x=b.op("clip", x=y, alpha=float(low), beta=float(high)), dtype="int32")


def _as_float32(b: Lowering, integers: Any) -> Any:
    return b.var(integers.astype(np.float32)) if isinstance(integers, np.ndarray) else b.op("cast", x=integers, dtype="fp32")


def _minus(b: Lowering, x: Any, zero: Any) -> Any:
    """x - zero in int32."""
    if zero is None or (isinstance(zero, np.ndarray) and not zero.any()):
        return x
    return b.op("sub", x=x, y=b.var(zero) if isinstance(zero, np.ndarray) else zero)


def _dequantize(b: Lowering, node: ir.Node) -> Any:
    """DequantizeLinear: (x - zero point) scale."""
    data, scale, zero = b.known(node, 0), b.known(node, 1), b.known(node, 2)
    to = node.outputs[0].dtype
    if to == ir.DataType.BFLOAT16:
        raise b.refuse("DequantizeLinear to BFLOAT16", "use float32 or float16 scales")
    if data is not None and scale is not None and (zero is not None or not b.has(node, 2)):
        return dequantized_constant(b, data, scale, zero, *_granularity(b, node))
    if b.dtype(node) not in _RANGES and b.dtype(node) != ir.DataType.INT32:
        raise b.refuse(f"DequantizeLinear of computed {b.dtype(node).name}", "quantize to an integer type")
    with _in_float32(b):
        shifted = _minus(b, b.x(node), _parameter(b, node, 2) if b.has(node, 2) else None)
        y = b.op("mul", x=b.op("cast", x=shifted, dtype="fp32"), y=b.var(_parameter(b, node, 1)))
    return b.var(y)


def _dynamic_quantize(b: Lowering, node: ir.Node) -> Any:
    """DynamicQuantizeLinear to uint8: the range of the data, with 0 in it, in 255 steps; a range of nothing has steps of 1/255."""
    with _in_float32(b):
        x = b.x(node)
        flat = b.op("reshape", x=x, shape=[-1]) if b.shape(node) else b.op("expand_dims", x=x, axes=[0])
        low = b.op("minimum", x=b.op("reduce_min", x=flat, axes=[0], keep_dims=False), y=0.0)
        high = b.op("maximum", x=b.op("reduce_max", x=flat, axes=[0], keep_dims=False), y=0.0)
        extent = b.op("sub", x=high, y=low)
        scale = b.op("real_div", x=b.op("select", cond=b.op("equal", x=extent, y=0.0), a=1.0, b=extent), y=255.0)
        zero = _saturated(b, b.op("sub", x=0.0, y=b.op("real_div", x=low, y=scale)), None, ir.DataType.UINT8)
        return _saturated(b, b.op("real_div", x=x, y=scale), zero, ir.DataType.UINT8), scale, zero


def _shifted(b: Lowering, node: ir.Node, index: int, zero: int, shape: list[int] | None = None) -> Any:
    """An integer input minus its zero point, an array where both are known; `shape` is that of a zero point with several elements."""
    data, offset = b.known(node, index), b.known(node, zero)
    several = b.has(node, zero) and math.prod(b.shape(node, zero)) > 1
    if not several:
        shape = [1] * b.rank(node, index)
    if offset is not None:
        offset = offset.astype(np.int32).reshape(shape or offset.shape)
    elif b.has(node, zero):
        offset = b.x(node, zero)
        offset = offset if shape is None or not offset.shape else b.op("reshape", x=offset, shape=shape)
    if data is not None and (offset is None or isinstance(offset, np.ndarray)):
        return data.astype(np.int32) - (0 if offset is None else offset)
    return _minus(b, b.x(node, index), offset)


def _integer_matmul(b: Lowering, node: ir.Node, left: tuple[int, int], right: tuple[int, int]) -> Any:
    """The product in int32 of two inputs, each given with the place of its zero point: one, or one per row (left) or column (right)."""
    if min(b.rank(node, left[0]), b.rank(node, right[0])) < 2:
        raise b.refuse(f"{node.op_type} of vectors", "reshape them to matrices")
    rows = [-1, 1] if b.has(node, left[1]) and b.rank(node, left[1]) == 1 else None
    return b.op("matmul", x=b.var(_shifted(b, node, *left, rows)), y=b.var(_shifted(b, node, *right)))


def _matmul_integer(b: Lowering, node: ir.Node) -> Any:
    return _integer_matmul(b, node, (0, 2), (1, 3))


def _qlinear_matmul(b: Lowering, node: ir.Node) -> Any:
    with _in_float32(b):
        product = _integer_matmul(b, node, (0, 2), (3, 5))
        rows = [-1, 1] if b.rank(node, 1) == 1 and math.prod(b.shape(node, 1)) > 1 else None
        out_rows = [-1, 1] if b.rank(node, 6) == 1 and math.prod(b.shape(node, 6)) > 1 else None
        factor = _factor(b, _scale(b, node, 1, rows), _scale(b, node, 4), _scale(b, node, 6, out_rows))
        return _requantized(b, node, product, factor, _zero(b, node, 7, out_rows))


def _scale(b: Lowering, node: ir.Node, index: int, shape: list[int] | None = None) -> Any:
    if b.dtype(node, index) != ir.DataType.FLOAT:
        raise b.refuse(f"{node.op_type} with scales of {b.dtype(node, index).name}", "use float32 scales")
    array = b.known(node, index)
    if array is not None:
        array = array.astype(np.float32)
        return array.reshape(()) if array.size == 1 else array.reshape(shape or array.shape)
    x = b.x(node, index)
    return b.op("reshape", x=x, shape=shape) if shape and math.prod(x.shape) > 1 else x


def _zero(b: Lowering, node: ir.Node, index: int, shape: list[int] | None = None) -> Any:
    array = b.known(node, index)
    if array is not None:
        array = array.astype(np.int32)
        return array.reshape(()) if array.size == 1 else array.reshape(shape or array.shape)
    x = b.x(node, index)
    return b.op("reshape", x=x, shape=shape) if shape and math.prod(x.shape) > 1 else x


def _factor(b: Lowering, first: Any, second: Any, result: Any) -> Any:
    """first second / result, computed now where all are known."""
    if all(isinstance(scale, np.ndarray) for scale in (first, second, result)):
        return np.asarray(first * second / result, dtype=np.float32)
    return b.op("real_div", x=b.op("mul", x=b.var(first), y=b.var(second)), y=b.var(result))


def _requantized(b: Lowering, node: ir.Node, product: Any, factor: Any, zero: Any) -> Any:
    ratio = b.op("mul", x=b.op("cast", x=product, dtype="fp32"), y=b.var(factor))
    return _saturated(b, ratio, zero, node.outputs[0].dtype or ir.DataType.UINT8)


def _conv_integer(b: Lowering, node: ir.Node) -> Any:
    with _in_float32(b):
        return _integer_conv(b, node, (0, 2), (1, 3))


def _qlinear_conv(b: Lowering, node: ir.Node) -> Any:
    with _in_float32(b):
        y = _integer_conv(b, node, (0, 2), (3, 5))
        channels = [1, -1] + [1] * (b.rank(node) - 2)
        if b.has(node, 8):
            bias = b.known(node, 8)
            y = b.op("add", x=y, y=b.var(bias.reshape(channels)) if bias is not None else b.op("reshape", x=b.x(node, 8), shape=channels))
        factor = _factor(b, _scale(b, node, 1), _scale(b, node, 4, channels), _scale(b, node, 6))
        return _requantized(b, node, y, factor, _zero(b, node, 7))


def _integer_conv(b: Lowering, node: ir.Node, data: tuple[int, int], weight: tuple[int, int]) -> Any:
    """A convolution of integers, each input given with the place of its zero point.

    MIL convolves floats, so the sums must be exact in float32; where they could be too large, constant weights are split in two digits.
    Padding is 0 after the zero point is subtracted, as ONNX says.

    Raises:
        UnsupportedOpError: The sums can be larger than float32 holds exactly.
    """
    shape, kernel = b.shape(node, data[0]), b.shape(node, weight[0])
    if not 3 <= len(shape) <= 5:
        raise b.refuse(f"{node.op_type} over {len(shape) - 2} spatial axes", "use 1 to 3 of them")
    x = _as_float32(b, _shifted(b, node, *data))
    w = _shifted(b, node, *weight, [-1] + [1] * (len(kernel) - 1))
    largest = _largest(b, node, *data)
    if isinstance(w, np.ndarray):
        digits = [(1, w)]
        if largest * _sum(w) >= _EXACT:
            digits = [(_DIGIT, w // _DIGIT), (1, w % _DIGIT)]
        fits = all(largest * _sum(digit) < _EXACT for _, digit in digits)
    else:
        digits = [(1, w)]
        fits = largest * _largest(b, node, *weight) * math.prod(kernel[1:]) < _EXACT
    if not fits:
        raise b.refuse(f"{node.op_type} whose sums can exceed 2^24", "dequantize its inputs and use Conv")
    total = None
    for factor, digit in digits:
        y = _conv(b, node, x, _as_float32(b, digit), shape[2:], kernel[2:])
        y = b.op("cast", x=b.op("round", x=y), dtype="int32")  # fast convolution algorithms may leave a fraction
        y = y if factor == 1 else b.op("mul", x=y, y=factor)
        total = y if total is None else b.op("add", x=total, y=y)
    return total


def _sum(weight: np.ndarray) -> int:
    """The largest sum of magnitudes that one output channel adds."""
    return int(np.abs(weight.astype(np.int64)).reshape(weight.shape[0], -1).sum(axis=1).max())


def _largest(b: Lowering, node: ir.Node, index: int, zero: int) -> int:
    """The largest magnitude that an input minus its zero point can have."""
    low, high = _RANGES[b.dtype(node, index)]
    offset = b.known(node, zero) if b.has(node, zero) else np.zeros(1, dtype=np.int32)
    if offset is None:
        return high - low
    return max(high - int(offset.min()), int(offset.max()) - low)


def _conv(b: Lowering, node: ir.Node, x: Any, weight: Any, sizes: tuple[int, ...], kernel: tuple[int, ...]) -> Any:
    moved = window(b, node, kernel, sizes)
    return b.op(
        "conv",
        x=x,
        weight=weight,
        strides=list(moved.strides),
        pad_type="custom",
        pad=moved.pad,
        dilations=list(moved.dilations),
        groups=int(node.attributes.get_int("group", 1)),
    )


TABLE: dict[str, Callable[[Lowering, ir.Node], Any]] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "MatMulInteger": _matmul_integer,
    "QLinearMatMul": _qlinear_matmul,
    "ConvInteger": _conv_integer,
    "QLinearConv": _qlinear_conv,
}
