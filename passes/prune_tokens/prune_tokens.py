"""The pass `prune-tokens`: a trained transformer goes on with fewer tokens from some blocks on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.errors import UsageError
from edgekit.graph.cost import cost
from edgekit.passes.prune_tokens import schedule
from edgekit.passes.prune_tokens.blocks import Block, blocks_of, find_blocks, prefix_length
from edgekit.passes.prune_tokens.damage import Damage
from edgekit.passes.prune_tokens.reduce import CLASS_TOKEN, How, reduce_tokens
from edgekit.passes.prune_tokens.schedule import Sizes, Step
from edgekit.passes.prune_tokens.search import Problem, search
from edgekit.passes.prune_tokens.token_axis import Region, StandsInTheWayError, follow
from edgekit.passes.prune_tokens.token_cost import token_cost

Method = Literal["auto", "evit", "tome", "ia-red2", "attention-received", "diffrate", "random"]
_WHERE = "pass 'prune-tokens'"
_KEEP = 0.7
_PAIRS = 0.066
"""Pairs that `tome` merges in each block where no number is given, as a share of the tokens: 13 of 197."""

_SHARES = (0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9)
"""Shares of the MACs that an accuracy budget chooses among."""


@dataclass(frozen=True)
class PruneTokens(Pass):
    """Leave tokens out of a transformer's stream, or merge alike ones, from some blocks on.

    Before:  x ─ Attention ─ Add ─ MLP ─► [B, N, C]
    After:   x ─ Attention ─ Add ─ score ─ TopK ─ Gather ─ MLP ─► [B, k, C]

    The stream is found by its residual sums around Attention. What is computed from it is followed to where its tokens end (the class
    token is picked, tokens are averaged); shapes are rewritten, and what has an entry for each token (masks, positions) loses the same.
    All shapes stay static. Where an operator needs all tokens (windows, convolutions, causal attention), it is named and nothing changed.

    Methods, by what a token's score is:

    1. `evit`: attention of the class token, mean over heads, after the attention of `layers`; one token is made of those that go (`fuse`);
    2. `attention-received`: attention from all tokens, for models without a class token;
    3. `ia-red2`: a scorer of its own in front of groups of blocks, started from the queries and keys of the block before; `keep` is a share
       of all tokens;
    4. `tome`: the `r` most alike pairs of each block are merged; `proportional` attention counts them;
    5. `diffrate`: sorted by the class token's attention, dropped but for `prune`, the last of those merged but for `merge`, block by block;
    6. `random`: the same random places for every input, which the others must beat.

    Sources: Liang et al. 2022 (EViT); Kim et al. 2022 (Learned Token Pruning); Pan et al. 2021 (IA-RED²); Bolya et al. 2023 (Token
    Merging); Chen et al. 2023 (DiffRate).
    """

    name: ClassVar[str] = "prune-tokens"
    effect: ClassVar[Effect] = Effect.APPROXIMATE

    method: Method = "auto"
    """`auto`: `diffrate` where there is a budget, data and a class token, else `tome`."""
    keep: float | tuple[float, ...] | None = None
    """Share of tokens that stay, in (0, 1]: one for all layers or one for each. 0.7 where none is given; of `ia-red2` 0.9, 0.7, 0.5."""
    layers: tuple[int, ...] = ()
    """Blocks, from 0. Left out: at a quarter, half and three quarters of the depth; of `ia-red2` in front of 0, a third and two thirds."""
    r: int | tuple[int, ...] | None = None
    """Pairs that `tome` merges: in every block, or in each. Left out: a fifteenth of the tokens."""
    prune: tuple[int, ...] = ()
    """Of `diffrate`: tokens after dropping, with the class token, in each block."""
    merge: tuple[int, ...] = ()
    """Of `diffrate`: tokens after merging, with the class token, in each block."""
    target_macs: float | None = None
    """Share of the graph's MACs to come down to, instead of counts: of several schedules the one of least damage on calibration data."""
    fuse: bool = True
    """Of `evit`: whether one token is made of those that go."""
    proportional: bool = True
    """Of `tome` and `diffrate`: whether attention counts a token as often as it stands for tokens. Off for masked autoencoders."""
    form: Literal["top-k", "scatter", "rank"] = "top-k"
    """How tokens are chosen and moved: `rank` by comparisons and products, for runtimes that are slow at TopK. All give the same."""

    def __post_init__(self) -> None:
        given = () if self.keep is None else self.keep if isinstance(self.keep, tuple) else (self.keep,)
        wrong = [ratio for ratio in given if not 0 < ratio <= 1]
        if wrong:
            raise UsageError(
                f"a share of {wrong[0]:g} of the tokens", where=f"option 'keep' of {_WHERE}", fix="give shares above 0, 1 at most"
            )
        pairs = () if self.r is None else self.r if isinstance(self.r, tuple) else (self.r,)
        if any(count < 0 for count in (*pairs, *self.prune, *self.merge)):
            raise UsageError("a negative number of tokens", where=_WHERE, fix="give 0 or more")
        if len(self.prune) != len(self.merge):
            raise UsageError(
                f"{len(self.prune)} counts to prune to and {len(self.merge)} to merge to", where=_WHERE, fix="give both for each block"
            )
        counted = self.keep is not None or self.r is not None or self.prune or self.layers
        if self.target_macs is not None and (not 0 < self.target_macs < 1 or counted):
            raise UsageError(
                "a budget and counts exclude each other" if counted else f"a budget of {self.target_macs:g} times the MACs",
                where=f"option 'target_macs' of {_WHERE}",
                fix="give a share below 1, and leave keep, layers, r, prune and merge out",
            )
        if self.method == "diffrate" and not self.prune and self.target_macs is None:
            raise UsageError(
                "the method 'diffrate' needs counts or a budget",
                where=_WHERE,
                fix="give 'target_macs', or 'prune' and 'merge' for each block",
            )

    def settings(self) -> list[Pass]:
        """Budgets of MACs from a quarter to nine tenths, where no counts and no budget were given."""
        if self.target_macs is not None or self.keep is not None or self.r is not None or self.prune or self.layers:
            return [self]
        return [replace(self, target_macs=share) for share in _SHARES]

    def apply(self, model: ir.Model, context: Context) -> int:
        """Shortens the stream; returns at how many places, 0 where the schedule leaves all tokens or an operator stands in the way.

        Raises:
            UsageError: A layer does not exist, no token would be left, or the method needs a class token and there is none.
        """
        blocks = find_blocks(model.graph)
        if not blocks:
            context.refuse("the graph", "it has no self-attention with a residual sum over tokens [B, N, C]")
            return 0
        try:
            region = follow(model.graph, blocks[0].stream)
            method = self._chosen(context, region)
            self._require_class_token(method, region)
            sizes = sizes_of(blocks[0], region)
            blocks = blocks_of(model.graph, region.attentions)
            how = How(method, sizes.prefix, method == "evit" and self.fuse, self.proportional, self.form,
                      context.generator or np.random.default_rng(0))  # fmt: skip
            steps = self._steps(method, sizes)
            if self.target_macs is not None:
                spent = token_cost(model, blocks, region)
                budget = self.target_macs * cost(model).macs
                steps = list(search(Problem(sizes, how, spent, budget, Damage(model, context.calibration))))
            schedule.check_steps(steps)
            return reduce_tokens(model, blocks, steps, how, lambda block: context.applied(block.name))
        except StandsInTheWayError as error:
            context.refuse(error.where, error.why)
            return 0

    def _chosen(self, context: Context, region: Region) -> str:
        """The method, of `auto` the one that fits."""
        if self.method != "auto":
            return self.method
        return "diffrate" if self.target_macs is not None and context.has_data and region.picked >= 0 else "tome"

    def _require_class_token(self, method: str, region: Region) -> None:
        if method in CLASS_TOKEN and region.picked < 0:
            raise UsageError(
                f"the method '{method}' scores tokens by the class token, and the model reads none",
                where=_WHERE,
                fix="use method='attention-received' or method='tome'",
            )

    def _steps(self, method: str, sizes: Sizes) -> list[Step]:
        if self.target_macs is not None:
            return []
        if method == "tome":
            pairs = self.r if self.r is not None else round(_PAIRS * sizes.tokens)
            return schedule.by_pairs(sizes, self._for_each_block(pairs, sizes, "r"))
        if method == "diffrate":
            return schedule.by_counts(
                sizes, self._for_each_block(self.prune, sizes, "prune"), self._for_each_block(self.merge, sizes, "merge")
            )
        if method == "ia-red2":
            layers = self.layers or schedule.spread(sizes.blocks, (0, 1 / 3, 2 / 3))
            schedule.check_layers(layers, sizes)
            default = (0.9, 0.7, 0.5) if len(layers) == 3 else (_KEEP,)
            return schedule.of_all(sizes, layers, schedule.per_layer(self.keep, layers, default))
        layers = self.layers or schedule.spread(sizes.blocks, (1 / 4, 1 / 2, 3 / 4))
        schedule.check_layers(layers, sizes)
        ratios = schedule.per_layer(self.keep, layers, (_KEEP,))
        return schedule.by_ratio(sizes, layers, ratios, method == "evit" and self.fuse)

    def _for_each_block(self, counts: int | tuple[int, ...], sizes: Sizes, option: str) -> list[int]:
        given = [counts] * sizes.blocks if isinstance(counts, int) else list(counts)
        if len(given) != sizes.blocks:
            raise UsageError(
                f"{len(given)} counts do not fit {sizes.blocks} blocks",
                where=f"option '{option}' of {_WHERE}",
                fix="give one for each block",
            )
        return given


def sizes_of(first: Block, region: Region) -> Sizes:
    """What a schedule is made for: blocks, tokens, and how many of them always stay, of the first block and what follows its stream."""
    prefix = max(region.picked + 1, region.skipped, prefix_length(first.stream))
    return Sizes(len(region.attentions), first.tokens, prefix)
