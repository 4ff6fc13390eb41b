"""Writes out operators that have no lowering of their own by the function that ONNX's specification defines them by.

Losses, linear attention and other composite operators are functions of simpler ones in the specification itself (their "function body"), so
what Core ML has no form for can still be exact in the terms of what it has.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from edgekit.errors import EdgekitError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.check import check_node
from edgekit.graph.shapes import infer_shapes
from edgekit.targets.coreml.lowering import OPERATORS


def _has_input(index: int) -> Callable[[ir.Node], bool]:
    return lambda node: index < len(node.inputs) and node.inputs[index] is not None


GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
FORMS: dict[str, Callable[[ir.Node], bool]] = {"Attention": _has_input(6)}
"""Of operators that have a lowering: which of their forms are written out nevertheless (nonpad_kv_seqlen)."""


def expand_functions(model: ir.Model) -> int:
    """Replaces, in place, what has no lowering and a function body by that body; returns how many nodes that were.

    Expects inferred shapes and types, which some bodies depend on.
    """
    count = 0
    while calls := _calls(model):
        for number, (node, body) in enumerate(calls):
            node.overload = f"{node.overload}written_out_{number}"
            for name in [name for name, given in node.attributes.items() if name not in body.attributes or given.type in GRAPHS]:
                del node.attributes[name]  # a body that depends on such an attribute has it within already
            body.name, body.domain, body.overload = node.op_type, node.domain, node.overload
            model.functions[body.identifier()] = body
        InlinePass()(model)
        infer_shapes(model)
        canonicalize(model)
        count += len(calls)
    return count


def _calls(model: ir.Model) -> list[tuple[ir.Node, ir.Function]]:
    wanted = [node for node in model.graph.all_nodes() if not _is_lowered(node)]
    return [(node, body) for node in wanted if (body := _body(node, model)) is not None]


def _is_lowered(node: ir.Node) -> bool:
    written_out = FORMS.get(node.op_type)
    return node.domain in ("", "ai.onnx") and node.op_type in OPERATORS and not (written_out is not None and written_out(node))


def _body(node: ir.Node, model: ir.Model) -> ir.Function | None:
    """The function that defines a node, if there is one and its operators are valid in the model's opset."""
    try:
        schema = onnx.defs.get_schema(node.op_type, model.opset_imports.get(node.domain, 1), node.domain)
    except onnx.defs.SchemaError:
        return None
    proto = _function(node, schema)
    if proto is None:
        return None
    del proto.output[len(node.outputs) :]  # what a node leaves out, its body need not make
    function = ir.serde.deserialize_function(proto)
    for domain in function.opset_imports:
        function.opset_imports[domain] = model.opset_imports.setdefault(domain, function.opset_imports[domain])
    for name in function.attributes:
        if name not in node.attributes and schema.attributes[name].default_value.type:
            node.attributes[name] = ir.serde.deserialize_attribute(schema.attributes[name].default_value)
    try:
        for inner in function.all_nodes():
            check_node(inner, model.opset_imports, set(), f"the definition of {node.op_type}")
    except EdgekitError:
        return None
    return function


def _function(node: ir.Node, schema: onnx.defs.OpSchema) -> onnx.FunctionProto | None:
    if schema.has_function:
        return onnx.FunctionProto.FromString(schema.function_body.SerializeToString())
    if not schema.has_context_dependent_function:
        return None
    types = [b"" if value is None else ir.serde.serialize_value(value).type.SerializeToString() for value in node.inputs]
    return onnx.FunctionProto.FromString(schema.get_context_dependent_function(ir.serde.serialize_node(node).SerializeToString(), types))
