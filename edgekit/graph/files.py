"""Writing graphs to files without copying their weights in memory."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

INLINE_LIMIT = 256 * 2**20
"""Weights up to this many bytes are written into the .onnx file itself; above, serializing them would copy them twice."""


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers of the main graph."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def spill_weights(model: ir.Model, folder: Path) -> ir.Model:
    """Moves large weights that are held in memory into a file in `folder`, from which they are mapped when read.

    Args:
        model: The graph.
        folder: Where the file is written; it must stay as long as the graph is used.

    Returns:
        The same graph over mapped weights; `model` itself where its weights are small or on disk already.

    Raises:
        OSError: The file system refused, or is full.
    """
    tensors = [value.const_value for value in model.graph.initializers.values()]
    held = sum(tensor.nbytes for tensor in tensors if tensor is not None and not isinstance(tensor, ir.ExternalTensor))
    if held <= INLINE_LIMIT:
        return model
    path = folder / "spilled.onnx"
    save_model(model, path)
    return ir.load(path)


def save_model(model: ir.Model, path: Path, inline_limit: int | None = None) -> list[Path]:
    """Writes `model` to `path` and returns the files written.

    Weights of more than `inline_limit` bytes (`INLINE_LIMIT`) go into `path.data` beside it.

    Raises:
        OSError: The file system refused, or is full.
    """
    if weight_bytes(model) <= (INLINE_LIMIT if inline_limit is None else inline_limit):
        ir.external_data.load_to_model(model)  # a weight in a file beside the source would be looked for beside `path`
        ir.save(model, path)
        return [path]
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name)
    return [path, data]
