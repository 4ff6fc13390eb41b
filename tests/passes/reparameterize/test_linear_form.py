"""The algebra of linear forms in float64 against sums of PyTorch convolutions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from edgekit.passes.reparameterize.geometry import Taps, merged_geometry, union
from edgekit.passes.reparameterize.linear_form import conv_pads, interpret, merged_weights


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.builds(Taps, st.integers(-6, 6), st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4))
def test_union_contains_every_tap_and_is_the_coarsest(taps):
    wide = union(taps)
    offsets = {tap.start + tap.step * index for tap in taps for index in range(tap.count)}
    grid = {wide.start + wide.step * index for index in range(wide.count)}
    assert offsets <= grid
    assert (min(offsets), max(offsets)) == (min(grid), max(grid)) == (wide.start, wide.last)
    assert math.gcd(*(offset - wide.start for offset in offsets)) in (0, wide.step)


def convolve(x, w, b, stride, dilation, groups, pads):
    padded = functional.pad(x, (pads[1], pads[3], pads[0], pads[2]))
    return functional.conv2d(padded, w, b, stride, 0, dilation, groups)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_sum_of_convolutions_is_one_convolution(build, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size, channels = data.draw(st.tuples(st.integers(5, 9), st.integers(5, 9))), 4
    stride = data.draw(st.tuples(*[st.integers(1, 2)] * 2))
    out = tuple(-(-extent // step) for extent, step in zip(size, stride, strict=True))
    x = torch.from_numpy(rng.normal(0.3, 1, (2, channels, *size)))
    expected, forms = 0, []
    for _ in range(data.draw(st.integers(1, 4))):
        kernel, dilation = data.draw(st.tuples(*[st.integers(1, 5)] * 2)), data.draw(st.tuples(*[st.integers(1, 2)] * 2))
        groups, times, bias = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.integers(1, 2)), data.draw(st.booleans())
        begins, ends = [], []
        for axis in range(2):
            slack = data.draw(st.integers(0, stride[axis] - 1))
            total = max(0, (out[axis] - 1) * stride[axis] + dilation[axis] * (kernel[axis] - 1) + 1 - size[axis] + slack)
            begins.append(data.draw(st.integers(0, total)))
            ends.append(total - begins[-1])
        arrays = {"w": rng.normal(size=(8, channels // groups, *kernel)), **({"b": rng.normal(size=8)} if bias else {})}
        attributes = f"<group={groups}, strides={list(stride)}, dilations={list(dilation)}, pads={begins + ends}>"
        model = build(
            f"g (double[2,{channels},{size[0]},{size[1]}] x) => (double[n,c,h,w0] y) "
            f"{{ y = Conv{attributes}(x, w{', b' if bias else ''}) }}",
            arrays,
        )
        form, obstacle = interpret(model.graph[0].outputs[0], free=True)
        assert obstacle is None
        forms.append((form, times))
        w, b = torch.from_numpy(arrays["w"]), torch.from_numpy(arrays["b"]) if bias else None
        expected = expected + times * convolve(x, w, b, stride, dilation, groups, begins + ends)
    geometry = merged_geometry([form.geometry for form, _ in forms])
    weight, bias = (torch.from_numpy(array) for array in merged_weights(forms, geometry))
    merged = convolve(x, weight, bias, stride, tuple(tap.step for tap in geometry.taps), geometry.groups, geometry.pads())
    assert tuple(weight.shape) == geometry.weight_shape
    assert merged.shape == expected.shape
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))


def test_dilated_kernel_and_pointwise_stay_dilated():
    assert union([Taps(-2, 2, 3), Taps(0, 1, 1)]) == Taps(-2, 2, 3)
    assert union([Taps(-2, 2, 3), Taps(-1, 1, 3)]) == Taps(-2, 1, 5)


SIZES = [(7, 3, 2, 1), (8, 3, 2, 1), (8, 2, 1, 1), (9, 3, 1, 1), (8, 1, 2, 1)]
DILATED = [("VALID", 9, 3, 1, 2), ("NOTSET", 9, 3, 1, 2)]  # ONNX Runtime refuses SAME with dilations


@pytest.mark.parametrize(
    ("auto_pad", "size", "kernel", "stride", "dilation"),
    [(mode, *sizes) for mode in ("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET") for sizes in SIZES] + DILATED,
)
def test_auto_pad_is_what_onnx_runtime_does(build, run, auto_pad, size, kernel, stride, dilation):
    rng = np.random.default_rng(0)
    attributes = f"strides=[{stride}], dilations=[{dilation}]"
    arrays = {"w": rng.normal(size=(3, 2, kernel)).astype(np.float32)}
    text = "g (float[1,2,%d] x) => (float[n,c,l] y) { y = Conv<%s>(x, w) }"
    automatic = build(text % (size, f'{attributes}, auto_pad="{auto_pad}"'), arrays)
    pads = conv_pads(automatic.graph[0])
    explicit = build(text % (size, f"{attributes}, pads={pads}"), arrays)
    feeds = {"x": rng.normal(size=(1, 2, size)).astype(np.float32)}
    np.testing.assert_array_equal(run(explicit, feeds)[0], run(automatic, feeds)[0])
