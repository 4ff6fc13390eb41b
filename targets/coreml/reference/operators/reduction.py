"""MIL's reductions.

The result of integers is an integer again: a mean, root or logarithm of them loses its fraction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgekit.targets.coreml.reference.operators.arguments import dims, number

Reduction = Callable[[torch.Tensor, list[int], bool], torch.Tensor]
"""Reduces a tensor over the axes; says whether to keep them with size 1."""


def _real(x: torch.Tensor) -> torch.Tensor:
    """The values as floating point; integers in float64, which holds each of them."""
    return x if x.is_floating_point() else x.double()


def _sum(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(x, axes, keepdim=keep)


def _l1_norm(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(torch.abs(x), axes, keepdim=keep)


def _l2_norm(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sqrt(_sum_square(_real(x), axes, keep))


def _log_sum(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.log(_sum(_real(x), axes, keep))


def _log_sum_exp(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.logsumexp(_real(x), axes, keepdim=keep)


def _max(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.amax(x, axes, keepdim=keep)


def _mean(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.mean(_real(x), axes, keepdim=keep)


def _min(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.amin(x, axes, keepdim=keep)


def _prod(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _sum_square(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    return torch.sum(torch.square(x), axes, keepdim=keep)


def _over_axes(function: Reduction) -> Callable[..., torch.Tensor]:
    """The operator of a reduction. Absent axes are all of them; PyTorch takes none for all too, which MIL does not."""

    def apply(x: torch.Tensor, axes: Any = None, keep_dims: torch.Tensor | bool = False) -> torch.Tensor:
        keep = bool(number(keep_dims))
        if axes is None:
            x = x if x.dim() else x.reshape(1)
            return function(x, list(range(x.dim())), keep)
        over = dims(axes, x.dim())
        return function(x, over, keep) if over else function(x.unsqueeze(-1), [x.dim()], False)

    return apply


def _argmax(
    x: torch.Tensor, axis: torch.Tensor | int = -1, keep_dims: torch.Tensor | bool = False, output_dtype: str = "int32"
) -> torch.Tensor:
    """The index of the largest value, the first of equal ones; the executor gives it the declared `output_dtype`."""
    return torch.argmax(x, int(number(axis)), keepdim=bool(number(keep_dims))).to(torch.int32)


def _argmin(
    x: torch.Tensor, axis: torch.Tensor | int = -1, keep_dims: torch.Tensor | bool = False, output_dtype: str = "int32"
) -> torch.Tensor:
    """The index of the smallest value, the first of equal ones; the executor gives it the declared `output_dtype`."""
    return torch.argmin(x, int(number(axis)), keepdim=bool(number(keep_dims))).to(torch.int32)


TABLE: dict[str, Callable[..., Any]] = {
    "reduce_argmax": _argmax,
    "reduce_argmin": _argmin,
    "reduce_l1_norm": _over_axes(_l1_norm),
    "reduce_l2_norm": _over_axes(_l2_norm),
    "reduce_log_sum": _over_axes(_log_sum),
    "reduce_log_sum_exp": _over_axes(_log_sum_exp),
    "reduce_max": _over_axes(_max),
    "reduce_mean": _over_axes(_mean),
    "reduce_min": _over_axes(_min),
    "reduce_prod": _over_axes(_prod),
    "reduce_sum": _over_axes(_sum),
    "reduce_sum_square": _over_axes(_sum_square),
}
