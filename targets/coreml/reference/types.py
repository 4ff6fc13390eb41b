"""Types of MIL values, and in which PyTorch type the evaluator holds and computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgekit.errors import UnsupportedOpError

HELD: dict[str, torch.dtype] = {
    "bool": torch.bool,
    "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16,
    "int4": torch.int8, "int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
    "uint1": torch.uint8, "uint2": torch.uint8, "uint3": torch.uint8, "uint4": torch.uint8, "uint6": torch.uint8, "uint8": torch.uint8,
    "uint16": torch.int32, "uint32": torch.int64,
}  # fmt: skip
"""How a tensor of each MIL type is held: types under 8 bits in 8, unpacked; uint16 and uint32 in wider types, which PyTorch computes in."""

_PROTO_NAMES = {
    1: "bool", 2: "string", 10: "fp16", 11: "fp32", 12: "fp64", 13: "bf16",
    21: "int8", 22: "int16", 23: "int32", 24: "int64", 25: "int4",
    31: "uint8", 32: "uint16", 33: "uint32", 35: "uint4", 36: "uint2", 37: "uint1", 38: "uint6", 39: "uint3",
}  # fmt: skip
"""By the numbers of `MIL.proto`'s DataType."""
BITS = {"bool": 8, "int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6, "int8": 8, "uint8": 8}
"""Bits of an element on disk, of the types that are not a whole number of 16-bit words."""


@dataclass(frozen=True)
class ValueType:
    """Type of a MIL value.

    Attributes:
        kind: "tensor", "list", "dictionary" or "state" (of a tensor).
        dtype: MIL's name of the element type, "string" included; empty for a list or dictionary.
        shape: Sizes, None where unknown until the program runs.
    """

    kind: str
    dtype: str = ""
    shape: tuple[int | None, ...] = ()

    @property
    def held(self) -> torch.dtype | None:
        """The PyTorch type that holds it; None for strings, lists and dictionaries."""
        return HELD.get(self.dtype)


def value_type(spec: Any) -> ValueType:
    """Reads a `MIL.proto` ValueType.

    Raises:
        UnsupportedOpError: The element type is one that the evaluator does not know.
    """
    kind = spec.WhichOneof("type")
    if kind == "stateType":
        inner = value_type(spec.stateType.wrappedType)
        return ValueType("state", inner.dtype, inner.shape)
    if kind == "tensorType":
        number = spec.tensorType.dataType
        if number not in _PROTO_NAMES:
            raise UnsupportedOpError(
                f"the program has values of type number {number} of MIL.proto, which the evaluator does not know",
                fix="compile the model with another element type",
            )
        return ValueType("tensor", _PROTO_NAMES[number], tuple(_size(dimension) for dimension in spec.tensorType.dimensions))
    return ValueType({"listType": "list", "dictionaryType": "dictionary"}.get(kind or "", str(kind)))


def _size(dimension: Any) -> int | None:
    return int(dimension.constant.size) if dimension.WhichOneof("dimension") == "constant" else None


def computed(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in the type that operators compute in: float16 in float32, whose results are then rounded; small integers in int32."""
    if tensor.dtype in (torch.float16, torch.bfloat16):
        return tensor.float()
    if tensor.dtype in (torch.int8, torch.uint8, torch.int16, torch.int64):
        return tensor.to(torch.int32)
    return tensor


def rounded(tensor: torch.Tensor, to: ValueType) -> torch.Tensor:
    """The tensor in the type that the program declares for it; integers wrap around as in two's complement."""
    held = to.held
    if held is None or (tensor.dtype == held and to.dtype not in ("uint16", "uint32")):
        return tensor
    if to.dtype == "uint16":
        return tensor.to(torch.int64).bitwise_and(0xFFFF).to(held)
    if to.dtype == "uint32":
        return tensor.to(torch.int64).bitwise_and(0xFFFFFFFF)
    return tensor.to(held)


_NUMPY = {"bool": np.bool_, "fp16": np.float16, "fp32": np.float32, "fp64": np.float64, "uint16": np.uint16, "uint32": np.uint32}


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy type in which callers give and get values of MIL type `dtype`."""
    if dtype in _NUMPY:
        return np.dtype(_NUMPY[dtype])
    return np.dtype(f"{'u' if dtype.startswith('u') else ''}int{max(8, BITS.get(dtype, 0) or int(dtype.strip('uint')))}")
