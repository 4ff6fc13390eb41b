"""Pooling: windows with ONNX's paddings and rounding of sizes, which MIL's pooling gets as plain numbers of padding."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.convolution import Window, ints, window


def _windows(b: Lowering, node: ir.Node) -> tuple[Window, Window]:
    """The window as ONNX's attributes say it, and with so much padding after the input that all windows of the result lie inside.

    Raises:
        UnsupportedOpError: A window lies in the padding only: it has no maximum and no average.
    """
    sizes, out = b.shape(node)[2:], b.out_shape(node)[2:]
    if not 1 <= len(sizes) <= 3:
        raise b.refuse(f"{node.op_type} over {len(sizes)} spatial axes", "use 1 to 3 of them")
    given = window(b, node, ints(node, "kernel_shape", ()), sizes)
    reach = [(count - 1) * stride + extent for count, stride, extent in zip(out, given.strides, given.extent, strict=True)]
    needed = [last - size - first for last, size, first in zip(reach, sizes, given.begin, strict=True)]
    end = tuple(max(last, more) for last, more in zip(given.end, needed, strict=True))
    if any((counts == 0).any() for counts in _inside(given, out, sizes, padding=False)):
        raise b.refuse(f"{node.op_type} with windows that lie in the padding only", "use less padding")
    return given, Window(given.kernel, given.strides, given.dilations, given.begin, end)


def _inside(given: Window, out: Sequence[int], sizes: Sequence[int], padding: bool) -> list[np.ndarray]:
    """For each axis, how many elements of each window lie in the input, or in it and its `padding`."""
    counts = []
    for axis, size in enumerate(sizes):
        places = np.arange(out[axis])[:, None] * given.strides[axis] + np.arange(given.kernel[axis]) * given.dilations[axis]
        first, last = (0, size + given.begin[axis] + given.end[axis]) if padding else (given.begin[axis], given.begin[axis] + size)
        counts.append(((places >= first) & (places < last)).sum(axis=1))
    return counts


def _spatial_pad(b: Lowering, x: Any, pad: list[int], value: float) -> Any:
    return b.op("pad", x=x, pad=[0, 0, 0, 0, *pad], mode="constant", constant_val=value) if any(pad) else x


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _max_pool(b: Lowering, node: ir.Node) -> Any:
    if len(node.outputs) > 1 and _is_read(node.outputs[1]):
        raise b.refuse("MaxPool with indices", "do without the second output")
    _, moved = _windows(b, node)
    x = b.x(node) if b.is_float(node) else b.op("cast", x=b.x(node), dtype=b.float_name)
    y = _dilated_max(b, x, moved, b.out_shape(node)[2:]) if max(moved.dilations) > 1 else _pool(b, "max_pool", x, moved)
    return y if b.is_float(node) else b.op("cast", x=y, dtype="int32")


def _pool(b: Lowering, name: str, x: Any, moved: Window, **arguments: Any) -> Any:
    return b.op(name, x=x, kernel_sizes=list(moved.kernel), strides=list(moved.strides), pad_type="custom", pad=moved.pad, **arguments)


def _dilated_max(b: Lowering, x: Any, moved: Window, out: Sequence[int]) -> Any:
    """Axis by axis, the maximum of the strided slices that a window's elements run through: MIL's pooling has no dilation."""
    x = _spatial_pad(b, x, moved.pad, -np.inf)
    for axis, (kernel, stride, dilation, count) in enumerate(zip(moved.kernel, moved.strides, moved.dilations, out, strict=True), 2):
        slices = [_strided(b, x, axis, element * dilation, stride, count) for element in range(kernel)]
        x = functools.reduce(lambda one, other: b.op("maximum", x=one, y=other), slices)
    return x


def _strided(b: Lowering, x: Any, axis: int, first: int, stride: int, count: int) -> Any:
    begin, end, step = [0] * len(x.shape), [int(size) for size in x.shape], [1] * len(x.shape)
    begin[axis], end[axis], step[axis] = first, first + (count - 1) * stride + 1, stride
    return b.op("slice_by_index", x=x, begin=begin, end=end, stride=step)


def _average_pool(b: Lowering, node: ir.Node) -> Any:
    given, moved = _windows(b, node)
    out, sizes = b.out_shape(node)[2:], b.shape(node)[2:]
    with_padding = bool(node.attributes.get_int("count_include_pad", 0))
    if max(moved.dilations) > 1:
        counts = functools.reduce(np.multiply.outer, _inside(given, out, sizes, with_padding))
        return b.op("mul", x=_window_sum(b, b.x(node), moved), y=(1.0 / counts)[None, None])
    if with_padding and moved != given:  # padding counts, what lies beyond it does not
        x = _spatial_pad(b, b.x(node), given.pad, 0.0)
        beyond = tuple(last - before for last, before in zip(moved.end, given.end, strict=True))
        rest = Window(moved.kernel, moved.strides, moved.dilations, (0,) * len(sizes), beyond)
        return _pool(b, "avg_pool", x, rest, exclude_padding_from_average=True)
    return _pool(b, "avg_pool", b.x(node), moved, exclude_padding_from_average=not with_padding)


def _window_sum(b: Lowering, x: Any, moved: Window) -> Any:
    """The sum over each window: a convolution of each channel with ones."""
    channels = int(x.shape[1])
    return b.op(
        "conv",
        x=x,
        weight=np.ones((channels, 1, *moved.kernel), np.float32),
        strides=list(moved.strides),
        pad_type="custom",
        pad=moved.pad,
        dilations=list(moved.dilations),
        groups=channels,
    )


def _lp_pool(b: Lowering, node: ir.Node) -> Any:
    b.half = False  # the powers of float16 numbers overflow early
    _, moved = _windows(b, node)
    p = node.attributes.get_int("p", 2)
    return _root(b, _window_sum(b, _power(b, b.x(node), p), moved), p)


def _power(b: Lowering, x: Any, p: int) -> Any:
    """The p-th power of the magnitude."""
    if p == 2:
        return b.op("square", x=x)
    magnitude = b.op("abs", x=x)
    return magnitude if p == 1 else b.op("pow", x=magnitude, y=float(p))


def _root(b: Lowering, x: Any, p: int) -> Any:
    if p == 2:
        return b.op("sqrt", x=x)
    return x if p == 1 else b.op("pow", x=x, y=1.0 / p)


def _axes(b: Lowering, node: ir.Node) -> list[int]:
    return list(range(2, b.rank(node)))


def _global_average_pool(b: Lowering, node: ir.Node) -> Any:
    return b.op("reduce_mean", x=b.x(node), axes=_axes(b, node), keep_dims=True)


def _global_max_pool(b: Lowering, node: ir.Node) -> Any:
    return b.op("reduce_max", x=b.x(node), axes=_axes(b, node), keep_dims=True)


def _global_lp_pool(b: Lowering, node: ir.Node) -> Any:
    b.half = False
    p = node.attributes.get_int("p", 2)
    return _root(b, b.op("reduce_sum", x=_power(b, b.x(node), p), axes=_axes(b, node), keep_dims=True), p)


def _max_unpool(b: Lowering, node: ir.Node) -> Any:
    raise b.refuse("MaxUnpool", "use ConvTranspose or Resize to enlarge")


def _max_roi_pool(b: Lowering, node: ir.Node) -> Any:
    raise b.refuse("MaxRoiPool", "use RoiAlign")


TABLE = {
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "MaxRoiPool": _max_roi_pool,
    "MaxUnpool": _max_unpool,
}
