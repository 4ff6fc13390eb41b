"""Shapes: the same elements in another arrangement, joined, cut or repeated.

Shapes are static, so the target of a Reshape or Expand is the shape of its result, whether ONNX's input for it is constant or computed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.layout import axis_of, expand_dims, is_bool, is_float, out_dtype, reshape, spread, tile, transpose
from edgekit.targets.coreml.lowering.slicing import pad


def _identity(b: Lowering, node: ir.Node) -> Any:
    held, known = b.values.get(node.inputs[0]) if node.inputs[0] is not None else None, b.known(node, 0)
    if isinstance(held, list):  # a sequence
        return held
    return b.x(node) if known is None else known


def _reshape(b: Lowering, node: ir.Node) -> Any:
    return reshape(b, b.x(node), b.out_shape(node))


def _squeeze(b: Lowering, node: ir.Node) -> Any:
    shape, axes = b.shape(node), b.known(node, 1)
    if axes is None and not b.has(node, 1):
        axes = np.flatnonzero(np.array(shape) == 1)
    if axes is None:
        return _reshape(b, node)
    return b.op("squeeze", x=b.x(node), axes=[int(axis) % len(shape) for axis in axes]) if axes.size else b.x(node)


def _unsqueeze(b: Lowering, node: ir.Node) -> Any:
    axes, rank = b.known(node, 1), len(b.out_shape(node))
    return _reshape(b, node) if axes is None else expand_dims(b, b.x(node), sorted(int(axis) % rank for axis in axes.reshape(-1)))


def _transpose(b: Lowering, node: ir.Node) -> Any:
    rank = b.rank(node)
    return transpose(b, b.x(node), node.attributes.get_ints("perm", tuple(reversed(range(rank)))))


def _expand(b: Lowering, node: ir.Node) -> Any:
    return spread(b, b.x(node), b.out_shape(node))


def _tile(b: Lowering, node: ir.Node) -> Any:
    shape = b.shape(node)
    if not shape:
        return b.x(node)
    return tile(b, b.x(node), [new // old for new, old in zip(b.out_shape(node), shape, strict=True)])


def _concat(b: Lowering, node: ir.Node) -> Any:
    """Without the empty tensors that exporters concatenate."""
    filled = [index for index in range(len(node.inputs)) if 0 not in b.shape(node, index)]
    if not filled:
        raise b.refuse("an empty tensor", "remove the node and what reads it")
    values = [b.x(node, index) for index in filled]
    return values[0] if len(values) == 1 else b.op("concat", values=values, axis=axis_of(node, b.rank(node)))


def _split(b: Lowering, node: ir.Node) -> Any:
    x, axis = b.x(node), axis_of(node, b.rank(node))
    sizes = _split_sizes(b, node, axis)
    filled = [size for size in sizes if size]
    parts = iter([x] if len(filled) == 1 else b.op("split", x=x, split_sizes=filled, axis=axis))
    empty = np.zeros([0 if at == axis else size for at, size in enumerate(b.shape(node))], out_dtype(node))
    return tuple(next(parts) if size else empty for size in sizes)


def _split_sizes(b: Lowering, node: ir.Node, axis: int) -> list[int]:
    known = b.known(node, 1)
    if known is not None:
        return [int(size) for size in known]
    if b.has(node, 1):
        return [b.out_shape(node, index)[axis] for index in range(len(node.outputs))]
    whole = b.shape(node)[axis]
    count = node.attributes.get_int("num_outputs", len(node.outputs))
    size = math.ceil(whole / count)
    return [max(min(size, whole - size * index), 0) for index in range(count)]


def _shape(b: Lowering, node: ir.Node) -> Any:
    attributes = node.attributes
    end = attributes.get_int("end", len(b.shape(node))) if "end" in attributes else None
    return np.array(b.shape(node)[attributes.get_int("start", 0) : end], np.int64)


def _size(b: Lowering, node: ir.Node) -> Any:
    return np.array(math.prod(b.shape(node)), np.int64)


def _constant(b: Lowering, node: ir.Node) -> Any:
    array = constant_array(node.outputs[0])
    if array is None or (array.dtype.kind not in "fiub" and array.dtype.name != "bfloat16"):
        raise b.refuse("a constant that is no dense tensor of numbers or booleans", "use a tensor")
    return array


def _depth_mode(b: Lowering, node: ir.Node) -> str:
    """Whether the position in the block comes before the channel (DCR) or after it (CRD)."""
    mode = node.attributes.get_string("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise b.refuse(f"{node.op_type} with mode '{mode}'", "use DCR or CRD")
    return mode


def _depth_to_space(b: Lowering, node: ir.Node) -> Any:
    x, size = b.x(node), node.attributes.get_int("blocksize", 1)
    mode = _depth_mode(b, node)
    if size == 1:
        return x
    if is_float(x):
        return b.op("depth_to_space", x=x, block_size=size) if mode == "DCR" else b.op("pixel_shuffle", x=x, upscale_factor=size)
    batch, channels, height, width = b.shape(node)
    rest = channels // size**2
    if mode == "DCR":  # one spatial axis after the other: both at once would need rank 6
        rows = transpose(b, reshape(b, x, [batch, size, size * rest, height, width]), [0, 2, 3, 1, 4])
        columns = transpose(b, reshape(b, rows, [batch, size, rest, height * size, width]), [0, 2, 3, 4, 1])
    else:
        wide = transpose(b, reshape(b, x, [batch, rest * size, size, height, width]), [0, 1, 3, 4, 2])
        columns = transpose(b, reshape(b, wide, [batch, rest, size, height, width * size]), [0, 1, 3, 2, 4])
    return reshape(b, columns, b.out_shape(node))


def _space_to_depth(b: Lowering, node: ir.Node) -> Any:
    x, size = b.x(node), node.attributes.get_int("blocksize", 1)
    mode = _depth_mode(b, node)
    if size == 1:
        return x
    if is_float(x) and mode == "DCR":
        return b.op("space_to_depth", x=x, block_size=size)
    batch, channels, height, width = b.shape(node)
    split = reshape(b, x, [batch, channels, height, width // size, size])  # one spatial axis after the other, as above
    if mode == "DCR":
        columns = reshape(b, transpose(b, split, [0, 4, 1, 2, 3]), [batch, size * channels, height // size, size, width // size])
        rows = transpose(b, columns, [0, 3, 1, 2, 4])
    else:
        columns = reshape(b, transpose(b, split, [0, 1, 4, 2, 3]), [batch, channels * size, height // size, size, width // size])
        rows = reshape(b, transpose(b, columns, [0, 1, 3, 2, 4]), [batch, channels, size, size, height * width // size**2])
        rows = transpose(b, rows, [0, 1, 3, 2, 4])
    return reshape(b, rows, b.out_shape(node))


def _trilu(b: Lowering, node: ir.Node) -> Any:
    """By selection: MIL's `band_part` multiplies, which makes NaN of infinities, and cannot leave out the diagonal itself."""
    x = b.x(node)
    rows, columns = b.shape(node)[-2:]
    above = np.arange(columns)[None, :] - np.arange(rows)[:, None]
    upper = bool(node.attributes.get_int("upper", 1))
    k = b.known(node, 1) if b.has(node, 1) else np.array(0)
    if k is not None:
        kept: Any = above >= int(k.reshape(-1)[0]) if upper else above <= int(k.reshape(-1)[0])
    else:
        kept = b.op("greater_equal" if upper else "less_equal", x=above, y=reshape(b, b.x(node, 1), [1, 1]))
    zero = np.zeros([1] * b.rank(node), bool if is_bool(x) else np.float32 if is_float(x) else np.int32)
    return b.op("select", cond=kept, a=x, b=b.var(zero))


def _center_crop_pad(b: Lowering, node: ir.Node) -> Any:
    """The axes are those whose size changes; of an odd difference the larger half is at the end."""
    bounds = []
    for old, new in zip(b.shape(node), b.out_shape(node), strict=True):
        begin = (new - old) // 2 if new > old else -((old - new) // 2)
        bounds.append((begin, new - old - begin))
    return pad(b, b.x(node), bounds)


TABLE = {
    "CenterCropPad": _center_crop_pad,
    "Concat": _concat,
    "Constant": _constant,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Flatten": _reshape,
    "Identity": _identity,
    "Reshape": _reshape,
    "Shape": _shape,
    "Size": _size,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _trilu,
    "Unsqueeze": _unsqueeze,
}
"""By ONNX operator."""
