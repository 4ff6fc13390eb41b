"""The scorer of IA-RED²: a small attention of its own, in front of a group of blocks, says how likely each token is to be needed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.passes.prune_tokens.builder import Builder, shape_of
from edgekit.passes.prune_tokens.linear_probe import probe
from edgekit.passes.prune_tokens.token_axis import StandsInTheWayError

_EPSILON = 1e-5


@dataclass(frozen=True)
class Projection:
    """Queries and keys of a block as linear maps of its stream after a norm without weights.

    Attributes:
        queries: Weight `[C, H · d]`.
        keys: Weight `[C, H · d]`.
        query_bias: `[H · d]`.
        key_bias: `[H · d]`.
        heads: Number H of heads.
    """

    queries: np.ndarray
    keys: np.ndarray
    query_bias: np.ndarray
    key_bias: np.ndarray
    heads: int


def projection(attention: ir.Node, stream: ir.Value) -> Projection:
    """Reads a block's projections by pushing matrices through what lies between the stream and its attention.

    Raises:
        StandsInTheWayError: There is something else than a norm and linear maps.
    """
    query, key = attention.inputs[:2]
    assert query is not None
    assert key is not None
    heads = shape_of(query)[1] if len(shape_of(query)) == 4 else attention.attributes.get_int("q_num_heads", 1)
    weights = [_linear(value, stream, attention) for value in (query, key)]
    if weights[0][0].shape != weights[1][0].shape:
        raise StandsInTheWayError(attention.name or "", "its heads share keys, from which no scorer can be started")
    return Projection(weights[0][0], weights[1][0], weights[0][1], weights[1][1], heads)


def _linear(value: ir.Value, stream: ir.Value, attention: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Weight `[C, heads · d]` and bias of what `value` is of the normalized stream: measured at zero and at each unit vector."""
    path: list[ir.Node] = []
    at = value
    while at.producer() is not None and at.producer().op_type not in ("LayerNormalization", "RMSNormalization"):  # type: ignore[union-attr]
        node = at.producer()
        assert node is not None
        data = [one for one in node.inputs if one is not None and constant_array(one) is None]
        if len(data) != 1 or node.op_type not in _EXACT:
            raise StandsInTheWayError(node.name or "", "the scorer can only be started from queries and keys that are linear in a norm")
        path.append(node)
        at = data[0]
    norm = at.producer()
    if norm is None or norm.op_type != "LayerNormalization" or norm.inputs[0] is not stream:
        raise StandsInTheWayError(attention.name or "", "its queries and keys do not come from a LayerNormalization of the stream")
    return _measured(path[::-1], norm, shape_of(stream), value)


_EXACT = {"Add", "Cast", "MatMul", "Mul", "Reshape", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Identity"}


def _measured(path: list[ir.Node], norm: ir.Node, shape: tuple[int, ...], value: ir.Value) -> tuple[np.ndarray, np.ndarray]:
    """Runs the nodes of `path` on one token after the other being a unit vector, in float64."""
    width = shape[2]
    gamma = constant_array(norm.inputs[1])
    beta = constant_array(norm.inputs[2]) if len(norm.inputs) > 2 and norm.inputs[2] is not None else np.zeros(width)
    if gamma is None or beta is None:
        raise StandsInTheWayError(norm.name or "", "its weights are computed while the model runs")
    weight, bias = probe(path, value, shape)
    weight, bias = weight.astype(np.float64), bias.astype(np.float64)
    return gamma.astype(np.float64)[:, None] * weight, bias + beta.astype(np.float64) @ weight


def keep_scores(build: Builder, tokens: ir.Value, start: Projection, prefix: int) -> ir.Value:
    """How likely each token after the first `prefix` is to be needed, `[B, N − prefix]`.

    A norm without weights, then the mean over heads of sigmoid(q·k/√d) with the query of the class token: a sigmoid and no softmax, so that
    a token's score does not depend on the others. The weights are new parameters, which start as those of a block and can be trained.

    Source: Pan et al. 2021, "IA-RED²: Interpretability-Aware Redundancy Reduction for Vision Transformers", section 3.
    """
    batch, count, width = shape_of(tokens)
    unit = [build.constant(number, name, like=tokens) for number, name in ((np.ones(width), "scale"), (np.zeros(width), "shift"))]
    normed = build.op("LayerNormalization", [tokens, *unit], (batch, count, width), axis=-1, epsilon=_EPSILON)
    heads, depth = start.heads, start.keys.shape[1] // start.heads
    first = _projected(build, build.cut(normed, 1, 0, 1), start.queries, start.query_bias, "scorer.q", heads)
    keys = _projected(build, build.cut(normed, 1, prefix, count), start.keys, start.key_bias, "scorer.k", heads)
    logits = build.binary("Mul", build.matmul(first, build.transpose(keys)), 1 / math.sqrt(depth))
    likely = build.op("Sigmoid", [logits], shape_of(logits), "keep")
    return build.reduce("ReduceMean", build.reshape(likely, (batch, heads, count - prefix)), 1)


def _projected(build: Builder, x: ir.Value, weight: np.ndarray, bias: np.ndarray, name: str, heads: int) -> ir.Value:
    batch, count, _ = shape_of(x)
    depth = len(bias) // heads
    product = build.matmul(x, build.constant(weight, f"{name}.weight", like=x))
    shifted = build.binary("Add", product, build.constant(bias, f"{name}.bias", like=x))
    split = build.reshape(shifted, (batch, count, heads, depth))
    return build.op("Transpose", [split], (batch, heads, count, depth), perm=[0, 2, 1, 3])
