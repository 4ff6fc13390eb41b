"""Writes control flow out where it is decided before the model runs: Core ML's compiler plans memory and devices for straight code only.

An `If` with a known condition becomes the nodes of the branch taken. A `Loop` or `Scan` of a known number of iterations becomes these, one
after the other, each with the number of the iteration as a constant, and what an iteration gives besides is joined at the end. A Loop that
remains carries values of fixed shapes, or is refused when it is lowered (`lowering/control.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import _cloner

from edgekit.errors import UnsupportedOpError
from edgekit.graph.canonicalize import lift_constants, remove_unused, simplify
from edgekit.graph.check import subgraphs
from edgekit.graph.constants import GraphEditor
from edgekit.graph.fold import Budget, fold_constants
from edgekit.graph.names import unique_names
from edgekit.graph.shapes import infer_shapes, static_shape
from edgekit.targets.coreml.unroll_count import MAX_ITERATIONS, known_scalar, trip_count

MAX_NODES = 100_000
"""No graph becomes larger by this."""
_CONTROL = frozenset({"If", "Loop", "Scan"})
_RANDOM = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
_SMALL_BYTES = 1024


def unroll(model: ir.Model) -> int:
    """Writes out the Ifs, Loops and Scans of `model` (opset 13 or newer, inlined) that constants decide, in place, and folds constants.

    Returns:
        How many of them were replaced.

    Raises:
        UnsupportedOpError: There are too many iterations or nodes, or results of a loop that never runs are read.
    """
    if not any(_is_control(node) for node in model.graph):
        return 0
    unique_names(model)
    lift_constants(model)
    budget, total = Budget(), 0
    while True:
        for node in model.graph.all_nodes():
            for body in subgraphs(node):
                _bring_in_constants(body)
        infer_shapes(model)
        folded = fold_constants(model, budget)
        replaced = _Unroller(model).replace_in(model.graph)
        total += replaced
        if not replaced and not folded:
            break
        lift_constants(model)
        unique_names(model)  # of graphs inside the iterations
    _assume_shapes(model)
    simplify(model)
    remove_unused(model)
    infer_shapes(model)
    return total


def _is_control(node: ir.Node) -> bool:
    return node.op_type in _CONTROL and node.domain in ("", "ai.onnx")


def _bring_in_constants(body: ir.Graph) -> None:
    """Gives a body its own copies of the small integer constants that it reads from outside.

    ONNX's shape inference knows the numbers of a graph's own initializers only, such as the target of a Reshape.
    """
    copies: dict[ir.Value, ir.Value] = {}
    for node in body:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.is_graph_input() or value.graph is body:
                continue
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_integer() or tensor.nbytes > _SMALL_BYTES:
                continue
            if value not in copies:
                copies[value] = _initializer(body, f"{node.name}.{value.name}", tensor.numpy())
            node.replace_input_with(index, copies[value])


def _initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.Tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _assume_shapes(model: ir.Model) -> None:
    """Gives what the remaining Loops carry the shapes that it has at first; the lowering checks that an iteration keeps them."""
    loops = [node for node in model.graph.all_nodes() if node.op_type == "Loop" and _is_control(node)]
    while sum(map(_assume, loops)):
        infer_shapes(model)


def _assume(node: ir.Node) -> bool:
    changed = False
    body = node.attributes["body"].as_graph()
    for initial, inside, after in zip(node.inputs[2:], body.inputs[2:], node.outputs, strict=False):
        shape = static_shape(initial)
        for value in (inside, after):
            if value.type is None and initial is not None:
                value.type = initial.type
            if shape is not None and static_shape(value) is None:
                value.shape = ir.Shape(shape)
                changed = True
    return changed


@dataclass(frozen=True)
class _Steps:
    """How a Loop or Scan uses the inputs and outputs of its body.

    Attributes:
        initial: What the carried values are at first.
        scanned: Of each value that is handed over in slices: its axis, and whether it goes backwards.
        stacks: Of each result that is stacked: the axis, and whether that goes backwards.
    """

    initial: list[ir.Value]
    scanned: list[tuple[ir.Value, int, bool]]
    stacks: list[tuple[int, bool]]


def _steps(node: ir.Node) -> _Steps:
    results = len(node.attributes["body"].as_graph().outputs)
    if node.op_type == "Loop":
        carried = [value for value in node.inputs[2:] if value is not None]
        return _Steps(carried, [], [(0, False)] * (results - 1 - len(carried)))
    count = node.attributes.get_int("num_scan_inputs")
    values = [value for value in node.inputs if value is not None]
    first = len(values) - count
    ways = _ways(node, "input", count)
    scanned = [(value, axis, backwards) for value, (axis, backwards) in zip(values[first:], ways, strict=True)]
    return _Steps(values[:first], scanned, _ways(node, "output", results - first))


def _ways(node: ir.Node, kind: str, count: int) -> list[tuple[int, bool]]:
    """The axes of a Scan's inputs or outputs, and whether they go backwards."""
    axes, directions = (node.attributes.get_ints(f"scan_{kind}_{name}") or [0] * count for name in ("axes", "directions"))
    return [(axis, bool(direction)) for axis, direction in zip(axes, directions, strict=True)]


class _Unroller:
    """One walk through a model whose shapes are inferred."""

    def __init__(self, model: ir.Model) -> None:
        self._editor = GraphEditor(model)
        self._opset = model.opset_imports.get("", 0)
        self._size = sum(1 for _ in model.graph.all_nodes())

    def replace_in(self, graph: ir.Graph) -> int:
        """Replaces what is decided in a graph, from the inside out; returns how many nodes that were."""
        replaced = 0
        for node in list(graph):
            if not _is_control(node):
                continue
            if node.op_type == "If":
                branch = _taken(node)
                replaced += self._write_branch(node, branch) if branch is not None else sum(map(self.replace_in, subgraphs(node)))
                continue
            count = trip_count(node, self._opset)
            if count != 0:
                replaced += sum(map(self.replace_in, subgraphs(node)))
            if count is not None and not _left_to_lowering(node, count):
                self._write_loop(node, count)
                replaced += 1
        return replaced

    def _write_branch(self, node: ir.Node, branch: ir.Graph) -> int:
        _move_initializers(branch, node, self._editor)
        values: dict[ir.Value, ir.Value | None] = {}
        self._copy(node, branch, values, "")
        self._replace(node, [values.get(result) or result for result in branch.outputs])
        return 1

    def _write_loop(self, node: ir.Node, count: int) -> None:
        body, steps = node.attributes["body"].as_graph(), _steps(node)
        self._check_size(node, body, count)
        carried = len(steps.initial)
        if count == 0 and any(output.uses() or output.is_graph_output() for output in node.outputs[carried:]):
            raise _refuse(node, "that never runs and whose stacked results are read: they are empty", "remove what reads them")
        _move_initializers(body, node, self._editor)
        fixed = _same_in_all(body)
        shared: dict[ir.Value, ir.Value | None] = {}
        self._copy(node, [inner for inner in body if inner in fixed], shared, "")
        state = list(steps.initial)
        stacked: list[list[ir.Value]] = [[] for _ in steps.stacks]
        for iteration in range(count):
            inputs = [*self._heads(node, body, iteration), *state, *self._slices(node, steps, iteration, count)]
            values = shared | dict(zip(body.inputs, inputs, strict=True))
            self._copy(node, [inner for inner in body if inner not in fixed], values, f"/{iteration}")
            results = [values.get(result) or result for result in body.outputs]
            results = results[1:] if node.op_type == "Loop" else results
            state = results[:carried]
            for column, result in zip(stacked, results[carried:], strict=True):
                column.append(result)
        joined = [self._join(node, index, column, *steps.stacks[index]) for index, column in enumerate(stacked) if column]
        self._replace(node, [*state, *joined])

    def _check_size(self, node: ir.Node, body: ir.Graph, count: int) -> None:
        if count > MAX_ITERATIONS:
            raise _refuse(node, f"of more than {MAX_ITERATIONS} iterations with a result for each", "process fewer at once")
        self._size += count * (1 + sum(1 for _ in body.all_nodes()))
        if self._size > MAX_NODES:
            raise _refuse(node, f"that would be more than {MAX_NODES} nodes when written out", "process fewer iterations at once")

    def _heads(self, node: ir.Node, body: ir.Graph, iteration: int) -> Iterator[ir.Value | None]:
        """What a Loop gives its body before the carried values: the number of the iteration, and that it goes on."""
        if node.op_type == "Scan":
            return
        for value, name, number in zip(body.inputs, ("number", "going"), (np.int64(iteration), np.True_), strict=False):
            if not value.uses() and not value.is_graph_output():
                yield None
                continue
            shape = (1,) if static_shape(value) == (1,) else ()
            name = self._editor.unique_name(f"{node.name}/{iteration}.{name}")
            yield _initializer(_graph_of(node), name, np.full(shape, number))

    def _slices(self, node: ir.Node, steps: _Steps, iteration: int, count: int) -> Iterator[ir.Value]:
        """What a Scan gives its body after the states: the elements of this iteration."""
        for value, axis, backwards in steps.scanned:
            place = count - 1 - iteration if backwards else iteration
            name = f"{node.name}/{iteration}/{value.name}"
            index = _initializer(_graph_of(node), self._editor.unique_name(f"{name}.index"), np.asarray(place, np.int64))
            yield self._add(node, "Gather", [value, index], name, axis)

    def _join(self, node: ir.Node, index: int, column: list[ir.Value], axis: int, backwards: bool) -> ir.Value:
        name = f"{node.name}/stack_{index}"
        axes = _initializer(_graph_of(node), self._editor.unique_name(f"{name}.axes"), np.array([axis], np.int64))
        rows = [self._add(node, "Unsqueeze", [value, axes], f"{name}/{row}") for row, value in enumerate(column)]
        return self._add(node, "Concat", rows[::-1] if backwards else rows, name, axis)

    def _add(self, node: ir.Node, op_type: str, inputs: Sequence[ir.Value], name: str, axis: int | None = None) -> ir.Value:
        """Writes a node of one result before `node`, for it."""
        attributes = [] if axis is None else [ir.AttrInt64("axis", axis)]
        new = ir.Node("", op_type, inputs, attributes, name=self._editor.unique_name(f"{name}/{op_type}"))
        new.metadata_props.update(node.metadata_props)
        new.outputs[0].name = self._editor.unique_name(name)
        new.outputs[0].type = inputs[0].type
        _graph_of(node).insert_before(node, new)
        return new.outputs[0]

    def _copy(self, node: ir.Node, inside: Iterable[ir.Node], values: dict[ir.Value, ir.Value | None], label: str) -> None:
        """Writes nodes from inside `node` before it. `values` says what stands for a value there; what is made anew is added to it.

        Shapes are inferred anew: what a loop carries may grow.
        """

        def name_copy(copy: ir.Node) -> None:
            copy.name = self._editor.unique_name(f"{node.name}{label}/{copy.name}")
            for output in copy.outputs:
                if output.name:
                    output.name = self._editor.unique_name(f"{node.name}{label}/{output.name}")
                output.shape = None

        cloner = _cloner.Cloner(
            attr_map={}, value_map=values, metadata_props=dict(node.metadata_props), post_process=name_copy, allow_outer_scope_values=True
        )
        _graph_of(node).insert_before(node, [cloner.clone_node(inner) for inner in inside])

    def _replace(self, node: ir.Node, results: Sequence[ir.Value]) -> None:
        for output, result in zip(node.outputs, results, strict=False):
            if output.is_graph_output():  # keeps its name through an Identity, which `simplify` drops where it may
                result = self._add(node, "Identity", [result], f"{output.name}/result")
            if output.uses() or output.is_graph_output():
                self._editor.replace_value(output, result)
        _dissolve(node)
        _graph_of(node).remove(node, safe=True)


def _same_in_all(body: ir.Graph) -> set[ir.Node]:
    """The nodes of a body that give the same in all iterations, such as the dequantization of a weight: one copy is enough."""
    varies = set(body.inputs)
    fixed: set[ir.Node] = set()
    for node in body:
        if varies.isdisjoint(_read(node)) and node.op_type not in _RANDOM:
            fixed.add(node)
        else:
            varies.update(node.outputs)
    return fixed


def _read(node: ir.Node) -> Iterator[ir.Value | None]:
    """What a node and the graphs inside it read."""
    yield from node.inputs
    for graph in subgraphs(node):
        yield from graph.outputs
        for inner in graph:
            yield from _read(inner)


def _graph_of(node: ir.Node) -> ir.Graph:
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def _taken(node: ir.Node) -> ir.Graph | None:
    """The branch that a known condition takes."""
    condition = known_scalar(node, 0)
    return None if condition is None else node.attributes["then_branch" if condition else "else_branch"].as_graph()


def _left_to_lowering(node: ir.Node, count: int) -> bool:
    """A loop that is too long to be written out and gives the last state only is one operator of Core ML."""
    return count > MAX_ITERATIONS and node.op_type == "Loop" and len(node.attributes["body"].as_graph().outputs) == len(node.inputs) - 1


def _move_initializers(body: ir.Graph, node: ir.Node, editor: GraphEditor) -> None:
    """Moves the constants of a body to the graph around it: all iterations share them."""
    for name, value in list(body.initializers.items()):
        del body.initializers[name]
        value.name = editor.unique_name(f"{node.name}/{name}")
        _graph_of(node).register_initializer(value)


def _dissolve(node: ir.Node) -> None:
    """Lets go of all values that the graphs inside a node read or give out."""
    for graph in subgraphs(node):
        graph.outputs.clear()
        for inner in graph:
            _dissolve(inner)
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)


def _refuse(node: ir.Node, what: str, fix: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"Core ML cannot express a {node.op_type} {what}",
        where=f"node '{node.name}' ({node.op_type})",
        fix=f"{fix}, or compile for --target onnxruntime",
    )
