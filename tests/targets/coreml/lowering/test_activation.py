"""Activations as ONNX's reference computes them, where MIL's operators of the same name differ too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import run
from tests.targets.coreml.lowering.expressions import check_all, lower_all, operators, values

PLAIN = (
    "Relu(x)", "LeakyRelu(x)", "LeakyRelu<alpha: float = 0.3>(x)", "Elu(x)", "Elu<alpha: float = 0.5>(x)", "Selu(x)",
    "Selu<alpha: float = 0.7, gamma: float = 3.0>(x)", "Celu(x)", "Celu<alpha: float = 2.5>(x)", "ThresholdedRelu(x)",
    "ThresholdedRelu<alpha: float = 0.25>(x)", "Sigmoid(x)", "HardSigmoid(x)", "HardSigmoid<alpha: float = 0.4, beta: float = 0.1>(x)",
    "HardSwish(x)", "Mish(x)", "Softplus(x)", "Softsign(x)", "Tanh(x)", "Gelu(x)", 'Gelu<approximate: string = "tanh">(x)', "Shrink(x)",
    "Shrink<lambd: float = 0.25, bias: float = 0.5>(x)", "Swish(x)", "Swish<alpha: float = 1.7>(x)", "Clip(x)",
)  # fmt: skip
EDGES = np.asarray([0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, -1.0, 3.0, -3.0, 20.0, -20.0, 60.0, -60.0], dtype=np.float32)


@pytest.mark.parametrize("x", [EDGES, values(2, 3, 4, 2), values()], ids=["edges", "rank 4", "scalar"])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_elementwise_activations_match(x: np.ndarray) -> None:
    check_all(
        [text for text in PLAIN if x.ndim or text != "Softsign(x)"], {"x": x}, opset=24
    )  # ONNX's reference fails on a scalar Softsign


def test_elementwise_activations_in_float16() -> None:
    check_all(PLAIN, {"x": values(2, 5)}, opset=24, half=True)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (2, 3, 4, 2)])
def test_softmax_family_on_every_axis(shape: tuple[int, ...]) -> None:
    axes = range(-1, len(shape))
    check_all([f"{name}<axis: int = {axis}>(x)" for name in ("Softmax", "LogSoftmax", "Hardmax") for axis in axes], {"x": values(*shape)})


def test_softmax_family_defaults_and_large_distances() -> None:
    x = np.asarray([[1e4, 0.0, -1e4], [-np.inf, 3.0, 2.0]], dtype=np.float32)
    check_all(["Softmax(x)", "Hardmax(x)"], {"x": x})
    found = run(lower_all(["LogSoftmax(x)"], {"x": x}), {"x": x})["y0"]
    np.testing.assert_allclose(found, torch.log_softmax(torch.from_numpy(x), -1).numpy(), rtol=1e-6)  # ONNX's reference underflows


def test_hardmax_takes_the_first_of_equal_elements() -> None:
    check_all(["Hardmax(x)", "Hardmax<axis: int = 0>(x)"], {"x": np.asarray([[1, 3, 3, 0], [2, 2, 3, 2], [2, 3, 3, 2]], dtype=np.float32)})


@pytest.mark.parametrize("slope", [(), (1,), (3, 1, 1), (1, 3, 1, 1), (2,), (4, 1), (2, 3, 4, 2)])
def test_prelu_slopes_of_every_shape(slope: tuple[int, ...]) -> None:
    alpha = values(*slope, seed=1)
    check_all(["PRelu(x, constant)", "PRelu(x, computed)"], {"x": values(2, 3, 4, 2), "computed": alpha}, constant=alpha)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 5), (2, 3, 2, 2, 2)])
def test_prelu_at_ranks_where_apples_wants_one_slope(shape: tuple[int, ...]) -> None:
    per_channel = values(*(shape[1:2] + (1,) * (len(shape) - 2)), seed=1)
    check_all(["PRelu(x, constant)"], {"x": values(*shape)}, constant=per_channel)


def test_prelu_per_channel_is_apples() -> None:
    assert "prelu" in operators(lower_all(["PRelu(x, slope)"], {"x": values(1, 3, 2, 2)}, slope=values(3, 1, 1)))


def test_integers() -> None:
    x = np.asarray([[-7, 0, 9], [3, -1, 2]], dtype=np.int32)
    check_all(
        ["Relu(x)", "PRelu(x, slope)", "Clip(x, low, high)"],
        {"x": x},
        slope=np.asarray([2, -3, 5], np.int32),
        low=np.int32(-1),
        high=np.int32(2),
    )


BOUNDS = [(-1.0, 1.0), (0.0, 6.0), (1.0, -1.0), (0.5, 0.5), (-np.inf, 1.0), (-2.0, np.inf)]


@pytest.mark.parametrize(("low", "high"), BOUNDS)
@pytest.mark.parametrize("version", ["iOS15", "iOS17"])
def test_clip_between_constants_and_computed_bounds(low: float, high: float, version: str) -> None:
    bounds: dict[str, Any] = {"low": np.float32(low), "high": np.float32(high)}
    expressions = ["Clip(x, low, high)", "Clip(x, low)", "Clip(x, , high)", "Clip(x, least, most)", "Clip(x, low, most)"]
    computed = {"least": np.asarray(low, np.float32), "most": np.asarray(high, np.float32)}
    check_all(expressions, {"x": values(3, 4), **computed}, version=version, **bounds)


def test_clip_bounds_that_are_the_ends_of_int64() -> None:
    ends = np.iinfo(np.int64)
    check_all(["Clip(x, low, high)"], {"x": np.asarray([-5, 7], np.int64)}, low=np.int64(ends.min), high=np.int64(3))
    check_all(["Clip(x, low, high)"], {"x": np.asarray([-5, 7], np.int64)}, low=np.int64(0), high=np.int64(ends.max))


@pytest.mark.parametrize(
    ("text", "x", "what"),
    [
        ("Shrink(x)", np.ones(3, np.int32), "Shrink of INT32"),
        ("Celu<alpha: float = 0.0>(x)", values(3), "alpha = 0"),
        ('Gelu<approximate: string = "sigmoid">(x)', values(3), "sigmoid"),
    ],
)
def test_what_has_no_exact_form_is_refused(text: str, x: np.ndarray, what: str) -> None:
    with pytest.raises(UnsupportedOpError, match=what):
        lower_all([text], {"x": x})
