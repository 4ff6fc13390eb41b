"""`drop-repeated` against the interpreter in float64: values that cannot be negative, lengths that cancel, and what stops either."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from edgekit.contracts import Context, Effect
from edgekit.graph.interpreter import run
from edgekit.passes.reparameterize.drop_repeated import DropRepeated

ARRAYS = {
    "last": np.array([-1]),
    "first": np.array([0]),
    "zero": np.array([0]),
    "four": np.array([4]),
    "floor": np.float32(1e-12),
    "high": np.float32(0.1),
    "shape": np.array([2, 8]),
    "half": np.float32(0.5),
    "minus": np.float32(-0.5),
    "spots": np.array([3, 1]),
}


def graph(nodes, outputs="float[2,4] y", inputs="float[2,8] x"):
    return f"g ({inputs}) => ({outputs}) {{ {nodes} }}"


@pytest.fixture
def make(build):
    def made(text):
        words = text.replace(",", " ").replace(")", " ").split()
        return build(text, {name: array for name, array in ARRAYS.items() if name in words})

    return made


def feeds_of(model, seed=0):
    rng = np.random.default_rng(seed)
    feeds = {value.name: rng.normal(size=list(value.shape)).astype(np.float32) for value in model.graph.inputs}
    feeds["x"].reshape(-1, feeds["x"].shape[-1])[0] = 0  # the zero vector
    return feeds


@pytest.fixture
def dropped(make, operators):
    def check(text, expected, count=1):
        model = make(text)
        feeds = feeds_of(model)
        references, context = run(model, feeds, dtype="float64"), Context()
        names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
        assert DropRepeated().apply(model, context) == count == len(context.rewrites), context.refusals
        assert operators(model) == expected
        assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == names
        for name, result in run(model, feeds, dtype="float64").items():
            np.testing.assert_allclose(result, references[name], rtol=1e-10, atol=1e-12)
        assert DropRepeated().apply(model, Context()) == 0

    return check


@pytest.fixture
def kept(make):
    def check(text, why=""):
        model, context = make(text), Context()
        before = ir.to_proto(model).SerializeToString()
        assert DropRepeated().apply(model, context) == 0
        assert ir.to_proto(model).SerializeToString() == before
        assert any(why in refusal.why for refusal in context.refusals) if why else context.refusals == [], context.refusals

    return check


def norm(x, y, floor="floor", limit="Clip", width=8):
    """Text of y = x / max(‖x‖, floor)."""
    limited = f"c{y} = {limit}(l{y}, {floor}) " if floor else f"c{y} = Identity(l{y}) "
    return f"l{y} = ReduceL2(x{x}, last) {limited} x{y} = Div(x{x}, c{y}) ".replace(f"c{y} = Identity(l{y})", "").replace(
        f"x{y} = Div(x{x}, c{y})", f"x{y} = Div(x{x}, {f'c{y}' if floor else f'l{y}'})"
    )


def test_declaration():
    assert (DropRepeated.name, DropRepeated.effect, DropRepeated.default_order) == ("drop-repeated", Effect.EXACT, None)


@pytest.mark.parametrize(
    ("between", "shape"),
    [
        ("b = Identity(a)", "2,8"),
        ("b = Transpose<perm=[1,0]>(a)", "8,2"),
        ("b = Slice(a, zero, four, last)", "2,4"),
        ("s = Sigmoid(x) p = Mul(a, s) q = Add(p, half) b = Concat<axis=1>(a, q)", "2,16"),
        ("b = ReduceMean(a, last)", "2,1"),
        ("b = Gather(a, zero)", "1,8"),
    ],
)
def test_activation_of_what_is_not_negative(dropped, between, shape):
    nodes = f"a = Relu(x) {between} r = Relu(b) y = Sqrt(r)"
    model_operators = {line.split("(")[0].split("<")[0].strip().split()[-1] for line in nodes.split(" = ")[1:]}
    expected = dict.fromkeys(model_operators, 1) | {"Relu": 1}
    dropped(graph(nodes, f"float[{shape}] y"), expected)


def test_activation_whose_result_is_given_out(dropped, kept):
    dropped(graph("a = Sigmoid(x) y = Relu(a)", "float[2,8] y"), {"Sigmoid": 1})
    kept(graph("a = Sigmoid(x) y = Relu(a)", "float[2,8] y, float[2,8] a"), "given out under different names")


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Relu(x)",
        "a = Relu(x) b = Add(a, minus) y = Relu(b)",
        "a = Relu(x) b = Sub(a, half) y = Relu(b)",
        "a = Relu(x) b = Neg(a) y = Relu(b)",
        "a = Clip(x, minus) y = Relu(a)",
        "a = Tanh(x) y = Abs(a)",
        "a = Relu(x) b = Mul(a, x) y = Relu(b)",
    ],
)
def test_activation_that_does_something_stays(kept, nodes):
    kept(graph(nodes, "float[2,8] y"))


def test_first_of_two_normalizations(dropped):
    dropped(graph(norm("", 1) + norm(1, 2).replace("x2 =", "y ="), "float[2,8] y"), {"ReduceL2": 1, "Clip": 1, "Div": 1})
    sliced = norm("", 1) + "x2 = Slice(x1, zero, four, last) " + norm(2, 3).replace("x3 =", "y =")
    dropped(graph(sliced), {"ReduceL2": 1, "Clip": 1, "Div": 1, "Slice": 1})
    expanded = sliced.replace("c1 = Clip(l1, floor)", "e1 = Max(l1, floor) c1 = Expand(e1, shape)")
    dropped(graph(expanded), {"ReduceL2": 1, "Clip": 1, "Div": 1, "Slice": 1})
    dropped(graph("a = LpNormalization<axis=1, p=2>(x) y = LpNormalization(a)", "float[2,8] y"), {"LpNormalization": 1})
    thrice = norm("", 1) + norm(1, 2) + norm(2, 3).replace("x3 =", "y =")
    dropped(graph(thrice, "float[2,8] y"), {"ReduceL2": 1, "Clip": 1, "Div": 1}, 2)


def test_normalization_read_elsewhere_stays(kept):
    twice = norm("", 1) + norm(1, 2).replace("x2 =", "y =")
    kept(graph(twice, "float[2,8] y, float[2,8] x1"), "read elsewhere")
    kept(graph(twice + "z = Relu(x1)", "float[2,8] y, float[2,8] z"), "read elsewhere")


def test_lengths_that_do_not_cancel_stay(kept):
    twice = norm("", 1) + norm(1, 2).replace("x2 =", "y =")
    kept(graph(twice.replace("c1 = Clip", "c1 = Add"), "float[2,8] y"), "a constant is added to the length")
    kept(graph(twice.replace("c2 = Clip", "c2 = Add"), "float[2,8] y"), "a constant is added to the length")
    kept(graph(twice.replace("Clip(l1, floor)", "Clip(l1, high)"), "float[2,8] y"), "vectors shorter than 0.1")
    kept(graph(norm("", 1, floor="") + norm(1, 2).replace("x2 =", "y ="), "float[2,8] y"), "the zero vector gives NaN")
    kept(graph(twice.replace("ReduceL2(x1, last)", "ReduceL2(x1, first)"), "float[2,8] y"))
    kept(graph(twice.replace("ReduceL2(x1, last)", "ReduceL1(x1, last)"), "float[2,8] y"))
    kept(graph(norm("", 1) + "x2 = Add(x1, half) " + norm(2, 3).replace("x3 =", "y ="), "float[2,8] y"))
    kept(graph("a = LpNormalization<p=1>(x) y = LpNormalization(a)", "float[2,8] y"))


def test_skipped_place_is_left_alone(make):
    text = graph("a = Sigmoid(x) y = Relu(a)", "float[2,8] y")
    assert DropRepeated().apply(make(text), Context(skip=frozenset({"Relu_1"}))) == 0


def test_traced_normalizations(trace, operators):
    class Twice(nn.Module):
        def forward(self, x):
            return functional.normalize(functional.normalize(x, dim=-1)[:, :3], dim=-1)

    model = trace(Twice(), (2, 8))
    assert DropRepeated().apply(model, Context()) == 1
    assert operators(model)["Div"] == operators(model)["ReduceL2"] == 1


CHAIN = ("Relu", "Abs", "Sigmoid", "Neg", "Tanh", "norm", "slice", "half", "sum")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(CHAIN), min_size=2, max_size=7), st.sampled_from(["floor", "high", ""]), st.integers(0, 99))
def test_random_chains(build, kinds, floor, seed):
    nodes, width = "", 8
    for index, kind in enumerate(kinds):
        x, y = f"x{index or ''}", f"x{index + 1}"
        if kind == "norm":
            nodes += norm(index or "", index + 1, floor)
        elif kind == "slice":
            width = max(width - 2, 2)
            limit = {2: "two", 4: "four", 6: "six"}[width]
            nodes += f"{y} = Slice({x}, zero, {limit}, last) "
        elif kind == "half":
            nodes += f"{y} = Mul({x}, half) "
        elif kind == "sum":
            nodes += f"{y} = Add({x}, {x}) "
        else:
            nodes += f"{y} = {kind}({x}) "
    text = graph(nodes + f"y = Identity(x{len(kinds)})", f"float[2,{width}] y")
    arrays = ARRAYS | {"two": np.array([2]), "six": np.array([6])}
    words = text.replace(",", " ").replace(")", " ").split()
    model = build(text, {name: array for name, array in arrays.items() if name in words})
    feeds = feeds_of(model, seed)
    (reference,) = run(model, feeds, dtype="float64").values()
    size = len(model.graph)
    count = DropRepeated().apply(model, Context())
    assert len(model.graph) <= size - count
    (result,) = run(model, feeds, dtype="float64").values()
    np.testing.assert_allclose(result, reference, rtol=1e-10, atol=1e-12)
    assert DropRepeated().apply(model, Context()) == 0
