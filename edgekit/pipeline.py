"""Running passes in order: every EXACT pass is held to its promise, every APPROXIMATE one is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgekit import specs
from edgekit.adversarial import findings
from edgekit.apply import apply_pass
from edgekit.contracts import Context, Effect, Pass, Refusal
from edgekit.errors import LoweringError, ParityError, PassError, UnsupportedOpError, UsageError
from edgekit.evaluate import Evaluator, Outcome
from edgekit.graph.census import WholeNode, census, losses, whole_nodes
from edgekit.graph.cost import Cost, cost
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.precision import graph_precision
from edgekit.graph.shapes import infer_shapes
from edgekit.metrics import MetricDifference, difference
from edgekit.parity_table import ParityTable
from edgekit.progress import Reporter
from edgekit.strength import Trial, doubts, strongest
from edgekit.verify import Parity, assert_close, compare


@dataclass(frozen=True)
class PassResult:
    """What one pass did.

    Attributes:
        spec: The pass as a specification string.
        effect: What it promises.
        rewrites: At how many places it rewrote; 0: it found no match.
        rules: Of a pass that has several rules, how many places each rewrote.
        trials: The settings that were tried for an accuracy budget.
        seconds: Time of the rewriting itself.
        parity: Its outputs against the graph before it; None where it changed nothing.
        cost: Of the graph after it.
        metric: Accuracy after it and the difference to the uncompressed model; None without labels.
        census_before: Whole operators of the graph before it, by name.
        census_after: The same after it.
        refusals: Places that nearly matched.
        undone: Why it was taken back, or None.
        warnings: What it did on adversarial inputs beyond rounding.
    """

    spec: str
    effect: Effect
    rewrites: int
    seconds: float
    parity: Parity | None
    cost: Cost
    metric: MetricDifference | None
    census_before: dict[str, int] = field(default_factory=dict)
    census_after: dict[str, int] = field(default_factory=dict)
    refusals: tuple[Refusal, ...] = ()
    undone: str | None = None
    warnings: tuple[str, ...] = ()
    rules: dict[str, int] = field(default_factory=dict)
    trials: Sequence[Trial] = ()


@dataclass
class WatchedContext(Context):
    """A context that knows which of the places to leave alone came up.

    Attributes:
        met: Those that did.
    """

    met: set[str] = field(default_factory=set)

    def skips(self, where: str) -> bool:
        """As `Context.skips`."""
        if where in self.skip:
            self.met.add(where)
        return super().skips(where)


@dataclass(frozen=True)
class Budget:
    """The most that approximate passes may cost together.

    Attributes:
        max_drop: In percentage points of top-1 accuracy on the selection data; without labels, of agreement with the
            uncompressed model on the calibration data.
    """

    max_drop: float

    def require_measure(self, base: Outcome) -> None:
        """Checks that there is something to measure the budget by.

        Raises:
            UsageError: There are neither labels nor class scores.
        """
        if base.selection is None and compare(base.outputs, base.outputs).top1_agreement is None:
            raise UsageError(
                "--max-drop needs something to measure by: labels, or an output of class scores [B, K]",
                fix="give --data with labels, or leave --max-drop out and read the parity of each pass",
            )

    def exceeded(self, base: Outcome, now: Outcome) -> str | None:
        """Says by how much the budget is exceeded, or None."""
        if base.selection is not None and now.selection is not None:
            drop = 100.0 * float(base.selection.mean() - now.selection.mean())
            what = f"{drop:.2f} points of accuracy on {len(base.selection)} selection samples"
        else:
            agreement = compare(base.outputs, now.outputs).top1_agreement
            if agreement is None:
                return None
            drop = 100.0 * (1.0 - agreement)
            what = f"{drop:.2f} points of agreement with the uncompressed model"
        return f"it costs {what}, the budget is {self.max_drop:g}" if drop > self.max_drop else None


def run_passes(
    model: ir.Model,
    passes: Sequence[Pass],
    context: Context,
    evaluator: Evaluator,
    base: Outcome,
    reporter: Reporter,
    budget: Budget | None = None,
    table: ParityTable | None = None,
    skip: Mapping[str, Sequence[str]] | None = None,
    keep: Callable[[ir.Model], None] | None = None,
) -> tuple[ir.Model, Outcome, list[PassResult]]:
    """Applies `passes` in order.

    Args:
        model: The canonical graph; it is changed in place.
        passes: The passes.
        context: What passes may use.
        evaluator: Runs the graph on the data.
        base: The uncompressed model's outcome.
        reporter: Told of each pass.
        budget: The accuracy budget, if there is one.
        table: Gets a row a pass that is kept.
        skip: Per name of a pass, the places that it leaves alone; one that does not come up is warned of.
        keep: Is given a copy of the graph before the first approximate pass. What the passes cost is to be won back then, so that none is
            undone for it.

    Returns:
        The rewritten graph, its outcome, and what each pass did.

    Raises:
        ParityError: An EXACT pass changed the numbers, or made them NaN or infinite on an adversarial input; it is named.
        PassError: A pass failed, or an EXACT one broke a whole operator that it does not declare to remove.
    """
    table = ParityTable(evaluator.adversarial) if table is None else table
    before, wholes = base, whole_nodes(model)
    results: list[PassResult] = []
    given = context
    no_trials: list[Trial] = []
    for wanted in passes:
        with reporter.stage(f"pass {specs.format_spec(wanted.name, wanted)}"):
            item, trials = wanted, no_trials
            if budget is not None and wanted.effect is Effect.APPROXIMATE:
                item, trials = strongest(wanted, model, given, evaluator, base, budget)
            spec = specs.format_spec(item.name, item)
            if keep is not None and item.effect is Effect.APPROXIMATE and all(result.effect is Effect.EXACT for result in results):
                keep(model.clone())
            kept = model.clone() if budget is not None and item.effect is Effect.APPROXIMATE else None
            left = given.skip | frozenset((skip or {}).get(item.name, ()))
            context = WatchedContext(given.calibration, given.target, given.generator, given.has_data, left)
            state = fingerprint(model)
            start = time.perf_counter()
            rewrites = apply_pass(item, spec, model, context)
            seconds = time.perf_counter() - start
            parity, undone, after, found = None, None, before, wholes
            warnings: tuple[str, ...] = ()
            if not rewrites and fingerprint(model) != state:
                raise PassError(
                    f"pass '{spec}' changed the graph and says that it rewrote nothing",
                    where=f"{type(item).__module__}.{type(item).__qualname__}",
                    fix="let its `apply` return the number of places that it rewrote",
                )
            if rewrites:
                found = whole_nodes(model)
                _hold_whole(item, spec, wholes, found)
                infer_shapes(model)
                after = _run(evaluator, model, spec)
                precision = graph_precision(model)
                parity = _judge(item, spec, before, after, precision)
                undone = budget.exceeded(base, after) if budget is not None and keep is None else None
                if lost := _lost_values(before, after):
                    if kept is None:
                        raise PassError(f"pass '{spec}' {lost}", fix="keep the nodes that overflow in float32, or leave the pass out")
                    undone = f"it {lost}"
                if undone is not None and kept is not None:
                    model, after, found = kept, before, wholes
                else:
                    warnings = _judge_adversarial(item, spec, evaluator.adversarial, before, after, precision)
            if undone is None:
                table.add(spec, after, parity)
            metric = difference(base.test, after.test) if base.test is not None and after.test is not None else None
            counts = census(wholes), census(found)
            refusals = tuple(context.refusals)
            warnings += tuple(
                f"pass '{spec}' met no place '{place}', which it was to leave alone" for place in sorted(context.skip - context.met)
            )
            rules = dict(context.rules)
            warnings += tuple(doubts(trials, budget.max_drop)) if budget is not None else ()
            results.append(
                PassResult(
                    spec, item.effect, rewrites, seconds, parity, cost(model), metric, *counts, refusals, undone, warnings, rules, trials
                )
            )
            before, wholes = after, found
    return model, before, results


def _run(evaluator: Evaluator, model: ir.Model, spec: str) -> Outcome:
    try:
        return evaluator.run(model, f"pass {spec}")
    except (LoweringError, UnsupportedOpError) as error:
        raise PassError(
            f"pass '{spec}' left a graph that does not run: {error.what}", where=error.where, fix="leave the pass out, or correct it"
        ) from error


def _hold_whole(item: Pass, spec: str, before: list[WholeNode], after: list[WholeNode]) -> None:
    """Holds an EXACT pass to the whole operators that it found.

    Raises:
        PassError: It lost one that it does not declare to remove.
    """
    if item.effect is not Effect.EXACT or not (lost := losses(before, after, item.removes)):
        return
    gone = [f"{loss.operator} '{name}'" for loss in lost for name in loss.gone]
    raise PassError(
        f"pass '{spec}' broke whole operators into parts: {', '.join(map(str, lost))}",
        where=", ".join(gone[:3]) + (f" and {len(gone) - 3} more" if len(gone) > 3 else "") or None,
        fix="leave the pass out; where it removes the computation itself, its class must name the operator in `removes`",
    )


def _judge_adversarial(item: Pass, spec: str, kinds: Sequence[str], before: Outcome, after: Outcome, precision: str) -> tuple[str, ...]:
    """What a pass did on adversarial inputs, for the report; of an APPROXIMATE one only lost values are worth a word.

    Raises:
        ParityError: An EXACT pass made finite values NaN or infinite.
    """
    if before.adversarial is None:
        return ()
    stage = f"pass '{spec}'"
    if after.adversarial is None:
        return (f"the graph does not run on adversarial inputs after {stage}",)
    found = findings(kinds, before.adversarial, after.adversarial, stage=stage, precision=precision)
    if item.effect is Effect.APPROXIMATE:
        return tuple(finding.text for finding in found if finding.lost)
    for finding in found:
        if finding.lost:
            raise ParityError(
                finding.text,
                where=f"adversarial input '{finding.kind}'",
                fix="leave the pass out, or report it with the model: an exact pass must not narrow the range of its graph",
            )
    return tuple(finding.text for finding in found)


def _lost_values(before: Outcome, after: Outcome) -> str | None:
    """Says where outputs that were finite became NaN or infinite, or None."""
    for earlier, later in zip(before.outputs, after.outputs, strict=True):
        for name, array in later.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all() and np.isfinite(earlier[name]).all():
                return f"gives NaN or infinity in output '{name}', which was finite before it"
    return None


def _judge(item: Pass, spec: str, before: Outcome, after: Outcome, precision: str) -> Parity:
    if item.effect is Effect.APPROXIMATE:
        return compare(before.outputs, after.outputs)
    return assert_close(before.outputs, after.outputs, stage=f"pass '{spec}'", precision=precision)
