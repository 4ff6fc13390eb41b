"""Gives linear layers one form, so that passes meet each in a single shape.

    Before:  x ─ Gemm(W[out, in], transB=1, b) ─► y
    After:   x ─ MatMul(W[in, out]) ─ Add(b[out]) ─► y

For every rank of x, Add with its bias second. It is MatMul and not Gemm because Gemm exists for two axes only, while the tokens of a
transformer have three; runtimes join MatMul and Add again. What becomes it:

1. Gemm with a constant weight and a constant bias per column, or none; α, β and the transposition of W are folded into the constants;
2. Add(b, MatMul), and biases with leading axes of length 1;
3. Reshape [M, K] ─ MatMul ─ Add ─ Reshape, which only merges the leading axes of tokens: MatMul takes them as they are;
4. a convolution of kernel 1 between two Transposes (and Reshapes) that move the last axis of x to the channels and back.

And a bias that is added after a convolution, one constant per channel, becomes the convolution's own. A weight that other operators read
as well keeps its layout, in a Gemm, so that it is not stored twice. A constant on the left of MatMul stays.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import FLOATS, in_range, insert, made_by, operands, per_channel, region, sole_reader, take_over
from edgekit.graph.shapes import static_shape


def unify_linear(model: ir.Model) -> int:
    """Brings the linear layers of the main graph to one form, in place; returns how many rewrites that took.

    Expects shapes to be inferred and constants to be folded.
    """
    editor = GraphEditor(model)
    count = 0
    for op_types, step in _STEPS:
        for node in list(model.graph):
            if node.graph is not None and node.domain == "" and node.op_type in op_types and node.outputs[0].dtype in FLOATS:
                count += step(node, editor)
    return count


def _split_gemm(gemm: ir.Node, editor: GraphEditor) -> int:
    """Gemm ─► MatMul, Add; together with all others that read the same weight, which is transposed once."""
    weight_value = gemm.inputs[1]
    if weight_value is None or not weight_value.is_initializer() or weight_value.is_graph_output():
        return 0
    transposed = bool(gemm.attributes.get_int("transB", 0))
    alpha = gemm.attributes.get_float("alpha", 1.0)
    alike = [gemm] if not transposed and alpha == 1 else _readers_alike(weight_value, transposed, alpha)
    weight = constant_array(weight_value)
    if weight is None or weight.ndim != 2 or not alike or not all(_is_linear(node, weight, transposed) for node in alike):
        return 0
    value, name = weight_value, weight_value.name or ""
    if transposed or alpha != 1:
        scaled = weight if alpha == 1 else in_range(weight.astype(np.float64) * alpha, weight.dtype)
        if scaled is None:
            return 0
        value = editor.add_initializer(name, np.ascontiguousarray(scaled.T if transposed else scaled), made_from=[weight_value])
    for node in alike:
        _as_matmul(node, value, editor)
    editor.drop_unused([weight_value])
    if value is not weight_value and name not in editor.graph.initializers:
        value.name = name
    return len(alike)


def _readers_alike(weight: ir.Value, transposed: bool, alpha: float) -> list[ir.Node]:
    """Returns the Gemms that read `weight`, all in the same way; none when anything else reads it."""
    readers = [use.node for use in weight.uses() if use.idx == 1 and use.node.op_type == "Gemm" and use.node.domain == ""]
    readers = [node for node in readers if node.attributes.get_float("alpha", 1.0) == alpha
               and bool(node.attributes.get_int("transB", 0)) == transposed]  # fmt: skip
    return readers if len(readers) == len(weight.uses()) and len({node.graph for node in readers}) == 1 else []


def _is_linear(gemm: ir.Node, weight: np.ndarray, transposed: bool) -> bool:
    """True for x·W + b with constant W and a constant b that is one number per column, or none."""
    columns = weight.shape[0 if transposed else 1]
    if gemm.attributes.get_int("transA", 0) or gemm.inputs[0] is None or constant_array(gemm.inputs[0]) is not None:
        return False
    if len(gemm.inputs) < 3 or gemm.inputs[2] is None:
        return True
    bias = constant_array(gemm.inputs[2])
    return bias is not None and _bias(bias, columns, gemm.attributes.get_float("beta", 1.0)) is not None


def _bias(array: np.ndarray, columns: int, factor: float = 1.0) -> np.ndarray | None:
    """Returns a constant that is broadcast over rows as `[columns]`, times `factor`; None when it differs between rows."""
    if any(size != 1 for size in array.shape[:-1]) or array.size not in (1, columns):
        return None
    flat = np.broadcast_to(array.reshape(-1), (columns,))
    return np.ascontiguousarray(flat) if factor == 1 else in_range(flat.astype(np.float64) * factor, array.dtype)


def _as_matmul(gemm: ir.Node, weight: ir.Value, editor: GraphEditor) -> None:
    x, bias_value = gemm.inputs[0], gemm.inputs[2] if len(gemm.inputs) > 2 else None
    assert x is not None
    matmul = insert(editor, gemm, [gemm], "MatMul", [x, weight], gemm.outputs[0].shape)
    if bias_value is None:
        take_over(editor, gemm.outputs[0], matmul.outputs[0])
        editor.remove([gemm])
        return
    bias, matrix = constant_array(bias_value), constant_array(weight)
    assert bias is not None
    assert matrix is not None
    array = _bias(bias, matrix.shape[1], gemm.attributes.get_float("beta", 1.0))
    assert array is not None
    add = insert(editor, gemm, [gemm], "Add", [matmul.outputs[0], bias_value], gemm.outputs[0].shape)
    take_over(editor, gemm.outputs[0], add.outputs[0])
    editor.remove([gemm])
    if not np.array_equal(array, bias):  # after the Gemm is gone, so that the new bias may bear the old one's name
        editor.set_constant(add, 1, array)


def _order_bias(add: ir.Node, editor: GraphEditor) -> int:
    """Add(b, MatMul) ─► Add(MatMul, b), with b `[out]`."""
    first, second = add.inputs
    if first is None or second is None:
        return 0
    swapped = _is_product(second) and constant_array(first) is not None
    product, bias_value = (second, first) if swapped else (first, second)
    bias = constant_array(bias_value)
    if not _is_product(product) or bias is None or product.shape is None or bias.ndim > len(product.shape):
        return 0
    matmul = product.producer()
    weight = constant_array(matmul.inputs[1]) if matmul is not None else None
    assert weight is not None
    array = _bias(bias, weight.shape[1])
    if array is None or bias.size != array.size:
        return 0
    if swapped:
        add.replace_input_with(0, product)
        add.replace_input_with(1, bias_value)
    if bias.ndim != 1:
        editor.set_constant(add, 1, array)
    return int(swapped or bias.ndim != 1)


def _is_product(value: ir.Value) -> bool:
    """True for the product of a value with a constant matrix on its right."""
    matmul = made_by(value, "MatMul")
    weight = constant_array(matmul.inputs[1]) if matmul is not None else None
    return weight is not None and weight.ndim == 2 and matmul is not None and constant_array(matmul.inputs[0]) is None


def _lift(matmul: ir.Node, editor: GraphEditor) -> int:
    """Takes off the Reshapes that merge the leading axes before a linear layer and split them after it."""
    into = made_by(matmul.inputs[0], "Reshape")
    if into is None or not _is_product(matmul.outputs[0]):
        return 0
    x = operands(into)[0]
    shape, merged, columns = static_shape(x), static_shape(into.outputs[0]), static_shape(matmul.inputs[1])
    if shape is None or merged is None or columns is None or len(merged) != 2 or len(shape) < 3 or shape[-1] != merged[-1]:
        return 0
    last = matmul
    reader = sole_reader(matmul.outputs[0])
    if reader is not None and reader[0].op_type == "Add":
        bias = constant_array(reader[1])
        if bias is None or _bias(bias, columns[1]) is None:
            return 0
        last = reader[0]
    result = last.outputs[0]
    if not is_used_once(result) or not is_used_once(matmul.outputs[0]):
        return 0
    back = next(iter(result.uses())).node
    final = static_shape(back.outputs[0])
    lifted = (*shape[:-1], columns[1])
    if back.op_type != "Reshape" or back.domain != "" or back.inputs[0] is not result or final is None or 0 in final:
        return 0
    matmul.replace_input_with(0, x)
    for node in (matmul, last):
        node.outputs[0].shape = ir.Shape(lifted)
    if not into.outputs[0].uses():
        editor.remove([into])
    if final == lifted:
        take_over(editor, back.outputs[0], result)
        editor.remove([back])
    else:  # it splits features into heads; a target such as [0, -1, …] was meant for two axes
        editor.set_constant(back, 1, np.array(final, dtype=np.int64))
        back.attributes.pop("allowzero", None)
    return 1


def _pointwise(conv: ir.Node, editor: GraphEditor) -> int:
    """[…, C] ─ Transpose ─ (Reshape) ─ Conv of kernel 1 ─ (Reshape) ─ Transpose ─► […, O], as a linear layer."""
    weight, shape, made = constant_array(conv.inputs[1]), static_shape(conv.inputs[0]), static_shape(conv.outputs[0])
    bias_value = conv.inputs[2] if len(conv.inputs) > 2 else None
    bias = constant_array(bias_value)
    if weight is None or shape is None or made is None or (bias_value is not None and bias is None):
        return 0
    if (
        math.prod(weight.shape[2:]) != 1
        or weight.shape[1] != shape[1]
        or made[2:] != shape[2:]
        or any(conv.attributes.get_ints("pads", ()))
    ):
        return 0
    if any(stride != 1 for stride in conv.attributes.get_ints("strides", ())):
        return 0
    inner, outer = _channels_first(conv.inputs[0]), _channels_last(conv.outputs[0])
    if inner is None or outer is None:
        return 0
    x, result = inner, outer.outputs[0]
    tokens = static_shape(x)
    nodes = region(outer, [x])
    if tokens is None or nodes is None or static_shape(result) != (*tokens[:-1], weight.shape[0]):
        return 0
    matrix = np.ascontiguousarray(weight.reshape(weight.shape[:2]).T)
    matmul = insert(editor, outer, nodes, "MatMul", [x, operands(conv)[1]], result.shape)
    editor.set_constant(matmul, 1, matrix)
    last = matmul
    if bias_value is not None:
        last = insert(editor, outer, nodes, "Add", [matmul.outputs[0], bias_value], result.shape)
    old_weight = conv.inputs[1]
    take_over(editor, result, last.outputs[0])
    editor.remove(nodes)
    new_weight = matmul.inputs[1]
    if old_weight is not None and new_weight is not None and old_weight.name not in editor.graph.initializers:
        new_weight.name = old_weight.name
    return 1


_VIEWS = ("Reshape", "Squeeze", "Unsqueeze")


def _channels_first(value: ir.Value | None) -> ir.Value | None:
    """Returns x when `value` is x with its last axis moved to axis 1, and axes of length 1 put in after it."""
    shape = static_shape(value)
    view = made_by(value, *_VIEWS)
    if view is not None:
        before = static_shape(view.inputs[0])
        if shape is None or before is None or not _same_tokens(before, shape):
            return None
        value = view.inputs[0]
    transpose = made_by(value, "Transpose")
    rank = len(static_shape(value) or ())
    if transpose is None or tuple(transpose.attributes.get_ints("perm", ())) != (0, rank - 1, *range(1, rank - 1)):
        return None
    return transpose.inputs[0]


def _channels_last(value: ir.Value) -> ir.Node | None:
    """Returns the Transpose that moves axis 1 of `value` to the end, after axes of length 1 were taken out."""
    if not is_used_once(value):
        return None
    node = next(iter(value.uses())).node
    if node.domain == "" and node.op_type in _VIEWS and node.inputs[0] is value:
        before, after = static_shape(value), static_shape(node.outputs[0])
        if before is None or after is None or not _same_tokens(before, after) or not is_used_once(node.outputs[0]):
            return None
        node = next(iter(node.outputs[0].uses())).node
    rank = len(static_shape(node.inputs[0]) or ())
    is_back = node.op_type == "Transpose" and tuple(node.attributes.get_ints("perm", ())) == (0, *range(2, rank), 1)
    return node if is_back and node.domain == "" else None


def _same_tokens(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """True when two shapes [B, C, …] differ in axes of length 1 after the channels only."""
    return a[:2] == b[:2] and [size for size in a[2:] if size != 1] == [size for size in b[2:] if size != 1]


def _absorb_bias(add: ir.Node, editor: GraphEditor) -> int:
    """Conv ─ Add(constant per channel) ─► Conv with a bias."""
    for index, value in enumerate(add.inputs):
        conv = made_by(value, "Conv", "ConvTranspose") or _without_bias(value)
        if value is None or conv is None or not is_used_once(value) or value.shape is None:
            continue
        rank, channels = len(value.shape), _channels(conv)
        added_value = add.inputs[1 - index]
        added = per_channel(added_value, rank, channels) if channels is not None else None
        old_value = conv.inputs[2] if len(conv.inputs) > 2 else None
        old = constant_array(old_value)
        if added is None or added_value is None or (old_value is not None and old is None):
            continue
        bias = added if old is None else in_range(old.astype(np.float64) + added.astype(np.float64), added.dtype)
        if bias is None:
            continue
        if len(conv.inputs) < 3:
            conv.resize_inputs(3)
        if old is None and added_value.is_initializer():
            conv.replace_input_with(2, added_value)
        take_over(editor, add.outputs[0], value)
        editor.remove([add])
        present = constant_array(conv.inputs[2])
        if present is None or present.shape != bias.shape or not np.array_equal(present, bias):
            editor.set_constant(conv, 2, bias, name="" if conv.inputs[2] is not None else f"{conv.name}.bias")
        return 1
    return 0


def _without_bias(value: ir.Value | None) -> ir.Node | None:
    """A convolution whose third input is left out by an empty name."""
    node = value.producer() if value is not None else None
    if (
        node is None
        or node.domain != ""
        or node.op_type not in ("Conv", "ConvTranspose")
        or len(node.inputs) != 3
        or node.inputs[2] is not None
    ):
        return None
    return node


def _channels(conv: ir.Node) -> int | None:
    weight = static_shape(conv.inputs[1])
    if weight is None:
        return None
    return weight[0] if conv.op_type == "Conv" else weight[1] * conv.attributes.get_int("group", 1)


_STEPS = (
    (("Add",), _absorb_bias),
    (("Conv",), _pointwise),
    (("Gemm",), _split_gemm),
    (("Add",), _order_bias),
    (("MatMul",), _lift),
)
"""The rewrites in order, each with the operators that it looks at."""
