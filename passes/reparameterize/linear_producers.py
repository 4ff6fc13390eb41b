"""Folds an affine map of what a linear operator makes into that operator: a ⊙ (W·x + b) + c = (diag(a)·W)·x + (a·b + c).

The map may stand behind layout operators, averages and the like that it commutes with (`affine_paths`): it is carried back through them to
the operator. Arithmetic is done in float64 and cast back once; a result that is not finite in the weight's dtype is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine_paths import along, backward
from edgekit.passes.reparameterize.batch_norm import Affine


@dataclass(frozen=True)
class Outcome:
    """What became of folding a map backwards.

    Attributes:
        why: The condition that failed; None where the map was folded.
        near: Whether a linear operator was found, so that the place nearly matched.
        moved: Whether there were operators between, which may now cancel out.
    """

    why: str | None
    near: bool = True
    moved: bool = False


@dataclass(frozen=True)
class Terms:
    """Under which conditions a map may be folded.

    Attributes:
        what: What is folded, for messages.
        copies: Whether a weight that other nodes read may be copied; otherwise that is refused, for the bytes.
        new_add: Whether a MatMul without bias may get an Add for a shift.
    """

    what: str
    copies: bool = False
    new_add: bool = False


def fold_back(node: ir.Node, x: ir.Value | None, a: Affine, terms: Terms, editor: GraphEditor) -> Outcome:
    """Folds `node`, which maps `x` by `a`, into the linear operator that makes `x`, and removes it.

    The arrays of `a` have the rank of `x` and broadcast to its shape. Conditions: nothing else reads `x` or what lies between it and the
    operator; the map commutes with what lies between, and varies along the operator's output channels only; weights are constants.
    """
    path: list[ir.Node] = []
    value = x
    while True:
        producer = value.producer() if value is not None else None
        if value is None or producer is None:
            nothing = "nothing (it is a graph input)" if value is None or value.is_graph_input() else "nothing (it is a constant)"
            return Outcome(f"what the {terms.what} reads is made by {nothing}, which it cannot be folded into", near=False)
        if producer.graph is not node.graph:
            return Outcome(f"{_called(producer)} is in another graph", near=False)
        linear = _is_linear(producer)
        earlier = a if linear else backward(producer, a)
        if isinstance(earlier, str):
            return Outcome(f"what the {terms.what} reads is made by {_called(producer)}, which it cannot be folded into", near=False)
        if not is_used_once(value):
            return Outcome(f"the output of {_called(producer)} is read elsewhere", near=linear)
        if linear:
            break
        path.append(producer)
        value, a = producer.inputs[0], earlier
    result = _FOLDERS[producer.op_type](producer, a, terms, editor)
    if isinstance(result, str):
        return Outcome(result)
    if path:
        path[-1].replace_input_with(0, result)
        result = path[0].outputs[0]
    editor.replace_value(node.outputs[0], result)
    editor.remove([node])
    return Outcome(None, moved=bool(path))


def _is_linear(node: ir.Node) -> bool:
    """True for the operators that a map can be folded into; an Add only as the bias of a MatMul."""
    if node.domain != "" or node.op_type not in _FOLDERS:
        return False
    return node.op_type != "Add" or [_made_by_matmul(value) for value in node.inputs].count(True) == 1


def is_bias(node: ir.Node) -> bool:
    """True for the Add of a constant right after a MatMul by a constant: it is the linear layer's bias."""
    if node.op_type != "Add" or node.domain != "":
        return False
    for index, value in enumerate(node.inputs):
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "MatMul" and constant_array(producer.inputs[1]) is not None:
            return constant_array(node.inputs[1 - index]) is not None
    return False


def _fold_conv(conv: ir.Node, a: Affine, terms: Terms, editor: GraphEditor) -> ir.Value | str:
    """Conv: weight `[O, I/g, *K]`, one scale per row O."""
    weight = constant_array(conv.inputs[1])
    if weight is None:
        return _not_constant(conv, "weight")
    per_channel = along(a, 1, weight.shape[0])
    if per_channel is None:
        return _other_axis(conv)
    factor = per_channel.scale.reshape(-1, *[1] * (weight.ndim - 1))
    return _fold_weight_and_bias(conv, per_channel, weight, factor, terms, editor)


def _fold_conv_transpose(conv: ir.Node, a: Affine, terms: Terms, editor: GraphEditor) -> ir.Value | str:
    """ConvTranspose: weight `[I, O/g, *K]`; the I/g rows of group j make the outputs j·O/g … (j+1)·O/g."""
    weight = constant_array(conv.inputs[1])
    if weight is None:
        return _not_constant(conv, "weight")
    groups = conv.attributes.get_int("group", 1)
    per_channel = along(a, 1, groups * weight.shape[1])
    if per_channel is None:
        return _other_axis(conv)
    rows = np.repeat(per_channel.scale.reshape(groups, -1), weight.shape[0] // groups, axis=0)  # [I, O/g]
    return _fold_weight_and_bias(conv, per_channel, weight, rows.reshape(*rows.shape, *[1] * (weight.ndim - 2)), terms, editor)


def _fold_weight_and_bias(
    conv: ir.Node, a: Affine, weight: np.ndarray, factor: np.ndarray, terms: Terms, editor: GraphEditor
) -> ir.Value | str:
    bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = constant_array(bias_value)
    if bias_value is not None and bias is None:
        return _not_constant(conv, "bias")
    if (why := _why_not_written(conv, a, terms)) is not None:
        return why
    new_weight = _scaled(weight, factor)
    new_bias = _cast(a.shift if bias is None else a.scale * bias.astype(np.float64) + a.shift, weight.dtype)
    if new_weight is None or new_bias is None:
        return _not_finite(conv, weight.dtype)
    _set_weight(conv, a, new_weight, editor)
    if bias is not None or a.shift.any():
        editor.set_constant(conv, 2, new_bias, name=f"{conv.name}.bias" if bias is None else "")
    return conv.outputs[0]


def _fold_gemm(gemm: ir.Node, a: Affine, terms: Terms, editor: GraphEditor) -> ir.Value | str:
    """Gemm: alpha·A·B + beta·C with B `[K, N]` (or its transpose) and C broadcast to `[M, N]`; one scale per column N."""
    weight = constant_array(gemm.inputs[1])
    if weight is None:
        return _not_constant(gemm, "weight")
    columns = 0 if gemm.attributes.get_int("transB", 0) else 1
    per_column = along(a, 1, weight.shape[columns])
    if per_column is None:
        return _other_axis(gemm)
    bias_value = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    bias = constant_array(bias_value)
    if bias_value is not None and bias is None:
        return _not_constant(gemm, "bias")
    if (why := _why_not_written(gemm, a, terms)) is not None:
        return why
    beta = gemm.attributes.get_float("beta", 1.0)
    new_weight = _scaled(weight, per_column.scale[:, None] if columns == 0 else per_column.scale)
    shift = per_column.shift
    new_bias = _cast(shift if bias is None else per_column.scale * (beta * bias.astype(np.float64)) + shift, weight.dtype)
    if new_weight is None or new_bias is None:
        return _not_finite(gemm, weight.dtype)
    _set_weight(gemm, a, new_weight, editor)
    if bias is not None or shift.any():
        editor.set_constant(gemm, 2, new_bias, name=f"{gemm.name}.bias" if bias is None else "")
        gemm.attributes.pop("beta", None)  # it is in the bias now
    return gemm.outputs[0]


def _fold_matmul(matmul: ir.Node, a: Affine, terms: Terms, editor: GraphEditor) -> ir.Value | str:
    """MatMul `[…, K]` · `[K, N]` without bias: a shift becomes an Add."""
    found = _foldable_matmul(matmul, a, terms)
    if isinstance(found, str):
        return found
    weight, per_column = found
    new_weight, shift = _scaled(weight, per_column.scale), _cast(per_column.shift, weight.dtype)
    if new_weight is None or shift is None:
        return _not_finite(matmul, weight.dtype)
    if not shift.any():
        _set_weight(matmul, a, new_weight, editor)
        return matmul.outputs[0]
    if not terms.new_add:
        return f"MatMul '{matmul.name}' has no bias: the Add would take the place of the {terms.what}"
    _set_weight(matmul, a, new_weight, editor)
    bias = editor.add_initializer(f"{matmul.name}.bias", shift, made_from=matmul.inputs)
    add = ir.node("Add", [matmul.outputs[0], bias], name=editor.unique_name(f"{matmul.name}.Add"))
    output, product = add.outputs[0], matmul.outputs[0]
    output.name = editor.unique_name(add.name or "Add")
    output.type = ir.TensorType(product.dtype) if product.dtype is not None else None
    output.shape = product.shape.copy() if product.shape is not None else None
    add.metadata_props.update(matmul.metadata_props)
    editor.graph.insert_after(matmul, add)
    return output


def _fold_add(add: ir.Node, a: Affine, terms: Terms, editor: GraphEditor) -> ir.Value | str:
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
    found = _foldable_matmul(matmul, a, terms)
    if isinstance(found, str):
        return found
    weight, per_column = found
    if bias.ndim > a.scale.ndim or any(size != 1 for size in bias.shape[:-1]):
        return f"the bias of Add '{add.name}' is not one number per column"
    new_weight = _scaled(weight, per_column.scale)
    new_bias = _cast(per_column.scale * bias.astype(np.float64) + per_column.shift, weight.dtype)
    if new_weight is None or new_bias is None:
        return _not_finite(matmul, weight.dtype)
    _set_weight(matmul, a, new_weight, editor)
    editor.set_constant(add, bias_index, new_bias)
    return add.outputs[0]


def _made_by_matmul(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "MatMul" and producer.domain == ""


def _foldable_matmul(matmul: ir.Node, a: Affine, terms: Terms) -> tuple[np.ndarray, Affine] | str:
    """Returns the weight `[K, N]` and the map per column, or the condition that failed."""
    weight = constant_array(matmul.inputs[1])
    if weight is None:
        return _not_constant(matmul, "weight")
    per_column = along(a, -1, weight.shape[-1])
    if weight.ndim != 2 or per_column is None:
        shape = static_shape(matmul.outputs[0])
        return f"MatMul '{matmul.name}' does not give [B, C] but {shape}: the {terms.what}'s channels are not the columns of its weight"
    why = _why_not_written(matmul, a, terms)
    return why if why is not None else (weight, per_column)


def _why_not_written(node: ir.Node, a: Affine, terms: Terms) -> str | None:
    weight = node.inputs[1]
    if terms.copies or weight is None or is_used_once(weight) or (a.scale == 1).all():
        return None
    return f"the weight of {_called(node)} is read elsewhere: a copy would take more bytes"


def _set_weight(node: ir.Node, a: Affine, weight: np.ndarray, editor: GraphEditor) -> None:
    if not (a.scale == 1).all():
        editor.set_constant(node, 1, weight)


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


def _called(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"


def _not_constant(node: ir.Node, what: str) -> str:
    return f"the {what} of {_called(node)} is not a constant"


def _other_axis(node: ir.Node) -> str:
    return f"the scale or shift varies along another axis than the output channels of {_called(node)}"


def _not_finite(node: ir.Node, dtype: np.dtype) -> str:
    return f"the folded weights of {_called(node)} would not be finite in {dtype.name}"


_FOLDERS: dict[str, Callable[[ir.Node, Affine, Terms, GraphEditor], ir.Value | str]] = {
    "Add": _fold_add,
    "Conv": _fold_conv,
    "ConvTranspose": _fold_conv_transpose,
    "Gemm": _fold_gemm,
    "MatMul": _fold_matmul,
}
"""By operator, how a map of what it makes is folded into it."""
