"""The algebra of composed linear forms in float64 against two PyTorch convolutions in a row."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from edgekit.passes.reparameterize.composition import composed_bias_map, composed_weights, lift, without_zeros
from edgekit.passes.reparameterize.geometry import Geometry, Taps, composed_geometry, is_zero_outside, why_not_composed


def convolve(x, weights, geometry):
    begins, ends = geometry.pads()[:2], geometry.pads()[2:]
    padded = functional.pad(x, (begins[1], ends[1], begins[0], ends[0]))
    weight, bias = map(torch.from_numpy, weights)
    return functional.conv2d(padded, weight, bias, geometry.stride, 0, tuple(tap.step for tap in geometry.taps), geometry.groups)


@st.composite
def convolutions(draw, channels, size, rng, largest=3, widest=2):
    """Draws a geometry on `[2, channels, *size]` and random weights for it."""
    kernels, pads = st.integers(1, largest), st.integers(0, widest)
    kernel, dilation, stride = (draw(st.tuples(*[numbers] * 2)) for numbers in (kernels, st.integers(1, 2), st.integers(1, 2)))
    pad = draw(st.tuples(*[pads] * 4))
    out = [(size[axis] + pad[axis] + pad[2 + axis] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1 for axis in range(2)]
    if min(out) < 1:
        return draw(convolutions(channels, size, rng, 1, 0))
    outputs = draw(st.sampled_from([4, 8]))
    groups = draw(st.sampled_from([groups for groups in (1, 2, 4, 8) if channels % groups == 0 and outputs % groups == 0]))
    taps = tuple(Taps(-pad[axis], dilation[axis], kernel[axis]) for axis in range(2))
    geometry = Geometry(groups, (2, channels, *size), (2, outputs, *out), stride, taps, draw(st.booleans()))
    return geometry, (rng.normal(size=geometry.weight_shape), rng.normal(size=outputs) * geometry.has_bias)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_two_convolutions_are_one_or_not_composed(data):
    """Where a composition is refused it is wrong: the composed kernel differs at the rim."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.tuples(*[st.integers(4, 8)] * 2))
    inner, first = data.draw(convolutions(4, size, rng))
    outer, second = data.draw(convolutions(inner.out_shape[1], inner.out_shape[2:], rng))
    x = torch.from_numpy(rng.normal(0.3, 1, (2, 4, *size)))
    expected = convolve(convolve(x, first, inner), second, outer)
    assert tuple(expected.shape) == outer.out_shape
    geometry = composed_geometry(outer, inner)
    weights = composed_weights(second, outer, first, inner, geometry)
    assert weights[0].shape == geometry.weight_shape
    result = convolve(x, weights, geometry)
    bound = 1e-10 * max(1.0, float(expected.abs().max()))
    if why_not_composed(outer, inner) is None:
        assert result.shape == expected.shape
        np.testing.assert_allclose(result, expected, rtol=0, atol=bound)
    elif is_zero_outside(outer, inner):
        shift = composed_bias_map(second, outer, first[1], inner.out_shape[2:])
        linear = convolve(x, (weights[0], np.zeros(outer.out_shape[1])), geometry)
        np.testing.assert_allclose(linear + shift, expected, rtol=0, atol=bound)
    elif inner.stride == outer.stride == (1, 1) and result.shape == expected.shape:
        assert float((result - expected).abs().max()) > bound


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Geometry(6, (1, 6, 5, 4), (1, 6, 5, 4), (1, 1), (Taps(0, 1, 1),) * 2, True),
         Geometry(2, (1, 6, 5, 4), (1, 4, 3, 2), (1, 1), (Taps(0, 1, 3),) * 2, True)),
        (Geometry(3, (1, 6, 5, 4), (1, 6, 3, 2), (1, 1), (Taps(0, 1, 3),) * 2, True),
         Geometry(6, (1, 6, 3, 2), (1, 6, 3, 2), (1, 1), (Taps(0, 1, 1),) * 2, True)),
        (Geometry(6, (1, 6, 5, 4), (1, 6, 5, 4), (1, 1), (Taps(-1, 1, 3),) * 2, True),
         Geometry(2, (1, 6, 5, 4), (1, 4, 5, 4), (1, 1), (Taps(0, 1, 1),) * 2, True)),
    ],
)  # fmt: skip
def test_scales_of_channels_and_depthwise_kernels_multiply_without_being_made_dense(first, second):
    rng = np.random.default_rng(0)
    weights = [(rng.normal(size=geometry.weight_shape), rng.normal(size=geometry.out_shape[1])) for geometry in (first, second)]
    geometry = composed_geometry(second, first)
    assert geometry.groups == min(first.groups, second.groups)
    x = torch.from_numpy(rng.normal(0.3, 1, first.in_shape))
    result = convolve(x, composed_weights(weights[1], second, weights[0], first, geometry), geometry)
    np.testing.assert_allclose(result, convolve(convolve(x, weights[0], first), weights[1], second), rtol=0, atol=1e-12)


def test_lifted_groups_are_the_same_convolution():
    rng = np.random.default_rng(0)
    weight, x = rng.normal(size=(12, 2, 3, 3)), torch.from_numpy(rng.normal(size=(1, 12, 5, 5)))
    expected = functional.conv2d(x, torch.from_numpy(weight), groups=6)
    for groups in (6, 3, 2, 1):
        lifted = torch.from_numpy(lift(weight, 6, groups))
        np.testing.assert_allclose(functional.conv2d(x, lifted, groups=groups), expected, rtol=0, atol=1e-12)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_form_without_its_zeros_is_the_same(data):
    """Random rims, blocks and biases are set to zero; the cropped convolution must have pads that ONNX allows."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = data.draw(st.tuples(*[st.integers(4, 8)] * 2))
    geometry, (weight, bias) = data.draw(convolutions(4, size, rng))
    for axis in (2, 3):
        taps = np.moveaxis(weight, axis, 0)
        taps[: data.draw(st.integers(0, 2))] = 0
        taps[taps.shape[0] - data.draw(st.integers(0, 2)) :] = 0
    if weight.shape[1] > 1 and data.draw(st.booleans()):
        rows, columns = weight.shape[0] // geometry.groups // 2, weight.shape[1] // 2
        blocks = weight.reshape(geometry.groups, 2, rows, 2, columns, *weight.shape[2:])
        blocks[:, 0, :, 1] = blocks[:, 1, :, 0] = 0
    found, weights = without_zeros(geometry, (weight, bias))
    assert weights[0].shape == found.weight_shape
    assert found.macs <= geometry.macs
    assert min(found.pads()) >= 0
    x = torch.from_numpy(rng.normal(0.3, 1, (2, 4, *size)))
    expected = convolve(x, (weight, bias), geometry)
    result = convolve(x, weights, found)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12)
    assert without_zeros(found, weights)[0] == found


def test_nothing_is_left_out_where_nothing_is_zero():
    geometry = Geometry(1, (1, 4, 6, 6), (1, 4, 6, 6), (1, 1), (Taps(-1, 1, 3),) * 2, True)
    weights = (np.ones(geometry.weight_shape), np.ones(4))
    assert without_zeros(geometry, weights)[0] == geometry
    assert without_zeros(geometry, (weights[0], np.zeros(4)))[0] == replace(geometry, has_bias=False)
    blocks = np.kron(np.eye(4), np.ones((1, 1)))[:, :, None, None] * np.ones((3, 3))
    assert without_zeros(geometry, (blocks, weights[1]))[0].groups == 4
    shuffled = blocks[[1, 0, 3, 2]]  # channels 0 and 1 swapped, 2 and 3 swapped: two groups and not four
    assert without_zeros(geometry, (shuffled, weights[1]))[0].groups == 2
