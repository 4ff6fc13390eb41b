"""Gathers and scatters of MIL.

iOS15 and iOS16 take indices from `-size` to `size - 1`. From iOS17 on negative ones are out of bounds, and what indices out of bounds give
is undefined unless `validate_indices` makes them an error. The evaluator makes them an error always: a result that Core ML leaves undefined
is none to compare with. A program has the parameter `validate_indices` from iOS17 on, by which the versions are told apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from edgekit.targets.coreml.reference.operators.arguments import dims, number

Flag = torch.Tensor | bool | None
Count = torch.Tensor | int


def _checked(indices: torch.Tensor, sizes: torch.Tensor | int, validate_indices: Flag) -> torch.Tensor:
    """Non-negative indices; `sizes` is the size of the dimension or, for indices into many, a vector along their last axis."""
    old = validate_indices is None
    wide = indices.to(torch.int64)
    wrong = (wide >= sizes) | ((wide < -sizes) if old else (wide < 0))
    if bool(wrong.any()):
        first = int(wide[wrong][0])
        hint = "" if old or first >= 0 else "; iOS17 takes no negative indices: select(index >= 0, index, index + size) first"
        raise IndexError(f"index {first} is out of bounds for a dimension of size {_size_of(wrong, sizes)}{hint}")
    return torch.where(wide < 0, wide + sizes, wide)


def _size_of(wrong: torch.Tensor, sizes: torch.Tensor | int) -> int:
    return sizes if isinstance(sizes, int) else int(sizes.expand_as(wrong)[wrong][0])


def gather(x: torch.Tensor, indices: torch.Tensor, axis: Count = 0, batch_dims: Count = 0, validate_indices: Flag = None) -> torch.Tensor:
    """Slices of `x` along `axis`; the first `batch_dims` dimensions of `x` and `indices` go together."""
    batch = int(number(batch_dims))
    along = dims([int(number(axis))], x.dim())[0]
    found = _checked(indices, x.shape[along], validate_indices)
    if batch == 0:
        shape = (*x.shape[:along], *found.shape, *x.shape[along + 1 :])
        return x.index_select(along, found.reshape(-1)).reshape(shape)
    count = math.prod(x.shape[:batch])
    rows = x.reshape(count, *x.shape[batch:]).movedim(along - batch + 1, 1)
    places = found.reshape(count, -1)
    taken = rows[torch.arange(count)[:, None], places].movedim(1, along - batch + 1)
    return taken.reshape(*x.shape[:along], *found.shape[batch:], *x.shape[along + 1 :])


def gather_along_axis(x: torch.Tensor, indices: torch.Tensor, axis: Count = 0, validate_indices: Flag = None) -> torch.Tensor:
    """Elements of `x` at the places along `axis` that `indices` gives for each of them."""
    along = dims([int(number(axis))], x.dim())[0]
    return torch.gather(x, along, _checked(indices, x.shape[along], validate_indices))


def _flat_places(indices: torch.Tensor, shape: list[int], validate_indices: Flag) -> torch.Tensor:
    """Places in the flattened dimensions `shape` of index vectors, which lie along the last axis of `indices`."""
    sizes = torch.tensor(shape, dtype=torch.int64)
    strides = torch.tensor([math.prod(shape[at + 1 :]) for at in range(len(shape))], dtype=torch.int64)
    return (_checked(indices, sizes, validate_indices) * strides).sum(-1)


def gather_nd(x: torch.Tensor, indices: torch.Tensor, batch_dims: Count = 0, validate_indices: Flag = None) -> torch.Tensor:
    """Slices of `x` at index vectors; the first `batch_dims` dimensions of `x` and `indices` go together."""
    batch, depth = int(number(batch_dims)), indices.shape[-1]
    inner = list(x.shape[batch : batch + depth])
    places = _flat_places(indices, inner, validate_indices)
    count, rest = math.prod(x.shape[:batch]), x.shape[batch + depth :]
    rows = x.reshape(count, math.prod(inner), *rest)
    taken = rows[torch.arange(count)[:, None], places.reshape(count, -1)]
    return taken.reshape((*indices.shape[:-1], *rest))


def _divided(old: torch.Tensor, update: torch.Tensor) -> torch.Tensor:
    return old / update if old.is_floating_point() else torch.div(old, update, rounding_mode="trunc")


_MODES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "update": lambda _, update: update,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": _divided,
    "max": torch.maximum,
    "min": torch.minimum,
}


def _turns(places: torch.Tensor) -> torch.Tensor:
    """For each place, how many equal ones are before it."""
    order = torch.argsort(places, stable=True)
    ordered = places[order]
    position = torch.arange(len(places))
    starts = torch.searchsorted(ordered, ordered)
    turns = torch.empty_like(position)
    turns[order] = position - starts
    return turns


def _scattered(rows: torch.Tensor, places: torch.Tensor, updates: torch.Tensor, mode: str) -> torch.Tensor:
    """`rows` with `updates[i]` put into the row `places[i]`, one after the other: a place that comes twice is updated twice."""
    if mode not in _MODES:
        raise ValueError(f"mode '{mode}' is none of {', '.join(_MODES)}")
    result = rows.clone()
    turns = _turns(places)
    for turn in range(int(turns.max()) + 1 if len(turns) else 0):
        now = turns == turn
        result[places[now]] = _MODES[mode](result[places[now]], updates[now])
    return result


def scatter(
    data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, axis: Count = 0, mode: str = "add", validate_indices: Flag = None
) -> torch.Tensor:
    """`data` with its slices along `axis` at `indices` updated."""
    along = dims([int(number(axis))], data.dim())[0]
    places = _checked(indices, data.shape[along], validate_indices)
    result = _scattered(data.movedim(along, 0), places, updates.movedim(along, 0), mode)
    return result.movedim(0, along)


def scatter_along_axis(
    data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, axis: Count = 0, mode: str = "add", validate_indices: Flag = None
) -> torch.Tensor:
    """`data` with the elements updated whose places along `axis` `indices` gives for each update."""
    along = dims([int(number(axis))], data.dim())[0]
    places = _checked(indices, data.shape[along], validate_indices)
    own = torch.arange(data.numel()).reshape(data.shape).select(along, 0).unsqueeze(along)
    stride = math.prod(data.shape[along + 1 :])
    flat = (own + places * stride).reshape(-1)
    return _scattered(data.reshape(-1), flat, updates.reshape(-1), mode).reshape(data.shape)


def scatter_nd(
    data: torch.Tensor, indices: torch.Tensor, updates: torch.Tensor, mode: str = "add", validate_indices: Flag = None
) -> torch.Tensor:
    """`data` with its slices at index vectors updated."""
    depth = indices.shape[-1]
    inner, rest = list(data.shape[:depth]), data.shape[depth:]
    places = _flat_places(indices, inner, validate_indices).reshape(-1)
    rows = data.reshape(math.prod(inner), *rest)
    return _scattered(rows, places, updates.reshape(len(places), *rest), mode).reshape(data.shape)


TABLE: dict[str, Callable[..., Any]] = {
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
}
