"""Whether a graph was changed, told from what it is made of."""

from __future__ import annotations

import onnx_ir as ir


def fingerprint(model: ir.Model) -> tuple[object, ...]:
    """A value that is equal for two states of one model only if nodes, attributes, connections, types and weights are.

    Weights are told apart by identity, since tensors are immutable: a pass that changes a weight gives it a new tensor.
    """
    graph = model.graph
    weights = tuple((name, id(value.const_value)) for name, value in graph.initializers.items())
    borders = tuple((value.name, str(value.dtype), str(value.shape)) for value in (*graph.inputs, *graph.outputs))
    nodes = tuple(
        (
            node.domain,
            node.op_type,
            tuple(value.name if value is not None else None for value in node.inputs),
            tuple(value.name for value in node.outputs),
            tuple((name, _attribute(attribute)) for name, attribute in sorted(node.attributes.items())),
        )
        for node in ir.traversal.RecursiveGraphIterator(graph)
    )
    return weights, borders, nodes, tuple(model.functions), tuple(sorted(model.opset_imports.items()))


def _attribute(attribute: ir.Attr) -> object:
    plain = (ir.AttributeType.INT, ir.AttributeType.FLOAT, ir.AttributeType.STRING, ir.AttributeType.INTS, ir.AttributeType.FLOATS)
    return str(attribute.value) if attribute.type in plain else id(attribute.value)
