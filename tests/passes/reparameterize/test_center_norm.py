"""`center-norm` against the graph before it in float64: random streams, a whole ViT, and every condition that stops it."""

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
from edgekit.passes.reparameterize.center_norm import CenterNorm

FORCED = CenterNorm(force=True)


@pytest.fixture(scope="session")
def check(build):
    """Returns a check that as many layer norms as said become RMS norms and that the numbers stay."""

    def compare(text, arrays, expected):
        model = build(text, {name: a for name, a in arrays.items() if any(f"{e}{name}{t}" in text for e in "( " for t in ",)")})
        rng = np.random.default_rng(1)
        feeds = {v.name: rng.normal(0.3, 1, list(v.shape)).astype(v.dtype.numpy()) for v in model.graph.inputs}
        reference = interpreter.run(model, feeds, dtype="float64")
        before, proto, context = cost(model), ir.to_proto(model).SerializeToString(), Context()
        norms = [node.op_type for node in model.graph].count("LayerNormalization")
        found = FORCED.apply(model, context)
        assert found == expected == len(context.rewrites), context.refusals
        if not found:
            assert ir.to_proto(model).SerializeToString() == proto
            return model, context
        operators = [node.op_type for node in model.graph]
        assert (operators.count("RMSNormalization"), operators.count("LayerNormalization")) == (found, norms - found)
        assert cost(model).macs == before.macs
        assert cost(model).bytes <= before.bytes
        for result, array in zip(interpreter.run(model, feeds, dtype="float64").values(), reference.values(), strict=True):
            np.testing.assert_allclose(result, array, rtol=0, atol=1e-5 * np.abs(array).max())
        after = ir.to_proto(model).SerializeToString()
        assert FORCED.apply(model, Context()) == 0
        assert ir.to_proto(model).SerializeToString() == after
        return model, context

    return compare


def test_declaration():
    assert (CenterNorm.name, CenterNorm.effect, CenterNorm.default_order) == ("center-norm", Effect.EXACT, None)
    assert CenterNorm.removes == {"LayerNormalization"}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_stream(check, data):
    """A patch embedding or a product, a class token, positions, blocks, and a final norm over all tokens, one, or their mean."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    d, arrays, nodes, norms, betas = data.draw(st.integers(2, 5)), {}, [], 0, 0

    def constant(name, *shape, scale=1.0):
        arrays[name] = (rng.normal(0.5, scale, shape)).astype(np.float32)
        return name

    def norm(x, y):
        nonlocal norms, betas
        inputs = [x, constant(f"g{norms}", d)]
        beta = data.draw(st.sampled_from(["absent", "zero", "given"]))
        if beta != "absent":
            inputs.append(constant(f"beta{norms}", d))
            arrays[f"beta{norms}"] *= beta == "given"
        betas += beta == "given"
        norms += 1
        epsilon = data.draw(st.sampled_from(["", ", epsilon=0.1"]))
        nodes.append(f"{y} = LayerNormalization<axis=-1{epsilon}>({', '.join(inputs)})")

    tokens = 4
    if data.draw(st.booleans()):
        inputs = "float[2,3,4,4] x"
        bias = f", {constant('bp', d)}" if data.draw(st.booleans()) else ""
        arrays["flat"] = np.array([2, d, 4])
        nodes.append(
            f"p = Conv<strides=[2,2]>(x, {constant('wp', d, 3, 2, 2)}{bias})  pf = Reshape(p, flat)  e = Transpose<perm=[0,2,1]>(pf)"
        )
    else:
        inputs = "float[2,4,3] x"
        nodes.append(f"e0 = MatMul(x, {constant('we', 3, d)})  e = Add({constant('be', d)}, e0)")
    value = "e"
    if data.draw(st.booleans()):
        nodes.append(f"t = Concat<axis=1>({constant('cls', 2, 1, d)}, e)")
        value, tokens = "t", 5
    if data.draw(st.booleans()):
        nodes.append(f"s = Add({value}, {constant('pos', *data.draw(st.sampled_from([(tokens, d), (1, tokens, d)])))})")
        value = "s"
    for block in range(data.draw(st.integers(0, 2))):
        norm(value, f"n{block}")
        w1, w2 = constant(f"w1{block}", d, 3), constant(f"w2{block}", 3, d)
        nodes.append(f"h{block} = MatMul(n{block}, {w1})  r{block} = Relu(h{block})  o{block} = MatMul(r{block}, {w2})")
        branch = f"o{block}"
        if data.draw(st.booleans()):
            nodes.append(f"ob{block} = Add({branch}, {constant(f'b2{block}', d)})")
            branch = f"ob{block}"
        if data.draw(st.booleans()):
            arrays["half"] = np.array(0.5, np.float32)
            nodes.append(f"sc{block} = Mul({branch}, half)")
            branch = f"sc{block}"
        nodes.append(f"v{block} = {data.draw(st.sampled_from(['Add', 'Sub']))}({value}, {branch})")
        value = f"v{block}"
    arrays |= {"zero": np.array(0), "one": np.array([1]), "start": np.array([0]), "axes": np.array([1])}
    head = data.draw(st.sampled_from(["", "first = Gather<axis=1>({}, zero)", "first = Slice({}, start, one, axes)",
                                      "first = ReduceMean<keepdims=0>({}, axes)"]))  # fmt: skip
    if head:
        nodes.append(head.format(value))
        value = "first"
    norm(value, "y")
    rank = 2 if "Gather" in head or "Reduce" in head else 3
    check(f"g ({inputs}) => (float[{','.join('abc'[:rank])}] y) {{ {'  '.join(nodes)} }}", arrays, norms - betas)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


class Vit(nn.Module):
    def __init__(self, width=8, depth=2):
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width, bias=False), nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1) + self.pos
        return self.head(self.norm(self.blocks(x))[:, 0])


def test_whole_vit(trace, run, operators):
    """All five norms of a ViT of two blocks, the final one included (PyTorch and ONNX Runtime are the references)."""
    torch.manual_seed(0)
    module = Vit()
    model, x = trace(module, (2, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    context = Context(target="onnxruntime")
    assert CenterNorm(force=True).apply(model, context) == 5, context.refusals
    assert "LayerNormalization" not in operators(model)
    np.testing.assert_allclose(run(model, {model.graph.inputs[0].name: x.numpy()})[0], module(x).detach().numpy(), rtol=0, atol=1e-5)


def test_target_that_does_not_gain_is_refused(build, rng):
    model, arrays = None, {"w": rng.normal(size=(3, 4)).astype(np.float32), "g": np.ones(4, np.float32)}
    model = build("g (float[2,3] x) => (float[2,4] y) { h = MatMul(x, w)  y = LayerNormalization(h, g) }", arrays)
    context = Context(target="coreml")
    assert CenterNorm().apply(model, context) == 0
    assert "not known to run RMSNormalization faster" in context.refusals[0].why
    assert CenterNorm(targets=("coreml",)).apply(model, Context(target="coreml")) == 1


def test_skipped_norm_stays_a_layer_norm_and_is_right(build, run, assert_equal_up_to_rounding, rng):
    text = """g (float[2,3] x) => (float[2,4] y, float[2,4] z) {
        h = MatMul(x, w)  y = LayerNormalization(h, g)  z = LayerNormalization<epsilon=0.1>(h, g) }"""
    model = build(text, {"w": rng.normal(size=(3, 4)).astype(np.float32), "g": np.ones(4, np.float32)})
    feeds = {"x": rng.normal(size=(2, 3)).astype(np.float32)}
    reference = run(model, feeds)
    assert FORCED.apply(model, Context(skip=frozenset({"LayerNormalization_2"}))) == 1
    assert [node.op_type for node in model.graph] == ["MatMul", "RMSNormalization", "LayerNormalization"]
    assert_equal_up_to_rounding(run(model, feeds), reference)


def graph(nodes, outputs="float[2,4] y", inputs="float[2,4] x"):
    return f"g ({inputs}) => ({outputs}) {{ {nodes} }}"


NORM = "y = LayerNormalization(h, g)"
REFUSED = {
    "the graph input 'x' writes": graph("y = LayerNormalization(x, g)"),
    "Relu 'Relu_1' writes": graph(f"p = MatMul(x, w)  h = Relu(p)  {NORM}"),
    "Relu 'Relu_2' reads": graph(f"h = MatMul(x, w)  {NORM}  r = Relu(h)  z = Neg(r)", "float[2,4] y, float[2,4] z"),
    "'h' is given out": graph(f"h = MatMul(x, w)  {NORM}", "float[2,4] y, float[2,4] h"),
    "MatMul 'MatMul_0' writes": graph(f"h = MatMul(x, v)  {NORM}", inputs="float[2,4] x, float[4,4] v"),  # computed weight
    "it has a β": graph("h = MatMul(x, w)  y = LayerNormalization(h, g, b)"),
    "Mul 'Mul_1' writes": graph(f"p = MatMul(x, w)  h = Mul(p, b)  {NORM}"),  # a scale per channel
    "MatMul 'MatMul_2' reads": graph(f"h = MatMul(x, w)  {NORM}  z = MatMul(h, w2)", "float[2,4] y, float[2,4] z"),
    "reads 'b'": graph(f"p = MatMul(x, w)  h = Add(p, b)  {NORM}  z = Mul(x, b)", "float[2,4] y, float[2,4] z"),  # a shared bias
    "Add 'Add_1' writes": graph(f"p = MatMul(x, w)  h = Add(p, one)  {NORM}"),
    "LayerNormalization 'LayerNormalization_1' reads": graph(
        "h = MatMul(x, w)  y, m = LayerNormalization(h, g)", "float[2,4] y, float[2,1] m"
    ),
    "LayerNormalization 'LayerNormalization_2' reads": graph(
        f"h = MatMul(x, w)  {NORM}  z = LayerNormalization<axis=0>(h, g2)", "float[2,4] y, float[2,4] z"
    ),
    "RMSNormalization 'RMSNormalization_2' reads": graph(
        f"h = MatMul(x, w)  {NORM}  z = RMSNormalization(h, g)", "float[2,4] y, float[2,4] z"
    ),
    "Conv 'Conv_0' writes": """g (float[2,4,3,3] x) => (float[2,9,4] y) {
        c = Conv<group=2>(x, k)  f = Reshape(c, flat)  h = Transpose<perm=[0,2,1]>(f)  y = LayerNormalization(h, g) }""",
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_refused(check, rng, why):
    arrays = {"w": rng.normal(size=(4, 4)), "w2": rng.normal(size=(4, 4)), "b": rng.normal(size=4), "g": rng.normal(size=4)}
    arrays |= {"g2": rng.normal(size=(2, 4)), "one": np.ones(1), "k": rng.normal(size=(4, 2, 1, 1))}
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()} | {"flat": np.array([2, 4, 9])}
    _, context = check(REFUSED[why], arrays, 0)
    assert any(why in refusal.why for refusal in context.refusals), context.refusals


def test_weight_that_others_read_is_refused(check, rng):
    arrays = {"w": rng.normal(size=(4, 4)).astype(np.float32), "g": np.ones(4, np.float32)}
    text = graph(f"h = MatMul(x, w)  {NORM}  z = MatMul(x, w)", "float[2,4] y, float[2,4] z")
    _, context = check(text, arrays, 0)
    assert "MatMul 'MatMul_0' writes" in context.refusals[0].why


def test_centring_that_overflows_float16_is_refused(build):
    half = {"w": np.array([[6e4, -6e4, -6e4]], np.float16), "g": np.ones(3, np.float16)}
    model = build("g (float16[2,1] x) => (float16[2,3] y) { h = MatMul(x, w)  y = LayerNormalization(h, g) }", half)
    context = Context()
    assert FORCED.apply(model, context) == 0
    assert "would not be finite in float16" in context.refusals[0].why
