"""The schedule that meets a budget of MACs and does the least damage."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from edgekit.errors import UsageError
from edgekit.graph.cost import cost
from edgekit.passes.prune_tokens import schedule
from edgekit.passes.prune_tokens.damage import Damage
from edgekit.passes.prune_tokens.reduce import How
from edgekit.passes.prune_tokens.schedule import Sizes, Step
from edgekit.passes.prune_tokens.token_cost import TokenCost, counts_of

_UNITS = 24
"""Tokens are removed in steps of this part of all of them when counts of single blocks are solved for."""
_TRIED = (1, 2, 4, 8)
"""Removals, in units, whose damage is measured; others are interpolated."""
_MERGED = 0.75
"""Share of what a block loses that is merged and not dropped, near to that of the schedules of Chen et al. 2023, table 6."""

_ROUNDS = 6

Schedule = tuple[Step, ...]


@dataclass(frozen=True)
class Problem:
    """What is looked for.

    Attributes:
        sizes: Blocks and tokens.
        how: The method.
        cost: MACs by tokens.
        budget: The most MACs.
        damage: Measures a schedule.
    """

    sizes: Sizes
    how: How
    cost: TokenCost
    budget: float
    damage: Damage

    def macs(self, steps: Sequence[Step]) -> float:
        """MACs with a schedule, without those of choosing tokens."""
        return self.cost.macs(counts_of(steps, self.sizes, self.how.fuse))

    def measure(self, steps: Sequence[Step]) -> float:
        """The damage of a schedule."""
        return self.damage.of(steps, self.how)


def search(problem: Problem) -> Schedule:
    """The schedule of least damage, of those that are tried.

    Choosing tokens has MACs of its own, which only show in the graph: what it exceeds the budget by is taken off, and it is searched again.

    Raises:
        UsageError: The method cannot meet the budget.
    """
    budget = problem.budget
    for _ in range(_ROUNDS):
        steps = _search(replace(problem, budget=budget))
        excess = cost(problem.damage.built(steps, problem.how)).macs - problem.budget
        if excess <= 0:
            return steps
        budget -= excess
    raise _out_of_reach(problem)


def _search(problem: Problem) -> Schedule:
    if problem.how.method == "diffrate":
        return _solve_counts(problem)
    tried: dict[Schedule, float] = {}
    for family in _families(problem.how, problem.sizes):
        steps = _within(problem, family)
        if steps and steps not in tried:
            tried[steps] = problem.measure(steps)
    if not tried:
        raise _out_of_reach(problem)
    return min(tried, key=lambda steps: tried[steps])


def _out_of_reach(problem: Problem) -> UsageError:
    whole = problem.macs(())
    return UsageError(
        f"the method '{problem.how.method}' cannot bring the model to {problem.budget / whole:.0%} of its MACs",
        where="option 'target_macs' of pass 'prune-tokens'",
        fix="ask for less",
    )


def _families(how: How, sizes: Sizes) -> Iterator[Callable[[float], Schedule]]:
    """Schedules that depend on one number between 0, which removes nothing, and 1."""
    if how.method == "tome":
        for slope in (0.0, 1.0):  # alike in all blocks, or fewer in each than in the one before it
            yield lambda part, slope=slope: tuple(schedule.by_pairs(sizes, _falling(part * sizes.tokens / 2, slope, sizes.blocks)))  # type: ignore[misc]
    elif how.method == "ia-red2":
        for spread in (0.0, 0.2):
            layers = schedule.spread(sizes.blocks, (0, 1 / 3, 2 / 3))
            yield lambda part, layers=layers, spread=spread: tuple(  # type: ignore[misc]
                schedule.of_all(sizes, layers, [max(1 - part - spread * k * min(4 * part, 1), 0) for k in range(len(layers))])
            )
    else:
        for parts in ((1 / 4, 1 / 2, 3 / 4), (1 / 6, 1 / 3, 1 / 2), (1 / 4, 1 / 2), (1 / 3, 2 / 3), (1 / 4,), (1 / 2,)):
            layers = schedule.spread(sizes.blocks, parts)
            yield lambda part, layers=layers: tuple(schedule.by_ratio(sizes, layers, [1 - part] * len(layers), how.fuse))  # type: ignore[misc]


def _falling(mean: float, slope: float, blocks: int) -> list[int]:
    """Numbers of pairs that fall from `(1 + slope) · mean` to `(1 − slope) · mean` (Bolya et al. 2023, appendix D)."""
    step = 2 * slope * mean / max(blocks - 1, 1)
    return [int((1 + slope) * mean - step * block) for block in range(blocks)]


def _within(problem: Problem, family: Callable[[float], Schedule]) -> Schedule | None:
    """The schedule of a family that removes the least and meets the budget; None: none does."""
    low, high = 0.0, 1.0
    found: Schedule | None = None
    for _ in range(20):
        middle = (low + high) / 2
        steps = family(middle)
        valid = all(step.targets > 0 for step in steps)
        if not valid or problem.macs(steps) <= problem.budget:
            found, high = (steps if valid else found), middle
        else:
            low = middle
    return found


def _solve_counts(problem: Problem) -> Schedule:
    """Counts for each block: damages of single blocks are measured and taken to add up; then neighbours are tried."""
    sizes = problem.sizes
    unit = max(sizes.patches // _UNITS, 1)
    blocks = range(1, sizes.blocks - 1)
    tables = {block: _damages(problem, block, unit) for block in blocks}
    removed = _least(problem, tables, unit)
    if removed is None:
        raise _out_of_reach(problem)
    best = _steps(removed, sizes, unit)
    least = problem.measure(best)
    for first, second in itertools.pairwise(blocks):
        for source, target in ((first, second), (second, first)):
            moved = dict(removed)
            if moved[source] == 0:
                continue
            moved[source], moved[target] = moved[source] - 1, moved[target] + 1
            steps = _steps(moved, sizes, unit)
            if problem.macs(steps) <= problem.budget and (damage := problem.measure(steps)) < least:
                removed, best, least = moved, steps, damage
    return best


def _damages(problem: Problem, block: int, unit: int) -> np.ndarray:
    """Damage of removing 0, 1, 2, … units in one block alone, interpolated between those that are measured."""
    tried = [units for units in _TRIED if units * unit < problem.sizes.patches]
    measured = [problem.measure(_steps({block: units}, problem.sizes, unit)) for units in tried]
    most = (problem.sizes.patches - 1) // unit
    wanted = np.arange(most + 1)
    beyond = wanted > tried[-1]
    values = np.interp(wanted, [0, *tried], [0.0, *measured])
    values[beyond] = measured[-1] * (wanted[beyond] / tried[-1]) ** 2
    return values


def _least(problem: Problem, tables: dict[int, np.ndarray], unit: int) -> dict[int, int] | None:
    """Units to remove in each block, of least damage in all within the budget: a price on MACs is bisected, each price solved exactly."""
    low, high = 0.0, 1.0
    found = None
    while found is None and high < 1e18:
        found = _at_price(problem, tables, unit, high)
        high *= 8 if found is None else 1
    if found is None:
        return None
    for _ in range(30):
        middle = (low + high) / 2
        better = _at_price(problem, tables, unit, middle)
        if better is None:
            low = middle
        else:
            found, high = better, middle
    return found


def _at_price(problem: Problem, tables: dict[int, np.ndarray], unit: int, price: float) -> dict[int, int] | None:
    """The removals that make damage + price · MACs least; None where they do not meet the budget."""
    sizes, cost = problem.sizes, problem.cost
    most = (sizes.patches - 1) // unit
    share = (sizes.tokens - unit * np.arange(most + 1)) / cost.tokens
    whole = cost.macs([sizes.tokens] * len(cost.linear))
    value, choices = np.full(most + 1, np.inf), []
    value[0] = 0.0
    for block in range(sizes.blocks):
        table = tables.get(block, np.zeros(1))
        following, chosen = np.full(most + 1, np.inf), np.zeros(most + 1, int)
        for units, damage in enumerate(table):
            moved = np.concatenate([np.full(units, np.inf), value[: most + 1 - units]]) + damage
            better = moved < following
            following[better], chosen[better] = moved[better], units
        part = min(block + 1, len(cost.linear) - 1)
        value = following + price * (cost.linear[part] * share + cost.quadratic[part] * share**2) / whole
        choices.append(chosen)
    state = int(value.argmin())
    removed = {}
    for block in reversed(range(sizes.blocks)):
        removed[block] = int(choices[block][state])
        state -= removed[block]
    return removed if problem.macs(_steps(removed, sizes, unit)) <= problem.budget else None


def _steps(removed: dict[int, int], sizes: Sizes, unit: int) -> Schedule:
    left, steps = sizes.patches, []
    for block, units in sorted(removed.items()):
        if units:
            targets = left - units * unit
            steps.append(Step(block, False, targets + round(_MERGED * units * unit), targets))
            left = targets
    return tuple(steps)
