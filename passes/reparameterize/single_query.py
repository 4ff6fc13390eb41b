"""The pass `absorb-key-value`: attention of few queries works on the tokens themselves instead of on their projections."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array
from edgekit.graph.finite import is_finite
from edgekit.graph.fusions.matching import FIRST_OPSET, insert, opset, take_over
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.boxes import WHOLE
from edgekit.passes.reparameterize.views import view


@dataclass(frozen=True)
class AbsorbKeyValue(Pass):
    """Absorb the projections of keys and values into the few queries and results of an attention.

    Before:  q [B, H, S, D] ────────────────────────────┐
             x [B, N, C] ─┬─ MatMul(Wk) ─ Add ─ heads ─ Attention(s) ─► [B, H, S, D]
                          └─ MatMul(Wv) ─ Add ─ heads ──┘
    After:   q ─ MatMul(Wkᵀ per head) ─ [B, H, S, C] ── Attention(s) ─ MatMul(Wv per head) ─ Add(bv) ─► [B, H, S, D]
             x ─ Reshape [B, 1, N, C] ─────── K and V ──┘

    The scores of head h are q_h·(x·Wk_h)ᵀ = (q_h·Wk_hᵀ)·xᵀ, and its result A_h·(x·Wv_h) = (A_h·x)·Wv_h: all heads share one key and one
    value, the tokens, so attention stays one operator (multi-query attention). Instead of 2·N·C² for the projections it takes 2·S·C² and
    2·S·N·C·(H − 1) more inside; for the class token, S = 1, that is about H/C of them. It is done when

    1. K and V are a matrix product with a constant weight, plus a constant bias, whose columns are only rearranged into heads;
    2. nothing else reads these products or weights;
    3. the bias of the keys adds the same to all scores of a query, which softmax does not see: no softcap when it is not zero;
    4. the bias of the values is added behind: the rows of the softmax sum to one, so no row of a mask may forbid everything;
    5. there are as many heads of K and V as of Q, no cache, and fewer multiply-accumulates afterwards.

    Source: Touvron et al. 2021, "Going deeper with Image Transformers", section 3 (one query); Shazeer 2019, "Fast Transformer Decoding:
    One Write-Head is All You Need" (shared keys and values); the order of products as in DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2.
    """

    name: ClassVar[str] = "absorb-key-value"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> int:
        """Rewrites attentions of the main graph that have fewer queries than keys; returns how many."""
        if opset(model) < FIRST_OPSET:
            return 0
        found = [node for node in model.graph if _has_few_queries(node)]
        editor = GraphEditor(model) if found else None
        absorbed = 0
        for attention in found:
            assert editor is not None
            where = attention.name or attention.op_type
            if context.skips(where):
                continue
            why = _absorb(attention, editor)
            if why is None:
                absorbed += 1
                context.applied(where)
            else:
                context.refuse(where, why)
        return absorbed


def _has_few_queries(node: ir.Node) -> bool:
    """True for an Attention of `[B, H, S, D]` with fewer queries than keys, whose heads do not share one key already."""
    if node.op_type != "Attention" or node.domain != "":
        return False
    query, key = (static_shape(value) for value in node.inputs[:2])
    if query is None or key is None or len(query) != 4 or len(key) != 4:
        return False
    return query[2] < key[2] and (key[1] > 1 or query[1] == 1)


@dataclass(frozen=True)
class Projection:
    """Keys or values `[B, H, N, D]` as a linear map of tokens, per head.

    Attributes:
        tokens: What is projected, `[B, N, C]`.
        weight: `[H, C, D]` in the dtype of the model.
        bias: `[H, D]`, float64.
        product: The MatMul.
        nodes: All nodes from the MatMul to the keys or values.
    """

    tokens: ir.Value
    weight: np.ndarray
    bias: np.ndarray
    product: ir.Node
    nodes: tuple[ir.Node, ...]


def _absorb(attention: ir.Node, editor: GraphEditor) -> str | None:
    """Rewrites one attention; returns the condition that failed when it cannot."""
    query, key, value = attention.inputs[:3]
    shape = static_shape(query)
    assert query is not None
    assert key is not None
    assert value is not None
    assert shape is not None
    if any(extra is not None for extra in attention.inputs[4:]) or len(attention.outputs) != 1:
        return "the attention has a cache, or gives out more than its result"
    keys, values = read_projection(key), read_projection(value)
    if isinstance(keys, str):
        return f"the keys are not projected tokens: {keys}"
    if isinstance(values, str):
        return f"the values are not projected tokens: {values}"
    batch, heads, queries, width = shape
    if keys.weight.shape[0] != heads or values.weight.shape[0] != heads:
        return "several heads of queries share one of keys"
    nodes = list(dict.fromkeys((*keys.nodes, *values.nodes)))
    why = _read_elsewhere(nodes, attention) or _why_biases_stay(attention, keys, values)
    if why is not None:
        return why
    products = {keys.product, values.product}
    tokens, keys_in, values_in, out = keys.weight.shape[2], keys.weight.shape[1], values.weight.shape[1], values.weight.shape[2]
    count = _tokens(key)
    before = sum(_macs(node) for node in products) + batch * heads * queries * count * (tokens + out)
    after = batch * heads * queries * (width * keys_in + count * (keys_in + values_in) + values_in * out)
    if after >= before:
        return f"absorbed projections would cost {after} multiply-accumulates instead of {before}"
    weights = sum(_elements(node.inputs[1]) for node in products)
    if keys.weight.size + values.weight.size > weights:
        return "the weights per head would take more memory than the projections"
    _build(attention, keys, values, nodes, editor)
    return None


def _build(attention: ir.Node, keys: Projection, values: Projection, nodes: Sequence[ir.Node], editor: GraphEditor) -> None:
    """Puts the attention on tokens in the place of the one on projections."""
    query = attention.inputs[0]
    shape, result_shape = static_shape(query), static_shape(attention.outputs[0])
    assert query is not None
    assert shape is not None
    assert result_shape is not None
    batch, heads, queries, width = shape
    owner = [attention]

    def weight(array: np.ndarray, product: ir.Node) -> ir.Value:
        old = product.inputs[1]
        assert old is not None
        return editor.add_initializer(f"{old.name}.heads", np.ascontiguousarray(array), made_from=[old])

    def add(op_type: str, inputs: Sequence[ir.Value], dims: Sequence[int], source: Sequence[ir.Node] = owner) -> ir.Value:
        return insert(editor, attention, source, op_type, inputs, dims).outputs[0]

    def shared_head(tokens: ir.Value) -> ir.Value:
        count, channels = (static_shape(tokens) or ())[1:]
        target = editor.add_initializer(f"{attention.name}.tokens.shape", np.array([batch, 1, count, channels], dtype=np.int64))
        return add("Reshape", [tokens, target], (batch, 1, count, channels))

    channels, inner = keys.weight.shape[1], values.weight.shape[1]
    absorbed = add(
        "MatMul", [query, weight(keys.weight.transpose(0, 2, 1), keys.product)], (batch, heads, queries, channels), [keys.product]
    )
    key = shared_head(keys.tokens)
    value = key if values.tokens is keys.tokens else shared_head(values.tokens)
    new = ir.node("Attention", [absorbed, key, value, *attention.inputs[3:4]], _numbers(attention))
    if "scale" not in new.attributes:
        new.attributes["scale"] = ir.AttrFloat32("scale", width**-0.5)
    new.metadata_props.update(attention.metadata_props)
    new.name = editor.unique_name(f"{attention.name}.tokens")
    mixed = new.outputs[0]
    mixed.name, mixed.shape, mixed.type = new.name, ir.Shape((batch, heads, queries, inner)), attention.outputs[0].type
    editor.graph.insert_before(attention, new)
    result = add("MatMul", [mixed, weight(values.weight, values.product)], result_shape, [values.product])
    if values.bias.any():
        bias = editor.add_initializer(
            f"{attention.name}.value.bias", values.bias[:, None, :].astype(values.weight.dtype), made_from=[values.product.inputs[1]]
        )
        result = add("Add", [result, bias], result_shape, [values.product])
    take_over(editor, attention.outputs[0], result)
    name = attention.name
    editor.remove([attention, *nodes])
    new.name = name


def _numbers(attention: ir.Node) -> dict[str, int | float]:
    """The attributes that are not about numbers of heads."""
    return {name: attr.value for name, attr in attention.attributes.items() if name not in ("q_num_heads", "kv_num_heads")}


def read_projection(value: ir.Value) -> Projection | str:
    """Reads `[B, H, N, D]` as a linear map of tokens per head; otherwise returns the condition that failed.

    The path from the matrix product to the value may rearrange in any way: the numbers 0, 1, 2, … of the product's elements are sent along
    it, and must arrive as token n in sample b and, whatever b and n, the same column for one head and one place.
    """
    path: list[ir.Node] = []
    product = value.producer()
    while product is not None and product.op_type in _PATH and product.domain == "":
        path.append(product)
        product = _onward(product)
    if product is None or product.op_type != "MatMul" or product.domain != "":
        return "they are not made by a matrix product"
    tokens, weight_value = product.inputs
    shape, weight = static_shape(product.outputs[0]), constant_array(weight_value)
    if tokens is None or weight_value is None or weight is None or weight.ndim != 2 or shape is None or len(shape) != 3:
        return f"MatMul '{product.name}' has no constant weight of two axes, or not three axes of tokens"
    if len(weight_value.uses()) > 1:
        return f"weight '{weight_value.name}' is read elsewhere"
    if int(np.prod(shape)) > _MOST_ELEMENTS:
        return "there are too many tokens to follow one by one"
    numbers, bias = np.arange(np.prod(shape), dtype=np.int64).reshape(shape), np.zeros(shape)
    for node in reversed(path):
        moved = _follow(node, value, path, numbers, bias)
        if moved is None:
            return f"{node.op_type} '{node.name}' is between them and the matrix product"
        numbers, bias = moved
    if numbers.ndim != 4 or not np.isfinite(bias).all():
        return "they are not of the form [B, H, N, D]"
    sample, token, column = np.unravel_index(numbers, shape)
    columns, shift = column[0, :, 0, :], bias[0, :, 0, :]
    ordered = (sample == np.arange(numbers.shape[0]).reshape(-1, 1, 1, 1)).all() and (token == np.arange(shape[1])[:, None]).all()
    if numbers.shape[2] != shape[1] or not ordered or not (column == columns[:, None, :]).all() or not (bias == shift[:, None, :]).all():
        return "its rows and columns are mixed on the way to the heads"
    return Projection(tokens, weight[:, columns].transpose(1, 0, 2), shift, product, (product, *path))


_PATH = frozenset({"Add", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"})
_MOST_ELEMENTS = 1 << 24


def _onward(node: ir.Node) -> ir.Node | None:
    """The node before: of an Add, the one that makes the operand that is not constant."""
    operands = (
        [value for value in node.inputs if value is not None and constant_array(value) is None] if node.op_type == "Add" else node.inputs
    )
    return operands[0].producer() if len(operands) >= 1 and operands[0] is not None else None


def _follow(
    node: ir.Node, end: ir.Value, path: Sequence[ir.Node], numbers: np.ndarray, bias: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Sends the numbers of elements and the bias added so far through one node of the path."""
    place = path.index(node)
    output = end if place == 0 else next(value for value in path[place - 1].inputs if value is not None and value.producer() is node)
    shape = static_shape(output)
    if shape is None:
        return None
    if node.op_type == "Add":
        constants = [array for array in map(constant_array, node.inputs) if array is not None]
        if len(constants) != 1 or shape != numbers.shape:
            return None
        return numbers, bias + constants[0].astype(np.float64)
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm", tuple(reversed(range(numbers.ndim))))
        return numbers.transpose(order), bias.transpose(order)
    if node.op_type in ("Slice", "Split", "Gather"):
        seen = view(node, output.index() or 0)
        if seen is None:
            return None
        for axis, places in seen.part(WHOLE, len(shape))[0].items():
            numbers, bias = numbers.take(places, axis), bias.take(places, axis)
    return numbers.reshape(shape), bias.reshape(shape)


def _read_elsewhere(nodes: Sequence[ir.Node], attention: ir.Node) -> str | None:
    inside = {*nodes, attention}
    for node in nodes:
        for output in node.outputs:
            if output.is_graph_output() or any(
                use.node not in inside or (use.node is attention and use.idx not in (1, 2)) for use in output.uses()
            ):
                return f"the output of {node.op_type} '{node.name}' is read elsewhere"
    return None


def _why_biases_stay(attention: ir.Node, keys: Projection, values: Projection) -> str | None:
    """Returns why the softmax would notice that the biases are gone from keys and values."""
    if keys.bias.any() and attention.attributes.get_float("softcap", 0.0) != 0:
        return "the scores are capped, so the bias of the keys is not without effect"
    mask_value = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask_value is None or not values.bias.any() or is_finite(mask_value):
        return None
    mask = constant_array(mask_value)
    if mask is None or not (mask if mask.dtype == bool else np.isfinite(mask)).any(axis=-1).all():
        return "a row of the mask may forbid every key, so the weights of the values do not sum to one"
    return None


def _tokens(key: ir.Value) -> int:
    return (static_shape(key) or (0, 0, 0, 0))[2]


def _macs(product: ir.Node) -> int:
    shape, weight = static_shape(product.outputs[0]), static_shape(product.inputs[1])
    assert shape is not None
    assert weight is not None
    return int(np.prod(shape)) * weight[0]


def _elements(value: ir.Value | None) -> int:
    return int(np.prod(static_shape(value) or (0,)))
