"""Carries out a plan of `liveness.py`: every node computes its planned parts, and what is read is sliced once, as early as possible."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.boxes import WHOLE, Box, Places, contains, per_axis, places_within, positions, shape_of, size_of
from edgekit.passes.reparameterize.liveness import Plan
from edgekit.passes.reparameterize.liveness_rules import Narrowing
from edgekit.passes.reparameterize.views import View, view

_LONGEST_SHARED = 8


def carry_out(plan: Plan, editor: GraphEditor) -> None:
    """Rewrites the graph of `editor` so that it computes the planned parts and nothing else.

    A node that has one part is changed in place and keeps its name; further parts are copies. Weights are sliced into new initializers.
    """
    forwards = _Forwards(plan, editor)
    for node in list(editor.graph):
        forwards.visit(node)
    forwards.finish()


class _Forwards:
    """Makes the planned parts while nodes are visited from the first to the last."""

    def __init__(self, plan: Plan, editor: GraphEditor) -> None:
        self._plan = plan
        self._editor = editor
        self._inputs = {node: tuple(node.inputs) for node in editor.graph}
        self._shapes = {value: static_shape(value) for node in editor.graph for value in (*node.inputs, *node.outputs) if value is not None}
        self._made: defaultdict[ir.Value, list[tuple[Box, ir.Value]]] = defaultdict(list)
        self._picked: dict[tuple[ir.Value, tuple[tuple[int, Places], ...]], ir.Value] = {}
        self._views = {node: [view(node, index) for index in range(len(node.outputs))] for node in editor.graph}
        self._vectors = {
            tuple(value.const_value.numpy().tolist()): value
            for value in editor.graph.initializers.values()
            if value.dtype == ir.DataType.INT64 and len(value.shape or ()) == 1 and value.const_value is not None
            if not value.is_graph_input() and value.const_value.size <= _LONGEST_SHARED
        }
        self._gone: list[ir.Node] = []
        self._new: set[ir.Node] = set()
        self._heirs: dict[ir.Node, ir.Node] = {}

    def visit(self, node: ir.Node) -> None:
        """Makes the planned parts of the outputs of `node`."""
        planned = [(output, part) for output in node.outputs for part in self._plan.parts.get(output, [])]
        if not planned:
            self._gone.append(node)
            return
        views = self._views[node]
        if all(not part.output for _, part in planned) and all(map(self._is_untouched, self._inputs[node], planned[0][1].inputs)):
            for output in node.outputs:
                self._made[output].append((WHOLE, output))
        elif views[0] is not None and planned[0][1].inputs != (WHOLE,) * len(node.inputs):
            self._make_views(node, views)
        else:
            self._compute(node, planned)

    def _is_untouched(self, value: ir.Value | None, box: Box | None) -> bool:
        """True when a node that reads a value finds what it read before."""
        if value is None:
            return True
        if box is None or value not in self._plan.parts:
            return box is not None and (not box or not value.is_initializer())
        return self._made[value][0] == (WHOLE, value) if box == WHOLE else self._made[value] == [(WHOLE, value)]

    def finish(self) -> None:
        """Removes the nodes that are not needed any more and what only they read."""
        self._editor.graph.remove(self._gone, safe=True)
        for old, new in self._heirs.items():
            new.name = old.name
            if not new.outputs[0].is_graph_output():
                old.outputs[0].name, new.outputs[0].name = new.outputs[0].name, old.outputs[0].name
        self._editor.drop_unused({value: None for values in self._inputs.values() for value in values if value is not None})
        initializers = self._editor.graph.initializers
        for value, versions in self._made.items():
            if value.producer() is None and len(versions) == 1 and value.name not in initializers:
                versions[0][1].name = value.name  # so that a weight still leads back to its PyTorch parameter

    def _compute(self, node: ir.Node, planned: list[tuple[ir.Value, Narrowing]]) -> None:
        """Lets the node compute its parts, the first in its own place, the others by copies before it."""
        if not planned[0][1].output:  # all of every output
            for index, value in enumerate(self._inputs[node]):
                if value is not None:
                    node.replace_input_with(index, self._read(value, WHOLE, node))
            for output in node.outputs:
                self._made[output].append((WHOLE, output))
            return
        for place, (output, part) in enumerate(planned):
            operands = [
                None if value is None or box is None else self._read(value, box, node)
                for value, box in zip(self._inputs[node], part.inputs, strict=True)
            ]
            read = [operand for operand, box in zip(operands, part.inputs, strict=True) if box is not None]
            if node.op_type == "Concat" and len(read) == 1 and read[0] is not None:
                self._made[output].append((part.output, read[0]))
                if place == 0:
                    self._gone.append(node)
                continue
            user = node if place == 0 and node not in self._gone else self._copy(node)
            user.resize_inputs(len(read))
            for index, operand in enumerate(read):
                user.replace_input_with(index, operand)
            for index, numbers in part.constants.items():
                user.replace_input_with(index, self._vector(numbers, f"{user.name}.shape"))
            for key, number in part.attributes.items():
                user.attributes[key] = ir.AttrInt64(key, number)
            shape = self._shapes[output]
            assert shape is not None
            user.outputs[0].shape = ir.Shape(shape_of(part.output, shape))
            self._made[output].append((part.output, user.outputs[0]))

    def _copy(self, node: ir.Node) -> ir.Node:
        copy = ir.Node(node.domain, node.op_type, node.inputs, node.attributes.values(), num_outputs=1)
        copy.metadata_props.update(node.metadata_props)
        self._insert(copy, node, node.name or node.op_type, node.outputs[0], None)
        return copy

    def _insert(self, new: ir.Node, before: ir.Node, name: str, like: ir.Value, shape: Sequence[int] | None) -> ir.Value:
        """Adds a node of one output, named `name` or like it, of the type of `like`."""
        new.name = self._editor.unique_name(name)
        output = new.outputs[0]
        output.name = new.name
        output.type = ir.TensorType(like.dtype) if like.dtype is not None else None
        output.shape = ir.Shape(shape) if shape is not None else None
        self._editor.graph.insert_before(before, new)
        self._new.add(new)
        return output

    def _vector(self, numbers: Sequence[int], name: str) -> ir.Value:
        """Returns a constant vector, one that is there already where it is short."""
        key = tuple(numbers)
        if key not in self._vectors or len(key) > _LONGEST_SHARED:
            self._vectors[key] = self._editor.add_initializer(name, np.array(numbers, dtype=np.int64))
        return self._vectors[key]

    # Reading

    def _read(self, value: ir.Value, box: Box, before: ir.Node) -> ir.Value:
        """Returns a value that holds `box` of `value`, which may need a slice before `before`."""
        if value.is_initializer() and box:
            return self._sliced_weight(value, box)
        has, version = self._version(value, box)
        shape = self._shapes[value]
        if shape is None or has == box:
            return version
        return self._pick(version, places_within(has, box, len(shape)), before, f"{before.name}.Slice")

    def _version(self, value: ir.Value, box: Box) -> tuple[Box, ir.Value]:
        """Returns the smallest part made of `value` that contains `box`."""
        versions = [(has, version) for has, version in self._made[value] if contains(has, box)] if value.producer() is not None else []
        return min(versions, key=lambda made: size_of(made[0], self._shapes[value] or ()), default=(WHOLE, value))

    def _sliced_weight(self, value: ir.Value, box: Box) -> ir.Value:
        for has, version in self._made[value]:
            if has == box:
                return version
        assert value.const_value is not None
        array = value.const_value.numpy()
        chosen = np.ix_(*(range(size) if places is None else places for places, size in zip(box, array.shape, strict=True)))
        version = self._editor.add_initializer(f"{value.name}.part", np.ascontiguousarray(array[chosen]), made_from=[value])
        self._made[value].append((box, version))
        return version

    # Views

    def _make_views(self, node: ir.Node, views: list[View | None]) -> None:
        """Lets each part of each output be what it is a view of, or choose from that what is still too much."""
        source = self._inputs[node][0]
        assert source is not None
        for output, found in zip(node.outputs, views, strict=True):
            for part in self._plan.parts.get(output, []):
                assert found is not None
                made = self._viewed(node, output, part, found, source)
                if not part.output:
                    made = self._give_out(output, made, node)
                self._made[output].append((part.output, made))
                heir = made.producer()
                if len(node.outputs) == 1 and heir is not None and heir in self._new:
                    self._heirs.setdefault(node, heir)
        self._gone.append(node)

    def _viewed(self, node: ir.Node, output: ir.Value, part: Narrowing, found: View, source: ir.Value) -> ir.Value:
        shape = self._shapes[output]
        assert shape is not None
        assert part.inputs[0] is not None
        picks, index = found.part(part.output, len(shape))
        has, version = self._version(source, part.inputs[0])
        size = len(found.source)
        inside = places_within(has, part.inputs[0], size) | {
            axis: positions(along, picks[axis]) for axis, along in enumerate(per_axis(has, size)) if axis in picks
        }
        sizes = shape_of(has, found.source)
        inside = {axis: places for axis, places in inside.items() if places != tuple(range(sizes[axis]))}
        if found.gathered is None:
            return self._pick(version, inside, node, node.name or node.op_type)
        taken = inside.pop(found.gathered, None)
        version = self._pick(version, inside, node, f"{node.name}.Slice")
        result_shape = shape_of(part.output, shape)
        if taken is None:  # all there is, in order: only the axis is written in another way
            new = ir.node("Reshape", [version, self._vector(result_shape, f"{node.name}.shape")])
        else:
            indices = self._editor.add_initializer(f"{node.name}.indices", np.array(taken, dtype=np.int64).reshape(index))
            new = ir.node("Gather", [version, indices], {"axis": found.gathered})
        new.metadata_props.update(node.metadata_props)
        return self._insert(new, node, node.name or node.op_type, output, result_shape)

    def _pick(self, value: ir.Value, places: dict[int, Places], before: ir.Node, name: str) -> ir.Value:
        """Returns the value at these places: one Slice for ranges, a Gather for every other axis; made once."""
        key = (value, tuple(sorted(places.items())))
        if not places:
            return value
        if key not in self._picked:
            sizes = list(static_shape(value) or ())
            ranges = {axis: along for axis, along in places.items() if _step(along) is not None}
            picked = value
            if ranges:
                steps = [_step(along) or 1 for along in ranges.values()]
                ends = [along[-1] + (1 if step > 0 else -1) for along, step in zip(ranges.values(), steps, strict=True)]
                bounds = [
                    [along[0] for along in ranges.values()],
                    [end if end >= 0 else np.iinfo(np.int64).min for end in ends],
                    list(ranges),
                    steps,
                ]
                names = ("starts", "ends", "axes", "steps")
                vectors = [self._vector(numbers, f"{name}.{kind}") for numbers, kind in zip(bounds, names, strict=True)]
                sizes = [len(ranges.get(axis, range(size))) for axis, size in enumerate(sizes)]
                picked = self._insert(self._like(before, "Slice", [picked, *vectors]), before, name, value, sizes)
            for axis, along in places.items():
                if axis not in ranges:
                    sizes[axis] = len(along)
                    node = self._like(before, "Gather", [picked, self._vector(along, f"{name}.indices")], axis)
                    picked = self._insert(node, before, name, value, sizes)
            self._picked[key] = picked
        return self._picked[key]

    def _like(self, before: ir.Node, op_type: str, inputs: Sequence[ir.Value], axis: int | None = None) -> ir.Node:
        node = ir.node(op_type, inputs, {} if axis is None else {"axis": axis})
        node.metadata_props.update(before.metadata_props)
        return node

    def _give_out(self, old: ir.Value, new: ir.Value, node: ir.Node) -> ir.Value:
        """Lets `new` stand for all of `old` where the graph gives it out or a subgraph reads it."""
        if not old.is_graph_output() and all(use.node.graph is node.graph for use in old.uses()):
            return new
        if new.producer() is None or new.is_graph_output():
            new = self._insert(self._like(node, "Identity", [new]), node, f"{node.name}.Identity", old, self._shapes[old])
        self._editor.replace_value(old, new)
        return new


def _step(places: Places) -> int | None:
    """Returns the step of an arithmetic progression, 1 for a single place; None for anything else."""
    steps = {b - a for a, b in itertools.pairwise(places)} or {1}
    step = steps.pop()
    return step if not steps and step != 0 else None
