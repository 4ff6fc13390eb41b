"""Core ML's operators for weights that are stored as integers and multiplied out when the model is loaded."""

from __future__ import annotations

from typing import Any

import numpy as np

_ROUNDING = 2.0**-10
"""How much, relatively, a scale may change when it is rounded to the precision of the program."""


def rounded_scale(scale: np.ndarray, dtype: np.dtype[Any] | type[np.floating[Any]]) -> np.ndarray | None:
    """The scale in the program's precision; None where it does not survive that: float16 has no numbers under 6e-8, and few under 6e-5."""
    with np.errstate(over="ignore", under="ignore"):
        rounded: np.ndarray = scale.astype(dtype)
    return rounded if np.all(np.abs(rounded.astype(np.float64) - scale) <= _ROUNDING * np.abs(scale)) else None


def affine(data: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int, name: str) -> Any:
    """`(data − zero) · scale` with 8-bit data; scale and zero of one element, or one for each index along `axis` (iOS16)."""
    from coremltools.converters.mil.mil import Builder as mb

    if scale.size == 1:
        scale, zero, axis = scale.reshape(()), zero.reshape(()), 0
    return mb.constexpr_affine_dequantize(
        quantized_data=data,
        scale=scale if scale.ndim else scale[()],
        zero_point=zero if zero.ndim else zero[()],
        axis=np.int32(axis),
        name=name,
    )


def blockwise(data: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, kind: str, name: str) -> Any:
    """`(data − zero) · scale` with data of `kind`, such as "int4"; each scale and zero holds for a block of the data (iOS18).

    Args:
        data: Integers within the range of `kind`.
        scale: Of the rank of the data; each length divides that of the data.
        zero: In the shape of the scale; None where it is 0.
        kind: "int4", "uint4", "int8" or "uint8".
        name: Name of the operation.
    """
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    held = np.int8 if kind.startswith("int") else np.uint8
    stored = types.nptype_from_builtin(types.string_to_builtin(kind))
    offset = zero.astype(held).astype(stored) if zero is not None and zero.astype(np.int32).any() else None
    return mb.constexpr_blockwise_shift_scale(data=data.astype(held).astype(stored), scale=scale, offset=offset, name=name)
