"""Convolutions of the evaluator against sums over windows in float64, ONNX Runtime's automatic padding and coremltools' shapes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from edgekit.errors import UnsupportedOpError
from edgekit.targets.coreml.reference.operators.convolution import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred_shape, run

Array = np.ndarray[Any, Any]


def _random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _pads(kind: str, sizes: Any, kernel: Any, strides: Any, custom: list[int]) -> list[tuple[int, int]]:
    if kind == "custom":
        return [(custom[2 * at], custom[2 * at + 1]) for at in range(len(sizes))]
    found = []
    for size, width, stride in zip(sizes, kernel, strides, strict=True):
        total = max(0, (int(np.ceil(size / stride)) - 1) * stride + width - size) if kind != "valid" else 0
        found.append((total // 2, total - total // 2) if kind == "same" else (total - total // 2, total // 2))
    return found


def _direct(x: Array, weight: Array, bias: Array, strides: Any, pads: Any, dilations: Any, groups: int) -> Array:
    """The sum of each window's products, written out."""
    wide = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads])
    kernel = weight.shape[2:]
    sizes = [
        (size - (width - 1) * spread - 1) // step + 1
        for size, width, spread, step in zip(wide.shape[2:], kernel, dilations, strides, strict=True)
    ]
    result = np.zeros((x.shape[0], weight.shape[0], *sizes))
    per_in, per_out = weight.shape[1], weight.shape[0] // groups
    for group, at in itertools.product(range(groups), np.ndindex(*sizes)):
        window = tuple(
            slice(place * step, place * step + (width - 1) * spread + 1, spread)
            for place, step, width, spread in zip(at, strides, kernel, dilations, strict=True)
        )
        taken = wide[(slice(None), slice(group * per_in, (group + 1) * per_in), *window)]
        out = slice(group * per_out, (group + 1) * per_out)
        result[(slice(None), out, *at)] = taken.reshape(len(x), -1) @ weight[out].reshape(per_out, -1).T.astype(np.float64)
    return result + bias.reshape(-1, *[1] * len(kernel))


# sizes, kernel, strides, dilations, groups, custom pad
CASES: list[tuple[Any, ...]] = [
    ((9,), (3,), (1,), (1,), 1, [1, 1]),
    ((10,), (4,), (3,), (2,), 2, [2, 0]),
    ((7, 6), (3, 3), (1, 1), (1, 1), 1, [1, 1, 1, 1]),
    ((7, 6), (3, 2), (2, 1), (1, 2), 2, [0, 2, 1, 0]),
    ((8, 8), (5, 2), (2, 3), (1, 1), 4, [2, 2, 0, 1]),
    ((5, 4), (1, 1), (2, 2), (1, 1), 4, [0, 0, 0, 0]),
    ((4, 5, 6), (2, 3, 1), (1, 2, 2), (1, 1, 1), 1, [1, 0, 1, 1, 0, 0]),
    ((5, 5, 5), (2, 2, 2), (2, 1, 1), (2, 1, 3), 2, [0, 1, 1, 0, 2, 1]),
]


def _parameters(strides: Any, dilations: Any, groups: int, kind: str, pad: list[int]) -> dict[str, Any]:
    given = {"strides": np.array(strides, np.int32), "dilations": np.array(dilations, np.int32), "groups": groups, "pad_type": kind}
    return {**given, "pad": np.array(pad, np.int32)} if kind == "custom" else given


def test_signatures() -> None:
    check_signatures(TABLE)


@pytest.mark.parametrize("kind", ["valid", "same", "same_lower", "custom"])
@pytest.mark.parametrize(("sizes", "kernel", "strides", "dilations", "groups", "pad"), CASES)
def test_conv(sizes: Any, kernel: Any, strides: Any, dilations: Any, groups: int, pad: list[int], kind: str) -> None:
    x, weight, bias = _random(2, 4, *sizes), _random(8, 4 // groups, *kernel), _random(8)
    parameters = _parameters(strides, dilations, groups, kind, pad)
    result = call(TABLE["conv"], x=x, weight=weight, bias=bias, **parameters)
    dilated = [(width - 1) * spread + 1 for width, spread in zip(kernel, dilations, strict=True)]
    pads = _pads(kind, sizes, dilated, strides, pad)
    np.testing.assert_allclose(result, _direct(x, weight, bias, strides, pads, dilations, groups), atol=1e-4)
    assert result.shape == inferred_shape("conv", "iOS16", x=x, weight=weight, bias=bias, **parameters)


def test_conv_of_defaults() -> None:
    x, weight = _random(1, 3, 6, 6), _random(2, 3, 3, 3)
    result = call(TABLE["conv"], x=x, weight=weight)
    np.testing.assert_allclose(result, _direct(x, weight, np.zeros(2), (1, 1), [(0, 0)] * 2, (1, 1), 1), atol=1e-4)


def _session(operator: str, x: Array, weight: Array, **attributes: Any) -> Array:
    node = onnx.helper.make_node(operator, ["x", "w"], ["y"], **attributes)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, x.shape), value("w", 1, weight.shape)], [value("y", 1, [None] * x.ndim)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x, "w": weight})[0])


@pytest.mark.parametrize(("kind", "auto_pad"), [("same", "SAME_UPPER"), ("same_lower", "SAME_LOWER")])
@pytest.mark.parametrize(("size", "width", "stride"), list(itertools.product([5, 6, 7], [1, 2, 3, 4], [1, 2, 3])))
def test_same_is_that_of_onnx(size: int, width: int, stride: int, kind: str, auto_pad: str) -> None:
    x, weight = _random(1, 2, size, size), _random(3, 2, width, width)
    result = call(TABLE["conv"], x=x, weight=weight, strides=np.array([stride, stride], np.int32), pad_type=kind)
    np.testing.assert_allclose(result, _session("Conv", x, weight, auto_pad=auto_pad, strides=[stride, stride]), atol=1e-5)


@pytest.mark.parametrize("scale", [(), (4,), (4, 1, 1, 1)])
def test_conv_quantized(scale: tuple[int, ...]) -> None:
    x, scales, offsets = _random(1, 2, 5, 5), _random(*scale), np.full(scale, -0.5, np.float32)
    weight = np.random.default_rng(3).integers(0, 256, (4, 2, 3, 3)).astype(np.uint8)
    result = call(
        TABLE["conv_quantized"],
        x=x,
        weight=weight,
        quantization_type="linear",
        nbits=8,
        quant_scale=scales,
        quant_bias=offsets,
        pad_type="same",
    )
    spread = (slice(None), None, None, None) if len(scale) == 1 else ()
    floats = weight * scales[spread].astype(np.float64) + offsets[spread]
    np.testing.assert_allclose(result, _direct(x, floats, np.zeros(4), (1, 1), [(1, 1)] * 2, (1, 1), 1), rtol=1e-5, atol=1e-2)


def test_conv_quantized_without_a_table_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match="lut"):
        call(TABLE["conv_quantized"], x=_random(1, 1, 3), weight=_random(1, 1, 1), quantization_type="lut", quant_scale=1.0, quant_bias=0.0)


def _spread(x: Array, weight: Array, strides: Any, dilations: Any, groups: int) -> Array:
    """Each element of the input puts the scaled kernel into the result."""
    per_in, per_out, kernel = x.shape[1] // groups, weight.shape[1], weight.shape[2:]
    sizes = [
        (size - 1) * step + (width - 1) * spread + 1
        for size, step, width, spread in zip(x.shape[2:], strides, kernel, dilations, strict=True)
    ]
    result = np.zeros((x.shape[0], per_out * groups, *sizes))
    for group, at, tap in itertools.product(range(groups), np.ndindex(*x.shape[2:]), np.ndindex(*kernel)):
        place = tuple(i * step + k * spread for i, step, k, spread in zip(at, strides, tap, dilations, strict=True))
        channels = slice(group * per_in, (group + 1) * per_in)
        values = x[(slice(None), channels, *at)].astype(np.float64) @ weight[(channels, slice(None), *tap)]
        result[(slice(None), slice(group * per_out, (group + 1) * per_out), *place)] += values
    return result


# pad_type, custom pad, difference of output_shape to the documented size
ENDS = [("valid", 0, 0), ("custom", 1, 0), ("same", 0, 0), ("valid", 0, 1), ("custom", 1, 1), ("same", 0, -1)]


@pytest.mark.parametrize(("kind", "pad", "more"), ENDS)
@pytest.mark.parametrize(
    ("sizes", "kernel", "strides", "dilations", "groups"),
    [
        ((5,), (3,), (2,), (1,), 1),
        ((4, 3), (3, 4), (2, 3), (1, 1), 2),
        ((4, 4), (2, 3), (3, 1), (1, 2), 1),
        ((3, 2, 3), (2, 3, 2), (1, 2, 1), (2, 1, 1), 2),
    ],
)
def test_conv_transpose(sizes: Any, kernel: Any, strides: Any, dilations: Any, groups: int, kind: str, pad: int, more: int) -> None:
    x, weight, bias = _random(2, 4, *sizes), _random(4, 3, *kernel), _random(3 * groups)
    amounts = [pad, 0] * len(sizes)
    parameters = _parameters(strides, dilations, groups, kind, amounts)
    documented = [
        size * step if kind == "same" else (size - 1) * step + (width - 1) * spread + 1 - pad
        for size, step, width, spread in zip(sizes, strides, kernel, dilations, strict=True)
    ]
    targets = [size + more for size in documented]
    if more:
        parameters["output_shape"] = np.array([2, 3 * groups, *targets], np.int32)
    result = call(TABLE["conv_transpose"], x=x, weight=weight, bias=bias, **parameters)
    assert result.shape == inferred_shape("conv_transpose", x=x, weight=weight, bias=bias, **parameters)
    full = _spread(x, weight, strides, dilations, groups)
    dilated = [(width - 1) * spread + 1 for width, spread in zip(kernel, dilations, strict=True)]
    fronts = [before for before, _ in _pads(kind, targets, dilated, strides, amounts)]
    expected = np.pad(full, [(0, 0), (0, 0), *[(0, max(0, size)) for size in targets]])
    for axis, (front, size) in enumerate(zip(fronts, targets, strict=True), 2):
        expected = expected.take(range(front, front + size), axis)
    np.testing.assert_allclose(result, expected + bias.reshape(-1, *[1] * len(sizes)), atol=1e-4)


@pytest.mark.parametrize("kind", ["valid", "same", "custom"])
@pytest.mark.parametrize(("size", "width", "stride"), [(7, 3, 2), (8, 3, 2), (9, 4, 3), (5, 1, 2)])
def test_conv_transpose_is_the_gradient_of_conv(size: int, width: int, stride: int, kind: str) -> None:
    """As documented: `output_shape` is the shape of the input of that convolution."""
    parameters = {"strides": torch.tensor([stride]), "pad_type": kind, "pad": torch.tensor([1, 0])}
    weight = torch.from_numpy(_random(3, 2, width))
    source = torch.from_numpy(_random(1, 2, size)).requires_grad_()
    convolved = TABLE["conv"](source, weight, **parameters)
    upstream = torch.from_numpy(_random(*convolved.shape))
    (gradient,) = torch.autograd.grad(convolved, source, upstream)
    result = TABLE["conv_transpose"](upstream, weight, output_shape=torch.tensor([1, 2, size]), **parameters)
    torch.testing.assert_close(result, gradient)


def test_in_a_program() -> None:
    from coremltools.converters.mil.mil import Builder as mb

    x, weight = _random(1, 2, 5, 5), _random(4, 2, 3, 3)
    inner = _random(4, 2, 2, 2)

    def build(x: Any) -> Any:
        return mb.conv_transpose(x=mb.conv(x=x, weight=weight, pad_type="same", strides=[2, 2]), weight=inner, strides=[2, 2])

    (result,) = run(build, {"x": x}, "iOS17", TABLE)
    middle = _direct(x, weight, np.zeros(4), (2, 2), [(1, 1)] * 2, (1, 1), 1)
    np.testing.assert_allclose(result, _spread(middle, inner, (2, 2), (1, 1), 1), atol=1e-4)
