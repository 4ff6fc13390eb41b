"""Every rule of `fold-input-affine` against the graph before it in float64, and every condition under which it must not act."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from edgekit.contracts import Context, Effect
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.interpreter import run as interpret
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.fold_input_affine import FoldInputAffine


def norm_arrays(rng, channels, prefix=""):
    """Scale of either sign, mean off zero, variance in [0.1, 1.1]."""
    return {
        f"{prefix}s": rng.uniform(-1, 1, channels),
        f"{prefix}t": rng.normal(size=channels),
        f"{prefix}m": rng.normal(0.5, 1, channels),
        f"{prefix}v": rng.uniform(0.1, 1.1, channels),
    }


def elements(model):
    return sum(math.prod(value.shape) for value in model.graph.initializers.values() if value.dtype.is_floating_point())


@pytest.fixture(scope="session")
def folded(build):
    """Returns a check that the pass keeps the function, makes nothing dearer and is idempotent; it gives the model and the context."""

    def check(text, arrays, *, count=None, kind="float", new_bias=0):
        dtype = {"float": np.float32, "double": np.float64, "float16": np.float16}[kind]
        cast = {
            name: array.astype(dtype) if array.dtype.kind == "f" and name not in ("r", "roi") else array for name, array in arrays.items()
        }
        model = build(text.replace("float[", f"{kind}["), cast)
        before = model.clone()
        generator = np.random.default_rng(1)
        feeds = {value.name: generator.normal(0.3, 1, tuple(value.shape)).astype(dtype) for value in model.graph.inputs}
        context = Context()
        found = FoldInputAffine().apply(model, context)
        assert found == len(context.rewrites)
        assert count is None or found == count, context.refusals
        infer_shapes(model)
        expected, given = interpret(before, feeds, dtype="float64"), interpret(model, feeds, dtype="float64")
        bound = {"float": 1e-5, "double": 1e-10, "float16": 1e-2}[kind]
        for name, array in expected.items():
            np.testing.assert_allclose(given[name], array, rtol=0, atol=bound * (np.abs(array).max() + 1e-30))
        assert len(model.graph) <= len(before.graph)
        assert elements(model) <= elements(before) + new_bias
        state = fingerprint(model)
        assert FoldInputAffine().apply(model, Context()) == 0
        assert fingerprint(model) == state
        return model, context

    return check


@pytest.fixture(scope="session")
def refused(folded):
    """Returns a check that the pass leaves a graph as it is and says why (None: it has nothing to say)."""

    def check(text, arrays, why, kind="float"):
        model, context = folded(text, arrays, count=0, kind=kind)
        if why is None:
            assert not context.refusals
        else:
            assert any(why in refusal.why for refusal in context.refusals), context.refusals
        return model

    return check


def operators(model):
    return [node.op_type for node in model.graph]


def test_declaration():
    assert (FoldInputAffine.name, FoldInputAffine.effect, FoldInputAffine.default_order) == ("fold-input-affine", Effect.EXACT, None)


# Random graphs: an affine map, operators after it, several readers


@st.composite
def affine_maps(draw, rng, channels):
    """Text of nodes from x `[2, C, 6, 4]` to `a`, and their constants."""
    kind = draw(st.sampled_from(["norm", "mul", "add", "both", "standardize", "neg", "norm_mul", "shift_mul", "left", "zero_mean"]))
    column = rng.uniform(0.5, 2, (channels, 1, 1)) * rng.choice([-1, 1], (channels, 1, 1))
    arrays = {"k": column, "q": rng.normal(size=(channels, 1, 1)), "u": np.array(0.4), "d": np.array(3.0)}
    text = {
        "norm": "a = BatchNormalization(x, s, t, m, v)",
        "zero_mean": "a = BatchNormalization(x, s, z, z, v)",
        "mul": "a = Mul(k, x)",
        "add": "a = Add(x, q)",
        "both": "a0 = Mul(x, k)  a = Add(q, a0)",
        "standardize": "a0 = Div(x, d)  a1 = Sub(a0, u)  a = Div(a1, d)",
        "neg": "a = Neg(x)",
        "norm_mul": "a0 = BatchNormalization(x, s, t, m, v)  a = Mul(a0, k)",
        "shift_mul": "a0 = Add(x, u)  a = Mul(a0, k)",
        "left": "a = Sub(q, x)",
    }[kind]
    arrays |= norm_arrays(rng, channels) | {"z": np.zeros(channels)}
    return text, {
        name: array for name, array in arrays.items() if name in text.replace("(", " ").replace(",", " ").replace(")", " ").split()
    }


PATHS = {
    "none": ("a", ""),
    "identity": ("p", "p = Identity(a)"),
    "average": ("p", "p = AveragePool<kernel_shape=[3,2], strides=[2,1], pads=[1,0,1,1]>(a)"),
    "average_counting_pads": ("p", "p = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0], count_include_pad=1>(a)"),
    "average_ceil": ("p", "p = AveragePool<kernel_shape=[4,3], strides=[3,2], ceil_mode=1>(a)"),
    "max": ("p", "p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(a)"),
    "relu": ("p", "p = Relu(a)"),
    "nearest": ("p", 'p = Resize<mode="nearest">(a, , r)'),
    "linear": ("p", 'p = Resize<mode="linear", coordinate_transformation_mode="align_corners">(a, , , rs)'),
    "cubic": ("p", 'p = Resize<mode="cubic">(a, , r)'),
    "crop_and_resize": ("p", 'p = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(a, roi, r)'),
    "reflect": ("p", 'p = Pad<mode="reflect">(a, pads)'),
    "edge": ("p", 'p = Pad<mode="edge">(a, two, , axes)'),
    "zeros": ("p", "p = Pad(a, pads)"),
    "fives": ("p", "p = Pad(a, pads, five)"),
    "slice": ("p", "p = Slice(a, low, high, one)"),
    "reverse": ("p", "p = Slice(a, last, start, one, back)"),
    "gather": ("p", "p = Gather<axis=1>(a, order)"),
    "split": ("p", "p, p2 = Split<axis=1, num_outputs=2>(a)"),
    "concat": ("p", "p = Concat<axis=1>(o, a, a)"),
    "concat_space": ("p", "p = Concat<axis=2>(a, o)"),
    "expand": ("p", "p = Expand(a, same)"),
    "depth_to_space": ("p", 'p = DepthToSpace<blocksize=2, mode="CRD">(a)'),
    "space_to_depth": ("p", "p = SpaceToDepth<blocksize=2>(a)"),
    "sigmoid": ("p", "p = Sigmoid(a)"),
    "global": ("p", "p = GlobalAveragePool(a)"),
    "mean": ("p", "p = ReduceMean<keepdims=1>(a, axes)"),
    "transpose": ("p", "p = Transpose<perm=[0,1,3,2]>(a)"),
}
SHAPE_CONSTANTS = {
    "r": np.array([1, 1, 2, 1.5], np.float32), "rs": np.array([2, 4, 9, 4]), "roi": np.array([0, 0, 0, 0, 1, 1, 2, 2], np.float32),
    "pads": np.array([0, 0, 1, 2, 0, 0, 0, 1]), "two": np.array([1, 2, 0, 1]), "axes": np.array([2, 3]), "five": np.array(5.0, np.float32),
    "low": np.array([1]), "high": np.array([3]), "one": np.array([1]), "last": np.array([-1]), "start": np.array([-100]),
    "back": np.array([-1]), "order": np.array([3, 0, -2, 1]), "same": np.array([2, 4, 1, 1]),
}  # fmt: skip


_SHAPES = {}


def shape_after(build, path):
    if path not in _SHAPES:
        value, between = PATHS[path]
        text = f"g (float[2,4,6,4] x, float[2,4,6,4] o) => (float[n,c,h,w] {value}) {{ a = Neg(x) {between} }}"
        _SHAPES[path] = tuple(build(text, SHAPE_CONSTANTS).graph.outputs[0].shape)
    return _SHAPES[path]


@st.composite
def conv_readers(draw, rng, name, shape):
    """Text of a Conv, ConvTranspose or Linear that reads `name` of `shape` and makes y, and its weights."""
    channels = shape[1]
    bias, out, index = draw(st.booleans()), draw(st.sampled_from([2, 4])), draw(st.integers(0, 10**6))
    w, b = f"w{index}", f"b{index}"
    arrays = {b: rng.normal(size=out)} if bias else {}
    kind = draw(st.sampled_from(["conv", "conv", "conv", "transpose", "tokens", "gemm"]))
    if kind == "tokens":
        arrays[w] = rng.normal(size=(channels, out))
        last = f"l{index} = MatMul(h{index}, {w})  y{index} = Add({b}, l{index})" if bias else f"y{index} = MatMul(h{index}, {w})"
        arrays[f"n{index}"] = np.array([shape[0], channels, -1])
        text = f"f{index} = Reshape({name}, n{index})  h{index} = Transpose<perm=[0,2,1]>(f{index})  {last}"
        return text, arrays, index, 3
    if kind == "gemm":
        arrays[w] = rng.normal(size=(out, channels))
        text = f"""g{index} = ReduceMean<keepdims=0>({name}, axes)
            y{index} = Gemm<transB=1, alpha=0.5, beta=2.0>(g{index}, {w}{f", {b}" if bias else ""})"""
        return text, arrays, index, 2
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0 and out % g == 0]))
    kernel = [draw(st.integers(1, min(3, size))) for size in shape[2:4]]
    strides, dilations = [draw(st.integers(1, 2)) for _ in "hw"], [1, 1]
    pads = [draw(st.sampled_from([0, 0, 1])) for _ in range(4)]
    arrays[w] = rng.normal(size=(out, channels // groups, *kernel) if kind == "conv" else (channels, out // groups, *kernel))
    operator = "Conv" if kind == "conv" else "ConvTranspose"
    if kind == "transpose":
        pads = [0, 0, 0, 0]
    attributes = f"group={groups}, strides={strides}, dilations={dilations}, pads={pads}"
    return f"y{index} = {operator}<{attributes}>({name}, {w}{f', {b}' if bias else ''})", arrays, index, 4


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_random_maps_paths_and_readers(folded, build, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    before, arrays = data.draw(affine_maps(rng, 4))
    path = data.draw(st.sampled_from(sorted(PATHS)))
    value, between = PATHS[path]
    arrays |= SHAPE_CONSTANTS
    head = "g (float[2,4,6,4] x, float[2,4,6,4] o) => (%s) { %s %s %s }"
    shape = shape_after(build, path)
    texts, outputs = [], {}
    readers = data.draw(st.integers(1, 3)) if len(shape) == 4 else 0
    for place in range(readers):
        name, of = (value, shape) if place == 0 or data.draw(st.booleans()) else ("a", (2, 4, 6, 4))
        text, weights, index, rank = data.draw(conv_readers(rng, name, of))
        if index in outputs:
            continue
        texts.append(text)
        outputs[index] = rank
        arrays |= weights
    used = " ".join([before, between, *texts])
    for mark in "(),":
        used = used.replace(mark, " ")
    arrays = {name: array for name, array in arrays.items() if name in used.split()}
    if not outputs:
        return
    sizes = {index: ",".join(f"n{index}_{axis}" for axis in range(rank)) for index, rank in outputs.items()}
    declared = ", ".join(f"float[{sizes[index]}] y{index}" for index in outputs)
    text = head % (declared, before, between, "  ".join(texts))
    kind = data.draw(st.sampled_from(["float", "double"]))
    folded(text, arrays, kind=kind, new_bias=16)


# Which readers, on graphs written out

NORM = "g (float[1,4,6,5] x) => (float[n,c,h,w] y) { a = BatchNormalization(x, s, t, m, v)  y = Conv(a, w) }"
TOKENS = "g (float[2,7,4] x) => (float[2,7,6] y) { a = LayerNormalization(x, s, t)  l = MatMul(a, w)  y = Add(l, b) }"


@pytest.fixture
def conv_arrays(rng):
    return {"w": rng.normal(size=(3, 4, 3, 3))} | norm_arrays(rng, 4)


@pytest.fixture
def token_arrays(rng):
    return {"s": rng.normal(size=4), "t": rng.normal(size=4), "w": rng.normal(size=(4, 6)), "b": rng.normal(size=6)}


def test_norm_before_conv_without_pads(folded, conv_arrays):
    model, _ = folded(NORM, conv_arrays, count=1)
    (conv,) = model.graph
    assert [tuple(value.shape) for value in conv.inputs[1:]] == [(3, 4, 3, 3), (3,)]
    assert conv.inputs[1].name == "w"


def test_chain_goes_as_one(folded, rng):
    arrays = {"d": np.array(255.0), "u": np.full((3, 1, 1), 0.5), "q": np.full((1, 3, 1, 1), 0.25), "w": rng.normal(size=(2, 3, 2, 2))}
    text = """g (float[1,3,6,6] x) => (float[n,c,h,w] y) {
        a = Div(x, d)  b = Sub(a, u)  c = Div(b, q)  y = Conv<strides=[2,2]>(c, w, e) }"""
    model, context = folded(text, arrays | {"e": rng.normal(size=2)}, count=1)
    assert operators(model) == ["Conv"]
    assert context.rewrites == ["Div_2"]


def test_padded_conv_after_standardized_image_reads_a_pad_of_the_mean(folded, rng):
    arrays = {"d": np.array(255.0), "u": np.full((3, 1, 1), 0.5), "q": np.full((3, 1, 1), 0.25), "w": rng.normal(size=(2, 3, 3, 3))}
    text = """g (float[1,3,6,6] x) => (float[n,c,h,w] y) {
        a = Div(x, d)  b = Sub(a, u)  c = Div(b, q)  y = Conv<strides=[2,2], auto_pad="SAME_UPPER">(c, w) }"""
    model, _ = folded(text, arrays, count=1)
    assert operators(model) == ["Pad", "Conv"]
    assert math.isclose(model.graph[0].inputs[2].const_value.numpy().item(), 127.5, rel_tol=1e-6)


def test_padded_conv_after_image_standardized_by_channel_reads_one_add(folded, rng):
    arrays = {"d": np.array(255.0), "u": rng.uniform(0.4, 0.5, (3, 1, 1)), "q": rng.uniform(0.2, 0.3, (3, 1, 1))}
    text = """g (float[1,3,9,9] x) => (float[n,c,h,w] y) {
        a = Div(x, d)  b = Sub(a, u)  c = Div(b, q)  y = Conv<pads=[1,1,1,1]>(c, w) }"""
    model, _ = folded(text, arrays | {"w": rng.normal(size=(8, 3, 3, 3))}, count=1)
    assert operators(model) == ["Add", "Conv"]


def test_table_of_biases_where_the_map_is_small(folded, refused, rng):
    arrays = {"w": rng.normal(size=(3, 8, 3, 2)), "b": rng.normal(size=3)} | norm_arrays(rng, 8)
    text = """g (float[1,8,2,3] x) => (float[n,c,h,w] y) {
        a = BatchNormalization(x, s, t, m, v)  y = Conv<pads=[1,1,1,0]>(a, w, b) }"""
    model, _ = folded(text, arrays, count=1)
    assert operators(model) == ["Conv", "Add"]
    assert len(model.graph[0].inputs) == 2
    refused(text.replace("8,2,3", "8,5,7"), arrays, "Conv 'Conv_1' pads with zeros after the shift")


def test_table_that_repeats_along_an_axis_is_stored_once(folded, rng):
    arrays = {"w": rng.normal(size=(3, 8, 3, 1))} | norm_arrays(rng, 8)
    text = """g (float[1,8,3,50] x) => (float[n,c,h,w] y) {
        a = BatchNormalization(x, s, t, m, v)  y = Conv<pads=[1,0,1,0]>(a, w) }"""
    model, _ = folded(text, arrays, count=1)
    assert tuple(model.graph[1].inputs[1].shape) == (1, 3, 3, 1)


def test_pure_scale_before_padded_convs(folded, rng):
    arrays = {"k": rng.normal(size=(4, 1, 1)), "w": rng.normal(size=(2, 2, 3, 3)), "u": rng.normal(size=(4, 3, 2, 2))}
    text = """g (float[1,4,5,6] x) => (float[n,c,h,w] y, float[n2,c2,h2,w2] z) {
        a = Mul(x, k)  y = Conv<group=2, pads=[1,2,1,0]>(a, w)  z = ConvTranspose<strides=[2,2]>(a, u) }"""
    model, _ = folded(text, arrays, count=1)
    assert operators(model) == ["Conv", "ConvTranspose"]


def test_expand_to_more_axes_and_squeeze(folded, rng):
    arrays = {
        "q": rng.normal(size=4),
        "w": rng.normal(size=(4, 6)),
        "b": rng.normal(size=6),
        "e": np.array([3, 2, 7, 4]),
        "n": np.array([0]),
    }
    text = """g (float[7,4] x) => (float[n0,n1,n2,n3] y) {
        a = Add(x, q)  u = Unsqueeze(a, n)  e2 = Expand(u, e)  l = MatMul(e2, w)  y = Add(b, l) }"""
    model, _ = folded(text, arrays, count=1)
    assert operators(model) == ["Unsqueeze", "Expand", "MatMul", "Add"] or "Reshape" in operators(model)


GIVES_Z = NORM.replace("=> (", "=> (float[1,4,6,5] z, ")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (NORM.replace("=> (", "=> (float[1,4,6,5] a, "), "'a' is an output of the graph"),
        (GIVES_Z.replace("}", " z = Sigmoid(a) }"), "Sigmoid 'Sigmoid_2' reads it"),
        (GIVES_Z.replace("}", " z = Relu(a) }"), "'z' is an output of the graph"),
        (GIVES_Z.replace("}", " z = Add(a, x) }"), "Add 'Add_2' reads it"),
        (NORM.replace("y = Conv(a", "r = Sqrt(a)  y = Conv(r"), None),
        (NORM.replace("x)", "x, float[3,4,3,3] w)"), "the weight of Conv 'Conv_1' is not a constant"),
        (NORM.replace("x)", "x, float[4] s)"), "scale is not a constant"),
        (NORM.replace("a = BatchNormalization", "a, rm, rv = BatchNormalization<training_mode=1>"), "training mode"),
        (NORM.replace("(a, w)", "(a, u)").replace("{ a", "{ u = Neg(w)  a"), "the weight of Conv 'Conv_2' is not a constant"),
        (NORM.replace("=> (", "=> (float[n,c,h,i] z, ").replace("}", " z = Conv(x, w) }"), "the weight of Conv 'Conv_1' is read elsewhere"),
        (NORM.replace("(a, w)", "(a, w, b)").replace("x)", "x, float[3] b)"), "the bias of Conv 'Conv_1' is not a constant"),
        (NORM.replace("y = Conv(a, w)", "y = ConvTranspose(a, u)"), "different number of taps"),
    ],
)  # fmt: skip
def test_norm_that_stays(refused, conv_arrays, rng, text, why):
    arrays = conv_arrays | {"b": rng.normal(size=3), "u": rng.normal(size=(4, 2, 3, 3))}
    head, body = text[text.index("(") : text.index("=>")], text[text.index("{") :].translate(str.maketrans("(),", "   ")).split()
    given = [name for name in arrays if f" {name})" in head or f" {name}," in head]
    feeds = {name: array for name, array in arrays.items() if name in body or name in given}
    if "u = Neg" in text:
        del feeds["u"]
    refused(text, feeds, why)


def test_reader_in_another_graph(build, conv_arrays):
    text = """g (float[1,4,6,5] x, bool c) => (float[n,c,h,w] y, float[1,4,6,5] z) {
        a = BatchNormalization(x, s, t, m, v)  y = Conv(a, w)
        z = If (c) <then_branch = one () => (float[1,4,6,5] p) { p = Neg(a) },
                    else_branch = two () => (float[1,4,6,5] q) { q = Abs(a) }> }"""
    model, context = build(text, {name: array.astype(np.float32) for name, array in conv_arrays.items()}), Context()
    assert FoldInputAffine().apply(model, context) == 0
    assert "in another graph reads it" in context.refusals[0].why


@pytest.mark.parametrize("value", [-1e-5, -2.0, math.nan])
def test_variance_without_square_root(build, conv_arrays, value):
    conv_arrays["v"][2] = value
    model, context = build(NORM, {name: array.astype(np.float32) for name, array in conv_arrays.items()}), Context()
    assert FoldInputAffine().apply(model, context) == 0
    assert "in channel 2" in context.refusals[0].why


def test_zero_scale_is_a_constant_input(folded, conv_arrays):
    conv_arrays["s"][:] = 0
    model, _ = folded(NORM, conv_arrays, count=1)
    assert operators(model) == ["Conv"]


def test_float16_folds_in_float64_and_not_where_it_overflows(folded, refused, conv_arrays):
    folded(NORM, conv_arrays, count=1, kind="float16")
    conv_arrays["w"][0, 0, 0, 0], conv_arrays["s"][0], conv_arrays["v"][0] = 6e4, 1.0, 0.0
    refused(NORM, conv_arrays, "would not be finite in float16", kind="float16")


def test_place_that_is_skipped(build, conv_arrays):
    model = build(NORM, {name: array.astype(np.float32) for name, array in conv_arrays.items()})
    context = Context(skip=frozenset({"BatchNormalization_0"}))
    assert FoldInputAffine().apply(model, context) == 0
    assert not context.refusals


def test_three_readers_without_biases(folded, refused, rng):
    """The shift would take three Adds in place of one norm; a pure scale takes none."""
    arrays = {name: rng.normal(size=(4, 4)) for name in "qku"} | {"d": rng.normal(size=(4,))}
    text = """g (float[2,7,4] x) => (float[2,7,4] a, float[2,7,4] b, float[2,7,4] c) {
        n0 = Mul(x, d)  a = MatMul(n0, q)  b = MatMul(n0, k)  c = MatMul(n0, u) }"""
    model, _ = folded(text, arrays, count=1)
    assert operators(model) == ["MatMul"] * 3
    refused(text.replace("Mul(x", "Add(x", 1), arrays, "3 new nodes")


def test_layer_norm_keeps_its_normalization(folded, token_arrays):
    model, _ = folded(TOKENS, token_arrays, count=1)
    assert operators(model) == ["LayerNormalization", "MatMul", "Add"]
    norm = model.graph[0]
    assert len(norm.inputs) == 2
    np.testing.assert_array_equal(norm.inputs[1].const_value.numpy(), np.ones(4))
    assert set(model.graph.initializers) == {"ones_4", "w", "b"}


def test_norms_of_one_size_share_their_ones(folded, rng):
    text = """g (float[2,7,4] x) => (float[2,7,4] y) {
        a = RMSNormalization(x, s)  b = MatMul(a, w)  c = RMSNormalization(b, t)  y = MatMul(c, u) }"""
    arrays = {"s": rng.normal(size=4), "t": rng.normal(size=4), "w": rng.normal(size=(4, 4)), "u": rng.normal(size=(4, 4))}
    model, _ = folded(text, arrays, count=2)
    assert sorted(model.graph.initializers) == ["ones_4", "u", "w"]


@pytest.mark.parametrize(
    ("norm", "why"),
    [
        ("GroupNormalization<num_groups=2>", "its scale and bias stay"),
        ("InstanceNormalization", "its scale and bias stay"),
    ],
)
def test_norms_over_space(folded, refused, rng, norm, why):
    text = f"g (float[2,4,5,3] x) => (float[n,c,h,w] y) {{ a = {norm}(x, s, t)  y = Conv<pads=[0,0,0,0]>(a, w, b) }}"
    arrays = {"s": rng.normal(size=4), "t": rng.normal(size=4), "w": rng.normal(size=(6, 4, 2, 2)), "b": rng.normal(size=6)}
    model, _ = folded(text, arrays, count=1)
    assert sorted(model.graph.initializers) == ["b", "ones_4", "w", "zeros_4"]
    refused(text.replace("0,0,0,0", "1,1,1,1"), arrays, why)
    folded(text.replace("0,0,0,0", "1,1,1,1"), arrays | {"t": np.zeros(4)}, count=1)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (TOKENS.replace("=> (", "=> (float[2,7,4] z, ").replace("}", " z = Add(a, x) }"), "Add 'Add_3' reads it"),
        (TOKENS.replace("  y = Add(l, b)", "").replace("l =", "y ="), "its scale and bias stay"),
        (TOKENS.replace("(x, s, t)", "(x, s, s)"), "its scale and bias stay"),
        (
            TOKENS.replace("MatMul(a, w)", "MatMul(a, x2)").replace("x)", "x, float[4,6] x2)"),
            "the weight of MatMul 'MatMul_1' is not a constant",
        ),
    ],
)
def test_layer_norm_that_keeps_scale_and_bias(refused, token_arrays, text, why):
    used = text.translate(str.maketrans("(),", "   ")).split()
    refused(text, {name: array for name, array in token_arrays.items() if name in used}, why)


# Blocks of published networks


class Attention(nn.Module):
    """As timm's: one product for queries, keys and values."""

    def __init__(self, width, heads, bias=True):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))


class Transformer(nn.Module):
    """A block of ViT (Dosovitskiy et al. 2021) and the head on its class token."""

    def __init__(self):
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(8), Attention(8, 2), nn.LayerNorm(8)
        self.fc1, self.fc2, self.norm, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))
        return self.head(self.norm(x)[:, 0])


class ConvAttention(nn.Module):
    """FastViT's attention on a map (Vasu et al. 2023): a batch norm, then tokens, then qkv without bias."""

    def __init__(self):
        super().__init__()
        self.norm, self.attn = nn.BatchNorm2d(8), Attention(8, 2, bias=False)

    def forward(self, x):
        y = self.norm(x)
        b, c, h, w = y.shape
        return x + self.attn(y.flatten(2).transpose(-2, -1)).transpose(-2, -1).reshape(b, c, h, w)


class ReducedAttention(nn.Module):
    """Next-ViT's attention (Li et al. 2022): keys and values come from a pooled, normalized copy of the tokens."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2, self.pool = nn.BatchNorm2d(8), nn.BatchNorm1d(8), nn.AvgPool1d(4, 4)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        tokens = self.norm1(x).flatten(2).transpose(1, 2)
        q = self.q(tokens)
        small = self.norm2(self.pool(tokens.transpose(1, 2))).transpose(1, 2)
        q, k, v = (value.reshape(1, -1, 2, 4).transpose(1, 2) for value in (q, self.k(small), self.v(small)))
        return x.flatten(2).transpose(1, 2) + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TwoHeads(nn.Module):
    """RepViT's head (Wang et al. 2024): the mean of two batch norms with their classifiers."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])
        self.heads = nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])

    def forward(self, x):
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return (self.heads[0](self.norms[0](x)) + self.heads[1](self.norms[1](x))) / 2


@pytest.mark.parametrize(
    ("module", "shape", "count", "gone", "adds"),
    [
        (Transformer(), (2, 5, 8), 3, "", 0),
        (ConvAttention(), (1, 8, 4, 3), 1, "BatchNormalization", 1),
        (ReducedAttention(), (1, 8, 4, 4), 2, "BatchNormalization", 0),
        (TwoHeads(), (2, 8, 3, 3), 2, "BatchNormalization", 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_block(trace, module, shape, count, gone, adds):
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.uniform_(part.weight, -1, 1)
            nn.init.normal_(part.bias)
    model = trace(module, shape)
    infer_shapes(model)
    before, context = Counter(operators(model)), Context()
    assert FoldInputAffine().apply(model, context) == count, context.refusals
    after = Counter(operators(model))
    assert gone not in after
    assert after["Add"] == before["Add"] + adds
    assert after["LayerNormalization"] == before["LayerNormalization"]
    assert len(model.graph) <= sum(before.values())
    assert FoldInputAffine().apply(model, Context()) == 0
    x = torch.randn(shape, dtype=torch.float64) + 0.3
    (given,) = interpret(model, {model.graph.inputs[0].name: x.numpy()}, dtype="float64").values()
    expected = module.double()(x).detach().numpy()
    np.testing.assert_allclose(given, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_weights_keep_names_and_count_as_parameters(build, token_arrays):
    model = build(TOKENS, {name: array.astype(np.float32) for name, array in token_arrays.items()})
    for value in model.graph.initializers.values():
        value.metadata_props["edgekit.parameter"] = "1"
    FoldInputAffine().apply(model, Context())
    marked = {name for name, value in model.graph.initializers.items() if "edgekit.parameter" in value.metadata_props}
    assert marked == {"w", "b"}
