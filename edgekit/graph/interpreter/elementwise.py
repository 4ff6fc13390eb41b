"""Operators that work element by element, with the broadcasting of numpy."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.graph.interpreter import straight_through
from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.values import NotSupportedError, scalar

# Inputs only, and the meaning of torch's function of the same name.
operator("Abs")(torch.abs)
operator("Acos")(torch.acos)
operator("Acosh")(torch.acosh)
operator("Asin")(torch.asin)
operator("Asinh")(torch.asinh)
operator("Atan")(torch.atan)
operator("Atanh")(torch.atanh)
operator("Ceil")(torch.ceil)
operator("Cos")(torch.cos)
operator("Cosh")(torch.cosh)
operator("Erf")(torch.erf)
operator("Exp")(torch.exp)
operator("Floor")(torch.floor)
operator("Log")(torch.log)
operator("Neg")(torch.neg)
operator("Not")(torch.logical_not)
operator("Reciprocal")(torch.reciprocal)
operator("Relu")(torch.relu)
operator("Round")(straight_through.round_half_even)
operator("Sigmoid")(torch.sigmoid)
operator("Sign")(straight_through.sign)
operator("Sin")(torch.sin)
operator("Sinh")(torch.sinh)
operator("Sqrt")(torch.sqrt)
operator("Tan")(torch.tan)
operator("Tanh")(torch.tanh)
operator("IsNaN")(torch.isnan)
operator("BitwiseNot")(torch.bitwise_not)

operator("Add", since=7)(torch.add)
operator("Sub", since=7)(torch.sub)
operator("Mul", since=7)(torch.mul)
operator("And", since=7)(torch.logical_and)
operator("Or", since=7)(torch.logical_or)
operator("Xor", since=7)(torch.logical_xor)
operator("BitwiseAnd")(torch.bitwise_and)
operator("BitwiseOr")(torch.bitwise_or)
operator("BitwiseXor")(torch.bitwise_xor)
operator("Equal", since=7)(torch.eq)
operator("Greater", since=7)(torch.gt)
operator("GreaterOrEqual")(torch.ge)
operator("Less", since=7)(torch.lt)
operator("LessOrEqual")(torch.le)
operator("Where")(torch.where)


@operator("Div", since=7)
def div(a: Tensor, b: Tensor, /) -> Tensor:
    """Quotient; of integers truncated towards zero."""
    return torch.div(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def mod(a: Tensor, b: Tensor, /, *, fmod: int = 0) -> Tensor:
    """Remainder with the sign of the dividend (`fmod`), or of the divisor."""
    if fmod:
        return torch.fmod(a, b)
    remainder = torch.remainder(a, b)
    if not remainder.is_floating_point():
        return remainder
    return torch.where(remainder == 0, torch.copysign(torch.zeros_like(remainder), b), remainder)


@operator("Pow", since=7)
def power(x: Tensor, y: Tensor, /) -> Tensor:
    """x^y in the type of x."""
    if y.is_floating_point() and not x.is_floating_point():
        return torch.pow(x.double(), y.double()).to(x.dtype)
    return torch.pow(x, y).to(x.dtype)


@operator("BitShift")
def bit_shift(x: Tensor, y: Tensor, /, *, direction: str) -> Tensor:
    """Shift that fills with zeros, to the right with the sign; by a negative amount or the width and more, only the fill remains."""
    bits = x.element_size() * 8
    outside = (y < 0) | (y >= bits)
    amount = torch.where(outside, 0, y).to(x.dtype)
    if direction == "LEFT":
        return torch.where(outside, 0, torch.bitwise_left_shift(x, amount)).to(x.dtype)
    return torch.where(outside, torch.where(x < 0, -1, 0).to(x.dtype), torch.bitwise_right_shift(x, amount))


@operator("Max")
def maximum(*inputs: Tensor) -> Tensor:
    """Largest of any number of tensors."""
    return functools.reduce(torch.maximum, inputs)


@operator("Min")
def minimum(*inputs: Tensor) -> Tensor:
    """Smallest of any number of tensors."""
    return functools.reduce(torch.minimum, inputs)


@operator("Sum")
def add_all(*inputs: Tensor) -> Tensor:
    """Sum of any number of tensors."""
    return functools.reduce(torch.add, inputs)


@operator("Mean")
def mean(*inputs: Tensor) -> Tensor:
    """Mean of any number of tensors."""
    return functools.reduce(torch.add, inputs) / len(inputs)


@operator("Clip")
def clip(x: Tensor, min: Tensor | float | None = None, max: Tensor | float | None = None) -> Tensor:
    """Limits to [min, max]: attributes up to opset 10, inputs after."""
    if isinstance(min, Tensor) != isinstance(max, Tensor):  # torch takes two tensors or two numbers
        bounded = x if min is None else torch.clamp(x, min=min)
        return bounded if max is None else torch.clamp(bounded, max=max)
    return x if min is None and max is None else torch.clamp(x, min, max)  # type: ignore[arg-type]


@operator("IsInf")
def is_inf(x: Tensor, /, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where x is infinite, of the signs asked for."""
    return torch.isinf(x) & (((x < 0) & bool(detect_negative)) | ((x > 0) & bool(detect_positive)))


@operator("LeakyRelu")
def leaky_relu(x: Tensor, /, *, alpha: float = 0.01) -> Tensor:
    """x, times alpha where negative."""
    return functional.leaky_relu(x, alpha)


@operator("PRelu", since=7)
def prelu(x: Tensor, slope: Tensor, /) -> Tensor:
    """x, times the slope where negative; the slope broadcasts to x."""
    return torch.where(x < 0, x * slope, x)


@operator("ThresholdedRelu")
def thresholded_relu(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """x where above alpha, else 0."""
    return torch.where(x > alpha, x, 0.0)


@operator("Elu")
def elu(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """alpha (e^x - 1) where negative."""
    return functional.elu(x, alpha)


@operator("Selu")
def selu(x: Tensor, /, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """gamma times the ELU of x."""
    return gamma * functional.elu(x, alpha)


@operator("Celu")
def celu(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """max(0, x) + min(0, alpha (e^(x / alpha) - 1))."""
    return functional.celu(x, alpha)


@operator("Gelu")
def gelu(x: Tensor, /, *, approximate: str = "none") -> Tensor:
    """x times the normal distribution function of x, exact or by tanh."""
    return functional.gelu(x, approximate=approximate)


@operator("Swish")
def swish(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """x sigmoid(alpha x)."""
    return functional.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("SwiGLU")
def swiglu(gate: Tensor, value: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """Swish of the gate, times the value."""
    return swish(gate, alpha=alpha) * value


@operator("Mish")
def mish(x: Tensor, /) -> Tensor:
    """x tanh(softplus(x))."""
    return functional.mish(x)


@operator("Softplus")
def softplus(x: Tensor, /) -> Tensor:
    """log(1 + e^x); beyond 40 that is x in every type."""
    return functional.softplus(x, threshold=40.0)


@operator("Softsign")
def softsign(x: Tensor, /) -> Tensor:
    """x / (1 + |x|)."""
    return functional.softsign(x)


@operator("HardSwish")
def hard_swish(x: Tensor, /) -> Tensor:
    """x max(0, min(1, x / 6 + 0.5))."""
    return functional.hardswish(x)


@operator("HardSigmoid")
def hard_sigmoid(x: Tensor, /, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """max(0, min(1, alpha x + beta))."""
    return torch.clamp(alpha * x + beta, 0.0, 1.0)


@operator("Shrink")
def shrink(x: Tensor, /, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """x moved towards zero by the bias where |x| > lambd, else 0."""
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0)).to(x.dtype)


@operator("Dropout", since=7)
def dropout_before_training_mode(data: Tensor, /, *, ratio: float = 0.5) -> tuple[Tensor, Tensor]:
    """Up to opset 11 the operator drops nothing."""
    return data, torch.ones_like(data, dtype=torch.bool)


@operator("Dropout", since=12)
def dropout(
    data: Tensor, ratio: Tensor | None = None, training_mode: Tensor | None = None, /, *, seed: int | None = None
) -> tuple[Tensor, Tensor]:
    """The identity, unless it trains: then it is random, which is refused (a ratio of zero drops nothing)."""
    if scalar(training_mode, False) and scalar(ratio, 0.5) != 0:
        raise NotSupportedError("dropping at random in training mode")
    return data, torch.ones_like(data, dtype=torch.bool)
