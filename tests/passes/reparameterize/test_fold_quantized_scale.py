"""`fold-quantized-scale` against the interpreter in float64 on the graph before it, in random layers and in all that stops it."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.contracts import Context, Effect
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import Interpreter
from edgekit.passes.reparameterize.fold_quantized_scale import FoldQuantizedScale

RNG = np.random.default_rng(0)
ARRAYS = {
    "q": RNG.integers(-127, 127, (8, 4)).astype(np.int8),
    "k": RNG.integers(-127, 127, (4, 2, 3, 3)).astype(np.int8),
    "s": RNG.uniform(0.01, 0.1, 4).astype(np.float32),
    "s1": np.float32(0.05),
    "rows": RNG.uniform(0.01, 0.1, 8).astype(np.float32),
    "blocks": RNG.uniform(0.01, 0.1, (2, 4)).astype(np.float32),
    "z": RNG.integers(-9, 9, 4).astype(np.int8),
    "z1": np.int8(3),
    "zrows": np.zeros(8, np.int8),
    "a": RNG.uniform(0.5, 2, 4).astype(np.float32),
    "a3": RNG.uniform(0.5, 2, (4, 1, 1)).astype(np.float32),
    "half": np.float32(0.5),
    "minus": np.float32(-1),
    "mixed": np.array([1, -1, 2, 0], np.float32),
    "tiny": np.full(4, 1e-37, np.float32),
    "huge": np.full(4, 1e38, np.float32),
    "spread": RNG.uniform(0.5, 2, (3, 1)).astype(np.float32),
    "b": RNG.normal(size=4).astype(np.float32),
    "b3": RNG.normal(size=(4, 1, 1)).astype(np.float32),
    "v": RNG.uniform(0.2, 1, 4).astype(np.float32),
}
LINEAR = ("float[2,3,8] x", "float[2,3,4] y")
IMAGE = ("float[1,2,6,6] x", "float[1,4,4,4] y")


def graph(nodes, shapes=LINEAR, outputs=""):
    return f"g ({shapes[0]}) => ({shapes[1]}{outputs}) {{ {nodes} }}"


@pytest.fixture
def make(build):
    def made(text, **changed):
        words = text.split("=>", 1)[1].replace(",", " ").replace("(", " ").replace(")", " ").split()
        return build(text, {n: array for n, array in (ARRAYS | changed).items() if n in words and f" {n})" not in text.split("=>")[0]})

    return made


def results(model, x):
    return {name: value.numpy() for name, value in Interpreter(model, dtype="float64")({"x": x}).items()}


def check_same(model, reference, x):
    for name, value in results(model, x).items():
        np.testing.assert_allclose(value, reference[name], rtol=0, atol=1e-6 * np.abs(reference[name]).max())


@pytest.fixture
def folded(make, operators):
    def check(text, expected, count=1):
        model = make(text)
        x = np.random.default_rng(1).normal(size=list(model.graph.inputs[0].shape)).astype(np.float32)
        reference, context, before = results(model, x), Context(), cost(model)
        weights = [node.inputs[0].const_value.numpy().copy() for node in model.graph if node.op_type == "DequantizeLinear"]
        assert FoldQuantizedScale().apply(model, context) == count == len(context.rewrites), context.refusals
        assert operators(model) == expected
        check_same(model, reference, x)
        for node, weight in zip([n for n in model.graph if n.op_type == "DequantizeLinear"], weights, strict=True):
            np.testing.assert_array_equal(node.inputs[0].const_value.numpy(), weight)
        assert cost(model).macs == before.macs
        assert [value.name for value in model.graph.outputs] == ["y"]
        assert all(value.uses() for value in model.graph.initializers.values())
        assert FoldQuantizedScale().apply(model, Context()) == 0
        return model

    return check


@pytest.fixture
def refused(make):
    def check(text, why="", **changed):
        model, context = make(text, **changed), Context()
        before = ir.to_proto(model).SerializeToString()
        assert FoldQuantizedScale().apply(model, context) == 0
        assert ir.to_proto(model).SerializeToString() == before
        assert any(why in refusal.why for refusal in context.refusals) if why else context.refusals == [], context.refusals

    return check


def test_declaration():
    declared = FoldQuantizedScale.name, FoldQuantizedScale.effect, FoldQuantizedScale.default_order
    assert declared == ("fold-quantized-scale", Effect.EXACT, None)


@pytest.mark.parametrize("end", ["y = Mul(m, a)", "y = Mul(a, m)", "y = Div(m, a)", "y = Mul(m, half)"])
def test_scaling_after_a_product(folded, end):
    model = folded(graph(f"w = DequantizeLinear<axis=1>(q, s, z) m = MatMul(x, w) {end}"), {"DequantizeLinear": 1, "MatMul": 1})
    np.testing.assert_array_equal(model.graph[0].inputs[2].const_value.numpy(), ARRAYS["z"])
    if end == "y = Mul(m, a)":  # the factor is in the scale, rounded once
        np.testing.assert_array_equal(model.graph[0].inputs[1].const_value.numpy(), ARRAYS["s"] * ARRAYS["a"])


@pytest.mark.parametrize("bias", ["Add(m, b)", "Add(b, m)", "Sub(m, b)"])
def test_scaling_after_a_bias(folded, bias):
    kept = {"DequantizeLinear": 1, "MatMul": 1, bias.split("(")[0]: 1}
    folded(graph(f"w = DequantizeLinear<axis=1>(q, s) m = MatMul(x, w) c = {bias} y = Mul(c, a)"), kept)


def test_batch_norm_after_a_layer_with_bias(folded, refused):
    nodes = "w = DequantizeLinear<axis=1>(q, s, z) m = MatMul(x, w) c = Add(m, b) y = BatchNormalization(c, a, b, b, v)"
    shapes = ("float[3,8] x", "float[3,4] y")
    folded(graph(nodes, shapes), {"DequantizeLinear": 1, "MatMul": 1, "Add": 1})
    refused(graph(nodes.replace("c = Add(m, b)", "").replace("(c,", "(m,"), shapes), "it shifts, and the layer has no bias")


@pytest.mark.parametrize(
    "end", ["m = Conv(x, w)", "m = Conv(x, w, b)", "n = Conv(x, w, b) m = Add(n, b3)", "n = Conv(x, w) m = Sub(n, b3)"]
)
def test_scaling_after_a_convolution(folded, end):
    kept = {"DequantizeLinear": 1, "Conv": 1} | {name: 1 for name in ("Add", "Sub") if name in end}
    folded(graph(f"w = DequantizeLinear<axis=0>(k, s, z) {end} y = Mul(m, a3)", IMAGE), kept)


def test_one_scale_becomes_one_per_channel_only_where_it_must(folded):
    model = folded(graph("w = DequantizeLinear(q, s1, z1) m = MatMul(x, w) y = Mul(m, a)"), {"DequantizeLinear": 1, "MatMul": 1})
    assert [value.shape for value in model.graph[0].inputs[1:]] == [[4], [4]]
    assert model.graph[0].attributes["axis"].as_int() == 1
    assert (model.graph[0].inputs[2].const_value.numpy() == 3).all()
    model = folded(graph("w = DequantizeLinear(q, s1, z1) m = MatMul(x, w) y = Mul(m, half)"), {"DequantizeLinear": 1, "MatMul": 1})
    assert [value.shape for value in model.graph[0].inputs[1:]] == [[], []]


def test_scales_in_blocks(folded):
    text = "w = DequantizeLinear<axis=0, block_size=4>(q, blocks) m = MatMul(x, w) y = Mul(m, a)"
    folded(graph(text), {"DequantizeLinear": 1, "MatMul": 1})


def test_weights_of_four_bits(folded, make, build):
    small = (ARRAYS["q"] // 16).astype(ml_dtypes.int4)
    model = make(graph("w = DequantizeLinear<axis=1>(q, s) m = MatMul(x, w) y = Mul(m, a)"), q=np.zeros((8, 4), np.int8))
    quantized = ir.Tensor(small, name="q")
    model.graph.initializers["q"].const_value = quantized
    model.graph.initializers["q"].type = ir.TensorType(quantized.dtype)
    assert FoldQuantizedScale().apply(model, Context()) == 1
    np.testing.assert_array_equal(model.graph[0].inputs[0].const_value.numpy(), small)


def test_conditions(refused):
    start = "w = DequantizeLinear<axis=1>(q, s, z) m = MatMul(x, w) "
    refused(graph(start + "y = Mul(m, spread)"), "varies along axis 1")
    refused(graph(start + "y = Mul(m, mixed)"), "would not be positive")
    refused(graph(start + "y = Neg(m)"), "would not be positive")
    refused(graph(start + "y = Mul(m, tiny)"), "full precision in float32")
    refused(graph(start + "y = Mul(m, huge)"), "full precision in float32", s=np.full(4, 10, np.float32))
    refused(graph(start + "y = Mul(m, a)", outputs=", float[2,3,4] m"), "the output of MatMul 'MatMul_1' is read elsewhere")
    refused(graph(start + "y = Mul(m, a) t = Relu(x) r = MatMul(t, w)", outputs=", float[2,3,4] r"), "dequantized weight")
    rows = "w = DequantizeLinear<axis=0>(q, rows, zrows) m = MatMul(x, w) y = Mul(m, a)"
    refused(graph(rows), "no number per output channel")
    refused(graph(start + "c = Mul(m, m) y = Mul(c, a)"))
    refused(graph(start + "y = Add(m, b)"))
    refused(graph("m = MatMul(x, f) y = Mul(m, a)"), f=np.ones((8, 4), np.float32))
    refused(graph("d = DequantizeLinear(q, s1) t = Relu(d) m = MatMul(x, t) y = Mul(m, a)"))


def test_weights_that_are_given_or_computed_are_refused(refused):
    inputs = ("float[2,3,8] x, int8[8,4] q", LINEAR[1])
    refused(graph("w = DequantizeLinear<axis=1>(q, s, z) m = MatMul(x, w) y = Mul(m, a)", inputs), "quantized weight of MatMul 'MatMul_1'")
    inputs = ("float[2,3,8] x, float[4] s", LINEAR[1])
    refused(graph("w = DequantizeLinear<axis=1>(q, s, z) m = MatMul(x, w) y = Mul(m, a)", inputs), "scale or zero point is not a constant")


def test_scales_that_two_layers_share_are_not_changed_for_the_other(make):
    nodes = "w = DequantizeLinear<axis=1>(q, s, z) m = MatMul(x, w) y = Mul(m, a) t = Relu(x) "
    nodes += "u = DequantizeLinear<axis=1>(q, s, z) r = MatMul(t, u)"
    model = make(graph(nodes, outputs=", float[2,3,4] r"))
    x = np.random.default_rng(2).normal(size=(2, 3, 8)).astype(np.float32)
    reference = results(model, x)
    assert FoldQuantizedScale().apply(model, Context()) == 1
    check_same(model, reference, x)


def test_skipped_place_is_left_alone(make):
    model = make(graph("w = DequantizeLinear<axis=1>(q, s, z) m = MatMul(x, w) y = Mul(m, a)"))
    assert FoldQuantizedScale().apply(model, Context(skip=frozenset({"Mul_2"}))) == 0


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1))
def test_random_layers(build, seed):
    rng = np.random.default_rng(seed)
    conv = bool(rng.integers(2))
    inner, out = (int(n) for n in rng.integers(1, 7, 2))
    axis, shape = (0, (out, inner, 2, 1)) if conv else (1, (inner, out))
    unsigned = bool(rng.integers(2))
    integers = rng.integers(0, 255, shape).astype(np.uint8) if unsigned else rng.integers(-128, 127, shape).astype(np.int8)
    form = rng.choice(["one", "vector", "channel", "rows"])
    scale_shape = {"one": (), "vector": (1,), "channel": (out,), "rows": (shape[1 - axis],)}[form]
    arrays = {"q": integers, "s": rng.uniform(0.01, 1, scale_shape).astype(np.float32)}
    quantized = "q, s"
    if rng.integers(2):
        arrays["z"] = rng.integers(0, 9, scale_shape).astype(integers.dtype)
        quantized += ", z"
    at = 1 - axis if form == "rows" else axis
    lines = [f"w = DequantizeLinear<axis={at if rng.integers(2) else at - len(shape)}>({quantized})"]
    tail = (1, 1) if conv else ()
    with_bias = conv and bool(rng.integers(2))
    lines.append(f"v0 = {'Conv' if conv else 'MatMul'}(x, w{', b' if with_bias else ''})")
    if with_bias:
        arrays["b"] = rng.normal(size=out).astype(np.float32)
    for index in range(int(rng.integers(1, 4))):
        kind = rng.choice(["Mul", "Div", "Add", "Sub"])
        constant = rng.uniform(0.2, 2, (out, *tail) if rng.integers(2) else ()) * rng.choice([1, 1, 1, -1])
        arrays[f"c{index}"] = constant.astype(np.float32)
        lines.append(f"v{index + 1} = {kind}(v{index}, c{index})")
    sizes = f"2,{inner},4,3" if conv else f"2,3,{inner}"
    result = f"2,{out},3,3" if conv else f"2,3,{out}"
    text = f"g (float[{sizes}] x) => (float[{result}] y) {{ {' '.join(lines)} y = Relu(v{len(lines) - 2}) }}"
    model = build(text, arrays)
    x = rng.normal(size=[int(n) for n in sizes.split(",")]).astype(np.float32)
    reference = results(model, x)
    nodes = len(model.graph)
    count = FoldQuantizedScale().apply(model, Context())
    assert len(model.graph) == nodes - count
    for name, value in results(model, x).items():
        np.testing.assert_allclose(value, reference[name], rtol=0, atol=1e-5 * max(np.abs(reference[name]).max(), 1e-3))
    assert FoldQuantizedScale().apply(model, Context()) == 0
