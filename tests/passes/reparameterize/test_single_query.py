"""`absorb-key-value` against the graph before it in float64: random heads, biases and masks, networks of timm, and what must stay."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.contracts import Context, Effect
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.census import losses, whole_nodes
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import run as interpret
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.dead_work import DropDeadWork
from edgekit.passes.reparameterize.single_query import AbsorbKeyValue
from edgekit.source import from_module
from edgekit.trace import trace as export

_SUPPORT = Path(__file__).parents[2] / "timm_support.py"


def bytes_of(model):
    """Bytes of the floating-point constants."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.dtype.is_floating_point())


def assert_absorbed(model, times=1):
    """Runs the pass on a copy; holds it against the graph before, and checks that it costs less and that a second run changes nothing."""
    reference, model, context = model, model.clone(), Context()
    assert AbsorbKeyValue().apply(model, context) == times, context.refusals
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    rng = np.random.default_rng(1)
    values = {value.name: rng.normal(0.3, 1, list(value.shape)).astype(np.float32) for value in model.graph.inputs}
    after, before = interpret(model, values, dtype="float64"), interpret(reference, values, dtype="float64")
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-11 * np.abs(array).max())
    assert cost(model).macs < cost(reference).macs
    assert bytes_of(model) <= bytes_of(reference)
    assert losses(whole_nodes(reference), whole_nodes(model)) == []
    assert all(value.uses() for value in model.graph.initializers.values())
    text = ir.to_proto(model).SerializeToString()
    assert AbsorbKeyValue().apply(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == text
    return model


def assert_refused(model, why):
    """Checks that the pass leaves the graph as it is, and says why unless `why` is empty."""
    before, context = ir.to_proto(model).SerializeToString(), Context()
    assert AbsorbKeyValue().apply(model, context) == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert [refusal.where for refusal in context.refusals] == (["attention"] if why else [])
    assert all(why in refusal.why for refusal in context.refusals), context.refusals


@pytest.fixture(scope="session")
def attention(build):
    """Returns a maker of an attention of queries `[B, H, S, D]` on tokens `[B, N, C]`; see its arguments."""

    def make(
        rng, *, batch=1, heads=2, queries=1, width=3, count=8, channels=6, values=None, fused=False, bias=True, mask=None, flags="", more=""
    ):
        values = width if values is None else values
        shapes = {"k": heads * width, "v": heads * values}
        arrays = {}
        lines = []
        if fused:
            values, total = width, 2 * heads * width
            arrays |= {"w": rng.normal(size=(channels, total)), "b": rng.normal(size=total)}
            arrays |= {"s5": np.array([batch, count, 2, heads, width]), "first": np.array(0), "second": np.array(1)}
            lines += ["p0 = MatMul(x, w)", "p = Add(b, p0)" if bias else "p = Identity(p0)", "r = Reshape(p, s5)"]
            lines += ["t = Transpose<perm=[2,0,3,1,4]>(r)", "k = Gather(t, first)", "v = Gather(t, second)"]
            arrays = arrays if bias else {name: array for name, array in arrays.items() if name != "b"}
        else:
            for name, total in shapes.items():
                arrays[f"w{name}"] = rng.normal(size=(channels, total))
                arrays[f"s{name}"] = np.array([batch, count, heads, total // heads])
                lines.append(f"{name}0 = MatMul(x, w{name})")
                if bias:
                    arrays[f"b{name}"] = rng.normal(size=total)
                    lines.append(f"{name}1 = Add({name}0, b{name})")
                lines.append(f"{name}2 = Reshape({name}{int(bias)}, s{name})")
                lines.append(f"{name} = Transpose<perm=[0,2,1,3]>({name}2)")
        operands = "q, k, v" + (", mask" if mask is not None else "")
        if mask is not None:
            arrays["mask"] = mask
        lines.append(f"y = Attention<{flags or 'is_causal=0'}>({operands})")
        arrays = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in arrays.items()}
        inputs = f"float[{batch},{heads},{queries},{width}] q, float[{batch},{count},{channels}] x"
        text = (
            f"g ({inputs}) => (float[{batch},{heads},{queries},{values}] y{', float[1] z' if more else ''}) {{ {' '.join(lines)} {more} }}"
        )
        model = build(text.replace("p = Identity(p0) r = Reshape(p,", "r = Reshape(p0,"), arrays)
        next(node for node in model.graph if node.op_type == "Attention").name = "attention"
        return model

    return make


def test_declaration():
    assert (AbsorbKeyValue.name, AbsorbKeyValue.effect, AbsorbKeyValue.default_order) == ("absorb-key-value", Effect.EXACT, None)
    assert AbsorbKeyValue.removes == frozenset()


def test_random_attentions(attention):
    absorbed = []

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.integers(0, 2**32))
    def check(seed):
        rng = np.random.default_rng(seed)
        ranges = {"batch": 3, "heads": 4, "queries": 3, "width": 5, "count": 12, "channels": 8, "values": 4}
        size = {name: int(rng.integers(3 if name == "count" else 1, end)) for name, end in ranges.items()}
        heads, queries, count, channels = size["heads"], size["queries"], size["count"], size["channels"]
        mask = [None, None, rng.normal(size=(queries, count)), np.arange(count)[None] < rng.integers(1, count, (heads, queries, 1))][
            int(rng.integers(4))
        ]
        flags = [None, "scale=0.7", "is_causal=1", "scale=0.0"][int(rng.integers(4))]
        model = attention(rng, **size, fused=bool(rng.integers(2)), bias=bool(rng.integers(2)), mask=mask, flags=flags)
        inner = cost(model)
        node = next(node for node in model.graph if node.op_type == "Attention")
        width, values = size["width"], node.outputs[0].shape[3]
        after = size["batch"] * heads * queries * (width * channels + 2 * count * channels + channels * values)
        if after < inner.macs and queries < count:
            assert cost(assert_absorbed(model)).macs == after
            absorbed.append(seed)
        else:
            assert_refused(model, "multiply-accumulates" if queries < count else "")

    check()
    assert len(absorbed) > 60


def test_what_it_becomes(attention, rng):
    model = assert_absorbed(attention(rng, heads=2, width=3, count=8, channels=6))
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    assert [tuple(value.shape) for value in node.inputs] == [(1, 2, 1, 6), (1, 1, 8, 6), (1, 1, 8, 6)]
    assert node.inputs[1] is node.inputs[2]
    assert node.name == "attention"
    assert node.attributes["scale"].as_float() == pytest.approx(3**-0.5)
    assert [node.op_type for node in model.graph] == ["MatMul", "Reshape", "Attention", "MatMul", "Add"]
    assert model.graph.outputs[0].name == "y"


def test_without_bias_nothing_is_added(attention, rng):
    assert [node.op_type for node in assert_absorbed(attention(rng, bias=False)).graph] == ["MatMul", "Reshape", "Attention", "MatMul"]


def test_onnx_runtime_agrees(attention, rng, run):
    model = attention(rng)
    values = {value.name: rng.normal(size=list(value.shape)).astype(np.float32) for value in model.graph.inputs}
    for after, before in zip(run(assert_absorbed(model), values), run(model, values), strict=True):
        np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"queries": 8}, ""),
        ({"queries": 7}, "multiply-accumulates"),
        ({"flags": "softcap=2.0"}, "capped"),
        ({"mask": np.zeros((1, 8), dtype=bool)}, "forbid every key"),
        ({"mask": np.full((1, 8), -np.inf)}, "forbid every key"),
        ({"more": "z = ReduceSum<keepdims=0>(k)"}, "'Transpose_3' is read elsewhere"),
        ({"more": "z = ReduceSum<keepdims=0>(v0)"}, "'MatMul_4' is read elsewhere"),
        ({"more": "z0 = MatMul(x, wk) z = ReduceSum<keepdims=0>(z0)"}, "'wk' is read elsewhere"),
    ],
)
def test_what_must_stay(attention, rng, options, why):
    assert_refused(attention(rng, **options), why)


def test_softcap_and_masks_without_biases(attention, rng):
    assert_absorbed(attention(rng, bias=False, flags="softcap=2.0"))
    assert_absorbed(attention(rng, bias=False, mask=np.arange(8)[None] < 4))


def test_keys_that_are_no_linear_map_of_tokens(build, rng):
    weights = {name: rng.normal(size=(6, 6)).astype(np.float32) for name in ("wk", "wv")}
    head = "g (float[1,2,1,3] q, float[1,8,6] x) => (float[1,2,1,3] y)"
    heads = "{0}2 = Reshape({0}1, s) {0} = Transpose<perm=[0,2,1,3]>({0}2) "
    end = heads.format("k") + heads.format("v") + "y = Attention(q, k, v)"
    first = "k0 = MatMul(x, wk) v1 = MatMul(x, wv) "
    shape = {"s": np.array([1, 8, 2, 3])}

    def refused(nodes, why, text=head, **arrays):
        model = build(f"{text} {{ {nodes} }}", weights | shape | arrays)
        next(node for node in model.graph if node.op_type == "Attention").name = "attention"
        assert_refused(model, why)

    refused(first + "k1 = Tanh(k0) " + end, "not made by a matrix product")
    position = rng.normal(size=(1, 8, 6)).astype(np.float32)
    refused(first + "k1 = Add(k0, position) " + end, "mixed", position=position)  # the bias differs from token to token
    order = np.array([1, 0, 2, 3, 4, 5, 6, 7])
    refused(first + "k1 = Gather<axis=1>(k0, order) " + end, "mixed", order=order)
    mixed = end.replace("k = Transpose<perm=[0,2,1,3]>(k2)", "k = Reshape(k2, t)")  # heads out of a row of tokens
    refused(first.replace("k0", "k1") + mixed, "mixed", t=np.array([1, 2, 8, 3]))
    del weights["wk"]
    refused(first.replace("k0", "k1") + end, "no constant weight", head.replace("float[1,8,6] x", "float[1,8,6] x, float[6,6] wk"))


def test_place_that_is_skipped(attention, rng):
    model = attention(rng)
    assert AbsorbKeyValue().apply(model, Context(skip=frozenset({"attention"}))) == 0


def traced(name, size, **options):
    """A network of timm of another size, with random weights and biases, as edgekit traces it."""
    spec = importlib.util.spec_from_file_location("timm_support", _SUPPORT)
    support = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support)
    support._import_torchvision()
    import timm

    torch.manual_seed(0)
    module = timm.create_model(name, **options).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model = canonicalize(export(from_module(module, torch.randn(1, 3, size, size)), "dynamo").model)
    infer_shapes(model)
    return model


def test_class_attention_of_cait():
    model = traced("cait_xxs24_224", 64, img_size=64, depth=1, depth_token_only=1)
    tokens, width, heads = 17, 192, 4
    saved = cost(model).macs - cost(assert_absorbed(model)).macs
    assert saved == 2 * (tokens - 1) * width**2 - 2 * tokens * width * (heads - 1)


def test_last_block_of_a_class_token_model_after_dead_work_is_dropped():
    model = traced("deit_tiny_patch16_224", 224, img_size=224, depth=1)
    assert DropDeadWork().apply(model, Context()) == 5
    tokens, width, heads = 197, 192, 3
    saved = cost(model).macs - cost(assert_absorbed(model)).macs
    assert saved == 2 * (tokens - 1) * width**2 - 2 * tokens * width * (heads - 1) == 14_299_392
