"""Pooling over windows of one to three spatial axes, and over whole images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.graph.interpreter.convolution import flat_pads, resolve_pads
from edgekit.graph.interpreter.registry import Call, operator
from edgekit.graph.interpreter.values import NotSupportedError, integers

_MAX_POOLS: dict[int, Callable[..., Any]] = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass(frozen=True)
class _Windows:
    """Where the windows lie: `pads` is the padding of the attributes, `grown` what ceil_mode adds at the end."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    grown: list[int]


def _windows(
    x: Tensor,
    kernel_shape: Sequence[int],
    auto_pad: str,
    ceil_mode: int,
    dilations: Sequence[int] | None,
    pads: Sequence[int] | None,
    strides: Sequence[int] | None,
) -> _Windows:
    sizes = list(x.shape[2:])
    rank = len(sizes)
    if rank not in _MAX_POOLS:
        raise NotSupportedError(f"{rank} spatial axes")
    kernel, steps, gaps = list(kernel_shape), list(strides or [1] * rank), list(dilations or [1] * rank)
    before, after = resolve_pads(auto_pad, pads, sizes, kernel, steps, gaps)
    grown = []
    for size, k, s, d, first, last in zip(sizes, kernel, steps, gaps, before, after, strict=True):
        padded, reach = size + first + last, (k - 1) * d + 1
        count = (padded - reach) // s + 1
        if ceil_mode:
            count = -(-(padded - reach) // s) + 1
            if (count - 1) * s >= size + first:  # a window that would start in the padding at the end
                count -= 1
        grown.append(max((count - 1) * s + reach - padded, 0))
    return _Windows(kernel, steps, gaps, before, after, grown)


@operator("MaxPool")
def max_pool(
    x: Tensor,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    storage_order: int = 0,
    strides: Sequence[int] | None = None,
    call: Call,
) -> Tensor | tuple[Tensor, Tensor]:
    """Largest element of each window, and its index in the flattened input."""
    windows = _windows(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
    ends = [last + more for last, more in zip(windows.after, windows.grown, strict=True)]
    wide = x if x.is_floating_point() else x.double()
    padded = functional.pad(wide, flat_pads(windows.before, ends), value=-torch.inf)
    rank = x.dim() - 2
    pool = _MAX_POOLS[rank]
    if not call.wants(1):
        result: Tensor = pool(padded, windows.kernel, windows.strides, 0, windows.dilations)
        return result.to(x.dtype)
    result, flat = pool(padded, windows.kernel, windows.strides, 0, windows.dilations, False, True)
    position, index = flat, torch.zeros_like(flat)
    coordinates = []
    for axis in reversed(range(rank)):
        size = padded.shape[2 + axis]
        coordinates.append(position % size - windows.before[axis])
        position = position // size
    coordinates.reverse()
    for axis in range(rank) if storage_order == 0 else reversed(range(rank)):
        index = index * x.shape[2 + axis] + coordinates[axis]
    planes = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *([1] * rank))
    return result.to(x.dtype), index + planes * math.prod(x.shape[2:])


def _window_sums(x: Tensor, windows: _Windows) -> Tensor:
    """Sum of each window of `[B, C, …]`, zeros around."""
    ends = [last + more for last, more in zip(windows.after, windows.grown, strict=True)]
    padded = functional.pad(x, flat_pads(windows.before, ends))
    planes = padded.reshape(-1, 1, *padded.shape[2:])
    ones = torch.ones(1, 1, *windows.kernel, dtype=x.dtype)
    sums = _CONVOLUTIONS[len(windows.kernel)](planes, ones, None, windows.strides, 0, windows.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


@operator("AveragePool")
def average_pool(
    x: Tensor,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Mean of each window; padding counts if asked for, what ceil_mode adds never does."""
    windows = _windows(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
    if count_include_pad:
        x = functional.pad(x, flat_pads(windows.before, windows.after))
        none = [0] * len(windows.kernel)
        windows = _Windows(windows.kernel, windows.strides, windows.dilations, none, none, windows.grown)
    counts = _window_sums(torch.ones(1, 1, *x.shape[2:], dtype=x.dtype), windows)
    return _window_sums(x, windows) / counts


@operator("LpPool", since=2)
def lp_pool(
    x: Tensor,
    /,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] | None = None,
    p: int = 2,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Lp norm of each window."""
    windows = _windows(x, kernel_shape, auto_pad, ceil_mode, dilations, pads, strides)
    return _window_sums(x.abs() ** p, windows) ** (1 / p)


@operator("GlobalAveragePool")
def global_average_pool(x: Tensor, /) -> Tensor:
    """Mean of each channel, `[B, C, 1, …]`."""
    return x.mean(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(x: Tensor, /) -> Tensor:
    """Largest element of each channel, `[B, C, 1, …]`."""
    return x.amax(tuple(range(2, x.dim())), keepdim=True)


@operator("GlobalLpPool", since=2)
def global_lp_pool(x: Tensor, /, *, p: int = 2) -> Tensor:
    """Lp norm of each channel, `[B, C, 1, …]`."""
    norm: Tensor = torch.linalg.vector_norm(x, p, tuple(range(2, x.dim())), keepdim=True)
    return norm


@operator("MaxUnpool")
def max_unpool(
    x: Tensor,
    indices: Tensor,
    output_shape: Tensor | None = None,
    /,
    *,
    kernel_shape: Sequence[int],
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Puts each element back to its index in the flattened output, zeros elsewhere."""
    rank = x.dim() - 2
    steps = list(strides or [1] * rank)
    edges = list(pads or [0] * (2 * rank))
    inferred = list(x.shape[:2])
    inferred += [(x.shape[2 + axis] - 1) * steps[axis] - edges[axis] - edges[axis + rank] + kernel_shape[axis] for axis in range(rank)]
    wanted = inferred if output_shape is None else integers(output_shape)
    index = indices
    if wanted != inferred:
        # The indices speak of the inferred shape; their coordinates are kept in the wanted one.
        position, index, factor = indices, torch.zeros_like(indices), 1
        for have, want in zip(reversed(inferred), reversed(wanted), strict=True):
            index, position, factor = index + position % have * factor, position // have, factor * want
    return x.new_zeros(math.prod(wanted)).scatter(0, index.flatten(), x.flatten()).reshape(wanted)
