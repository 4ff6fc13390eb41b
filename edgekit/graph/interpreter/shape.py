"""Operators that move values and compute no new ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.graph.interpreter.registry import Call, operator
from edgekit.graph.interpreter.values import NotSupportedError, Value, integers, scalar

Integers = Tensor | Sequence[int]


@operator("Identity", raw=True)
def identity(value: Value, /) -> Value:
    """The value itself."""
    return value


@operator("Reshape")
def reshape(data: Tensor, shape: Integers, *, allowzero: int = 0) -> Tensor:
    """The same elements in another shape; 0 keeps a size (unless `allowzero`), -1 is what remains."""
    sizes = integers(shape)
    if not allowzero:
        sizes = [data.shape[index] if size == 0 else size for index, size in enumerate(sizes)]
    return data.reshape(sizes)


@operator("Flatten")
def flatten(x: Tensor, /, *, axis: int = 1) -> Tensor:
    """A matrix: the axes before `axis`, and the others."""
    if axis < 0:
        axis += x.dim()
    rows = 1
    for size in x.shape[:axis]:
        rows *= size
    return x.reshape(rows, -1) if x.numel() else x.reshape(rows, int(torch.tensor(x.shape[axis:]).prod()))


@operator("Squeeze")
def squeeze(data: Tensor, axes: Integers | None = None) -> Tensor:
    """Without axes of size 1."""
    if axes is None:
        return data.squeeze()
    chosen = integers(axes)
    if any(data.shape[axis] != 1 for axis in chosen):
        raise ValueError(f"axes {chosen} of shape {list(data.shape)} are not all of size 1")
    return data.squeeze(tuple(chosen))


@operator("Unsqueeze")
def unsqueeze(data: Tensor, axes: Integers) -> Tensor:
    """With axes of size 1 at these places of the result."""
    chosen = integers(axes)
    rank = data.dim() + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        data = data.unsqueeze(axis)
    return data


@operator("Transpose")
def transpose(data: Tensor, /, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order, reversed by default."""
    return data.permute(*(reversed(range(data.dim())) if perm is None else perm))


@operator("Concat")
def concat(*inputs: Tensor, axis: int = 1) -> Tensor:
    """Tensors one after another along an axis."""
    return torch.cat(inputs, axis)


def parts(size: int, count: int) -> list[int]:
    """Sizes of `count` equal parts, the last one smaller if need be."""
    length = -(-size // count)
    return [min(length, size - index * length) for index in range(count)]


@operator("Split")
def split(data: Tensor, split: Integers | None = None, *, axis: int = 0, num_outputs: int | None = None, call: Call) -> tuple[Tensor, ...]:
    """Parts along an axis, of the sizes given or equal ones."""
    sizes = integers(split) if split is not None else parts(data.shape[axis], num_outputs or len(call.outputs))
    return torch.split(data, sizes, axis)


@operator("Slice")
def slice_(data: Tensor, starts: Integers, ends: Integers, axes: Integers | None = None, steps: Integers | None = None) -> Tensor:
    """A range of each of the axes; steps may be negative."""
    first, last = integers(starts), integers(ends)
    chosen = list(range(len(first))) if axes is None else integers(axes)
    strides = [1] * len(first) if steps is None else integers(steps)
    for start, end, axis, step in zip(first, last, chosen, strides, strict=True):
        positions = range(data.shape[axis])[slice(start, end, step)] if step > 0 else _backwards(data.shape[axis], start, end, step)
        if step < 0:
            data = data.index_select(axis, torch.tensor(list(positions), dtype=torch.int64, device=data.device))
        else:
            index = [slice(None)] * data.dim()
            index[axis] = slice(positions.start, max(positions.start, positions.stop), step)
            data = data[tuple(index)]
    return data


def _backwards(size: int, start: int, end: int, step: int) -> range:
    """Positions from `start` down to before `end`, both clamped as the specification says: an end below -size includes position 0."""
    start = min(max(start + size if start < 0 else start, 0), size - 1)
    end = min(max(end + size if end < 0 else end, -1), size - 1)
    return range(start, end, step)


@operator("Expand")
def expand(data: Tensor, shape: Tensor, /) -> Tensor:
    """Broadcast to the common shape of `data` and `shape`."""
    return data.expand(torch.broadcast_shapes(data.shape, shape.tolist()))  # type: ignore[no-untyped-call]


@operator("Tile", since=6)
def tile(data: Tensor, repeats: Tensor, /) -> Tensor:
    """Repeated along each axis."""
    return data.repeat(repeats.tolist())


@operator("Shape")
def shape(data: Tensor, /, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes of the axes from `start` to `end`."""
    return torch.tensor(list(data.shape)[slice(start, end)], dtype=torch.int64)


@operator("Size")
def size(data: Tensor, /) -> Tensor:
    """The number of elements."""
    return torch.tensor(data.numel())


@operator("Pad", since=2)
def pad_by_attributes(data: Tensor, /, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Padding as up to opset 10."""
    return pad(data, pads, value, mode=mode)


@operator("Pad", since=11)
def pad_by_inputs(
    data: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None, /, *, mode: str = "constant"
) -> Tensor:
    """Padding as since opset 11: before and after each axis; a negative amount removes."""
    return pad(data, integers(pads), scalar(value, 0), None if axes is None else integers(axes), mode=mode)


def pad(data: Tensor, pads: Sequence[int], value: float = 0, axes: Sequence[int] | None = None, *, mode: str = "constant") -> Tensor:
    """Pads with a constant, the edge, or by reflection or wrapping around.

    Args:
        data: The tensor.
        pads: All amounts before the axes, then all after.
        value: The constant.
        axes: The axes that `pads` speaks of; all of them if None.
        mode: `constant`, `edge`, `reflect` or `wrap`.
    """
    chosen = list(range(data.dim())) if axes is None else [axis % data.dim() for axis in axes]
    amounts = {axis: (pads[index], pads[index + len(chosen)]) for index, axis in enumerate(chosen)}
    if mode == "constant":
        flat = [amount for axis in reversed(range(data.dim())) for amount in amounts.get(axis, (0, 0))]
        return functional.pad(data, flat, value=value)
    for axis, (before, after) in amounts.items():
        length = data.shape[axis]
        positions = torch.arange(-before, length + after, device=data.device)
        if mode == "edge":
            positions = positions.clamp(0, length - 1)
        elif mode == "wrap":
            positions = positions % length
        elif mode == "reflect":
            period = max(2 * (length - 1), 1)
            positions = positions % period
            positions = torch.where(positions >= length, period - positions, positions)
        else:
            raise NotSupportedError(f"mode '{mode}'")
        data = data.index_select(axis, positions)
    return data


@operator("CenterCropPad")
def center_crop_pad(data: Tensor, shape: Tensor, /, *, axes: Sequence[int] | None = None) -> Tensor:
    """Crops from the center, or pads with zeros around it."""
    for axis, want in zip(range(data.dim()) if axes is None else axes, shape.tolist(), strict=True):
        have = data.shape[axis]
        if want <= have:
            data = data.narrow(axis, (have - want) // 2, want)
        else:
            before = (want - have) // 2
            data = pad(data, [before, want - have - before], axes=[axis])
    return data


@operator("DepthToSpace")
def depth_to_space(x: Tensor, /, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """`[B, C b², H, W]` to `[B, C, H b, W b]`."""
    batch, channels, height, width = x.shape
    block = blocksize
    if mode == "DCR":
        x = x.reshape(batch, block, block, channels // block**2, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        x = x.reshape(batch, channels // block**2, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, channels // block**2, height * block, width * block)


@operator("SpaceToDepth")
def space_to_depth(x: Tensor, /, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """`[B, C, H b, W b]` to `[B, C b², H, W]`."""
    batch, channels, height, width = x.shape
    block = blocksize
    x = x.reshape(batch, channels, height // block, block, width // block, block)
    x = x.permute(0, 3, 5, 1, 2, 4) if mode == "DCR" else x.permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * block**2, height // block, width // block)


@operator("Trilu")
def trilu(x: Tensor, k: Tensor | None = None, /, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of matrices, from diagonal `k`; zeros elsewhere."""
    diagonal = int(scalar(k, 0))
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@operator("ReverseSequence")
def reverse_sequence(x: Tensor, lengths: Tensor, /, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first `lengths[b]` steps of each sequence in reversed order."""
    steps = torch.arange(x.shape[time_axis])
    positions = torch.where(steps < lengths[:, None], lengths[:, None] - 1 - steps, steps)  # [batch, time]
    positions = positions if batch_axis < time_axis else positions.t()
    index = positions.reshape(*positions.shape, *([1] * (x.dim() - 2))).expand(x.shape)
    return torch.gather(x, time_axis, index)
