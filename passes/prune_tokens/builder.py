"""Writes new nodes into a graph one after the other, with the shapes that follow from their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.shapes import static_shape
from edgekit.graph.token_steps import Mark, mark

Attributes = Mapping[str, int | float | str | Sequence[int]]


class Builder:
    """Adds nodes in front of one node.

    Args:
        editor: The graph.
        before: The node that they are inserted before.
        prefix: What their names begin with.
        module: The module that they belong to.
        step: What `note` says of the step that they carry out.
    """

    def __init__(self, editor: GraphEditor, before: ir.Node, prefix: str, module: str = "", step: Mark | None = None) -> None:
        self.editor = editor
        self._step = step
        self._before = before
        self._prefix = prefix
        self._module = module

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], shape: Sequence[int], name: str = "", dtype: ir.DataType | None = None,
           **attributes: int | float | str | Sequence[int]) -> ir.Value:  # fmt: skip
        """Adds a node of one output of `shape`, of the dtype of its first input unless one is given; returns the output."""
        (value,) = self.ops(op_type, inputs, [shape], name, [dtype], attributes)
        return value

    def ops(self, op_type: str, inputs: Sequence[ir.Value | None], shapes: Sequence[Sequence[int]], name: str = "",
            dtypes: Sequence[ir.DataType | None] = (None,), attributes: Attributes | None = None) -> list[ir.Value]:  # fmt: skip
        """Adds a node of an output for each shape; returns them."""
        node = ir.node(op_type, inputs, attributes=dict(attributes or {}), num_outputs=len(shapes))
        node.name = self.editor.unique_name(f"{self._prefix}/{name or op_type}")
        if self._module:
            node.metadata_props[MODULE_KEY] = self._module
        first = next(value for value in inputs if value is not None)
        for index, (output, shape, dtype) in enumerate(zip(node.outputs, shapes, dtypes, strict=True)):
            output.name = node.name if index == 0 else self.editor.unique_name(f"{node.name}.{index}")
            output.shape = ir.Shape(shape)
            kind = dtype or first.dtype
            output.type = ir.TensorType(kind) if kind is not None else None
        self.editor.graph.insert_before(self._before, node)
        return list(node.outputs)

    def note(self, indices: ir.Value, role: str) -> None:
        """Notes what indices of tokens `[B, k]` are, for those who follow the tokens (`edgekit.graph.token_steps`)."""
        if self._step is not None:
            mark(indices, replace(self._step, role=role))

    def constant(self, array: np.ndarray | Sequence[int] | float, name: str, like: ir.Value | None = None) -> ir.Value:
        """Adds an initializer, of int64 or of the dtype of `like`."""
        dtype = like.dtype.numpy() if like is not None and like.dtype is not None else None
        return self.editor.add_initializer(f"{self._prefix}/{name}", np.asarray(array, dtype or np.int64))

    def reshape(self, value: ir.Value, shape: Sequence[int]) -> ir.Value:
        """The value in another shape."""
        return value if shape_of(value) == tuple(shape) else self.op("Reshape", [value, self.constant(shape, "shape")], shape)

    def cut(self, value: ir.Value, axis: int, start: int, end: int, step: int = 1) -> ir.Value:
        """The positions `start` to `end`, every `step`-th, along an axis."""
        shape = list(shape_of(value))
        length = len(range(*slice(start, end, step).indices(shape[axis])))
        if (start, step, length) == (0, 1, shape[axis]):
            return value
        bounds = [self.constant([number], kind) for kind, number in (("starts", start), ("ends", end), ("axes", axis), ("steps", step))]
        shape[axis] = length
        return self.op("Slice", [value, *bounds], shape)

    def concat(self, values: Sequence[ir.Value], axis: int) -> ir.Value:
        """The values one after the other along an axis; those of length 0 there are left out."""
        kept = [value for value in values if shape_of(value)[axis]]
        if len(kept) == 1:
            return kept[0]
        shape = list(shape_of(kept[0]))
        shape[axis] = sum(shape_of(value)[axis] for value in kept)
        return self.op("Concat", kept, shape, axis=axis)

    def binary(self, op_type: str, first: ir.Value, second: ir.Value | float, dtype: ir.DataType | None = None) -> ir.Value:
        """An operator of two operands that are broadcast."""
        other = second if isinstance(second, ir.Value) else self.constant(second, op_type.lower(), like=first)
        return self.op(op_type, [first, other], np.broadcast_shapes(shape_of(first), shape_of(other)), dtype=dtype)

    def matmul(self, first: ir.Value, second: ir.Value, name: str = "") -> ir.Value:
        """The product of two matrices, or batches of them."""
        a, b = shape_of(first), shape_of(second)
        return self.op("MatMul", [first, second], (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], b[-1]), name)

    def transpose(self, value: ir.Value) -> ir.Value:
        """The value with its last two axes changed."""
        shape = shape_of(value)
        order = [*range(len(shape) - 2), len(shape) - 1, len(shape) - 2]
        return self.op("Transpose", [value], [shape[axis] for axis in order], perm=order)

    def reduce(self, op_type: str, value: ir.Value, axis: int, keepdims: bool = False) -> ir.Value:
        """ReduceMean, ReduceSum, ReduceMax … along one axis."""
        shape = list(shape_of(value))
        axis %= len(shape)
        shape[axis : axis + 1] = [1] if keepdims else []
        return self.op(op_type, [value, self.constant([axis], "axes")], shape, keepdims=int(keepdims))

    def top_k(self, scores: ir.Value, count: int, *, largest: bool = True, name: str = "TopK") -> tuple[ir.Value, ir.Value]:
        """The `count` largest or smallest scores `[B, N]` in order, and where they are, `[B, count]` of int64 each."""
        shape = (*shape_of(scores)[:-1], count)
        inputs = [scores, self.constant([count], "count")]
        values, indices = self.ops("TopK", inputs, [shape, shape], name, [None, ir.DataType.INT64], {"axis": -1, "largest": int(largest)})
        return values, indices

    def take(self, tokens: ir.Value, indices: ir.Value, axis: int = 1) -> ir.Value:
        """The entries of `tokens` `[B or 1, …]` along `axis` whose indices `[B, k]` are given for each sample."""
        shape = list(shape_of(tokens))
        batch, count = shape_of(indices)
        if batch == 1:
            shape[axis] = count
            return self.op("Gather", [tokens, self.reshape(indices, (count,))], shape, axis=axis)
        if shape[0] == 1:
            shape[0] = batch
            tokens = self.op("Expand", [tokens, self.constant(shape, "shape")], shape)
        if axis == 1:
            shape[1] = count
            return self.op("GatherND", [tokens, self.reshape(indices, (batch, count, 1))], shape, batch_dims=1)
        inner = [1] * len(shape)
        inner[0], inner[axis] = batch, count
        shape[axis] = count
        wide = self.op("Expand", [self.reshape(indices, inner), self.constant(shape, "shape")], shape)
        return self.op("GatherElements", [tokens, wide], shape, axis=axis)

    def with_prefix(self, places: ir.Value, prefix: int) -> ir.Value:
        """Indices into all tokens, the first `prefix` in front, from those `[B, k]` into the tokens after them."""
        if not prefix:
            return places
        batch = shape_of(places)[0]
        front = self.constant(np.arange(prefix)[None].repeat(batch, 0), "prefix")
        return self.concat([front, self.binary("Add", places, self.constant(prefix, "offset"))], 1)

    def equal(self, count: int, indices: ir.Value, like: ir.Value) -> ir.Value:
        """The matrix `[B, count, k]` that is 1 where the index `[B, k]` of a column is the row, else 0."""
        batch, length = shape_of(indices)
        rows = self.constant(np.arange(count).reshape(1, count, 1), "rows")
        same = self.binary("Equal", rows, self.reshape(indices, (batch, 1, length)), ir.DataType.BOOL)
        return self.cast(same, like)

    def cast(self, value: ir.Value, like: ir.Value | ir.DataType) -> ir.Value:
        """The value in another dtype."""
        dtype = like if isinstance(like, ir.DataType) else like.dtype
        assert dtype is not None
        return value if value.dtype == dtype else self.op("Cast", [value], shape_of(value), dtype=dtype, to=int(dtype))


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """The static shape of a value of the canonical graph."""
    shape = static_shape(value)
    assert shape is not None, value.name
    return shape
