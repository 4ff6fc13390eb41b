"""Normalizations of MIL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.arguments import dims, number

Number = torch.Tensor | float


def _channels(values: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (x.dim() - 2))


def batch_norm(
    x: torch.Tensor,
    mean: torch.Tensor,
    variance: torch.Tensor,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    epsilon: Number = 1e-5,
) -> torch.Tensor:
    """`gamma * (x - mean) / sqrt(variance + epsilon) + beta`, over the second axis."""
    return functional.batch_norm(x, mean, variance, gamma, beta, training=False, eps=float(number(epsilon)))


def _standardized(x: torch.Tensor, axes: list[int], epsilon: Number) -> torch.Tensor:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) / torch.sqrt(variance + float(number(epsilon)))


def instance_norm(
    x: torch.Tensor, gamma: torch.Tensor | None = None, beta: torch.Tensor | None = None, epsilon: Number = 1e-5
) -> torch.Tensor:
    """Normalizes each channel of each instance over its spatial dimensions."""
    result = _standardized(x, list(range(2, x.dim())), epsilon)
    result = result if gamma is None else result * _channels(gamma, x)
    return result if beta is None else result + _channels(beta, x)


def l2_norm(x: torch.Tensor, epsilon: Number = 1e-6) -> torch.Tensor:
    """Divides by the L2 norm over the last three dimensions."""
    return x / torch.sqrt((x * x).sum((-3, -2, -1), keepdim=True) + float(number(epsilon)))


def layer_norm(
    x: torch.Tensor,
    axes: torch.Tensor | None = None,
    gamma: torch.Tensor | None = None,
    beta: torch.Tensor | None = None,
    epsilon: Number = 1e-5,
) -> torch.Tensor:
    """Normalizes over `axes`, by default all; `gamma` and `beta` have the sizes of those axes in their order in `x`."""
    rank = x.dim()
    over = sorted(range(rank) if axes is None else dims(axes, rank))
    if over == list(range(rank - len(over), rank)):
        return functional.layer_norm(x, x.shape[rank - len(over) :], gamma, beta, float(number(epsilon)))
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    result = _standardized(x, over, epsilon)
    result = result if gamma is None else result * gamma.reshape(shape)
    return result if beta is None else result + beta.reshape(shape)


def local_response_norm(x: torch.Tensor, size: Number, alpha: Number = 1e-4, beta: Number = 0.75, k: Number = 1.0) -> torch.Tensor:
    """`x / (k + alpha / size * sum of squares of `size` channels around) ** beta`; an even `size` has one channel more before than after.

    The documentation leaves open which channels are around; coremltools' tests of the operator hold it against PyTorch's, which this is.
    """
    return functional.local_response_norm(x, int(number(size)), float(number(alpha)), float(number(beta)), float(number(k)))


TABLE: dict[str, Callable[..., Any]] = {
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "local_response_norm": local_response_norm,
}
