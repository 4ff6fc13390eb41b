"""Normalizations against ONNX's reference and formulas in float64: constant and computed parameters, all ranks, float16's limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import check, lower, run
from tests.targets.coreml.node_text import floats, model_of, of_shape, text

SHAPES = [(3, 4), (2, 4, 5), (2, 4, 5, 3), (2, 4, 2, 3, 2)]


def batch_parameters(channels: int) -> dict[str, np.ndarray]:
    parameters = {name: floats(channels, seed=seed) for seed, name in enumerate(("s", "b", "m"), 1)}
    return parameters | {"v": np.abs(floats(channels, seed=4)) + 0.1}


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_normalization(shape: tuple[int, ...], computed: bool) -> None:
    parameters = batch_parameters(shape[1])
    declared = "".join(f", {of_shape(array.shape)} {name}" for name, array in parameters.items()) if computed else ""
    model = text("y = BatchNormalization<epsilon = 0.01>(x, s, b, m, v)", f"{of_shape(shape)} x{declared}")
    inputs = {"x": floats(*shape)} | (parameters if computed else {})
    check(model, inputs, **({} if computed else parameters))


@pytest.mark.parametrize("variance", [1e-9, 1e7])
def test_batch_normalization_in_half_holds_every_variance(variance: float) -> None:
    x = floats(1, 2, 4) * np.float32(variance**0.5)
    constants = {
        "s": np.ones(2, np.float32),
        "b": np.zeros(2, np.float32),
        "m": np.zeros(2, np.float32),
        "v": np.full(2, variance, np.float32),
    }
    check(text("y = BatchNormalization<epsilon = 1e-12>(x, s, b, m, v)", "float[1,2,4] x"), {"x": x}, half=True, **constants)


def test_training_mode_is_refused() -> None:
    model = model_of(text("y, m1, v1 = BatchNormalization<training_mode = 1>(x, s, b, m, v)", "float[2,4,5] x"), **batch_parameters(4))
    with pytest.raises(UnsupportedOpError, match="training mode"):
        lower(model)


AFFINE = {
    "instance": ("InstanceNormalization<epsilon = 0.01>(x, s, b)", SHAPES[1:], 23, 4),
    "group": ("GroupNormalization<num_groups = 2, epsilon = 0.01>(x, s, b)", SHAPES[1:], 23, 4),
    "group 18": ("GroupNormalization<num_groups = 2>(x, s, b)", SHAPES[1:], 18, 2),
}


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("rank", [3, 4, 5])
@pytest.mark.parametrize("name", AFFINE)
def test_affine(name: str, rank: int, computed: bool) -> None:
    call, shapes, opset, count = AFFINE[name]
    shape = shapes[rank - 3]
    parameters = {"s": floats(count, seed=1), "b": floats(count, seed=2)}
    declared = f", float[{count}] s, float[{count}] b" if computed else ""
    inputs = {"x": floats(*shape)} | (parameters if computed else {})
    model = model_of(
        text(f"y = {call}", f"{of_shape(shape)} x{declared}", f"{of_shape(shape)} y", opset), **({} if computed else parameters)
    )
    groups = 4 if name == "instance" else 2
    wide = inputs["x"].astype(np.float64).reshape(shape[0], groups, -1)
    epsilon = 1e-5 if opset == 18 else 0.01
    normal = (wide - wide.mean(2, keepdims=True)) / np.sqrt(wide.var(2, keepdims=True) + epsilon)
    scale, shift = (np.repeat(parameters[key], 4 // count).reshape(1, 4, *[1] * (rank - 2)) for key in ("s", "b"))
    np.testing.assert_allclose(run(lower(model), inputs)["y"], normal.reshape(shape) * scale + shift, atol=1e-5)


LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "last axis": ("LayerNormalization(x, s)", {"s": (5,)}),
    "bias": ("LayerNormalization<axis = 1, epsilon = 0.1>(x, s, b)", {"s": (4, 5), "b": (4, 5)}),
    "broadcast": ("LayerNormalization<axis = -2>(x, s, b)", {"s": (5,), "b": (1, 1, 5)}),
    "outside the axes": ("LayerNormalization(x, s, b)", {"s": (4, 5), "b": (5,)}),
    "all axes": ("LayerNormalization<axis = 0>(x, s)", {"s": (3, 4, 5)}),
    "root mean square": ("RMSNormalization(x, s)", {"s": (5,)}),
    "root mean square of axes": ("RMSNormalization<axis = 1, epsilon = 0.1>(x, s)", {"s": (4, 5)}),
}


@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, half: bool, computed: bool) -> None:
    call, shapes = LAYERS[name]
    parameters = {key: floats(*shape, seed=seed) for seed, (key, shape) in enumerate(shapes.items(), 1)}
    declared = "".join(f", {of_shape(shape)} {key}" for key, shape in shapes.items()) if computed else ""
    x = floats(3, 4, 5, scale=300.0 if half else 1.0)  # squares beyond float16
    inputs = {"x": x} | (parameters if computed else {})
    check(text(f"y = {call}", f"float[3,4,5] x{declared}"), inputs, half=half, **({} if computed else parameters))


def test_layer_normalization_gives_mean_and_inverse_deviation() -> None:
    model = text("y, m, d = LayerNormalization<axis = 1>(x, s)", "float[3,4,5] x", "float[] y, float[] m, float[] d")
    check(model, {"x": floats(3, 4, 5)}, s=floats(4, 5, seed=1))


def test_a_constant_row_in_half_is_zero_with_an_epsilon_below_float16() -> None:
    model = model_of(text("y = LayerNormalization<epsilon = 1e-12>(x, s)", "float[1,8] x"), s=np.ones(8, np.float32))
    np.testing.assert_array_equal(run(lower(model, half=True), {"x": np.full((1, 8), 3, np.float32)})["y"], 0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("axis", [-1, 0, 1])
@pytest.mark.parametrize("p", [1, 2])
def test_lp_normalization(p: int, axis: int, half: bool) -> None:
    x = floats(3, 4, 5, scale=200.0 if half else 1.0)
    x[0] = x[:, 1] = x[..., 2] = 0  # where the norm is 0 the result is
    wide = x.astype(np.float64)
    norm = (np.abs(wide) ** p).sum(axis, keepdims=True) ** (1 / p)
    expected = np.divide(wide, norm, out=np.zeros_like(wide), where=norm != 0)
    model = model_of(text(f"y = LpNormalization<p = {p}, axis = {axis}>(x)", "float[3,4,5] x"))
    np.testing.assert_allclose(run(lower(model, half), {"x": x})["y"], expected, atol=2e-3 if half else 1e-6)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(2, 6, 5), (2, 6, 4, 3), (1, 6, 2, 3, 2)])
def test_lrn(shape: tuple[int, ...], size: int, half: bool) -> None:
    x = floats(*shape)
    squares, channels = x.astype(np.float64) ** 2, shape[1]
    sums = np.stack([squares[:, max(0, c - (size - 1) // 2) : min(channels, c + size // 2 + 1)].sum(1) for c in range(channels)], 1)
    expected = x / (1.5 + 0.3 / size * sums) ** 0.6
    model = model_of(text(f"y = LRN<size = {size}, alpha = 0.3, beta = 0.6, bias = 1.5>(x)", f"{of_shape(shape)} x"))
    np.testing.assert_allclose(run(lower(model, half), {"x": x})["y"], expected, atol=3e-3 if half else 1e-5)


@pytest.mark.parametrize("attributes", ["", "axes = [1]", "axes = [0, 1, 2, 3]"])
def test_mean_variance_normalization(attributes: str) -> None:
    check(text(f"y = MeanVarianceNormalization<{attributes}>(x)", "float[2,3,4,5] x", "float[2,3,4,5] y"), {"x": floats(2, 3, 4, 5)})
