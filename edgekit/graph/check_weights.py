"""Checks the tensors of a model that came from outside: data that fits the shape, and numbers that are finite.

Weights can be gigabytes on disk. They are read in pieces of a megabyte and never mapped, so that checking them costs no memory.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.errors import SourceError

_CHUNK_BYTES = 1 << 22
_FIX_WEIGHT = "repair or retrain the weights; a network with such a number gives no usable result"
_FIX_DATA = "the file is damaged or incomplete: fetch or export it again"


def check_tensor(tensor: ir.TensorProtocol, what: str, where: str) -> None:
    """Checks that the data of `tensor` fits its dtype and shape, and that its numbers are finite.

    NaN is refused anywhere. Infinities are accepted in tensors of one element and in masks (whose finite values are all 0 or 1).

    Args:
        tensor: An initializer or a tensor attribute.
        what: What it is, such as `initializer 'conv.weight'`.
        where: The file and node, for messages.

    Raises:
        SourceError: It fails the check or cannot be read.
    """
    check_tensor_size(tensor, what, where)
    if not _can_be_non_finite(tensor.dtype):
        return
    try:
        scan = _scan(tensor)
    except (OSError, ValueError, TypeError, AssertionError, MemoryError, OverflowError) as error:
        raise SourceError(f"{what} cannot be read: {error}", where=where, fix=_FIX_DATA) from error
    if scan.has_nan:
        raise SourceError(f"{what} contains NaN", where=where, fix=_FIX_WEIGHT)
    if scan.has_infinite and tensor.size > 1 and not scan.is_mask:
        raise SourceError(f"{what} contains infinite numbers", where=where, fix=_FIX_WEIGHT)


def _can_be_non_finite(dtype: ir.DataType) -> bool:
    if dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return True
    return dtype.is_floating_point() and dtype.bitwidth >= 8  # the 4- and 6-bit formats have finite numbers only


def check_tensor_size(tensor: ir.TensorProtocol, what: str, where: str) -> None:
    """Checks, without reading the data, that there is as much of it as dtype and shape say.

    Raises:
        SourceError: There is less or more, the dtype is unknown, a dimension is negative, or the external file is missing.
    """
    try:
        dims = [dim for dim in tensor.shape if isinstance(dim, int)]
        if len(dims) != len(tensor.shape) or any(dim < 0 for dim in dims):
            raise ValueError(f"its shape is {list(tensor.shape)}")
        if tensor.dtype == ir.DataType.UNDEFINED:
            raise ValueError("its dtype is undefined")
        if isinstance(tensor, ir.ExternalTensor):
            wanted, held, unit = tensor.nbytes, _external_bytes(tensor), "bytes"
        elif isinstance(tensor.raw, onnx.TensorProto):
            wanted, held, unit = _proto_elements(tensor, tensor.raw)
        elif tensor.dtype == ir.DataType.STRING:
            wanted, held, unit = tensor.size, int(np.size(np.asarray(tensor.raw, dtype=object))), "strings"
        else:
            return  # made in this process: the constructor has checked it
    except (OSError, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise SourceError(f"{what} cannot be read: {error}", where=where, fix=_FIX_DATA) from error
    if wanted != held:
        raise SourceError(f"{what} holds {held} {unit}, its shape {tensor.shape} and dtype {tensor.dtype.name} need {wanted}", where=where,
                          fix=_FIX_DATA)  # fmt: skip


def _external_bytes(tensor: ir.ExternalTensor) -> int:
    """Returns how many bytes the file has for `tensor`: the declared length, cut by the end of the file."""
    offset, length = tensor.offset or 0, tensor.length or tensor.nbytes
    if offset < 0 or length < 0:
        raise ValueError(f"its place in the external file is negative (offset {offset}, length {length})")
    path = Path(tensor.path)
    if not path.is_file():
        raise FileNotFoundError(f"external data file '{tensor.location}' is missing")
    return max(0, min(length, path.stat().st_size - offset))


def _proto_elements(tensor: ir.TensorProtocol, proto: onnx.TensorProto) -> tuple[int, int, str]:
    """Returns how many bytes or stored numbers are needed, how many are there, and the unit."""
    if proto.HasField("raw_data"):
        return tensor.nbytes, len(proto.raw_data), "bytes"
    bits = tensor.dtype.bitwidth
    if tensor.dtype in (ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        wanted = 2 * tensor.size
    elif bits in (2, 4):
        wanted = -(-tensor.size * bits // 8)  # packed into bytes, one byte a stored number
    else:
        wanted = tensor.size
    fields = (proto.float_data, proto.int32_data, proto.int64_data, proto.double_data, proto.uint64_data, proto.string_data)
    return wanted, max(len(stored) for stored in fields), "numbers"


class _Scan:
    """What is known of the numbers seen so far. It is a file too, so that `ExternalTensor.tofile` reads without mapping."""

    def __init__(self, dtype: np.dtype) -> None:
        self.dtype = dtype
        self.has_nan = False
        self.has_infinite = False
        self.is_mask = True

    def write(self, data: bytes) -> int:
        self.add(np.frombuffer(data, dtype=self.dtype))
        return len(data)

    def add(self, chunk: np.ndarray) -> None:
        finite = np.isfinite(chunk)
        if not finite.all():
            self.has_nan = self.has_nan or bool(np.isnan(chunk).any())
            self.has_infinite = self.has_infinite or bool(np.isinf(chunk).any())
        if self.is_mask:  # weights leave this branch with the first chunk
            self.is_mask = bool((~finite | (chunk == 0) | (chunk == 1)).all())


def _scan(tensor: ir.TensorProtocol) -> _Scan:
    scan = _Scan(tensor.dtype.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        if tensor.size:
            tensor.tofile(scan)  # a megabyte at a time; refuses paths outside the model's folder
        return scan
    flat = tensor.numpy().reshape(-1)
    step = max(1, _CHUNK_BYTES // max(1, flat.itemsize))
    for start in range(0, flat.size, step):
        scan.add(flat[start : start + step])
    return scan
