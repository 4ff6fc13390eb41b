"""Merging tokens against a float64 reference that goes pair by pair, and against what must hold exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgekit.graph.token_steps import follow_tokens
from edgekit.passes.prune_tokens.merge import most_pairs
from tests.passes.prune_tokens.reference import Merging, Network, PruneAndMerge
from tests.passes.prune_tokens.vit_graphs import Vit, graph, random_feeds, random_weights

VITS = {
    "plain": Vit(),
    "batch": Vit(batch=3),
    "odd": Vit(patches=19, batch=2),
    "distilled": Vit(prefix=2, pool="distilled", batch=3),
    "registers": Vit(prefix=5, batch=2),
    "four at the front": Vit(prefix=4),
    "mean": Vit(prefix=0, pool="mean", batch=3),
    "mean of an odd number": Vit(prefix=0, pool="mean", patches=15),
    "mean with a class token": Vit(pool="mean", batch=3),
    "mean of patches": Vit(prefix=1, pool="mean-patches"),
    "mean of patches, registers": Vit(prefix=5, pool="mean-patches", batch=3),
    "mean of patches, the rest given": Vit(prefix=2, pool="mean-patches", given_prefix=True),
    "class token and mean": Vit(pool="both", batch=2),
    "packed": Vit(packed=True, batch=3),
    "post-norm": Vit(post_norm=True),
}
CLASS_TOKEN = ("plain", "batch", "class token and mean", "odd", "distilled", "registers", "four at the front", "packed", "post-norm")
FORMS = ("top-k", "scatter", "rank")


def named(names):
    return [pytest.param(VITS[name], id=name) for name in names]


def pairs_of(vit, wanted):
    """Pairs by block: at most half of the tokens that may merge, and none in the last block where only the class token is read after it."""
    left, found = vit.tokens, {}
    for block in range(vit.depth - (vit.pool in ("class", "distilled"))):
        even, odd = [sum(index % 2 == parity for index in range(vit.prefix, left)) for parity in (0, 1)]
        found[block] = min(wanted, even, odd)
        left -= found[block]
    return {block: pairs for block, pairs in found.items() if pairs}


def setting(vit, seed=0):
    weights, feeds = random_weights(vit, seed), random_feeds(vit, seed + 1)
    network = Network(vit, weights)
    return graph(vit, weights), feeds, network, network.logits(feeds)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wanted", [3, 99])
@pytest.mark.parametrize("vit", named(VITS))
def test_alike_tokens_are_merged(vit, wanted, form, prune, assert_logits):
    model, feeds, network, plain = setting(vit)
    pruned, _ = prune(model, method="tome", r=wanted, form=form)
    assert_logits(pruned, feeds, network.logits(feeds, Merging(vit.prefix, pairs_of(vit, wanted))), plain)


@pytest.mark.parametrize("vit", named(["batch", "distilled", "mean of patches, registers"]))
def test_attention_that_does_not_count_sizes(vit, prune, assert_logits):
    """Means count them all the same."""
    model, feeds, network, plain = setting(vit)
    pruned, _ = prune(model, method="tome", r=4, proportional=False)
    expected = network.logits(feeds, Merging(vit.prefix, pairs_of(vit, 4), proportional=False))
    assert_logits(pruned, feeds, expected, plain)
    assert np.abs(expected - network.logits(feeds, Merging(vit.prefix, pairs_of(vit, 4)))).max() > 1e-3


def test_another_number_of_pairs_in_each_block(prune, assert_logits):
    vit = Vit(batch=2, patches=21)
    model, feeds, network, plain = setting(vit)
    pruned, _ = prune(model, method="tome", r=(5, 0, 3, 2))
    assert_logits(pruned, feeds, network.logits(feeds, Merging(1, {0: 5, 2: 3})), plain)


def twins(vit, weights, feeds):
    """Makes the patches alike in twos, position included: the first and second, the third and fourth …"""
    first = np.arange(vit.patches) // 2 * 2
    weights["position"][:, vit.prefix :] = weights["position"][:, vit.prefix + first]
    feeds["x"] = feeds["x"][:, first]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", [8, 3, (0, 0, 5, 0)])
@pytest.mark.parametrize("name", ["plain", "batch", "registers", "mean", "mean with a class token", "mean of patches", "packed"])
def test_merging_twins_changes_nothing(name, pairs, form, prune, run):
    """With attention in proportion to size this is exact, also where some pairs of equal likeness merge and others do not."""
    vit = VITS[name]
    weights, feeds = random_weights(vit), random_feeds(vit)
    twins(vit, weights, feeds)
    model = graph(vit, weights)
    pairs = (pairs, 0, 0, 0) if isinstance(pairs, int) else pairs
    pruned, _ = prune(model, method="tome", r=pairs, form=form)
    np.testing.assert_allclose(run(pruned, feeds)[0], run(model, feeds)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_tokens_that_are_all_alike(form, prune, run):
    """Every likeness is the same, so any choice is right as long as no token is lost or taken twice."""
    vit = Vit(prefix=0, pool="mean", batch=2, patches=14)
    weights, feeds = random_weights(vit), random_feeds(vit)
    weights["position"][:] = weights["position"][:, :1]
    feeds["x"][:] = feeds["x"][:, :1]
    model = graph(vit, weights)
    pruned, _ = prune(model, method="tome", r=2, form=form)
    np.testing.assert_allclose(run(pruned, feeds)[0], run(model, feeds)[0], rtol=0, atol=1e-5)
    if form != "rank":
        for step in follow_tokens(pruned, feeds):
            assert sorted(index for group in step.groups for index in group) == list(range(14))


@pytest.mark.parametrize("name", ["batch", "distilled", "mean", "registers"])
def test_every_token_is_in_one_group(name, prune):
    """What the marks in the graph say: groups never overlap, and all tokens are in one, those of the prefix alone at the front."""
    vit = VITS[name]
    model, feeds, _, _ = setting(vit)
    pruned, _ = prune(model, method="tome", r=3)
    for sample in range(vit.batch):
        steps = follow_tokens(pruned, feeds, sample)
        assert [len(step.groups) for step in steps] == [vit.tokens - 3 * k for k in range(len(steps))]
        for step in steps:
            assert sorted(index for group in step.groups for index in group) == list(range(vit.tokens))
            assert step.groups[: vit.prefix] == tuple((index,) for index in range(vit.prefix))


def test_the_most_pairs_of_one_matching():
    """Half of the tokens that may merge: 98 of DeiT's 197, also with a distillation token."""
    assert [most_pairs(197, 1), most_pairs(198, 2), most_pairs(196, 0), most_pairs(201, 5)] == [98, 98, 98, 98]
    assert [most_pairs(3, 1), most_pairs(2, 1), most_pairs(1, 1), most_pairs(1, 0), most_pairs(2, 2)] == [1, 0, 0, 0, 0]


@pytest.mark.parametrize("vit", named(CLASS_TOKEN))
def test_sorted_dropped_and_merged(vit, prune, assert_logits):
    model, feeds, network, plain = setting(vit)
    keep = [vit.tokens - gone for gone in (1, 3, 6, 8)]
    left = [vit.tokens - gone for gone in (3, 5, 8, 10)]
    pruned, _ = prune(model, method="diffrate", prune=tuple(keep), merge=tuple(left))
    reference = PruneAndMerge(vit.prefix, {block: (keep[block], left[block]) for block in range(vit.depth - (vit.pool != "both"))})
    assert_logits(pruned, feeds, network.logits(feeds, reference), plain)


@pytest.mark.parametrize(
    ("keep", "left"), [((17, 12, 9, 9), (17, 12, 9, 9)), ((17, 17, 14, 14), (15, 13, 9, 9)), ((12, 99, 5, 5), (9, 7, 4, 4))]
)
def test_only_dropped_only_merged_and_counts_beyond_what_is_left(keep, left, prune, assert_logits):
    vit = Vit(batch=2)
    model, feeds, network, plain = setting(vit)
    pruned, _ = prune(model, method="diffrate", prune=keep, merge=left)
    counts, before = {}, vit.tokens
    for block in range(3):
        counts[block] = (min(keep[block], before), min(keep[block], left[block], before))
        before = counts[block][1]
    assert_logits(pruned, feeds, network.logits(feeds, PruneAndMerge(1, counts)), plain)


def test_the_groups_of_dropping_and_merging(prune):
    vit = Vit(batch=2)
    model, feeds, _, _ = setting(vit)
    pruned, _ = prune(model, method="diffrate", prune=(14, 11, 8, 8), merge=(12, 9, 6, 6))
    for sample in range(2):
        steps = follow_tokens(pruned, feeds, sample)
        assert [len(step.groups) for step in steps] == [17, 12, 9, 6]
        assert [len(step.dropped) for step in steps][1] == 3
        for step in steps:
            assert sorted([*(index for group in step.groups for index in group), *step.dropped]) == list(range(17))
            assert step.groups[0] == (0,)


def test_dropping_equals_the_class_token_method(prune, run):
    """Without merging and without counting sizes it is the same choice as `evit` without its extra token."""
    vit = Vit(batch=2)
    model, feeds, _, _ = setting(vit)
    counts = (17, math.ceil(0.7 * 16) + 1, math.ceil(0.7 * 12) + 1, 10)
    dropped, _ = prune(model, method="diffrate", prune=counts, merge=counts)
    kept, _ = prune(model, method="evit", keep=0.7, layers=(1, 2), fuse=False)
    np.testing.assert_allclose(run(dropped, feeds)[0], run(kept, feeds)[0], rtol=0, atol=1e-5)
