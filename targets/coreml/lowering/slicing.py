"""Slices and padding, with known bounds and with bounds that the model computes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.layout import crop, gather, is_bool, is_float, is_variable, nonnegative, piece, reshape, spread, take

_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": ""}
"""MIL's mode by ONNX's; empty where it has none."""


def _slice(b: Lowering, node: ir.Node) -> Any:
    shape = b.shape(node)
    starts, ends = b.known(node, 1), b.known(node, 2)
    axes = _optional(b, node, 3, "axes", range(b.shape(node, 1)[0]), len(shape))
    steps = _optional(b, node, 4, "steps", [1] * len(axes))
    if starts is None or ends is None:
        return _computed_slice(b, node, axes, steps)
    begins, stops, strides, reversed_axes = [0] * len(shape), list(shape), [1] * len(shape), []
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        indices = range(*slice(int(start), int(end), step).indices(shape[axis]))
        if not indices:
            raise b.refuse("an empty tensor", "remove the Slice and what reads it")
        begins[axis], stops[axis], strides[axis] = min(indices[0], indices[-1]), max(indices[0], indices[-1]) + 1, abs(step)
        if step < 0 and len(indices) > 1:
            reversed_axes.append(axis)
    x = crop(b, b.x(node), begins, stops, strides)
    return b.op("reverse", x=x, axes=reversed_axes) if reversed_axes else x


def _optional(b: Lowering, node: ir.Node, index: int, name: str, default: Sequence[int], rank: int = 0) -> list[int]:
    """An optional input that must be known; axes are counted from the front of `rank`."""
    values = [int(value) for value in (b.need_known(node, index, name).reshape(-1) if b.has(node, index) else default)]
    return [value % rank for value in values] if rank else values


def _computed_slice(b: Lowering, node: ir.Node, axes: Sequence[int], steps: Sequence[int]) -> Any:
    """By gathers: how many elements an axis has is static, and where they begin is computed."""
    x, starts = b.x(node), b.x(node, 1)
    shape, wanted = b.shape(node), b.out_shape(node)
    for at, (axis, step) in enumerate(zip(axes, steps, strict=True)):
        start = nonnegative(b, piece(b, starts, 0, at, at + 1), shape[axis])
        start = b.op("minimum", x=b.op("maximum", x=start, y=0), y=shape[axis] if step > 0 else shape[axis] - 1)
        x = gather(b, x, _within(b, b.op("add", x=start, y=np.arange(wanted[axis]) * step), shape[axis]), axis)
    return x


def _within(b: Lowering, indices: Any, size: int) -> Any:
    return b.op("minimum", x=b.op("maximum", x=indices, y=0), y=size - 1)


def _pad(b: Lowering, node: ir.Node) -> Any:
    shape, mode = b.shape(node), node.attributes.get_string("mode", "constant")
    if mode not in _MODES:
        raise b.refuse(f"Pad with mode '{mode}'", f"use one of {', '.join(_MODES)}")
    axes = _optional(b, node, 3, "axes", range(len(shape)), len(shape))
    pads = b.known(node, 1)
    x = b.x(node)
    fill = _fill(b, node, x)
    if pads is None:
        return _computed_pad(b, node, axes, mode, fill)
    bounds = [(0, 0)] * len(shape)
    for at, axis in enumerate(axes):
        bounds[axis] = int(pads[at]), int(pads[at + len(axes)])
    return pad(b, x, bounds, mode, fill)


def _fill(b: Lowering, node: ir.Node, x: Any) -> Any:
    """The padding value: a number, or a variable of rank 0 or 1."""
    if not b.has(node, 2):
        return 0
    known = b.known(node, 2)
    return b.x(node, 2) if known is None else known.reshape(-1)[0] if known.size else 0


def pad(b: Lowering, x: Any, bounds: Sequence[tuple[int, int]], mode: str = "constant", fill: Any = 0) -> Any:
    """`x` with elements added before and after each axis; a negative number removes them.

    Raises:
        UnsupportedOpError: Nothing is left.
    """
    shape = list(x.shape)
    x = crop(
        b, x, [max(-before, 0) for before, _ in bounds], [size + min(after, 0) for size, (_, after) in zip(shape, bounds, strict=True)]
    )
    added = [(max(before, 0), max(after, 0)) for before, after in bounds]
    if not any(before or after for before, after in added):
        return x
    if _has_operator(x, added, mode, fill):
        flat = [count for pair in added for count in pair]
        return b.op("pad", x=x, pad=flat, mode=_MODES[mode], constant_val=float(fill) if mode == "constant" else None)
    for axis, (before, after) in enumerate(added):
        if not before and not after:
            continue
        if mode == "constant":
            x = _extend(b, x, axis, before, after, fill)
        else:
            x = take(b, x, np.pad(np.arange(x.shape[axis]), (before, after), mode), axis)  # type: ignore[call-overload]
    return x


def _has_operator(x: Any, added: Sequence[tuple[int, int]], mode: str, fill: Any) -> bool:
    """Whether MIL's pad does it: floats, a known value, and reflection or repetition within the size of the last two axes."""
    if not is_float(x) or not _MODES[mode]:
        return False
    if mode == "constant":
        return not is_variable(fill)
    reach = 1 if mode == "reflect" else 0
    outer_free = not any(before or after for before, after in added[:-2])
    return outer_free and len(added) > 2 and all(max(pair) <= size - reach for pair, size in zip(added, x.shape, strict=True))


def _extend(b: Lowering, x: Any, axis: int, before: int, after: int, fill: Any) -> Any:
    """`x` with blocks of one value at the ends of an axis."""

    def block(count: int) -> Any:
        shape = [count if at == axis else size for at, size in enumerate(x.shape)]
        if is_variable(fill):
            return spread(b, reshape(b, fill, [1] * len(shape)), shape)
        return b.var(np.full(shape, fill, bool if is_bool(x) else np.float32 if is_float(x) else np.int64))

    parts = [x if count is None else block(count) for count in (before, None, after) if count != 0]
    return b.op("concat", values=parts, axis=axis)


def _computed_pad(b: Lowering, node: ir.Node, axes: Sequence[int], mode: str, fill: Any) -> Any:
    """By gathers: the sizes are static, and how many elements come before the tensor is computed."""
    if mode not in ("constant", "edge"):
        raise b.refuse(f"Pad with mode '{mode}' and computed 'pads'", "make the pads a constant of the graph")
    x, pads, shape, wanted = b.x(node), b.x(node, 1), b.shape(node), b.out_shape(node)
    masks = []
    for at, axis in enumerate(axes):
        places = b.op("sub", x=np.arange(wanted[axis]), y=piece(b, pads, 0, at, at + 1))
        inside = b.op("logical_and", x=b.op("greater_equal", x=places, y=0), y=b.op("less", x=places, y=shape[axis]))
        masks.append(reshape(b, inside, [wanted[axis] if other == axis else 1 for other in range(len(shape))]))
        x = gather(b, x, _within(b, places, shape[axis]), axis)
    if mode == "edge":
        return x
    mask = functools.reduce(lambda one, other: b.op("logical_and", x=one, y=other), masks)
    value = fill if is_variable(fill) else b.var(np.asarray(fill, bool if is_bool(x) else np.float32 if is_float(x) else np.int64))
    return b.op("select", cond=mask, a=x, b=reshape(b, value, [1] * len(shape)))


TABLE = {"Pad": _pad, "Slice": _slice}
"""By ONNX operator."""
