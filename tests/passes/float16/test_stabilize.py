"""`stabilize-float16` as a whole: the network that collapses without it, what it leaves alone, and what it says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgekit.contracts import Context, Effect
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.census import census, whole_nodes
from edgekit.graph.float16_proof import Proof, prove_float16
from edgekit.graph.interpreter import run as interpret
from edgekit.models.digits import load
from edgekit.models.vit_digits import MODEL
from edgekit.passes.float16 import stabilize
from edgekit.passes.float16.stabilize import StabilizeFloat16
from edgekit.passes.to_float16 import ToFloat16


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "whole"])
def test_vision_transformer_collapses_without_and_agrees_with(decomposed, images, fused):
    model = canonicalize(decomposed) if fused else decomposed
    counts = census(whole_nodes(model))
    assert counts.get("LayerNormalization", 0) == (9 if fused else 0)
    calibration, test = images[:1], images[1:]
    reference = [interpret(model, feed)[model.graph.outputs[0].name] for feed in test]
    without = prove_float16(model, test)
    assert without.samples == 200
    assert without.top1_agreement < 0.5
    assert len(without.overflows) >= 9
    context = Context(calibration=calibration)
    assert StabilizeFloat16().apply(model, context) == 9
    assert len(set(context.rewrites)) == 9
    assert census(whole_nodes(model)) == counts
    for feed, expected in zip(test, reference, strict=True):
        found = interpret(model, feed)[model.graph.outputs[0].name]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    with_it = prove_float16(model, test)
    assert with_it.top1_agreement >= 0.99
    assert with_it.sqnr_db > 50
    assert with_it.overflows == ()


def test_converted_vision_transformer_agrees_too(decomposed, images):
    """Every value rounded as `to-float16` declares it; without analysis and without the pass, the classes are lost."""
    agreements = {}
    for stable in (False, True):
        model = decomposed.clone()
        name = model.graph.outputs[0].name
        expected = interpret(model, images[1])[name].argmax(1)
        if stable:
            StabilizeFloat16().apply(model, Context(calibration=images[:1]))
        ToFloat16(overflow="ignore").apply(model, Context(calibration=images[:1]))
        found = interpret(model, images[1])[name]
        agreements[stable] = float(((found.argmax(1) == expected) & np.isfinite(found).all(1)).mean())
    assert agreements[False] < 0.5
    assert agreements[True] >= 0.99


def test_trained_network_is_left_alone():
    module = MODEL.build().eval()
    inputs = load().inputs["calibrate"][:8].astype(np.float32)
    program = torch.onnx.export(module, (torch.zeros(8, *inputs.shape[1:]),), dynamo=True, opset_version=23, verbose=False)
    model = canonicalize(program.model)
    before = ir.to_proto(model).SerializeToString()
    context = Context(calibration=[{model.graph.inputs[0].name: inputs}])
    assert StabilizeFloat16().apply(model, context) == 0
    assert context.refusals == []
    assert ir.to_proto(model).SerializeToString() == before


def test_it_is_exact_and_runs_when_asked_for():
    assert (StabilizeFloat16.effect, StabilizeFloat16.default_order) == (Effect.EXACT, None)


NORM = "g (float[2,64] x) => (float[2,64] y) { y = LayerNormalization(x, s) }"


@pytest.fixture
def large(build):
    x = np.random.default_rng(0).normal(0, 5000, (2, 64)).astype(np.float32)
    return build(NORM, {"s": np.ones(64, np.float32)}), [{"x": x}]


def test_skipped_place_is_left_alone_and_named(large):
    model, feeds = large
    context = Context(calibration=feeds, skip=frozenset({"LayerNormalization_0"}))
    assert StabilizeFloat16().apply(model, context) == 0
    assert [refusal.where for refusal in context.refusals] == ["LayerNormalization_0"]
    assert 'to-float16{keep=["LayerNormalization_0"]}' in context.refusals[0].why


def test_worse_proof_leaves_the_graph_as_it_is(large, monkeypatch):
    model, feeds = large
    good, worse = Proof(2, 0.1, 60.0, None, 0.0, ()), Proof(2, np.inf, -np.inf, None, 1.0, ("y",))
    monkeypatch.setattr(stabilize, "prove_float16", lambda graph, data: good if graph is model else worse)
    before = ir.to_proto(model).SerializeToString()
    context = Context(calibration=feeds)
    assert StabilizeFloat16().apply(model, context) == 0
    assert "are worse" in context.refusals[0].why
    assert ir.to_proto(model).SerializeToString() == before


def test_value_that_is_too_large_itself_is_named(build):
    model = build("g (float[4] x) => (float[4] y) { p = Mul(x, x)  y = Log(p) }")
    context = Context(calibration=[{"x": np.full(4, 1000, np.float32)}])
    assert StabilizeFloat16().apply(model, context) == 0
    (refusal,) = context.refusals
    assert (refusal.where, "it reaches 1e+06" in refusal.why) == ("Mul_0", True)


def test_graph_that_the_interpreter_does_not_know_is_refused(build):
    model = build("g (float[4] x) => (float[4] y) { y = Relu(x) }")
    model.graph[0].domain = "somewhere"
    model.opset_imports["somewhere"] = 1
    context = Context(calibration=[{"x": np.zeros(4, np.float32)}])
    assert StabilizeFloat16().apply(model, context) == 0
    assert "somewhere" in context.refusals[0].why
