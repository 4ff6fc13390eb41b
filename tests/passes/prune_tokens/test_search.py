"""Schedules for a budget of MACs: the budget is met as the graph counts it, and damage is what a formula in float64 says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgekit.contracts import Context
from edgekit.errors import DataError, UsageError
from edgekit.graph.cost import cost
from edgekit.passes.prune_tokens.blocks import find_blocks
from edgekit.passes.prune_tokens.damage import Damage
from edgekit.passes.prune_tokens.prune_tokens import PruneTokens
from edgekit.passes.prune_tokens.reduce import How
from edgekit.passes.prune_tokens.schedule import Sizes, Step, by_ratio
from edgekit.passes.prune_tokens.search import Problem, _at_price, _steps
from edgekit.passes.prune_tokens.token_axis import follow
from edgekit.passes.prune_tokens.token_cost import token_cost
from tests.passes.prune_tokens.reference import Masked, Network
from tests.passes.prune_tokens.vit_graphs import Vit, graph, random_feeds, random_weights

VIT = Vit(depth=6, patches=30, batch=4, hidden=4)


def log_softmax(scores):
    shifted = scores - scores.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("share", [0.85, 0.6])
@pytest.mark.parametrize("method", ["evit", "tome", "attention-received", "ia-red2", "diffrate", "random", "auto"])
def test_a_budget_is_met(method, share, run):
    model, feeds = graph(VIT), [random_feeds(VIT, seed) for seed in (1, 2)]
    whole = cost(model).macs
    context = Context(feeds, generator=np.random.default_rng(0), has_data=True)
    assert PruneTokens(method=method, target_macs=share).apply(model, context) > 0
    assert 0.8 * share * whole <= cost(model).macs <= share * whole
    assert np.isfinite(run(model, feeds[0])[0]).all()


def test_a_budget_that_cannot_be_met():
    model = graph(VIT)
    with pytest.raises(UsageError, match="cannot bring the model to 1% of its MACs"):
        PruneTokens(method="evit", target_macs=0.01).apply(model, Context([random_feeds(VIT)]))


def test_calibration_that_is_missing_or_not_finite():
    broken = random_feeds(VIT)
    broken["x"][0, 0, 0] = np.nan
    for feeds, message in (([], "there are none"), ([broken], "NaN or infinity")):
        with pytest.raises(DataError, match=message):
            PruneTokens(method="evit", target_macs=0.5).apply(graph(VIT), Context(feeds))


def test_damage_is_the_divergence_of_class_scores():
    """KL(whole ‖ pruned) in nats, mean over samples and batches, of the masked reference in float64."""
    weights, feeds = random_weights(VIT), [random_feeds(VIT, seed) for seed in (1, 2, 3)]
    network = Network(VIT, weights)
    steps = by_ratio(Sizes(6, 31, 1), (1, 3), (0.5, 0.5), False)
    expected = []
    for feed in feeds:
        plain = log_softmax(network.logits(feed))
        pruned = log_softmax(network.logits(feed, Masked("evit", 1, {step.block: step.keep for step in steps})))
        expected.append((np.exp(plain) * (plain - pruned)).sum(-1).mean())
    damage = Damage(graph(VIT, weights), feeds)
    assert damage.of(steps, How("evit", 1)) == pytest.approx(np.mean(expected), rel=1e-3)
    assert damage.of([], How("evit", 1)) == 0


def test_counts_of_least_damage_for_a_price():
    """The dynamic programme against every possibility, of four blocks that may remove up to five units each."""
    rng = np.random.default_rng(0)
    vit = Vit(depth=6, patches=12)
    model = graph(vit)
    blocks = find_blocks(model.graph)
    spent = token_cost(model, blocks, follow(model.graph, blocks[0].stream))
    sizes, unit = Sizes(6, 13, 1), 2
    problem = Problem(sizes, How("diffrate", 1), spent, np.inf, None)
    for price in (0.1, 1.0, 10.0):
        tables = {block: np.cumsum(np.concatenate([[0.0], rng.random(5)])) for block in range(1, 5)}
        found = _at_price(problem, tables, unit, price)

        def objective(removed, tables=tables, price=price):
            left, counts = 13, [13]
            for block in range(6):
                left -= unit * removed.get(block, 0)
                counts.append(left)
            whole = spent.macs([13] * 7)
            return sum(tables[block][removed[block]] for block in tables) + price * spent.macs(counts) / whole

        every = (dict(zip(range(1, 5), choice, strict=True)) for choice in itertools.product(range(6), repeat=4) if sum(choice) <= 5)
        best = min(objective(removed) for removed in every)
        assert objective({block: found[block] for block in range(1, 5)}) == pytest.approx(best, rel=1e-9)


def test_steps_of_removals():
    """Two units of two tokens in block 1, one in block 3: three quarters of what goes is merged."""
    assert _steps({1: 2, 2: 0, 3: 1}, Sizes(6, 13, 1), 2) == (Step(1, False, 11, 8), Step(3, False, 8, 6))
