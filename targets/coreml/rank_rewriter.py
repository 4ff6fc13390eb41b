"""How a node of high rank is rewritten: what holds its values, and the operators that read and write them in groups of axes.

A value of rank above 5 is held by another of the same elements in the same row-major order, in whatever shape of rank 5 at most its
producer writes. Each reader reshapes that to the groups of axes that it tells apart; a reshape of a reshape reads the first one's operand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.errors import UnsupportedOpError
from edgekit.graph.constants import GraphEditor, constant_array
from edgekit.graph.shapes import static_shape
from edgekit.targets.coreml.rank_groups import FREE, MAX_RANK, Grouping, Role, Shape, group_axes, transposes

Attribute = int | str | Sequence[int]
Write = Callable[[ir.Value, Grouping, Shape], ir.Value]
"""Writes an operator on a value in a grouping; takes the ungrouped shape of the result too."""


def rank(value: ir.Value | None) -> int:
    """The rank of a value, 0 where it is not known."""
    return 0 if value is None or value.shape is None else len(value.shape)


def node_rank(node: ir.Node) -> int:
    """The highest rank among what a node reads and writes."""
    return max((rank(value) for value in (*node.inputs, *node.outputs)), default=0)


class Rewriter:
    """Writes operators in the place of one node after the other.

    Attributes:
        editor: The editor of the graph.
        held: For each value of high rank that is computed anew, the value that holds its elements.
        node: The node that is being rewritten.
        name: What it was called before.
        emitted: What was written in its place.
        written: Everything that was written.
        weights: Initializers that were regrouped, by the name of the one that each was made from.
    """

    def __init__(self, model: ir.Model) -> None:
        self.editor = GraphEditor(model)
        self.held: dict[ir.Value, ir.Value] = {}
        self.node: ir.Node = ir.node("Identity", [])
        self.name = ""
        self.emitted: list[ir.Node] = []
        self.written: set[ir.Node] = set()
        self.weights: dict[str, ir.Value] = {}
        self._reshapes: dict[ir.Value, ir.Value] = {}  # results of own reshapes: their operands
        self._regrouped: dict[tuple[ir.Value, Shape], ir.Value] = {}
        self._constants: dict[tuple[bytes, Shape], ir.Value] = {}

    def begin(self, node: ir.Node) -> None:
        """Goes on to the next node."""
        self.node = node
        self.name = node.name or node.outputs[0].name or node.op_type
        self.emitted = []

    # What the node reads

    def input(self, index: int) -> ir.Value | None:
        """An input of the node; None where it is left out."""
        return self.node.inputs[index] if index < len(self.node.inputs) else None

    def need(self, index: int) -> ir.Value:
        """An input of the node that ONNX demands."""
        value = self.input(index)
        if value is None:
            raise self.refuse(f"without its input {index}", "give it")
        return value

    def shape(self, value: ir.Value) -> Shape:
        """The shape that a value has in the graph that is being rewritten.

        Raises:
            UnsupportedOpError: It is not known before the model runs.
        """
        shape = static_shape(value)
        if shape is None:
            raise self.refuse(f"with a shape that is only known when the model runs (value '{value.name}')", "pin the shapes of the inputs")
        return shape

    def result(self, output: ir.Value, otherwise: Shape) -> Shape:
        """The shape of a result; `otherwise` for one that is left out."""
        return self.shape(output) if output.name else otherwise

    def known(self, index: int, name: str) -> list[int] | None:
        """An integer input that is constant; None where it is left out.

        Raises:
            UnsupportedOpError: It is computed.
        """
        value = self.input(index)
        if value is None:
            return None
        array = constant_array(value)
        if array is None:
            raise self.refuse(f"with computed '{name}'", "make them a constant of the graph")
        return [int(number) for number in array.reshape(-1)]

    def carrier(self, value: ir.Value) -> ir.Value:
        """The value that has the elements of `value`, in any shape."""
        return self.held.get(value, value)

    def regroup(self, value: ir.Value, shape: Shape) -> ir.Value:
        """The elements of `value` in `shape`; those of a constant are regrouped here and now."""
        value = self.carrier(value)
        root = self._reshapes.get(value, value)
        for candidate in (root, value):
            if static_shape(candidate) == shape:
                return candidate
        if (root, shape) not in self._regrouped:
            array = constant_array(root)
            if array is not None:
                new = self.editor.add_initializer(root.name or "constant", array.reshape(shape), made_from=[root])
                if root.is_initializer() and root.name:
                    self.weights.setdefault(root.name, new)
            else:
                new = self.reshape(root, shape)
            self._regrouped[root, shape] = new
        return self._regrouped[root, shape]

    def refine(self, grouping: Grouping, value: ir.Value, shape: Shape) -> Grouping:
        """The grouping in which `value`, of `shape` in the original graph, is read without a reshape, where there is one."""
        return grouping.refined(shape, static_shape(self.carrier(value))) or grouping

    # What is written

    def constant(self, numbers: Sequence[int], name: str) -> ir.Value:
        """A vector of integers; equal ones are one initializer."""
        array = np.array(numbers, np.int64)
        key = (array.tobytes(), array.shape)
        if key not in self._constants:
            self._constants[key] = self.editor.add_initializer(f"{self.name}.{name}", array)
        return self._constants[key]

    def reshape(self, value: ir.Value, shape: Shape) -> ir.Value:
        """A new Reshape of `value`, even to the shape that it has."""
        attributes = {"allowzero": 1} if 0 in shape else {}
        new = self.add("Reshape", [value, self.constant(shape, "shape")], shape, attributes)
        self._reshapes[new] = self._reshapes.get(value, value)
        return new

    def add(
        self, op_type: str, inputs: Sequence[ir.Value | None], shape: Shape, attributes: Mapping[str, Attribute] | None = None
    ) -> ir.Value:
        """Writes an operator of one result, of the dtype of its first input."""
        dtype = inputs[0].dtype if inputs and inputs[0] is not None else None
        made = [_attribute(name, value) for name, value in (attributes or {}).items()]
        return self._write(op_type, inputs, [shape], [dtype], made)[0]

    def again(
        self,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Shape],
        attributes: Mapping[str, Attribute] | None = None,
        dropped: Iterable[str] = (),
    ) -> list[ir.Value]:
        """Writes the node's operator again on other inputs, with results of `shapes`; some attributes are given anew or dropped."""
        kept = {name: attr for name, attr in self.node.attributes.items() if name not in dropped}
        kept |= {name: _attribute(name, value) for name, value in (attributes or {}).items()}
        dtypes = [output.dtype for output in self.node.outputs]
        results = self._write(self.node.op_type, inputs, shapes, dtypes, list(kept.values()))
        for old, new in zip(self.node.outputs, results, strict=True):
            new.name = new.name if old.name else ""
        return results

    def _write(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        shapes: Sequence[Shape],
        dtypes: Sequence[ir.DataType | None],
        attributes: Sequence[ir.Attr],
    ) -> list[ir.Value]:
        name = self.editor.unique_name(f"{self.name}/{op_type}")
        node = ir.Node("", op_type, inputs, attributes, num_outputs=len(shapes), name=name)
        node.metadata_props.update(self.node.metadata_props)
        for index, (output, shape, dtype) in enumerate(zip(node.outputs, shapes, dtypes, strict=True)):
            output.name = self.editor.unique_name(f"{name}_{index}") if index else name
            output.shape = ir.Shape(shape)
            output.type = ir.TensorType(dtype) if dtype is not None else None
        self.editor.graph.insert_before(self.node, node)
        self.emitted.append(node)
        self.written.add(node)
        return list(node.outputs)

    # Rearrangements, from which the rules are made; values that they return have any shape of the right elements

    def transpose(self, value: ir.Value, shape: Shape, perm: Sequence[int]) -> ir.Value:
        """A transpose of a value of `shape`, in several steps where more than 5 groups of axes change places."""
        value = self.carrier(value)
        for sizes, order in transposes(shape, perm):
            target = tuple(sizes[axis] for axis in order)
            value = self.add("Transpose", [self.regroup(value, sizes)], target, {"perm": order})
        return value

    def expand(self, value: ir.Value, shape: Shape, target: Shape) -> ir.Value:
        """A value of `shape` broadcast to `target`, of the same rank."""

        def write(part: ir.Value, grouping: Grouping, result: Shape) -> ir.Value:
            sizes = grouping.shape(result)
            return self.add("Expand", [part, self.constant(sizes, "shape")], sizes)

        wide = {axis: size for axis, size in enumerate(target) if size != shape[axis]}
        return self.axiswise(value, shape, wide, write, lambda axis: "expanded")

    def axiswise(
        self, value: ir.Value, shape: Shape, sizes: Mapping[int, int], write: Write, role: Callable[[int], Role] = lambda axis: axis
    ) -> ir.Value:
        """Lets `write` change some axes, each by itself, to new `sizes`: in one step or, where that needs too many groups, in more."""
        if not sizes:
            return self.carrier(value)
        target = tuple(sizes.get(axis, size) for axis, size in enumerate(shape))
        grouping = group_axes([shape, target], [role(axis) if axis in sizes else FREE for axis in range(len(shape))])
        if grouping.rank > MAX_RANK:
            axes = sorted(sizes)
            first = {axis: sizes[axis] for axis in axes[: len(axes) // 2]}
            middle = tuple(first.get(axis, size) for axis, size in enumerate(shape))
            value = self.axiswise(value, shape, first, write, role)
            return self.axiswise(value, middle, {axis: sizes[axis] for axis in axes[len(axes) // 2 :]}, write, role)
        grouping = self.refine(grouping, value, shape)
        return write(self.regroup(value, grouping.shape(shape)), grouping, target)

    def broadcast(
        self, values: Sequence[ir.Value], shapes: Sequence[Shape], targets: Sequence[Shape], roles: Sequence[Role], least: int = 0
    ) -> tuple[list[ir.Value], Grouping]:
        """Operands that the operator broadcasts, in one grouping; where that has too many groups, the smallest of them are expanded first.

        Args:
            values: The operands.
            shapes: Their shapes, all of one rank.
            targets: The shapes to which they may be expanded.
            roles: The role of each axis.
            least: Operands of this rank or more that lack leading axes stay so.
        """
        values, shapes = list(values), list(shapes)
        while (grouping := group_axes([*shapes, *targets], roles)).rank > MAX_RANK:
            torn = [index for index, shape in enumerate(shapes) if shape != targets[index]]
            if not torn:
                raise self.refuse(f"that tells {grouping.rank} groups of axes apart")
            index = min(torn, key=lambda index: math.prod(shapes[index]))
            values[index] = self.expand(values[index], shapes[index], targets[index])
            shapes[index] = targets[index]
        finer = (grouping.refined(shape, static_shape(self.carrier(value))) for value, shape in zip(values, shapes, strict=True))
        grouping = next((found for found in finer if found is not None), grouping)
        return [self._operand(value, grouping.shape(shape), least) for value, shape in zip(values, shapes, strict=True)], grouping

    def _operand(self, value: ir.Value, shape: Shape, least: int) -> ir.Value:
        """An operand in a grouping; one whose leading axes broadcasting supplies stays as it is."""
        own = static_shape(self.carrier(value))
        if own is not None and least <= len(own) <= len(shape) and shape == (1,) * (len(shape) - len(own)) + own:
            return self.carrier(value)
        return self.regroup(value, shape)

    def refuse(self, reason: str = "", fix: str = "merge axes by a Reshape before it") -> UnsupportedOpError:
        """The error that says that the node cannot be rewritten."""
        what = f"Core ML takes tensors of rank {MAX_RANK} at most, and the operator '{self.node.op_type}' on rank {node_rank(self.node)}"
        return UnsupportedOpError(
            f"{what}{' ' + reason if reason else ''} cannot be rewritten for it",
            where=f"node '{self.name}' ({self.node.op_type})",
            fix=f"{fix}, or compile for --target onnxruntime",
        )


def _attribute(name: str, value: Attribute) -> ir.Attr:
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    return ir.AttrString(name, value) if isinstance(value, str) else ir.AttrInt64s(name, list(value))
