"""Operators that choose the type of their result: casts and constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.graph.interpreter.registry import Call, operator
from edgekit.graph.interpreter.values import (
    CARRIERS,
    Carried,
    DataType,
    NotSupportedError,
    Precision,
    Value,
    from_array,
    onnx_type,
    round_float,
    scalar,
    to_array,
    unwrap,
    wrap,
)

_FLOAT8 = frozenset(
    {
        *(DataType.FLOAT8E4M3FN, DataType.FLOAT8E4M3FNUZ, DataType.FLOAT8E5M2, DataType.FLOAT8E5M2FNUZ),
        *(DataType.FLOAT8E8M0, DataType.FLOAT4E2M1),
    }
)
_UINT64 = 1 << 64


def convert(value: Value, dtype: DataType, precision: Precision, saturate: bool = True, round_mode: str = "up") -> Value:
    """The value in another type, by the rules of the Cast operator."""
    if onnx_type(value) is DataType.STRING or dtype is DataType.STRING:
        raise NotSupportedError("casts from and to strings")
    held = precision.held(dtype)
    tensor: Tensor = unwrap(value)
    if onnx_type(value) is DataType.UINT64 and dtype is not DataType.UINT64 and (held.is_floating_point or dtype is DataType.BOOL):
        # The bits of 2^63 and more are negative as int64; float64 rounds them as it rounds the number itself.
        tensor = torch.from_numpy(to_array(value).astype(np.float64)) if bool((tensor < 0).any()) else tensor
    if dtype in _FLOAT8:
        wide = tensor if tensor.is_floating_point() else tensor.to(torch.float64)
        return Carried(round_float(wide, dtype, saturate, round_mode), dtype)
    if dtype in CARRIERS:
        if tensor.is_floating_point():
            if dtype is DataType.UINT64 and bool((tensor >= 2.0**63).any()):
                raise NotSupportedError("casts of floats of 2^63 and more to UINT64")
            tensor = tensor.to(torch.int64)
        return Carried(wrap(tensor.to(torch.int64), dtype).to(held), dtype)
    if tensor.is_floating_point() and not held.is_floating_point and dtype is not DataType.BOOL:
        # Through int64, so that what is out of range wraps alike on every processor.
        tensor = tensor.to(torch.int64)
    result = tensor.to(held)
    gate = value.gate if type(value) is Carried else None
    return result if gate is None or held.is_floating_point else Carried(result, dtype, gate)


@operator("Cast", since=6, raw=True)
def cast(value: Value, /, *, to: int, saturate: int = 1, round_mode: str = "up", call: Call) -> Value:
    """Converts to another type."""
    return convert(value, DataType(to), call.precision, bool(saturate), round_mode)


@operator("CastLike", raw=True)
def cast_like(value: Value, like: Value, /, *, saturate: int = 1, round_mode: str = "up", call: Call) -> Value:
    """Converts to the type of another value."""
    return convert(value, onnx_type(like), call.precision, bool(saturate), round_mode)


@operator("BitCast", raw=True)
def bit_cast(value: Value, /, *, to: int, call: Call) -> Value:
    """The same bits as another type of the same width."""
    target = DataType(to)
    source = onnx_type(value)
    if call.precision.name != "float32" and (source.is_floating_point() or target.is_floating_point()):
        raise NotSupportedError(f"the bits of floats under precision {call.precision.name}")
    if source.bitwidth != target.bitwidth or source.bitwidth < 8:
        raise NotSupportedError(f"bits of {source.name} taken as {target.name}")
    return from_array(np.array(to_array(value), order="C").view(target.numpy()), call.precision)


@operator("Constant", raw=True)
def constant(
    *,
    value: Value = None,
    value_float: float | None = None,
    value_floats: Sequence[float] | None = None,
    value_int: int | None = None,
    value_ints: Sequence[int] | None = None,
    call: Call,
) -> Value:
    """A tensor that is written in the model."""
    if value is not None:
        return value
    if value_float is not None or value_floats is not None:
        return torch.tensor(value_float if value_floats is None else list(value_floats), dtype=call.precision.held(DataType.FLOAT))
    if value_int is None and value_ints is None:
        raise NotSupportedError("a constant without a value")
    return torch.tensor(value_int if value_ints is None else list(value_ints), dtype=torch.int64)


@operator("ConstantOfShape", raw=True)
def constant_of_shape(shape: Tensor, /, *, value: Value = None, call: Call) -> Value:
    """A tensor of one value, float32 zero if none is given."""
    sizes = shape.tolist()
    if value is None:
        return torch.zeros(sizes, dtype=call.precision.held(DataType.FLOAT))
    full = unwrap(value).reshape(()).expand(sizes).clone()
    return Carried(full, value.dtype) if type(value) is Carried else full


@operator("EyeLike", raw=True)
def eye_like(like: Value, /, *, dtype: int | None = None, k: int = 0, call: Call) -> Value:
    """Ones on the diagonal `k` of a matrix of the shape of the input."""
    rows, columns = unwrap(like).shape
    ones = (torch.arange(columns) - torch.arange(rows)[:, None] == k).to(torch.float64)
    return convert(ones, onnx_type(like) if dtype is None else DataType(dtype), call.precision)


@operator("Range")
def arange(start: Tensor, limit: Tensor, delta: Tensor, /, *, stash_type: int = 1) -> Tensor:
    """start, start + delta … up to `limit`, which is excluded."""
    dtype = start.dtype
    first, last, step = (scalar(value) for value in (start, limit, delta))
    if dtype.is_floating_point:
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        count = max(int(torch.ceil((torch.tensor(last, dtype=wide) - first) / step).item()), 0)
        numbers: Tensor = first + torch.arange(count, dtype=wide) * step
        return numbers.to(dtype)
    result: Tensor = torch.arange(max(-((first - last) // step), 0), dtype=dtype) * step + first
    return result


def typed(tensor: Tensor, dtype: int, precision: Precision) -> Any:
    """A result computed in float64, in the type that an attribute asks for."""
    return convert(tensor, DataType(dtype), precision)
