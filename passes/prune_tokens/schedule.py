"""How many tokens each block leaves: from what the user asked for to counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekit.errors import UsageError
from edgekit.passes.prune_tokens.merge import most_pairs

PREFIX = "the tokens at the front, which always stay"


@dataclass(frozen=True)
class Step:
    """One reduction.

    Attributes:
        block: Number of the block.
        before: Whether it is done in front of the block, instead of after its attention.
        keep: How many tokens after the prefix are not dropped.
        targets: How many of those stay tokens of their own, the others being merged into them.
    """

    block: int
    before: bool
    keep: int
    targets: int


@dataclass(frozen=True)
class Sizes:
    """What a schedule is made for.

    Attributes:
        blocks: Number of blocks.
        tokens: Number of tokens.
        prefix: How many of them always stay, at the front.
    """

    blocks: int
    tokens: int
    prefix: int

    @property
    def patches(self) -> int:
        """The tokens that can be left out."""
        return self.tokens - self.prefix


def by_ratio(sizes: Sizes, layers: Sequence[int], keep: Sequence[float], fuse: bool) -> list[Step]:
    """After the attention of each layer, a share of the tokens that are left then; a fused token counts as one of them.

    Source: EViT (Liang et al. 2022), section 3.1: ⌈κ · n⌉ tokens.
    """
    left, steps = sizes.patches, []
    for layer, ratio in zip(layers, keep, strict=True):
        count = math.ceil(round(ratio * left, 9))
        if count < left:
            steps.append(Step(layer, False, count, count))
            left = count + fuse
    return steps


def of_all(sizes: Sizes, layers: Sequence[int], keep: Sequence[float]) -> list[Step]:
    """In front of each layer, a share of all the tokens that there were at first."""
    left, steps = sizes.patches, []
    for layer, ratio in zip(layers, keep, strict=True):
        count = math.floor(round(ratio * sizes.patches, 9))
        if count < left:
            steps.append(Step(layer, True, count, count))
            left = count
    return steps


def by_pairs(sizes: Sizes, pairs: Sequence[int]) -> list[Step]:
    """After the attention of each block, a number of pairs less; fewer where there are not as many."""
    left, steps = sizes.tokens, []
    for block, wanted in enumerate(pairs):
        merged = min(wanted, most_pairs(left, sizes.prefix))
        if merged:
            steps.append(Step(block, False, left - sizes.prefix, left - merged - sizes.prefix))
            left -= merged
    return steps


def by_counts(sizes: Sizes, prune: Sequence[int], merge: Sequence[int]) -> list[Step]:
    """After the attention of each block, the tokens that are not dropped and the tokens that are left, both with the prefix.

    A block never has more than the one before it.
    """
    left, steps = sizes.tokens, []
    for block, (keep, targets) in enumerate(zip(prune, merge, strict=True)):
        keep = min(keep, left)
        targets = min(targets, keep)
        if targets < left:
            steps.append(Step(block, False, keep - sizes.prefix, targets - sizes.prefix))
            left = targets
    return steps


def per_layer(values: float | Sequence[float] | None, layers: Sequence[int], default: Sequence[float]) -> list[float]:
    """A ratio for each layer.

    Raises:
        UsageError: There are not as many as layers.
    """
    given = list(default) if values is None else [float(values)] if isinstance(values, int | float) else list(values)
    if len(given) == 1:
        given *= len(layers)
    if len(given) != len(layers):
        raise UsageError(
            f"{len(given)} ratios do not fit {len(layers)} layers", where="option 'keep' of pass 'prune-tokens'",
            fix=f"give one ratio, or one for each of the layers {', '.join(map(str, layers))}",
        )  # fmt: skip
    return given


def spread(blocks: int, parts: Sequence[float]) -> tuple[int, ...]:
    """Blocks at shares of the depth: a quarter, half and three quarters of 12 are 3, 6 and 9."""
    return tuple(dict.fromkeys(min(round(part * blocks), blocks - 1) for part in parts))


def check_layers(layers: Sequence[int], sizes: Sizes) -> None:
    """Holds the layers against the blocks that there are.

    Raises:
        UsageError: One does not exist, or they are not in order.
    """
    wrong = [layer for layer in layers if not 0 <= layer < sizes.blocks]
    if wrong or sorted(set(layers)) != list(layers):
        raise UsageError(
            f"there is no layer {wrong[0]}: the model has {sizes.blocks} blocks, 0 to {sizes.blocks - 1}" if wrong
            else "the layers are not in order",
            where="option 'layers' of pass 'prune-tokens'",
            fix="give numbers of blocks in ascending order, each once",
        )  # fmt: skip


def check_steps(steps: Sequence[Step]) -> None:
    """Holds a schedule against what makes sense.

    Raises:
        UsageError: It leaves no token.
    """
    for step in steps:
        if step.targets < 1:
            raise UsageError(
                f"the schedule leaves no token in block {step.block} beside {PREFIX}",
                where="pass 'prune-tokens'",
                fix="keep more tokens, or merge fewer pairs",
            )
