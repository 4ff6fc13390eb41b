"""Puts the bias after a matrix product into the product: MIL's `linear` takes both, ONNX has no operator that does at rank 3."""

from __future__ import annotations

import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.shapes import static_shape

DOMAIN = "edgekit.coreml"
"""Domain of operators that only live between legalization and lowering."""


def fuse_biases(model: ir.Model) -> int:
    """Replaces products with a bias by one node; returns how many.

    Before:  x [..., in] ─ MatMul(W [in, out]) ─ Add(b [out]) ─► y
    After:   x [..., in] ─ edgekit.coreml.Linear(W, b) ─► y

    Where W and b are constants, the product is read by the addition alone and has rank 2 or 3.
    """
    found = 0
    for add in list(model.graph):
        if add.op_type != "Add" or add.domain not in ("", "ai.onnx"):
            continue
        for product, bias in (add.inputs, tuple(reversed(add.inputs))):
            node = product.producer() if product is not None else None
            if node is None or product is None or not _fits(node, product, bias):
                continue
            fused = ir.Node(DOMAIN, "Linear", [*node.inputs, bias], name=node.name, metadata_props=dict(node.metadata_props))
            output, old = fused.outputs[0], add.outputs[0]
            output.type, output.shape = old.type, old.shape
            model.graph.insert_before(add, fused)
            name = old.name
            ir.convenience.replace_all_uses_with(old, output, replace_graph_outputs=True)
            model.graph.remove([add, node], safe=True)
            output.name = name
            found += 1
            break
    if found:
        model.opset_imports[DOMAIN] = 1
    return found


def _fits(node: ir.Node, product: ir.Value, bias: ir.Value | None) -> bool:
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx") or not is_used_once(product) or bias is None:
        return False
    matrix = node.inputs[1]
    weight, added, shape = static_shape(matrix), static_shape(bias), static_shape(product)
    return (
        matrix is not None
        and weight is not None
        and shape is not None
        and len(weight) == 2
        and len(shape) in (2, 3)
        and added == (weight[1],)
        and matrix.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16)
        and constant_array(matrix) is not None
        and constant_array(bias) is not None
    )
