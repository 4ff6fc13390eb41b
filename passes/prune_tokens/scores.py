"""How much a token matters, from the queries and keys of a block's attention."""

from __future__ import annotations

import math

import onnx_ir as ir

from edgekit.passes.prune_tokens.builder import Builder, shape_of
from edgekit.passes.prune_tokens.token_axis import StandsInTheWayError


def queries_and_keys(build: Builder, attention: ir.Node) -> tuple[ir.Value, ir.Value]:
    """Queries and keys of an Attention as `[B, H, N, d]`.

    Raises:
        StandsInTheWayError: Heads share their keys.
    """
    heads = attention.attributes.get_int("q_num_heads", 0), attention.attributes.get_int("kv_num_heads", 0)
    made = []
    for value, count in zip(attention.inputs[:2], heads, strict=True):
        assert value is not None
        shape = shape_of(value)
        if len(shape) == 3:
            batch, tokens, width = shape
            split = build.reshape(value, (batch, tokens, count, width // count))
            value = build.op("Transpose", [split], (batch, count, tokens, width // count), perm=[0, 2, 1, 3])
        made.append(value)
    if shape_of(made[0])[1] != shape_of(made[1])[1]:
        raise StandsInTheWayError(attention.name or "", "its heads share keys, whose attention would have to be told apart")
    return made[0], made[1]


def _weights(build: Builder, attention: ir.Node, first: int | None) -> ir.Value:
    """The attention's weights `[B, H, queries, N]`, of the query `first` alone where it is given."""
    query, key = queries_and_keys(build, attention)
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
