"""Reading elements by index: the Gather family, selections, one-hot vectors, and tensors that follow from a shape or a range."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.layout import (
    axis_of,
    cast,
    crop,
    expand_dims,
    gather,
    is_float,
    out_dtype,
    piece,
    read_indices,
    refuser,
    reshape,
    spread,
    take,
    through_int,
)


def _gather(b: Lowering, node: ir.Node) -> Any:
    x = b.x(node)
    axis = axis_of(node, b.rank(node))
    indices = read_indices(b, node, 1, b.shape(node)[axis])
    if not isinstance(indices, np.ndarray) or indices.ndim > 1:
        return gather(b, x, indices, axis)
    if indices.ndim == 1:
        return take(b, x, indices, axis)
    return b.op("squeeze", x=piece(b, x, axis, int(indices), int(indices) + 1), axes=[axis])


def _gather_elements(b: Lowering, node: ir.Node) -> Any:
    shape, wanted = b.shape(node), b.shape(node, 1)
    axis = axis_of(node, len(shape))
    ends = [size if at == axis else wanted[at] for at, size in enumerate(shape)]  # MIL wants equal sizes on the other axes
    x = crop(b, b.x(node), [0] * len(shape), ends)
    indices = read_indices(b, node, 1, shape[axis])
    return through_int(b, lambda data: b.op("gather_along_axis", x=data, indices=indices, axis=axis), x)


def _gather_nd(b: Lowering, node: ir.Node) -> Any:
    batch = node.attributes.get_int("batch_dims", 0)
    shape, index_shape = b.shape(node), b.shape(node, 1)
    depth = index_shape[-1]
    indices = read_indices(b, node, 1, np.array(shape[batch : batch + depth]))
    if not batch:
        return through_int(b, lambda data: b.op("gather_nd", x=data, indices=indices), b.x(node))
    return _gather_in_batches(b, node, indices, batch)


def _gather_in_batches(b: Lowering, node: ir.Node, indices: Any, batch: int) -> Any:
    """GatherND with batch axes as a gather of rows: `gather_nd` has batch axes from iOS16 on only."""
    shape, index_shape = b.shape(node), b.shape(node, 1)
    depth = index_shape[-1]
    count, inner, rest = math.prod(shape[:batch]), math.prod(shape[batch : batch + depth]), shape[batch + depth :]
    strides = np.array([math.prod(shape[batch + at + 1 : batch + depth]) for at in range(depth)])
    offsets = np.arange(count).reshape(count, 1) * inner
    flat = [count, math.prod(index_shape[batch:-1]), depth]
    if isinstance(indices, np.ndarray):
        rows: Any = (indices.reshape(flat) * strides).sum(-1) + offsets
        rows = rows.reshape(-1)
    else:
        places = b.op("reduce_sum", x=b.op("mul", x=reshape(b, indices, flat), y=strides), axes=[-1], keep_dims=False)
        rows = reshape(b, b.op("add", x=places, y=offsets), [-1])
    table = reshape(b, b.x(node), [count * inner, math.prod(rest)])
    return reshape(b, gather(b, table, rows, 0), b.out_shape(node))


def _one_hot(b: Lowering, node: ir.Node) -> Any:
    """By comparison with a range: MIL's `one_hot` does not say what indices out of range become, in ONNX they are all `off`."""
    depth_input = b.known(node, 1)
    rank = b.rank(node) + 1
    axis = axis_of(node, rank, -1)
    depth = int(depth_input.reshape(-1)[0]) if depth_input is not None else b.out_shape(node)[axis]
    if b.is_float(node) and b.half and depth > 2048:
        raise b.refuse("OneHot of float16 indices beyond 2048", "give integer indices")
    indices = cast(b, b.x(node), "int32")
    range_shape = [depth if at == axis else 1 for at in range(rank)]
    places = np.arange(depth).reshape(range_shape)
    column = expand_dims(b, indices, [axis])
    wrapped = b.op("select", cond=b.op("greater_equal", x=column, y=0), a=column, b=b.op("add", x=column, y=depth))
    hot = b.op("equal", x=wrapped, y=places)
    return _choose(b, node, hot)


def _choose(b: Lowering, node: ir.Node, hot: Any) -> Any:
    """The two values of OneHot, `off` and `on`, by a mask."""
    known, values = b.known(node, 2), b.x(node, 2)
    if known is not None and known.tolist() == [0, 1]:
        return cast(b, hot, values.dtype.__name__)
    ones = [1] * len(hot.shape)
    off, on = (reshape(b, piece(b, values, 0, at, at + 1), ones) for at in (0, 1))
    return b.op("select", cond=hot, a=on, b=spread(b, off, hot.shape))


def _non_zero(b: Lowering, node: ir.Node) -> Any:
    known = b.known(node, 0)
    if known is None:
        raise b.refuse("NonZero of a computed tensor, whose result has no static shape", "use masks: Where or Mul")
    return np.array(np.nonzero(np.atleast_1d(known)), np.int64)


def _compress(b: Lowering, node: ir.Node) -> Any:
    chosen = np.flatnonzero(b.need_known(node, 1, "condition"))
    if not chosen.size:
        raise b.refuse("an empty tensor", "remove the node and what reads it")
    x = b.x(node)
    if "axis" not in node.attributes:
        return take(b, reshape(b, x, [math.prod(b.shape(node))]), chosen, 0)
    return take(b, x, chosen, axis_of(node, b.rank(node)))


def _reverse_sequence(b: Lowering, node: ir.Node) -> Any:
    attributes = node.attributes
    lengths = b.known(node, 1)
    return b.op(
        "reverse_sequence",
        x=b.x(node),
        lengths=b.x(node, 1) if lengths is None else lengths,
        seq_axis=attributes.get_int("time_axis", 0) % b.rank(node),
        batch_axis=attributes.get_int("batch_axis", 1) % b.rank(node),
    )


def _eye_like(b: Lowering, node: ir.Node) -> Any:
    rows, columns = b.shape(node)
    return np.eye(rows, columns, node.attributes.get_int("k", 0), out_dtype(node))


def _constant_of_shape(b: Lowering, node: ir.Node) -> Any:
    known = b.known(node, 0)
    shape = b.out_shape(node) if known is None else tuple(int(size) for size in known)
    value = node.attributes.get_tensor("value", None)
    return np.full(shape, np.float32(0) if value is None else value.numpy().reshape(-1)[0])


def _range(b: Lowering, node: ir.Node) -> Any:
    start, limit, step = (b.known(node, index) for index in range(3))
    if start is not None and limit is not None and step is not None:
        first, last, by = (array.reshape(-1)[0] for array in (start, limit, step))
        return (first + np.arange(max(math.ceil((last - first) / by), 0)) * by).astype(start.dtype)
    (count,) = b.out_shape(node)
    if not count:
        raise b.refuse("an empty tensor", "remove the node and what reads it")
    by, first = (reshape(b, b.x(node, index), [1]) for index in (2, 0))
    steps = np.arange(count, dtype=np.float64) if is_float(by) else np.arange(count)
    return b.op("add", x=b.op("mul", x=by, y=steps), y=first)


_RANDOM = refuser("random numbers that differ from run to run", "give the random tensor to the model as an input")
TABLE = {
    "Bernoulli": _RANDOM,
    "Compress": _compress,
    "ConstantOfShape": _constant_of_shape,
    "EyeLike": _eye_like,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Multinomial": _RANDOM,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "RandomNormal": _RANDOM,
    "RandomNormalLike": _RANDOM,
    "RandomUniform": _RANDOM,
    "RandomUniformLike": _RANDOM,
    "Range": _range,
    "ReverseSequence": _reverse_sequence,
    "Unique": refuser("Unique, whose result has no static shape", "compute it outside the model"),
}
"""By ONNX operator."""
