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

from edgekit.targets.coreml.lowering.builder import Lowering

_LEAST_SIZE = 2048
"""Smaller constants stay plain, as in coremltools' own compression: they are not worth an operator."""
_ROUNDING = 2.0**-10
"""How much, relatively, a scale may change when it is rounded to the precision of the program."""


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
    turned = np.ascontiguousarray(matrix.T)
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
        with np.errstate(over="ignore", under="ignore"):
            rounded = self.scale.astype(np.float16 if b.half else np.float32)
        if not np.all(np.abs(rounded.astype(np.float32) - self.scale) <= _ROUNDING * np.abs(self.scale)):
            return None
        data = np.ascontiguousarray(self.data)
        if not self.block and data.dtype in (np.int8, np.uint8):
            return _affine(b, name, data, rounded, self.zero, self.axis) if b.at_least("iOS16") else None
        return _blockwise(b, name, data, rounded, self.zero, self.axis, self.block) if b.at_least("iOS18") else None


def _affine(b: Lowering, name: str, data: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> Any:
    from coremltools.converters.mil.mil import Builder

    if scale.size == 1:
        scale, zero, axis = scale.reshape(()), zero.reshape(()), 0
    return Builder.constexpr_affine_dequantize(
        quantized_data=data,
        scale=scale if scale.ndim else scale[()],
        zero_point=zero if zero.ndim else zero[()],
        axis=np.int32(axis),
        name=b.unique(name),
    )


def _blockwise(b: Lowering, name: str, data: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int, block: int) -> Any:
    from coremltools.converters.mil.mil import Builder, types

    kind = {"int4": types.int4, "uint4": types.uint4, "int8": types.int8, "uint8": types.uint8}.get(data.dtype.name)
    if kind is None or (block and scale.shape[axis] * block != data.shape[axis]):
        return None
    if not block or scale.ndim != data.ndim:
        scale, zero = aligned(scale, data.shape, axis, 0), aligned(zero, data.shape, axis, 0)
    stored = types.nptype_from_builtin(kind)
    offset = zero.astype(np.int8 if kind in (types.int4, types.int8) else np.uint8).astype(stored)
    return Builder.constexpr_blockwise_shift_scale(
        data=data.astype(np.int8 if kind in (types.int4, types.int8) else np.uint8).astype(stored),
        scale=scale,
        offset=offset if zero.astype(np.int32).any() else None,
        name=b.unique(name),
    )
