"""What may be done about a culprit, as data, and whether it helps: each remedy is tried on the whole chain."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgekit import specs
from edgekit.bisection.judge import Judge
from edgekit.bisection.stages import Chain
from edgekit.contracts import Arrays, Effect, Pass, Target
from edgekit.errors import UsageError


@dataclass(frozen=True)
class Remedy:
    """A change of the compile.

    Attributes:
        text: What it is, in a few words.
        options: The options of `edgekit compile` that bring it about.
        skip: Further places to leave alone, by pass.
        passes: The passes in place of those that ran; None: the same.
        target: The target in place of the one that was lowered to; None: the same.
        calibration: Number of calibration inputs; None: the same.
    """

    text: str
    options: str
    skip: dict[str, tuple[str, ...]] = field(default_factory=dict)
    passes: tuple[Pass, ...] | None = None
    target: Target | None = None
    calibration: int | None = None


@dataclass(frozen=True)
class Tried:
    """A remedy and what came of it.

    Attributes:
        remedy: The remedy.
        works: Whether the last stage is good with it.
        why: Why not.
    """

    remedy: Remedy
    works: bool
    why: str = ""


def candidates(chain: Chain, position: int, places: Sequence[str], complete: bool, nodes: Sequence[str], calibration: int) -> list[Remedy]:
    """The remedies that come into question, the one that gives up least first.

    Args:
        chain: The stages.
        position: Of the bad one.
        places: The culprits within its pass.
        complete: Whether its graph is good without just these.
        nodes: Names of the nodes at fault.
        calibration: How many calibration inputs there were.
    """
    if chain.is_lowered(position):
        return _for_target(chain)
    if position == 1:
        return []
    index, item = position - 2, chain.passes[position - 2]
    found = []
    kept = tuple(places) or tuple(nodes)
    if kept and (variant := _keeping(item, kept)) is not None:
        passes = tuple(variant if place == index else other for place, other in enumerate(chain.passes))
        count = "this node" if len(kept) == 1 else f"these {len(kept)} nodes"
        found.append(Remedy(f"keep {count} in float32", _pass_options(passes), passes=passes))
    if places and complete:
        options = " ".join(f"--skip {shlex.quote(f'{item.name}:{place}')}" for place in places)
        count = "this rewrite" if len(places) == 1 else f"these {len(places)} rewrites"
        found.append(Remedy(f"skip {count}", options, skip={item.name: tuple(places)}))
    if item.effect is Effect.APPROXIMATE:
        more = 4 * calibration
        found.append(Remedy(f"calibrate on {more} inputs", f"--calibration {more}", calibration=more))
    rest = tuple(other for place, other in enumerate(chain.passes) if place != index)
    found.append(Remedy(f"leave {item.name} out", _pass_options(rest) or "--no-passes", passes=rest))
    return found


def _for_target(chain: Chain) -> list[Remedy]:
    target = chain.target
    assert target is not None
    if target.precision == "fp32":
        return []
    try:
        full = dataclasses.replace(target, precision="fp32")
    except UsageError:
        return []
    return [Remedy("execute in float32", "--precision fp32", target=full)]


def _keeping(item: Pass, names: tuple[str, ...]) -> Pass | None:
    """The pass with `names` among the nodes that its option `keep` leaves as they are; None where it has no such option."""
    if not any(option.name == "keep" and "str" in str(option.type) for option in dataclasses.fields(item)):  # type: ignore[arg-type]
        return None
    kept = dict.fromkeys((*getattr(item, "keep"), *names))  # noqa: B009 (an option of this pass alone)
    return dataclasses.replace(item, keep=tuple(kept))  # type: ignore[type-var]


def _pass_options(passes: Sequence[Pass]) -> str:
    return " ".join(f"--pass {shlex.quote(specs.format_spec(item.name, item))}" for item in passes)


def try_remedy(remedy: Remedy, chain: Chain, judge: Judge, recalibrate: Callable[[int], list[Arrays]] | None) -> Tried:
    """Runs the chain to its end with a remedy.

    Args:
        remedy: The remedy.
        chain: The stages; it is not changed.
        judge: What counts as a difference.
        recalibrate: Gives that many calibration batches; None: there are no more.
    """
    calibration = chain.calibration
    if remedy.calibration is not None:
        if recalibrate is None:
            return Tried(remedy, False, "the data was handed over in memory and cannot be read again")
        calibration = recalibrate(remedy.calibration)
        if len(calibration) <= len(chain.calibration):
            return Tried(remedy, False, "there is no more data")
    skip = {name: tuple(places) for name, places in chain.skip.items()}
    for name, places in remedy.skip.items():
        skip[name] = (*skip.get(name, ()), *places)
    variant = Chain(
        original=chain.original,
        reference=chain.reference,
        outcome=chain.outcome,
        passes=chain.passes if remedy.passes is None else remedy.passes,
        target=remedy.target or chain.target,
        evaluator=chain.evaluator,
        worker=chain.worker,
        folder=chain.folder,
        calibration=calibration,
        seed=chain.seed,
        skip=skip,
        has_data=chain.has_data,
    )
    # The graph that is lowered too: a target that computes in more digits would hide that a remedy does not help.
    for position in dict.fromkeys((min(variant.last, len(variant.steps)), variant.last)):
        result = variant.result(position)
        if result.outputs is None:
            return Tried(remedy, False, result.failure)
        verdict = judge.outputs(variant.reference, result.outputs, result.precision)
        if verdict.bad:
            return Tried(remedy, False, verdict.why)
    return Tried(remedy, True)
