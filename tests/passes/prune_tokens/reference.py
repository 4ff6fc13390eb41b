"""The same transformers in numpy and float64, with places where a method of token reduction can step in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tests.passes.prune_tokens.vit_graphs import EPSILON, MASKED, Vit

_erf = np.vectorize(math.erf)


@dataclass
class State:
    """The stream between two operators.

    Attributes:
        x: Tokens `[B, N, C]`.
        alive: Which of them attention and means still see, `[B, N]` of bool.
        sizes: How many tokens each stands for, `[B, N]`; None: attention does not count them.
        mass: How often a mean counts each, `[B, N]`.
    """

    x: np.ndarray
    alive: np.ndarray
    sizes: np.ndarray | None
    mass: np.ndarray


class Reduction:
    """Steps in before each block and after each attention with its residual sum. This one does nothing."""

    def before(self, block: int, state: State, network: Network) -> None:
        """Changes the state in front of a block."""

    def after(self, block: int, state: State, k: np.ndarray, weights: np.ndarray) -> None:
        """Changes the state between attention and MLP, given the keys `[B, H, N, d]` and the weights `[B, H, N, N]`."""


class Network:
    """A transformer.

    Args:
        vit: What it is made of.
        weights: Its weights; they are widened to float64.
    """

    def __init__(self, vit: Vit, weights: Mapping[str, np.ndarray]) -> None:
        self.vit = vit
        self.w = {name: array.astype(np.float64) for name, array in weights.items()}

    def logits(self, feeds: Mapping[str, np.ndarray], reduction: Reduction | None = None) -> np.ndarray:
        """The logits `[B, classes]` of one input, with the tokens reduced as it runs."""
        vit, w, reduction = self.vit, self.w, reduction or Reduction()
        x = self.linear(feeds["x"].astype(np.float64), "embed")
        if vit.prefix:
            x = np.concatenate([feeds["front"] if vit.given_prefix else np.repeat(w["prefix"], vit.batch, 0), x], 1)
        x = x + w["position"]
        shape = (vit.batch, vit.tokens)
        state = State(x, np.ones(shape, bool), None, np.ones(shape))
        added = (1.0 - feeds["mask"].astype(np.float64))[:, None, None, :] * MASKED if vit.mask else None
        for k in range(vit.depth):
            reduction.before(k, state, self)
            x = state.x if vit.post_norm else self.norm(state.x, f"{k}.norm1")
            mixed, keys, weights = self.attention(k, x, state, added)
            state.x = state.x + self.linear(mixed, f"{k}.proj")
            if vit.post_norm:
                reduction.after(k, state, keys, weights)
                state.x = self.norm(state.x, f"{k}.norm1")
                state.x = self.norm(state.x + self.mlp(k, state.x), f"{k}.norm2")
            else:
                reduction.after(k, state, keys, weights)
                state.x = state.x + self.mlp(k, self.norm(state.x, f"{k}.norm2"))
        return self.head(state)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """`x · weight + bias`."""
        result: np.ndarray = x @ self.w[f"{name}.w"] + self.w[f"{name}.b"]
        return result

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """Layer normalization of the last axis."""
        return plain_norm(x, EPSILON) * self.w[f"{name}.w"] + self.w[f"{name}.b"]

    def mlp(self, k: int, x: np.ndarray) -> np.ndarray:
        """Two linear layers with the exact GELU."""
        inner = self.linear(x, f"{k}.fc1")
        return self.linear(inner * 0.5 * (1 + _erf(inner / math.sqrt(2))), f"{k}.fc2")

    def heads(self, x: np.ndarray) -> np.ndarray:
        """`[B, N, H · d]` as `[B, H, N, d]`."""
        return x.reshape(*x.shape[:2], self.vit.heads, -1).transpose(0, 2, 1, 3)

    def attention(self, k: int, x: np.ndarray, state: State, added: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the values are mixed to `[B, N, C]`, the keys and the weights; tokens that are not alive get a logit of −∞."""
        q, keys, values = (self.heads(part) for part in np.split(self.linear(x, f"{k}.qkv"), 3, -1))
        if self.vit.rotary:
            q, keys = self.turned(q), self.turned(keys)
        logits = q @ keys.swapaxes(-1, -2) / math.sqrt(self.vit.head_width)
        if self.vit.table:
            logits = logits + self.w[f"{k}.table"]
        if added is not None:
            logits = logits + added
        if state.sizes is not None:
            logits = logits + np.log(state.sizes)[:, None, None, :]
        logits = np.where(state.alive[:, None, None, :], logits, -np.inf)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ values).transpose(0, 2, 1, 3).reshape(x.shape)
        return mixed, keys, weights

    def turned(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of `[B, H, N, d]`."""
        first, second = np.split(x, 2, -1)
        result: np.ndarray = x * self.w["cos"] + np.concatenate([-second, first], -1) * self.w["sin"]
        return result

    def head(self, state: State) -> np.ndarray:
        """The logits of what is pooled."""
        vit = self.vit
        x = state.x if vit.post_norm else self.norm(state.x, "norm")
        if vit.pool.startswith("mean"):
            mass = state.mass * state.alive
            if vit.pool == "mean-patches":
                mass[:, : vit.prefix] = 0
            return self.linear((x * mass[..., None]).sum(1) / mass.sum(1)[:, None], "head")
        first = self.linear(x[:, 0], "head")
        if vit.pool == "class":
            return first
        mass = (state.mass * state.alive)[..., None]
        other = x[:, 1] if vit.pool == "distilled" else (x * mass).sum(1) / mass.sum(1)
        return (first + self.linear(other, "head2")) / 2


def plain_norm(x: np.ndarray, epsilon: float) -> np.ndarray:
    """Layer normalization without weights."""
    centred = x - x.mean(-1, keepdims=True)
    result: np.ndarray = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return result


class Masked(Reduction):
    """Dropping as a mask: tokens stay in the stream, and attention does not see them from some block on.

    Args:
        method: `evit`, `attention-received` or `random`.
        prefix: Tokens at the front that always stay.
        keep: How many of the others stay, by block.
        places: Of `random`, which of those that are left stay, by block.

    Attributes:
        kept: Which tokens after the prefix stayed, `[B, count]` in ascending order, by block.
    """

    def __init__(self, method: str, prefix: int, keep: Mapping[int, int], places: Mapping[int, np.ndarray] | None = None) -> None:
        self.method, self.prefix, self.keep, self.places = method, prefix, keep, places or {}
        self.kept: dict[int, np.ndarray] = {}

    def after(self, block: int, state: State, k: np.ndarray, weights: np.ndarray) -> None:
        """Drops the tokens of the lowest scores."""
        if block not in self.keep:
            return
        for sample, alive in enumerate(state.alive):
            left = np.flatnonzero(alive[self.prefix :])
            if self.method == "random":
                chosen = left[self.places[block]]
            else:
                rows = weights[sample][:, :1] if self.method == "evit" else weights[sample][:, alive]
                scores = rows.mean((0, 1))[self.prefix :][left]
                chosen = left[np.argsort(-scores, kind="stable")[: self.keep[block]]]
            self._leave(block, state, sample, chosen)

    def _leave(self, block: int, state: State, sample: int, chosen: np.ndarray) -> None:
        assert len(set(chosen.tolist())) == self.keep[block]
        state.alive[sample, self.prefix :] = False
        state.alive[sample, self.prefix + chosen] = True
        self.kept.setdefault(block, np.zeros((len(state.alive), self.keep[block]), int))[sample] = np.sort(chosen)


class MaskedPolicy(Masked):
    """IA-RED² with the thresholds at which a given number of tokens survive: their rows are zeroed before the scorer and each group.

    The scorer's weights are those of the queries and keys of the block before (of the first block, its own) without the norm's own.
    """

    def __init__(self, prefix: int, keep: Mapping[int, int]) -> None:
        super().__init__("ia-red2", prefix, keep)
        self.probabilities: dict[int, np.ndarray] = {}

    def before(self, block: int, state: State, network: Network) -> None:
        """Drops the tokens below the threshold."""
        if block not in self.keep:
            return
        source = max(block - 1, 0)
        weight, bias = network.w[f"{source}.qkv.w"], network.w[f"{source}.qkv.b"]
        scale, shift = network.w[f"{source}.norm1.w"], network.w[f"{source}.norm1.b"]
        z = plain_norm(state.x * state.alive[..., None], 1e-5)
        q, keys, _ = (network.heads(part) for part in np.split(z @ (scale[:, None] * weight) + shift @ weight + bias, 3, -1))
        logits = (q[:, :, :1] * keys).sum(-1) / math.sqrt(network.vit.head_width)
        policy = (1 / (1 + np.exp(-logits))).mean(1) * state.alive
        self.probabilities[block] = policy
        for sample, row in enumerate(policy):
            patches = np.sort(row[self.prefix :])[::-1]
            threshold = (patches[self.keep[block] - 1] + patches[self.keep[block]]) / 2
            self._leave(block, state, sample, np.flatnonzero(row[self.prefix :] > threshold))
        state.x = state.x * state.alive[..., None]

    def after(self, block: int, state: State, k: np.ndarray, weights: np.ndarray) -> None:
        """Nothing: this method decides in front of a block."""


class Fused(Reduction):
    """EViT: the highest attention of the class token stays, one token is made of the others with their attention as weights."""

    def __init__(self, prefix: int, keep: Mapping[int, int]) -> None:
        self.prefix, self.keep = prefix, keep

    def after(self, block: int, state: State, k: np.ndarray, weights: np.ndarray) -> None:
        """Reorders the stream as class token, kept tokens by falling attention, the token that is made of the rest."""
        if block not in self.keep:
            return
        rows = []
        for tokens, attention in zip(state.x, weights.mean(1)[:, 0, self.prefix :], strict=True):
            order = np.argsort(-attention, kind="stable")
            kept, gone = order[: self.keep[block]], order[self.keep[block] :]
            patches = tokens[self.prefix :]
            extra = sum((attention[index] * patches[index] for index in gone), np.zeros(tokens.shape[-1]))
            rows.append(np.concatenate([tokens[: self.prefix], patches[kept], extra[None]]))
        state.x = np.stack(rows)
        state.alive = np.ones(state.x.shape[:2], bool)
        state.mass = np.ones(state.x.shape[:2])


class Merging(Reduction):
    """ToMe, one pair after the other.

    Args:
        prefix: Tokens at the front that are not merged.
        pairs: How many pairs, by block.
        proportional: Whether attention counts sizes.
    """

    def __init__(self, prefix: int, pairs: Mapping[int, int], proportional: bool = True) -> None:
        self.prefix, self.pairs, self.proportional = prefix, pairs, proportional

    def after(self, block: int, state: State, k: np.ndarray, weights: np.ndarray) -> None:
        """Merges the most alike pairs of one even and one odd token, weighted by size."""
        if block not in self.pairs:
            return
        rows, masses = [], []
        for tokens, mass, metric in zip(state.x, state.mass, k.mean(1), strict=True):
            row, counts = self._merged(tokens, mass, metric / np.linalg.norm(metric, axis=-1, keepdims=True), self.pairs[block])
            rows.append(row)
            masses.append(counts)
        state.x, state.mass = np.stack(rows), np.stack(masses)
        state.alive = np.ones(state.mass.shape, bool)
        state.sizes = state.mass if self.proportional else None

    def _merged(self, tokens: np.ndarray, mass: np.ndarray, metric: np.ndarray, pairs: int) -> tuple[np.ndarray, np.ndarray]:
        count = len(tokens)
        even, odd = range(0, count, 2), range(1, count, 2)
        best = {}
        for i in even:
            if i >= self.prefix:
                partners = {j: metric[i] @ metric[j] for j in odd if j >= self.prefix}
                best[i] = max(partners, key=lambda j: (partners[j], -j))
        sources = sorted(best, key=lambda i: (-(metric[i] @ metric[best[i]]), i))[:pairs]
        total, sizes = tokens * mass[:, None], mass.copy()
        for i in sources:
            total[best[i]] += tokens[i] * mass[i]
            sizes[best[i]] += mass[i]
        front = list(range(self.prefix))
        order = front + [i for i in even if i not in sources and i not in front] + [j for j in odd if j not in front]
        if self.prefix == 0:
            order = [i for i in even if i not in sources] + list(odd)
        return (total / sizes[:, None])[order], sizes[order]


class PruneAndMerge(Reduction):
    """DiffRate: sorted by the class token's attention, the last dropped, the last of the others merged.

    Args:
        prefix: Tokens at the front that are neither dropped nor merged into.
        counts: Tokens after dropping and after merging, with the prefix, by block.
    """

    def __init__(self, prefix: int, counts: Mapping[int, tuple[int, int]]) -> None:
        self.prefix, self.counts = prefix, counts

    def after(self, block: int, state: State, k: np.ndarray, weights: np.ndarray) -> None:
        """Sorts, drops and merges."""
        if block not in self.counts:
            return
        keep, left = self.counts[block]
        sizes = state.sizes if state.sizes is not None else np.ones(state.x.shape[:2])
        rows, masses = [], []
        for tokens, size, attention in zip(state.x, sizes, weights.mean(1)[:, 0, self.prefix :], strict=True):
            order = [*range(self.prefix), *(self.prefix + np.argsort(-attention, kind="stable"))][:keep]
            x, s = tokens[order], size[order].copy()
            unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
            members = {target: [x[target]] for target in range(left)}
            for source in range(left, keep):
                likeness = unit[self.prefix : left] @ unit[source]
                target = self.prefix + int(likeness.argmax())
                members[target].append(x[source])
                s[target] += s[source] * likeness.max()
            rows.append(np.stack([np.mean(members[target], 0) for target in range(left)]))
            masses.append(np.maximum(s[:left], 1))
        state.x, state.sizes = np.stack(rows), np.stack(masses)
        state.mass = state.sizes
        state.alive = np.ones(state.sizes.shape, bool)
