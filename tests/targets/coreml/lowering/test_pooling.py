"""Pooling against ONNX's reference and PyTorch: paddings by rule and number, sizes rounded up, dilations, 1 to 3 axes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import lower, run
from tests.targets.coreml.node_text import agrees_with_runtime, floats, of_shape, text

WINDOWS = {
    "1-D": ((1, 2, 9), "kernel_shape = [3], strides = [2]"),
    "2-D": ((2, 3, 7, 8), "kernel_shape = [3, 2], pads = [1, 0, 1, 1]"),
    "3-D": ((1, 2, 5, 6, 4), "kernel_shape = [2, 3, 2], strides = [2, 1, 2], pads = [1, 1, 0, 1, 1, 1]"),
    "up": ((1, 2, 8, 9), "kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1"),
    "up and padded": ((1, 2, 8, 7), "kernel_shape = [3, 3], strides = [2, 3], pads = [1, 1, 1, 1], ceil_mode = 1"),
    "up, last window dropped": ((1, 2, 2, 3), "kernel_shape = [1, 2], strides = [2, 3], pads = [0, 1, 0, 1], ceil_mode = 1"),
    "upper": ((1, 2, 8, 7), 'kernel_shape = [3, 4], strides = [2, 2], auto_pad = "SAME_UPPER"'),
    "lower": ((1, 2, 8, 7), 'kernel_shape = [3, 4], strides = [2, 2], auto_pad = "SAME_LOWER"'),
    "valid": ((1, 2, 8, 7), 'kernel_shape = [3, 4], strides = [2, 2], auto_pad = "VALID"'),
    "dilations": ((1, 2, 9, 10), "kernel_shape = [3, 2], dilations = [2, 3], pads = [1, 1, 2, 1]"),
    "dilations and strides": ((1, 2, 11, 10), "kernel_shape = [3, 2], dilations = [2, 3], strides = [2, 3], ceil_mode = 1"),
}
KINDS = {
    "max": ("MaxPool", ""),
    "average": ("AveragePool", ""),
    "average with padding": ("AveragePool", ", count_include_pad = 1"),
    "l1": ("LpPool", ", p = 1"),
    "l2": ("LpPool", ""),
    "l3": ("LpPool", ", p = 3"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, kind: str) -> None:
    operator, more = KINDS[kind]
    shape, attributes = WINDOWS[name]
    agrees_with_runtime(text(f"y = {operator}<{attributes}{more}>(x)", f"{of_shape(shape)} x"), {"x": floats(*shape) - 1})


@pytest.mark.parametrize("include", [False, True])
def test_average_of_windows_beyond_the_padding_against_pytorch(include: bool) -> None:
    x = floats(1, 2, 8, 7)
    expected = torch.nn.functional.avg_pool2d(torch.tensor(x), 3, stride=(2, 3), padding=1, ceil_mode=True, count_include_pad=include)
    attributes = f"kernel_shape = [3, 3], strides = [2, 3], pads = [1, 1, 1, 1], ceil_mode = 1, count_include_pad = {int(include)}"
    model = onnx.parser.parse_model(text(f"y = AveragePool<{attributes}>(x)", "float[1,2,8,7] x"))
    np.testing.assert_allclose(run(lower(model), {"x": x})["y"], expected.numpy(), atol=1e-6)


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("half", [False, True])
def test_maximum_of_small_integers(dtype: str, half: bool) -> None:
    x = np.random.default_rng(0).integers(np.iinfo(dtype).min, np.iinfo(dtype).max, (1, 2, 6, 6)).astype(dtype)
    model = onnx.parser.parse_model(
        text("y = MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x)", f"{dtype}[1,2,6,6] x", f"{dtype}[] y")
    )
    expected = torch.nn.functional.max_pool2d(torch.tensor(x).float(), 3, stride=1, padding=1).numpy().astype(dtype)
    np.testing.assert_array_equal(run(lower(model, half), {"x": x})["y"], expected)


GLOBAL = ["GlobalAveragePool(x)", "GlobalMaxPool(x)", "GlobalLpPool(x)", "GlobalLpPool<p = 1>(x)", "GlobalLpPool<p = 3>(x)"]


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 4, 5), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize("call", GLOBAL)
def test_global(call: str, shape: tuple[int, ...]) -> None:
    x = floats(*shape)
    model = onnx.parser.parse_model(text(f"y = {call}", f"{of_shape(shape)} x"))
    wide, axes = x.astype(np.float64), tuple(range(2, x.ndim))
    p = 1 if "p = 1" in call else 3 if "p = 3" in call else 2
    expected = {
        "GlobalAverage": wide.mean(axes, keepdims=True),
        "GlobalMaxPool": wide.max(axes, keepdims=True),
        "GlobalLpPool(": (np.abs(wide) ** p).sum(axes, keepdims=True) ** (1 / p),
        "GlobalLpPool<": (np.abs(wide) ** p).sum(axes, keepdims=True) ** (1 / p),
    }[call[:13]]
    np.testing.assert_allclose(run(lower(model), {"x": x})["y"], expected, rtol=1e-5)


HALF = ["MaxPool<kernel_shape = [2, 2]>(x)", "LpPool<kernel_shape = [2, 2]>(x)", "GlobalAveragePool(x)"]


@pytest.mark.parametrize("call", HALF)
def test_half(call: str) -> None:
    x = floats(1, 2, 6, 6, scale=200.0)  # squares beyond float16
    agrees_with_runtime(text(f"y = {call}", "float[1,2,6,6] x"), {"x": x}, half=True, tolerance=2e-3)


REFUSED = {
    "indices": ("y, i = MaxPool<kernel_shape = [2, 2]>(x)", "float[1,1,4,4] x", "float[] y, int64[] i"),
    "MaxUnpool": ("y = MaxUnpool<kernel_shape = [2, 2]>(x, i)", "float[1,1,2,2] x, int64[1,1,2,2] i", "float[1,1,3,3] y"),
    "MaxRoiPool": ("y = MaxRoiPool<pooled_shape = [2, 2]>(x, r)", "float[1,1,4,4] x, float[1,5] r", "float[1,1,2,2] y"),
    "padding only": ("y = MaxPool<kernel_shape = [2], pads = [3, 0]>(x)", "float[1,1,4] x", "float[] y"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    with pytest.raises(UnsupportedOpError, match=name):
        lower(onnx.parser.parse_model(text(*REFUSED[name])))
