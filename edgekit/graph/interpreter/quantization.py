"""Linear quantization.

Where the input of QuantizeLinear has a gradient, its result is carried as floats with integer values, so that the gradient passes
straight through the rounding to DequantizeLinear: to the input where it does not saturate, and to the scale as in LSQ (Esser et al. 2020,
equation 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from edgekit.graph.interpreter.conversion import convert
from edgekit.graph.interpreter.convolution import conv_integer
from edgekit.graph.interpreter.registry import Call, operator
from edgekit.graph.interpreter.straight_through import round_half_even
from edgekit.graph.interpreter.values import Carried, DataType, NotSupportedError, Value, onnx_type, unwrap

_RANGES = {
    DataType.INT32: (-(2**31), 2**31 - 1),
    DataType.UINT16: (0, 65535),
    DataType.INT16: (-32768, 32767),
    DataType.UINT8: (0, 255),
    DataType.INT8: (-128, 127),
    DataType.UINT4: (0, 15),
    DataType.INT4: (-8, 7),
    DataType.UINT2: (0, 3),
    DataType.INT2: (-2, 1),
}


def _spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero point as it broadcasts to x: one for all, one per slice of the axis, or one per block of it."""
    if parameter.numel() == 1 and parameter.dim() <= 1:
        return parameter.reshape(())
    if parameter.dim() == 1:
        view = [1] * x.dim()
        view[axis] = -1
        return parameter.reshape(view)
    if block_size:
        return parameter.repeat_interleave(block_size, axis).narrow(axis, 0, x.shape[axis])
    return parameter


@operator("QuantizeLinear", raw=True)
def quantize_linear(
    x: Value,
    scale: Value,
    zero_point: Value = None,
    /,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    precision: int = 0,
    saturate: int = 1,
    call: Call,
) -> Value:
    """saturate(round(x / scale) + zero point)."""
    target = onnx_type(zero_point) if zero_point is not None else DataType(output_dtype) if output_dtype else DataType.UINT8
    x, scale = unwrap(x), unwrap(scale)
    divided_in = call.precision.held(DataType(precision)) if precision else scale.dtype
    ratio = x.to(divided_in) / _spread(scale, x, axis, block_size).to(divided_in)
    zero = None if zero_point is None else _spread(unwrap(zero_point), x, axis, block_size)
    if target not in _RANGES:  # a float of 8 or 4 bits
        return convert(ratio if zero is None else ratio + zero, target, call.precision, bool(saturate))
    quantized = _saturate(round_half_even(ratio.to(torch.float64)), zero, target)
    if quantized.requires_grad:
        return Carried(quantized.to(torch.promote_types(divided_in, torch.float32)), target)
    return convert(quantized, target, call.precision)


def _saturate(rounded: Tensor, zero: Tensor | None, target: DataType) -> Tensor:
    low, high = _RANGES[target]
    return torch.clamp(rounded if zero is None else rounded + zero, low, high)


@operator("DequantizeLinear", raw=True)
def dequantize_linear(
    x: Value, scale: Value, zero_point: Value = None, /, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0, call: Call
) -> Value:
    """(x - zero point) scale."""
    quantized, scale = unwrap(x), unwrap(scale)
    computed_in = call.precision.held(DataType(output_dtype)) if output_dtype else scale.dtype
    if quantized.dtype is torch.int32 and onnx_type(x) is DataType.INT32 and zero_point is not None and bool(unwrap(zero_point).any()):
        raise NotSupportedError("a zero point of int32")
    # Exact before the product: differences of integers in float64 (or of 8-bit floats, which are exact there too).
    difference = quantized.to(torch.float64)
    if zero_point is not None:
        difference = difference - _spread(unwrap(zero_point), quantized, axis, block_size)
    return difference.to(computed_in) * _spread(scale, quantized, axis, block_size).to(computed_in)


@operator("DynamicQuantizeLinear")
def dynamic_quantize_linear(x: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes to uint8 by the range of the data, zero included; gives the scale and the zero point too."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = (high - low) / 255
    safe = torch.where(scale == 0, 1.0, scale)
    zero = torch.round(torch.clamp(-low / safe, 0, 255))
    quantized = torch.clamp(torch.round(x / safe) + zero, 0, 255)
    return quantized.to(torch.uint8), scale, zero.to(torch.uint8)


@operator("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None, /) -> Tensor:
    """Product of 8-bit matrices, exact, in int32."""
    return _centered(a, a_zero, -2).matmul(_centered(b, b_zero, -1)).to(torch.int64).to(torch.int32)


def _centered(x: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    """x minus its zero point, in float64, which holds sums of 8-bit products exactly."""
    if zero is None:
        return x.double()
    if zero.dim() == 1 and zero.numel() > 1 and axis == -2:  # per row
        zero = zero[:, None]
    return x.double() - zero.double()


@operator("QLinearMatMul", raw=True)
def qlinear_matmul(
    a: Value, a_scale: Value, a_zero: Value, b: Value, b_scale: Value, b_zero: Value, y_scale: Value, y_zero: Value, /, *, call: Call
) -> Value:
    """Product of quantized matrices, quantized."""
    a_scale, b_scale, y_scale = unwrap(a_scale), unwrap(b_scale), unwrap(y_scale)
    sums = _centered(unwrap(a), unwrap(a_zero), -2).matmul(_centered(unwrap(b), unwrap(b_zero), -1))
    per_row = a_scale[:, None] if a_scale.dim() == 1 and a_scale.numel() > 1 else a_scale
    return _requantize(sums, per_row.double() * b_scale.double() / y_scale.double(), y_zero, call)


def _requantize(sums: Tensor, factor: Tensor, zero: Value, call: Call) -> Value:
    target = onnx_type(zero)
    if target not in _RANGES:
        raise NotSupportedError(f"output of type {target.name}")
    return convert(_saturate(torch.round(sums * factor), unwrap(zero), target), target, call.precision)


@operator("QLinearConv", raw=True, like=conv_integer)
def qlinear_conv(
    x: Value,
    x_scale: Value,
    x_zero: Value,
    weight: Value,
    weight_scale: Value,
    weight_zero: Value,
    y_scale: Value,
    y_zero: Value,
    bias: Value = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    call: Call,
) -> Value:
    """Convolution of quantized tensors, quantized; the bias has the scale of the products."""
    attributes: dict[str, Any] = {"auto_pad": auto_pad, "dilations": dilations, "group": group, "pads": pads, "strides": strides}
    sums = conv_integer(unwrap(x), unwrap(weight), unwrap(x_zero), unwrap(weight_zero), **attributes).double()
    per_channel = [-1, *([1] * (sums.dim() - 2))]
    if bias is not None:
        sums = sums + unwrap(bias).double().reshape(per_channel)
    factor = unwrap(x_scale).double() * unwrap(weight_scale).double() / unwrap(y_scale).double()
    return _requantize(sums, factor if factor.numel() == 1 else factor.reshape(per_channel), y_zero, call)
