"""Operators that read or write at positions given by data, and selections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.values import Carried, DataType, NotSupportedError, is_vmapped, scalar


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Indices counted from the front, checked: torch's own check is missing in some kernels."""
    indices = indices.to(torch.int64)
    if is_vmapped(indices):  # no element can be looked at
        return torch.where(indices < 0, indices + size, indices)
    if indices.numel():
        low, high = torch.aminmax(indices)
        if low < -size or high >= size:
            raise IndexError(f"indices between {int(low)} and {int(high)} of an axis of size {size}")
        if low < 0:
            return torch.where(indices < 0, indices + size, indices)
    return indices


@operator("Gather")
def gather(data: Tensor, indices: Tensor, /, *, axis: int = 0) -> Tensor:
    """Slices at indices of one axis."""
    axis %= data.dim()
    positions = _wrapped(indices, data.shape[axis])
    return data.index_select(axis, positions.flatten()).reshape((*data.shape[:axis], *positions.shape, *data.shape[axis + 1 :]))


@operator("GatherElements")
def gather_elements(data: Tensor, indices: Tensor, /, *, axis: int = 0) -> Tensor:
    """Elements whose index along one axis is given for each."""
    return torch.gather(data, axis, _wrapped(indices, data.shape[axis]))


@operator("GatherND")
def gather_nd(data: Tensor, indices: Tensor, /, *, batch_dims: int = 0) -> Tensor:
    """Slices at tuples of indices, `[..., k]`, per sample of the leading `batch_dims` axes."""
    coordinates = [_wrapped(indices[..., k], data.shape[batch_dims + k]) for k in range(indices.shape[-1])]
    batch = []
    for axis in range(batch_dims):
        view = [1] * (indices.dim() - 1)
        view[axis] = data.shape[axis]
        batch.append(torch.arange(data.shape[axis]).reshape(view))
    return data[(*batch, *coordinates)]


@operator("Scatter", "ScatterElements")
def scatter_elements(data: Tensor, indices: Tensor, updates: Tensor, /, *, axis: int = 0, reduction: str = "none") -> Tensor:
    """A copy of `data` with elements replaced, or combined, along one axis."""
    positions = _wrapped(indices, data.shape[axis])
    if reduction == "none":
        return torch.scatter(data, axis, positions, updates)
    return torch.scatter_reduce(data, axis, positions, updates, _reduction(reduction), include_self=True)


@operator("ScatterND")
def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, /, *, reduction: str = "none") -> Tensor:
    """A copy of `data` with slices at tuples of indices replaced or combined."""
    depth = indices.shape[-1]
    rows = torch.zeros(indices.shape[:-1], dtype=torch.int64)
    for k in range(depth):
        rows = rows * data.shape[k] + _wrapped(indices[..., k], data.shape[k])
    count = 1
    for size in data.shape[:depth]:
        count *= size
    flat = data.reshape(count, -1)
    positions = rows.reshape(-1, 1).expand(-1, flat.shape[1])
    new = updates.reshape(positions.shape)
    if reduction == "none":
        flat = torch.scatter(flat, 0, positions, new)
    else:
        flat = torch.scatter_reduce(flat, 0, positions, new, _reduction(reduction), include_self=True)
    return flat.reshape(data.shape)


def _reduction(name: str) -> str:
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    if name not in names:
        raise NotSupportedError(f"reduction '{name}'")
    return names[name]


@operator("TensorScatter")
def tensor_scatter(
    cache: Tensor, update: Tensor, write_indices: Tensor | None = None, /, *, axis: int = -2, mode: str = "linear"
) -> Tensor:
    """A copy of the cache with each sample's update written from its index on; `circular` wraps around."""
    axis %= cache.dim()
    length = update.shape[axis]
    start = torch.zeros(cache.shape[0], dtype=torch.int64) if write_indices is None else write_indices
    positions = start[:, None] + torch.arange(length)  # [batch, length]
    positions = positions % cache.shape[axis] if mode == "circular" else _wrapped(positions, cache.shape[axis])
    view = [1] * cache.dim()
    view[0], view[axis] = positions.shape
    return torch.scatter(cache, axis, positions.reshape(view).expand(update.shape), update)


@operator("Compress")
def compress(data: Tensor, condition: Tensor, /, *, axis: int | None = None) -> Tensor:
    """Slices where the condition holds; it may be shorter than the axis."""
    if axis is None:
        data, axis = data.flatten(), 0
    return data.index_select(axis, condition.nonzero().flatten())


@operator("NonZero")
def nonzero(x: Tensor, /) -> Tensor:
    """Indices of the elements that are not zero, `[rank, count]`."""
    return x.nonzero().t().reshape(x.dim(), -1) if x.dim() else x.reshape(1).nonzero().t()[:0]


@operator("OneHot", since=9)
def one_hot_without_negative(indices: Tensor, depth: Tensor, values: Tensor, /, *, axis: int = -1) -> Tensor:
    """As up to opset 10: a negative index is out of range."""
    return _one_hot(indices.to(torch.int64), int(scalar(depth)), values, axis)


@operator("OneHot", since=11)
def one_hot(indices: Tensor, depth: Tensor, values: Tensor, /, *, axis: int = -1) -> Tensor:
    """`values[1]` at the index along a new axis, `values[0]` elsewhere."""
    size = int(scalar(depth))
    positions = indices.to(torch.int64)
    return _one_hot(torch.where(positions < 0, positions + size, positions), size, values, axis)


def _one_hot(positions: Tensor, size: int, values: Tensor, axis: int) -> Tensor:
    axis %= positions.dim() + 1
    view = [1] * (positions.dim() + 1)
    view[axis] = size
    return torch.where(positions.unsqueeze(axis) == torch.arange(size).reshape(view), values[1], values[0])


@operator("TopK")
def top_k_by_attribute(x: Tensor, /, *, k: int, axis: int = -1) -> tuple[Tensor, Any]:
    """As up to opset 9: always the largest, sorted."""
    return _top_k(x, k, axis, True)


@operator("TopK", since=10)
def top_k(x: Tensor, k: Tensor, /, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Any]:
    """The largest or smallest elements and their indices, of equals the first; sorted even where that is not asked for."""
    return _top_k(x, int(scalar(k)), axis, bool(largest))


def _top_k(x: Tensor, k: int, axis: int, largest: bool) -> tuple[Tensor, Any]:
    if not 0 <= k <= x.shape[axis]:
        raise ValueError(f"{k} elements of an axis of size {x.shape[axis]}")
    values, indices = torch.sort(x, dim=axis, descending=largest, stable=True)
    values, indices = values.narrow(axis, 0, k), indices.narrow(axis, 0, k)
    if values.requires_grad:
        return values, Carried(indices, DataType.INT64, values)
    return values, indices


@operator("Unique")
def unique(x: Tensor, /, *, axis: int | None = None, sorted: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The different elements or slices, the first place of each, the number of each element, and counts."""
    if axis is None:
        x, axis = x.flatten(), 0
    result, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    inverse = inverse.flatten()
    positions = torch.arange(inverse.numel())
    first = torch.full((counts.numel(),), inverse.numel()).scatter_reduce(0, inverse, positions, "amin")
    if not sorted:
        order = torch.argsort(first)
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel()))
        result, first, counts, inverse = result.index_select(axis, order), first[order], counts[order], rank[inverse]
    return result, first, inverse, counts
