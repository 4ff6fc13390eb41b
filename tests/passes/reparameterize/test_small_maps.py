"""`crop-kernels` against the graph before it in float64 and against PyTorch: random geometry, and every condition that stops it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.contracts import Context, Effect
from edgekit.graph import interpreter
from edgekit.graph.cost import cost
from edgekit.passes.reparameterize.small_maps import CropKernels


def test_declaration():
    assert (CropKernels.name, CropKernels.effect, CropKernels.default_order) == ("crop-kernels", Effect.EXACT, None)


def alive(size, stride, dilation, begin, places, taps):
    """The taps that read the map somewhere, by looking at every one."""
    return [u for u in range(taps) if any(0 <= stride * o + dilation * u - begin < size for o in range(places))]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_geometry(build, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    axes = data.draw(st.integers(1, 2))
    draw = lambda low, high: [data.draw(st.integers(low, high)) for _ in range(axes)]  # noqa: E731
    sizes, taps, strides, dilations, begin, end = draw(1, 4), draw(1, 5), draw(1, 3), draw(1, 2), draw(0, 5), draw(0, 5)
    end = [max(e, d * (k - 1) + 1 - n - b) for e, d, k, n, b in zip(end, dilations, taps, sizes, begin, strict=True)]
    groups, bias = data.draw(st.sampled_from([1, 2])), data.draw(st.booleans())
    arrays = {"w": rng.normal(size=(4, 4 // groups, *taps)).astype(np.float32)} | (
        {"b": rng.normal(size=4).astype(np.float32)} if bias else {}
    )
    if data.draw(st.booleans()):
        arrays["w"][..., 0] = 0.0
    attributes = f"group={groups}, strides={strides}, dilations={dilations}, pads={begin + end}"
    shape = ",".join(map(str, [2, 4, *sizes]))
    model = build(
        f"g (float[{shape}] x) => (float[{','.join('nchw'[: axes + 2])}] y) {{ y = Conv<{attributes}>(x, {', '.join(arrays)}) }}", arrays
    )
    feeds = {"x": rng.normal(size=(2, 4, *sizes)).astype(np.float32)}
    (reference,) = interpreter.run(model, feeds, dtype="float64").values()
    before, context = cost(model), Context()
    found = CropKernels().apply(model, context)
    (result,) = interpreter.run(model, feeds, dtype="float64").values()
    np.testing.assert_allclose(result, reference, rtol=0, atol=1e-12 * max(1, np.abs(reference).max()))
    (result,) = interpreter.run(model, feeds).values()
    np.testing.assert_allclose(result, reference, rtol=0, atol=1e-5 * max(1, np.abs(reference).max()))
    after = cost(model)
    if found:
        assert after.macs < before.macs
        assert after.bytes < before.bytes
    kernel = model.graph[0].inputs[1].const_value.numpy().shape[2:]
    for axis in range(axes):  # as small as it can be
        reading = alive(sizes[axis], strides[axis], dilations[axis], begin[axis], reference.shape[axis + 2], taps[axis])
        reading = [u for u in reading if np.take(arrays["w"], u, axis + 2).any()]
        if not reading:
            assert not found
        elif dilations[axis] == 1 and not context.refusals:
            first, last = min(reading[0], begin[axis]), taps[axis] - 1 - min(taps[axis] - 1 - reading[-1], end[axis])
            assert kernel[axis] == last - first + 1
    text = ir.to_proto(model).SerializeToString()
    assert CropKernels().apply(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == text


@pytest.mark.parametrize("groups", [1, 6])
def test_convolution_on_one_place_is_its_centre_tap(trace, run, groups):
    """Squeezed maps: 3x3, and a depthwise 7x7, after global pooling."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 3, padding=1, groups=groups), nn.Conv2d(6, 6, 7, padding=3, groups=groups)
    )
    model, x = trace(module, (2, 6, 5, 4)), torch.randn(2, 6, 5, 4)
    centre = module[1].weight[:, :, 1:2, 1:2].detach().numpy()
    assert CropKernels().apply(model, Context()) == 2
    convs = [node for node in model.graph if node.op_type == "Conv"]
    np.testing.assert_array_equal(convs[0].inputs[1].const_value.numpy(), centre)
    assert cost(model).macs == 2 * 2 * 36 // groups
    np.testing.assert_allclose(run(model, {model.graph.inputs[0].name: x.numpy()})[0], module(x).detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_automatic_padding(build, run, assert_equal_up_to_rounding, rng, mode, size):
    kernel = 4 if mode != "VALID" else size
    text = f'g (float[1,2,{size},3] x) => (float[n,c,h,w0] y) {{ y = Conv<auto_pad="{mode}", strides=[2,1]>(x, w) }}'
    model = build(text, {"w": rng.normal(size=(2, 2, kernel, 2)).astype(np.float32)})
    feeds = {"x": rng.normal(size=(1, 2, size, 3)).astype(np.float32)}
    reference = run(model, feeds)
    assert CropKernels().apply(model, Context()) == (mode != "VALID" and size < 5)
    assert_equal_up_to_rounding(run(model, feeds), reference)


def graph(nodes, inputs="float[1,2,1,1] x", outputs="float[n,c,h,w0] y"):
    return f"g ({inputs}) => ({outputs}) {{ {nodes} }}"


REFUSED = {
    "read its weight as well": graph(
        "y = Conv<pads=[1,1,1,1]>(x, w)  z = Conv(t, w)", "float[1,2,1,1] x, float[1,2,5,5] t", "float[a,b,c,d] y, float[e,f,g,h] z"
    ),
    "is not a constant": graph("y = Conv<pads=[1,1,1,1]>(x, k)", "float[1,2,1,1] x, float[2,2,3,3] k"),
    "no tap of its kernel reads": graph("y = Conv<pads=[1,1,1,1], dilations=[2,2]>(x, w2)"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(build, rng, why):
    arrays = {"w": rng.normal(size=(2, 2, 3, 3)).astype(np.float32), "w2": rng.normal(size=(2, 2, 2, 2)).astype(np.float32)}
    model = build(REFUSED[why], {name: a for name, a in arrays.items() if f", {name})" in REFUSED[why]})
    before, context = ir.to_proto(model).SerializeToString(), Context()
    assert CropKernels().apply(model, context) == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert any(why in refusal.why for refusal in context.refusals), context.refusals


def test_kernel_of_the_size_of_the_map_is_left_alone(build, rng):
    model = build(graph("y = Conv(x, w)", "float[1,2,3,3] x"), {"w": rng.normal(size=(2, 2, 3, 3)).astype(np.float32)})
    context = Context()
    assert CropKernels().apply(model, context) == 0
    assert not context.refusals


def test_skipped_place_is_left_alone(build, rng):
    model = build(graph("y = Conv<pads=[1,1,1,1]>(x, w)"), {"w": rng.normal(size=(2, 2, 3, 3)).astype(np.float32)})
    assert CropKernels().apply(model, Context(skip=frozenset({"Conv_0"}))) == 0
