"""Constants of a MIL program: decoded from the protobuf message or from the package's weight files."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from edgekit.errors import SourceError
from edgekit.targets.coreml.reference.types import BITS, ValueType, value_type

_IN_BYTES = {"fp16": "<f2", "int8": "<i1", "uint8": "<u1", "int64": "<i8", "uint32": "<u4", "int16": "<i2", "uint16": "<u2"}
"""Element types whose immediate values are raw bytes."""
_BLOB_CALLS = {"fp32": "float", "bool": "uint8"}


class Weights:
    """The weight files of one package. A file is opened when the first constant in it is read."""

    def __init__(self, folder: Path) -> None:
        """`folder` is the one that the program's `@model_path` stands for."""
        self._folder = folder
        self._readers: dict[Path, Any] = {}

    def read(self, name: str, offset: int, dtype: str, count: int) -> np.ndarray:
        """Reads `count` elements of MIL type `dtype` at `offset` of the file that the program calls `name`; small ones come unpacked.

        Raises:
            SourceError: The file is missing, outside the package, cut short or damaged.
        """
        path = self._path(name)
        try:
            array = np.asarray(getattr(self._reader(path), f"read_{_BLOB_CALLS.get(dtype, dtype)}_data")(offset))
        except (RuntimeError, ValueError, AttributeError, MemoryError) as error:
            raise _damaged(f"cannot be read at offset {offset}: {error}", path) from error
        if array.size != count:
            raise _damaged(f"holds {array.size} elements at offset {offset} where the program declares {count}", path)
        return array.view(np.float16) if dtype == "fp16" else array

    def _path(self, name: str) -> Path:
        relative = PurePosixPath(name.removeprefix("@model_path/"))
        path = self._folder.joinpath(*relative.parts)
        if relative.is_absolute() or not path.resolve().is_relative_to(self._folder.resolve()):
            raise SourceError(
                f"the program reads weights outside its package: '{name}'",
                where=str(self._folder),
                fix="put the weights inside the package, in weights/weight.bin",
            )
        if not path.is_file():
            raise SourceError(
                f"the weight file '{name}' is missing from the package", where=str(path), fix="copy the whole .mlpackage folder again"
            )
        return path

    def _reader(self, path: Path) -> Any:
        if path not in self._readers:
            from coremltools.libmilstoragepython import _BlobStorageReader

            self._readers[path] = _BlobStorageReader(str(path))
        return self._readers[path]


def _damaged(problem: str, path: Path) -> SourceError:
    return SourceError(
        f"the package's weights are damaged: {path.name} {problem}", where=str(path), fix="copy the whole .mlpackage folder again"
    )


def constant(spec: Any, weights: Weights) -> Any:
    """Decodes a `MIL.proto` Value: a tensor (rank 0 for a scalar), a string, a list or a dictionary.

    Raises:
        SourceError: Its weights cannot be read, or it holds another number of elements than its type says.
    """
    kind = value_type(spec.type)
    if spec.WhichOneof("value") == "blobFileValue":
        shape = _static(kind)
        array = weights.read(spec.blobFileValue.fileName, spec.blobFileValue.offset, kind.dtype, int(np.prod(shape, dtype=np.int64)))
        return _tensor(array.reshape(shape), kind)
    immediate = spec.immediateValue
    which = immediate.WhichOneof("value")
    if which == "list":
        return [constant(item, weights) for item in immediate.list.values]
    if which == "dictionary":
        items = [(constant(item.key, weights), constant(item.value, weights)) for item in immediate.dictionary.values]
        return {key.item() if isinstance(key, torch.Tensor) else key: value for key, value in items}
    values = getattr(immediate.tensor, immediate.tensor.WhichOneof("value") or "floats").values
    if kind.dtype == "string":
        strings = [str(value) for value in values]
        return strings[0] if not kind.shape and strings else strings
    return _tensor(_elements(values, kind), kind)


def _static(kind: ValueType) -> tuple[int, ...]:
    return tuple(size or 0 for size in kind.shape)


def _elements(values: Any, kind: ValueType) -> np.ndarray:
    """The elements of an immediate tensor, which some types give as raw bytes."""
    shape = _static(kind)
    count = int(np.prod(shape, dtype=np.int64))
    if isinstance(values, bytes):
        bits = BITS.get(kind.dtype, 8)
        array = (
            unpack(np.frombuffer(values, np.uint8), bits, count, kind.dtype == "int4")
            if bits < 8
            else np.frombuffer(values, _IN_BYTES[kind.dtype])
        )
    else:
        array = np.array(values)
    if array.size != count:
        raise SourceError(
            f"a constant of the program holds {array.size} elements where its type says {count}",
            fix="the package is damaged: write it again",
        )
    return array.reshape(shape)


def unpack(packed: np.ndarray, bits: int, count: int, signed: bool = False) -> np.ndarray:
    """Unpacks `count` elements of `bits` bits each from bytes, the lowest bits first (Core ML's order)."""
    flat = np.unpackbits(packed, bitorder="little")[: count * bits].reshape(count, bits)
    values = np.packbits(flat, axis=1, bitorder="little")[:, 0]
    if signed:
        return np.where(values >= 1 << (bits - 1), values.astype(np.int16) - (1 << bits), values).astype(np.int8)
    return values


def _tensor(array: np.ndarray, kind: ValueType) -> torch.Tensor:
    wide = array.astype(np.int64) if array.dtype in (np.uint16, np.uint32, np.uint64) else array
    return torch.from_numpy(np.array(wide, order="C")).to(kind.held)
