"""Operators as they were before opset 7, when broadcasting was asked for by attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgekit.graph.interpreter.elementwise import div, power
from edgekit.graph.interpreter.matrix import gemm
from edgekit.graph.interpreter.normalization import batch_normalization
from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.values import NotSupportedError


def _with_axis(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The second input's axes lie at `axis` of the first, by default at its end."""

    def compute(
        a: Tensor, b: Tensor, /, *, axis: int | None = None, broadcast: int = 0, consumed_inputs: Sequence[int] | None = None
    ) -> Tensor:
        if broadcast and axis is not None:
            first = axis + a.dim() if axis < 0 else axis
            b = b.reshape(*b.shape, *([1] * (a.dim() - first - b.dim())))
        return function(a, b)

    return compute


operator("Add")(_with_axis(torch.add))
operator("Sub")(_with_axis(torch.sub))
operator("Mul")(_with_axis(torch.mul))
operator("Div")(_with_axis(div))
operator("Pow")(_with_axis(power))
operator("And")(_with_axis(torch.logical_and))
operator("Or")(_with_axis(torch.logical_or))
operator("Xor")(_with_axis(torch.logical_xor))
operator("Equal")(_with_axis(torch.eq))
operator("Greater")(_with_axis(torch.gt))
operator("Less")(_with_axis(torch.lt))


@operator("Gemm")
def gemm_before_broadcasting(
    a: Tensor, b: Tensor, c: Tensor, /, *, alpha: float = 1.0, beta: float = 1.0, broadcast: int = 0, transA: int = 0, transB: int = 0
) -> Tensor:
    """As up to opset 6."""
    return gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)


@operator("PRelu")
def prelu_per_channel(x: Tensor, slope: Tensor, /, *, consumed_inputs: Sequence[int] | None = None) -> Tensor:
    """As up to opset 6: one slope, or one per channel."""
    if slope.numel() > 1:
        slope = slope.reshape(-1, *([1] * (x.dim() - 2)))
    return torch.where(x < 0, x * slope, x)


@operator("BatchNormalization")
def batch_normalization_with_is_test(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    /,
    *,
    consumed_inputs: Sequence[int] | None = None,
    epsilon: float = 1e-5,
    is_test: int = 0,
    momentum: float = 0.9,
    spatial: int = 1,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """As up to opset 6: inference is asked for."""
    if not is_test or not spatial:
        raise NotSupportedError("training, and statistics per position, of opsets before 14")
    return batch_normalization(x, scale, bias, mean, variance, epsilon=epsilon)
