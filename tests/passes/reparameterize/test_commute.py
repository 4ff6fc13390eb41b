"""`commute-linear` against the graph before it in float64: random maps and products, whole heads, and every condition that stops it."""

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
from edgekit.passes.reparameterize.commute import CommuteLinear

SIZES = {"scales2": np.array([1, 1, 2, 2], np.float32), "sizes": np.array([1, 4, 6, 10], np.int64)}


@pytest.fixture(scope="session")
def check(build, run):
    """Returns a check that the pass rewrites as often as said, keeps the numbers, lowers MACs and finds nothing more."""

    def compare(text, arrays, expected=None):
        arrays = {name: np.asarray(a, np.float32) if np.asarray(a).dtype == np.float64 else a for name, a in arrays.items()}
        model = build(text, {name: a for name, a in arrays.items() if any(f"{e}{name}{t}" in text for e in "( " for t in ",)")})
        rng = np.random.default_rng(1)
        feeds = {v.name: rng.normal(0.3, 1, list(v.shape)).astype(np.float32) for v in model.graph.inputs}
        reference = interpreter.run(model, feeds, dtype="float64")
        before, bytes_before, proto = cost(model).macs, cost(model).bytes, ir.to_proto(model).SerializeToString()
        context = Context()
        found = CommuteLinear().apply(model, context)
        assert found == len(context.rewrites)
        if expected is not None:
            assert found == expected, context.refusals
        if not found:
            assert ir.to_proto(model).SerializeToString() == proto
            return model, context
        assert cost(model).macs < before
        assert cost(model).bytes <= bytes_before + 256  # the shapes of new Reshapes
        for result, array in zip(interpreter.run(model, feeds, dtype="float64").values(), reference.values(), strict=True):
            np.testing.assert_allclose(result, array, rtol=0, atol=1e-10 * np.abs(array).max())
        for result, array in zip(run(model, feeds), reference.values(), strict=True):
            np.testing.assert_allclose(result, array, rtol=0, atol=1e-5 * np.abs(array).max())
        after = ir.to_proto(model).SerializeToString()
        assert CommuteLinear().apply(model, Context()) == 0
        assert ir.to_proto(model).SerializeToString() == after
        return model, context

    return compare


def test_declaration():
    assert (CommuteLinear.name, CommuteLinear.effect, CommuteLinear.default_order) == ("commute-linear", Effect.EXACT, None)


MODES = [
    ("nearest", "asymmetric"), ("nearest", "half_pixel"), ("nearest", "align_corners"), ("linear", "half_pixel"), ("linear", "asymmetric"),
    ("linear", "align_corners"), ("linear", "pytorch_half_pixel"), ("cubic", "half_pixel"),
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_product_with_any_map(check, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    c, o = 2 * data.draw(st.integers(1, 3)), 2 * data.draw(st.integers(1, 3))
    h, w = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6))
    kind = data.draw(st.sampled_from(["conv", "right", "left"]))
    shape = f"1,{h},{w},{c}" if kind == "right" else f"1,{c},{h},{w}"
    arrays: dict[str, np.ndarray] = {"e": rng.normal(size=(1, o, c)), "b": rng.normal(size=o)}
    first = data.draw(st.booleans())  # the map is before the product

    def resize(channels):
        h2, w2 = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
        mode, place = data.draw(st.sampled_from(MODES))
        arrays["n"] = np.array([1, h2, w2, channels] if kind == "right" else [1, channels, h2, w2])
        mode = "nearest" if kind == "right" and mode == "cubic" else mode
        return '{y} = Resize<mode="%s", coordinate_transformation_mode="%s">({x}, , , n)' % (mode, place)  # noqa: UP031

    def spread(channels):  # nearest upsampling as Reshape, Expand, Reshape
        sizes = [(1, h, 1, w, 1), (1, h, 2, w, 3), (1, h * 2, w * 3)]
        for name, places in zip(("r1", "r2", "r3"), sizes, strict=True):
            arrays[name] = np.array([*places, channels] if kind == "right" else [1, channels, *places[1:]])
        return "{y}1 = Reshape({x}, r1)  {y}2 = Expand({y}1, r2)  {y} = Reshape({y}2, r3)"

    def average(channels):
        if kind == "right" or data.draw(st.booleans()):
            arrays["axes"] = np.array([1, 2] if kind == "right" else [2, 3])
            return "{y} = ReduceMean<keepdims=%d>({x}, axes)" % data.draw(st.integers(0, 1))  # noqa: UP031
        if data.draw(st.booleans()):
            return "{y} = GlobalAveragePool({x})"
        pad, count = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
        return "{y} = AveragePool<kernel_shape=[2,2], strides=[2,1], pads=[%d,0,0,%d], count_include_pad=%d>({x})" % (pad, pad, count)  # noqa: UP031

    def product():
        if kind == "conv":
            groups = data.draw(st.sampled_from([1, 2]))
            arrays["w"] = rng.normal(size=(o, c // groups, 1, 1))
            bias = data.draw(st.sampled_from(["", ", b"]))
            return "{y} = Conv<group=%d>({x}, w%s)" % (groups, bias)  # noqa: UP031
        if kind == "right":
            arrays["w"] = rng.normal(size=(c, o))
            return data.draw(st.sampled_from(["{y} = MatMul({x}, w)", "{y}0 = MatMul({x}, w)  {y} = Add(b, {y}0)"]))
        return "{y}0 = Reshape({x}, flat)  {y} = MatMul(e, {y}0)"

    if first:
        step = data.draw(st.sampled_from([resize, spread]))(c).format(x="x", y="a")
        arrays["flat"] = np.array([1, c, -1])
        nodes = f"{step}  {product().format(x='a', y='y')}"
    else:
        arrays["flat"] = np.array([1, c, h * w])
        nodes = product().format(x="x", y="p")
        if kind == "left":
            arrays["back"] = np.array([1, o, h, w])
            nodes += "  q = Reshape(p, back)"
        last = "q" if kind == "left" else "p"
        residual = data.draw(st.booleans())
        if residual:
            nodes += f"  s = Add({last}, z)"
            last = "s"
        nodes += "  " + data.draw(st.sampled_from([resize, average]))(o).format(x=last, y="y")
    z = f", float[1,{h},{w},{o}] z" if kind == "right" else f", float[1,{o},{h},{w}] z"
    inputs = f"float[{shape}] x" + (z if "z)" in nodes else "")
    rank = 3 if kind == "left" and first else 2 if "keepdims=0" in nodes else 4
    check(f"g ({inputs}) => (float[{','.join('abcd'[:rank])}] y) {{ {nodes} }}", arrays)


def test_segmentation_head(trace, run, operators):
    """A class product after bilinear upsampling is done at the lower resolution: a quarter of the MACs."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduce, self.classify = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.classify(functional.interpolate(torch.relu(self.reduce(x)), scale_factor=2, mode="bilinear"))

    module = Head()
    model, x = trace(module, (1, 6, 7, 5)), torch.randn(1, 6, 7, 5)
    before = cost(model).macs
    assert CommuteLinear().apply(model, Context()) == 1
    assert before - cost(model).macs == 3 * 35 * 8 * 5
    assert [node.op_type for node in model.graph][-1] == "Resize"
    np.testing.assert_allclose(run(model, {model.graph.inputs[0].name: x.numpy()})[0], module(x).detach().numpy(), rtol=0, atol=1e-5)


def test_last_mlp_before_the_token_mean(trace, run):
    """The second linear layer of the last MLP is needed for the mean of the tokens only; the residual is averaged on its own."""

    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.fc1, self.fc2, self.fc_norm, self.head = (
                nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 3),
            )  # fmt: skip

        def forward(self, x):
            x = x + self.fc2(functional.gelu(self.fc1(self.norm(x))))
            return self.head(self.fc_norm(x.mean(1)))

    module = Tail()
    model, x = trace(module, (2, 11, 8)), torch.randn(2, 11, 8)
    before = cost(model).macs
    context = Context()
    assert CommuteLinear().apply(model, context) == 1, context.refusals
    assert before - cost(model).macs == 2 * 10 * 32 * 8
    np.testing.assert_allclose(run(model, {model.graph.inputs[0].name: x.numpy()})[0], module(x).detach().numpy(), rtol=0, atol=1e-5)


def test_masks_resized_after_the_product_with_embeddings(check, rng):
    """Mask embeddings times pixel features, then resized to a small map: the features are resized first."""
    text = """g (float[1,5,8] e, float[1,8,8,16] f) => (float[1,5,2,4] y) {
        flat = Reshape(f, fs)  m = MatMul(e, flat)  map = Reshape(m, ms)
        y = Resize<mode="linear", coordinate_transformation_mode="half_pixel">(map, , , n) }"""
    sizes = {"fs": np.array([1, 8, 128]), "ms": np.array([1, 5, 8, 16]), "n": np.array([1, 5, 2, 4])}
    model, _ = check(text, sizes, 1)
    assert cost(model).macs == 5 * 8 * 8


def test_names_and_modules_stay(build, rng):
    model = build(
        "g (float[1,4,3,5] x) => (float[1,2,6,10] y) { a = Resize(x, , scales2)  y = Conv(a, w) }",
        {"scales2": SIZES["scales2"], "w": rng.normal(size=(2, 4, 1, 1)).astype(np.float32)},
    )
    for node in model.graph:
        node.metadata_props["edgekit.module"] = f"decoder.{node.op_type}"
    CommuteLinear().apply(model, Context())
    found = [(node.name, node.metadata_props["edgekit.module"]) for node in model.graph]
    assert found == [("Conv_1", "decoder.Conv"), ("Resize_0", "decoder.Resize")]
    assert [value.name for value in model.graph.outputs] == ["y"]


def test_skipped_place_is_left_alone(build, rng):
    text = "g (float[1,4,3,5] x) => (float[1,2,6,10] y) { a = Resize(x, , scales2)  y = Conv(a, w) }"
    model = build(text, {"scales2": SIZES["scales2"], "w": rng.normal(size=(2, 4, 1, 1)).astype(np.float32)})
    assert CommuteLinear().apply(model, Context(skip=frozenset({"Conv_1"}))) == 0


IN, OUT, CONV = "g (float[1,4,3,5] x) => ", "(float[n,c,h,w0] y) ", "y = Conv(a, w, b)"
POOL = "a = Conv(x, w, b)  y = AveragePool<kernel_shape=[2,2], strides=[2,2], %s>(a)"
REFUSED = {
    "cubic with exclude_outside": f'{IN}{OUT}{{ a = Resize<mode="cubic", exclude_outside=1>(x, , , sizes)  {CONV} }}',
    "it has antialias": f'{IN}{OUT}{{ a = Resize<mode="linear", antialias=1>(x, , , sizes)  {CONV} }}',
    "fills places outside": f'{IN}{OUT}{{ a = Resize<coordinate_transformation_mode="tf_crop_and_resize">(x, roi, , sizes)  {CONV} }}',
    "keeps the aspect ratio": """g (float[1,4,10,10] x) => (float[1,2,11,11] y) {
        a = Resize<mode="linear", keep_aspect_ratio_policy="not_smaller">(x, , , s11)  y = Conv(a, w, b) }""",
    "is read elsewhere": f"{IN}(float[n,c,h,w0] y, float[n,c,h,w0] z) {{ a = Resize(x, , , sizes)  {CONV}  z = Relu(a) }}",
    "do not sum to one": f"{IN}{OUT}{{ {POOL % 'pads=[1,0,0,0], count_include_pad=1'} }}",
    "sum to one everywhere": f"{IN}{OUT}{{ {POOL % 'ceil_mode=1'} }}",
    "averages, 'a', is read": f"{IN}(float[n,c,h,w0] y, float[n,c,h,w0] z) {{ a = Conv(x, w, b)  y = GlobalAveragePool(a)  z = Relu(a) }}",
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(check, rng, why):
    arrays = {"w": rng.normal(size=(2, 4, 1, 1)), "b": rng.normal(size=2), "roi": np.zeros(8, np.float32), "s11": np.array([1, 4, 11, 11])}
    _, context = check(REFUSED[why], arrays | SIZES, 0)
    assert any(why in refusal.why for refusal in context.refusals), context.refusals


@pytest.mark.parametrize(
    "text",
    [
        f"{IN}{OUT}{{ a = Resize(x, , , less)  {CONV} }}",  # fewer places already
        f"{IN}{OUT}{{ a = Conv(x, w, b)  y = Resize(a, , , more) }}",
        f"{IN}{OUT}{{ a = Resize(x, , scales2)  y = Conv<pads=[1,1,1,1]>(a, w, b) }}",  # zeros around
        f"{IN}{OUT}{{ a = Resize(x, , scales2)  y = Conv<strides=[2,2]>(a, w, b) }}",
        f"{IN}{OUT}{{ a = Resize(x, , scales2)  y = Conv(a, w3, b) }}",
        f"{IN}{OUT}{{ a = Resize(x, , scales2)  r = Relu(a)  y = Conv(r, w, b) }}",
        f"{IN}{OUT}{{ a = Resize<mode=\"linear\">(x, , channels)  y = Conv(a, w, b) }}",  # as many channels, interpolated
        f"{IN}{OUT}{{ a = Conv(x, w, b)  y = MaxPool<kernel_shape=[2,2]>(a) }}",
        "g (float[1,4,3,5] x) => (float[n,h,w0,c] y) { a = Conv(x, w, b)  y = ReduceMean(a, axes) }",  # over channels
    ],
)  # fmt: skip
def test_not_applied(check, rng, text):
    arrays = {"w": rng.normal(size=(2, 4, 1, 1)), "w3": rng.normal(size=(2, 4, 3, 3)), "b": rng.normal(size=2)}
    sizes = {"less": np.array([1, 4, 2, 2]), "more": np.array([1, 2, 9, 9]), "axes": np.array([1, 2])}
    sizes["channels"] = np.array([1, 1.1, 2, 2], np.float32)
    check(text, arrays | sizes | SIZES, 0)


def test_average_that_counts_padding_is_free_without_bias(check, rng):
    check(f"{IN}{OUT}{{ {POOL.replace(', b', '') % 'pads=[1,1,0,0], count_include_pad=1'} }}", {"w": rng.normal(size=(2, 4, 1, 1))}, 1)


def test_two_products_in_a_row_and_a_computed_weight(check, rng):
    text = """g (float[2,5,4] x, float[4,3] w, float[2,5,4] r) => (float[2,1,3] y) {
        a = Add(x, r)  h = MatMul(a, v)  p = MatMul(h, w)  y = ReduceMean(p, axes) }"""
    model, _ = check(text, {"v": rng.normal(size=(4, 4)), "axes": np.array([1])}, 2)
    assert [node.op_type for node in model.graph] == ["Add", "ReduceMean", "MatMul", "MatMul"]
