"""`merge-branches` against ONNX Runtime on the graph before it: blocks of known papers, random sums, and every condition that stops it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.contracts import Context, Effect
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import run as interpret
from edgekit.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from edgekit.passes.reparameterize.merge_branches import MergeBranches


@pytest.fixture
def arrays(rng):
    shapes = {
        "w3": (4, 4, 3, 3),
        "v3": (4, 4, 3, 3),
        "v1": (4, 4, 1, 1),
        "w1": (4, 4, 1, 1),
        "w13": (4, 4, 1, 3),
        "w31": (4, 4, 3, 1),
        "d3": (4, 1, 3, 3),
        "b": (4,),
        "k": (4, 1, 1),
    }
    norm = {"s": rng.uniform(-1, 1, 4), "t": rng.normal(size=4), "m": rng.normal(0.5, 1, 4), "v": rng.uniform(0.1, 1.1, 4)}
    return {name: array.astype(np.float32) for name, array in ({n: rng.normal(size=s) for n, s in shapes.items()} | norm).items()}


def text(nodes, inputs="float[1,4,7,5] x", outputs="float[1,4,7,5] y"):
    return f"g ({inputs}) => ({outputs}) {{ {nodes} }}"


@pytest.fixture
def used(arrays):
    """Returns the arrays whose names occur in a graph's text."""
    return lambda graph: {
        name: array for name, array in arrays.items() if any(f"{end}{name}{stop}" in graph for end in "( " for stop in ",)")
    }


@pytest.fixture
def feeds(rng):
    return lambda model: {v.name: rng.normal(0.3, 1, list(v.shape)).astype(np.float32) for v in model.graph.inputs}


@pytest.fixture
def merged(build, run, used, feeds, operators, assert_equal_up_to_rounding):
    """Returns a check that a graph becomes one of the given operators, computes the same, and is left alone the second time."""

    def check(graph, expected, rewrites=1):
        model = build(graph, used(graph))
        values = feeds(model)
        reference = run(model, values)
        context = Context()
        assert MergeBranches().apply(model, context) == rewrites, context.refusals
        assert operators(model) == expected
        assert_equal_up_to_rounding(run(model, values), reference)
        assert all(value.uses() for value in model.graph.initializers.values())
        after = ir.to_proto(model).SerializeToString()
        assert MergeBranches().apply(model, Context()) == 0
        assert ir.to_proto(model).SerializeToString() == after
        return model

    return check


@pytest.fixture
def refused(build, used):
    """Returns a check that the pass leaves a graph as it is and says why."""

    def check(graph, why, arrays=None):
        model = build(graph, used(graph) if arrays is None else arrays)
        before, context = ir.to_proto(model).SerializeToString(), Context()
        assert MergeBranches().apply(model, context) == 0
        assert ir.to_proto(model).SerializeToString() == before
        assert any(why in refusal.why for refusal in context.refusals) if why else context.refusals == []

    return check


def test_declaration():
    assert (MergeBranches.name, MergeBranches.effect, MergeBranches.default_order) == ("merge-branches", Effect.EXACT, None)


def test_3x3_and_1x1_and_batch_norm_of_the_source(merged):
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1, b) n = BatchNormalization(x, s, t, m, v) e = Add(a, c) y = Add(e, n)"
    model = merged(text(nodes), {"Conv": 1})
    assert model.graph[0].attributes["pads"].as_ints() == (1, 1, 1, 1)
    assert model.graph.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("nodes", "kernel", "pads"),
    [
        ("a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv<pads=[0,1,0,1]>(x, w13) e = Conv<pads=[1,0,1,0]>(x, w31) y = Sum(a, c, e)",
         (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[2,2,2,2], dilations=[2,2]>(x, w3) y = Add(x, a)", (3, 3), (2, 2, 2, 2)),
        ("a = Conv<pads=[0,1,2,1]>(x, w3) c = Conv<pads=[0,0,2,2]>(x, v3) y = Add(a, c)", (3, 4), (0, 1, 2, 2)),
        ('a = Conv<auto_pad="SAME_UPPER">(x, w3) c = Conv<auto_pad="VALID">(x, w1) y = Add(a, c)', (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1], group=4>(x, d3) y = Add(a, x)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1], group=4>(x, d3) c = Conv<pads=[1,1,1,1]>(x, w3) y = Add(a, c)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) n = BatchNormalization(a, s, t, m, v) y = Add(n, x)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) y = Add(a, a)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) d = Add(x, x) e = Add(d, d) y = Add(e, a)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv(x, w1) c = Conv(x, w1, b) y = Add(a, c)", (1, 1), (0, 0, 0, 0)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) d = Sub(a, c) y = Sub(d, x)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) d = Sub(x, a) e = Sub(x, d) y = Add(e, x)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) c = Neg(a) y = Sub(x, c)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) c = Mul(a, k) d = Mul(x, k) e = Div(d, k) y = Sub(e, c)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x) y = Sub(p, a)",
         (3, 3), (1, 1, 1, 1)),
        ("p = AveragePool<kernel_shape=[2,3], pads=[0,1,1,1], count_include_pad=1>(x) "
         "a = Conv<pads=[1,1,1,1], group=4>(x, d3) y = Add(p, a)",
         (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) d = Conv<pads=[1,1,1,1]>(c, v3) y = Add(a, d)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w1, b) c = Conv(a, w3) d = Mul(c, k) y = Add(x, d)", (3, 3), (1, 1, 1, 1)),
        ("a = Mul(x, k) c = Conv<pads=[1,1,1,1]>(a, w3) y = Add(x, c)", (3, 3), (1, 1, 1, 1)),
    ],
)  # fmt: skip
def test_branches_that_become_one_convolution(merged, nodes, kernel, pads):
    conv = merged(text(nodes), {"Conv": 1}).graph[0]
    assert conv.attributes["kernel_shape"].as_ints() == kernel
    assert conv.attributes["pads"].as_ints() == pads


def test_scaled_difference_inside_a_sum(merged):
    """The inner sum is merged first, then it is one branch of the outer one."""
    nodes = "a = Conv(x, w1) n = BatchNormalization(x, s, t, m, v) d = Sub(a, n) e = Mul(k, d) y = Add(x, e)"
    merged(text(nodes), {"Conv": 1}, rewrites=2)


def test_sum_that_starts_with_zero(merged, refused, arrays):
    arrays["zero"] = np.float32(0)
    nodes = "o = Add(zero, x) a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) e = Add(a, zero) f = Add(e, c) y = Relu(f)"
    merged(text(nodes.replace("o = Add(zero, x) ", "")), {"Conv": 1, "Relu": 1})
    merged(
        text(nodes.replace("Conv(x", "Conv(o").replace("a = Conv<pads=[1,1,1,1]>(x", "a = Conv<pads=[1,1,1,1]>(o")),
        {"Conv": 1, "Relu": 1},
        2,
    )
    merged(text("a = Conv(x, w1) e = Add(a, zero) y = Relu(e)"), {"Conv": 1, "Relu": 1})
    refused(text("y = Add(x, zero)"), "")  # the names of input and output must stay
    refused(text("y = Add(zero, zero)", outputs="float y"), "")
    refused(text("e = Add(x, zero) y = Relu(e)", "float[1,4,7,5] x, float zero"), "")  # the caller may give another number


def test_stride_two(merged):
    nodes = "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, w3) c = Conv<strides=[2,2]>(x, w1) y = Add(a, c)"
    for height, width in ((7, 5), (8, 6)):
        out = f"float[1,4,{(height + 1) // 2},{(width + 1) // 2}] y"
        merged(text(nodes, f"float[1,4,{height},{width}] x", out), {"Conv": 1})


def test_one_and_three_spatial_axes(merged, arrays, rng):
    arrays |= {
        name: rng.normal(size=shape).astype(np.float32) for name, shape in {"l3": (4, 4, 3), "l1": (4, 4, 1), "v3": (4, 2, 3, 3, 3)}.items()
    }
    merged(text("a = Conv<pads=[1,1]>(x, l3) c = Conv(x, l1) y = Add(a, c)", "float[1,4,7] x", "float[1,4,7] y"), {"Conv": 1})
    volume = "float[1,4,5,3,4] "
    merged(text("a = Conv<pads=[1,1,1,1,1,1], group=2>(x, v3) y = Add(a, x)", volume + "x", volume + "y"), {"Conv": 1})


def test_addend_from_elsewhere_stays_and_the_sum_is_regrouped(merged):
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) e = Add(a, z) f = Add(z, c) y = Add(e, f)"
    merged(text(nodes, "float[1,4,7,5] x, float[1,4,7,5] z"), {"Conv": 1, "Add": 2})


def test_two_sources_become_two_convolutions(merged):
    nodes = """a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) d = Conv<pads=[1,1,1,1]>(z, v3)
               e = Add(a, d) f = Add(e, c) y = Add(f, z)"""
    merged(text(nodes, "float[1,4,7,5] x, float[1,4,7,5] z"), {"Conv": 2, "Add": 1}, rewrites=2)


def test_sum_whose_partial_result_is_read_is_two_sums(merged):
    nodes = """a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) e = Add(a, c) r = Relu(e)
               f = Add(e, r) y = Relu(f)"""
    merged(text(nodes), {"Conv": 1, "Relu": 2, "Add": 1})


def test_cost_decides_which_branches_are_merged(merged, refused):
    """A 3x1 and a 1x3 kernel would need a 3x3; the 1x1 fits into either."""
    nodes = "a = Conv<pads=[0,1,0,1]>(x, w13) c = Conv<pads=[1,0,1,0]>(x, w31) y = Add(a, c)"
    refused(text(nodes), "one 3x3 convolution would cost more")
    merged(text(nodes.replace("y = Add(a, c)", "d = Conv(x, w1) e = Add(a, c) y = Add(e, d)")), {"Conv": 2, "Add": 1})
    refused(text("a = Conv<pads=[1,1,1,1], group=4>(x, d3) c = Conv(x, w1) y = Add(a, c)"), "one 3x3 convolution would cost more")


def test_branch_read_elsewhere_is_refused(refused):
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) y = Add(a, c) z = Relu(c)"
    refused(text(nodes, outputs="float[1,4,7,5] y, float[1,4,7,5] z"), "the output of Conv 'Conv_1' is read elsewhere")
    refused(text(nodes.replace(" z = Relu(c)", ""), outputs="float[1,4,7,5] y, float[1,4,7,5] c"), "is read elsewhere")


def test_weights_that_are_not_constant_are_refused(refused, arrays):
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) y = Add(a, c)"
    refused(text(nodes, "float[1,4,7,5] x, float[4,4,1,1] w1"), "the weight of Conv 'Conv_1' is not a constant")
    refused(text(nodes.replace("c = Conv(x, w1)", "u = Neg(w1) c = Conv(x, u)")), "the weight of Conv 'Conv_2' is not a constant")
    refused(text(nodes.replace("(x, w1)", "(x, w1, b)"), "float[1,4,7,5] x, float[4] b"), "the bias of Conv 'Conv_1' is not a constant")


def test_training_batch_norm_is_refused(refused):
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) n, rm, rv = BatchNormalization<training_mode=1>(x, s, t, m, v) y = Add(a, n)"
    refused(text(nodes), "training mode")


def test_different_strides_are_refused(refused):
    nodes = "a = Conv<pads=[1,1,1,1], strides=[2,1]>(x, w3) c = Conv<strides=[1,1]>(x, w1) y = Add(a, c)"
    refused(text(nodes, "float[1,4,1,5] x", "float[1,4,1,5] y"), "different strides")


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Add(x, x)",
        "n = BatchNormalization(x, s, t, m, v) y = Mul(n, x)",
        "y = Sub(x, x)",
        "a = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x) y = Sub(a, x)",
        "a = Relu(x) y = Add(a, x)",
        "a = Conv<pads=[1,1,1,1]>(x, w3) r = Relu(a) c = Conv(r, w1) y = Add(c, x)",
        "a = GlobalAveragePool(x) c = Conv<pads=[1,1,1,1]>(x, w3) y = Add(a, c)",
        "a = Conv<pads=[1,1,1,1]>(x, w3) r = Relu(a) y = Mul(r, x)",
    ],
)
def test_what_is_no_sum_of_convolutions_is_left_without_a_word(refused, nodes):
    refused(text(nodes), "")


def test_merged_weight_that_is_not_finite_is_refused(refused, arrays):
    half = {name: arrays[name].astype(np.float16) for name in ("w3", "w1")}
    half["w3"][:, :, 1, 1] = half["w1"][:, :, 0, 0] = 4e4
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) y = Add(a, c)"
    refused(text(nodes, "float16[1,4,7,5] x", "float16[1,4,7,5] y"), "would not be finite in float16", half)


def test_weight_that_is_read_elsewhere_too_is_not_copied(merged, refused, arrays):
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) y = Add(a, x) z = Conv(x, w3)"
    refused(text(nodes, outputs="float[1,4,7,5] y, float[1,4,5,3] z"), "takes 576 bytes, and 0 that nothing else reads go")
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv<pads=[1,1,1,1]>(x, v3) y = Add(a, c) z = Conv(x, w3)"
    model = merged(text(nodes, outputs="float[1,4,7,5] y, float[1,4,5,3] z"), {"Conv": 2})
    np.testing.assert_array_equal(model.graph.initializers["w3"].const_value.numpy(), arrays["w3"])


def test_average_pool_that_divides_by_less_at_the_rim_is_refused(refused, merged):
    """Padding that does not count, and what `ceil_mode` adds beyond the input, change the divisor."""
    pool = "p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(x) a = Conv<pads=[1,1,1,1]>(x, w3) y = Add(p, a)"
    refused(text(pool), "does not count its padding")
    size, ceil = ("float[1,4,8,6] x", "float[1,4,4,3] y"), "kernel_shape=[3,3], strides=[2,2], ceil_mode=1"
    conv = "a = Conv<pads=[0,0,1,1], strides=[2,2]>(x, w3) y = Add(p, a)"
    refused(text(f"p = AveragePool<{ceil}>(x) {conv}", *size), "overruns its padding")
    same = "p = AveragePool<kernel_shape=[2,2], strides=[2,2], ceil_mode=1>(x) a = Conv<strides=[2,2]>(x, w3) y = Add(p, a)"
    merged(text(same, "float[1,4,9,7] x", "float[1,4,4,3] y").replace("strides=[2,2], ceil_mode=1", "strides=[2,2]"), {"Conv": 1})


def test_pool_alone_is_cheaper_than_a_convolution(refused):
    nodes = "p = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(x) a = Conv(x, w1) y = Add(p, a)"
    refused(text(nodes), "one 3x3 convolution would cost more")


def test_chain_that_pads_a_bias_or_a_wide_kernel_is_refused(refused):
    nodes = "a = Conv(x, w1, b) c = Conv<pads=[1,1,1,1]>(a, w3) d = Conv<pads=[1,1,1,1]>(x, v3) y = Add(c, d)"
    refused(text(nodes), "pads with zeros what has a bias before it")
    refused(text(nodes.replace("Conv(x, w1, b)", "Add(x, k)")), "pads with zeros what has a bias before it")
    refused(text(nodes.replace("Conv(x, w1, b)", "Conv<pads=[1,1,1,1]>(x, w3)")), "pads what a 3x3 kernel makes")


def test_scales_that_vary_along_another_axis_are_no_channels(refused, arrays):
    arrays |= {"row": np.ones((7, 1), np.float32), "all": np.ones((4, 7, 5), np.float32)}
    for name in ("row", "all"):
        refused(text(f"a = Conv<pads=[1,1,1,1]>(x, w3) c = Mul(a, {name}) y = Add(c, x)"), "")


def test_nonlinear_branches_are_left(refused):
    for node in ("MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>(x)", "Relu(x)", "Gelu(x)"):
        refused(text(f"a = Conv<pads=[1,1,1,1]>(x, w3) c = {node} y = Add(a, c)"), "")


def test_zeros_are_left_out(merged, arrays):
    """A rim of zeros is cropped, groups are split where nothing is between them, and a bias of zeros goes."""
    arrays["w3"][:, :, 0] = arrays["w3"][:, :, 2] = 0
    arrays["v3"][...] = 0
    nodes = "a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv<pads=[1,1,1,1]>(x, v3, b) y = Add(a, c)"
    arrays["b"][...] = 0
    conv = merged(text(nodes), {"Conv": 1}).graph[0]
    assert (conv.attributes["kernel_shape"].as_ints(), conv.attributes["pads"].as_ints(), len(conv.inputs)) == ((1, 3), (0, 1, 0, 1), 2)
    arrays["w3"][:2, 2:] = arrays["w3"][2:, :2] = 0
    conv = merged(text(nodes), {"Conv": 1}).graph[0]
    assert conv.attributes["group"].as_int() == 2
    assert list(conv.inputs[1].shape) == [4, 2, 1, 3]


def test_addends_that_cancel_out(merged, refused):
    merged(text("a = Conv<pads=[1,1,1,1]>(x, w3) c = Add(a, x) y = Sub(c, x)"), {"Conv": 1})
    refused(text("r = Relu(x) a = Conv(x, w1) d = Add(a, x) c = Add(d, r) y = Sub(c, r)"), "")


def test_doubling_many_times_is_one_scale_or_is_left(merged, refused, arrays):
    """2**40 addends are never written out: they are one Mul, or where float16 does not hold that number the sum stays."""
    doublings = " ".join(f"q{i + 1} = Add(q{i}, q{i})" for i in range(40))
    graph = text(f"q0 = Relu(x) {doublings} a = Conv(x, w1) e = Add(a, x) y = Add(e, q40)")
    merged(graph, {"Conv": 1, "Relu": 1, "Mul": 1, "Add": 1}, rewrites=2)
    half = {"w1": arrays["w1"].astype(np.float16)}
    refused(graph.replace("float", "float16"), "the merged scale and shift would not be finite in float16", half)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("n = BatchNormalization(x, s, t, m, v) a = Mul(x, k) y = Add(n, a)", {"Mul": 1, "Add": 1}),
        ("n = BatchNormalization(x, s, t, m, v) y = Add(n, x)", {"Mul": 1, "Add": 1}),
        ("a = Mul(x, k) c = Add(a, k) d = Sub(x, c) y = Add(d, x)", {"Mul": 1, "Add": 1}),
        ("a = Mul(k, x) d = Sub(a, x) y = Add(d, a)", {"Mul": 1}),
        ("a = Add(k, x) c = Add(a, a) y = Sub(c, x)", {"Add": 1}),
        ("d = Add(x, x) y = Add(d, x)", {"Mul": 1}),
        ("a = Mul(x, k) d = Add(a, z) y = Sub(d, x)", {"Mul": 1, "Add": 1}),
    ],
)
def test_scaled_copies_become_one_scale_and_one_shift(merged, nodes, expected):
    inputs = "float[1,4,7,5] x, float[1,4,7,5] z" if "z" in nodes else "float[1,4,7,5] x"
    merged(text(nodes, inputs), expected)


def test_scaled_copies_of_tokens(merged, refused, arrays):
    """Channels are the last axis of tokens `[B, N, C]`; a scale per token and one per channel are no common scale."""
    arrays |= {"g": arrays["s"], "n": np.ones((3, 1), np.float32) * 2}
    tokens = ("float[2,3,4] x", "float[2,3,4] y")
    merged(text("a = Mul(x, g) c = Add(a, b) d = Add(c, x) y = Add(d, x)", *tokens), {"Mul": 1, "Add": 1})
    refused(text("a = Mul(x, g) c = Mul(x, n) y = Add(a, c)", *tokens), "scaled along different axes: 1, 2")
    refused(text("a = Mul(x, n) c = Mul(a, g) y = Add(c, x)", *tokens), "")
    refused(text("a = Mul(x, g) y = Add(a, x) z = Relu(a)", tokens[0], "float[2,3,4] y, float[2,3,4] z"), "")


def attributes(data, size, stride, out, kernel, dilation, groups=1):
    """Returns the attributes of a window that makes `out` places of `size`, with pads as the drawn kernel needs them."""
    begins, ends = [], []
    for axis in range(2):
        total = max(0, (out[axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 - size[axis])
        begins.append(data.draw(st.integers(0, total)))
        ends.append(total - begins[-1])
    return f"group={groups}, strides={list(stride)}, dilations={list(dilation)}, pads={begins + ends}"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_random_sums(build, data):
    """Sums and differences of random branches in random order and bracketing, against the graph before it in float64."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size, stride = data.draw(st.tuples(*[st.integers(4, 8)] * 2)), data.draw(st.sampled_from([(1, 1), (1, 1), (2, 2), (2, 1)]))
    out = tuple(-(-extent // step) for extent, step in zip(size, stride, strict=True))
    lines, arrays, values = [], {}, []

    def scaled(value):
        name, kind = f"s{len(lines)}", data.draw(st.sampled_from(["norm", "mul", "add", "neg", "div"]))
        if kind == "norm":
            arrays.update({f"{name}s": rng.uniform(-1, 1, 4), f"{name}t": rng.normal(size=4)})
            arrays.update({f"{name}m": rng.normal(0.5, 1, 4), f"{name}v": rng.uniform(0.1, 1.1, 4)})
            lines.append(f"{name} = BatchNormalization({value}, {name}s, {name}t, {name}m, {name}v)")
        elif kind == "neg":
            lines.append(f"{name} = Neg({value})")
        else:
            shape = data.draw(st.sampled_from([(4, 1, 1), (1, 4, 1, 1), (1,), ()]))
            arrays[f"{name}c"] = rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1])
            pair = f"{value}, {name}c" if kind == "div" or data.draw(st.booleans()) else f"{name}c, {value}"
            lines.append(f"{name} = {kind.capitalize()}({pair})")
        return name

    def conv(value, text, kernel, groups):
        name = f"c{len(lines)}"
        arrays[f"{name}w"] = rng.normal(size=(4, 4 // groups, *kernel))
        bias = data.draw(st.booleans())
        arrays.update({f"{name}b": rng.normal(size=4)} if bias else {})
        lines.append(f"{name} = Conv<{text}>({value}, {name}w{f', {name}b' if bias else ''})")
        return name

    for _ in range(data.draw(st.integers(2, 5))):
        kinds = ["conv", "conv", "pool", "chain", "other"] + (["identity", "identity"] if out == size else [])
        kind = data.draw(st.sampled_from(kinds))
        kernel, dilation = data.draw(st.tuples(*[st.integers(1, 3)] * 2)), data.draw(st.tuples(*[st.integers(1, 2)] * 2))
        groups = data.draw(st.sampled_from([1, 2, 4]))
        value = {"identity": "x", "other": "z"}.get(kind, "x")
        if kind in ("conv", "chain"):
            if kind == "chain":
                value = conv("x", f"group={groups}", (1, 1), groups)
            value = conv(value, attributes(data, size, stride, out, kernel, dilation, groups), kernel, groups)
        elif kind == "pool":
            count = data.draw(st.integers(0, 1))
            window = attributes(data, size, stride, out, kernel, (1, 1)).replace("group=1, ", "").replace("dilations=[1, 1], ", "")
            lines.append(f"p{len(lines)} = AveragePool<kernel_shape={list(kernel)}, count_include_pad={count}, {window}>(x)")
            value = lines[-1].split(" ")[0]
        for _ in range(data.draw(st.integers(0, 2))):
            value = scaled(value)
        values.append(value)
    values = data.draw(st.permutations(values * data.draw(st.integers(1, 2))))
    while len(values) > 1:
        at = data.draw(st.integers(0, len(values) - 2))
        name = "y" if len(values) == 2 else f"sum{len(lines)}"
        lines.append(f"{name} = {data.draw(st.sampled_from(['Add', 'Add', 'Sub', 'Sum']))}({values[at]}, {values[at + 1]})")
        values[at : at + 2] = [name]
    dtype = data.draw(st.sampled_from(["float", "double"]))
    maps = f"{dtype}[2,4,{size[0]},{size[1]}] x, {dtype}[2,4,{out[0]},{out[1]}] z"
    numbers = {"float": np.float32, "double": np.float64}[dtype]
    model = build(text(" ".join(lines), maps, f"{dtype}[2,4,{out[0]},{out[1]}] y"), {n: a.astype(numbers) for n, a in arrays.items()})
    feeds = {v.name: rng.normal(0.3, 1, list(v.shape)).astype(numbers) for v in model.graph.inputs}
    reference, before = interpret(model, feeds, dtype="float64")["y"], cost(model)
    rewrites = MergeBranches().apply(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    result, after = interpret(model, feeds, dtype="float64")["y"], cost(model)
    assert np.abs(result - reference).max() <= {"float": 1e-5, "double": 1e-10}[dtype] * max(1, np.abs(reference).max())
    assert after.macs <= before.macs
    biases = sum(node.op_type == "Conv" for node in model.graph) * 4 * np.dtype(numbers).itemsize
    assert after.bytes <= before.bytes + biases
    assert len(after.per_node) < len(before.per_node) or after.bytes < before.bytes or not rewrites
    again = ir.to_proto(model).SerializeToString()
    assert MergeBranches().apply(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == again


class RepVgg(nn.Module):
    """BN(conv 3x3) + BN(conv 1x1) + BN(x) (Ding et al. 2021, figure 2b)."""

    def __init__(self, inputs, outputs, stride, groups):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(outputs))
        self.point = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, groups=groups, bias=False), nn.BatchNorm2d(outputs))
        self.identity = nn.BatchNorm2d(inputs) if stride == 1 and inputs == outputs else None

    def forward(self, x):
        out = self.dense(x) + self.point(x)
        return torch.relu(out if self.identity is None else out + self.identity(x))


class MobileOne(nn.Module):
    """k times BN(conv KxK), BN(conv 1x1) and BN(x) (Vasu et al. 2023, figure 3)."""

    def __init__(self, channels, kernel, branches, groups):
        super().__init__()

        def branch(size):
            return nn.Sequential(
                nn.Conv2d(channels, channels, size, padding=size // 2, groups=groups, bias=False), nn.BatchNorm2d(channels)
            )

        self.branches = nn.ModuleList([*(branch(kernel) for _ in range(branches)), *([branch(1)] if kernel > 1 else [])])
        self.skip = nn.BatchNorm2d(channels)

    def forward(self, x):
        return torch.relu(sum(branch(x) for branch in [self.skip, *self.branches]))


@pytest.mark.parametrize(
    ("module", "passes"),
    [
        (RepVgg(6, 6, 1, 1), (FoldBatchNorm, MergeBranches)),
        (RepVgg(6, 6, 1, 1), (MergeBranches, FoldBatchNorm)),
        (RepVgg(6, 8, 2, 1), (MergeBranches,)),
        (MobileOne(6, 1, 4, 1), (MergeBranches,)),
    ],
)
def test_traced_block_becomes_one_convolution(trace, run, operators, module, passes):
    channels = next(module.parameters()).shape[0] if not isinstance(module, RepVgg) else module.dense[0].in_channels
    model = trace(module, (1, channels, 9, 7))
    for item in passes:
        item().apply(model, Context())
    assert operators(model) == {"Conv": 1, "Relu": 1}
    x = torch.randn(1, channels, 9, 7) + 0.3
    expected = module(x).detach().numpy()
    (result,) = run(model, {model.graph.inputs[0].name: x.numpy()})
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_convolution_is_named_after_the_module_that_holds_the_branches(build, used):
    graph = text("a = Conv<pads=[1,1,1,1]>(x, w3) c = Conv(x, w1) y = Add(a, c)")
    model = build(graph, used(graph))
    for node, path in zip(model.graph, ("stages.0.dense.conv", "stages.0.point.conv", "stages.0"), strict=True):
        node.metadata_props["edgekit.module"] = path
    MergeBranches().apply(model, Context())
    (conv,) = model.graph
    assert (conv.name, conv.metadata_props["edgekit.module"]) == ("stages.0/Conv", "stages.0")
    assert [value.name for value in conv.inputs] == ["x", "stages.0.weight"]
