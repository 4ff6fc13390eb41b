"""The pass `fold-batch-norm`: a batch norm after a linear operator disappears into its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.batch_norm import Affine, affine, is_batch_norm, why_not_affine


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch normalization into the convolution or matrix product before it.

    Before:  x ─ Conv(W, b) ─ BatchNormalization(γ, β, μ, σ²) ─► y
    After:   x ─ Conv(a·W, a·b + c) ─► y            a = γ/√(σ²+ε),  c = β − μ·a,  one of each per output channel

    The same for ConvTranspose, Gemm, MatMul and MatMul ─ Add(bias), where a MatMul without bias becomes MatMul ─ Add. A bias is made where
    there is none. It is done in float64 and cast back once. A batch norm stays when

    1. it is in training mode, its parameters are not constants, or σ²+ε is not positive somewhere;
    2. no linear operator is before it, or that operator's weights are not constants;
    3. the operator's output is read elsewhere or is a graph output;
    4. the folded weights would not be finite in their dtype.

    A weight that other nodes read as well is left as it is for them.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", equation 14.
    """

    name: ClassVar[str] = "fold-batch-norm"
    effect: ClassVar[Effect] = Effect.EXACT
    default_order: ClassVar[int | None] = 10
    removes: ClassVar[frozenset[str]] = frozenset({"BatchNormalization"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Folds every batch norm of the main graph that can be; returns how many."""
        norms = [node for node in model.graph if is_batch_norm(node)]
        editor = GraphEditor(model) if norms else None
        folded = 0
        for norm in norms:
            assert editor is not None
            where = norm.name or "BatchNormalization"
            if context.skips(where):
                continue
            why = _fold(norm, editor)
            if why is None:
                folded += 1
                context.applied(where)
            else:
                context.refuse(where, why)
        return folded


def _fold(norm: ir.Node, editor: GraphEditor) -> str | None:
    """Folds `norm` into its producer; returns the condition that failed when it cannot."""
    why = why_not_affine(norm)
    if why is not None:
        return why
    x = norm.inputs[0]
    producer = x.producer() if x is not None else None
    if x is None or producer is None or not _is_linear(producer):
        return f"what the batch norm reads is made by {_what_makes(x)}, which it cannot be folded into"
    if producer.graph is not norm.graph:
        return f"{producer.op_type} '{producer.name}' is in another graph"
    if not is_used_once(x):
        return f"the output of {producer.op_type} '{producer.name}' is read elsewhere"
    return _FOLDERS[producer.op_type](producer, norm, affine(norm), editor)


def _is_linear(node: ir.Node) -> bool:
    """True for the operators that a batch norm can be folded into; an Add only as the bias of a MatMul."""
    if node.domain != "" or node.op_type not in _FOLDERS:
        return False
    return node.op_type != "Add" or [_made_by_matmul(value) for value in node.inputs].count(True) == 1


def _what_makes(value: ir.Value | None) -> str:
    if value is None or value.is_graph_input():
        return "nothing (it is a graph input)"
    producer = value.producer()
    return f"{producer.op_type} '{producer.name}'" if producer is not None else "nothing (it is a constant)"


def _fold_conv(conv: ir.Node, norm: ir.Node, a: Affine, editor: GraphEditor) -> str | None:
    """Conv: weight `[O, I/g, *K]`, one scale per row O."""
    weight = constant_array(conv.inputs[1])
    if weight is None:
        return _not_constant(conv, "weight")
    if weight.shape[0] != a.scale.size:
        return _wrong_channels(conv, weight.shape[0], a)
    factor = a.scale.reshape(-1, *[1] * (weight.ndim - 1))
    return _fold_weight_and_bias(conv, norm, a, weight, factor, editor)


def _fold_conv_transpose(conv: ir.Node, norm: ir.Node, a: Affine, editor: GraphEditor) -> str | None:
    """ConvTranspose: weight `[I, O/g, *K]`; the I/g rows of group j make the outputs j·O/g … (j+1)·O/g."""
    weight = constant_array(conv.inputs[1])
    if weight is None:
        return _not_constant(conv, "weight")
    groups = conv.attributes.get_int("group", 1)
    if groups * weight.shape[1] != a.scale.size:
        return _wrong_channels(conv, groups * weight.shape[1], a)
    rows = np.repeat(a.scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)  # [I, O/g]
    return _fold_weight_and_bias(conv, norm, a, weight, rows.reshape(*rows.shape, *[1] * (weight.ndim - 2)), editor)


def _fold_weight_and_bias(
    conv: ir.Node, norm: ir.Node, a: Affine, weight: np.ndarray, factor: np.ndarray, editor: GraphEditor
) -> str | None:
    bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = constant_array(bias_value)
    if bias_value is not None and bias is None:
        return _not_constant(conv, "bias")
    new_weight = _scaled(weight, factor)
    new_bias = _cast(a.shift if bias is None else a.scale * bias.astype(np.float64) + a.shift, weight.dtype)
    if new_weight is None or new_bias is None:
        return _not_finite(conv, weight.dtype)
    editor.set_constant(conv, 1, new_weight)
    editor.set_constant(conv, 2, new_bias, name=f"{conv.name}.bias" if bias is None else "")
    _take_over(norm, conv.outputs[0], editor)
    return None


def _fold_gemm(gemm: ir.Node, norm: ir.Node, a: Affine, editor: GraphEditor) -> str | None:
    """Gemm: alpha·A·B + beta·C with B `[K, N]` (or its transpose) and C broadcast to `[M, N]`; one scale per column N."""
    weight = constant_array(gemm.inputs[1])
    if weight is None:
        return _not_constant(gemm, "weight")
    columns = 0 if gemm.attributes.get_int("transB", 0) else 1
    if weight.shape[columns] != a.scale.size:
        return _wrong_channels(gemm, weight.shape[columns], a)
    bias_value = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    bias = constant_array(bias_value)
    if bias_value is not None and bias is None:
        return _not_constant(gemm, "bias")
    beta = gemm.attributes.get_float("beta", 1.0)
    new_weight = _scaled(weight, a.scale[:, None] if columns == 0 else a.scale)
    new_bias = _cast(a.shift if bias is None else a.scale * (beta * bias.astype(np.float64)) + a.shift, weight.dtype)
    if new_weight is None or new_bias is None:
        return _not_finite(gemm, weight.dtype)
    editor.set_constant(gemm, 1, new_weight)
    editor.set_constant(gemm, 2, new_bias, name=f"{gemm.name}.bias" if bias is None else "")
    gemm.attributes.pop("beta", None)  # it is in the bias now
    _take_over(norm, gemm.outputs[0], editor)
    return None


def _fold_matmul(matmul: ir.Node, norm: ir.Node, a: Affine, editor: GraphEditor) -> str | None:
    """MatMul `[B, K]` · `[K, N]` without bias: the batch norm becomes an Add of its shift."""
    why, weight = _foldable_matmul(matmul, a)
    if weight is None:
        return why
    new_weight, shift = _scaled(weight, a.scale), _cast(a.shift, weight.dtype)
    if new_weight is None or shift is None:
        return _not_finite(matmul, weight.dtype)
    editor.set_constant(matmul, 1, new_weight)
    bias = editor.add_initializer(f"{matmul.name}.bias", shift, made_from=norm.inputs)
    add = ir.node("Add", [matmul.outputs[0], bias], name=editor.unique_name(f"{matmul.name}.Add"))
    add.outputs[0].name = editor.unique_name(add.name or "Add")
    add.metadata_props.update(matmul.metadata_props)
    editor.graph.insert_after(matmul, add)
    _take_over(norm, add.outputs[0], editor)
    return None


def _fold_add(add: ir.Node, norm: ir.Node, a: Affine, editor: GraphEditor) -> str | None:
    """MatMul ─ Add(bias), the operands of the Add in either order; the bias is one number or one per column."""
    product_index = 0 if _made_by_matmul(add.inputs[0]) else 1
    product, bias_index = add.inputs[product_index], 1 - product_index
    assert product is not None
    matmul = product.producer()
    assert matmul is not None
    bias = constant_array(add.inputs[bias_index])
    if bias is None:
        return _not_constant(add, "bias")
    if not is_used_once(product):
        return f"the output of MatMul '{matmul.name}' is read elsewhere"
    why, weight = _foldable_matmul(matmul, a)
    if weight is None:
        return why
    if bias.ndim > 2 or any(size != 1 for size in bias.shape[:-1]):
        return f"the bias of Add '{add.name}' is not one number per column"
    new_weight, new_bias = _scaled(weight, a.scale), _cast(a.scale * bias.astype(np.float64) + a.shift, weight.dtype)
    if new_weight is None or new_bias is None:
        return _not_finite(matmul, weight.dtype)
    editor.set_constant(matmul, 1, new_weight)
    editor.set_constant(add, bias_index, new_bias)
    _take_over(norm, add.outputs[0], editor)
    return None


def _made_by_matmul(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "MatMul" and producer.domain == ""


def _foldable_matmul(matmul: ir.Node, a: Affine) -> tuple[str | None, np.ndarray | None]:
    """Returns the weight `[K, N]`, or the condition that failed."""
    shape, weight = static_shape(matmul.outputs[0]), constant_array(matmul.inputs[1])
    if weight is None:
        return _not_constant(matmul, "weight"), None
    if shape is None or len(shape) != 2 or weight.ndim != 2:
        return f"MatMul '{matmul.name}' does not give [B, C]: the batch norm's channels are not the columns of its weight", None
    if weight.shape[1] != a.scale.size:
        return _wrong_channels(matmul, weight.shape[1], a), None
    return None, weight


def _scaled(weight: np.ndarray, factor: np.ndarray) -> np.ndarray | None:
    """Returns weight · factor in the weight's dtype, computed in float64 block by block; None when it is not finite."""
    result = np.empty_like(weight)
    with np.errstate(over="ignore", invalid="ignore"):
        np.multiply(weight, factor, out=result, dtype=np.float64, casting="unsafe")
    return result if np.isfinite(result).all() else None


def _cast(array: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    return result if np.isfinite(result).all() else None


def _take_over(norm: ir.Node, output: ir.Value, editor: GraphEditor) -> None:
    editor.replace_value(norm.outputs[0], output)
    editor.remove([norm])


def _not_constant(node: ir.Node, what: str) -> str:
    return f"the {what} of {node.op_type} '{node.name}' is not a constant"


def _wrong_channels(node: ir.Node, channels: int, a: Affine) -> str:
    return f"{node.op_type} '{node.name}' has {channels} output channels and the batch norm {a.scale.size}"


def _not_finite(node: ir.Node, dtype: np.dtype) -> str:
    return f"the folded weights of {node.op_type} '{node.name}' would not be finite in {dtype.name}"


_FOLDERS = {
    "Add": _fold_add,
    "Conv": _fold_conv,
    "ConvTranspose": _fold_conv_transpose,
    "Gemm": _fold_gemm,
    "MatMul": _fold_matmul,
}
"""By operator, how a batch norm after it is folded into it."""
