"""Moves of elements that the lowerings of several subjects share: new shapes, pieces, selections along an axis, repetition.

MIL moves booleans by few operators and reads negative indices on some versions only, so both are settled here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering


def is_bool(x: Any) -> bool:
    """Whether a MIL variable holds booleans."""
    return bool(x.dtype.__name__ == "bool")


def is_float(x: Any) -> bool:
    """Whether a MIL variable holds floating-point numbers."""
    return bool(x.dtype.__name__.startswith("fp"))


def is_variable(x: Any) -> bool:
    """Whether `x` is a MIL variable, and not a number or an array."""
    return not isinstance(x, (np.ndarray, np.generic, bool, int, float))


def cast(b: Lowering, x: Any, dtype: str) -> Any:
    """`x` in MIL's type `dtype`."""
    return x if x.dtype.__name__ == dtype else b.op("cast", x=x, dtype=dtype)


def through_int(b: Lowering, function: Callable[..., Any], *xs: Any) -> Any:
    """`function` of the variables; booleans go through int32, for operators that have no form for them."""
    if not any(is_bool(x) for x in xs):
        return function(*xs)
    return b.op("cast", x=function(*(cast(b, x, "int32") if is_bool(x) else x for x in xs)), dtype="bool")


def reshape(b: Lowering, x: Any, shape: Sequence[int]) -> Any:
    """The elements of `x` in another shape, rank 0 included."""
    shape = [int(size) for size in shape]
    if list(x.shape) == shape:
        return x
    if not shape:
        flat = reshape(b, x, [1])
        return b.op("squeeze", x=flat, axes=[0])
    if not x.shape:
        return reshape(b, b.op("expand_dims", x=x, axes=[0]), shape)
    return b.op("reshape", x=x, shape=shape)


def expand_dims(b: Lowering, x: Any, axes: Sequence[int]) -> Any:
    """`x` with new axes of size 1."""
    return b.op("expand_dims", x=x, axes=[int(axis) for axis in axes]) if axes else x


def transpose(b: Lowering, x: Any, order: Sequence[int]) -> Any:
    """`x` with its axes in another order."""
    return x if list(order) == list(range(len(order))) else b.op("transpose", x=x, perm=[int(axis) for axis in order])


def tile(b: Lowering, x: Any, repeats: Sequence[int]) -> Any:
    """`x` repeated along each axis."""
    return x if all(count == 1 for count in repeats) else b.op("tile", x=x, reps=[int(count) for count in repeats])


def spread(b: Lowering, x: Any, shape: Sequence[int]) -> Any:
    """`x` broadcast to `shape`, as numpy does it."""
    aligned = reshape(b, x, [1] * (len(shape) - len(x.shape)) + list(x.shape))
    return tile(b, aligned, [new // old for new, old in zip(shape, aligned.shape, strict=True)])


def crop(b: Lowering, x: Any, begins: Sequence[int], ends: Sequence[int], strides: Sequence[int] | None = None) -> Any:
    """The elements from `begins` up to but not including `ends`, all within the shape, in positive strides.

    Raises:
        UnsupportedOpError: None are left.
    """
    strides = strides or [1] * len(begins)
    if any(end <= begin for begin, end in zip(begins, ends, strict=True)):
        raise b.refuse("an empty tensor", "remove the node and what reads it")
    if not any(begins) and list(ends) == list(x.shape) and all(stride == 1 for stride in strides):
        return x
    whole = [int(value) for value in strides] if any(stride != 1 for stride in strides) else None
    return b.op("slice_by_index", x=x, begin=[int(value) for value in begins], end=[int(value) for value in ends], stride=whole)


def piece(b: Lowering, x: Any, axis: int, begin: int, end: int, stride: int = 1) -> Any:
    """The elements from `begin` up to but not including `end` along one axis."""
    begins, ends, strides = [0] * len(x.shape), list(x.shape), [1] * len(x.shape)
    begins[axis], ends[axis], strides[axis] = begin, end, stride
    return crop(b, x, begins, ends, strides)


def take(b: Lowering, x: Any, indices: np.ndarray, axis: int) -> Any:
    """The elements at known, non-negative indices along one axis; by a slice where they are evenly spaced."""
    steps = np.diff(indices)
    if not indices.size:
        raise b.refuse("an empty tensor", "remove the node and what reads it")
    if not steps.size or (steps[0] > 0 and (steps == steps[0]).all()):
        return piece(b, x, axis, int(indices[0]), int(indices[-1]) + 1, int(steps[0]) if steps.size else 1)
    return gather(b, x, indices, axis)


def gather(b: Lowering, x: Any, indices: Any, axis: int) -> Any:
    """MIL's gather, of booleans too; the indices (a variable or an array) are not negative."""
    return through_int(b, lambda data: b.op("gather", x=data, indices=indices, axis=axis), x)


def nonnegative(b: Lowering, indices: Any, size: Any) -> Any:
    """Indices counted from the front where negative ones count from the end of `size` (a number or an array that broadcasts).

    MIL's operators of iOS17 leave negative indices undefined, those of iOS15 define them for `gather` alone.

    Raises:
        UnsupportedOpError: A known index is out of range.
    """
    if isinstance(indices, np.ndarray):
        if ((indices < -np.asarray(size)) | (indices >= size)).any():
            raise b.refuse("an index that is out of range", "mend the indices")
        return np.where(indices < 0, indices + size, indices)
    return b.op("select", cond=b.op("greater_equal", x=indices, y=0), a=indices, b=b.op("add", x=indices, y=size))


def read_indices(b: Lowering, node: ir.Node, index: int, size: Any) -> Any:
    """An input that holds indices, as an array where it is known, as a variable otherwise; none is negative."""
    known = b.known(node, index)
    return nonnegative(b, b.x(node, index) if known is None else known, size)


def axis_of(node: ir.Node, rank: int, default: int = 0) -> int:
    """The attribute 'axis', counted from the front."""
    return node.attributes.get_int("axis", default) % max(rank, 1)


def out_dtype(node: ir.Node) -> np.dtype[Any]:
    """The numpy type of the first output; float32 where the graph does not tell."""
    return (node.outputs[0].dtype or ir.DataType.FLOAT).numpy()


def refuser(what: str, fix: str) -> Callable[[Lowering, ir.Node], Any]:
    """A lowering that refuses its operator."""

    def refuse(b: Lowering, node: ir.Node) -> Any:
        raise b.refuse(what, fix)

    return refuse
