"""MIL operators that move elements and compute nothing: reshapes, slices and the exchanges of space, depth and batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.arguments import dims, ints, number

Ints = torch.Tensor | Sequence[int]
Count = torch.Tensor | int


def expand_dims(x: torch.Tensor, axes: Ints) -> torch.Tensor:
    """Inserts dimensions of size 1, at axes of the result."""
    for axis in sorted(dims(axes, x.dim() + len(ints(axes)))):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: torch.Tensor, axes: Ints | None = None) -> torch.Tensor:
    """Removes dimensions of size 1, by default all; axes of another size stay."""
    return x.squeeze() if axes is None else x.squeeze(dims(axes, x.dim()))


def transpose(x: torch.Tensor, perm: Ints) -> torch.Tensor:
    """Permutes the dimensions."""
    return x.permute(ints(perm))


def reshape(x: torch.Tensor, shape: Ints) -> torch.Tensor:
    """Reshapes; -1 is what remains and 0 the dimension of `x` at the same distance from the end, or 1 where `x` has none.

    That is the rule of iOS17. The older one, for shapes of the rank of `x` only, is a case of it.
    """
    sizes = ints(shape)
    shift = x.dim() - len(sizes)
    kept = [(x.shape[at + shift] if at + shift >= 0 else 1) if size == 0 else size for at, size in enumerate(sizes)]
    return x.reshape(kept)


def reshape_like(x: torch.Tensor, ref_tensors: Any, begins: Any, ends: Any, end_masks: Any) -> torch.Tensor:
    """Reshapes to the dimensions `begin:end` of each reference, joined; those whose `end_mask` is set go to the end."""
    shape: list[int] = []
    for reference, begin, end, mask in zip(*map(_listed, (ref_tensors, begins, ends, end_masks)), strict=True):
        shape += reference.shape[int(number(begin)) : None if number(mask) else int(number(end))]
    return x.reshape(shape)


def _listed(values: Any) -> list[Any]:
    return list(values) if isinstance(values, list | tuple) else [values]


def reverse(x: torch.Tensor, axes: Ints | None = None) -> torch.Tensor:
    """Reverses along `axes`, by default all."""
    return x.flip(list(range(x.dim())) if axes is None else dims(axes, x.dim()))


def reverse_sequence(x: torch.Tensor, lengths: Ints, seq_axis: Count = 0, batch_axis: Count = 0) -> torch.Tensor:
    """Reverses the first `lengths[i]` elements along `seq_axis` of each slice `i` along `batch_axis`."""
    sequence, batch = dims([int(number(seq_axis)), int(number(batch_axis))], x.dim())
    if sequence == batch:
        raise ValueError("reverse_sequence needs a seq_axis other than its batch_axis")
    result = x.clone()
    for at, length in enumerate(ints(lengths)):
        part = x.narrow(batch, at, 1).narrow(sequence, 0, length)
        result.narrow(batch, at, 1).narrow(sequence, 0, length).copy_(part.flip(sequence))
    return result


def _slices(
    shape: Sequence[int],
    begin: Ints,
    end: Ints,
    stride: Ints | None,
    begin_mask: Ints | None,
    end_mask: Ints | None,
    squeeze_mask: Ints | None,
) -> tuple[list[slice], list[int], list[int]]:
    """Forward slices, the axes that are to be reversed after them and the axes that are to be squeezed.

    A masked begin or end is that of numpy's `x[::stride]`: with a negative stride it begins at the last element.
    """
    rank = len(shape)
    first, last, steps = ints(begin), ints(end), [1] * rank if stride is None else ints(stride)
    open_begin, open_end, single = ([0] * rank if mask is None else ints(mask) for mask in (begin_mask, end_mask, squeeze_mask))
    slices, reversed_axes = [], []
    for axis, size in enumerate(shape):
        if single[axis]:
            slices.append(_single(0 if open_begin[axis] else first[axis], size, axis))
            continue
        found = range(size)[slice(None if open_begin[axis] else first[axis], None if open_end[axis] else last[axis], steps[axis])]
        if found.step < 0:
            found = found[::-1]
            reversed_axes.append(axis)
        slices.append(slice(found.start, max(found.stop, found.start), found.step))
    return slices, reversed_axes, [axis for axis in range(rank) if single[axis]]


def _single(index: int, size: int, axis: int) -> slice:
    if not -size <= index < size:
        raise IndexError(f"index {index} is out of bounds for dimension {axis} of size {size}")
    start = index + size if index < 0 else index
    return slice(start, start + 1)


def slice_by_index(
    x: torch.Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Ints | None = None,
    end_mask: Ints | None = None,
    squeeze_mask: Ints | None = None,
) -> torch.Tensor:
    """`x[begin:end:stride]` in each dimension; `squeeze_mask` takes the one element at `begin` and drops the dimension."""
    slices, reversed_axes, single = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x[tuple(slices)]
    result = result.flip(reversed_axes) if reversed_axes else result
    return result.squeeze(single) if single else result


def slice_update(
    x: torch.Tensor,
    update: torch.Tensor,
    begin: Ints,
    end: Ints,
    stride: Ints | None = None,
    begin_mask: Ints | None = None,
    end_mask: Ints | None = None,
    squeeze_mask: Ints | None = None,
) -> torch.Tensor:
    """`x` with the slice that `slice_by_index` would give replaced by `update`."""
    slices, reversed_axes, _ = _slices(x.shape, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    result = x.clone()
    target = result[tuple(slices)]
    target.copy_(update.reshape(target.shape).flip(reversed_axes))
    return result


def slice_by_size(x: torch.Tensor, begin: Ints, size: Ints) -> torch.Tensor:
    """The block of `size` at `begin`; size -1 takes all that is left."""
    for axis, (start, length) in enumerate(zip(ints(begin), ints(size), strict=True)):
        first = start + x.shape[axis] if start < 0 else start
        x = x.narrow(axis, first, x.shape[axis] - first if length == -1 else length)
    return x


def sliding_windows(x: torch.Tensor, axis: Count, size: Count, stride: Count = 1) -> torch.Tensor:
    """All windows along `axis`; a window's elements lie along the dimension after it."""
    along = dims([int(number(axis))], x.dim())[0]
    return x.unfold(along, int(number(size)), int(number(stride))).movedim(-1, along + 1)


def _depth_to_space(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`[n, height * width, C, H, W]` to `[n, C, H * height, W * width]`."""
    n, _, c, h, w = x.shape
    return x.reshape(n, height, width, c, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c, h * height, w * width)


def _space_to_depth(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """`[n, C, H * height, W * width]` to `[n, height * width, C, H, W]`."""
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // height, height, w // width, width).permute(0, 3, 5, 1, 2, 4)
    return blocks.reshape(n, height * width, c, h // height, w // width)


def depth_to_space(x: torch.Tensor, block_size: Count) -> torch.Tensor:
    """Channels to blocks; a channel's number counts blocks first, then channels of the result, as in TensorFlow."""
    block = int(number(block_size))
    return _depth_to_space(x.reshape(x.shape[0], block * block, -1, *x.shape[2:]), block, block)


def space_to_depth(x: torch.Tensor, block_size: Count) -> torch.Tensor:
    """Blocks to channels, the inverse of `depth_to_space`."""
    block = int(number(block_size))
    return _space_to_depth(x, block, block).flatten(1, 2)


def batch_to_space(x: torch.Tensor, block_shape: Ints, crops: torch.Tensor) -> torch.Tensor:
    """Batches to blocks, of which `crops` are cut off."""
    height, width = ints(block_shape)
    (top, bottom), (left, right) = crops.tolist()
    blocks = x.reshape(height * width, -1, *x.shape[1:]).transpose(0, 1)
    whole = _depth_to_space(blocks, height, width)
    return whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]


def space_to_batch(x: torch.Tensor, block_shape: Ints, paddings: torch.Tensor) -> torch.Tensor:
    """Blocks of the input, padded with zeros, to batches; a batch's number counts blocks first, then batches of the input."""
    height, width = ints(block_shape)
    (top, bottom), (left, right) = paddings.tolist()
    return _space_to_depth(functional.pad(x, (left, right, top, bottom)), height, width).transpose(0, 1).flatten(0, 1)


def pixel_shuffle(x: torch.Tensor, upscale_factor: Count) -> torch.Tensor:
    """Channels to blocks, as in PyTorch: a channel's number counts channels of the result first, then blocks."""
    return functional.pixel_shuffle(x, int(number(upscale_factor)))


def pixel_unshuffle(x: torch.Tensor, downscale_factor: Count) -> torch.Tensor:
    """Blocks to channels, the inverse of `pixel_shuffle`."""
    return functional.pixel_unshuffle(x, int(number(downscale_factor)))


TABLE: dict[str, Callable[..., Any]] = {
    "batch_to_space": batch_to_space,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "reshape": reshape,
    "reshape_like": reshape_like,
    "reverse": reverse,
    "reverse_sequence": reverse_sequence,
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "sliding_windows": sliding_windows,
    "space_to_batch": space_to_batch,
    "space_to_depth": space_to_depth,
    "squeeze": squeeze,
    "transpose": transpose,
}
