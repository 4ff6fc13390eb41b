"""`merge-convolutions` against the graph before it: random chains, bias maps, transposed convolutions, every condition that stops it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.contracts import Context, Effect
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import run as interpret
from edgekit.passes.reparameterize.merge_sequential import MergeConvolutions


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"w3": (4, 4, 3, 3), "v3": (4, 4, 3, 3), "w1": (4, 4, 1, 1), "v1": (4, 4, 1, 1), "d3": (4, 1, 3, 3), "b": (4,), "c": (4,)}
    shapes |= {"big": (16, 4, 1, 1), "back": (4, 16, 3, 3), "bigb": (16,), "t2": (4, 4, 2, 2), "t2g": (4, 2, 2, 2), "v1g": (4, 2, 1, 1)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def graph_text(nodes, inputs="float[1,4,7,5] x", outputs="float[1,4,7,5] y"):
    return f"g ({inputs}) => ({outputs}) {{ {nodes} }}"


@pytest.fixture
def used(arrays):
    """Returns the arrays whose names occur in a graph's text."""
    return lambda graph: {
        name: array for name, array in arrays.items() if any(f"{end}{name}{stop}" in graph for end in "( " for stop in ",)")
    }


@pytest.fixture
def merged(build, run, used, operators, assert_equal_up_to_rounding):
    """Returns a check that a graph becomes the given operators, computes the same, costs no more, and is left alone the second time."""

    def check(graph, expected, rewrites=1):
        model = build(graph, used(graph))
        rng = np.random.default_rng(0)
        feeds = {v.name: rng.normal(0.3, 1, list(v.shape)).astype(np.float32) for v in model.graph.inputs}
        reference, before, context = run(model, feeds), cost(model), Context()
        assert MergeConvolutions().apply(model, context) == rewrites == len(context.rewrites), context.refusals
        assert operators(model) == expected
        assert_equal_up_to_rounding(run(model, feeds), reference)
        after = cost(model)
        assert (after.macs, after.bytes) <= (before.macs, before.bytes + 16)
        assert all(value.uses() for value in model.graph.initializers.values())
        again = ir.to_proto(model).SerializeToString()
        assert MergeConvolutions().apply(model, Context()) == 0
        assert ir.to_proto(model).SerializeToString() == again
        return model

    return check


@pytest.fixture
def refused(build, used):
    """Returns a check that the pass leaves a graph as it is and says why."""

    def check(graph, why, arrays=None):
        model = build(graph, used(graph) if arrays is None else arrays)
        before, context = ir.to_proto(model).SerializeToString(), Context()
        assert MergeConvolutions().apply(model, context) == 0
        assert ir.to_proto(model).SerializeToString() == before
        assert any(why in refusal.why for refusal in context.refusals) if why else context.refusals == []

    return check


def test_declaration():
    assert (MergeConvolutions.name, MergeConvolutions.effect) == ("merge-convolutions", Effect.EXACT)
    assert MergeConvolutions.default_order is None


@pytest.mark.parametrize(
    ("nodes", "kernel", "pads"),
    [
        ("a = Conv<pads=[1,1,1,1]>(x, w3, b) y = Conv(a, w1, c)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv(x, w1) y = Conv<pads=[1,1,1,1]>(a, w3, b)", (3, 3), (1, 1, 1, 1)),
        ("a = Conv<pads=[1,1,1,1]>(x, w1, b) y = Conv(a, w3)", (3, 3), (1, 1, 1, 1)),
    ],
)
def test_pairs(merged, nodes, kernel, pads):
    conv = merged(graph_text(nodes), {"Conv": 1}).graph[0]
    assert (conv.attributes["kernel_shape"].as_ints(), conv.attributes["pads"].as_ints()) == (kernel, pads)


def test_merging_stops_where_a_bias_meets_a_padded_kernel(merged):
    merged(graph_text("a = Conv(x, w1) e = Conv(a, v1, b) y = Conv<pads=[1,1,1,1]>(e, w3)"), {"Conv": 2})


def test_padding_with_zeros_becomes_pads(merged, refused, arrays):
    arrays |= {"p": np.array([0, 0, 1, 0, 0, 0, 2, 1]), "two": np.float32(2), "crop": np.array([0, 0, 0, 0, 0, 0, -2, 0])}
    arrays |= {"p2": np.array([1, 2]), "last": np.array([-1]), "channels": np.array([0, 2, 0, 0, 0, -2, 0, 0])}
    conv = merged(graph_text("a = Pad(x, p) y = Conv(a, w3)", outputs="float[1,4,8,4] y"), {"Conv": 1}).graph[0]
    assert conv.attributes["pads"].as_ints() == (1, 0, 2, 1)
    merged(graph_text("a = Pad(x, p2, , last) y = Conv<pads=[1,1,1,1]>(a, w3, b)", outputs="float[1,4,7,8] y"), {"Conv": 1})
    refused(graph_text("a = Pad(x, p, two) y = Conv(a, w3)", outputs="float[1,4,8,4] y"), "does not pad with zeros")
    refused(graph_text('a = Pad<mode="reflect">(x, p) y = Conv(a, w3)', outputs="float[1,4,8,4] y"), "does not pad with zeros")
    refused(graph_text("a = Pad(x, channels) y = Conv(a, w1)"), "pads channels")
    refused(graph_text("a = Pad(x, crop) y = Conv(a, w1)", outputs="float[1,4,5,5] y"), "would need negative pads")
    refused(graph_text("a = Pad(x, crop) y = Conv<pads=[1,0,1,0]>(a, w1)", outputs="float[1,4,7,5] y"), "pads what a 1x1 kernel makes")


def test_strided_kernels_multiply_their_strides(merged):
    nodes = "a = Conv<pads=[1,1,1,1], strides=[2,2]>(x, big, bigb) y = Conv<strides=[2,1]>(a, back)"
    conv = merged(graph_text(nodes, "float[1,4,13,13] x", "float[1,4,3,6] y"), {"Conv": 1}).graph[0]
    assert conv.attributes["strides"].as_ints() == (4, 2)
    assert conv.attributes["dilations"].as_ints() == (2, 2)


def test_expansion_around_a_kernel_collapses(merged):
    """1x1 up, 3x3 down without padding, 1x1: three convolutions in a row are one (Guo et al. 2020, figure 1)."""
    nodes = "a = Conv<pads=[1,1,1,1]>(x, big, bigb) e = Conv(a, back, b) y = Conv(e, w1, c)"
    merged(graph_text(nodes), {"Conv": 1}, rewrites=2)


def test_bias_before_a_padded_kernel_becomes_a_map_where_that_is_small(merged, refused):
    nodes = "a = Conv(x, big, bigb) y = Conv<pads=[1,1,1,1]>(a, back, b)"
    model = merged(graph_text(nodes), {"Conv": 1, "Add": 1})
    assert list(model.graph[1].inputs[1].shape) == [1, 4, 7, 5]
    refused(graph_text(nodes, "float[1,4,17,15] x", "float[1,4,17,15] y"), "a constant map for it would take 4080 bytes")
    refused(graph_text("a = Conv(x, w1, b) y = Conv<pads=[1,1,1,1]>(a, w3)"), "a constant map for it would take 560 bytes")


def test_padded_kernel_after_a_wide_kernel_is_refused(refused):
    refused(graph_text("a = Conv<pads=[1,1,1,1]>(x, w3) y = Conv<pads=[1,1,1,1]>(a, v3)"), "pads what a 3x3 kernel makes")


def test_few_channels_between_are_cheaper_than_one_convolution(refused, arrays):
    arrays |= {"down": arrays["w1"][:1], "up": arrays["w1"][:, :1]}
    refused(graph_text("a = Conv(x, down) y = Conv(a, up)"), "one 1x1 convolution would cost more")
    refused(graph_text("a = Conv<pads=[1,1,1,1], group=4>(x, d3) y = Conv(a, w1)"), "multiply-accumulates instead of")
    refused(graph_text("a = Conv<pads=[1,1,1,1], group=4>(x, d3) y = Conv<group=2>(a, v1g)"), "one 3x3 convolution would cost more")


def test_value_between_that_is_read_elsewhere_is_refused(refused):
    nodes = "a = Conv(x, w1) y = Conv(a, v1) z = Relu(a)"
    refused(graph_text(nodes, outputs="float[1,4,7,5] y, float[1,4,7,5] z"), "is read elsewhere")
    refused(graph_text("a = Conv(x, w1) y = Conv(a, v1)", outputs="float[1,4,7,5] y, float[1,4,7,5] a"), "is read elsewhere")
    transposed = "a = ConvTranspose<strides=[2,2]>(x, t2) y = Conv(a, v1) z = Relu(a)"
    refused(graph_text(transposed, outputs="float[1,4,14,10] y, float[1,4,14,10] z"), "is read elsewhere")


def test_weights_that_are_not_constant_are_refused(refused):
    nodes = "a = Conv(x, w1) y = Conv(a, v1)"
    refused(graph_text(nodes, "float[1,4,7,5] x, float[4,4,1,1] w1"), "the weight of Conv 'Conv_0' is not a constant")
    refused(graph_text("u = Neg(v1) a = Conv(x, w1) y = Conv(a, u)"), "the weight of Conv 'Conv_2' is not a constant")
    refused(graph_text("a = Conv(x, w1) y = Conv(a, v1, b)", "float[1,4,7,5] x, float[4] b"), "the bias of Conv 'Conv_1' is not a constant")
    transposed = "a = ConvTranspose<strides=[2,2]>(x, t2) y = Conv(a, v1)"
    refused(
        graph_text(transposed, "float[1,4,7,5] x, float[4,4,2,2] t2", "float[1,4,14,10] y"), "of ConvTranspose 'ConvTranspose_0' is not"
    )


def test_weights_that_are_read_elsewhere_too_are_not_copied(refused, merged):
    """Neither 1x1 weight goes when both are read by other nodes: a third one would cost bytes."""
    nodes = "a = Conv(x, w1) y = Conv(a, v1) r = Relu(x) e = Conv(r, w1) f = Relu(e) z = Conv(f, v1)"
    refused(graph_text(nodes, outputs="float[1,4,7,5] y, float[1,4,7,5] z"), "takes 64 bytes, and 0 that nothing else reads go")
    nodes = "a = Conv(x, w1) y = Conv(a, v1) r = Relu(x) z = Conv(r, w1)"
    merged(graph_text(nodes, outputs="float[1,4,7,5] y, float[1,4,7,5] z"), {"Conv": 2, "Relu": 1})


def test_float16_that_would_overflow_is_refused(refused):
    half = {name: np.full((4, 4, 1, 1), 300, np.float16) for name in ("w1", "v1")}
    refused(graph_text("a = Conv(x, w1) y = Conv(a, v1)", "float16[1,4,7,5] x", "float16[1,4,7,5] y"), "not be finite in float16", half)


def test_nonlinear_node_between_is_left_without_a_word(refused):
    for node in ("Relu(a)", "Gelu(a)", "MaxPool<kernel_shape=[1,1]>(a)"):
        refused(graph_text(f"a = Conv(x, w1) e = {node} y = Conv(e, v1)"), "")


def test_skipped_place_is_left(build, used):
    graph = graph_text("a = Conv(x, w1) y = Conv(a, v1)")
    context = Context(skip=frozenset({"Conv_1"}))
    assert MergeConvolutions().apply(build(graph, used(graph)), context) == 0


@pytest.mark.parametrize(
    "nodes",
    [
        "a = ConvTranspose<strides=[2,2]>(x, t2, b) y = Conv(a, w1, c)",
        "a = ConvTranspose<strides=[2,2]>(x, t2) y = Conv(a, w1)",
        "a = ConvTranspose<strides=[2,2], group=2>(x, t2g, b) y = Conv<group=2>(a, v1g)",
        "a = ConvTranspose<strides=[2,2], pads=[1,0,0,1], output_padding=[1,1]>(x, t2, b) y = Conv(a, w1, c)",
    ],
)
def test_transposed_convolution_before_1x1(merged, nodes):
    merged(graph_text(nodes, outputs="float[1,4,14,10] y"), {"ConvTranspose": 1})


def test_transposed_convolution_that_stays(refused, arrays):
    size = "float[1,4,14,10] y"
    refused(graph_text("a = ConvTranspose<strides=[2,2]>(x, t2) y = Conv<pads=[1,1,1,1]>(a, w3)", outputs=size), "only a 1x1 convolution")
    strided = "a = ConvTranspose<strides=[2,2]>(x, t2) y = Conv<strides=[2,2]>(a, w1)"
    refused(graph_text(strided), "only a 1x1 convolution of stride 1")
    arrays["wide"] = np.ones((16, 4, 1, 1), np.float32)
    refused(
        graph_text("a = ConvTranspose<strides=[1,1]>(x, t2) y = Conv(a, wide)", outputs="float[1,16,8,6] y"),
        "ConvTranspose would cost more",
    )
    shared = "a = ConvTranspose<strides=[2,2]>(x, t2) y = Conv(a, w1) r = Relu(x) z = ConvTranspose<strides=[2,2]>(r, t2)"
    refused(graph_text(shared, outputs=f"{size}, float[1,4,14,10] z"), "its weight takes 256 bytes")


def test_merged_convolution_is_named_after_the_module_of_both(build, used):
    graph = graph_text("a = Conv<pads=[1,1,1,1]>(x, w3) y = Conv(a, w1, c)")
    model = build(graph, used(graph))
    for node, path in zip(model.graph, ("head.0", "head.1"), strict=True):
        node.metadata_props["edgekit.module"] = path
    MergeConvolutions().apply(model, Context())
    (conv,) = model.graph
    assert (conv.name, [value.name for value in conv.inputs]) == ("head/Conv", ["x", "head.weight", "head.bias"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_random_chains(build, data):
    """Two to four convolutions of random kernels, pads, strides, dilations and groups, with or without activations between them."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    start = data.draw(st.tuples(*[st.integers(4, 9)] * 2))
    size, channels, value, lines, arrays = list(start), 4, "x", [], {}
    for index in range(data.draw(st.integers(2, 4))):
        outputs = data.draw(st.sampled_from([2, 4, 8, 12]))
        if index == 0 and data.draw(st.integers(0, 5)) == 0:
            groups = data.draw(st.sampled_from([1, 2]))
            arrays |= {"tw": rng.normal(size=(4, outputs // groups, 2, 2)), "tb": rng.normal(size=outputs)}
            lines.append(f"t = ConvTranspose<strides=[2,2], group={groups}>(x, tw, tb)")
            value, channels, size = "t", outputs, [2 * extent for extent in size]
            continue
        kernel = data.draw(st.sampled_from([(1, 1), (1, 1), (3, 3), (2, 3)]))
        stride, dilation = data.draw(st.sampled_from([(1, 1), (1, 1), (2, 1)])), data.draw(st.sampled_from([(1, 1), (1, 1), (1, 2)]))
        pads = data.draw(st.sampled_from([(0, 0, 0, 0), (0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)]))
        out = [
            (size[axis] + pads[axis] + pads[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1 for axis in range(2)
        ]
        if min(out) < 1:
            continue
        groups = data.draw(st.sampled_from([groups for groups in (1, 1, 2, 4) if channels % groups == 0 and outputs % groups == 0]))
        arrays[f"w{index}"] = rng.normal(size=(outputs, channels // groups, *kernel))
        bias = data.draw(st.booleans())
        arrays |= {f"b{index}": rng.normal(size=outputs)} if bias else {}
        attributes = f"strides={list(stride)}, dilations={list(dilation)}, pads={list(pads)}, group={groups}"
        lines.append(f"c{index} = Conv<{attributes}>({value}, w{index}{f', b{index}' if bias else ''})")
        value, channels, size = f"c{index}", outputs, out
        if data.draw(st.integers(0, 5)) == 0:
            lines.append(f"r{index} = Relu({value})")
            value = f"r{index}"
    dtype, numbers = data.draw(st.sampled_from([("float", np.float32), ("double", np.float64)]))
    lines.append(f"y = Identity({value})")
    text = graph_text(" ".join(lines), f"{dtype}[2,4,{start[0]},{start[1]}] x", f"{dtype}[2,{channels},{size[0]},{size[1]}] y")
    model = build(text, {name: array.astype(numbers) for name, array in arrays.items()})
    feeds = {"x": rng.normal(0.3, 1, (2, 4, *start)).astype(numbers)}
    reference, before = interpret(model, feeds, dtype="float64")["y"], cost(model)
    rewrites = MergeConvolutions().apply(model, Context())
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    result, after = interpret(model, feeds, dtype="float64")["y"], cost(model)
    assert np.abs(result - reference).max() <= {"float": 1e-5, "double": 1e-10}[dtype] * max(1, np.abs(reference).max())
    assert after.macs <= before.macs
    assert after.bytes <= before.bytes + rewrites * 12 * np.dtype(numbers).itemsize
    convolutions = sum("Conv" in node.op_type for node in model.graph)
    assert convolutions + rewrites == sum("Conv" in line for line in lines)
    again = ir.to_proto(model).SerializeToString()
    assert MergeConvolutions().apply(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == again
