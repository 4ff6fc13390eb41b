"""Fuses the softmax attention that exporters write in many nodes into the operator `Attention` of opset 23.

    Before:  Q ─[scale]─ MatMul ─[scale]─[softcap]─[+ masks]─[Cast]─ Softmax ─[NaN guard]─[Cast]─ MatMul ─► Y
             K ─[scale]─ Transpose ┘                                                            V ┘
    After:   Q, K, V, masks ─ Attention(scale, softcap, is_causal, softmax_precision) ─► Y

Queries, keys and values are always `[B, H, N, D]`; other layouts are reshaped to it. Attention is from Vaswani et al. 2017, "Attention Is
All You Need". What is read elsewhere too (attention maps given out), and what the operator cannot express exactly, stays as it is.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, common_module, constant_array, is_used_once
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.fusions.attention_build import Builder, Dims, UnfitError, dims, elements
from edgekit.graph.fusions.attention_masks import build_mask
from edgekit.graph.fusions.attention_operands import (
    Operand,
    absorb_scales,
    before_repetition,
    own_heads,
    scaled,
    to_heads,
)
from edgekit.graph.fusions.attention_scores import Scores, read_scores
from edgekit.graph.fusions.attention_weighted import Weighted, read_weighted

FIRST_OPSET = 23
"""The opset that `Attention` came with."""
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def fuse_attention(model: ir.Model) -> int:
    """Replaces decomposed softmax attention in the main graph by `Attention`, in place; returns how many were made or put in order.

    An `Attention` whose keys and values an exporter repeats for groups of queries takes them as they are.

    Expects shapes to be inferred and constants to be folded. Nothing happens below opset 23.
    """
    if model.opset_imports.get("", 0) < FIRST_OPSET:
        return 0
    editor = GraphEditor(model)
    fused = sum(_fuse(node, editor) for node in list(model.graph) if node.op_type == "Softmax" and node.domain == "")
    return fused + sum(_group(node, editor) for node in list(model.graph) if node.op_type == "Attention" and node.domain == "")


def _fuse(softmax: ir.Node, editor: GraphEditor) -> bool:
    """Fuses the attention around one Softmax; False when there is none."""
    logits = softmax.inputs[0]
    shape = dims(logits)
    if logits is None or shape is None or softmax.attributes.get_int("axis", -1) not in (-1, len(shape) - 1):
        return False
    scores = read_scores(logits)
    weighted = read_weighted(softmax.outputs[0]) if scores is not None else None
    if scores is None or weighted is None or shape[-1] != scores.base[-1] or not _is_expressible(scores, weighted):
        return False
    product = weighted.product
    builder = Builder(editor, product, common_module((scores.product, softmax, product)))
    try:
        attention = _build(builder, scores, weighted)
        old = _reshaped_alike(product.outputs[0], attention)
        new = attention if old is not product.outputs[0] else _as_product(builder, attention, weighted)
    except UnfitError:
        builder.abandon()
        return False
    builder.commit()
    editor.replace_value(old, new)
    producer = old.producer()
    _remove_dead(editor, [producer, product] if producer is not None else [product])
    node = attention.producer()
    assert node is not None
    _take_scales_in(editor, node, _scale(scores))
    return True


def _group(attention: ir.Node, editor: GraphEditor) -> bool:
    """Takes off the repetition of key and value heads before an Attention of four axes, which groups queries itself."""
    query, key, value = attention.inputs[:3]
    shape = dims(query)
    if key is None or value is None or shape is None or len(shape) != 4 or not isinstance(shape[1], int):
        return False
    if any(operand is not None for operand in attention.inputs[4:]):
        return False
    if any(output.uses() or output.is_graph_output() for output in attention.outputs[1:]):
        return False
    keys, values = before_repetition(key), before_repetition(value)
    key_shape, value_shape = dims(key), dims(value)
    if keys is None or values is None or key_shape is None or value_shape is None or keys[1] != values[1] or shape[1] % keys[1]:
        return False
    builder = Builder(editor, attention, attention.metadata_props.get(MODULE_KEY, ""))
    try:
        new_key = builder.reshape(keys[0], (key_shape[0], keys[1], *key_shape[2:]))
        new_value = builder.reshape(values[0], (value_shape[0], keys[1], *value_shape[2:]))
    except UnfitError:
        builder.abandon()
        return False
    builder.commit()
    attention.replace_input_with(1, new_key)
    attention.replace_input_with(2, new_value)
    _remove_dead(editor, [producer for old in {key, value} if (producer := old.producer()) is not None])
    return True


def _scale(scores: Scores) -> float:
    return scores.scale * scores.query.factor * scores.key.factor


def _is_expressible(scores: Scores, weighted: Weighted) -> bool:
    dtype = scores.product.outputs[0].dtype
    return (
        dtype in _FLOATS
        and dtype == weighted.dtype == weighted.value.value.dtype
        and not scores.bounded
        and _scale(scores) > 0
        and weighted.view[-2:] == scores.base[-2:]
        and constant_array(weighted.value.value) is None  # a layer whose activation is a softmax
    )


def _build(builder: Builder, scores: Scores, weighted: Weighted) -> ir.Value:
    """Makes the Attention node, without its scale; returns its result `[B, H, N, Dv]`."""
    batch, heads = _batch_and_heads(scores, weighted)
    lead = scores.base[:-2]
    query = to_heads(builder, scores.query, lead, batch, heads)
    for factor, divides in scores.head_scales:
        query = builder.node("Div" if divides else "Mul", [query, factor], (batch, heads, *scores.query.shape[-2:]))
    key, value = _keys_and_values(builder, scores, weighted, batch, heads)
    dtype = scores.product.outputs[0].dtype
    assert dtype is not None
    shape = (batch, heads, *scores.base[-2:])
    causal, mask = build_mask(builder, scores.terms, weighted.guarded, shape, dtype)
    attributes: dict[str, int | float] = {}
    if causal:
        attributes["is_causal"] = 1
    if scores.softcap:
        attributes["softcap"] = scores.softcap
    if scores.precision is not None:
        attributes["softmax_precision"] = scores.precision.value
    inputs = [query, key, value] if mask is None else [query, key, value, mask]
    return builder.node("Attention", inputs, (*shape[:-1], weighted.value.shape[-1]), **attributes)


def _keys_and_values(builder: Builder, scores: Scores, weighted: Weighted, batch: int | str, heads: int | str) -> tuple[ir.Value, ir.Value]:
    """Makes keys and values of as few heads as they have: one for each group of query heads (Ainslie et al. 2023)."""
    key_lead, value_lead = scores.base[:-2], weighted.view[:-2]
    own = {own_heads(scores.key, key_lead, batch, heads), own_heads(weighted.value, value_lead, batch, heads)}
    fewest = own.pop() if len(own) == 1 else heads
    key = to_heads(builder, scores.key, key_lead, batch, fewest)
    value = to_heads(builder, weighted.value, value_lead, batch, fewest)
    keys, values = before_repetition(key), before_repetition(value)
    if keys is None or values is None or keys[1] != values[1]:
        return key, value
    return (
        builder.reshape(keys[0], (batch, keys[1], *scores.key.shape[-2:])),
        builder.reshape(values[0], (batch, keys[1], *weighted.value.shape[-2:])),
    )


def _batch_and_heads(scores: Scores, weighted: Weighted) -> tuple[int | str, int | str]:
    """Tells heads from batch. Any split of the leading axes computes the same; the one that the module meant is found where it shows."""
    rows = scores.base[-2:]
    for view in (*scores.views, weighted.view):
        if len(view) == 4 and view[-2:] == rows:
            return view[0], view[1]
    lead = scores.base[:-2]
    if len(lead) == 0:
        return 1, 1
    if len(lead) > 1:
        if len(lead) == 3 and own_heads(scores.key, lead, lead[0], -1) != -1:  # [B, K, G]: groups of queries
            return lead[0], elements(lead[1:])
        return elements(lead[:-1]), lead[-1]
    for operand in (scores.query, scores.key, weighted.value):
        heads = _heads_before_merging(operand)
        if heads is not None and isinstance(lead[0], int) and lead[0] % heads == 0:
            return lead[0] // heads, heads
    return lead[0], 1


def _heads_before_merging(operand: Operand) -> int | None:
    """Finds the number of heads of `[B H, N, D]`: in the four axes that were merged, or in features that were split into heads."""
    value: ir.Value | None = operand.value
    features = operand.shape[-1]
    while value is not None and (node := value.producer()) is not None and node.domain == "":
        found = scaled(node)
        source = found[0] if found is not None else node.inputs[0] if node.op_type in ("Reshape", "Transpose") else None
        shape = dims(source)
        if shape is None or not shape or not isinstance(features, int):
            return None
        if node.op_type == "Reshape":
            if len(shape) == 4 and shape[-2:] == operand.shape[-2:] and isinstance(shape[1], int):
                return shape[1]
            if isinstance(shape[-1], int) and shape[-1] > features:
                return shape[-1] // features if shape[-1] % features == 0 else None
        value = source
    return None


def _reshaped_alike(old: ir.Value, new: ir.Value) -> ir.Value:
    """Returns the result of the Reshape that alone reads `old` when it has the shape of `new`, else `old`."""
    if dims(old) != dims(new) and is_used_once(old):
        reader = next(iter(old.uses())).node
        if reader.op_type == "Reshape" and reader.domain == "" and dims(reader.outputs[0]) == dims(new):
            return reader.outputs[0]
    return old


def _as_product(builder: Builder, attention: ir.Value, weighted: Weighted) -> ir.Value:
    """Gives the result of Attention the shape and order of axes that the product had."""
    shape: Dims = (*weighted.view[:-1], weighted.value.shape[-1])
    result = builder.reshape(attention, shape)
    return result if weighted.perm is None else builder.transpose(result, weighted.perm)


def _remove_dead(editor: GraphEditor, nodes: list[ir.Node]) -> None:
    """Removes those of `nodes` that nothing reads any more, and what only they read."""
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.graph is None or any(output.uses() or output.is_graph_output() for output in node.outputs):
            continue
        waiting.extend(producer for value in node.inputs if value is not None and (producer := value.producer()) is not None)
        editor.remove([node])


def _take_scales_in(editor: GraphEditor, attention: ir.Node, scale: float) -> None:
    """Sets the scale, with those applied further up; the default, one over the root of the head size, stays implicit."""
    for index in (0, 1):
        factor, dead = absorb_scales(attention.inputs[index])
        scale *= factor
        _remove_dead(editor, dead)
    shape = dims(attention.inputs[0])
    size = shape[-1] if shape is not None else None
    if not (isinstance(size, int) and math.isclose(scale, 1 / math.sqrt(size), rel_tol=1e-6)):
        attention.attributes["scale"] = ir.AttrFloat32("scale", scale)
