"""Every rule of `fold-scale` against the graph before it in float64, and every condition under which it must not act."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.contracts import Context, Effect
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.interpreter import run as interpret
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.fold_input_affine import FoldInputAffine
from edgekit.passes.reparameterize.fold_scale import FoldScale


def norm_arrays(rng, channels):
    """Scale of either sign, mean off zero, variance in [0.1, 1.1]."""
    return {
        "s": rng.uniform(-1, 1, channels),
        "t": rng.normal(size=channels),
        "m": rng.normal(0.5, 1, channels),
        "v": rng.uniform(0.1, 1.1, channels),
    }


def elements(model):
    return sum(math.prod(value.shape) for value in model.graph.initializers.values() if value.dtype.is_floating_point())


def operators(model):
    return [node.op_type for node in model.graph]


@pytest.fixture(scope="session")
def folded(build):
    """Returns a check that the pass keeps the function, makes nothing dearer and is idempotent; it gives the model and the context."""

    def check(text, arrays, *, count=None, kind="float", new_bias=0):
        dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
        cast = {name: array.astype(dtype) if array.dtype.kind == "f" else array for name, array in arrays.items()}
        model = build(text.replace("float[", f"{kind}["), cast)
        before = model.clone()
        generator = np.random.default_rng(1)
        feeds = {value.name: generator.normal(0.3, 1, tuple(value.shape)).astype(dtype) for value in model.graph.inputs}
        context = Context()
        found = FoldScale().apply(model, context)
        assert found == len(context.rewrites)
        assert count is None or found == count, context.refusals
        infer_shapes(model)
        expected, given = interpret(before, feeds, dtype="float64"), interpret(model, feeds, dtype="float64")
        bound = {"float": 1e-5, "double": 1e-10, "float16": 1e-2}[kind]
        for name, array in expected.items():
            np.testing.assert_allclose(given[name], array, rtol=0, atol=bound * (np.abs(array).max() + 1e-30))
        assert len(model.graph) == len(before.graph) if found == 0 else len(model.graph) < len(before.graph)
        assert elements(model) <= elements(before) + new_bias
        state = fingerprint(model)
        assert FoldScale().apply(model, Context()) == 0
        assert fingerprint(model) == state
        return model, context

    return check


@pytest.fixture(scope="session")
def refused(folded):
    """Returns a check that the pass leaves a graph as it is and says why (None: it has nothing to say)."""

    def check(text, arrays, why, kind="float"):
        _, context = folded(text, arrays, count=0, kind=kind)
        if why is None:
            assert not context.refusals
        else:
            assert any(why in refusal.why for refusal in context.refusals), context.refusals

    return check


def test_declaration():
    assert (FoldScale.name, FoldScale.effect, FoldScale.default_order) == ("fold-scale", Effect.EXACT, None)


# Random graphs: a producer, layout operators and averages after it, then affine nodes

PRODUCERS = {
    "conv": ("c = Conv<pads=[1,0,0,1]>(x, w3)", 1),
    "conv_bias": ("c = Conv<group=2, strides=[2,1]>(x, w2, b)", 1),
    "transpose": ("c = ConvTranspose<group=2, strides=[2,1]>(x, wt, b)", 1),
    "matmul": ("c = MatMul(x, wm)", 3),
    "linear": ("c0 = MatMul(x, wm)  c = Add(b, c0)", 3),
    "norm": ("c = BatchNormalization(x, s, t, m, v)", 1),
    "layer_norm": ("c = LayerNormalization(x, s)", 3),
    "layer_norm_bias": ("c = LayerNormalization<axis=3>(x, s, t)", 3),
    "layer_norm_two_axes": ("c = LayerNormalization<axis=2>(x, s2)", 3),
    "rms_norm": ("c = RMSNormalization(x, s)", 3),
    "group_norm": ("c = GroupNormalization<num_groups=2>(x, s, t)", 1),
    "instance_norm": ("c = InstanceNormalization(x, s, t)", 1),
    "computed": ("c = MatMul(x, o)", 3),
    "relu": ("c = Relu(x)", 1),
}
BETWEEN = {
    "none": ("p = Identity(c)", {1: 1, 3: 3}, 4),
    "transpose": ("p = Transpose<perm=[0,2,3,1]>(c)", {1: 3, 3: 2}, 4),
    "reshape": ("p = Reshape(c, split)", {1: 1, 3: 4}, 5),
    "relu": ("p = Relu(c)", {1: 1, 3: 3}, 4),
    "max": ("p = MaxPool<kernel_shape=[1,2]>(c)", {1: 1, 3: None}, 4),
    "average": ("p = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0]>(c)", {1: 1, 3: None}, 4),
    "counted": ("p = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0], count_include_pad=1>(c)", {1: 1, 3: None}, 4),
    "mean": ("p = ReduceMean<keepdims=0>(c, axes)", {1: 1, 3: None}, 2),
    "tokens": ("p = ReduceMean<keepdims=0>(c, one)", {1: None, 3: 2}, 3),
    "resize": ('p = Resize<mode="linear">(c, , , sizes)', {1: 1, 3: None}, 4),
}
STEPS = {
    "mul": "{y} = Mul({x}, k{i})", "mul_left": "{y} = Mul(k{i}, {x})", "div": "{y} = Div({x}, k{i})", "neg": "{y} = Neg({x})",
    "add": "{y} = Add({x}, k{i})", "sub": "{y} = Sub({x}, k{i})", "sub_left": "{y} = Sub(k{i}, {x})",
    "norm": "{y} = BatchNormalization({x}, s{i}, t{i}, m{i}, v{i})",
}  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_random_producers_and_chains(folded, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    producer, axis = PRODUCERS[data.draw(st.sampled_from(sorted(PRODUCERS)))]
    between, axes, rank = BETWEEN[data.draw(st.sampled_from(sorted(BETWEEN)))] if data.draw(st.booleans()) else ("", {axis: axis}, 4)
    axis = axes[axis]
    value, channels = "p" if between else "c", 4
    arrays = {
        "w3": rng.normal(size=(4, 4, 2, 2)), "w2": rng.normal(size=(4, 2, 1, 2)), "wt": rng.normal(size=(4, 2, 2, 2)),
        "wm": rng.normal(size=(4, 4)), "b": rng.normal(size=4), "s2": rng.uniform(0.5, 1, (4, 4)),
        "split": np.array([0, 4, 2, -1, 4] if axis == 4 else [0, 4, -1, 1, 2]),
        "axes": np.array([2, 3]), "one": np.array([1]), "sizes": np.array([2, 4, 7, 5]), **norm_arrays(rng, 4),
    }  # fmt: skip
    nodes, count = [producer, between], data.draw(st.integers(1, 4))
    for i in range(count):
        per_channel = axis is not None and data.draw(st.booleans())
        shape = [channels if place == axis else 1 for place in range(rank)][data.draw(st.integers(0, axis)) if per_channel else 0 :]
        step = data.draw(st.sampled_from([name for name in sorted(STEPS) if name != "norm" or (axis == 1 and rank == 4)]))
        sign = rng.choice([-1, 1]) if data.draw(st.booleans()) else 1
        arrays[f"k{i}"] = sign * rng.uniform(0.5, 2, shape if per_channel else data.draw(st.sampled_from([(), (1,), (1, 1)])))
        arrays |= {f"{name}{i}": array for name, array in norm_arrays(rng, channels).items()}
        result = "y" if i == count - 1 else f"a{i}"
        nodes.append(STEPS[step].format(x=value, y=result, i=i))
        value = result
    outputs = [f"float[{','.join(f'n{place}' for place in range(rank))}] y"]
    if data.draw(st.integers(0, 3)) == 0:  # somebody else reads what the producer makes
        nodes.append("z = Relu(c)")
        outputs.append("float[d0,d1,d2,d3] z")
    text = f"g (float[2,4,4,4] x, float[2,4,4,4] o) => ({', '.join(outputs)}) {{ {'  '.join(nodes)} }}"
    used = text.translate(str.maketrans("(),", "   ")).split()
    arrays = {name: array for name, array in arrays.items() if name in used}
    folded(text, arrays, kind=data.draw(st.sampled_from(["float", "double"])), new_bias=8)


# Which places, on graphs written out

CONV = "g (float[1,4,6,5] x) => (float[n,c,h,w] y) { c = Conv(x, w, b)  y = Mul(c, k) }"
LINEAR = "g (float[2,7,4] x) => (float[2,7,6] y) { l = MatMul(x, w)  c = Add(l, b)  y = Mul(c, k) }"


@pytest.fixture
def conv_arrays(rng):
    return {"w": rng.normal(size=(3, 4, 3, 3)), "b": rng.normal(size=3), "k": rng.normal(size=(3, 1, 1))}


def test_scale_after_conv(folded, conv_arrays):
    model, context = folded(CONV, conv_arrays, count=1)
    assert operators(model) == ["Conv"]
    assert sorted(model.graph.initializers) == ["b", "w"]
    assert context.rewrites == ["Mul_1"]


def test_layer_scale(folded, rng):
    arrays = {"w": rng.normal(size=(4, 6)), "b": rng.normal(size=6), "k": rng.normal(size=6)}
    model, _ = folded(LINEAR, arrays, count=1)
    assert operators(model) == ["MatMul", "Add"]


def test_layer_scale_after_channels_moved_last(folded, conv_arrays, rng):
    text = "g (float[1,4,6,5] x) => (float[1,4,3,3] y) { c = Conv(x, w, b)  p = Transpose<perm=[0,2,3,1]>(c)  y = Mul(p, k) }"
    model, _ = folded(text, conv_arrays | {"k": rng.normal(size=3)}, count=1)
    assert operators(model) == ["Conv", "Transpose"]


def test_temperature_after_heads_are_split(folded, rng):
    arrays = {"w": rng.normal(size=(4, 6)), "b": rng.normal(size=6), "k": np.array(0.125), "r": np.array([2, 7, 3, 2])}
    text = """g (float[2,7,4] x) => (float[2,3,7,2] y) {
        l = MatMul(x, w)  c = Add(l, b)  r0 = Reshape(c, r)  t0 = Transpose<perm=[0,2,1,3]>(r0)  y = Div(t0, k) }"""
    model, _ = folded(text, arrays, count=1)
    assert operators(model) == ["MatMul", "Add", "Reshape", "Transpose"]


def test_image_brought_back_after_pixel_shuffle(folded, rng):
    arrays = {"w": rng.normal(size=(12, 4, 1, 1)), "k": np.array(255.0), "u": rng.normal(size=(3, 1, 1))}
    text = """g (float[1,4,6,5] x) => (float[1,3,12,10] y) {
        c = Conv(x, w)  d = DepthToSpace<blocksize=2, mode="MODE">(c)  e = Mul(d, k)  y = Add(e, u) }"""
    for mode in ("CRD", "DCR"):
        model, _ = folded(text.replace("MODE", mode), arrays, count=2, new_bias=12)
        assert operators(model) == ["Conv", "DepthToSpace"]


def test_chain_without_operator_before_it_becomes_mul_and_add(folded, rng):
    arrays = {"k": rng.normal(size=(3, 1, 1)), "a": np.array(2.0), "b": rng.normal(size=(1, 3, 1, 1)), "d": np.array(3.0)}
    text = """g (float[1,3,4,4] x) => (float[1,3,4,4] y) {
        p = Mul(x, k)  q = Sub(a, p)  r = Div(q, d)  s = Neg(r)  y = Add(s, b) }"""
    model, _ = folded(text, arrays)
    assert operators(model) == ["Mul", "Add"]
    assert [tuple(node.inputs[1].shape) for node in model.graph] == [(3, 1, 1), (3, 1, 1)]


def test_chain_that_undoes_itself(folded, refused, rng):
    text = "g (float[1,3,4,4] x) => (float[1,3,4,4] y) { r = Relu(x)  a = Neg(r)  b = Neg(a)  y = Exp(b) }"
    model, _ = folded(text, {}, count=1)
    assert operators(model) == ["Relu", "Exp"]
    refused("g (float[2] x) => (float[2] y) { a = Neg(x)  y = Neg(a) }", {}, "given out already")


def test_scales_around_a_norm(folded, rng):
    arrays = {"k": rng.normal(size=(3, 1, 1)), "d": np.array(0.25)} | norm_arrays(rng, 3)
    text = """g (float[1,3,4,4] x) => (float[1,3,4,4] y) {
        p = Sub(k, x)  n = BatchNormalization(p, s, t, m, v)  q = Mul(n, d)  y = Add(q, k) }"""
    model, _ = folded(text, arrays)
    assert operators(model) == ["BatchNormalization"]


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("n = BatchNormalization(x, s, t, m, v)  p = Mul(x, a)  y = Add(n, p)", ["BatchNormalization"]),
        ("n = BatchNormalization(x, s, t, m, v)  p = Mul(k, x)  q = Add(p, k)  y = Sub(q, n)", ["BatchNormalization"]),
        ("n = BatchNormalization(x, s, t, m, v)  y = Add(x, n)", ["BatchNormalization"]),
        ("p = Mul(x, k)  y = Add(x, p)", ["Mul"]),
        ("p = Mul(x, k)  q = Sub(x, a)  y = Sub(p, q)", ["Mul", "Add"]),
        ("p = Mul(x, k)  q = Mul(x, a)  y = Mul(p, q)", ["Mul", "Mul", "Mul"]),
        ("p = Mul(x, k)  q = Mul(z, a)  y = Add(p, q)", ["Mul", "Mul", "Add"]),
    ],
)
def test_sum_of_scaled_copies(folded, rng, nodes, left):
    """The first is RepBN."""
    arrays = {"k": rng.normal(size=(3, 1, 1)), "a": np.array([0.7])} | norm_arrays(rng, 3)
    used = nodes.translate(str.maketrans("(),", "   ")).split()
    text = f"g (float[1,3,4,4] x, float[1,3,4,4] z) => (float[1,3,4,4] y) {{ {nodes} }}"
    model, _ = folded(text, {name: array for name, array in arrays.items() if name in used}, new_bias=3)
    assert operators(model) == left


def test_copy_of_a_scaled_value_that_is_read_elsewhere_stays(refused, rng):
    text = """g (float[1,3,4,4] x) => (float[1,3,4,4] y, float[1,3,4,4] z) {
        n = BatchNormalization(x, s, t, m, v)  p = Mul(x, a)  y = Add(n, p)  z = Exp(n) }"""
    refused(text, {"a": np.array([0.7])} | norm_arrays(rng, 3), None)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (CONV.replace("=> (", "=> (float[1,3,4,3] c, "), "the output of Conv 'Conv_0' is read elsewhere"),
        (CONV.replace("=> (", "=> (float[1,3,4,3] z, ").replace("}", " z = Exp(c) }"), "the output of Conv 'Conv_0' is read elsewhere"),
        (CONV.replace("x)", "x, float[3,4,3,3] w)", 1), "the weight of Conv 'Conv_0' is not a constant"),
        (CONV.replace("x)", "x, float[3] b)", 1), "the bias of Conv 'Conv_0' is not a constant"),
        (CONV.replace("x)", "x, float[3,1,1] k)", 1), None),
        (CONV.replace("(x, w, b)", "(x, u, b)").replace("{ c", "{ u = Neg(w)  c"), "the weight of Conv 'Conv_1' is not a constant"),
        (CONV.replace("=> (", "=> (float[n,c,h,i] z, ").replace("}", " z = Conv(x, w) }"), "a copy would take more bytes"),
        (CONV.replace("(c, k)", "(c, r)"), "another axis than the output channels of Conv 'Conv_0'"),
        (CONV.replace("(c, k)", "(c, f)"), None),
        (CONV.replace("y = Mul", "a = Sigmoid(c)  y = Mul").replace("(c, k)", "(a, k)"), None),
        (CONV.replace("y = Mul", "a = Relu(c)  y = Mul").replace("(c, k)", "(a, k)"), None),
        (LINEAR.replace("=> (", "=> (float[2,7,6] l, "), "the output of MatMul 'MatMul_0' is read elsewhere"),
        (LINEAR.replace("c = Add(l, b)  ", "").replace("Mul(c", "Sub(l"), "MatMul 'MatMul_0' has no bias"),
    ],
)  # fmt: skip
def test_scale_that_stays(refused, conv_arrays, rng, text, why):
    arrays = conv_arrays | {"r": rng.normal(size=3), "f": rng.normal(size=(3, 4, 3))}
    if "MatMul" in text:
        arrays = {"w": rng.normal(size=(4, 6)), "b": rng.normal(size=6), "k": rng.normal(size=6)}
    arrays["k"] = -np.abs(arrays["k"])
    used = text[text.index("{") :].translate(str.maketrans("(),", "   ")).split()
    refused(text, {name: array for name, array in arrays.items() if name in used}, why)


def test_shift_of_rms_norm_stays(refused, rng):
    text = "g (float[2,7,4] x) => (float[2,7,4] y) { n = RMSNormalization(x, s)  y = Add(n, k) }"
    refused(text, {"s": rng.normal(size=4), "k": rng.normal(size=4)}, "has no bias that could take a shift")


def test_float16_folds_in_float64_and_not_where_it_overflows(folded, refused, conv_arrays):
    folded(CONV, conv_arrays, count=1, kind="float16")
    conv_arrays["w"][0, 0, 0, 0], conv_arrays["k"][0] = 6e4, 2.0
    refused(CONV, conv_arrays, "would not be finite in float16", kind="float16")


def test_place_that_is_skipped(build, conv_arrays):
    model = build(CONV, {name: array.astype(np.float32) for name, array in conv_arrays.items()})
    context = Context(skip=frozenset({"Mul_1"}))
    assert FoldScale().apply(model, context) == 0
    assert not context.refusals


class PRepBN(nn.Module):
    """Guo et al. 2024 (SLAB): batch norm plus a scaled copy, over tokens, and the linear layer after it."""

    def __init__(self):
        super().__init__()
        self.bn, self.alpha, self.fc = nn.BatchNorm1d(8), nn.Parameter(torch.full((1,), 0.7)), nn.Linear(8, 6)

    def forward(self, x):
        x = x.transpose(1, 2)
        return self.fc((self.bn(x) + self.alpha * x).transpose(1, 2))


class LayerScaled(nn.Module):
    """A residual branch of CaiT (Touvron et al. 2021) whose normalized input is scaled by a temperature."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.gamma = nn.Parameter(torch.linspace(-1, 1, 8))

    def forward(self, x):
        return x + self.gamma * self.fc2(nn.functional.gelu(self.fc1(self.norm(x) * 0.5)))


@pytest.mark.parametrize(("module", "count", "left"), [(PRepBN(), 1, 0), (LayerScaled(), 2, 0)], ids=["slab", "cait"])
def test_block(trace, module, count, left):
    model = trace(module, (2, 5, 8))
    infer_shapes(model)
    size = len(model.graph)
    assert FoldScale().apply(model, Context()) == count
    assert operators(model).count("Mul") == left
    assert len(model.graph) < size
    if isinstance(module, PRepBN):
        assert FoldInputAffine().apply(model, Context()) == 1
        assert operators(model) == ["MatMul", "Add"]
    x = torch.randn(2, 5, 8, dtype=torch.float64) + 0.3
    (given,) = interpret(model, {model.graph.inputs[0].name: x.numpy()}, dtype="float64").values()
    expected = module.double()(x).detach().numpy()
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
