"""Any transformer, method and schedule: the graph stays valid and static, its outputs keep their shapes and are those of a reference."""

from __future__ import annotations

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgekit.contracts import Context
from edgekit.graph.shapes import static_shape
from edgekit.graph.token_steps import follow_tokens
from edgekit.passes.prune_tokens import schedule
from edgekit.passes.prune_tokens.prune_tokens import PruneTokens
from edgekit.passes.prune_tokens.reduce import CLASS_TOKEN
from tests.passes.prune_tokens.reference import Fused, Masked, MaskedPolicy, Merging, Network, PruneAndMerge
from tests.passes.prune_tokens.vit_graphs import Vit, graph, random_feeds, random_weights


@st.composite
def vits(draw):
    heads = draw(st.integers(1, 3))
    pool = draw(st.sampled_from(["class", "class", "distilled", "mean", "mean-patches"]))
    least = {"class": 1, "distilled": 2}.get(pool, 0)
    return Vit(
        depth=draw(st.integers(1, 5)),
        width=heads * draw(st.sampled_from([4, 6, 8])),
        heads=heads,
        patches=draw(st.integers(3, 24)),
        batch=draw(st.integers(1, 3)),
        classes=draw(st.integers(1, 5)),
        prefix=draw(st.integers(least, least + 3)),
        pool=pool,
        packed=draw(st.booleans()),
    )


@st.composite
def droppings(draw, vit):
    """Options of a method that drops, and its reference."""
    with_class_token = vit.pool in ("class", "distilled")
    method = draw(st.sampled_from([*(["evit", "fused", "ia-red2"] if with_class_token else []), "attention-received"]))
    layers = tuple(sorted(draw(st.sets(st.integers(0, vit.depth - 1), min_size=1, max_size=3))))
    keep = tuple(draw(st.lists(st.floats(0.2, 1), min_size=len(layers), max_size=len(layers))))
    sizes = schedule.Sizes(vit.depth, vit.tokens, vit.prefix)
    steps = schedule.of_all(sizes, layers, keep) if method == "ia-red2" else schedule.by_ratio(sizes, layers, keep, method == "fused")
    assume(all(step.targets for step in steps))
    wanted = {step.block: step.keep for step in steps if step.before or not with_class_token or step.block < vit.depth - 1}
    options = {"method": "evit" if method == "fused" else method, "layers": layers, "keep": keep, "fuse": method == "fused"}
    if method == "fused":
        return options, Fused(vit.prefix, wanted)
    return options, MaskedPolicy(vit.prefix, wanted) if method == "ia-red2" else Masked(method, vit.prefix, wanted)


@st.composite
def mergings(draw, vit):
    """Options of a method that merges, and its reference."""
    sizes = schedule.Sizes(vit.depth, vit.tokens, vit.prefix)
    last = vit.depth - (vit.pool in ("class", "distilled"))
    if vit.pool in ("class", "distilled") and draw(st.booleans()):
        prune, merge, left = [], [], vit.tokens
        for _ in range(vit.depth):
            prune.append(draw(st.integers(vit.prefix + 1, left)))
            merge.append(draw(st.integers(vit.prefix + 1, prune[-1])))
            left = merge[-1]
        steps = schedule.by_counts(sizes, prune, merge)
        counts = {step.block: (vit.prefix + step.keep, vit.prefix + step.targets) for step in steps if step.block < last}
        return {"method": "diffrate", "prune": tuple(prune), "merge": tuple(merge)}, PruneAndMerge(vit.prefix, counts)
    pairs = tuple(draw(st.lists(st.integers(0, vit.tokens), min_size=vit.depth, max_size=vit.depth)))
    proportional = draw(st.booleans())
    steps = [step for step in schedule.by_pairs(sizes, pairs) if step.block < last]
    options = {"method": "tome", "r": pairs, "proportional": proportional, "form": draw(st.sampled_from(["top-k", "scatter", "rank"]))}
    return options, Merging(vit.prefix, {step.block: step.keep - step.targets for step in steps}, proportional)


def check(vit, options, reference, seed, run):
    weights, feeds = random_weights(vit, seed), random_feeds(vit, seed + 1)
    model = graph(vit, weights)
    before = {value.name: tuple(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)}
    PruneTokens(**options).apply(model, Context(generator=np.random.default_rng(seed)))
    assert {value.name: tuple(value.shape) for value in (*model.graph.inputs, *model.graph.outputs)} == before
    assert all(static_shape(value) is not None for node in model.graph for value in node.outputs)
    expected = Network(vit, weights).logits(feeds, reference)
    (found,) = run(model, feeds)  # after ONNX's full check, with its own shape inference
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    return model, feeds


@settings(max_examples=60)
@given(data=st.data(), vit=vits(), seed=st.integers(0, 1000))
def test_dropping(data, vit, seed, run):
    options, reference = data.draw(droppings(vit))
    model, feeds = check(vit, options, reference, seed, run)
    for sample in range(vit.batch):
        for step in follow_tokens(model, feeds, sample)[1:]:
            kept = [index for group in step.groups for index in group]
            assert len(set(kept)) == len(kept)  # none twice
            assert set(kept) <= set(range(vit.tokens))
            assert kept[: vit.prefix] == list(range(vit.prefix))
            if isinstance(reference, Masked):
                assert sorted(index - vit.prefix for index in kept[vit.prefix :]) == reference.kept[step.block][sample].tolist()


@settings(max_examples=60)
@given(data=st.data(), vit=vits(), seed=st.integers(0, 1000))
def test_merging(data, vit, seed, run):
    options, reference = data.draw(mergings(vit))
    check(vit, options, reference, seed, run)


@settings(max_examples=25)
@given(vit=vits(), method=st.sampled_from(["evit", "attention-received", "ia-red2", "tome", "random"]), seed=st.integers(0, 1000))
def test_the_defaults(vit, method, seed, run):
    """Whatever the model, the defaults of each method give a valid graph of finite outputs."""
    assume(method not in CLASS_TOKEN or vit.pool in ("class", "distilled"))
    assume(method != "ia-red2" or vit.patches > 3)
    model, feeds = graph(vit, random_weights(vit, seed)), random_feeds(vit, seed)
    context = Context(generator=np.random.default_rng(seed))
    PruneTokens(method=method).apply(model, context)
    assert context.refusals == []
    (found,) = run(model, feeds)
    assert found.shape == (vit.batch, vit.classes)
    assert np.isfinite(found).all()
