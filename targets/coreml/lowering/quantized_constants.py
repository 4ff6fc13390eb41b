"""Constants that a graph holds in quantized form: computed with as dense arrays, and stored in the program in Core ML's compressed forms.

A lowering that hands the array to MIL as it is, or transposes it by `transposed`, gets the compressed form; one that changes it otherwise
gets a plain constant, which is larger and as right. Compression never raises the deployment target: below that of its form the constant
is plain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.targets.coreml.constexpr import affine, blockwise, rounded_scale
from edgekit.targets.coreml.lowering.builder import Lowering

_LEAST_SIZE = 2048
"""Smaller constants stay plain, as in coremltools' own compression: they are not worth an operator."""


def aligned(array: np.ndarray, shape: Sequence[int], axis: int, block: int) -> np.ndarray:
    """A scale or zero point in a shape that broadcasts with data of `shape`, by ONNX's three rules: per tensor, per axis, blocked."""
    if array.size == 1:
        return array.reshape((1,) * len(shape))
    if not block:
        return array.reshape([-1 if place == axis else 1 for place in range(len(shape))])
    return np.repeat(array, block, axis=axis)[tuple(slice(size) for size in shape)]


def dequantized_constant(
    b: Lowering, quantized: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int, block: int
) -> np.ndarray:
    """The array that DequantizeLinear makes of constants; `b.quantized` remembers how to store it compressed."""
    data, scale = quantized.astype(np.float32), scale.astype(np.float32)
    if zero is not None:
        data = data - aligned(zero.astype(np.float32), data.shape, axis, block)
    dense = np.asarray(data * aligned(scale, data.shape, axis, block), dtype=np.float32)
    if dense.size >= _LEAST_SIZE and dense.ndim:
        offset = np.zeros(scale.shape, dtype=quantized.dtype) if zero is None else zero
        b.quantized[id(dense)] = (dense, Quantized(quantized, scale, offset, axis, block))
    return dense


def transposed(b: Lowering, matrix: np.ndarray) -> np.ndarray:
    """The transposed matrix, which is stored compressed where the matrix is."""
    if id(matrix) in b.turned:
        return b.turned[id(matrix)][1]
    turned = np.ascontiguousarray(matrix.T)
    b.turned[id(matrix)] = (matrix, turned)
    _, form = b.quantized.get(id(matrix), (None, None))
    if isinstance(form, Quantized):
        b.quantized[id(turned)] = (turned, form.transposed())
    return turned


@dataclass(frozen=True)
class Quantized:
    """The arguments of DequantizeLinear that make a constant; called, it adds the constant to the program."""

    data: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    axis: int
    block: int

    def transposed(self) -> Quantized:
        """The same with the axes in reverse order."""
        return Quantized(self.data.T, self.scale.T, self.zero.T, self.data.ndim - 1 - self.axis, self.block)

    def __call__(self, b: Lowering, name: str) -> Any:
        """A constexpr operator of MIL; None where the deployment target, the type or the precision of the program has none."""
        scale = rounded_scale(self.scale, np.float16 if b.half else np.float32)
        if scale is None:
            return None
        data = np.ascontiguousarray(self.data)
        if not self.block and data.dtype in (np.int8, np.uint8):
            return affine(data, scale, self.zero, self.axis, b.unique(name)) if b.at_least("iOS16") else None
        return _blockwise(b, name, data, scale, self.zero, self.axis, self.block) if b.at_least("iOS18") else None


def _blockwise(b: Lowering, name: str, data: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int, block: int) -> Any:
    if data.dtype.name not in ("int4", "uint4", "int8", "uint8") or (block and scale.shape[axis] * block != data.shape[axis]):
        return None
    if not block or scale.ndim != data.ndim:
        scale, zero = aligned(scale, data.shape, axis, 0), aligned(zero, data.shape, axis, 0)
    return blockwise(data, scale, zero, data.dtype.name, b.unique(name))
