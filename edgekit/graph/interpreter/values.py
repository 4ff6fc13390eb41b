"""What a value of the graph is while it runs: a torch tensor, or a tensor that stands for a type that torch does not compute in.

torch has no arithmetic on uint16, uint32, uint64, on 2- and 4-bit integers and on 8- and 4-bit floats. Their values are carried in a wider
type (`Carried`) and wrapped or rounded back into their own range after every operator, so each value is exactly what its type can hold.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgekit.graph.interpreter.straight_through import round_to_float16, through

DataType = ir.DataType

NATIVE: dict[DataType, torch.dtype] = {
    DataType.FLOAT: torch.float32,
    DataType.DOUBLE: torch.float64,
    DataType.FLOAT16: torch.float16,
    DataType.BFLOAT16: torch.bfloat16,
    DataType.INT8: torch.int8,
    DataType.INT16: torch.int16,
    DataType.INT32: torch.int32,
    DataType.INT64: torch.int64,
    DataType.UINT8: torch.uint8,
    DataType.BOOL: torch.bool,
    DataType.COMPLEX64: torch.complex64,
    DataType.COMPLEX128: torch.complex128,
}
"""Types that torch computes in."""
ONNX_TYPE: dict[torch.dtype, DataType] = {native: onnx for onnx, native in NATIVE.items()}

CARRIERS: dict[DataType, torch.dtype] = {
    DataType.UINT16: torch.int32,
    DataType.UINT32: torch.int64,
    DataType.UINT64: torch.int64,
    DataType.INT4: torch.int8,
    DataType.UINT4: torch.int8,
    DataType.INT2: torch.int8,
    DataType.UINT2: torch.int8,
    DataType.FLOAT8E4M3FN: torch.float32,
    DataType.FLOAT8E4M3FNUZ: torch.float32,
    DataType.FLOAT8E5M2: torch.float32,
    DataType.FLOAT8E5M2FNUZ: torch.float32,
    DataType.FLOAT8E8M0: torch.float32,
    DataType.FLOAT4E2M1: torch.float32,
}
"""Types that are carried in a wider one. uint64 is carried as its bits."""

FLOATS = frozenset({DataType.FLOAT, DataType.DOUBLE, DataType.FLOAT16, DataType.BFLOAT16})
_SIGNED_BITS = {DataType.INT4: 4, DataType.INT2: 2}
_UNSIGNED_BITS = {DataType.UINT16: 16, DataType.UINT32: 32, DataType.UINT4: 4, DataType.UINT2: 2}


class NotSupportedError(Exception):
    """Raised by an operator's function for what it does not compute; the engine names the operator and the node."""


@dataclass(frozen=True, slots=True)
class Carried:
    """A tensor with the type that it stands for (quantized integers that have a gradient are carried as floats).

    Attributes:
        tensor: The values, in the type of `CARRIERS`; for strings a numpy array of objects, which nothing computes with.
        dtype: The type that the values stand for.
        gate: For indices that TopK selected by differentiable scores: those scores, in the indices' shape. What is gathered by the
            indices passes its gradient to them (see `straight_through.Gate`).
    """

    tensor: Any
    dtype: DataType
    gate: Tensor | None = None


Value: TypeAlias = Any
"""A Tensor, a Carried, a list of those (a sequence), or None: an input that is not given, or an optional without its element."""


@dataclass(frozen=True)
class Precision:
    """In what type floating-point values are held.

    Attributes:
        name: `float32`: each value in its declared type. `float64`: every floating-point value in float64.
            `float16`: every floating-point value computed in float32, then rounded to float16.
    """

    name: str = "float32"
    rounds: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounds", self.name == "float16")

    def held(self, dtype: DataType) -> torch.dtype:
        """The torch type that values of `dtype` are held in.

        Raises:
            NotSupportedError: Strings, and types that have no carrier.
        """
        if dtype in FLOATS and self.name != "float32":
            return torch.float64 if self.name == "float64" else torch.float32
        native = NATIVE.get(dtype) or CARRIERS.get(dtype)
        if native is None:
            raise NotSupportedError(f"tensors of type {dtype.name}")
        return native


def wrap(tensor: Tensor, dtype: DataType) -> Tensor:
    """Brings carried values back into the range of `dtype`: integers wrap modulo 2^bits, floats round to the nearest and saturate."""
    if dtype in _UNSIGNED_BITS:
        return tensor.bitwise_and((1 << _UNSIGNED_BITS[dtype]) - 1)
    if dtype in _SIGNED_BITS:
        half = 1 << (_SIGNED_BITS[dtype] - 1)
        return (tensor + half).bitwise_and(2 * half - 1) - half
    if dtype is DataType.UINT64:
        return tensor
    return round_float(tensor, dtype)


def round_float(tensor: Tensor, dtype: DataType, saturate: bool = True, round_mode: str = "up") -> Tensor:
    """Rounds to the values of an 8- or 4-bit float type, by the tables of the Cast operator, and gives float32.

    The gradient passes straight through.

    Args:
        tensor: Floating-point values.
        dtype: The type to round to.
        saturate: Values out of range become the largest finite one, else NaN or infinity as the type has them.
        round_mode: For FLOAT8E8M0 only: `up`, `down` or `nearest`.
    """
    values = tensor.detach().cpu()
    array = (values.float() if values.dtype in (torch.float16, torch.bfloat16) else values).numpy()
    if dtype is DataType.FLOAT8E8M0:
        rounded = _round_to_power_of_two(array, saturate, round_mode)
    else:
        rounded = _round_with_ml_dtypes(array, dtype, saturate)
    return through(tensor, torch.from_numpy(rounded).to(tensor.device))


def _round_with_ml_dtypes(array: np.ndarray, dtype: DataType, saturate: bool) -> np.ndarray:
    narrow = dtype.numpy()
    largest = float(ml_dtypes.finfo(narrow).max)  # type: ignore[no-untyped-call]
    with np.errstate(all="ignore"):
        rounded = array.astype(narrow).astype(np.float32)
    if saturate:
        # Decided on the rounded value: what rounds down to the largest one is in range.
        over = (np.abs(array) > largest) & (~np.isfinite(rounded) | (np.abs(rounded) >= largest))
        rounded = np.where(over, np.copysign(np.float32(largest), array), rounded)
    elif dtype is not DataType.FLOAT4E2M1:
        infinite = np.isinf(array) & ~np.isinf(rounded)
        rounded = np.where(infinite & (dtype is not DataType.FLOAT8E5M2), np.float32(np.nan), rounded)
    return np.asarray(rounded, dtype=np.float32)


def _round_to_power_of_two(array: np.ndarray, saturate: bool, round_mode: str) -> np.ndarray:
    """FLOAT8E8M0: 2^e for e in -127 ... 127, and NaN."""
    wide = array.astype(np.float64)
    mantissa, exponent = np.frexp(np.abs(wide))  # mantissa in [0.5, 1)
    floor = exponent - 1
    if round_mode == "up":
        power = np.where(mantissa == 0.5, floor, floor + 1)
    elif round_mode == "down":
        power = floor
    elif round_mode == "nearest":
        power = np.where(mantissa >= 0.75, floor + 1, floor)
    else:
        raise NotSupportedError(f"round_mode '{round_mode}'")
    power = np.where(wide == 0, -128, np.where(np.isinf(wide), 128, power))
    out_of_range = (power > 127) | (power < -127)
    result = np.ldexp(1.0, np.clip(power, -127, 127))
    if not saturate:
        result = np.where(out_of_range, np.nan, result)
    return np.where(np.isnan(wide), np.nan, result).astype(np.float32)


def with_gradient(value: Carried) -> bool:
    """Whether integers are carried as floats because they have a gradient."""
    return isinstance(value.tensor, Tensor) and value.tensor.is_floating_point() and not value.dtype.is_floating_point()


def integral(value: Value) -> Value:
    """Integers that were carried as floats, as integers without a gradient; other values as they are."""
    if type(value) is not Carried or not with_gradient(value):
        return value
    whole = value.tensor.detach().to(torch.int64)
    return whole.to(NATIVE[value.dtype]) if value.dtype in NATIVE else Carried(whole.to(CARRIERS[value.dtype]), value.dtype)


def unwrap(value: Value) -> Any:
    """The tensor of a tensor-like value."""
    return value.tensor if type(value) is Carried else value


def onnx_type(value: Value) -> DataType:
    """The ONNX type of a tensor-like value (as it is held: float32 under float16 emulation)."""
    return value.dtype if type(value) is Carried else ONNX_TYPE[value.dtype]


def from_array(array: np.ndarray, precision: Precision) -> Value:
    """Turns a numpy array (with the types of ml_dtypes) into a value; the tensor may share the array's memory."""
    array = np.asarray(array)
    if array.dtype.kind in "OUST":
        return Carried(array, DataType.STRING)
    dtype = DataType.from_numpy(array.dtype)
    held = precision.held(dtype)
    if dtype is DataType.BFLOAT16:
        return _held(torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16), held, precision)
    if dtype is DataType.UINT64:
        return Carried(torch.from_numpy(np.array(array).view(np.int64)), dtype)
    if dtype in CARRIERS:
        carrier = torch.empty(0, dtype=CARRIERS[dtype]).numpy().dtype
        return Carried(torch.from_numpy(np.array(array.astype(carrier))), dtype)
    if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = np.array(array, dtype=array.dtype.newbyteorder("="))
    return _held(torch.from_numpy(array), held, precision)


def _held(tensor: Tensor, held: torch.dtype, precision: Precision) -> Tensor:
    tensor = tensor.to(held)
    return round_to_float16(tensor) if precision.rounds and tensor.is_floating_point() else tensor


def to_array(value: Value) -> Any:
    """The numpy array of a value; a list of arrays for a sequence; None for an empty optional."""
    if value is None:
        return None
    if isinstance(value, list):
        return [to_array(item) for item in value]
    if type(value) is Carried and value.dtype is DataType.STRING:
        return value.tensor
    value = integral(value)
    tensor = unwrap(value).detach().cpu().contiguous().resolve_conj()
    if type(value) is Carried and value.dtype in CARRIERS:
        if value.dtype is DataType.UINT64:
            return tensor.numpy().view(np.uint64)
        return tensor.numpy().astype(value.dtype.numpy())
    if tensor.dtype is torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def integers(value: Any) -> list[int]:
    """A list of integers from an attribute or an input of the same meaning (`axes`, `pads` …)."""
    if isinstance(value, Tensor):
        return cast("list[int]", value.flatten().tolist())
    return list(value)


def is_vmapped(tensor: Tensor) -> bool:
    """Whether the tensor is one sample of a batch inside `torch.func.vmap`, where control flow cannot depend on elements."""
    return bool(torch._C._functorch.is_batchedtensor(tensor))


def scalar(value: Any, default: Any = None) -> Any:
    """The Python number of a tensor of one element, or of an attribute; `default` for None."""
    if value is None:
        return default
    return value.item() if isinstance(value, Tensor) else value
