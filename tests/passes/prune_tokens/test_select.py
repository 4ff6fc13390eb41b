"""Dropping tokens: the graph that goes on without them equals the whole one with −∞ on what attention sees of them, in float64."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.graph.shapes import infer_shapes
from edgekit.graph.token_steps import follow_tokens
from tests.passes.prune_tokens.reference import Fused, Masked, Network
from tests.passes.prune_tokens.vit_graphs import Vit, graph, random_feeds, random_weights

WITH_CLASS_TOKEN = {
    "plain": Vit(),
    "batch": Vit(batch=3),
    "odd": Vit(patches=19, batch=2),
    "distilled": Vit(prefix=2, pool="distilled", batch=3),
    "registers": Vit(prefix=5),
    "packed": Vit(packed=True, batch=3),
    "post-norm": Vit(post_norm=True, batch=2),
    "class token and mean": Vit(pool="both", batch=2),
}
WITH_TABLES = {
    "position bias": Vit(table=True),
    "position bias, batch": Vit(table=True, batch=3),
    "rotary": Vit(rotary=True),
    "rotary, batch": Vit(rotary=True, batch=3),
    "bool mask": Vit(mask="bool", batch=3),
    "float mask": Vit(mask="float", batch=2),
    "bool mask and bias": Vit(mask="bool", table=True, batch=2),
    "float mask and bias": Vit(mask="float", table=True),
}
WITHOUT_CLASS_TOKEN = {
    "mean": Vit(prefix=0, pool="mean", batch=3),
    "mean with a class token": Vit(pool="mean"),
    "mean of patches": Vit(prefix=5, pool="mean-patches", batch=2),
    "mean of patches, the rest given": Vit(prefix=2, pool="mean-patches", given_prefix=True, batch=2),
    "mean, rotary": Vit(prefix=0, pool="mean", rotary=True, batch=2),
}


def named(vits):
    return [pytest.param(vit, id=name) for name, vit in vits.items()]


def counts(vit, keep, layers, fuse=False):
    """Tokens after the prefix that stay, by layer: ⌈keep · n⌉ of those that are left, among them the one that was made of others."""
    left, found = vit.patches, {}
    for layer in layers:
        found[layer] = math.ceil(keep * left)
        left = found[layer] + fuse
    return found


def setting(vit, seed=0):
    weights, feeds = random_weights(vit, seed), random_feeds(vit, seed + 1)
    network = Network(vit, weights)
    return graph(vit, weights), feeds, network, network.logits(feeds)


@pytest.mark.parametrize("vit", named(WITH_CLASS_TOKEN | WITH_TABLES | WITHOUT_CLASS_TOKEN))
def test_the_reference_is_the_graph(vit, run):
    model, feeds, _, plain = setting(vit)
    np.testing.assert_allclose(run(model, feeds)[0], plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("form", ["top-k", "rank"])
@pytest.mark.parametrize("vit", named(WITH_CLASS_TOKEN | WITH_TABLES))
def test_attention_of_the_class_token(vit, form, prune, assert_logits):
    model, feeds, network, plain = setting(vit)
    reference = Masked("evit", vit.prefix, counts(vit, 0.7, (1, 2)))
    pruned, _ = prune(model, method="evit", keep=0.7, layers=(1, 2), fuse=False, form=form)
    assert_logits(pruned, feeds, network.logits(feeds, reference), plain)


@pytest.mark.parametrize("form", ["top-k", "rank"])
@pytest.mark.parametrize("vit", named(WITH_CLASS_TOKEN))
def test_one_token_is_made_of_those_that_go(vit, form, prune, assert_logits):
    model, feeds, network, plain = setting(vit)
    reference = Fused(vit.prefix, counts(vit, 0.6, (0, 1, 2), fuse=True))
    pruned, _ = prune(model, method="evit", keep=0.6, layers=(0, 1, 2), form=form)
    assert_logits(pruned, feeds, network.logits(feeds, reference), plain)


@pytest.mark.parametrize("vit", named(WITH_CLASS_TOKEN | WITH_TABLES | WITHOUT_CLASS_TOKEN))
def test_attention_received(vit, prune, assert_logits):
    model, feeds, network, plain = setting(vit)
    reference = Masked("attention-received", vit.prefix, counts(vit, 0.6, (0, 2)))
    pruned, _ = prune(model, method="attention-received", keep=0.6, layers=(0, 2))
    assert_logits(pruned, feeds, network.logits(feeds, reference), plain)


@pytest.mark.parametrize("vit", named(WITH_CLASS_TOKEN | WITH_TABLES | WITHOUT_CLASS_TOKEN))
def test_random_places(vit, prune, assert_logits):
    """The places are read from the graph; that they are drawn anew with each seed and never twice is another test."""
    model, feeds, network, plain = setting(vit)
    pruned, _ = prune(model, seed=5, method="random", keep=0.5, layers=(1, 2))
    steps = follow_tokens(pruned, feeds)
    left, places = np.arange(vit.patches), {}
    for block, step in zip((1, 2), steps[1:], strict=True):
        kept = np.array([group[0] - vit.prefix for group in step.groups[vit.prefix :]])
        places[block] = np.flatnonzero(np.isin(left, kept))
        left = kept
    reference = Masked("random", vit.prefix, counts(vit, 0.5, (1, 2)), places)
    assert_logits(pruned, feeds, network.logits(feeds, reference), plain)


def test_random_places_are_others_with_another_seed_and_the_same_for_every_sample(prune):
    vit = Vit(batch=3, patches=30)
    model, feeds, _, _ = setting(vit)
    seen = set()
    for seed in range(4):
        pruned, _ = prune(model, seed=seed, method="random", keep=0.5, layers=(1,))
        groups = [follow_tokens(pruned, feeds, sample)[-1].groups for sample in range(3)]
        assert groups[0] == groups[1] == groups[2]
        kept = [group[0] for group in groups[0]]
        assert len(set(kept)) == len(kept) == 16
        assert min(kept) == 0
        assert max(kept) <= 30
        seen.add(tuple(kept))
    assert len(seen) == 4


@pytest.mark.parametrize("method", ["evit", "attention-received"])
@pytest.mark.parametrize("form", ["top-k", "rank"])
def test_the_kept_tokens_are_those_of_the_reference(method, form, prune):
    vit = Vit(batch=3, patches=25)
    model, feeds, network, _ = setting(vit)
    reference = Masked(method, 1, counts(vit, 0.5, (1, 2)))
    network.logits(feeds, reference)
    pruned, _ = prune(model, method=method, keep=0.5, layers=(1, 2), fuse=False, form=form)
    for sample in range(3):
        for step in follow_tokens(pruned, feeds, sample)[1:]:
            kept = sorted(group[0] - 1 for group in step.groups[1:])
            assert kept == reference.kept[step.block][sample].tolist()


@pytest.mark.parametrize("method", ["evit", "attention-received"])
def test_padding_goes_first(method, prune):
    """Attention to padding is zero: of 20 tokens the last 8 and 5 are padding, and none of it is among the 12 that stay."""
    vit = Vit(patches=19, batch=2, mask="bool")
    model, feeds, _, _ = setting(vit)
    feeds["mask"] = (np.arange(20) < np.array([[12], [15]])).astype(np.int64)
    pruned, _ = prune(model, method=method, keep=11 / 19, layers=(1,), fuse=False)
    for sample, length in enumerate((12, 15)):
        kept = [group[0] for group in follow_tokens(pruned, feeds, sample)[-1].groups]
        assert len(kept) == 12
        assert max(kept) < length


def test_equal_scores_go_by_place_in_both_forms(prune, run):
    """All patches are alike, so that all scores are: the first ones stay, and the result is the same whichever form chooses."""
    vit = Vit(patches=12)
    weights, feeds = random_weights(vit), random_feeds(vit)
    weights["position"] = np.repeat(weights["position"][:, 1:2], 13, 1)
    feeds["x"] = np.repeat(feeds["x"][:, :1], 12, 1)
    model = graph(vit, weights)
    outputs = []
    for form in ("top-k", "rank"):
        pruned, _ = prune(model, method="evit", keep=0.5, layers=(1,), form=form)
        outputs.append(run(pruned, feeds)[0])
        assert sorted(group[0] for group in follow_tokens(pruned, feeds)[-1].groups[:-1]) == list(range(7))
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-6)


def test_the_scale_of_an_attention_is_that_of_its_scores(prune, run):
    """Attention with a scale of its own, against the same with its queries scaled."""
    vit = Vit(packed=True)
    weights, feeds = random_weights(vit), random_feeds(vit)
    scaled = graph(vit, weights)
    for node in scaled.graph:
        if node.op_type == "Attention":
            node.attributes["scale"] = ir.AttrFloat32("scale", 2.5 / math.sqrt(vit.head_width))
    for k in range(vit.depth):
        for name in (f"{k}.qkv.w", f"{k}.qkv.b"):
            weights[name] = weights[name] * np.where(np.arange(3 * vit.width) < vit.width, np.float32(2.5), np.float32(1))
    options = {"method": "evit", "keep": 0.5, "layers": (1, 2)}
    outputs = [run(prune(model, **options)[0], feeds)[0] for model in (scaled, graph(vit, weights))]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["evit", "attention-received"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_a_mask_of_two_axes(kind, method, prune, run):
    """`[N, N]` for all samples and heads loses rows and columns of each sample's own: against the same mask written out."""
    vit = Vit(batch=2, patches=12)
    feeds = random_feeds(vit)
    allowed = np.random.default_rng(3).random((13, 13)) < 0.7
    allowed[:, 0] = True
    array = allowed if kind == "bool" else np.where(allowed, 0, -3).astype(np.float32)
    outputs = []
    for shape in ((13, 13), (1, 1, 13, 13), (2, 4, 13, 13)):
        model = graph(vit)
        mask = ir.Value(name="allowed", const_value=ir.Tensor(np.broadcast_to(array, shape).copy(), name="allowed"))
        model.graph.register_initializer(mask)
        for node in model.graph:
            if node.op_type == "Attention":
                node.resize_inputs(4)
                node.replace_input_with(3, mask)
        infer_shapes(model)
        outputs.append(run(prune(model, method=method, keep=0.6, layers=(0, 2), fuse=False)[0], feeds)[0])
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(outputs[2], outputs[1], rtol=0, atol=1e-5)
