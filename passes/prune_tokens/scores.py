"""How much a token matters, from the queries and keys of a block's attention."""

from __future__ import annotations

import math

import onnx_ir as ir

from edgekit.passes.prune_tokens.builder import Builder, shape_of
from edgekit.passes.prune_tokens.token_axis import StandsInTheWayError

QUERIES, KEYS = 0, 1
"""Inputs of an Attention."""


def by_head(build: Builder, attention: ir.Node, which: int) -> ir.Value:
    """The queries or keys of an Attention as `[B, H, N, d]`."""
    value = attention.inputs[which]
    assert value is not None
    shape = shape_of(value)
    if len(shape) == 4:
        return value
    batch, tokens, width = shape
    heads = _heads(attention)[which]
    split = build.reshape(value, (batch, tokens, heads, width // heads))
    return build.op("Transpose", [split], (batch, heads, tokens, width // heads), perm=[0, 2, 1, 3])


def check_attention(attention: ir.Node) -> None:
    """Holds an Attention against what scores can be read from.

    Raises:
        StandsInTheWayError: Heads share their keys, or logits are capped.
    """
    queries, keys = _heads(attention)
    if queries != keys:
        raise StandsInTheWayError(attention.name or "", "its heads share keys, whose attention would have to be told apart")
    if attention.attributes.get_float("softcap", 0.0):
        raise StandsInTheWayError(attention.name or "", "its logits are capped, which scores would have to repeat")


def _heads(attention: ir.Node) -> tuple[int, int]:
    """How many heads the queries have, and the keys."""
    found = []
    for value, name in zip(attention.inputs[:2], ("q_num_heads", "kv_num_heads"), strict=True):
        assert value is not None
        shape = shape_of(value)
        found.append(shape[1] if len(shape) == 4 else attention.attributes.get_int(name, 1))
    return found[0], found[1]


def _weights(build: Builder, attention: ir.Node, first: int | None) -> ir.Value:
    """The attention's weights `[B, H, queries, N]`, of the query `first` alone where it is given."""
    query, key = by_head(build, attention, QUERIES), by_head(build, attention, KEYS)
    width = shape_of(key)[-1]
    if first is not None:
        query = build.cut(query, 2, first, first + 1)
    scale = attention.attributes.get_float("scale", 0.0) or 1 / math.sqrt(width)
    logits = build.binary("Mul", build.matmul(query, build.transpose(key), "logits"), scale)
    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is not None:
        if first is not None and shape_of(mask)[-2:-1] not in ((), (1,)):
            mask = build.cut(mask, len(shape_of(mask)) - 2, first, first + 1)
        if mask.dtype == ir.DataType.BOOL:
            low = build.constant(-1e4, "low", like=logits)
            logits = build.op("Where", [mask, logits, low], shape_of(logits), dtype=logits.dtype)
        else:
            logits = build.binary("Add", logits, mask)
    return build.op("Softmax", [logits], shape_of(logits), "weights", axis=-1)


def class_attention(build: Builder, attention: ir.Node, prefix: int) -> ir.Value:
    """Attention of the class token to the tokens after the first `prefix`, mean over heads, `[B, N − prefix]`.

    Source: Liang et al. 2022, "Not All Patches are What You Need" (EViT), section 3.2.
    """
    weights = _weights(build, attention, 0)
    batch, heads, _, tokens = shape_of(weights)
    mean = build.reduce("ReduceMean", build.reshape(weights, (batch, heads, tokens)), 1)
    return build.cut(mean, 1, prefix, tokens)


def attention_received(build: Builder, attention: ir.Node, prefix: int) -> ir.Value:
    """Attention that the tokens after the first `prefix` receive, mean over heads and queries, `[B, N − prefix]`.

    Source: Kim et al. 2022, "Learned Token Pruning for Transformers", equation 2.
    """
    weights = _weights(build, attention, None)
    received = build.reduce("ReduceMean", build.reduce("ReduceMean", weights, 1), 1)
    return build.cut(received, 1, prefix, shape_of(received)[1])
