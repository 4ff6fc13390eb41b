"""`resample` and `affine` of the evaluator against the documented surroundings of images, PyTorch and the values in coremltools' tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.resizing import TABLE
from tests.targets.coreml.reference.mil_support import call

Array = np.ndarray[Any, Any]


def _random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _images(*values: float, shape: tuple[int, ...]) -> Array:
    return np.array(values, np.float32).reshape(shape)


# padding_mode, sampling_mode, coordinates_mode, align_corners, padding_value and the values of coremltools' tests
RESAMPLES = [
    ("constant", "bilinear", "normalized_minus_one_to_one", True, 6.17, [8.585, 6.17, 27.5, 6.17]),
    ("border", "nearest", "unnormalized", False, -1.0, [11, 11, 11, 44]),
    ("reflection", "bilinear", "normalized_zero_to_one", True, -1.0, [22, 36.3, 11, 34.1]),
    ("symmetric", "nearest", "normalized_zero_to_one", False, -1.0, [22, 33, 11, 33]),
]


@pytest.mark.parametrize(("padding", "sampling", "mode", "corners", "value", "expected"), RESAMPLES)
def test_resample_of_coremltools_tests(padding: str, sampling: str, mode: str, corners: bool, value: float, expected: list[float]) -> None:
    result = call(
        TABLE["resample"], x=_images(11, 22, 33, 44, shape=(1, 1, 2, 2)),
        coordinates=_images(-1.0, -2.0, -3.7, -1.0, 0.0, 0.0, 3.5, 1.2, shape=(1, 2, 2, 2)), sampling_mode=sampling, padding_mode=padding,
        padding_value=value, coordinates_mode=mode, align_corners=corners,
    )  # fmt: skip
    np.testing.assert_allclose(result.reshape(-1), expected, rtol=1e-5)


def _positions(coordinates: Array, size: int, mode: str, corners: bool) -> Array:
    if mode == "unnormalized":
        return coordinates
    unit = (coordinates + 1) / 2 if mode == "normalized_minus_one_to_one" else coordinates
    return unit * (size - 1) if corners else unit * size - 0.5


def _surroundings(padding: str, x: Array, margin: int) -> Array:
    modes: dict[str, Any] = {
        "constant": {"mode": "constant", "constant_values": 0.7}, "border": {"mode": "edge"}, "reflection": {"mode": "reflect"},
        "symmetric": {"mode": "symmetric"},
    }  # fmt: skip
    return np.asarray(np.pad(x, [(0, 0), (0, 0), (margin, margin), (margin, margin)], **modes[padding]))


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("mode", ["unnormalized", "normalized_minus_one_to_one", "normalized_zero_to_one"])
@pytest.mark.parametrize("padding", ["constant", "border", "reflection", "symmetric"])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
def test_resample(sampling: str, padding: str, mode: str, corners: bool) -> None:
    """As the documentation has it: sampled from the image with its surroundings."""
    x, margin = _random(2, 3, 4, 5), 16
    reach = 2.0 if mode == "unnormalized" else 0.7
    coordinates = (np.random.default_rng(5).uniform(-reach, 5 * reach if reach > 1 else 1.5, (2, 6, 7, 2))).astype(np.float32)
    result = call(
        TABLE["resample"], x=x, coordinates=coordinates, sampling_mode=sampling, padding_mode=padding, padding_value=0.7,
        coordinates_mode=mode, align_corners=corners,
    )  # fmt: skip
    wide = _surroundings(padding, x.astype(np.float64), margin)
    columns, rows = (_positions(coordinates[..., at].astype(np.float64), size, mode, corners) + margin for at, size in ((0, 5), (1, 4)))
    expected = np.zeros(result.shape)
    for b, i, j in np.ndindex(2, 6, 7):
        row, column = rows[b, i, j], columns[b, i, j]
        if sampling == "nearest":
            expected[b, :, i, j] = wide[b, :, int(np.rint(row)), int(np.rint(column))]
            continue
        top, left = int(row), int(column)
        weights = np.outer([1 - (row - top), row - top], [1 - (column - left), column - left])
        expected[b, :, i, j] = (wide[b, :, top : top + 2, left : left + 2] * weights).sum((1, 2))
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize(("padding", "name"), [("constant", "zeros"), ("border", "border"), ("mirror", "reflection")])
@pytest.mark.parametrize("sampling", ["bilinear", "nearest"])
@pytest.mark.parametrize("corners", [False, True])
def test_resample_is_that_of_pytorch(corners: bool, sampling: str, padding: str, name: str) -> None:
    x, coordinates = _random(1, 2, 4, 5), np.random.default_rng(2).uniform(-2, 2, (1, 3, 9, 2)).astype(np.float32)
    expected = functional.grid_sample(torch.from_numpy(x), torch.from_numpy(coordinates), sampling, name, corners)
    kind = {"mirror": "reflection" if corners else "symmetric"}.get(padding, padding)
    result = call(
        TABLE["resample"], x=x, coordinates=coordinates, sampling_mode=sampling, padding_mode=kind, padding_value=0.0,
        coordinates_mode="normalized_minus_one_to_one", align_corners=corners,
    )  # fmt: skip
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("padding", ["border", "reflection", "symmetric"])
def test_resample_of_a_single_pixel(padding: str) -> None:
    x = _images(3, shape=(1, 1, 1, 1))
    result = call(
        TABLE["resample"], x=x, coordinates=_images(-2.5, 1.25, 0, 0, shape=(1, 1, 2, 2)), sampling_mode="bilinear", padding_mode=padding,
        padding_value=0.0, coordinates_mode="unnormalized", align_corners=True,
    )  # fmt: skip
    np.testing.assert_array_equal(result, np.full((1, 1, 1, 2), 3.0))


@pytest.mark.parametrize(
    ("size", "expected"),
    [((3, 3), [10.752501, 2.5025, 0, 1.98, 0, 0, 0, 0, 0]), ((2, 5), [10.752501, 5.94, 2.5025, 0.44, 0, 0, 0, 0, 0, 0])],
)
def test_affine_of_coremltools_tests(size: tuple[int, int], expected: list[float]) -> None:
    result = call(
        TABLE["affine"], x=_images(11, 22, 33, 44, shape=(1, 1, 2, 2)),
        transform_matrix=_images(-1.0, -2.0, -3.7, -1.0, 3.5, 1.2, shape=(1, 6)),
        output_height=size[0], output_width=size[1], sampling_mode="bilinear", padding_mode="constant", padding_value=0.0,
        coordinates_mode="normalized_minus_one_to_one", align_corners=True,
    )  # fmt: skip
    np.testing.assert_allclose(result, np.array(expected).reshape(1, 1, *size), atol=1e-4)


@pytest.mark.filterwarnings("ignore:Since version 1.3.0, affine_grid")
@pytest.mark.parametrize("corners", [True, False])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("size", [(4, 5), (1, 3)])
def test_affine_is_that_of_pytorch(size: tuple[int, int], count: int, corners: bool) -> None:
    x, matrix = _random(2, 3, 4, 4), np.random.default_rng(4).normal(0, 0.6, (count, 6)).astype(np.float32)
    theta = torch.from_numpy(matrix).reshape(-1, 2, 3).expand(2, 2, 3)
    grids = functional.affine_grid(theta, [2, 3, *size], align_corners=corners)
    expected = functional.grid_sample(torch.from_numpy(x), grids, "bilinear", "zeros", corners)
    result = call(
        TABLE["affine"], x=x, transform_matrix=matrix, output_height=size[0], output_width=size[1], sampling_mode="bilinear",
        padding_mode="constant", padding_value=0.0, coordinates_mode="normalized_minus_one_to_one", align_corners=corners,
    )  # fmt: skip
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-5)
