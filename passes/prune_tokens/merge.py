"""Methods that merge tokens: each remaining token stands for several, and its size says for how many."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.finite import FINITE
from edgekit.passes.prune_tokens.builder import Builder, shape_of

_NEVER = -1e4
"""Likeness of a pair that must not be merged; float16 holds it."""


@dataclass(frozen=True)
class Merged:
    """Tokens after merging.

    Attributes:
        tokens: They, `[B, count, C]`.
        sizes: How many tokens each stands for, `[B, count, 1]`.
    """

    tokens: ir.Value
    sizes: ir.Value


def ones(build: Builder, tokens: ir.Value) -> ir.Value:
    """The sizes `[1, N, 1]` of tokens that stand for themselves."""
    return build.constant(np.ones((1, shape_of(tokens)[1], 1)), "sizes", like=tokens)


def most_pairs(tokens: int, prefix: int) -> int:
    """The most pairs that one matching can merge of `tokens` tokens, of which the first `prefix` are left alone."""
    return max(min((tokens - prefix) // 2, (tokens + 1) // 2 - (prefix + 1) // 2, tokens // 2 - prefix // 2), 0)


def bipartite(build: Builder, tokens: ir.Value, metric: ir.Value, sizes: ir.Value, pairs: int, prefix: int, form: str) -> Merged:
    """Merges the `pairs` most alike pairs of one token of the even and one of the odd positions (bipartite soft matching).

    Args:
        build: Writes the nodes.
        tokens: The stream, `[B, N, C]`.
        metric: What likeness is measured by, `[B, N, d]`: the mean of a block's keys over heads.
        sizes: Sizes `[B or 1, N, 1]`.
        pairs: How many pairs, at most `most_pairs`.
        prefix: How many tokens at the front are never merged.
        form: How sources are added to their destinations: "matrix", "scatter", or "rank", which needs neither TopK nor Gather.

    The tokens come out as the prefix, even positions that stayed, odd positions.

    Source: Bolya et al. 2023, "Token Merging: Your ViT But Faster", section 3 and appendix D.
    """
    batch, count, _ = shape_of(tokens)
    sizes = _for_each_sample(build, sizes, batch)
    unit = _unit(build, metric)
    likeness = build.matmul(build.cut(unit, 1, 0, count, 2), build.transpose(build.cut(unit, 1, 1, count, 2)), "likeness")
    evens, odds = shape_of(likeness)[1:]
    allowed = np.zeros((1, evens, odds))
    allowed[:, : (prefix + 1) // 2] = _NEVER
    allowed[:, :, : prefix // 2] = _NEVER
    if prefix:
        likeness = build.binary("Add", likeness, build.constant(allowed, "prefix", like=likeness))
    best, partner = build.top_k(build.reshape(likeness, (batch, evens, odds)), 1)
    best, partner = build.reshape(best, (batch, evens)), build.reshape(partner, (batch, evens))
    weighted = build.concat([build.binary("Mul", tokens, sizes), sizes], 2)
    even, odd = build.cut(weighted, 1, 0, count, 2), build.cut(weighted, 1, 1, count, 2)
    if form == "rank":
        stay, total = _merged_by_rank(build, even, odd, best, partner, pairs)
    else:
        stay, total = _merged(build, even, odd, best, partner, pairs, form)
    return _divided(build, _in_order(build, stay, total, prefix))


def _merged(
    build: Builder, even: ir.Value, odd: ir.Value, best: ir.Value, partner: ir.Value, pairs: int, form: str
) -> tuple[ir.Value | None, ir.Value]:
    """The even positions that stay, in order, and the odd ones with what was merged into them, each with its size as last channel.

    None: no even position stays.
    """
    batch, evens, width = shape_of(even)
    _, order = build.top_k(best, evens)  # one order for both parts: with two, equal ones could be in both or in none
    source = build.cut(order, 1, 0, pairs)
    moved = build.take(even, source)
    target = build.op("GatherElements", [partner, source], (batch, pairs), "targets", axis=1)
    for indices, role in ((source, "sources"), (target, "targets")):
        build.note(indices, role)
    stay = _rest(build, even, order, pairs) if pairs < evens else None
    if form == "scatter":
        where = build.op("Expand", [build.reshape(target, (batch, pairs, 1)), build.constant((batch, pairs, width), "shape")],
                         (batch, pairs, width))  # fmt: skip
        return stay, build.op("ScatterElements", [odd, where, moved], shape_of(odd), axis=1, reduction="add")
    return stay, build.binary("Add", odd, build.matmul(build.equal(shape_of(odd)[1], target, moved), moved))


def _rest(build: Builder, even: ir.Value, order: ir.Value, pairs: int) -> ir.Value:
    """The even positions after the first `pairs` of an order, in their own."""
    evens = shape_of(even)[1]
    rest = build.cast(build.cut(order, 1, pairs, evens), even)  # no runtime is without TopK of floats
    in_order, _ = build.top_k(rest, evens - pairs, largest=False, name="order")
    stay_at = build.cast(in_order, ir.DataType.INT64)
    build.note(stay_at, "stay")
    return build.take(even, stay_at)


def _merged_by_rank(
    build: Builder, even: ir.Value, odd: ir.Value, best: ir.Value, partner: ir.Value, pairs: int
) -> tuple[ir.Value | None, ir.Value]:
    """As `_merged`, with matrices of 0 and 1 made of comparisons."""
    batch, evens = shape_of(best)
    if pairs == evens:
        return None, build.binary("Add", odd, build.matmul(build.equal(shape_of(odd)[1], partner, even), even))
    rows, columns = build.reshape(best, (batch, evens, 1)), build.reshape(best, (batch, 1, evens))
    larger = build.cast(build.binary("Greater", columns, rows, ir.DataType.BOOL), even)
    equal = build.cast(build.binary("Equal", columns, rows, ir.DataType.BOOL), even)
    below = build.constant(np.tril(np.ones((1, evens, evens)), -1), "below", like=even)
    rank = build.reduce("ReduceSum", build.binary("Add", larger, build.binary("Mul", equal, below)), 2)
    moves = build.cast(build.binary("Less", rank, build.constant(pairs, "pairs", like=even), ir.DataType.BOOL), even)
    stays = build.binary("Sub", build.constant(1, "one", like=even), moves)
    place = build.reshape(build.matmul(below, build.reshape(stays, (batch, evens, 1))), (batch, 1, evens))  # stayers further in front
    wanted = build.constant(np.arange(evens - pairs).reshape(1, evens - pairs, 1), "places", like=even)
    chosen = build.cast(build.binary("Equal", wanted, place, ir.DataType.BOOL), even)
    stay = build.matmul(build.binary("Mul", chosen, build.reshape(stays, (batch, 1, evens))), even)
    sources = build.binary("Mul", build.equal(shape_of(odd)[1], partner, even), build.reshape(moves, (batch, 1, evens)))
    return stay, build.binary("Add", odd, build.matmul(sources, even))


def _in_order(build: Builder, stay: ir.Value | None, total: ir.Value, prefix: int) -> ir.Value:
    """The prefix, which is never merged and so comes first in both, then the others."""
    if stay is None:
        return total
    front = [build.cut((stay, total)[k % 2], 1, k // 2, k // 2 + 1) for k in range(prefix)] if prefix > 1 else []
    first, second = ((prefix + 1) // 2, prefix // 2) if front else (0, 0)
    return build.concat([*front, build.cut(stay, 1, first, shape_of(stay)[1]), build.cut(total, 1, second, shape_of(total)[1])], 1)


def prune_and_merge(build: Builder, tokens: ir.Value, scores: ir.Value, sizes: ir.Value, keep: int, targets: int, prefix: int) -> Merged:
    """Sorts tokens by their scores, drops the last, and merges what remains after the first `targets` into the most alike of those.

    Args:
        build: Writes the nodes.
        tokens: The stream, `[B, N, C]`.
        scores: A score of each token after the first `prefix`, `[B, N − prefix]`.
        sizes: Sizes `[B or 1, N, 1]`.
        keep: How many of those are not dropped.
        targets: How many of those stay tokens of their own.
        prefix: How many at the front always stay, and are no targets.

    A token becomes the plain mean of itself and what is merged into it; its size grows by the sizes of those, times how alike they are.

    Source: Chen et al. 2023, "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers", section 3.
    """
    batch, count, width = shape_of(tokens)
    sizes = _for_each_sample(build, sizes, batch)
    _, places = build.top_k(scores, keep)
    build.note(places, "kept")
    both = build.take(build.cut(build.concat([tokens, sizes], 2), 1, prefix, count), places)
    front = build.concat([build.cut(tokens, 1, 0, prefix), build.cut(sizes, 1, 0, prefix)], 2) if prefix else None
    target = build.cut(both, 1, 0, targets)
    if targets < keep:
        target = _absorbed(build, target, build.cut(both, 1, targets, keep), width)
    whole = target if front is None else build.concat([front, target], 1)
    return Merged(build.cut(whole, 2, 0, width), build.cut(whole, 2, width, width + 1))


def _absorbed(build: Builder, target: ir.Value, source: ir.Value, width: int) -> ir.Value:
    """Targets `[B, t, C + 1]`, each source `[B, s, C + 1]` merged into the one that it is most like; sizes are the last channel."""
    batch, targets, _ = shape_of(target)
    sources = shape_of(source)[1]
    x, moved = build.cut(target, 2, 0, width), build.cut(source, 2, 0, width)
    likeness = build.matmul(_unit(build, moved), build.transpose(_unit(build, x)), "likeness")
    best, partner = build.top_k(likeness, 1)
    partner = build.reshape(partner, (batch, sources))
    build.note(partner, "absorbed")
    pairs = build.equal(targets, partner, x)
    number = build.binary("Add", build.reduce("ReduceSum", pairs, 2, keepdims=True), 1.0)
    mean = build.binary("Div", build.binary("Add", x, build.matmul(pairs, moved)), number)
    gained = build.matmul(pairs, build.binary("Mul", build.cut(source, 2, width, width + 1), build.reshape(best, (batch, sources, 1))))
    sizes = build.binary("Add", build.cut(target, 2, width, width + 1), gained)
    return build.concat([mean, build.binary("Max", sizes, 1.0)], 2)


def add_log_sizes(build: Builder, attention: ir.Node, sizes: ir.Value) -> None:
    """Lets an Attention count a key as often as it stands for tokens: log size is added to its logits (Bolya et al. 2023, equation 1)."""
    batch, count, _ = shape_of(sizes)
    logs = build.reshape(build.op("Log", [sizes], shape_of(sizes)), (batch, 1, 1, count))
    logs.metadata_props[FINITE] = "1"  # sizes are 1 at least
    mask = attention.inputs[3] if len(attention.inputs) > 3 else None
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        shape = np.broadcast_shapes(shape_of(mask), shape_of(logs))
        logs = build.op("Where", [mask, logs, build.constant(_NEVER, "low", like=logs)], shape, dtype=logs.dtype)
    elif mask is not None:
        logs = build.binary("Add", mask, logs)
    query = attention.inputs[0]
    assert query is not None
    shape = (*shape_of(logs)[:2], shape_of(query)[-2], count)  # ONNX Runtime does not broadcast a mask along the queries
    if shape_of(logs) != shape:
        logs = build.op("Expand", [logs, build.constant(shape, "shape")], shape)
    if len(attention.inputs) < 4:
        attention.resize_inputs(4)
    attention.replace_input_with(3, logs)


def _for_each_sample(build: Builder, sizes: ir.Value, batch: int) -> ir.Value:
    shape = (batch, *shape_of(sizes)[1:])
    return sizes if shape_of(sizes) == shape else build.op("Expand", [sizes, build.constant(shape, "shape")], shape)


def _unit(build: Builder, vectors: ir.Value) -> ir.Value:
    """Vectors `[B, n, d]` of length 1."""
    length = build.reduce("ReduceL2", vectors, 2, keepdims=True)
    return build.binary("Div", vectors, build.binary("Max", length, 1e-6))


def _divided(build: Builder, weighted: ir.Value) -> Merged:
    """Means from sums with their sizes as last channel."""
    width = shape_of(weighted)[2] - 1
    sizes = build.cut(weighted, 2, width, width + 1)
    return Merged(build.binary("Div", build.cut(weighted, 2, 0, width), sizes), sizes)
