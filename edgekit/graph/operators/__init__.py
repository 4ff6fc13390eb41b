"""The operators of the domain `edgekit`: what ONNX has no operator for, each with a body of standard operators.

A graph that uses them runs in any ONNX runtime and can be checked at any point. A target that knows an operator lowers it natively;
one that does not inlines the body. The convention of packed bits, which all of them share, is in docs/packed-bits.md.
"""

from __future__ import annotations

import onnx_ir as ir

from edgekit.errors import UsageError, nearest
from edgekit.graph.constants import GraphEditor
from edgekit.graph.operators import gather_tokens, pack_bits, sign
from edgekit.graph.operators.base import DOMAIN, OPSET, VERSION, Evaluate, Operator
from edgekit.graph.shapes import static_shape

__all__ = ["DOMAIN", "FAST", "OPERATORS", "Evaluate", "Operator", "add_function", "insert"]

OPERATORS: dict[str, Operator] = {operator.name: operator for operator in (gather_tokens.OPERATOR, pack_bits.OPERATOR, sign.OPERATOR)}
"""Every operator by its name."""

FAST: dict[str, Evaluate] = {name: operator.evaluate for name, operator in OPERATORS.items() if operator.evaluate is not None}
"""The torch functions of those that have one, by name: what an interpreter may run in place of the body."""


def add_function(model: ir.Model, name: str, **attributes: int | float | str) -> ir.OperatorIdentifier:
    """Adds the function of operator `name` to `model`, unless it is there already, and returns its identifier.

    Args:
        model: The model, at opset 23 or newer.
        name: A key of `OPERATORS`.
        **attributes: What the operator's builder takes.

    Raises:
        UsageError: There is no such operator, or the model's opset is too old for its body.
    """
    operator = _find(name)
    opset = model.opset_imports.get("", 0)
    if opset < OPSET:
        raise UsageError(
            f"operator '{DOMAIN}::{name}' needs opset {OPSET}, the model is at {opset}",
            where=f"graph '{model.graph.name}'",
            fix="convert it by edgekit.graph.opset.to_opset first",
        )
    function = operator.build_function(**attributes)
    function.opset_imports[""] = opset  # one opset in a model: a body of another one could not be inlined
    model.opset_imports.setdefault(DOMAIN, VERSION)
    model.functions.setdefault(function.identifier(), function)
    return function.identifier()


def insert(
    model: ir.Model,
    name: str,
    inputs: list[ir.Value],
    *,
    before: ir.Node | None = None,
    node_name: str = "",
    editor: GraphEditor | None = None,
    **attributes: int | float | str,
) -> ir.Node:
    """Inserts a node of operator `name` into the main graph, with its function, and returns it.

    Its outputs have a type, and a shape where those of the inputs are static.

    Args:
        model: The model, at opset 23 or newer.
        name: A key of `OPERATORS`.
        inputs: What it reads.
        before: The node that it is put before; None: the end of the graph.
        node_name: The name of the node, which a number may follow; empty: the operator's.
        editor: The caller's editor of the model, if it has one in use.
        **attributes: What the operator's builder takes.

    Raises:
        UsageError: There is no such operator, the model's opset is too old, or the inputs do not fit the operator.
    """
    operator = _find(name)
    shapes = [static_shape(value) for value in inputs]
    known = [shape for shape in shapes if shape is not None]
    outputs = operator.infer_shape(known, attributes) if len(known) == len(shapes) else None
    dtypes = operator.infer_dtype([value.dtype for value in inputs])
    domain, op_type, overload = add_function(model, name, **attributes)
    editor = editor or GraphEditor(model)
    node = ir.Node(domain, op_type, inputs, overload=overload, num_outputs=len(dtypes), name=editor.unique_name(node_name or name))
    for index, (value, dtype) in enumerate(zip(node.outputs, dtypes, strict=True)):
        value.name = editor.unique_name(f"{node.name}:{index}")
        value.type = ir.TensorType(dtype) if dtype is not None else None
        value.shape = ir.Shape(outputs[index]) if outputs is not None else None
    if before is None:
        model.graph.append(node)
    else:
        model.graph.insert_before(before, node)
    return node


def _find(name: str) -> Operator:
    if name not in OPERATORS:
        raise UsageError(f"the domain '{DOMAIN}' has no operator '{name}'", fix=nearest(name, OPERATORS))
    return OPERATORS[name]
