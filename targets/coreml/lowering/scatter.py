"""Writing elements by index."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.integers import wrap
from edgekit.targets.coreml.lowering.layout import axis_of, expand_dims, nonnegative, read_indices, reshape, spread, through_int

_MODES = {"none": "update", "add": "add", "mul": "mul", "max": "max", "min": "min"}
"""MIL's mode by ONNX's reduction."""


def _mode(b: Lowering, node: ir.Node) -> str:
    reduction = node.attributes.get_string("reduction", "none")
    if reduction not in _MODES:
        raise b.refuse(f"{node.op_type} with reduction '{reduction}'", f"use one of {', '.join(_MODES)}")
    return _MODES[reduction]


def _in_range(b: Lowering, node: ir.Node, result: Any) -> Any:
    """What was added or multiplied into narrow integers keeps their lower bits."""
    dtype, reduction = node.outputs[0].dtype, node.attributes.get_string("reduction", "none")
    return wrap(b, result, dtype) if dtype is not None and reduction in ("add", "mul") else result


def _scatter_elements(b: Lowering, node: ir.Node) -> Any:
    return _in_range(b, node, _scattered_elements(b, node))


def _scatter_nd(b: Lowering, node: ir.Node) -> Any:
    return _in_range(b, node, _scattered_slices(b, node))


def _scattered_elements(b: Lowering, node: ir.Node) -> Any:
    shape, index_shape = b.shape(node), b.shape(node, 1)
    axis, mode = axis_of(node, len(shape)), _mode(b, node)
    indices = read_indices(b, node, 1, shape[axis])
    data, updates = b.x(node), b.x(node, 2)
    if all(at == axis or size == index_shape[at] for at, size in enumerate(shape)):
        return through_int(
            b, lambda into, new: b.op("scatter_along_axis", data=into, indices=indices, updates=new, axis=axis, mode=mode), data, updates
        )
    places = _coordinates(b, indices, index_shape, axis)
    return through_int(b, lambda into, new: b.op("scatter_nd", data=into, indices=places, updates=new, mode=mode), data, updates)


def _coordinates(b: Lowering, indices: Any, shape: tuple[int, ...], axis: int) -> Any:
    """The whole coordinates of each element of ScatterElements, for updates that cover a part of the other axes only."""
    if len(shape) > 4:
        raise b.refuse("ScatterElements of rank 5 with updates smaller than the data", "reshape it to rank 4")
    grid = list(np.indices(shape))
    if isinstance(indices, np.ndarray):
        grid[axis] = indices
        return np.stack(grid, axis=-1)
    parts = [expand_dims(b, indices if at == axis else b.var(places), [len(shape)]) for at, places in enumerate(grid)]
    return b.op("concat", values=parts, axis=len(shape))


def _scattered_slices(b: Lowering, node: ir.Node) -> Any:
    shape, depth, mode = b.shape(node), b.shape(node, 1)[-1], _mode(b, node)
    indices = read_indices(b, node, 1, np.array(shape[:depth]))
    return through_int(b, lambda into, new: b.op("scatter_nd", data=into, indices=indices, updates=new, mode=mode), b.x(node), b.x(node, 2))


def _tensor_scatter(b: Lowering, node: ir.Node) -> Any:
    """Updates of a cache: those of each sequence of the batch go to consecutive places from where write_indices says."""
    shape, written = b.shape(node), b.shape(node, 1)
    axis, mode = node.attributes.get_int("axis", -2) % len(shape), node.attributes.get_string("mode", "linear")
    if axis == 0 or mode not in ("linear", "circular"):
        raise b.refuse(f"TensorScatter with axis {axis} and mode '{mode}'", "use an axis after the batch, mode linear or circular")
    first: Any = np.zeros(shape[0], np.int64) if not b.has(node, 2) else b.known(node, 2)
    steps = np.arange(written[axis]).reshape([-1 if at == axis else 1 for at in range(len(shape))])
    by_batch = [shape[0], *[1] * (len(shape) - 1)]
    if first is not None:
        places: Any = np.broadcast_to(first.reshape(by_batch) + steps, written)
        indices: Any = places % shape[axis] if mode == "circular" else nonnegative(b, places, shape[axis])
    else:
        places = b.op("add", x=reshape(b, b.x(node, 2), by_batch), y=steps)
        indices = spread(b, b.op("mod", x=places, y=shape[axis]) if mode == "circular" else places, written)
    return through_int(
        b,
        lambda into, new: b.op("scatter_along_axis", data=into, indices=indices, updates=new, axis=axis, mode="update"),
        b.x(node),
        b.x(node, 1),
    )


TABLE = {
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TensorScatter": _tensor_scatter,
}
"""By ONNX operator."""
