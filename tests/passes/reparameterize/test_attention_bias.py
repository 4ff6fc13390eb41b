"""`drop-attention-bias` against the graph before it in float64: every layout of projections, and every condition that stops it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from edgekit.contracts import Context, Effect
from edgekit.graph import interpreter
from edgekit.graph.cost import cost
from edgekit.passes.reparameterize.attention_bias import DropAttentionBias


@pytest.fixture(scope="session")
def check(build):
    """Returns a check that the pass removes as many Adds as said and keeps the numbers."""

    def compare(text, arrays, expected):
        arrays = {name: np.asarray(a, np.float32) if np.asarray(a).dtype == np.float64 else a for name, a in arrays.items()}
        model = build(text, {name: a for name, a in arrays.items() if any(f"{e}{name}{t}" in text for e in "( " for t in ",)")})
        rng = np.random.default_rng(1)
        feeds = {
            v.name: rng.normal(0.3, 1, list(v.shape)).astype(np.float32) if v.dtype == ir.DataType.FLOAT else np.ones(list(v.shape), bool)
            for v in model.graph.inputs
        }
        reference = interpreter.run(model, feeds, dtype="float64")
        before, proto, context = cost(model), ir.to_proto(model).SerializeToString(), Context()
        adds = sum(node.op_type == "Add" for node in model.graph)
        found = DropAttentionBias().apply(model, context)
        assert found == expected, context.refusals
        if not found:
            assert ir.to_proto(model).SerializeToString() == proto
            return model, context
        assert sum(node.op_type == "Add" for node in model.graph) == adds - found
        assert cost(model).bytes < before.bytes
        assert cost(model).macs == before.macs
        for result, array in zip(interpreter.run(model, feeds, dtype="float64").values(), reference.values(), strict=True):
            np.testing.assert_allclose(result, array, rtol=0, atol=1e-6 * np.abs(array).max())  # the new bias is stored in float32
        after = ir.to_proto(model).SerializeToString()
        assert DropAttentionBias().apply(model, Context()) == 0
        assert ir.to_proto(model).SerializeToString() == after
        return model, context

    return compare


def test_declaration():
    assert (DropAttentionBias.name, DropAttentionBias.effect) == ("drop-attention-bias", Effect.EXACT)
    assert DropAttentionBias.default_order is None


B, N, D = 2, 4, 3


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_layout(check, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kv, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    heads, c = kv * group, kv * group * D
    four = data.draw(st.booleans())
    merged = data.draw(st.sampled_from(["separate", "kv", "qkv", "view"] if kv == heads else ["separate", "kv", "qkv"]))
    zero_query = data.draw(st.booleans())
    widths = {"q": c, "k": kv * D, "v": kv * D}
    biases = {p: rng.normal(size=w) * (not (p == "q" and zero_query)) for p, w in widths.items()}
    arrays = {f"w{p}": rng.normal(size=(c, w)) / np.sqrt(c) for p, w in widths.items()} | {f"b{p}": b for p, b in biases.items()}
    arrays |= {"wo": rng.normal(size=(c, 5)), "bo": rng.normal(size=data.draw(st.sampled_from([(5,), (1, 1, 5), (1,)])))}
    arrays |= {"s4q": np.array([B, N, heads, D]), "s4": np.array([B, N, kv, D]), "flat": np.array([B, N, c])}
    nodes = []
    if merged == "separate":
        nodes += [f"{p}0 = MatMul(x, w{p})  {p} = Add({p}0, b{p})" for p in "qkv"]
        removable = 2 + zero_query
    else:
        parts = "kv" if merged == "kv" else "qkv"
        arrays["wm"] = np.concatenate([arrays[f"w{p}"] for p in parts], 1)
        arrays["bm"] = np.concatenate([biases[p] for p in parts])
        arrays["cuts"] = np.array([widths[p] for p in parts])
        nodes.append("m0 = MatMul(x, wm)  m = Add(bm, m0)")
        if merged == "kv":
            nodes.append("q0 = MatMul(x, wq)  q = Add(q0, bq)")
        removable = 1 + zero_query if merged == "kv" else int(zero_query)
    if merged == "view":  # the layout of timm: [B, N, 3, H, D], transposed, split along axis 0
        arrays |= {"s5": np.array([B, N, 3, heads, D]), **{f"i{i}": np.array(i) for i in range(3)}}
        nodes.append("m1 = Reshape(m, s5)  m2 = Transpose<perm=[2,0,3,1,4]>(m1)")
        nodes += [f"{p}4 = Gather<axis=0>(m2, i{i})" for i, p in enumerate("qkv")]
        four = True
    elif merged in ("kv", "qkv"):
        nodes.append(f"{', '.join(parts)} = Split<axis=-1>(m, cuts)")
    if four and merged != "view":
        nodes += [f"{p}3 = Reshape({p}, s4{'q' * (p == 'q')})  {p}4 = Transpose<perm=[0,2,1,3]>({p}3)" for p in "qkv"]
    mask = data.draw(st.sampled_from(["", "bool", "float", "row", "computed"]))
    hidden = np.triu(np.ones((N, N), bool), 1) if mask == "row" else rng.random((N, N)) < 0.4
    hidden[:, 0] = mask == "row" and data.draw(st.booleans())  # the first query then sees no key
    arrays["mask"] = ~hidden if mask != "float" else np.where(hidden, -np.inf, rng.normal(size=(N, N)))
    empty = mask == "row" and hidden[0].all()
    causal = data.draw(st.integers(0, 1))
    names = ("q4, k4, v4" if four else "q, k, v") + (", mask" if mask else "")
    attributes = f"is_causal={causal}" + ("" if four else f", q_num_heads={heads}, kv_num_heads={kv}")
    nodes.append(f"a = Attention<{attributes}>({names})")
    if four:
        nodes.append("a1 = Transpose<perm=[0,2,1,3]>(a)  a2 = Reshape(a1, flat)")
    nodes.append(f"o = MatMul({'a2' if four else 'a'}, wo)  y = Add(o, bo)")
    inputs = f"float[{B},{N},{c}] x" + (f", bool[{N},{N}] mask" if mask == "computed" else "")
    if mask == "computed":
        del arrays["mask"]
    if empty or mask == "computed":  # values must stay; a bias of keys alone goes
        removable = (1 + zero_query) if merged == "separate" else int(zero_query and merged == "kv")
    check(f"g ({inputs}) => (float[{B},{N},5] y) {{ {'  '.join(nodes)} }}", arrays, removable)


def test_bias_moves_into_the_output_projection(trace, run):
    """Keys and values of a decoder's cross attention: both Adds go, and the numbers stay (PyTorch is the reference)."""

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))

        def forward(self, x, memory):
            q, k, v = (f(t).unflatten(-1, (2, 4)).transpose(1, 2) for f, t in ((self.q, x), (self.k, memory), (self.v, memory)))
            return self.o(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    class Self(Cross):
        def forward(self, x):
            return super().forward(x, x)

    module = Self()
    model, x = trace(module, (2, 5, 8)), torch.randn(2, 5, 8)
    context = Context()
    assert DropAttentionBias().apply(model, context) == 2
    (refusal,) = context.refusals
    assert "biases of the queries" in refusal.why
    np.testing.assert_allclose(run(model, {model.graph.inputs[0].name: x.numpy()})[0], module(x).detach().numpy(), rtol=0, atol=1e-5)


KEY = "k0 = MatMul(x, w)  k = Add(k0, b)  "
VALUE = "v0 = MatMul(x, w)  v = Add(v0, b)  "
HEADS = "q_num_heads=2, kv_num_heads=2"
END = "o = MatMul(a, w)  y = Add(o, c)"


def graph(nodes, outputs="float[2,4,6] y", inputs="float[2,4,6] x"):
    return f"g ({inputs}) => ({outputs}) {{ {nodes} }}"


REFUSED = {
    "softcap": graph(f"{KEY} a = Attention<softcap=2.0, {HEADS}>(x, k, x)  {END}"),
    "its scores are read": graph(f"{KEY} a, pk, pv, s = Attention<{HEADS}>(x, k, x)  {END}", "float[2,4,6] y, float[2,2,4,4] s"),
    "its present keys are read": graph(f"{KEY} a, p, pv = Attention<{HEADS}>(x, k, x)  {END}", "float[2,4,6] y, float[a,h,n,d] p"),
    "its present values are read": graph(f"{VALUE} a, p, pv = Attention<{HEADS}>(x, x, v)  {END}", "float[2,4,6] y, float[a,h,n,d] pv"),
    "it has a cache": graph(
        f"{KEY} a, pk, pv = Attention<{HEADS}>(x, k, x, , p, p)  {END}", inputs="float[2,4,6] x, float[2,2,3,3] p"
    ),
    "hides all keys from a query": graph(f"{VALUE} a = Attention<{HEADS}>(x, x, v, none)  {END}"),
    "its mask is computed": graph(f"{VALUE} a = Attention<{HEADS}>(x, x, v, m)  {END}", inputs="float[2,4,6] x, bool[4,4] m"),
    "biases of the queries": graph(f"{KEY} a = Attention<{HEADS}>(k, k, x)  {END}"),
    "Relu 'Relu_4' reads it": graph(f"{KEY} a = Attention<{HEADS}>(x, k, x)  z = Add(a, a)  r = Relu(k)  y = Add(z, r)"),
    "given out": graph(f"{KEY} a = Attention<{HEADS}>(x, k, x)  {END}", "float[2,4,6] y, float[2,4,6] k"),
    "has no bias that could take it": graph(f"{VALUE} a = Attention<{HEADS}>(x, x, v)  y = MatMul(a, w)"),
    "is no projection": graph(f"{VALUE} a = Attention<{HEADS}>(x, x, v)  y = Relu(a)"),
    "by the output projection alone": graph(f"{VALUE} a = Attention<{HEADS}>(x, x, v)  {END}", "float[2,4,6] y, float[2,4,6] a"),
    "value bias of Attention 'Attention_4': the positions get different": graph(
        f"{VALUE} vt = Transpose<perm=[0,2,1]>(v)  vr = Reshape(vt, shape)  a = Attention<{HEADS}>(x, x, vr)  {END}"
    ),
    "positions get different": graph(
        f"{KEY} kt = Transpose<perm=[0,2,1]>(k)  kr = Reshape(kt, shape)  a = Attention<{HEADS}>(x, kr, x)  {END}"
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_refused(check, rng, why):
    none = np.ones((4, 4), bool)
    none[2] = False
    arrays = {"w": rng.normal(size=(6, 6)), "b": rng.normal(size=6), "c": rng.normal(size=6), "none": none, "shape": np.array([2, 4, 6])}
    _, context = check(REFUSED[why], arrays, 0)
    assert any(why in refusal.why for refusal in context.refusals), context.refusals


def test_rotated_keys_are_refused(check, rng):
    """The rotation turns the bias differently at each position."""
    arrays = {"w": rng.normal(size=(8, 8)), "b": rng.normal(size=8), "c": rng.normal(size=8)}
    arrays |= {"cos": rng.normal(size=(2, 4, 2)), "sin": rng.normal(size=(2, 4, 2))}
    text = graph(
        f"{KEY} r = RotaryEmbedding<num_heads=2>(k, cos, sin)  a = Attention<{HEADS}>(x, r, x)  {END}", "float[2,4,8] y", "float[2,4,8] x"
    )
    check(text, arrays, 0)


def test_key_bias_that_overflows_nothing_goes_and_value_bias_that_would_is_refused(build, rng):
    half = {"w": rng.normal(size=(6, 6)).astype(np.float16), "b": np.full(6, 6e4, np.float16), "c": np.full(6, 6e4, np.float16)}
    half["w"][:] = np.abs(half["w"])
    model = build(graph(f"{VALUE} a = Attention<{HEADS}>(x, x, v)  {END}").replace("float", "float16"), half)
    context = Context()
    assert DropAttentionBias().apply(model, context) == 0
    assert "would not be finite in float16" in context.refusals[0].why


def test_shared_constant_is_not_changed_for_others(build, run, assert_equal_up_to_rounding, rng):
    """The values' bias is also the output's and a scale: the output gets a new one, the scale stays."""
    text = graph(
        f"{VALUE} a = Attention<{HEADS}>(x, x, v)  o = MatMul(a, w)  y = Add(o, b)  z = Mul(x, b)", "float[2,4,6] y, float[2,4,6] z"
    )
    arrays = {"w": rng.normal(size=(6, 6)).astype(np.float32), "b": rng.normal(size=6).astype(np.float32)}
    model, feeds = build(text, arrays), {"x": rng.normal(size=(2, 4, 6)).astype(np.float32)}
    reference = run(model, feeds)
    assert DropAttentionBias().apply(model, Context()) == 1
    assert_equal_up_to_rounding(run(model, feeds), reference)
    np.testing.assert_array_equal(model.graph.initializers["b"].const_value.numpy(), arrays["b"])
