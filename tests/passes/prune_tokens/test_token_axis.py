"""Following tokens through operators: whatever axis they are said to lie on, permuting the tokens permutes exactly that one."""

from __future__ import annotations

import re

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from edgekit.graph.shapes import infer_shapes
from edgekit.passes.prune_tokens.blocks import find_blocks, prefix_length
from edgekit.passes.prune_tokens.resize import check
from edgekit.passes.prune_tokens.token_axis import Along, StandsInTheWayError, follow
from tests.passes.prune_tokens.vit_graphs import Vit, graph

B, N, C = 2, 6, 4
RNG = np.random.default_rng(0)
INTS = {
    "one": np.array([1]), "two": np.array([2]), "three": np.array([3]), "zero": np.array([0]), "six": np.array([6]), "four": np.array([4]),
    "big": np.array([2**31 - 1]), "minus": np.array([-1]), "last": np.array([5]), "first": np.array(0), "both": np.array([0, 1]),
    "heads": np.array([B, N, 2, 2]), "flat": np.array([B, N, C]), "windows": np.array([B, 2, 3, C]), "samples": np.array([B * N, C]),
    "wide": np.array([B, N, C]), "column": np.array([B, 1, N, C]), "ends": np.array([0, -1]), "two_axes": np.array([1, 2]),
}  # fmt: skip
FLOATS = {
    "w": RNG.normal(size=(C, C)), "b": RNG.normal(size=C), "mix": RNG.normal(size=(N, N)), "shared": RNG.normal(size=(1, 1, C)),
    "mixed": RNG.normal(size=(B, C, C)),
}  # fmt: skip
ARRAYS = INTS | {name: array.astype(np.float32) for name, array in FLOATS.items()}

KEPT = {  # a body that makes y of x [2, 6, 4], the axis of the tokens in y, how many of the first are not in it
    "linear": ("y0 = MatMul(x, w) y = Add(y0, b)", 1, 0),
    "unary": ("y = Gelu(x)", 1, 0),
    "norm": ("y = LayerNormalization(x, b, b)", 1, 0),
    "rms norm": ("y = RMSNormalization(x, b)", 1, 0),
    "softmax of channels": ("y = Softmax(x)", 1, 0),
    "two branches": ("a = Sigmoid(x) y = Mul(x, a)", 1, 0),
    "constant of one token": ("y = Add(x, shared)", 1, 0),
    "transpose": ("y = Transpose<perm = [2, 0, 1]>(x)", 2, 0),
    "heads": ("a = Reshape(x, heads) y = Transpose<perm = [0, 2, 1, 3]>(a)", 2, 0),
    "heads and back": ("a = Reshape(x, heads) c = Relu(a) y = Reshape(c, flat)", 1, 0),
    "unsqueeze": ("y = Unsqueeze(x, one)", 2, 0),
    "squeeze": ("a = Unsqueeze(x, zero) y = Squeeze(a, zero)", 1, 0),
    "expand": ("a = Unsqueeze(x, one) y = Expand(a, column)", 2, 0),
    "split of channels": ("y, z = Split<axis = 2, num_outputs = 2>(x)", 1, 0),
    "slice of channels": ("y = Slice(x, one, three, two)", 1, 0),
    "slice of all": ("y = Slice(x, zero, big, one)", 1, 0),
    "all but the first": ("y = Slice(x, one, big, one)", 1, 1),
    "all but the first, twice": ("a = Slice(x, one, six, one) y = Slice(a, one, big, one)", 1, 2),
    "gather of a channel": ("y = Gather<axis = 2>(x, first)", 1, 0),
    "gather of samples": ("y = Gather<axis = 0>(x, both)", 1, 0),
    "gather that adds an axis": ("a = Transpose<perm = [2, 0, 1]>(x) y = Gather<axis = 0>(a, ends2)", 3, 0),
    "mean of channels": ("y = ReduceMean<keepdims = 0>(x, two)", 1, 0),
    "mean of samples": ("y = ReduceMean<keepdims = 0>(x, zero)", 0, 0),
    "concat of channels": ("a = Relu(x) y = Concat<axis = -1>(x, a)", 1, 0),
    "comparison": ("a = Relu(x) c = Greater(x, a) y = Cast<to = 1>(c)", 1, 0),
    "a product for each sample": ("y = MatMul(x, mixed)", 1, 0),
    "attention": ("y = Attention<q_num_heads = 2, kv_num_heads = 2>(x, x, x)", 1, 0),
    "attention written out": ("t = Transpose<perm = [0, 2, 1]>(x) a = MatMul(x, t) p = Softmax(a) y = MatMul(p, x)", 1, 0),
}  # fmt: skip

ENDED = {  # a body in which the tokens end: nothing of y is a token any more
    "the first": ("y = Gather<axis = 1>(x, first)", 0, False),
    "the first, as a slice": ("y = Slice(x, zero, one, one)", 0, False),
    "the second": ("y = Slice(x, one, two, one)", 1, False),
    "the first two": ("y = Gather<axis = 1>(x, both)", 1, False),
    "the second without the first": ("a = Slice(x, one, big, one) y = Gather<axis = 1>(a, first)", 1, False),
    "mean": ("y = ReduceMean<keepdims = 0>(x, one)", -1, True),
    "mean of tokens and channels": ("y = ReduceMean(x, two_axes)", -1, True),
    "queries of other tokens": ("q = Slice(x, zero, one, one) y = Attention<q_num_heads = 2, kv_num_heads = 2>(q, x, x)", 0, False),
}

REFUSED = {
    "windows": ("y = Reshape(x, windows)", "splits the tokens into windows or rows"),
    "merged with samples": ("y = Reshape(x, samples)", "merges the tokens with another axis|splits the tokens"),
    "convolution": ("t = Transpose<perm = [0, 2, 1]>(x) y = Conv(t, kernel)", "Conv reads the tokens"),
    "norm over tokens": ("y = LayerNormalization<axis = 1>(x, table)", "it normalizes over the tokens"),
    "a weight for each token": ("y = MatMul(mix, x)", "it mixes the tokens by a weight for each of them"),
    "weights from elsewhere": ("t = Relu(few) u = MatMul(t, square) y = MatMul(u, x)", "it mixes the tokens by weights from elsewhere"),
    "maximum": ("y = ReduceMax<keepdims = 0>(x, one)", "ReduceMax over the tokens depends on how many there are"),
    "sum": ("y = ReduceSum<keepdims = 0>(x, one)", "ReduceSum over the tokens depends on how many there are"),
    "length of a channel": ("y = ReduceL2<keepdims = 0>(x, one)", "ReduceL2 over the tokens"),
    "the last": ("y = Slice(x, minus, big, one)", "last token|from the end"),
    "the last by its number": ("y = Gather<axis = 1>(x, last)", "it picks the last token"),
    "the last as a slice": ("y = Slice(x, last, six, one)", "it picks the last token"),
    "from the end": ("y = Gather<axis = 1>(x, minus)", "from the end"),
    "the middle": ("y = Slice(x, one, three, one)", "in the middle"),
    "halves": ("y, z = Split<axis = 1, num_outputs = 2>(x)", "splits the tokens into parts"),
    "further tokens": ("y = Concat<axis = 1>(x, x)", "further tokens join there"),
    "a cumulative sum": ("y = CumSum(x, first)", "CumSum reads the tokens"),
    "a table of the others": ("a = Slice(x, one, big, one) y = Add(a, others)", "combines a part of the tokens"),
    "causal": ("y = Attention<q_num_heads = 2, kv_num_heads = 2, is_causal = 1>(x, x, x)", "the attention is causal"),
    "given out": ("y = Relu(x)", "gives out the tokens themselves"),
}  # fmt: skip
ARRAYS |= {
    "ends2": np.array([[0, 1]]), "kernel": RNG.normal(size=(3, C, 3)).astype(np.float32),
    "table": RNG.normal(size=(N, C)).astype(np.float32),
    "full": RNG.normal(size=(B, N, 1)).astype(np.float32), "across": RNG.normal(size=(1, 2, N)).repeat(B, 0).astype(np.float32),
    "few": RNG.normal(size=(B, 3, C)).astype(np.float32), "bias": RNG.normal(size=(3, N)).astype(np.float32),
    "square": RNG.normal(size=(C, N)).astype(np.float32), "sequence": RNG.normal(size=(N, B, C)).astype(np.float32),
    "sizes": np.array([B, N, C], np.float32), "others": RNG.normal(size=(N - 1, C)).astype(np.float32),
}  # fmt: skip


def made(body):
    """A graph of `x` `[2, 6, 4]` that gives out `y`, with the constants that the body names."""
    words = set(re.findall(r"\w+", body))
    text = f'<ir_version: 10, opset_import: ["" : 23]> net (float[{B},{N},{C}] x) => (float y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in ARRAYS.items() if name in words)
    for number, node in enumerate(proto.graph.node):
        node.name = f"node{number}"
    model = ir.from_proto(proto)
    infer_shapes(model)
    (x,) = model.graph.inputs
    return model, x, model.graph.outputs[0]


def followed(model, x):
    """The region of `x`, where nothing is said of what the graph gives out."""
    model.graph.outputs.clear()
    return follow(model.graph, x)


@pytest.mark.parametrize(("body", "axis", "start"), KEPT.values(), ids=KEPT)
def test_where_the_tokens_lie(body, axis, start, run):
    model, x, y = made(body)
    tokens = RNG.normal(size=(B, N, C)).astype(np.float32)
    order = np.array([0, 1, 4, 2, 5, 3])  # the first two stay in their place
    plain, moved = (run(model, {"x": array})[0] for array in (tokens, tokens[:, order]))
    region = followed(model, x)
    assert region.axes[y] == (Along(axis, start),)
    assert region.operands == []
    np.testing.assert_allclose(moved, np.take(plain, order[start:] - start, axis), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("body", "picked", "pooled"), ENDED.values(), ids=ENDED)
def test_where_the_tokens_end(body, picked, pooled, run):
    model, x, y = made(body)
    tokens = RNG.normal(size=(B, N, C)).astype(np.float32)
    plain, moved = (run(model, {"x": array})[0] for array in (tokens, tokens[:, [0, 1, 4, 2, 5, 3]]))
    region = followed(model, x)
    assert y not in region.axes
    assert region.picked == picked
    assert bool(region.pools) == pooled
    np.testing.assert_allclose(moved, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("body", "why"), REFUSED.values(), ids=REFUSED)
def test_what_stands_in_the_way(body, why):
    model, x, _ = made(body)
    with pytest.raises(StandsInTheWayError, match=why) as error:
        follow(model.graph, x)
    assert error.value.where == ("y" if "given out" in why or "gives out" in why else list(model.graph)[-1].name)


@pytest.mark.parametrize(
    ("body", "axis", "rank"),
    [
        ("y = Add(x, table)", 0, 3),
        ("y = Mul(full, x)", 1, 3),
        ("t = Transpose<perm = [0, 2, 1]>(x) y = Concat<axis = 1>(t, across)", 2, 3),
        ("y = Attention<q_num_heads = 2, kv_num_heads = 2>(few, x, x, bias)", 1, 4),
    ],
)
def test_what_else_has_an_entry_for_each_token(body, axis, rank):
    model, x, _ = made(body)
    (operand,) = followed(model, x).operands
    assert (operand.axis, operand.rank) == (axis, rank)
    assert operand.node.op_type == body.rpartition("y = ")[2].partition("(")[0].partition("<")[0]


@pytest.mark.parametrize("op_type", ["Add", "Concat<axis = 2>"])
def test_a_table_whose_samples_are_on_another_axis(op_type):
    """Tokens first, samples second: `[N, B, C]`; each sample would have to take entries of its own along the first axis."""
    model, x, _ = made(f"t = Transpose<perm = [1, 0, 2]>(x) y = {op_type}(t, sequence)")
    with pytest.raises(StandsInTheWayError, match="first axis is not that of the samples"):
        followed(model, x)


def test_a_reshape_by_numbers_that_are_computed():
    """The shape that a graph computes as it runs would keep the number of tokens that there were."""
    model, x, y = made("s = Cast<to = 7>(sizes) y = Reshape(x, s)")
    y.shape = ir.Shape((B, N, C))
    region = followed(model, x)
    with pytest.raises(StandsInTheWayError, match="its shape is computed while the model runs"):
        check(region, can_take=True)


def test_the_front_of_a_stream(build):
    """A class token, registers that are joined behind it, as in DINOv2 with registers, and patches; then positions."""
    text = """net (float[2,4,4] x) => (float y) {
        both = Expand(cls, shape)
        a = Concat<axis = 1>(both, x)
        b = Add(a, position)
        front = Slice(b, zero, one, one)
        rest = Slice(b, one, big, one)
        more = Expand(registers, shape3)
        c = Concat<axis = 1>(front, more, rest)
        d = LayerNormalization(c, b4, b4)
        e = Add(d, c)
        y = Identity(e)
    }"""
    arrays = {"cls": np.zeros((1, 1, 4), np.float32), "registers": np.zeros((1, 3, 4), np.float32), "b4": np.ones(4, np.float32)}
    arrays |= {"shape": np.array([2, 1, 4]), "shape3": np.array([2, 3, 4]), "position": np.zeros((1, 5, 4), np.float32)}
    model = build(text, arrays | {name: INTS[name] for name in ("zero", "one", "big")})
    values = {value.name: value for node in model.graph for value in node.outputs}
    assert [prefix_length(values[name]) for name in "abcde"] == [1, 1, 4, 4, 0]


def test_blocks():
    """One for each attention with its sum, in order; what a cross-attention or an attention of few queries adds to is no stream."""
    vit = Vit(depth=3)
    blocks = find_blocks(graph(vit).graph)
    assert [block.name for block in blocks] == [f"block{k}/sum" for k in range(3)]
    assert [block.tokens for block in blocks] == [17] * 3
    assert all(block.residual.producer() is block.add and block.stream in block.add.inputs for block in blocks)
