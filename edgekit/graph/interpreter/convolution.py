"""Convolutions of one to three spatial axes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.sampling import linear_samples
from edgekit.graph.interpreter.values import NotSupportedError, integers

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def same_pads(total: Sequence[int], auto_pad: str) -> tuple[list[int], list[int]]:
    """Halves of the padding before and after; the odd one goes to the end for SAME_UPPER."""
    small = [max(amount, 0) // 2 for amount in total]
    large = [max(amount, 0) - half for amount, half in zip(total, small, strict=True)]
    return (small, large) if auto_pad == "SAME_UPPER" else (large, small)


def resolve_pads(
    auto_pad: str, pads: Sequence[int] | None, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Padding before and after each spatial axis."""
    rank = len(sizes)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
        return same_pads([(-(-n // s) - 1) * s + r - n for n, s, r in zip(sizes, strides, reach, strict=True)], auto_pad)
    if auto_pad == "VALID" or pads is None:
        return [0] * rank, [0] * rank
    return list(pads[:rank]), list(pads[rank:])


def flat_pads(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Padding in the order of torch: last axis first, before and after in turn."""
    return [amount for pair in reversed(list(zip(before, after, strict=True))) for amount in pair]


@operator("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Convolution, `[B, C, …]` with kernels `[M, C / group, …]`."""
    rank = x.dim() - 2
    if rank not in _CONVOLUTIONS:
        raise NotSupportedError(f"{rank} spatial axes")
    steps, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    before, after = resolve_pads(auto_pad, pads, x.shape[2:], weight.shape[2:], steps, gaps)
    if before != after:
        x, before = functional.pad(x, flat_pads(before, after)), [0] * rank
    return _CONVOLUTIONS[rank](x, weight, bias, steps, before, gaps, group)


@operator("ConvInteger", like=conv)
def conv_integer(
    x: Tensor, weight: Tensor, x_zero: Tensor | None = None, weight_zero: Tensor | None = None, /, **attributes: Any
) -> Tensor:
    """Convolution of 8-bit integers, exact, in int32."""
    # Sums of 8-bit products are exact in float64 up to 2^53, beyond what int32 holds.
    wide = x.double() - (0 if x_zero is None else x_zero.double())
    kernel = weight.double()
    if weight_zero is not None:
        kernel = kernel - weight_zero.double().reshape(-1, *([1] * (kernel.dim() - 1)))
    return conv(wide, kernel, None, **attributes).to(torch.int64).to(torch.int32)


@operator("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    /,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    output_padding: Sequence[int] | None = None,
    output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Transposed convolution, `[B, C, …]` with kernels `[C, M / group, …]`."""
    rank = x.dim() - 2
    if rank not in _TRANSPOSED:
        raise NotSupportedError(f"{rank} spatial axes")
    steps, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    whole = _TRANSPOSED[rank](x, weight, None, steps, 0, 0, group, gaps)
    full = [size + more for size, more in zip(whole.shape[2:], extra, strict=True)]
    if output_shape is None and auto_pad.startswith("SAME"):
        output_shape = [size * step for size, step in zip(x.shape[2:], steps, strict=True)]
    if output_shape is not None:
        before, after = same_pads([have - want for have, want in zip(full, output_shape[-rank:], strict=True)], auto_pad)
        after = [have - want - first for have, want, first in zip(full, output_shape[-rank:], before, strict=True)]
    else:
        before, after = resolve_pads("VALID" if auto_pad == "VALID" else "NOTSET", pads, x.shape[2:], weight.shape[2:], steps, gaps)
    grown = [more - last for more, last in zip(extra, after, strict=True)]
    result = functional.pad(whole, flat_pads([-first for first in before], grown))
    return result if bias is None else result + bias.reshape(-1, *([1] * rank))


@operator("Col2Im")
def col2im(
    columns: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    /,
    *,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Adds up blocks `[B, C k, L]` at their places in an image, in any number of spatial axes."""
    image, block = integers(image_shape), integers(block_shape)
    rank = len(image)
    steps, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    before, after = resolve_pads("NOTSET", pads, image, block, steps, gaps)
    padded = [size + first + last for size, first, last in zip(image, before, after, strict=True)]
    counts = [(size - (k - 1) * d - 1) // s + 1 for size, k, d, s in zip(padded, block, gaps, steps, strict=True)]
    batch, depth, _ = columns.shape
    area = 1
    for k in block:
        area *= k
    blocks = columns.reshape(batch, depth // area, area, *counts)
    result = columns.new_zeros(batch, depth // area, *padded)
    for index, offsets in enumerate(itertools.product(*(range(k) for k in block))):
        place = tuple(
            slice(offset * d, offset * d + (count - 1) * s + 1, s) for offset, d, count, s in zip(offsets, gaps, counts, steps, strict=True)
        )
        window = (slice(None), slice(None), *place)
        shifted = torch.zeros_like(result)
        shifted[window] = blocks[:, :, index]
        result = result + shifted
    return result[(slice(None), slice(None), *(slice(first, first + size) for first, size in zip(before, image, strict=True)))]


@operator("DeformConv")
def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    /,
    *,
    dilations: Sequence[int] | None = None,
    group: int = 1,
    kernel_shape: Sequence[int] | None = None,
    offset_group: int = 1,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> Tensor:
    """Deformable convolution (Dai et al. 2017; Zhu et al. 2018), `[B, C, …]`: each tap is read at a learned place."""
    batch, channels, *sizes = x.shape
    rank = len(sizes)
    kernel = list(weight.shape[2:])
    steps, gaps = list(strides or [1] * rank), list(dilations or [1] * rank)
    before, _ = resolve_pads("NOTSET", pads, sizes, kernel, steps, gaps)
    out = list(offset.shape[2:])
    taps = list(itertools.product(*(range(k) for k in kernel)))
    moved = offset.reshape(batch, offset_group, len(taps), rank, *out)
    weights = None if mask is None else mask.reshape(batch, offset_group, len(taps), *out)
    groups = x.reshape(batch * offset_group, channels // offset_group, *sizes)
    grid = torch.meshgrid(*(torch.arange(n) for n in out), indexing="ij")
    columns = []
    for index, tap in enumerate(taps):
        places = [
            grid[axis] * steps[axis] - before[axis] + tap[axis] * gaps[axis] + moved[:, :, index, axis].flatten(0, 1)
            for axis in range(rank)
        ]
        sampled = linear_samples(groups, places)  # [B G, C / G, *out]
        if weights is not None:
            sampled = sampled * weights[:, :, index].flatten(0, 1).unsqueeze(1)
        columns.append(sampled.reshape(batch, channels, *out))
    stacked = torch.stack(columns, 2).reshape(batch, group, channels // group * len(taps), -1)
    kernels = weight.reshape(group, weight.shape[0] // group, -1)
    result = torch.einsum("bgkn,gmk->bgmn", stacked, kernels).reshape(batch, weight.shape[0], *out)
    return result if bias is None else result + bias.reshape(-1, *([1] * rank))
