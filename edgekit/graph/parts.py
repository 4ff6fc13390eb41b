"""Cutting a part out of a graph as a model of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir


def part(model: ir.Model, outputs: Sequence[ir.Value], stops: Collection[ir.Value] = ()) -> ir.Model:
    """The part of the main graph that computes `outputs`, as a model of its own; weights are shared.

    Args:
        model: The graph.
        outputs: Values that nodes make.
        stops: Values that the part takes as inputs instead of computing them.
    """
    inputs = frontier(outputs, stops)
    graph = ir.convenience.extract(model.graph, inputs=inputs, outputs=list(outputs))
    graph.opset_imports.update(model.graph.opset_imports)
    cut = ir.Model(graph, ir_version=model.ir_version, functions=[function.clone() for function in model.functions.values()])
    for value in cut.graph.inputs:
        value.const_value = None
    return cut


def frontier(outputs: Iterable[ir.Value], stops: Collection[ir.Value] = ()) -> list[ir.Value]:
    """The graph inputs and `stops` that `outputs` depend on, in the order in which they are met."""
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    stack = [*outputs]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        producer = value.producer()
        if value in stops or (producer is None and not value.is_initializer()):
            found[value] = None
        elif producer is not None:
            stack += reads(producer)
    return list(found)


def reads(node: ir.Node) -> list[ir.Value]:
    """What a node reads from the graph that it stands in, by its subgraphs too."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
            continue
        bodies = [attribute.as_graph()] if attribute.type == ir.AttributeType.GRAPH else attribute.as_graphs()
        for body in bodies:
            for inner in ir.traversal.RecursiveGraphIterator(body):
                values += [value for value in inner.inputs if value is not None and value.graph is node.graph]
    return values


def isolated(node: ir.Node, model: ir.Model, arity: int | None = None) -> ir.Model:
    """One node as a model whose inputs are all of its operands, weights too, called `operand_0`, `operand_1`, …; outputs keep their names.

    Args:
        node: The node.
        model: The model that it is of.
        arity: How many operands to give it; None: those that it has.
    """
    count = len(node.inputs) if arity is None else arity
    operands: list[ir.Value | None] = []
    for index in range(count):
        value = node.inputs[index] if index < len(node.inputs) else None
        absent = index < len(node.inputs) and value is None
        operands.append(None if absent else ir.Value(name=f"operand_{index}", type=value.type if value else None))
    copy = ir.Node(
        node.domain, node.op_type, operands, list(node.attributes.values()), num_outputs=len(node.outputs), name=node.name,
        version=node.version,
    )  # fmt: skip
    for new, old in zip(copy.outputs, node.outputs, strict=True):
        new.name, new.type = old.name, old.type
    graph = ir.Graph(
        [value for value in operands if value is not None],
        [value for value in copy.outputs if value.name],
        nodes=[copy],
        opset_imports=dict(model.graph.opset_imports),
        name=node.name or node.op_type,
    )
    return ir.Model(graph, ir_version=model.ir_version, functions=[function.clone() for function in model.functions.values()])
