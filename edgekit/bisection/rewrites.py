"""Level 2: within one pass, the place whose rewriting made its graph bad."""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.bisection.judge import Judge
from edgekit.bisection.search import Search
from edgekit.bisection.stages import Chain, Rewritten

MOST_CULPRITS = 4
"""Places that are looked for before giving up: each is one search."""


@dataclass(frozen=True)
class RewritesFound:
    """What level 2 found.

    Attributes:
        places: The culprits, in the order in which the pass meets them; empty where there is no telling.
        count: At how many places the pass rewrites.
        evaluations: Graphs run for each culprit, with its confirmation.
        bound: The most that one culprit may take.
        complete: Whether the graph is good with just these left alone.
        why_not: Why there is no telling.
        good: The graph with the rewrites before the first culprit.
        bad: The same with the first culprit.
    """

    places: tuple[str, ...]
    count: int
    evaluations: tuple[int, ...]
    bound: int
    complete: bool
    why_not: str
    good: Rewritten
    bad: Rewritten


def find_rewrites(chain: Chain, position: int, judge: Judge, limit: int = MOST_CULPRITS) -> RewritesFound:
    """Finds the places that make the stage at `position`, which is bad while the one before it is good.

    Where leaving the first culprit alone does not make the graph good, the search goes on among the places after it.
    """
    before, after = chain.rewritten(position - 1), chain.rewritten(position)
    places = after.places
    if not places:
        why = "the pass does not say at which places it rewrites"
        return RewritesFound((), 0, (), 0, False, why, before, after)
    known: dict[frozenset[str], bool] = {frozenset(): True}
    run = 0

    def is_bad(skip: frozenset[str]) -> bool:
        nonlocal run
        if skip not in known:
            rewritten = chain.apply(position, skip)
            if not rewritten.changed:  # nothing is left of the pass: it is the graph before it
                known[skip] = False
            else:
                run += 1
                known[skip] = chain.is_bad(chain.run(rewritten, chain.names[position]), judge)
        return known[skip]

    culprits: list[str] = []
    evaluations: list[int] = []
    pair: tuple[Rewritten, Rewritten] | None = None
    rest = list(places)
    bound = Search(len(places), bool).bound
    complete = False
    while rest and len(culprits) < limit:
        found = frozenset(culprits)
        start = run
        choice = list(rest)

        def bad_with(first: int, found: frozenset[str] = found, choice: list[str] = choice) -> bool:
            return is_bad(found | frozenset(choice[first:]))

        first = Search(len(choice), bad_with).first_bad()
        if first is None:
            complete = True
            break
        if first == 0:
            if not culprits:
                why = "it is bad with every place skipped that it names: the pass does not heed what it is told to leave alone, or fails"
                return RewritesFound((), len(places), (run - start,), bound, False, why, before, after)
            break
        culprit = choice[first - 1]
        culprits.append(culprit)
        if pair is None:
            pair = (
                chain.apply(position, frozenset(choice[first - 1 :])),
                chain.apply(position, frozenset(choice[first:])),
            )
        complete = not is_bad(frozenset(culprits))
        evaluations.append(run - start)
        if complete:
            break
        rest = choice[first:]
    good, bad = pair or (before, after)
    return RewritesFound(tuple(culprits), len(places), tuple(evaluations), bound, complete, "", good, bad)
