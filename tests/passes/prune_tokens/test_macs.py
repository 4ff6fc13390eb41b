"""Multiply-accumulates of DeiT after pruning: against the figures that follow from 4NC² + 2N²C + 8NC² per block, and the papers' own."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.contracts import Context
from edgekit.graph.cost import cost
from edgekit.passes.prune_tokens.blocks import find_blocks
from edgekit.passes.prune_tokens.schedule import Sizes, by_pairs, by_ratio
from edgekit.passes.prune_tokens.token_axis import follow
from edgekit.passes.prune_tokens.token_cost import counts_of, token_cost
from edgekit.passes.reparameterize.dead_work import DropDeadWork
from edgekit.passes.reparameterize.reparameterize import Reparameterize
from tests.passes.prune_tokens.vit_graphs import Vit, deit, empty_weights, graph, random_feeds, random_weights

SIZES = {"tiny": (192, 3), "small": (384, 6), "base": (768, 12)}

EVIT = {0.9: (1.092, 4.022, 15.395), 0.7: (0.821, 3.029, 11.610), 0.5: (0.629, 2.309, 8.820)}
TOME = {8: (0.924, 3.416, 13.104), 13: (0.731, 2.703, 10.367), 16: (0.622, 2.291, 8.772)}
POLICY = {
    (0.9, 0.7, 0.5): ((0.854, 0.019), (3.173, 0.076), (12.207, 0.304)),
    (0.8, 0.6, 0.4): ((0.724, 0.018), (2.701, 0.070), (10.414, 0.281)),
    (0.7, 0.5, 0.3): ((0.603, 0.016), (2.253, 0.065), (8.695, 0.258)),
}
COUNTS = {
    "tiny": (0.809, (197, 197, 196, 186, 166, 147, 117, 103, 92, 80, 74, 3), (197, 196, 190, 172, 154, 125, 107, 96, 84, 78, 70, 3)),
    "small": (2.905, (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3), (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3)),
    "base": (11.517, (197, 197, 197, 188, 170, 154, 139, 123, 107, 72, 43, 3), (197, 197, 192, 178, 158, 145, 127, 111, 94, 50, 35, 3)),
}
CLASS_TOKEN_ONLY = {  # DeiT-S whose last block is computed for the class token alone
    "evit 0.9": ({"method": "evit", "keep": 0.9}, 3.788),
    "evit 0.7": ({"method": "evit", "keep": 0.7}, 2.921),
    "evit 0.5": ({"method": "evit", "keep": 0.5}, 2.268),
    "tome 8": ({"method": "tome", "r": 8}, 3.258),
    "tome 13": ({"method": "tome", "r": 13}, 2.638),
    "tome 16": ({"method": "tome", "r": 16}, 2.273),
    "diffrate": ({"method": "diffrate", "prune": COUNTS["small"][1], "merge": COUNTS["small"][2]}, 2.884),
}


@pytest.fixture(scope="module")
def deits():
    """DeiT without weights, whose graphs take no memory, by size."""
    return {name: graph(deit(*size), empty_weights(deit(*size))) for name, size in SIZES.items()}


def gigamacs(model):
    """Of the network, and of choosing tokens."""
    rows = cost(model).per_node
    own = sum(row.macs for row in rows if "/prune_tokens/" in row.name)
    return (sum(row.macs for row in rows) - own) / 1e9, own / 1e9


def last_block(name, before, after):
    """What the MLP of the last block costs with more tokens: a step that only the class token is read after is left out."""
    return 8 * SIZES[name][0] ** 2 * (before - after) / 1e9


@pytest.mark.parametrize("size", SIZES)
def test_base(size, deits):
    assert gigamacs(deits[size]) == pytest.approx(({"tiny": 1.254, "small": 4.599, "base": 17.564}[size], 0), rel=1e-3)


@pytest.mark.parametrize("keep", EVIT)
@pytest.mark.parametrize("size", SIZES)
def test_class_token_attention(size, keep, deits, prune):
    macs, own = gigamacs(prune(deits[size], method="evit", keep=keep)[0])
    assert macs == pytest.approx(EVIT[keep][list(SIZES).index(size)], rel=1e-3)
    assert own < 0.002


@pytest.mark.parametrize("r", TOME)
@pytest.mark.parametrize("size", SIZES)
def test_merging(size, r, deits, prune):
    macs, own = gigamacs(prune(deits[size], method="tome", r=r)[0])
    counts = {8: (109, 101), 13: (54, 41), 16: (21, 11)}[r]
    assert macs - last_block(size, *counts) == pytest.approx(TOME[r][list(SIZES).index(size)], rel=1e-3)
    assert macs == pytest.approx(TOME[r][list(SIZES).index(size)], rel=1e-2)
    assert own < 0.012


@pytest.mark.parametrize("keep", POLICY)
@pytest.mark.parametrize("size", SIZES)
def test_scorers(size, keep, deits, prune):
    """A scorer takes a key of each token, the query of the class token, and their products."""
    macs, own = gigamacs(prune(deits[size], method="ia-red2", keep=keep)[0])
    expected = POLICY[keep][list(SIZES).index(size)]
    assert macs == pytest.approx(expected[0], rel=1e-3)
    width, patches = SIZES[size][0], [196, *(int(round(share * 196, 9)) for share in keep[:2])]
    assert own == sum((count + 1) * width**2 + count * width for count in patches) / 1e9
    assert own == pytest.approx(expected[1], rel=2e-2, abs=6e-4)


@pytest.mark.parametrize("size", SIZES)
def test_ready_made_counts(size, deits, prune):
    total, counts, merged = COUNTS[size]
    macs, own = gigamacs(prune(deits[size], method="diffrate", prune=counts, merge=merged)[0])
    assert macs - last_block(size, merged[-2], merged[-1]) == pytest.approx(total, rel=1e-3)
    assert own < 0.006 * macs


@pytest.mark.parametrize("name", CLASS_TOKEN_ONLY)
def test_the_last_block_for_the_class_token_alone(name, deits, prune):
    options, expected = CLASS_TOKEN_ONLY[name]
    pruned, _ = prune(deits["small"], **options)
    DropDeadWork().apply(pruned, Context())
    assert gigamacs(pruned)[0] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["evit 0.7", "tome 13", "diffrate", "ia-red2"])
def test_the_order_of_the_passes_does_not_matter(name, deits, prune):
    options = {"method": name} if name == "ia-red2" else CLASS_TOKEN_ONLY[name][0]
    first, _ = prune(deits["small"], **options)
    Reparameterize().apply(first, Context())
    merged = deits["small"].clone()
    Reparameterize().apply(merged, Context())
    second, _ = prune(merged, **options)
    assert gigamacs(first) == gigamacs(second)
    assert gigamacs(first)[0] < gigamacs(prune(deits["small"], **options)[0])[0]


ORDERS = {
    "evit": {"method": "evit"},
    "evit, no token of the others": {"method": "evit", "fuse": False},
    "attention-received": {"method": "attention-received", "keep": 0.5},
    "random": {"method": "random"},
    "tome": {"method": "tome", "r": 4},
    "ia-red2": {"method": "ia-red2", "layers": (0, 2)},
    "diffrate": {"method": "diffrate", "prune": (25, 22, 20, 17, 17), "merge": (25, 20, 16, 14, 14)},
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("vit", [Vit(depth=5, patches=24, batch=2), Vit(depth=5, patches=23, prefix=2, pool="distilled")])
def test_outputs_in_either_order(vit, name, prune, run):
    weights, feeds = random_weights(vit), random_feeds(vit)
    first, _ = prune(graph(vit, weights), **ORDERS[name])
    expected = run(first, feeds)[0]
    Reparameterize().apply(first, Context())
    second = graph(vit, weights)
    Reparameterize().apply(second, Context())
    merged, _ = prune(second, **ORDERS[name])
    assert cost(first).macs == cost(merged).macs
    np.testing.assert_allclose(run(first, feeds)[0], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(run(merged, feeds)[0], expected, rtol=0, atol=1e-5)


def test_the_last_block_is_left_alone_where_only_the_class_token_is_read_after_it(deits, prune):
    _, context = prune(deits["tiny"], method="tome", r=8)
    assert context.rewrites == [f"block{k}/sum" for k in range(11)]
    vit = Vit(pool="mean")
    _, context = prune(graph(vit), method="tome", r=2)
    assert context.rewrites == [f"block{k}/sum" for k in range(4)]


@pytest.mark.parametrize(("prefix", "pool"), [(1, "class"), (0, "mean"), (5, "mean-patches")])
def test_the_formula_that_schedules_are_searched_by(prefix, pool):
    """MACs by tokens in each part of the network, against a network that has as many."""
    vit, fewer = (Vit(depth=3, prefix=prefix, pool=pool, patches=patches) for patches in (30, 11))
    model = graph(vit)
    blocks = find_blocks(model.graph)
    formula = token_cost(model, blocks, follow(model.graph, blocks[0].stream))
    assert formula.macs([vit.tokens] * 4) == cost(model).macs
    embedding = (30 - 11) * vit.patch_width * vit.width  # is in front of the stream
    assert formula.macs([fewer.tokens] * 4) - embedding == pytest.approx(cost(graph(fewer)).macs, rel=1e-12)


@pytest.mark.parametrize(
    "options", [{"method": "evit", "keep": 0.6}, {"method": "evit", "keep": 0.6, "fuse": False}, {"method": "tome", "r": 4}]
)
def test_the_formula_is_what_a_schedule_costs(options, prune):
    model = graph(Vit(depth=6, patches=30))
    blocks = find_blocks(model.graph)
    formula = token_cost(model, blocks, follow(model.graph, blocks[0].stream))
    sizes, fuse = Sizes(6, 31, 1), options.get("fuse", options["method"] == "evit")
    steps = by_pairs(sizes, [4] * 5 + [0]) if options["method"] == "tome" else by_ratio(sizes, (2, 3, 4), (0.6,) * 3, fuse)
    pruned, _ = prune(model, **options)
    assert formula.macs(counts_of(steps, sizes, fuse)) / 1e9 == pytest.approx(gigamacs(pruned)[0], rel=1e-12)
