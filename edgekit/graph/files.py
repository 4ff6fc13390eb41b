"""Writing graphs to files without copying their weights in memory."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

INLINE_LIMIT = 256 * 2**20
"""Weights up to this many bytes are written into the .onnx file itself; above, serializing them would copy them twice."""


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def save_model(model: ir.Model, path: Path) -> list[Path]:
    """Writes `model` to `path`, with its weights beside it in `path.data` where they are large; returns the files written.

    Raises:
        OSError: The file system refused, or is full.
    """
    if weight_bytes(model) <= INLINE_LIMIT:
        ir.save(model, path)
        return [path]
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name)
    return [path, data]
