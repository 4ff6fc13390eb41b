"""Normalizations. MIL's own take constant parameters and few ranks; the others are computed from the mean and what is left around it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.linear import widen

_SMALLEST_HALF = 2.0**-24


def epsilon(b: Lowering, node: ir.Node) -> float:
    """The node's epsilon; where float16 would round it to zero, the smallest number above: a constant row is 0, not NaN."""
    value = node.attributes.get_float("epsilon", 1e-5)
    return max(value, _SMALLEST_HALF) if b.half and value > 0 else value


def _is_read(node: ir.Node, index: int) -> bool:
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()


def _along(b: Lowering, node: ir.Node, index: int, rank: int, axis: int = 1) -> Any:
    """The vector of an input, in a shape that lies along `axis` of a value of `rank`."""
    shape = [1] * rank
    shape[axis] = -1
    array = b.known(node, index)
    return array.reshape(shape) if array is not None else b.op("reshape", x=b.x(node, index), shape=shape)


def _affine(b: Lowering, x: Any, scale: Any, shift: Any) -> Any:
    y = b.op("mul", x=x, y=scale)
    return y if shift is None else b.op("add", x=y, y=shift)


def _batch_normalization(b: Lowering, node: ir.Node) -> Any:
    if node.attributes.get_int("training_mode", 0) or any(_is_read(node, index) for index in range(1, len(node.outputs))):
        raise b.refuse("BatchNormalization in training mode", "export the model in evaluation mode")
    known = [b.known(node, index) for index in range(1, 5)]
    rank = b.rank(node)
    if any(array is None for array in known):
        b.half = False  # computed variances may be below float16's range
        scale, shift, mean, variance = (_along(b, node, index, rank) for index in range(1, 5))
        deviation = b.op("sqrt", x=b.op("add", x=b.var(variance), y=epsilon(b, node)))
        return _affine(b, b.op("real_div", x=b.op("sub", x=b.x(node), y=mean), y=deviation), scale, shift)
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in known)
    gamma = gamma / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    widen(b, gamma, beta, mean)
    if 3 <= rank <= 5:  # the variance is in gamma: in float16 it could round to zero
        ones = np.ones(len(gamma), np.float32)
        return b.op("batch_norm", x=b.x(node), mean=mean, variance=ones, gamma=gamma, beta=beta, epsilon=0.0)
    lie = [1, -1] if rank == 2 else [-1]
    return _affine(b, b.op("sub", x=b.x(node), y=mean.reshape(lie)), gamma.reshape(lie), beta.reshape(lie))


def _instance_normalization(b: Lowering, node: ir.Node) -> Any:
    rank = b.rank(node)
    gamma, beta = b.known(node, 1), b.known(node, 2)
    if 3 <= rank <= 4 and gamma is not None and beta is not None:
        return b.op("instance_norm", x=b.x(node), gamma=gamma, beta=beta, epsilon=epsilon(b, node))
    y = b.op("layer_norm", x=b.x(node), axes=list(range(2, rank)), epsilon=epsilon(b, node))
    return _affine(b, y, _along(b, node, 1, rank), _along(b, node, 2, rank))


def _group_normalization(b: Lowering, node: ir.Node) -> Any:
    shape = b.shape(node)
    groups = node.attributes.get_int("num_groups", 0)
    x = b.op("reshape", x=b.x(node), shape=[shape[0], groups, -1])
    y = b.op("reshape", x=b.op("layer_norm", x=x, axes=[-1], epsilon=epsilon(b, node)), shape=list(shape))
    return _affine(b, y, *(_per_channel(b, node, index, shape[1]) for index in (1, 2)))


def _per_channel(b: Lowering, node: ir.Node, index: int, channels: int) -> Any:
    """Scale or bias of GroupNormalization: one number per channel, or per group before opset 21."""
    rank = b.rank(node)
    (count,) = b.shape(node, index)
    if count == channels:
        return _along(b, node, index, rank)
    array = b.known(node, index)
    if array is not None:
        return np.repeat(array, channels // count).reshape([1, -1] + [1] * (rank - 2))
    tiled = b.op("tile", x=b.op("reshape", x=b.x(node, index), shape=[count, 1]), reps=[1, channels // count])
    return b.op("reshape", x=tiled, shape=[1, channels] + [1] * (rank - 2))


def _normalized_axes(b: Lowering, node: ir.Node) -> list[int]:
    rank = b.rank(node)
    return list(range(node.attributes.get_int("axis", -1) % rank, rank))


def _layer_normalization(b: Lowering, node: ir.Node) -> Any:
    axes = _normalized_axes(b, node)
    inner = b.shape(node)[axes[0] :]
    scale = _inner_parameter(b, node, 1, inner)
    shift = _inner_parameter(b, node, 2, inner) if b.has(node, 2) else np.zeros(inner, np.float32)
    if scale is not None and shift is not None:
        y = b.op("layer_norm", x=b.x(node), axes=axes, gamma=scale, beta=shift, epsilon=epsilon(b, node))
    else:
        y = b.op("layer_norm", x=b.x(node), axes=axes, epsilon=epsilon(b, node))
        y = _affine(b, y, b.x(node, 1), b.x(node, 2) if b.has(node, 2) else None)
    if not _is_read(node, 1) and not _is_read(node, 2):
        return y
    b.half = False  # as stash_type says
    mean = b.op("reduce_mean", x=b.x(node), axes=axes, keep_dims=True)
    variance = _mean_of_squares(b, b.op("sub", x=b.x(node), y=mean), axes)
    inverse = b.op("real_div", x=1.0, y=b.op("sqrt", x=b.op("add", x=variance, y=epsilon(b, node))))
    return y, mean, inverse


def _inner_parameter(b: Lowering, node: ir.Node, index: int, inner: tuple[int, ...]) -> np.ndarray | None:
    """A constant scale or bias in the shape of the normalized axes, the only one that MIL takes; None where it has no such form."""
    array = b.known(node, index)
    if array is None or (array.ndim > len(inner) and any(size != 1 for size in array.shape[: array.ndim - len(inner)])):
        return None
    array = array.reshape(array.shape[max(array.ndim - len(inner), 0) :])
    return np.ascontiguousarray(np.broadcast_to(array, inner))


def _mean_of_squares(b: Lowering, x: Any, axes: list[int]) -> Any:
    return b.op("reduce_mean", x=b.op("square", x=x), axes=axes, keep_dims=True)


def _rms_normalization(b: Lowering, node: ir.Node) -> Any:
    axes, x = _normalized_axes(b, node), b.x(node)
    if b.half:
        y = _rms_by_layer_norm(b, x, axes, epsilon(b, node))
    else:
        root = b.op("sqrt", x=b.op("add", x=_mean_of_squares(b, x, axes), y=epsilon(b, node)))
        y = b.op("real_div", x=x, y=root)
    return b.op("mul", x=y, y=b.x(node, 1))


def _rms_by_layer_norm(b: Lowering, x: Any, axes: list[int], small: float) -> Any:
    """Numbers beside their negatives have a mean of 0 and a variance of their mean square: no square has to be held in float16."""
    shape = [int(size) for size in x.shape]
    both = b.op("concat", values=[x, b.op("mul", x=x, y=-1.0)], axis=axes[0])
    y = b.op("layer_norm", x=both, axes=axes, epsilon=small)
    return b.op("slice_by_index", x=y, begin=[0] * len(shape), end=shape)


def _lp_normalization(b: Lowering, node: ir.Node) -> Any:
    p, axis = node.attributes.get_int("p", 2), node.attributes.get_int("axis", -1)
    b.half = False  # squares of float16 numbers overflow early
    x = b.x(node)
    if p == 1:
        norm = b.op("reduce_sum", x=b.op("abs", x=x), axes=[axis], keep_dims=True)
    elif p == 2:
        norm = b.op("sqrt", x=b.op("reduce_sum", x=b.op("square", x=x), axes=[axis], keep_dims=True))
    else:
        raise b.refuse(f"LpNormalization with p = {p}", "use p = 1 or 2")
    # where the norm is 0 the numbers are too, and so is the result
    return b.op("real_div", x=x, y=b.op("select", cond=b.op("equal", x=norm, y=0.0), a=b.op("add", x=norm, y=1.0), b=norm))


def _lrn(b: Lowering, node: ir.Node) -> Any:
    """Core ML does not say where a window of an even number of channels lies, and its operator has rank 4 at most."""
    size = node.attributes.get_int("size", 0)
    alpha, beta, bias = (node.attributes.get_float(name, value) for name, value in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    shape = b.shape(node)
    if size % 2 and 3 <= len(shape) <= 4 and not b.half:
        return b.op("local_response_norm", x=b.x(node), size=size, alpha=alpha, beta=beta, k=bias)
    b.half = False  # squares of float16 numbers overflow early, and alpha is small
    x = b.x(node)
    flat = b.op("reshape", x=b.op("square", x=x), shape=[shape[0], 1, shape[1], -1])
    pad = [(size - 1) // 2, size // 2, 0, 0]
    mean = b.op("avg_pool", x=flat, kernel_sizes=[size, 1], strides=[1, 1], pad_type="custom", pad=pad, exclude_padding_from_average=False)
    base = b.op("add", x=b.op("mul", x=b.op("reshape", x=mean, shape=list(shape)), y=alpha), y=bias)
    return b.op("real_div", x=x, y=b.op("pow", x=base, y=beta))


def _mean_variance_normalization(b: Lowering, node: ir.Node) -> Any:
    """ONNX adds 1e-9 to the deviation, not to the variance."""
    b.half = False
    axes = [int(axis) for axis in node.attributes.get_ints("axes", [0, 2, 3])]
    centered = b.op("sub", x=b.x(node), y=b.op("reduce_mean", x=b.x(node), axes=axes, keep_dims=True))
    deviation = b.op("sqrt", x=_mean_of_squares(b, centered, axes))
    return b.op("real_div", x=centered, y=b.op("add", x=deviation, y=1e-9))


TABLE = {
    "BatchNormalization": _batch_normalization,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LRN": _lrn,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
    "RMSNormalization": _rms_normalization,
}
