"""Builds the nodes of one fusion, all or none of them.

Whether a pattern can be expressed exactly shows only while its nodes are made (a mask that must be expanded over a symbolic dimension,
for example). `Builder` keeps the nodes out of the graph until everything is made, and takes all back otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor
from edgekit.graph.cost import MODULE_KEY

Dims = tuple[int | str, ...]
"""A shape whose symbolic dimensions are names."""


class UnfitError(Exception):
    """The pattern cannot be expressed exactly; never leaves this package."""


def dims(value: ir.Value | None) -> Dims | None:
    """Returns the shape of `value`, or None when a dimension is unknown and has no name."""
    if value is None or value.shape is None:
        return None
    found: list[int | str] = []
    for dim in value.shape:
        if isinstance(dim, int):
            found.append(dim)
        elif dim.value is not None:
            found.append(str(dim.value))
        else:
            return None
    return tuple(found)


def static(shape: Dims) -> tuple[int, ...]:
    """Returns `shape` as integers.

    Raises:
        UnfitError: A dimension is symbolic.
    """
    if not all(isinstance(dim, int) for dim in shape):
        raise UnfitError
    return tuple(int(dim) for dim in shape)


def elements(shape: Dims) -> int:
    """Returns the number of elements of a static shape.

    Raises:
        UnfitError: A dimension is symbolic.
    """
    return math.prod(static(shape))


class Builder:
    """Makes nodes that `commit` inserts before `anchor` and `abandon` forgets.

    Args:
        editor: Of the graph that `anchor` stands in.
        anchor: The node before which the new ones are to stand.
        module: The PyTorch module path that the new nodes get, or `""`.
    """

    def __init__(self, editor: GraphEditor, anchor: ir.Node, module: str) -> None:
        self._editor = editor
        self._anchor = anchor
        self._module = module
        self._nodes: list[ir.Node] = []
        self._constants: list[ir.Value] = []

    def node(self, op_type: str, inputs: Sequence[ir.Value], shape: Dims, **attributes: object) -> ir.Value:
        """Makes a node of one output that has `shape` and the dtype of the first input."""
        node = ir.node(op_type, inputs, attributes=dict(attributes))  # type: ignore[arg-type]
        node.name = self._editor.unique_name(f"{self._module}/{op_type}" if self._module else f"{self._anchor.name}/{op_type}")
        if self._module:
            node.metadata_props[MODULE_KEY] = self._module
        output, dtype = node.outputs[0], inputs[0].dtype
        output.name = node.name
        output.shape = ir.Shape(shape)
        if dtype is not None:
            output.type = ir.TensorType(dtype)
        self._nodes.append(node)
        return output

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Makes an initializer, called after the module and `name`."""
        value = self._editor.add_initializer(f"{self._module or self._anchor.name}.{name}", array)
        self._constants.append(value)
        return value

    def reshape(self, value: ir.Value, shape: Dims) -> ir.Value:
        """Gives `value` another shape, without a node when it has it or was made by a reshape from it."""
        if dims(value) == shape:
            return value
        producer = value.producer()
        if producer is not None and producer.domain == "" and producer.op_type in ("Reshape", "Squeeze", "Unsqueeze", "Flatten"):
            source = producer.inputs[0]
            if source is not None and dims(source) == shape:
                return source
        return self.node("Reshape", [value, self.constant("shape", np.array(static(shape), dtype=np.int64))], shape)

    def expand(self, value: ir.Value, shape: Dims) -> ir.Value:
        """Broadcasts `value` to `shape`."""
        if dims(value) == shape:
            return value
        return self.node("Expand", [value, self.constant("shape", np.array(static(shape), dtype=np.int64))], shape)

    def transpose(self, value: ir.Value, perm: tuple[int, ...]) -> ir.Value:
        """Permutes the axes of `value`; a Transpose that made it is merged into the new one."""
        producer = value.producer()
        while producer is not None and producer.op_type == "Transpose" and producer.domain == "" and producer.inputs[0] is not None:
            inner = permutation(producer)
            if inner is None:
                break
            perm = tuple(inner[axis] for axis in perm)
            value = producer.inputs[0]
            producer = value.producer()
        if perm == tuple(range(len(perm))):
            return value
        shape = dims(value)
        if shape is None:
            raise UnfitError
        return self.node("Transpose", [value], tuple(shape[axis] for axis in perm), perm=list(perm))

    def commit(self) -> None:
        """Inserts the nodes."""
        used = {value for node in self._nodes for value in node.inputs}
        self._editor.drop_unused(value for value in self._constants if value not in used)
        self._editor.graph.insert_before(self._anchor, self._nodes)

    def abandon(self) -> None:
        """Takes back everything that was made."""
        for node in self._nodes:
            for index in range(len(node.inputs)):
                node.replace_input_with(index, None)
        self._editor.drop_unused(self._constants)


def permutation(node: ir.Node) -> tuple[int, ...] | None:
    """Returns the permutation of a Transpose node; without the attribute it reverses the axes, of which there must be a known number."""
    perm = node.attributes.get_ints("perm", None)
    if perm is not None:
        return tuple(perm)
    shape = dims(node.inputs[0])
    return None if shape is None else tuple(reversed(range(len(shape))))
