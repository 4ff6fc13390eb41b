"""Reductions, running sums, and the largest elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.broadcasting import reshaped
from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.integers import divide, grows, wrap

_FLOAT_ONLY = frozenset({"ReduceL2", "ReduceLogSum", "ReduceLogSumExp"})
"""Results that are rounded to integers where the operands are integers, by rules that ONNX leaves open."""
_KEEP_RANGE = frozenset({"ReduceMax", "ReduceMin", "ReduceMean"})


def _reduce(name: str) -> Callable[[Lowering, ir.Node], Any]:
    def lower(b: Lowering, node: ir.Node) -> Any:
        axes, keep = _axes(b, node), node.attributes.get_int("keepdims", 1) != 0
        x = b.x(node)
        dtype = b.dtype(node)
        if dtype == ir.DataType.BOOL:
            x = b.op("cast", x=x, dtype="int32")
        elif not b.is_float(node):
            if node.op_type in _FLOAT_ONLY:
                raise b.refuse(f"{node.op_type} of integers", "cast to float first")
            if node.op_type not in _KEEP_RANGE:
                grows(b, node)
        result = _reduced(b, name, x, axes, keep, b.is_float(node))
        return b.op("not_equal", x=result, y=0) if dtype == ir.DataType.BOOL else wrap(b, result, dtype)

    return lower


def _reduced(b: Lowering, name: str, x: Any, axes: list[int], keep: bool, is_float: bool) -> Any:
    shape = tuple(x.shape)
    if not axes:  # an axis of size 1 is reduced: what the operator does besides adding, such as taking squares, remains
        return reshaped(b, b.op(name, x=reshaped(b, x, (math.prod(shape), 1)), axes=[1], keep_dims=False), shape)
    if name == "reduce_mean" and not is_float:
        total = b.op("reduce_sum", x=x, axes=axes, keep_dims=keep)
        return divide(b, total, math.prod(shape[axis] for axis in axes))
    return b.op(name, x=x, axes=axes, keep_dims=keep)


def _axes(b: Lowering, node: ir.Node) -> list[int]:
    """The axes, from the input or the attribute; none of them means all, or none if the node says so."""
    rank = b.rank(node)
    given = b.need_known(node, 1, "axes").reshape(-1).tolist() if b.has(node, 1) else list(node.attributes.get_ints("axes", ()))
    if not given and node.attributes.get_int("noop_with_empty_axes", 0) == 0:
        return list(range(rank))
    return [int(axis) % rank for axis in given]


def first_index(b: Lowering, x: Any, axis: int, extreme: str, last: bool = False) -> tuple[np.ndarray, Any]:
    """Indices along `axis` in a shape that broadcasts with `x`, and which of them is the first (or last) extreme element, the axis kept.

    MIL's reduce_argmax and reduce_argmin leave open which of several equal elements they take; ONNX does not.
    """
    size = int(x.shape[axis])
    places = np.arange(size, dtype=np.int32).reshape([size if place == axis else 1 for place in range(len(x.shape))])
    best = b.op("cast", x=b.op("equal", x=x, y=b.op(extreme, x=x, axes=[axis], keep_dims=True)), dtype="int32")
    reach = places if last else size - 1 - places
    farthest = b.op("reduce_max", x=b.op("mul", x=best, y=b.var(reach)), axes=[axis], keep_dims=True)
    return places, farthest if last else b.op("sub", x=size - 1, y=farthest)


def _arg(extreme: str) -> Callable[[Lowering, ir.Node], Any]:
    def lower(b: Lowering, node: ir.Node) -> Any:
        axis = int(node.attributes.get_int("axis", 0)) % b.rank(node)
        _, found = first_index(b, b.x(node), axis, extreme, node.attributes.get_int("select_last_index", 0) != 0)
        return found if node.attributes.get_int("keepdims", 1) else b.op("squeeze", x=found, axes=[axis])

    return lower


def _running_axis(b: Lowering, node: ir.Node) -> int:
    return int(b.need_known(node, 1, "axis").reshape(())) % b.rank(node)


def _cumsum(b: Lowering, node: ir.Node) -> Any:
    grows(b, node)
    return b.op(
        "cumsum",
        x=b.x(node),
        axis=_running_axis(b, node),
        exclusive=node.attributes.get_int("exclusive", 0) != 0,
        reverse=node.attributes.get_int("reverse", 0) != 0,
    )


def _cumprod(b: Lowering, node: ir.Node) -> Any:
    """CumProd, which MIL lacks: each element times the one 1, 2, 4, … places before it (Hillis and Steele's scan)."""
    grows(b, node)
    x, axis = b.x(node), _running_axis(b, node)
    reverse = node.attributes.get_int("reverse", 0) != 0
    size = int(x.shape[axis])
    if node.attributes.get_int("exclusive", 0):
        x = _shifted(b, x, axis, 1, reverse, b.is_float(node))
    distance = 1
    while distance < size:
        x = b.op("mul", x=x, y=_shifted(b, x, axis, distance, reverse, b.is_float(node)))
        distance *= 2
    return x


def _shifted(b: Lowering, x: Any, axis: int, distance: int, back: bool, is_float: bool) -> Any:
    """`x` moved along `axis`, with ones for what comes in."""
    shape = tuple(int(size) for size in x.shape)
    ones = b.var(
        np.ones([distance if place == axis else size for place, size in enumerate(shape)], dtype=np.float32 if is_float else np.int32)
    )
    if distance == shape[axis]:
        return ones
    start = [distance if back and place == axis else 0 for place in range(len(shape))]
    sizes = [size - distance if place == axis else size for place, size in enumerate(shape)]
    kept = b.op("slice_by_size", x=x, begin=start, size=sizes)
    return b.op("concat", values=[kept, ones] if back else [ones, kept], axis=axis)


def _topk(b: Lowering, node: ir.Node) -> Any:
    """TopK: Apple does not document which of several equal elements MIL's topk takes first; the values are the same."""
    k = int(b.need_known(node, 1, "K").reshape(()))
    axis = int(node.attributes.get_int("axis", -1)) % b.rank(node)
    if k == 0:
        raise b.refuse("TopK with K = 0, whose result is empty", "remove it")
    return b.op("topk", x=b.x(node), k=k, axis=axis, ascending=node.attributes.get_int("largest", 1) == 0)


_REDUCTIONS = {
    "ReduceSum": "reduce_sum", "ReduceMean": "reduce_mean", "ReduceMax": "reduce_max", "ReduceMin": "reduce_min",
    "ReduceProd": "reduce_prod", "ReduceL1": "reduce_l1_norm", "ReduceL2": "reduce_l2_norm",
    "ReduceLogSum": "reduce_log_sum", "ReduceLogSumExp": "reduce_log_sum_exp",
    "ReduceSumSquare": "reduce_sum_square",
}  # fmt: skip

TABLE: dict[str, Callable[[Lowering, ir.Node], Any]] = {
    **{name: _reduce(mil) for name, mil in _REDUCTIONS.items()},
    "ArgMax": _arg("reduce_max"),
    "ArgMin": _arg("reduce_min"),
    "CumSum": _cumsum,
    "CumProd": _cumprod,
    "TopK": _topk,
}
