"""Convolutions against PyTorch and ONNX's reference: every attribute, 1 to 3 axes, constant and computed weights."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import check, lower, run
from tests.targets.coreml.node_text import agrees_with_runtime, floats, of_shape, text

CONVOLUTIONS = {
    "1-D": ((2, 3, 9), (4, 3, 3), "pads = [1, 1]"),
    "2-D": ((1, 3, 8, 7), (4, 3, 3, 2), ""),
    "3-D": ((1, 2, 5, 6, 4), (3, 2, 2, 3, 2), "pads = [1, 0, 1, 0, 2, 1]"),
    "strides": ((1, 3, 9, 8), (4, 3, 3, 3), "strides = [2, 3], pads = [1, 2, 0, 1]"),
    "dilations": ((1, 3, 11, 12), (4, 3, 3, 3), "dilations = [2, 3], kernel_shape = [3, 3]"),
    "groups": ((1, 4, 6, 6), (6, 2, 3, 3), "group = 2"),
    "depthwise": ((1, 4, 6, 6), (4, 1, 3, 3), "group = 4, pads = [1, 1, 1, 1]"),
    "upper": ((1, 2, 7, 8), (3, 2, 4, 3), 'auto_pad = "SAME_UPPER", strides = [2, 3]'),
    "lower": ((1, 2, 7, 8), (3, 2, 4, 3), 'auto_pad = "SAME_LOWER", strides = [2, 3], dilations = [1, 2]'),
    "lower odd": ((1, 2, 8), (3, 2, 4), 'auto_pad = "SAME_LOWER"'),
    "valid": ((1, 2, 7, 8), (3, 2, 4, 3), 'auto_pad = "VALID"'),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv(name: str, bias: bool) -> None:
    shape, weight, attributes = CONVOLUTIONS[name]
    constants = {"w": floats(*weight, seed=1)} | ({"b": floats(weight[0], seed=2)} if bias else {})
    model = text(f"y = Conv<{attributes}>({', '.join(['x', *constants])})", f"{of_shape(shape)} x")
    check(model, {"x": floats(*shape)}, **constants)


@pytest.mark.parametrize("version", ["iOS15", "iOS17"])
def test_conv_with_computed_weight_and_bias(version: str) -> None:
    inputs = {"x": floats(1, 4, 6, 6), "w": floats(6, 2, 3, 3, seed=1), "b": floats(6, seed=2)}
    declared = ", ".join(f"{of_shape(array.shape)} {name}" for name, array in inputs.items())
    check(text("y = Conv<group = 2, pads = [1, 0, 1, 0]>(x, w, b)", declared), inputs, version=version)


def test_conv_in_half() -> None:
    check(
        text("y = Conv<pads = [1, 1, 1, 1]>(x, w)", "float[1,3,6,6] x"), {"x": floats(1, 3, 6, 6)}, half=True, w=floats(4, 3, 3, 3, seed=1)
    )


def test_a_computed_weight_has_no_dilation() -> None:
    model = onnx.parser.parse_model(text("y = Conv<dilations = [2]>(x, w)", "float[1,2,9] x, float[3,2,3] w"))
    with pytest.raises(UnsupportedOpError, match="dilations"):
        lower(model)


TRANSPOSED = {
    "1-D": ((1, 3, 5), (3, 4, 3), "strides = [2]"),
    "2-D": ((2, 3, 4, 5), (3, 4, 3, 2), "strides = [2, 1], pads = [1, 0, 1, 1]"),
    "3-D": ((1, 2, 3, 4, 3), (2, 3, 2, 2, 3), "strides = [2, 1, 2]"),
    "groups": ((1, 4, 4, 4), (4, 3, 3, 3), "group = 2, strides = [2, 2]"),
    "dilations": ((1, 2, 4, 5), (2, 3, 3, 2), "dilations = [2, 3], pads = [1, 1, 2, 0]"),
    "output padding": ((1, 2, 4, 5), (2, 3, 3, 3), "strides = [3, 2], output_padding = [1, 1], pads = [1, 1, 1, 1]"),
    "padding beyond the input": ((1, 2, 4, 5), (2, 3, 3, 3), "strides = [3, 2], output_padding = [2, 1]"),
    "upper": ((1, 2, 4, 5), (2, 3, 3, 4), 'auto_pad = "SAME_UPPER", strides = [2, 3]'),
    "lower": ((1, 2, 4, 5), (2, 3, 4, 3), 'auto_pad = "SAME_LOWER", strides = [3, 2]'),
    "valid": ((1, 2, 4), (2, 3, 4), 'auto_pad = "VALID", strides = [3]'),
    "output shape": ((1, 2, 4, 5), (2, 3, 3, 3), "strides = [3, 2], output_shape = [10, 8]"),
    "larger output shape": ((1, 2, 3, 3), (2, 3, 3, 3), "strides = [3, 2], output_shape = [10, 8]"),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", TRANSPOSED)
def test_conv_transpose(name: str, bias: bool) -> None:
    shape, weight, attributes = TRANSPOSED[name]
    group = 2 if "group" in attributes else 1
    constants = {"w": floats(*weight, seed=1)} | ({"b": floats(weight[1] * group, seed=2)} if bias else {})
    model = text(f"y = ConvTranspose<{attributes}>({', '.join(['x', *constants])})", f"{of_shape(shape)} x")
    agrees_with_runtime(model, {"x": floats(*shape)}, **constants)


def test_conv_transpose_against_pytorch() -> None:
    x, weight, bias = floats(1, 4, 5, 6), floats(4, 3, 3, 4, seed=1), floats(6, seed=2)
    expected = torch.nn.functional.conv_transpose2d(
        torch.tensor(x),
        torch.tensor(weight),
        torch.tensor(bias),
        stride=(3, 2),
        padding=(1, 2),
        output_padding=(2, 1),
        groups=2,
        dilation=(1, 2),
    )
    attributes = "group = 2, strides = [3, 2], pads = [1, 2, 1, 2], output_padding = [2, 1], dilations = [1, 2]"
    model = onnx.parser.parse_model(text(f"y = ConvTranspose<{attributes}>(x, w, b)", "float[1,4,5,6] x"))
    model.graph.initializer.extend([onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")])
    np.testing.assert_allclose(run(lower(model), {"x": x})["y"], expected.numpy(), atol=1e-5)


def test_a_computed_transposed_weight_needs_ios17() -> None:
    inputs = {"x": floats(1, 2, 5), "w": floats(2, 3, 3, seed=1)}
    converted = check(text("y = ConvTranspose<strides = [2]>(x, w)", "float[1,2,5] x, float[2,3,3] w"), inputs)
    assert converted.version == "iOS17"


COLUMNS = {
    "1-D": ([9], [3], "strides = [2]"),
    "2-D": ([5, 6], [2, 3], "pads = [1, 0, 1, 2], strides = [2, 1]"),
    "dilations": ([7, 8], [2, 2], "dilations = [2, 3]"),
    "rest": ([6, 7], [2, 2], "strides = [2, 3]"),
    "3-D": ([4, 5, 3], [2, 2, 2], ""),
}


@pytest.mark.parametrize("name", COLUMNS)
def test_col2im(name: str) -> None:
    image, block, attributes = COLUMNS[name]
    unfolded = {"1-D": 4, "2-D": 18, "dilations": 25, "rest": 6, "3-D": 24}[name]
    shape = (2, 3 * int(np.prod(block)), unfolded)
    model = text(f"y = Col2Im<{attributes}>(x, image, block)", f"{of_shape(shape)} x")
    check(model, {"x": floats(*shape)}, image=np.array(image), block=np.array(block))


def test_deform_conv_is_refused() -> None:
    model = text("y = DeformConv(x, w, o)", "float[1,1,3,3] x, float[1,1,2,2] w, float[1,8,2,2] o", "float[1,1,2,2] y")
    with pytest.raises(UnsupportedOpError, match="DeformConv"):
        lower(onnx.parser.parse_model(model))
