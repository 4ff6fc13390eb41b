"""Batch normalization in inference, which exporters and constant folding leave as arithmetic with one constant per channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import in_range, made_by, per_channel, region, replace, sole_reader


@dataclass(frozen=True)
class _Chain:
    """(x − mean) · or / first · second + shift: constants `[C]` in float64, and the constants that scale and shift come from."""

    root: ir.Node
    mean: np.ndarray
    deviation: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    weight: ir.Value | None
    bias: ir.Value


def fuse_batch_norm(first: ir.Node, editor: GraphEditor) -> bool:
    """Replaces the chain that begins with `first` by BatchNormalization; False when it is none.

    1. Sub(μ), Div(σ) or Mul(1/σ), Mul(γ) (not always), Add(β), with constants per channel, axis 1 of x.
    2. Mul(γ/σ), Add(β − μγ/σ) right after a convolution: a frozen batch norm.
    """
    x = first.inputs[0]
    if first.op_type == "Mul" and constant_array(x) is not None:
        x = first.inputs[1]
    if x is None or x.shape is None or len(x.shape) < 2 or constant_array(x) is not None:
        return False
    channels = x.shape[1]
    if not isinstance(channels, int):
        return False
    chain = _read(first, len(x.shape), channels) if first.op_type == "Sub" else _read_frozen(first, x, len(x.shape), channels)
    nodes = region(chain.root, [x]) if chain is not None else None
    if chain is None or nodes is None or x.dtype is None or chain.root.outputs[0].dtype != x.dtype:
        return False
    dtype = x.dtype.numpy()
    arrays = [in_range(array, dtype) for array in (chain.scale, chain.shift, chain.mean, chain.deviation**2)]
    if any(array is None for array in arrays) or arrays[3] is None or not (arrays[3] > 0).all():
        return False
    sources = (chain.weight, chain.bias, None, None)
    names = ("weight", "bias", "running_mean", "running_var")
    inputs = [x]
    for array, source, name in zip(arrays, sources, names, strict=True):
        assert array is not None
        inputs.append(editor.add_initializer(f"{chain.root.name}.{name}", array, made_from=[source]))
    replace(editor, chain.root, nodes, "BatchNormalization", inputs, {"epsilon": 0.0})
    return True


def _read(first: ir.Node, rank: int, channels: int) -> _Chain | None:
    mean = _vector(first.inputs[1], rank, channels)
    divided = _next(first, ("Div", "Mul"), rank, channels)
    if mean is None or divided is None or not _varies(first.inputs[1], divided[1], channels):
        return None
    node, constant, array = divided
    weight = None
    if node.op_type == "Div" or (following := _next(node, ("Mul",), rank, channels)) is not None:
        if not array.all():
            return None
        deviation, scale = (array if node.op_type == "Div" else 1 / array), np.ones(channels)
        following = _next(node, ("Mul",), rank, channels)
        if following is not None:
            node, weight, scale = following
    else:
        deviation, scale, weight = np.ones(channels), array, constant
    last = _next(node, ("Add",), rank, channels)
    if last is None:
        return None
    scale, deviation = scale * np.sign(deviation), np.abs(deviation)
    return _Chain(last[0], mean, deviation, scale, last[2], weight, last[1])


def _read_frozen(first: ir.Node, x: ir.Value, rank: int, channels: int) -> _Chain | None:
    constant = next((value for value in first.inputs if value is not x), None)
    scale, last = _vector(constant, rank, channels), _next(first, ("Add",), rank, channels)
    if made_by(x, "Conv", "ConvTranspose") is None or not is_used_once(x) or scale is None or last is None:
        return None
    if not _varies(constant, last[1], channels):
        return None
    return _Chain(last[0], np.zeros(channels), np.ones(channels), scale, last[2], constant, last[1])


def _next(node: ir.Node, op_types: tuple[str, ...], rank: int, channels: int) -> tuple[ir.Node, ir.Value, np.ndarray] | None:
    """Returns the only reader of `node`, one of these operators, with its constant per channel."""
    reader = sole_reader(node.outputs[0])
    if reader is None or reader[0].op_type not in op_types:
        return None
    if reader[0].op_type == "Div" and reader[0].inputs[0] is not node.outputs[0]:
        return None
    array = _vector(reader[1], rank, channels)
    return None if array is None else (*reader, array)


def _vector(value: ir.Value | None, rank: int, channels: int) -> np.ndarray | None:
    array = per_channel(value, rank, channels)
    return None if array is None else array.astype(np.float64)


def _varies(first: ir.Value | None, second: ir.Value | None, channels: int) -> bool:
    """True when one constant has a number for every channel: numbers for all are arithmetic of another kind."""
    arrays = (constant_array(first), constant_array(second))
    return all(array is not None and array.size == channels for array in arrays)
