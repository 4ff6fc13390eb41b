"""Weights stored in fewer bits, as Core ML's constexpr operators: the system expands them when it loads the model.

Palettes keep 2^n values of a tensor and an n-bit index per element; linear quantization keeps integers and a scale per output channel
or per block; the sparse form keeps a mask and the elements that are not zero, exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import UsageError
from edgekit.targets.coreml.constexpr import affine, blockwise, rounded_scale

SMALLEST = 512
"""Tensors of fewer elements stay as they are: a palette and its scales would weigh as much."""
PALETTE_BITS = (1, 2, 4, 6, 8)
_FORM = re.compile(r"palette([12468])|int8|int4(?::([0-9]+))?|sparse")
_ITERATIONS = 100


@dataclass(frozen=True)
class Storage:
    """How weights are stored.

    Attributes:
        kind: "palette", "int8", "int4" or "sparse".
        bits: Bits of an element.
        block: Elements of the input axis that share a scale (int4).
    """

    kind: str
    bits: int
    block: int = 32

    @property
    def version(self) -> str:
        """The oldest deployment target that reads it."""
        return "iOS18" if self.kind == "int4" else "iOS16"


_SMALLEST_BLOCK = 8


def parse_storage(text: str) -> Storage | None:
    """Reads the option `weights`: `palette1`, 2, 4, 6 or 8, `int8`, `int4` (`int4:64`: in blocks of 64) or `sparse`.

    Raises:
        UsageError: It is none of these.
    """
    if not text:
        return None
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(
            f"'{text}' is no way to store weights",
            where="option 'weights' of target 'coreml'",
            fix="one of: palette1, palette2, palette4, palette6, palette8, int8, int4, int4:BLOCK, sparse",
        )
    if match[1]:
        return Storage("palette", int(match[1]))
    if text == "sparse":
        return Storage("sparse", 16)
    block = int(match[2] or 32)
    if text != "int8" and block < 2:
        raise UsageError(
            f"a block of {block} weights has no common scale", where="option 'weights' of target 'coreml'", fix="give 16, 32 or 64"
        )
    return Storage("int8" if text == "int8" else "int4", 8 if text == "int8" else 4, block)


def palettize(array: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """A palette of 2^bits values for the tensor: k-means on its elements.

    It starts where a fine quantizer is best, with values as dense as the cube root of the elements' density (Panter & Dite 1951,
    "Quantization Distortion in Pulse-Count Modulation with Nonuniform Spacing of Levels").

    Returns:
        The index of each element, uint8 in the tensor's shape, and the palette in ascending order, float64 of 2^bits elements.
    """
    count = 1 << bits
    flat = np.sort(array.astype(np.float64).ravel())
    distinct = flat[np.concatenate([[True], np.diff(flat) > 0])]
    if distinct.size <= count:  # kept exactly
        return np.searchsorted(distinct, array.astype(np.float64)).astype(np.uint8), np.pad(
            distinct, (0, count - distinct.size), mode="edge"
        )
    sums = np.concatenate([[0.0], np.cumsum(flat)])
    centres = _first_centres(flat, count)
    for _ in range(_ITERATIONS):
        edges = np.concatenate([[0], np.searchsorted(flat, (centres[1:] + centres[:-1]) / 2), [flat.size]])
        sizes = np.diff(edges)
        moved = np.where(sizes > 0, np.diff(sums[edges]) / np.maximum(sizes, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = np.sort(moved)
    indices = np.searchsorted((centres[1:] + centres[:-1]) / 2, array.astype(np.float64))
    return indices.astype(np.uint8), centres


def _first_centres(flat: np.ndarray, count: int) -> np.ndarray:
    quantiles = np.quantile(flat, np.linspace(0, 1, min(1024, max(4 * count, flat.size // 16)) + 1))
    mass = np.concatenate([[0.0], np.cumsum(np.diff(quantiles) ** (2 / 3))])  # density^(1/3) dx, the density being 1 / dx between quantiles
    found: np.ndarray = np.interp((np.arange(count) + 0.5) / count * mass[-1], mass, quantiles)
    return found


def pack(indices: np.ndarray, bits: int) -> np.ndarray:
    """Packs elements of `bits` bits into bytes, the lowest bits first (Core ML's order)."""
    spread = (indices.ravel()[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return np.packbits(spread.astype(np.uint8).ravel(), bitorder="little")


def quantize_channels(array: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 8-bit integers in −127 … 127 and a float64 scale for each index along `axis`."""
    others = tuple(index for index in range(array.ndim) if index != axis)
    scale = np.abs(array.astype(np.float64)).max(axis=others) / 127
    scale = np.where(scale > 0, scale, 1.0)
    spread = scale.reshape([-1 if index == axis else 1 for index in range(array.ndim)])
    return np.clip(np.rint(array / spread), -127, 127).astype(np.int8), scale


def _divisor(size: int, block: int) -> int:
    """The largest divisor of `size` that does not exceed `block`."""
    return next(number for number in range(min(block, size), 0, -1) if size % number == 0)


def quantize_blocks(array: np.ndarray, axis: int, block: int, whole_kernel: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric 4-bit integers in −7 … 7 (int8, the tensor's shape) and float64 scales: one per `block` elements of `axis` and per output.

    The block shrinks to the largest divisor of the axis that does not exceed it. With `whole_kernel` the axes after the second, which are
    those of a convolution's kernel where `axis` is 1, share a scale.
    """
    size = array.shape[axis]
    block = _divisor(size, block)
    split = array.astype(np.float64).reshape(*array.shape[:axis], size // block, block, *array.shape[axis + 1 :])
    others = tuple(range(2, array.ndim)) if axis == 1 and whole_kernel else ()
    axes = (axis + 1, *(index + 1 for index in others))
    scale = np.abs(split).max(axis=axes, keepdims=True) / 7
    scale = np.where(scale > 0, scale, 1.0)
    data = np.clip(np.rint(split / scale), -7, 7).reshape(array.shape).astype(np.int8)
    return data, scale.reshape([length for index, length in enumerate(scale.shape) if index != axis + 1])


def stored(array: np.ndarray, storage: Storage, axis: int, modern: bool, name: str) -> Any | None:
    """A MIL variable that holds the weights in the given storage, or None where they stay as they are.

    Args:
        array: The weights, in the type that the program computes in.
        storage: How to store them.
        axis: The axis of the output channels.
        modern: Whether the program is written in the operators of iOS18.
        name: Name of the operation.
    """
    if array.size < SMALLEST or not np.isfinite(array).all():
        return None
    if storage.kind == "palette":
        return _palette(array, storage.bits, modern, name)
    if storage.kind == "sparse":
        return _sparse(array, modern, name)
    if storage.kind == "int8":
        return _channels(array, axis, modern, name)
    return _blocks(array, axis, storage.block, name)


def _palette(array: np.ndarray, bits: int, modern: bool, name: str) -> Any:
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    indices, centres = palettize(array, bits)
    lut = centres.astype(array.dtype)
    if not modern:
        return mb.constexpr_lut_to_dense(indices=pack(indices, bits), lut=lut, shape=np.array(array.shape, np.uint32), name=name)
    typed = indices.astype(types.nptype_from_builtin(types.string_to_builtin(f"uint{bits}")))
    return mb.constexpr_lut_to_dense(indices=typed, lut=lut.reshape(*[1] * array.ndim, lut.size, 1), name=name)


def _sparse(array: np.ndarray, modern: bool, name: str) -> Any | None:
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    mask = array != 0
    if mask.mean() > 1 - 2 / (8 * array.dtype.itemsize):  # the mask's bits would outweigh the zeros
        return None
    if not modern:
        return mb.constexpr_sparse_to_dense(
            nonzero_data=array[mask], mask=pack(mask.astype(np.uint8), 1), shape=np.array(array.shape, np.uint32), name=name
        )
    bit = types.nptype_from_builtin(types.uint1)
    return mb.constexpr_sparse_to_dense(nonzero_data=array[mask], mask=mask.astype(np.uint8).astype(bit), name=name)


def _channels(array: np.ndarray, axis: int, modern: bool, name: str) -> Any | None:
    data, scale = quantize_channels(array, axis)
    rounded = rounded_scale(scale, array.dtype)
    if rounded is None:
        return None
    if modern:
        return blockwise(data, rounded.reshape([-1 if index == axis else 1 for index in range(array.ndim)]), None, "int8", name)
    return affine(data, rounded, np.zeros_like(scale, np.int8), axis, name)


def _blocks(array: np.ndarray, axis: int, block: int, name: str) -> Any | None:
    inner = 1 if axis == 0 else axis - 1
    if _divisor(array.shape[inner], block) < _SMALLEST_BLOCK:  # a scale would take as much room as what it scales
        return _channels(array, axis, True, name)
    data, scale = quantize_blocks(array, inner, block, whole_kernel=axis == 0)
    rounded = rounded_scale(scale, array.dtype)
    return None if rounded is None else blockwise(data, rounded, None, "int4", name)
