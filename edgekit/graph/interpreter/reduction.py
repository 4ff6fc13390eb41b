"""Operators that reduce axes, and cumulative sums. Axes are an attribute up to opset 12 or 17, an input after."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.values import NotSupportedError, integers, scalar

Axes = Tensor | Sequence[int] | None


def _reduction(name: str, compute: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    """Enters a reduction of the given axes (all of them if none is given)."""

    def reduce(data: Tensor, axes: Axes = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        chosen = [] if axes is None else integers(axes)
        if not chosen:
            # What ReduceSumSquare and its like do to a single element still happens: they reduce over no axis.
            chosen = [] if noop_with_empty_axes else list(range(data.dim()))
        return compute(data, chosen, bool(keepdims)).to(data.dtype)

    operator(name)(reduce)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keepdim=keep) if axes else x


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if not axes:
        return x
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    return torch.mean(x.double(), axes, keepdim=keep)  # rounded towards zero by the caller


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep, dtype=None if x.is_floating_point() else x.dtype)
    return x


def _extreme(
    function: Callable[..., Tensor], fill_float: float, integer_limit: Callable[[torch.dtype], int]
) -> Callable[[Tensor, list[int], bool], Tensor]:
    def reduce(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if not axes:
            return x
        if any(x.shape[axis] == 0 for axis in axes):
            shape = [1 if index in {axis % x.dim() for axis in axes} else size for index, size in enumerate(x.shape)]
            fill = fill_float if x.is_floating_point() else fill_float > 0 if x.dtype is torch.bool else integer_limit(x.dtype)
            full = torch.full(shape, fill, dtype=x.dtype)
            return full if keep else full.squeeze(tuple(axes))
        return function(x, axes, keepdim=keep)

    return reduce


def _norm1(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _norm2(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    wide = x if x.is_floating_point() else x.double()
    return torch.linalg.vector_norm(wide, 2, axes, keepdim=keep) if axes else wide.abs()


def _log_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.log(_sum(x if x.is_floating_point() else x.double(), axes, keep))


def _log_sum_exp(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    wide = x if x.is_floating_point() else x.double()
    return torch.logsumexp(wide, axes, keepdim=keep) if axes else wide


_reduction("ReduceSum", _sum)
_reduction("ReduceMean", _mean)
_reduction("ReduceProd", _prod)
_reduction("ReduceMax", _extreme(torch.amax, -torch.inf, lambda dtype: torch.iinfo(dtype).min))
_reduction("ReduceMin", _extreme(torch.amin, torch.inf, lambda dtype: torch.iinfo(dtype).max))
_reduction("ReduceL1", _norm1)
_reduction("ReduceL2", _norm2)
_reduction("ReduceSumSquare", lambda x, axes, keep: _sum(x * x, axes, keep))
_reduction("ReduceLogSum", _log_sum)
_reduction("ReduceLogSumExp", _log_sum_exp)


def _arg_extreme(x: Tensor, axis: int, keepdims: int, last: int) -> Tensor:
    """Index of the largest element, the first or last of equals."""
    if last:
        flipped: Tensor = torch.argmax(x.flip(axis), axis, keepdim=bool(keepdims))
        return x.shape[axis] - 1 - flipped
    return torch.argmax(x, axis, keepdim=bool(keepdims))


def _descending(x: Tensor) -> Tensor:
    """Values in reversed order, exact for every type."""
    if x.is_floating_point():
        return -x
    return torch.bitwise_not(x)  # -1 - x, which cannot overflow; for unsigned types 2^bits - 1 - x


@operator("ArgMax")
def argmax(data: Tensor, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the largest element along an axis."""
    return _arg_extreme(data, axis, keepdims, select_last_index)


@operator("ArgMin")
def argmin(data: Tensor, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the smallest element along an axis."""
    return _arg_extreme(_descending(data), axis, keepdims, select_last_index)


def _cumulative(function: Callable[..., Tensor], neutral: float) -> Callable[..., Tensor]:
    def cumulate(x: Tensor, axis: Tensor, /, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        along = int(scalar(axis))
        if not -x.dim() <= along < x.dim():
            raise NotSupportedError(f"axis {along} of a tensor of rank {x.dim()}")
        x = x.flip(along) if reverse else x
        result = function(x, along).to(x.dtype)
        if exclusive:
            first = torch.full_like(x.narrow(along, 0, 1), neutral)
            result = torch.cat([first, result.narrow(along, 0, x.shape[along] - 1)], along)
        return result.flip(along) if reverse else result

    return cumulate


operator("CumSum")(_cumulative(torch.cumsum, 0))
operator("CumProd")(_cumulative(torch.cumprod, 1))
