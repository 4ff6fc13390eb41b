"""Which value of one graph is which of another: by name, and by the nodes that both have."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Arrays

Names = dict[str, list[str]]
"""Per value of the second graph, its counterparts in the first, the likelier first."""


def counterparts(first: ir.Model, second: ir.Model) -> Names:
    """Finds for each value of `second` those of `first` that may be the same.

    By the name of a value; by a node that reads it and gives a value of one name in both graphs, with the same operator and attributes
    (so that `z` in place of `x` is found where a pass dropped the node between them); by a node of the same operator and attributes
    on inputs that are counterparts already.
    """
    known = _values(first)
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for name in _values(second):
        if name in known:
            found[name][name] = None
    _by_readers(known, second, found)
    _by_inputs(first, second, found)
    return {name: list(others) for name, others in found.items()}


def _values(model: ir.Model) -> dict[str, ir.Value]:
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(output for node in graph for output in node.outputs)]
    return {value.name: value for value in values if value.name}


def _by_readers(known: dict[str, ir.Value], second: ir.Model, found: dict[str, dict[str, None]]) -> None:
    for node in reversed(list(second.graph)):
        for output in node.outputs:
            for name in list(found.get(output.name or "", {})):
                producer = known[name].producer()
                if producer is None or not same_kind(producer, node) or len(producer.inputs) != len(node.inputs):
                    continue
                for mine, other in zip(node.inputs, producer.inputs, strict=True):
                    if mine is not None and other is not None and not mine.is_initializer() and not other.is_initializer():
                        found[mine.name or ""][other.name or ""] = None


def _by_inputs(first: ir.Model, second: ir.Model, found: dict[str, dict[str, None]]) -> None:
    nodes: dict[object, list[ir.Node]] = defaultdict(list)
    for node in first.graph:
        nodes[_signature(node, tuple(_operand(value) for value in node.inputs))].append(node)
    for node in second.graph:
        if any(found.get(output.name or "") for output in node.outputs):
            continue
        operands = []
        for value in node.inputs:
            same = found.get(value.name or "") if value is not None and not value.is_initializer() else None
            operands.append(next(iter(same)) if same else _operand(value))
        same_nodes = nodes.get(_signature(node, tuple(operands)))
        if same_nodes:
            for mine, other in zip(node.outputs, same_nodes.pop(0).outputs, strict=False):
                found[mine.name or ""][other.name or ""] = None


def _operand(value: ir.Value | None) -> object:
    if value is None:
        return None
    return ("constant", str(value.shape)) if value.is_initializer() else value.name


def _signature(node: ir.Node, operands: tuple[object, ...]) -> object:
    return node.domain, node.op_type, attributes(node), operands


def attributes(node: ir.Node) -> tuple[tuple[str, str], ...]:
    """The attributes of a node in a form that can be compared."""
    return tuple((name, _text(attribute)) for name, attribute in sorted(node.attributes.items()))


def _text(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.TENSOR:
        return repr(attribute.as_tensor().tobytes())
    return str(attribute.value)


def same_kind(first: ir.Node, second: ir.Node) -> bool:
    """Whether two nodes are of one operator with the same attributes."""
    return (first.domain, first.op_type, attributes(first)) == (second.domain, second.op_type, attributes(second))


def same_node(first: ir.Node, second: ir.Node, values: Arrays, others: Arrays, names: Names) -> bool:
    """Whether two nodes compute the same function of counterparts: constants by content, other inputs by name."""
    if not same_kind(first, second) or len(first.inputs) != len(second.inputs):
        return False
    for mine, other in zip(second.inputs, first.inputs, strict=True):
        if mine is None or other is None:
            if mine is not other:
                return False
        elif mine.is_initializer() or other.is_initializer():
            ours, theirs = others.get(mine.name or ""), values.get(other.name or "")
            if (
                ours is None
                or theirs is None
                or ours.dtype != theirs.dtype
                or not np.array_equal(ours, theirs, equal_nan=ours.dtype.kind == "f")
            ):
                return False
        elif other.name not in names.get(mine.name or "", ()):
            return False
    return True
