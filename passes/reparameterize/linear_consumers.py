"""How a linear operator takes an affine map of its input into its own constants: W(a ⊙ x + c) + b = (W·diag(a))·x + (b + W·c).

A plan is made first, with what it costs, and changes nothing; whoever asked for it decides and lets it act. A convolution that pads with
zeros does so after the map, so the shift is missing at the border. Then the shift becomes a map over the positions instead of a number
(the convolution of the constant c with the same pads), or, where the one value that the map sends to zero is the same for all channels,
that value is padded in before the convolution.

Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", equation 14, for
scales and shifts in the weights; Ding et al. 2021, "Diverse Branch Block", section 3.2, for padding by a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import in_range
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine_paths import along, one_number
from edgekit.passes.reparameterize.batch_norm import Affine
from edgekit.passes.reparameterize.linear_form import conv_pads


@dataclass(frozen=True)
class Absorption:
    """What it takes to move a map into an operator.

    Attributes:
        node: The operator.
        new_nodes: Nodes that are added.
        new_elements: Elements that its constants gain, or lose where negative.
        act: Does it.
    """

    node: ir.Node
    new_nodes: int
    new_elements: int
    act: Callable[[GraphEditor], None]


def is_linear_reader(node: ir.Node, index: int) -> bool:
    """True where input `index` of `node` is what it multiplies by its weight; of MatMul that must be a matrix, constant or not."""
    if node.domain != "" or node.op_type not in _PLANS or index != 0:
        return False
    return node.op_type != "MatMul" or len(static_shape(node.inputs[1]) or ()) == 2


def plan(node: ir.Node, a: Affine) -> Absorption | str:
    """Returns how `node`, a linear reader, takes the map `a` of its input 0, or the condition that failed.

    The arrays of `a` have the rank of that input and broadcast to it. Conditions: the weight and bias are constants, and nothing else
    reads the weight (a copy would cost its bytes); the map varies along the axis that the weight contracts, and no other; the result is
    finite in the weight's dtype.
    """
    weight_value = node.inputs[1]
    weight = constant_array(weight_value)
    if weight_value is None or weight is None:
        return f"the weight of {_called(node)} is not a constant"
    if not is_used_once(weight_value):
        return f"the weight of {_called(node)} is read elsewhere: a copy would take more bytes"
    return _PLANS[node.op_type](node, a, weight)


def _matmul(node: ir.Node, a: Affine, weight: np.ndarray) -> Absorption | str:
    """MatMul `[…, K]` · `[K, N]`, perhaps with an Add of its bias after it."""
    if weight.ndim != 2:
        return f"the weight of {_called(node)} is not a matrix"
    per_row = along(a, -1, weight.shape[0])
    if per_row is None:
        return _other_axis(node)
    new_weight = in_range(per_row.scale[:, None] * weight.astype(np.float64), weight.dtype)
    shift = per_row.shift @ weight.astype(np.float64)
    add = _bias_add(node, weight.shape[1])
    bias = 0.0 if add is None else _array(add.inputs[1 - _position(add, node.outputs[0])])
    new_bias = in_range(np.broadcast_to(bias, shift.shape) + shift, weight.dtype)
    if new_weight is None or new_bias is None:
        return _not_finite(node, weight)
    if not shift.any():
        return Absorption(node, 0, 0, lambda editor: _set_weight(editor, node, new_weight, per_row))

    def act(editor: GraphEditor) -> None:
        _set_weight(editor, node, new_weight, per_row)
        if add is not None:
            editor.set_constant(add, 1 - _position(add, node.outputs[0]), new_bias)
        else:
            _insert_after(editor, node, editor.add_initializer(f"{node.name}.bias", new_bias, made_from=node.inputs))

    return Absorption(node, int(add is None), weight.shape[1] - np.size(bias) if add is not None else weight.shape[1], act)


def _gemm(node: ir.Node, a: Affine, weight: np.ndarray) -> Absorption | str:
    """Gemm: alpha·A·B + beta·C with A `[M, K]`, B `[K, N]` or its transpose, and C broadcast to `[M, N]`."""
    if node.attributes.get_int("transA", 0):
        return f"{_called(node)} transposes what it reads"
    transposed = node.attributes.get_int("transB", 0)
    matrix = (weight.T if transposed else weight).astype(np.float64)
    per_row = along(a, -1, matrix.shape[0])
    if per_row is None:
        return _other_axis(node)
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant_array(bias_value)
    if bias_value is not None and bias is None:
        return f"the bias of {_called(node)} is not a constant"
    scaled = per_row.scale[:, None] * matrix
    shift = node.attributes.get_float("alpha", 1.0) * (per_row.shift @ matrix)
    old = 0.0 if bias is None else node.attributes.get_float("beta", 1.0) * bias.astype(np.float64)
    new_weight = in_range(np.ascontiguousarray(scaled.T if transposed else scaled), weight.dtype)
    new_bias = in_range(old + shift, weight.dtype)
    if new_weight is None or new_bias is None:
        return _not_finite(node, weight)

    def act(editor: GraphEditor) -> None:
        _set_weight(editor, node, new_weight, per_row)
        if shift.any():
            editor.set_constant(node, 2, new_bias, name=f"{node.name}.bias" if bias is None else "")
            node.attributes.pop("beta", None)  # it is in the bias now

    gained = new_bias.size - (0 if bias is None else bias.size)
    return Absorption(node, 0, gained if shift.any() else 0, act)


def _conv(node: ir.Node, a: Affine, weight: np.ndarray) -> Absorption | str:
    """Conv with weight `[O, I/g, *K]`."""
    groups, shape = node.attributes.get_int("group", 1), static_shape(node.inputs[0])
    per_channel = along(a, 1, groups * weight.shape[1])
    if per_channel is None:
        return _other_axis(node)
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    bias = constant_array(bias_value)
    if bias_value is not None and bias is None:
        return f"the bias of {_called(node)} is not a constant"
    by_group = weight.astype(np.float64).reshape(groups, -1, *weight.shape[1:])  # [g, O/g, I/g, *K]
    scale, shift = (array.reshape(groups, 1, -1) for array in (per_channel.scale, per_channel.shift))
    new_weight = in_range((by_group * scale.reshape(*scale.shape, *[1] * (weight.ndim - 2))).reshape(weight.shape), weight.dtype)
    taps = np.einsum("goi...,gzi->go...", by_group, shift).reshape(weight.shape[0], *weight.shape[2:])  # [O, *K]
    if new_weight is None or not np.isfinite(taps).all():
        return _not_finite(node, weight)
    if not per_channel.shift.any():
        return Absorption(node, 0, 0, lambda editor: _set_weight(editor, node, new_weight, per_channel))
    if shape is None and (any(node.attributes.get_ints("pads", ())) or "auto_pad" in node.attributes):
        return f"the shape that {_called(node)} reads is not known"
    old = np.zeros(weight.shape[0]) if bias is None else bias.astype(np.float64)
    if shape is None or not _reads_padding(node, weight, shape):
        new_bias = in_range(old + taps.reshape(taps.shape[0], -1).sum(axis=1), weight.dtype)
        if new_bias is None:
            return _not_finite(node, weight)
        return Absorption(node, 0, new_bias.size - (0 if bias is None else bias.size), _with_bias(node, new_weight, new_bias, per_channel))
    return _padded_conv(node, per_channel, new_weight, taps, old, bias is not None)


def _padded_conv(conv: ir.Node, a: Affine, weight: np.ndarray, taps: np.ndarray, bias: np.ndarray, had_bias: bool) -> Absorption | str:
    """A Conv that reads zeros which were padded in after the shift."""
    value = one_number(-a.shift / a.scale) if a.scale.all() else None
    gained = 0 if had_bias else bias.size
    if value is not None and in_range(np.array(value), weight.dtype) is not None:
        new_bias = in_range(bias + taps.reshape(bias.size, -1).sum(axis=1), weight.dtype)
        if new_bias is not None:
            fill = np.array(value, weight.dtype)

            def pad(editor: GraphEditor) -> None:
                _pad_before(editor, conv, fill)
                _with_bias(conv, weight, new_bias, a)(editor)

            return Absorption(conv, 1, gained + 1, pad)
    made = static_shape(conv.outputs[0])
    shape = static_shape(conv.inputs[0])
    assert shape is not None
    if made is None or len(made) != len(shape):
        return f"the shape that {_called(conv)} makes is not known"
    table = in_range(bias.reshape(-1, *[1] * (taps.ndim - 1)) + _bias_map(conv, taps, shape, made), weight.dtype)
    if table is None:
        return _not_finite(conv, weight)
    for axis in range(1, table.ndim):
        if (table == table.take([0], axis)).all():
            table = table.take([0], axis)

    def add(editor: GraphEditor) -> None:
        _set_weight(editor, conv, weight, a)
        addend = editor.add_initializer(f"{conv.name}.bias", table[None], made_from=conv.inputs)
        old = conv.inputs[2:]
        conv.resize_inputs(2)
        editor.drop_unused([value for value in old if value is not None])
        _insert_after(editor, conv, addend)

    return Absorption(conv, 1, table.size - (bias.size if had_bias else 0), add)


def _bias_map(conv: ir.Node, taps: np.ndarray, shape: tuple[int, ...], made: tuple[int, ...]) -> np.ndarray:
    """Adds up, at each position of the output, the taps `[O, *K]` that lie within the source: `[O, *spatial]`."""
    result = taps
    for inside in _inside(conv, taps.shape[1:], shape, made):
        result = np.tensordot(result, inside, axes=([1], [1]))  # contracts the first kernel axis, appends the positions
    return result


def _inside(conv: ir.Node, kernel: tuple[int, ...], shape: tuple[int, ...], made: tuple[int, ...]) -> list[np.ndarray]:
    """Per spatial axis, whether tap u of output position y lies within the source: `[positions, taps]`, 0 or 1."""
    rank = len(kernel)
    strides, dilations = (list(conv.attributes.get_ints(name, ())) or [1] * rank for name in ("strides", "dilations"))
    places = []
    for axis, begin in enumerate(conv_pads(conv)[:rank]):
        y, u = np.arange(made[axis + 2])[:, None], np.arange(kernel[axis])[None, :]
        at = y * strides[axis] + u * dilations[axis] - begin
        places.append(((at >= 0) & (at < shape[axis + 2])).astype(np.float64))
    return places


def _reads_padding(conv: ir.Node, weight: np.ndarray, shape: tuple[int, ...]) -> bool:
    if not any(conv_pads(conv)):
        return False
    made = static_shape(conv.outputs[0])
    return made is None or len(made) != len(shape) or not all(inside.all() for inside in _inside(conv, weight.shape[2:], shape, made))


def _conv_transpose(node: ir.Node, a: Affine, weight: np.ndarray) -> Absorption | str:
    """ConvTranspose with weight `[I, O/g, *K]`: a shift would give a sum that depends on how many taps meet at a position."""
    per_channel = along(a, 1, weight.shape[0])
    if per_channel is None:
        return _other_axis(node)
    if per_channel.shift.any():
        return f"{_called(node)} adds up a different number of taps at each position: a shift is no bias after it"
    new_weight = in_range(weight.astype(np.float64) * per_channel.scale.reshape(-1, *[1] * (weight.ndim - 1)), weight.dtype)
    if new_weight is None:
        return _not_finite(node, weight)
    return Absorption(node, 0, 0, lambda editor: _set_weight(editor, node, new_weight, per_channel))


def _set_weight(editor: GraphEditor, node: ir.Node, weight: np.ndarray, a: Affine) -> None:
    if not (a.scale == 1).all():
        editor.set_constant(node, 1, weight)


def _with_bias(conv: ir.Node, weight: np.ndarray, bias: np.ndarray, a: Affine) -> Callable[[GraphEditor], None]:
    def act(editor: GraphEditor) -> None:
        _set_weight(editor, conv, weight, a)
        absent = len(conv.inputs) < 3 or conv.inputs[2] is None
        editor.set_constant(conv, 2, bias, name=f"{conv.name}.bias" if absent else "")

    return act


def _bias_add(matmul: ir.Node, columns: int) -> ir.Node | None:
    """The Add of a constant, one number or one per column, which alone reads the product."""
    product = matmul.outputs[0]
    if not is_used_once(product):
        return None
    add = next(iter(product.uses())).node
    if add.op_type != "Add" or add.domain != "" or add.graph is not matmul.graph:
        return None
    bias, shape = constant_array(add.inputs[1 - _position(add, product)]), static_shape(matmul.inputs[0])
    if bias is None or shape is None or bias.ndim > len(shape):
        return None
    return add if bias.size in (1, columns) and all(size == 1 for size in bias.shape[:-1]) else None


def _position(node: ir.Node, value: ir.Value) -> int:
    return next(index for index, read in enumerate(node.inputs) if read is value)


def _array(value: ir.Value | None) -> np.ndarray:
    array = constant_array(value)
    assert array is not None
    return array.astype(np.float64).reshape(-1)


def _insert_after(editor: GraphEditor, node: ir.Node, addend: ir.Value) -> None:
    """node ─► node ─ Add(addend), read by all that read the node."""
    old = node.outputs[0]
    add = ir.node("Add", [old, addend], name=editor.unique_name(f"{node.name}.Add"))
    add.metadata_props.update(node.metadata_props)
    new = add.outputs[0]
    new.name = editor.unique_name(f"{add.name}:0")
    editor.graph.insert_after(node, add)
    editor.replace_value(old, new)
    add.replace_input_with(0, old)


def _pad_before(editor: GraphEditor, conv: ir.Node, fill: np.ndarray) -> None:
    """Conv(pads) ─► Pad(pads, fill) ─ Conv."""
    source, pads = conv.inputs[0], conv_pads(conv)
    shape = static_shape(source)
    assert source is not None
    assert shape is not None
    rank = len(pads) // 2
    full = np.array([0, 0, *pads[:rank], 0, 0, *pads[rank:]], dtype=np.int64)
    inputs = [source, editor.add_initializer(f"{conv.name}.pads", full), editor.add_initializer(f"{conv.name}.fill", fill)]
    pad = ir.node("Pad", inputs, name=editor.unique_name(f"{conv.name}.Pad"))
    pad.metadata_props.update(conv.metadata_props)
    output = pad.outputs[0]
    output.name = editor.unique_name(f"{pad.name}:0")
    output.type = ir.TensorType(source.dtype) if source.dtype is not None else None
    output.shape = ir.Shape([size + begin + end for size, begin, end in zip(shape, full[: rank + 2], full[rank + 2 :], strict=True)])
    editor.graph.insert_before(conv, pad)
    conv.replace_input_with(0, output)
    conv.attributes.pop("auto_pad", None)
    conv.attributes["pads"] = ir.AttrInt64s("pads", [0] * (2 * rank))


def elements(value: ir.Value | None) -> int:
    """Elements of an initializer that one node alone reads, which go when that node goes; 0 for any other value."""
    shape = static_shape(value)
    return math.prod(shape) if value is not None and shape is not None and value.is_initializer() and is_used_once(value) else 0


def _called(node: ir.Node) -> str:
    return f"{node.op_type} '{node.name}'"


def _other_axis(node: ir.Node) -> str:
    return f"the map varies along an axis that the weight of {_called(node)} does not contract"


def _not_finite(node: ir.Node, weight: np.ndarray) -> str:
    return f"the folded weights of {_called(node)} would not be finite in {weight.dtype.name}"


_PLANS: dict[str, Callable[[ir.Node, Affine, np.ndarray], Absorption | str]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
}
