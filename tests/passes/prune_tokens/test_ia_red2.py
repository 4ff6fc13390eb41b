"""IA-RED²: tokens dropped by a scorer in front of groups of blocks, against the masked form with thresholds, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgekit.graph.shapes import infer_shapes
from edgekit.graph.token_steps import follow_tokens
from edgekit.passes.prune_tokens.blocks import find_blocks
from edgekit.passes.prune_tokens.ia_red2 import projection
from tests.passes.prune_tokens.reference import MaskedPolicy, Network
from tests.passes.prune_tokens.vit_graphs import Nodes, Vit, graph, random_feeds, random_weights

VITS = {
    "plain": Vit(),
    "batch": Vit(batch=3),
    "distilled": Vit(prefix=2, pool="distilled", batch=2),
    "registers": Vit(prefix=5),
    "packed": Vit(packed=True, batch=3),
    "position bias": Vit(table=True, batch=2),
    "bool mask": Vit(mask="bool", batch=3),
    "more patches than channels": Vit(width=16, heads=2, patches=40),
}


def setting(vit, seed=0):
    weights, feeds = random_weights(vit, seed), random_feeds(vit, seed + 1)
    network = Network(vit, weights)
    return graph(vit, weights), feeds, network, network.logits(feeds)


@pytest.mark.parametrize(("layers", "keep"), [((0, 1, 3), (0.9, 0.7, 0.5)), ((2,), (0.4,)), ((0, 2), (0.8, 0.25))])
@pytest.mark.parametrize("vit", [pytest.param(vit, id=name) for name, vit in VITS.items()])
def test_equals_the_masked_form(vit, layers, keep, prune, assert_logits):
    model, feeds, network, plain = setting(vit)
    wanted = {layer: math.floor(share * vit.patches) for layer, share in zip(layers, keep, strict=True)}
    reference = MaskedPolicy(vit.prefix, wanted)
    pruned, _ = prune(model, method="ia-red2", layers=layers, keep=keep)
    assert_logits(pruned, feeds, network.logits(feeds, reference), plain)
    for sample in range(vit.batch):
        for step in follow_tokens(pruned, feeds, sample)[1:]:
            kept = sorted(group[0] - vit.prefix for group in step.groups[vit.prefix :])
            assert kept == reference.kept[step.block][sample].tolist()


def test_the_groups_that_are_the_default(prune, assert_logits):
    """Three groups of four blocks, of which 9, 7 and 5 in ten tokens are left."""
    vit = Vit(depth=12, width=16, heads=2, patches=20)
    model, feeds, network, plain = setting(vit)
    pruned, context = prune(model, method="ia-red2")
    assert context.rewrites == ["block0/sum", "block4/sum", "block8/sum"]
    assert_logits(pruned, feeds, network.logits(feeds, MaskedPolicy(1, {0: 18, 4: 14, 8: 10})), plain)


def test_the_scorer_starts_as_queries_and_keys_after_a_norm_without_weights():
    """Folding the norm's scale and shift into the linear layer, against PyTorch."""
    vit = Vit(batch=2)
    weights = random_weights(vit)
    block = find_blocks(graph(vit, weights).graph)[2]
    start = projection(block.attention, block.stream)
    x = torch.randn(5, vit.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = {name: torch.tensor(array, dtype=torch.float64) for name, array in weights.items()}
    normed = functional.layer_norm(x, (vit.width,), w["2.norm1.w"], w["2.norm1.b"])
    q, k, _ = functional.linear(normed, w["2.qkv.w"].T, w["2.qkv.b"]).chunk(3, -1)
    plain = functional.layer_norm(x, (vit.width,)).numpy()
    assert start.heads == vit.heads
    np.testing.assert_allclose(plain @ start.queries + start.query_bias, q, rtol=0, atol=1e-5)
    np.testing.assert_allclose(plain @ start.keys + start.key_bias, k, rtol=0, atol=1e-5)


def test_the_scorer_is_new_parameters(prune):
    """They can be trained: each is an initializer of its own that starts as a block's weights, which stay."""
    vit = Vit()
    weights = random_weights(vit)
    pruned, _ = prune(graph(vit, weights), method="ia-red2", layers=(0, 2), keep=(0.9, 0.5))
    arrays = {name: value.const_value.numpy() for name, value in pruned.graph.initializers.items()}
    for block, source in ((0, 0), (2, 1)):
        width = vit.width
        weight = weights[f"{source}.norm1.w"][:, None] * weights[f"{source}.qkv.w"]
        bias = weights[f"{source}.norm1.b"] @ weights[f"{source}.qkv.w"] + weights[f"{source}.qkv.b"]
        for part, columns in (("q", slice(0, width)), ("k", slice(width, 2 * width))):
            np.testing.assert_allclose(arrays[f"block{block}/sum/prune_tokens/scorer.{part}.weight"], weight[:, columns], rtol=0, atol=1e-5)
            np.testing.assert_allclose(arrays[f"block{block}/sum/prune_tokens/scorer.{part}.bias"], bias[columns], rtol=0, atol=1e-5)
    for name, array in weights.items():
        np.testing.assert_array_equal(arrays[name], array)


@pytest.mark.parametrize(
    ("vit", "why"),
    [(Vit(rotary=True), "linear in a norm"), (Vit(post_norm=True), "linear in a norm")],
)
def test_what_no_scorer_can_be_started_from(vit, why, refusal):
    assert why in refusal(graph(vit), method="ia-red2", layers=(1,), keep=0.5)[1]


@pytest.mark.parametrize("op_type", ["Add", "Mul"])
def test_queries_that_depend_on_the_place_of_a_token(op_type, refusal):
    """A table that is added to queries, or multiplied with them, makes them another map for each token."""
    model = graph(Vit(packed=True))
    attention = next(node for node in model.graph if node.name == "block1/attention")
    add = Nodes()
    table = add.constant(np.random.default_rng(0).normal(1, 1, (17, 32)).astype(np.float32), "places")
    moved = add(op_type, attention.inputs[0], table, name="moved")
    model.graph.register_initializer(table)
    model.graph.insert_before(attention, add.nodes)
    attention.replace_input_with(0, moved)
    infer_shapes(model)
    assert "depend on its place" in refusal(model, method="ia-red2", layers=(2,), keep=0.5)[1]
