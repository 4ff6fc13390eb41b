"""Pools of MIL over 1 to 3 spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.arguments import ints, number
from edgekit.targets.coreml.reference.operators.convolution import optional_ints, padded, pads

_AVERAGE: dict[int, Callable[..., torch.Tensor]] = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}
_LARGEST: dict[int, Callable[..., torch.Tensor]] = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_NOTHING = "a window of the pool has no element of the input, and Core ML documents no value for it"


@dataclass(frozen=True)
class _Windows:
    """Where the windows of a pool lie: `pad` before and after each dimension, then `overhang` that `ceil_mode` lets the last window have.

    `outside` says whether a window has no element of the input.
    """

    kernel: list[int]
    strides: list[int]
    pad: list[tuple[int, int]]
    overhang: list[tuple[int, int]]
    outside: bool

    @property
    def whole(self) -> bool:
        """Whether all windows lie inside the input."""
        return not any(after or before for before, after in (*self.pad, *self.overhang))


def _windows(
    x: torch.Tensor,
    kernel_sizes: torch.Tensor,
    strides: torch.Tensor | None,
    pad_type: str,
    pad: torch.Tensor | None,
    ceil_mode: torch.Tensor | bool,
) -> _Windows:
    kernel, sizes = ints(kernel_sizes), x.shape[2:]
    steps = optional_ints(strides, len(kernel))
    amounts = pads(pad_type, pad, sizes, kernel, steps)
    overhang, outside = [], False
    for size, width, step, (before, after) in zip(sizes, kernel, steps, amounts, strict=True):
        length = size + before + after
        count = (length - width) // step + 1
        if number(ceil_mode):
            count = (length - width + step - 1) // step + 1
            if (count - 1) * step >= size + before and before + after > 0:
                count -= 1
        outside = outside or before >= width or (count - 1) * step >= size + before
        overhang.append((0, max(0, (count - 1) * step + width - length)))
    return _Windows(kernel, steps, amounts, overhang, outside)


def _average(x: torch.Tensor, windows: _Windows, exclude_padding: bool) -> torch.Tensor:
    """Sum of each window divided by its elements: those of the input, or of the input and its padding, but never those of the overhang."""
    pool = _AVERAGE[x.dim() - 2]
    result = pool(padded(padded(x, windows.pad), windows.overhang), windows.kernel, windows.strides)
    if windows.whole:
        return result
    ones = padded(torch.ones_like(x[:1, :1]), windows.pad, 0.0 if exclude_padding else 1.0)
    counted = pool(padded(ones, windows.overhang), windows.kernel, windows.strides)
    if bool((counted == 0).any()):
        raise ValueError(_NOTHING)
    return result / counted


def avg_pool(
    x: torch.Tensor,
    kernel_sizes: torch.Tensor,
    pad_type: str,
    strides: torch.Tensor | None = None,
    pad: torch.Tensor | None = None,
    exclude_padding_from_average: torch.Tensor | bool = False,
    ceil_mode: torch.Tensor | bool = False,
) -> torch.Tensor:
    """Average of each window; padded zeros count unless they are excluded."""
    return _average(x, _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode), bool(number(exclude_padding_from_average)))


def l2_pool(
    x: torch.Tensor,
    kernel_sizes: torch.Tensor,
    pad_type: str,
    strides: torch.Tensor | None = None,
    pad: torch.Tensor | None = None,
    ceil_mode: torch.Tensor | bool = False,
) -> torch.Tensor:
    """L2 norm of each window."""
    windows = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    squares = padded(padded(x * x, windows.pad), windows.overhang)
    count = float(torch.tensor(windows.kernel).prod())
    return (_AVERAGE[x.dim() - 2](squares, windows.kernel, windows.strides) * count).sqrt()


def max_pool(
    x: torch.Tensor,
    kernel_sizes: torch.Tensor,
    pad_type: str,
    strides: torch.Tensor | None = None,
    pad: torch.Tensor | None = None,
    ceil_mode: torch.Tensor | bool = False,
) -> torch.Tensor:
    """Largest element of each window; padding is smaller than any."""
    windows = _windows(x, kernel_sizes, strides, pad_type, pad, ceil_mode)
    if windows.outside:
        raise ValueError(_NOTHING)
    lowest = float("-inf")
    return _LARGEST[x.dim() - 2](padded(padded(x, windows.pad, lowest), windows.overhang, lowest), windows.kernel, windows.strides)


TABLE: dict[str, Callable[..., Any]] = {"avg_pool": avg_pool, "l2_pool": l2_pool, "max_pool": max_pool}
