"""Decides which values of a linear region are computed afterwards, each as one product, by what that costs.

Two choices are made. Within a region every inner value that a product reads may stay as it is (a cut), so that a low-rank pair stays a
pair. And a region is taken as a whole only where that saves at least as much as what its operands would save each on its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine import read_affine
from edgekit.passes.reparameterize.token_form import Form, Region, form_of, is_product, operands, region_of

_MOST_CUTS = 6
"""All sets of so many cuts are tried (64 sets); of more, one at a time."""


@dataclass(frozen=True, order=True)
class Cost:
    """What nodes cost, or with negative numbers save; compared in this order.

    Attributes:
        macs: Multiply-accumulates.
        elements: Elements of matrices.
        moved: Elements that are written.
        nodes: Number of nodes.
    """

    macs: int = 0
    elements: int = 0
    moved: int = 0
    nodes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.macs + other.macs, self.elements + other.elements, self.moved + other.moved, self.nodes + other.nodes)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.macs - other.macs, self.elements - other.elements, self.moved - other.moved, self.nodes - other.nodes)


@dataclass(frozen=True)
class Plan:
    """Which values of a region are computed afterwards, each as one product.

    Attributes:
        region: What is replaced.
        cuts: The inner values that stay.
        patterns: Per value that is computed its form as a pattern.
        cost: What that costs.
    """

    region: Region
    cuts: tuple[ir.Value, ...]
    patterns: dict[ir.Value, Form]
    cost: Cost

    @property
    def change(self) -> Cost:
        """What the plan costs more than what is there."""
        return self.cost - cost_now(self.region)

    @property
    def is_gain(self) -> bool:
        """Neither multiply-accumulates nor matrices rise, and one of them falls, or less is moved by no more nodes.

        A concatenation that was not there before copies its operands; to save nothing else, it must halve what is moved.
        """
        change = self.change
        if change.macs > 0 or change.elements > 0:
            return False
        if change.macs < 0 or change.elements < 0:
            return True
        joins = sum(len(form.dense()) > 1 for form in self.patterns.values())
        if joins > sum(node.op_type == "Concat" for node in self.region.nodes) and 2 * self.cost.moved > self.region.moved:
            return False
        return change.moved < 0 and change.nodes <= 0


class Savings:
    """What the best rewriting behind each value of a graph would change, as the graph is now.

    Args:
        nodes: The nodes of the graph, producers before consumers.

    Attributes:
        plans: The plan for each value alone.
    """

    def __init__(self, nodes: Iterable[ir.Node]) -> None:
        self.plans: dict[ir.Value, Plan | None] = {}
        self._best: dict[ir.Value, Cost] = {}
        for node in nodes:
            for value in node.outputs:
                plan = self.plans[value] = best_plan((value,)) if len(node.outputs) == 1 else None
                own = plan.change if plan is not None and plan.is_gain else Cost()
                self._best[value] = min(own, self.of_operands(value, plan))

    def of_operands(self, value: ir.Value, plan: Plan | None) -> Cost:
        """What the operands of `value` that the plan would replace would change each on its own; of all where there is no plan."""
        inner = operands(value) if plan is None else [x for x in operands(value) if x.producer() in plan.region.nodes]
        return sum((self._best.get(x, Cost()) for x in inner), Cost())


def best_plan(roots: Sequence[ir.Value]) -> Plan | None:
    """The plan for `roots` that changes the cost most for the better, which may still be for the worse; None where nothing is to merge.

    What joins the region without a product (a scaled residual) is tried as a part of it and as a value that stays.
    """
    region = region_of(roots)
    if region is None or not _is_structure(region):
        return None
    regions = [region]
    if idle := region.idle:
        smaller = region_of(roots, ends=idle)
        regions += [smaller] if smaller is not None and _is_structure(smaller) else []
    plans = [plan for part in regions for cuts in _cut_sets(part) if (plan := plan_with(part, cuts)) is not None]
    return min(plans, key=lambda plan: plan.change, default=None)


def _is_structure(region: Region) -> bool:
    """More than one product with scalings around it: there is another product, a sum, or a selection of columns."""
    joins = [node for node in region.nodes if not is_product(node) and read_affine(node) is None]
    return len(region.products) > 1 or (len(region.products) == 1 and bool(joins))


def _cut_sets(region: Region) -> Iterable[tuple[ir.Value, ...]]:
    sizes = range(len(region.inner) + 1) if len(region.inner) <= _MOST_CUTS else range(2)
    return itertools.chain.from_iterable(itertools.combinations(region.inner, size) for size in sizes)


def plan_with(region: Region, cuts: Sequence[ir.Value]) -> Plan | None:
    """The plan with these cuts; None when one of them is not needed, or nothing would be left to compute a value from."""
    patterns: dict[ir.Value, Form] = {}
    waiting = list(region.roots)
    while waiting:
        value = waiting.pop()
        if value not in patterns:
            patterns[value] = form_of(value, region, cuts, np.bool_)
            waiting += [source for source in patterns[value].terms if source in cuts]
    if any(cut not in patterns for cut in cuts) or any(_is_empty(value, form) for value, form in patterns.items()):
        return None
    return Plan(region, tuple(cuts), patterns, sum((_cost(value, form) for value, form in patterns.items()), Cost()))


def _is_empty(value: ir.Value, form: Form) -> bool:
    """True for a form that no node would compute: a constant, or a source itself where it would have to bear a graph output's name."""
    return not form.dense() and (not form.plain() or (len(form.plain()) == 1 and value.is_graph_output() and not form.bias.any()))


def _cost(value: ir.Value, form: Form) -> Cost:
    """What one product for `form`, with its concatenation, slices, bias and additions, costs."""
    *leading, channels = static_shape(value) or (0,)
    rows, dense = math.prod(leading), form.dense()
    widths = [form.rows(source)[1] - form.rows(source)[0] for source in dense]
    sliced = [width for source, width in zip(dense, widths, strict=True) if width < form.terms[source].shape[0]]
    copied = sum(sliced) + (sum(widths) if len(dense) > 1 else 0)
    sums = int(form.bias.any()) + len(form.plain()) + bool(dense) - 1
    nodes = len(sliced) + (len(dense) > 1) + bool(dense) + sums
    elements = sum(widths) * channels
    return Cost(rows * elements, elements, rows * (copied + (bool(dense) + sums) * channels), nodes)


def cost_now(region: Region) -> Cost:
    """What the nodes of `region` cost."""
    return Cost(region.macs, region.elements, region.moved, len(region.nodes))
