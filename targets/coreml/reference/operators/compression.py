"""MIL's quantization and its compressed constants: affine, by lookup table, sparse, and their combinations.

Decompression computes in float32 and is rounded once, to the type that the program declares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from edgekit.targets.coreml.reference.constants import unpack
from edgekit.targets.coreml.reference.operators.arguments import dims, ints, number

_QUANTIZED = {"int8": (-128, 127), "uint8": (0, 255)}


def _along(parameter: torch.Tensor, axis: torch.Tensor | int | None, rank: int) -> torch.Tensor:
    """A vector laid along `axis` of `rank` dimensions; a scalar stays one."""
    if parameter.dim() == 0:
        return parameter
    if axis is None:
        raise ValueError("scales in a vector need an axis")
    at = dims([int(number(axis))], rank)[0]
    return parameter.reshape([-1 if index == at else 1 for index in range(rank)])


def _affine_dequantize(
    quantized_data: torch.Tensor, zero_point: torch.Tensor, scale: torch.Tensor, axis: torch.Tensor | int
) -> torch.Tensor:
    return _dequantize(quantized_data, scale, zero_point, axis)


def _dequantize(
    input: torch.Tensor,  # MIL's name
    scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    axis: torch.Tensor | int | None = None,
) -> torch.Tensor:
    shifted = input.float()
    if zero_point is not None:
        shifted = shifted - _along(zero_point.float(), axis, input.dim())
    return _along(scale, axis, input.dim()) * shifted


def _quantize(
    input: torch.Tensor,  # MIL's name
    scale: torch.Tensor,
    output_dtype: str,
    zero_point: torch.Tensor | None = None,
    axis: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """`clip(round(input / scale) + zero_point)`, halfway values rounded to even."""
    if output_dtype not in _QUANTIZED:
        raise ValueError(f"nothing is quantized to '{output_dtype}'")
    values = torch.round(input / _along(scale, axis, input.dim()))
    if zero_point is not None:
        values = values + _along(zero_point, axis, input.dim())
    return torch.clamp(values, *_QUANTIZED[output_dtype]).to(torch.int32)


def _constexpr_cast(source_val: torch.Tensor, output_dtype: str) -> torch.Tensor:
    if output_dtype != "fp32":
        raise ValueError(f"constants are cast to fp32 only, not to '{output_dtype}'")
    return source_val.float()


def _blocks(size: int, count: int) -> int:
    if count == 0 or size % count:
        raise ValueError(f"{size} elements cannot be divided into {count} blocks of one size")
    return size // count


def _spread(parameter: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Repeats each value of a parameter over its block, until it can be broadcast to `shape`."""
    for axis, (size, count) in enumerate(zip(shape, parameter.shape, strict=True)):
        block = _blocks(size, count)
        if count > 1 and block > 1:
            parameter = parameter.repeat_interleave(block, axis)
    return parameter


def _blockwise_shift_scale(data: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
    shifted = data.float()
    if offset is not None:
        shifted = shifted - _spread(offset.float(), data.shape)
    return _spread(scale, data.shape) * shifted


def _unpacked(packed: torch.Tensor, bits: int, shape: torch.Tensor) -> torch.Tensor:
    """The elements of `bits` bits each that bytes hold, in `shape`."""
    sizes = ints(shape)
    count = math.prod(sizes)
    if packed.numel() * 8 < count * bits:
        raise ValueError(f"{packed.numel()} bytes hold fewer than {count} elements of {bits} bits")
    return torch.from_numpy(unpack(packed.numpy().astype(np.uint8), bits, count)).reshape(sizes)


def _lut_to_dense(
    indices: torch.Tensor, lut: torch.Tensor, shape: torch.Tensor | None = None, vector_axis: torch.Tensor | int | None = None
) -> torch.Tensor:
    """Values of a lookup table. iOS16's form has packed indices, a table of rank 1 and `shape`; iOS18's one index per element."""
    if shape is not None:
        return lut[_unpacked(indices, lut.numel().bit_length() - 1, shape).long()]
    return _looked_up(indices, lut, vector_axis)


def _looked_up(indices: torch.Tensor, lut: torch.Tensor, vector_axis: torch.Tensor | int | None) -> torch.Tensor:
    """Values of lookup tables `[groups..., entries, vector]`; the elements of a vector follow each other along `vector_axis`."""
    *groups, entries, vector = lut.shape
    rank = indices.dim()
    table = torch.zeros([1] * rank, dtype=torch.int64)
    for axis, (size, count) in enumerate(zip(indices.shape, groups, strict=True)):
        block = _blocks(size, count)
        if count > 1:
            table = table * count + (torch.arange(size) // block).reshape([-1 if index == axis else 1 for index in range(rank)])
    found = lut.reshape(-1, entries, vector)[table, indices.long()]
    if vector == 1:
        return found.squeeze(-1)
    at = _vector_axis(vector_axis, rank)
    return found.movedim(-1, at + 1).flatten(at, at + 1)


def _vector_axis(vector_axis: torch.Tensor | int | None, rank: int) -> int:
    if vector_axis is None:
        raise ValueError("a table of vectors needs a vector_axis")
    return dims([int(number(vector_axis))], rank)[0]


def _sparse_to_dense(nonzero_data: torch.Tensor, mask: torch.Tensor, shape: torch.Tensor | None = None) -> torch.Tensor:
    """The data where the mask is 1, zeros elsewhere. iOS16's form has the mask packed into bytes, and `shape`."""
    kept = (mask if shape is None else _unpacked(mask, 1, shape)) != 0
    if int(kept.sum()) != nonzero_data.numel():
        raise ValueError(f"a mask with {int(kept.sum())} ones has {nonzero_data.numel()} values")
    dense = torch.zeros(kept.shape, dtype=nonzero_data.dtype)
    dense[kept] = nonzero_data
    return dense


def _lut_to_sparse(
    indices_mask: torch.Tensor, indices_nonzero_data: torch.Tensor, lut: torch.Tensor, vector_axis: torch.Tensor | int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask, and values of a lookup table where it is 1; both are longer along `vector_axis` by the table's vectors."""
    dense = _looked_up(_sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    vector = lut.shape[-1]
    mask = indices_mask if vector == 1 else indices_mask.repeat_interleave(vector, _vector_axis(vector_axis, indices_mask.dim()))
    return mask, dense[mask != 0]


def _sparse_blockwise_shift_scale(
    data_mask: torch.Tensor, nonzero_data: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask, and the data where it is 1, shifted and scaled as in `constexpr_blockwise_shift_scale`."""
    return data_mask, _blockwise_shift_scale(_sparse_to_dense(nonzero_data, data_mask), scale, offset)[data_mask != 0]


TABLE: dict[str, Callable[..., Any]] = {
    "constexpr_affine_dequantize": _affine_dequantize,
    "constexpr_blockwise_shift_scale": _blockwise_shift_scale,
    "constexpr_cast": _constexpr_cast,
    "constexpr_lut_to_dense": _lut_to_dense,
    "constexpr_lut_to_sparse": _lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": _sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": _sparse_to_dense,
    "dequantize": _dequantize,
    "quantize": _quantize,
}
