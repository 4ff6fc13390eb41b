"""Methods that leave tokens out: the highest scores stay, in their order, perhaps with one token made of all the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.passes.prune_tokens.builder import Builder, shape_of


@dataclass(frozen=True)
class Selected:
    """Tokens that stay.

    Attributes:
        tokens: They, `[B, count, C]`.
        places: Where they were among the tokens after the prefix, `[B, kept]`; of a token that was made of others there is none.
    """

    tokens: ir.Value
    places: ir.Value


def keep_highest(build: Builder, tokens: ir.Value, scores: ir.Value, keep: int, prefix: int, *, fuse: bool, form: str) -> Selected:
    """Keeps the first `prefix` tokens and the `keep` of the highest scores.

    Args:
        build: Writes the nodes.
        tokens: The stream, `[B, N, C]`.
        scores: A score of each token after the first `prefix`, `[B, N − prefix]`.
        keep: How many of those stay.
        prefix: How many at the front always stay.
        fuse: Whether one token more is made of those that go: their sum, weighted by the scores (EViT, equation 4).
        form: "top-k", or "rank": by comparing every two scores, where a runtime is slow at TopK; both give the same tokens in one order.
    """
    batch, count, _ = shape_of(tokens)
    patches = build.cut(tokens, 1, prefix, count)
    best, places = build.top_k(scores, keep) if form == "top-k" else _by_rank(build, scores, keep)
    kept = build.take(patches, places)
    parts = [build.cut(tokens, 1, 0, prefix), kept]
    if fuse and keep < count - prefix:
        whole = build.matmul(build.reshape(scores, (batch, 1, count - prefix)), patches)
        part = build.matmul(build.reshape(best, (batch, 1, keep)), kept)
        parts.append(build.binary("Sub", whole, part))
    build.note(places, "fused" if fuse else "kept")
    return Selected(build.concat(parts, 1), places)


def keep_fixed(build: Builder, tokens: ir.Value, places: np.ndarray, prefix: int) -> Selected:
    """Keeps the first `prefix` tokens and those at `places` after them, alike for every input."""
    batch, count, _ = shape_of(tokens)
    kept = build.constant(places[None].repeat(batch, 0), "kept")
    build.note(kept, "kept")
    return Selected(build.concat([build.cut(tokens, 1, 0, prefix), build.take(build.cut(tokens, 1, prefix, count), kept)], 1), kept)


def _by_rank(build: Builder, scores: ir.Value, keep: int) -> tuple[ir.Value, ir.Value]:
    """What TopK gives, from the number of scores that come before each: larger ones, and equal ones further in front."""
    batch, count = shape_of(scores)
    rows, columns = build.reshape(scores, (batch, count, 1)), build.reshape(scores, (batch, 1, count))
    larger = build.cast(build.binary("Greater", columns, rows, ir.DataType.BOOL), scores)
    equal = build.cast(build.binary("Equal", columns, rows, ir.DataType.BOOL), scores)
    before = build.binary("Mul", equal, build.constant(np.tril(np.ones((1, count, count)), -1), "before", like=scores))
    rank = build.reduce("ReduceSum", build.binary("Add", larger, before), 2)
    wanted = build.constant(np.arange(keep).reshape(1, keep, 1), "ranks", like=scores)
    chosen = build.cast(build.binary("Equal", wanted, build.reshape(rank, (batch, 1, count)), ir.DataType.BOOL), scores)
    numbers = build.constant(np.arange(count).reshape(1, count, 1), "numbers", like=scores)
    places = build.cast(build.reshape(build.matmul(chosen, numbers), (batch, keep)), ir.DataType.INT64)
    best = build.reshape(build.matmul(chosen, rows), (batch, keep))
    return best, places
