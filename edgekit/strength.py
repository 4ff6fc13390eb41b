"""The strongest setting of a pass that stays within the accuracy budget."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgekit import specs
from edgekit.apply import apply_pass
from edgekit.contracts import Context, Pass
from edgekit.errors import BudgetError, UsageError
from edgekit.evaluate import Evaluator, Outcome
from edgekit.graph.cost import cost
from edgekit.graph.shapes import infer_shapes
from edgekit.metrics import MetricDifference, difference
from edgekit.verify import compare

if TYPE_CHECKING:
    from edgekit.pipeline import Budget


@dataclass(frozen=True)
class Trial:
    """One setting of a pass, tried.

    Attributes:
        spec: The setting as a specification string.
        macs: MACs of the graph after it; None where it cannot be met.
        metric: Accuracy on the selection data beside the uncompressed model's; None without labels.
        agreement: Share of calibration samples with the uncompressed model's prediction; None where there are no class scores.
        within: Whether it is within the budget.
    """

    spec: str
    macs: int | None
    metric: MetricDifference | None = None
    agreement: float | None = None
    within: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {**dataclasses.asdict(self), "metric": None if self.metric is None else self.metric.to_dict()}

    def __str__(self) -> str:
        """A line of the table of what was tried."""
        if self.macs is None:
            return f"{self.spec}: cannot be met"
        if self.metric is not None:
            low, high = (100 * end for end in self.metric.ci95)
            cost_text = f"{100 * self.metric.difference:+.2f} points [{low:+.2f}, {high:+.2f}] on {self.metric.samples} samples"
        else:
            cost_text = f"{100 * (self.agreement or 0.0):.1f} % agreement"
        return f"{self.spec}: {self.macs / 1e6:.4g} M MACs, {cost_text}"


def strongest(
    item: Pass, model: ir.Model, context: Context, evaluator: Evaluator, base: Outcome, budget: Budget
) -> tuple[Pass, list[Trial]]:
    """Tries the settings of a pass on copies of `model`, the strongest first; returns the first within the budget, and all that were tried.

    Raises:
        BudgetError: None is; the message lists them.
    """
    settings = item.settings()
    if len(settings) == 1:
        return item, []
    trials = []
    for setting in settings:
        spec = specs.format_spec(setting.name, setting)
        trial = model.clone()
        there = dataclasses.replace(context, generator=copy.deepcopy(context.generator))
        try:
            rewrites = apply_pass(setting, spec, trial, there)
        except UsageError:
            trials.append(Trial(spec, None))
            continue
        if not rewrites:
            return setting, trials  # the pipeline applies it again, and says that nothing matched
        infer_shapes(trial)
        outcome = evaluator.run(trial, f"trial of {spec}")
        metric = difference(base.selection, outcome.selection) if base.selection is not None and outcome.selection is not None else None
        agreement = compare(base.outputs, outcome.outputs).top1_agreement
        within = budget.exceeded(base, outcome) is None
        trials.append(Trial(spec, cost(trial).macs, metric, agreement, within))
        if within:
            return setting, trials
    raise BudgetError(
        f"no setting of pass '{item.name}' stays within the accuracy budget of {budget.max_drop:g} points:\n"
        + "\n".join(f"    {t}" for t in trials),
        fix="raise --max-drop, win accuracy back by --recover, or choose another method",
    )


def doubts(trials: Sequence[Trial], max_drop: float) -> list[str]:
    """What must be said of the choice: too few samples to tell whether the budget was kept."""
    chosen = trials[-1] if trials and trials[-1].within else None
    if chosen is None or chosen.metric is None or 100 * chosen.metric.ci95[0] >= -max_drop:
        return []
    low, high = (100 * end for end in chosen.metric.ci95)
    return [
        f"{chosen.metric.samples} selection samples are too few to be sure that '{chosen.spec}' costs at most {max_drop:g} points: the"
        f" 95 % interval is [{low:+.2f}, {high:+.2f}]"
    ]
