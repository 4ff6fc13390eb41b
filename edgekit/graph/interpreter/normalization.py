"""Normalizations and softmax. Statistics of 16-bit floats are computed in float32, as `stash_type` asks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.graph.interpreter.registry import Call, operator
from edgekit.graph.interpreter.values import NATIVE, DataType, NotSupportedError


def _stash(x: Tensor, stash_type: int = 1) -> Tensor:
    """x in the type that statistics are computed in: never narrower than its own."""
    return x.to(torch.promote_types(x.dtype, NATIVE[DataType(stash_type)]))


@operator("LayerNormalization")
def layer_normalization(
    x: Tensor, scale: Tensor, bias: Tensor | None = None, /, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1, call: Call
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Normalizes the axes from `axis` on; also gives the mean and the inverse deviation if they are wanted."""
    axis %= x.dim()
    shape = x.shape[axis:]
    wide = _stash(x, stash_type)
    plain = not call.wants(1) and not call.wants(2)
    if plain and wide is x and scale.shape == shape and (bias is None or bias.shape == shape):
        return functional.layer_norm(x, shape, scale, bias, epsilon)
    axes = tuple(range(axis, x.dim()))
    variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    inverse = torch.rsqrt(variance + epsilon)
    result = ((wide - mean) * inverse).to(x.dtype) * scale
    return (result if bias is None else result + bias), mean, inverse


@operator("RMSNormalization")
def rms_normalization(x: Tensor, scale: Tensor, /, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    """Divides by the root mean square of the axes from `axis` on."""
    axes = tuple(range(axis % x.dim(), x.dim()))
    wide = _stash(x, stash_type)
    normalized = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)
    return normalized.to(x.dtype).to(scale.dtype) * scale


def _per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """`[C]` as it broadcasts to `[B, C, …]`."""
    return parameter.reshape(-1, *([1] * (x.dim() - 2))) if x.dim() > 1 else parameter


@operator("BatchNormalization", since=7)
def batch_normalization_before_training_mode(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    /,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: int = 1,
    call: Call,
) -> Tensor:
    """As up to opset 13: one output means inference."""
    if call.wants(1) or not spatial:
        raise NotSupportedError("training, and statistics per position, of opsets before 14")
    return _normalize(x, scale, bias, mean, variance, epsilon)


@operator("BatchNormalization", since=14)
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    /,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: int = 0,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Normalizes by the given statistics, or in training by those of the batch, which also update the given ones."""
    if not training_mode:
        return _normalize(x, scale, bias, mean, variance, epsilon)
    axes = [axis for axis in range(x.dim()) if axis != 1]
    batch_variance, batch_mean = torch.var_mean(_stash(x), axes, correction=0)
    result = _normalize(x, scale, bias, batch_mean, batch_variance, epsilon)
    return (
        result,
        (mean * momentum + batch_mean * (1 - momentum)).to(mean.dtype),
        (variance * momentum + batch_variance * (1 - momentum)).to(variance.dtype),
    )


def _normalize(x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float) -> Tensor:
    learned = mean.requires_grad or variance.requires_grad  # which torch's function does not differentiate
    if x.dtype == scale.dtype == mean.dtype and x.dim() > 1 and not learned:
        return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)
    wide = _stash(x)
    factor = scale.to(wide.dtype) * torch.rsqrt(variance.to(wide.dtype) + epsilon)
    centered = wide - _per_channel(mean.to(wide.dtype), x)
    return (centered * _per_channel(factor, x) + _per_channel(bias.to(wide.dtype), x)).to(x.dtype)


@operator("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, /, *, epsilon: float = 1e-5) -> Tensor:
    """Normalizes each channel of each sample."""
    return _group_norm(x, x.shape[1], epsilon, 1) * _per_channel(scale, x) + _per_channel(bias, x)


@operator("GroupNormalization", since=18)
def group_normalization_per_group(x: Tensor, scale: Tensor, bias: Tensor, /, *, num_groups: int, epsilon: float = 1e-5) -> Tensor:
    """As up to opset 20: scale and bias are per group."""
    repeats = x.shape[1] // num_groups
    return group_normalization(x, scale.repeat_interleave(repeats), bias.repeat_interleave(repeats), num_groups=num_groups, epsilon=epsilon)


@operator("GroupNormalization", since=21)
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, /, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    """Normalizes each group of channels of each sample; scale and bias are per channel."""
    return _group_norm(x, num_groups, epsilon, stash_type) * _per_channel(scale, x) + _per_channel(bias, x)


def _group_norm(x: Tensor, groups: int, epsilon: float, stash_type: int) -> Tensor:
    return functional.group_norm(_stash(x, stash_type), groups, eps=epsilon).to(x.dtype)


@operator("LpNormalization")
def lp_normalization(x: Tensor, /, *, axis: int = -1, p: int = 2) -> Tensor:
    """Divides by the L1 or L2 norm along an axis; zero where that is zero."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, 0.0, x / torch.where(norm == 0, 1.0, norm)).to(x.dtype)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, /, *, axes: Sequence[int] = (0, 2, 3)) -> Tensor:
    """Zero mean and unit variance over the axes."""
    variance, mean = torch.var_mean(x, tuple(axes), correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(variance) + 1e-9)  # the function body of the operator has this constant


@operator("LRN")
def local_response_normalization(x: Tensor, /, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """Divides by a power of the sum of squares over neighbouring channels (AlexNet)."""
    before = (size - 1) // 2
    squares = functional.pad(x.square(), [*([0, 0] * (x.dim() - 2)), before, size - 1 - before])
    total = squares.unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * total) ** beta


def _on_matrix(function: object, x: Tensor, axis: int) -> Tensor:
    """Up to opset 12 the axes from `axis` on are one."""
    axis = axis + x.dim() if axis < 0 else axis
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    result: Tensor = function(x.reshape(rows, -1), -1)  # type: ignore[operator]
    return result.reshape(x.shape)


@operator("Softmax")
def softmax_of_matrix(x: Tensor, /, *, axis: int = 1) -> Tensor:
    """As up to opset 12."""
    return _on_matrix(softmax_in_steps, x, axis)


@operator("Softmax", since=13)
def softmax(x: Tensor, /, *, axis: int = -1) -> Tensor:
    """Softmax along an axis."""
    return softmax_in_steps(x, axis)


def softmax_in_steps(x: Tensor, axis: int) -> Tensor:
    """Softmax; of float16 each step of the operator's function body is rounded to that type, as there.

    Raises:
        NotSupportedError: bfloat16, whose eight bits make the sum depend on its order, which is not specified.
    """
    if x.dtype is torch.bfloat16:
        raise NotSupportedError("softmax of bfloat16, whose sum depends on an order that is not specified; dtype='float64' runs it")
    if x.dtype is not torch.float16:
        return torch.softmax(x, axis)
    powers = torch.exp(x - x.amax(axis, keepdim=True))
    return powers / powers.sum(axis, keepdim=True)


@operator("LogSoftmax")
def log_softmax_of_matrix(x: Tensor, /, *, axis: int = 1) -> Tensor:
    """As up to opset 12."""
    return _on_matrix(torch.log_softmax, x, axis)


@operator("LogSoftmax", since=13)
def log_softmax(x: Tensor, /, *, axis: int = -1) -> Tensor:
    """Logarithm of softmax along an axis."""
    return torch.log_softmax(x, axis)


@operator("Hardmax")
def hardmax_of_matrix(x: Tensor, /, *, axis: int = 1) -> Tensor:
    """As up to opset 12."""
    return _on_matrix(_hardmax, x, axis)


@operator("Hardmax", since=13)
def hardmax(x: Tensor, /, *, axis: int = -1) -> Tensor:
    """One at the first largest element along an axis, else zero."""
    return _hardmax(x, axis)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter_(axis, torch.argmax(x, axis, keepdim=True), 1)
