"""Axes in groups: what a tensor of many axes looks like to an operator that does not tell all of them apart.

A tensor is its elements in row-major order, and adjacent axes are one axis as far as that order goes. An operator takes two neighbours as
one where it treats them alike: both are reduced, or in each operand both are there or both are broadcast. Axes of length 1 that nothing
happens to are left out. What is left is mostly of rank 5 or less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

Shape = tuple[int, ...]
Role = str | int
"""What an operator does with an axis: neighbours of one role may be joined. A number (that of the axis) keeps it alone."""

MAX_RANK = 5
FREE = "free"
"""The role of axes that an operator only passes along."""


@dataclass(frozen=True)
class Grouping:
    """How the axes of operands of one rank are joined.

    Attributes:
        groups: The axes of each group; those that are in none have the length 1 in all operands.
        roles: The role of each group.
        runs: For each group, the lengths of the axes that stand for it where an operand has it in full: one, or several when refined.
    """

    groups: tuple[tuple[int, ...], ...]
    roles: tuple[Role, ...]
    runs: tuple[Shape, ...]

    @property
    def rank(self) -> int:
        """The rank of operands in this grouping."""
        return sum(len(run) for run in self.runs)

    def shape(self, shape: Shape) -> Shape:
        """The shape of an operand, which has as many axes as were grouped, after the grouping."""
        sizes: list[int] = []
        for axes, run in zip(self.groups, self.runs, strict=True):
            size = math.prod(shape[axis] for axis in axes)
            sizes += [size] if len(run) == 1 else run if size != 1 else [1] * len(run)
        return tuple(sizes)

    def place(self, axis: int) -> int:
        """Where the group of `axis` starts."""
        index = next(index for index, axes in enumerate(self.groups) if axis in axes)
        return sum(len(run) for run in self.runs[:index])

    def places(self, role: Role) -> list[int]:
        """Where the groups of a role start."""
        return [self.place(axes[0]) for axes, own in zip(self.groups, self.roles, strict=True) if own == role]

    def refined(self, shape: Shape, held: Shape | None) -> Grouping | None:
        """The finer grouping in which an operand of `shape` that is held as `held` needs no reshape; None where there is none."""
        sizes = self.shape(shape)
        if held is None or len(held) > MAX_RANK or 0 in held or sizes != tuple(math.prod(run) for run in self.runs):
            return None
        runs: list[Shape] = []
        rest = list(held)
        for size, role in zip(sizes, self.roles, strict=True):
            run: list[int] = []
            while rest and (not run or math.prod(run) < size):
                run.append(rest.pop(0))
            if math.prod(run) != size or not run or (role != FREE and len(run) > 1):
                return None
            runs.append(tuple(run))
        if rest and self.roles[-1] == FREE and math.prod(rest) == 1:
            runs[-1] = (*runs[-1], *rest)
            rest = []
        return None if rest else replace(self, runs=tuple(runs))


def group_axes(shapes: Sequence[Shape], roles: Sequence[Role]) -> Grouping:
    """Joins neighbours of one role that each operand has in full or broadcasts; axes of length 1 are left out where they are free.

    Args:
        shapes: The operands and results, all of one rank.
        roles: The role of each axis.
    """
    found: list[tuple[Role, tuple[bool, ...] | None, list[int]]] = []
    for axis, role in enumerate(roles):
        pattern = tuple(shape[axis] != 1 for shape in shapes)
        idle = not any(pattern)
        if idle and role == FREE:
            continue
        if found and found[-1][0] == role and (idle or found[-1][1] in (None, pattern)):
            _, before, axes = found.pop()
            found.append((role, before if idle else pattern, [*axes, axis]))
        else:
            found.append((role, None if idle else pattern, [axis]))
    found = found or [(FREE, None, [0])]  # all lengths are 1
    return Grouping(
        tuple(tuple(axes) for _, _, axes in found),
        tuple(role for role, _, _ in found),
        tuple((math.prod(max(shape[axis] for shape in shapes) for axis in axes),) for _, _, axes in found),
    )


def align(shape: Shape, rank: int) -> Shape:
    """A shape as broadcasting reads it in `rank` axes."""
    return (1,) * (rank - len(shape)) + shape


def transposes(shape: Shape, perm: Sequence[int]) -> list[tuple[Shape, tuple[int, ...]]]:
    """A transpose as the fewest that are known of rank 5 at most: before each, the tensor is reshaped to the shape given.

    One is enough where at most 5 groups of axes stay together; none is needed where all do.
    """
    steps: list[tuple[Shape, tuple[int, ...]]] = []
    sizes, order = _joined(shape, perm)
    while len(order) > MAX_RANK:
        cuts, move = _best_move(order)
        segments = list(itertools.pairwise((0, *cuts, len(order))))
        steps.append((tuple(math.prod(sizes[first:last]) for first, last in segments), move))
        moved = [axis for segment in move for axis in range(*segments[segment])]
        sizes, order = _joined(tuple(sizes[axis] for axis in moved), [moved.index(axis) for axis in order])
    if len(order) > 1:
        steps.append((sizes, order))
    return steps


def _joined(shape: Shape, perm: Sequence[int]) -> tuple[Shape, tuple[int, ...]]:
    """The same transpose without axes of length 1, and with those joined that stay neighbours."""
    kept = [axis for axis in range(len(shape)) if shape[axis] != 1]
    blocks: list[list[int]] = []
    for axis in (kept.index(axis) for axis in perm if shape[axis] != 1):
        if blocks and blocks[-1][-1] + 1 == axis:
            blocks[-1].append(axis)
        else:
            blocks.append([axis])
    ordered = sorted(blocks)
    sizes = tuple(math.prod(shape[kept[axis]] for axis in block) for block in ordered)
    return sizes, tuple(ordered.index(block) for block in blocks)


@lru_cache(maxsize=1024)
def _best_move(perm: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The cuts into 5 segments and the order of these after which most neighbours stand as `perm` wants them.

    Where two transposes are enough, the first leaves at most 5 groups; so it is found.
    """
    follows = dict(itertools.pairwise(perm))
    best = 0
    found: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    for cuts in itertools.combinations(range(1, len(perm)), MAX_RANK - 1):
        starts, ends = (0, *cuts), (*cuts, len(perm))
        for order in itertools.permutations(range(MAX_RANK)):
            joints = sum(follows.get(ends[left] - 1) == starts[right] for left, right in itertools.pairwise(order))
            if joints > best:
                best, found = joints, (cuts, order)
    return found
