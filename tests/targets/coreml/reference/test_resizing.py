"""Resizes of the evaluator against documented grids, PyTorch and coremltools' tests; `test_resampling.py` has `resample` and `affine`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.resizing import SAMPLING, TABLE, grid
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred_shape, run

Array = np.ndarray[Any, Any]


def _random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _images(*values: float, shape: tuple[int, ...]) -> Array:
    return np.array(values, np.float32).reshape(shape)


def test_signatures() -> None:
    check_signatures(TABLE)


# The documentation's examples, of 2 elements; those of "DEFAULT" are of `min(1, i * 2 / Xout)`.
GRIDS = [
    ("UNALIGN_CORNERS", [0.0, 0.1, 0.5, 0.9, 1.0]), ("STRICT_ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]),
    ("ALIGN_CORNERS", [0.0, 0.25, 0.5, 0.75, 1.0]), ("DEFAULT", [0.0, 0.4, 0.8, 1.0, 1.0]), ("OFFSET_CORNERS", [0.1, 0.3, 0.5, 0.7, 0.9]),
    ("UNALIGN_CORNERS", [0.0, 0.0, 0.33, 0.67, 1.0, 1.0]), ("STRICT_ALIGN_CORNERS", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
    ("ALIGN_CORNERS", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]), ("DEFAULT", [0.0, 0.33, 0.67, 1.0, 1.0, 1.0]),
    ("OFFSET_CORNERS", [0.08, 0.25, 0.42, 0.58, 0.75, 0.92]),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "expected"), GRIDS)
def test_grids_of_the_documentation(mode: str, expected: list[float]) -> None:
    np.testing.assert_allclose(grid(2, len(expected), mode).numpy(), expected, atol=0.005)


def _grid(mode: str, size: int, count: int) -> Array:
    """The documentation's formulas, to the letter."""
    i = np.arange(count)
    if mode in ("STRICT_ALIGN_CORNERS", "ALIGN_CORNERS"):
        if count == 1:
            return np.array([(size - 1) / 2 if mode == "ALIGN_CORNERS" else 0.0])
        points = i * (size - 1) / (count - 1)
    elif mode == "DEFAULT":
        points = i * ((size - size / count) / (count - 1) if count > 1 else 0)
    elif mode == "OFFSET_CORNERS":
        delta = max(1, size - 1) / count
        points = 0.5 * delta + i * delta
    else:
        points = i * size / count + 0.5 * size / count - 0.5
    return np.minimum(size - 1, np.maximum(0, points))


def _interpolated(x: Array, axis: int, points: Array) -> Array:
    rows = np.moveaxis(x.astype(np.float64), axis, 0)
    flat = rows.reshape(len(rows), -1)
    result = np.stack([np.interp(points, np.arange(len(rows)), column) for column in flat.T], 1)
    return np.moveaxis(result.reshape(len(points), *rows.shape[1:]), 0, axis)


SIZES = [(5, 7), (1, 1), (3, 4), (8, 2), (1, 9), (6, 1)]


@pytest.mark.parametrize("mode", SAMPLING)
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("shape", [(2, 3, 3, 4), (2, 1, 5)])
def test_resize_bilinear(shape: tuple[int, ...], height: int, width: int, mode: str) -> None:
    x = _random(*shape)
    given = {"target_size_height": height, "target_size_width": width, "sampling_mode": mode}
    result = call(TABLE["resize_bilinear"], x=x, **given)
    expected = _interpolated(_interpolated(x, -2, _grid(mode, shape[-2], height)), -1, _grid(mode, shape[-1], width))
    np.testing.assert_allclose(result, expected, atol=1e-5)
    assert result.shape == inferred_shape("resize_bilinear", x=x, **given)
    same = call(TABLE["resize"], x=x, shape=np.array([height, width], np.int32), resized_dims=2, sampling_mode=mode)
    np.testing.assert_array_equal(result, same)


@pytest.mark.parametrize(("mode", "corners"), [("STRICT_ALIGN_CORNERS", True), ("UNALIGN_CORNERS", False)])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_some_modes_are_those_of_pytorch(height: int, width: int, mode: str, corners: bool) -> None:
    x = _random(1, 2, 3, 4)
    expected = functional.interpolate(torch.from_numpy(x), (height, width), mode="bilinear", align_corners=corners)
    result = call(TABLE["resize_bilinear"], x=x, target_size_height=height, target_size_width=width, sampling_mode=mode)
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "target", "count", "expected"),
    [
        ((1, 2, 3, 4), [1, 6, 8], 2, (1, 2, 6, 8)), ((1, 2, 3, 4), [1, 0, 0], 2, (1, 2, 3, 4)),  # the documentation's
        ((1, 2, 3, 4), [5, 0, 2], 3, (1, 5, 3, 2)), ((4,), [7], 1, (7,)), ((2, 3), [9, 9], 0, (2, 3)),
        ((2, 3, 2, 2, 2), [4, 3, 0], 3, (2, 3, 4, 3, 2)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("interpolation", ["LINEAR", "NEAREST_NEIGHBOR"])
def test_resize_of_dimensions(interpolation: str, shape: tuple[int, ...], target: list[int], count: int, expected: tuple[int, ...]) -> None:
    x = _random(*shape)
    given = {"shape": np.array(target, np.int32), "resized_dims": np.uint32(count), "interpolation_mode": interpolation}
    result = call(TABLE["resize"], x=x, **given)
    assert result.shape == expected == inferred_shape("resize", "iOS17", x=x, **given)
    wanted = x.astype(np.float64)
    for axis in range(len(shape)):
        if interpolation == "LINEAR":
            wanted = _interpolated(wanted, axis, _grid("DEFAULT", shape[axis], expected[axis]))
        else:
            centers = (np.arange(expected[axis]) + 0.5) * shape[axis] / expected[axis]
            wanted = wanted.take(np.floor(centers).astype(int), axis)
    np.testing.assert_allclose(result, wanted, atol=1e-5)


@pytest.mark.parametrize("mode", SAMPLING)
def test_nearest_is_nearest_to_the_grid(mode: str) -> None:
    """But "DEFAULT", whose elements are those nearest to the grid of "UNALIGN_CORNERS"."""
    x = _random(1, 5, 3)
    given = {"shape": np.array([4, 7], np.int32), "resized_dims": 2, "interpolation_mode": "NEAREST_NEIGHBOR"}
    result = call(TABLE["resize"], x=x, **given, sampling_mode=mode)
    points = [_grid("UNALIGN_CORNERS" if mode == "DEFAULT" else mode, *sizes) for sizes in ((5, 4), (3, 7))]
    rows, columns = (np.floor(part + 0.5).astype(int) for part in points)
    np.testing.assert_array_equal(result, x[:, rows][:, :, columns])


def test_resize_keeps_integers() -> None:
    x = np.array([[2**30 + 1, 7]], np.int32)
    result = call(TABLE["resize"], x=x, shape=np.array([3], np.int32), resized_dims=1, interpolation_mode="NEAREST_NEIGHBOR")
    np.testing.assert_array_equal(result, [[2**30 + 1, 7, 7]])
    linear = call(TABLE["resize"], x=x, shape=np.array([3], np.int32), resized_dims=1, sampling_mode="STRICT_ALIGN_CORNERS")
    np.testing.assert_array_equal(linear, [[2**30 + 1, 2**29 + 4, 7]])


def test_nearest_of_coremltools_tests() -> None:
    x = _images(-6.174, 9.371, shape=(1, 1, 1, 2, 1))
    given = {"shape": np.array([1, 1, 3, 2], np.int32), "resized_dims": 2, "interpolation_mode": "NEAREST_NEIGHBOR"}
    np.testing.assert_allclose(call(TABLE["resize"], x=x, **given).reshape(-1), x.reshape(-1)[[0, 0, 1, 1, 1, 1]])
    x = _images(0.37, 6.17, shape=(1, 1, 2, 1))
    result = call(TABLE["resize_nearest_neighbor"], x=x, target_size_height=2, target_size_width=3)
    np.testing.assert_array_equal(result, np.repeat(x, 3, -1))


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_resize_nearest_neighbor(height: int, width: int) -> None:
    """PyTorch's "nearest-exact" takes the element under the centre too."""
    x = _random(2, 3, 4)
    result = call(TABLE["resize_nearest_neighbor"], x=x, target_size_height=height, target_size_width=width)
    expected = functional.interpolate(torch.from_numpy(x)[None], (height, width), mode="nearest-exact")[0]
    np.testing.assert_array_equal(result, expected.numpy())


@pytest.mark.parametrize(("height", "width"), [(2, 3), (1, 1), (1.5, 2.0), (0.5, 0.67), (3.17, 1.12)])
def test_upsample_nearest_neighbor(height: float, width: float) -> None:
    x = _random(1, 2, 3, 3)
    given = {"scale_factor_height": height, "scale_factor_width": width}
    result = call(TABLE["upsample_nearest_neighbor"], x=x, **given)
    sizes = [int(3 * height), int(3 * width)]
    np.testing.assert_array_equal(result, functional.interpolate(torch.from_numpy(x), sizes, mode="nearest").numpy())
    assert result.shape == inferred_shape("upsample_nearest_neighbor", x=x, **given)


def test_upsample_nearest_neighbor_of_coremltools_tests() -> None:
    x = _images(1.5, -2.5, 3.5, shape=(1, 1, 1, 3))
    operator = TABLE["upsample_nearest_neighbor"]
    thirds = call(operator, x=x, scale_factor_height=3.17, scale_factor_width=0.67)
    np.testing.assert_array_equal(thirds[0, 0], [[1.5, -2.5]] * 3)
    np.testing.assert_array_equal(call(operator, x=x, scale_factor_height=2.0, scale_factor_width=1.12)[0, 0], [[1.5, -2.5, 3.5]] * 2)


@pytest.mark.parametrize("corners", [None, True, False])
@pytest.mark.parametrize(("height", "width"), [(3, 4), (2.5, 2.0), (0.5, 0.75), (1.0, 2.6)])
def test_upsample_bilinear(height: float, width: float, corners: bool | None) -> None:
    x = _random(2, 2, 4, 6)
    given: dict[str, Any] = {"scale_factor_height": height, "scale_factor_width": width}
    given |= {} if corners is None else {"align_corners": corners}
    result = call(TABLE["upsample_bilinear"], x=x, **given)
    expected = functional.interpolate(
        torch.from_numpy(x), scale_factor=(height, width), mode="bilinear", align_corners=corners is not False, recompute_scale_factor=True
    )
    np.testing.assert_allclose(result, expected.numpy(), atol=1e-5)
    assert result.shape == inferred_shape("upsample_bilinear", x=x, **given)


@pytest.mark.parametrize(
    ("corners", "centers", "row"),
    [
        (True, False, [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]), (True, None, [1.0, 1.2, 1.4, 1.6, 1.8, 2.0]),
        (False, True, [1.0, 1.0, 1.33334, 1.66667, 2.0, 2.0]), (False, None, [1.0, 1.0, 1.33334, 1.66667, 2.0, 2.0]),
        (False, False, [1.0, 1.33334, 1.66667, 2.0, 2.0, 2.0]),
    ],
)  # fmt: skip
def test_half_pixel_centers_of_coremltools_tests(corners: bool, centers: bool | None, row: list[float]) -> None:
    x = _images(1, 2, shape=(1, 1, 1, 2))
    given = {} if centers is None else {"half_pixel_centers": centers}
    result = call(TABLE["upsample_bilinear"], x=x, scale_factor_height=2, scale_factor_width=3, align_corners=corners, **given)
    np.testing.assert_allclose(result[0, 0], [row] * 2, atol=1e-5)


def test_corners_and_centers_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="half_pixel_centers"):
        call(TABLE["upsample_bilinear"], x=_random(1, 2, 2), align_corners=True, half_pixel_centers=True)


@pytest.mark.parametrize(("rows", "columns"), [((0, 1), (1, 1)), ((2, 0), (0, 3)), ((0, 0), (0, 0))])
def test_crop(rows: tuple[int, int], columns: tuple[int, int]) -> None:
    x = _random(2, 1, 4, 5)
    result = call(TABLE["crop"], x=x, crop_height=np.array(rows, np.int32), crop_width=np.array(columns, np.int32))
    np.testing.assert_array_equal(result, x[:, :, rows[0] : 4 - rows[1], columns[0] : 5 - columns[1]])


COUNTED = np.arange(1, 17, dtype=np.float32).reshape(1, 1, 4, 4)
BOXES = np.array([[0.1, 0.3, 1.3, 1], [0.5, 1.8, 1.0, 0.3], [0.0, 0.4, 0.6, 0.7]], np.float32)


@pytest.mark.parametrize(
    ("roi", "size", "normalized", "expected"),
    [
        ([1, 1, 2, 2], 2, False, [6, 7, 10, 11]),
        ([1, 1, 2, 2], 4, False, [6 + row * 4 / 3 + column / 3 for row in range(4) for column in range(4)]),
        ([1, 1, 2, 2], 1, False, [8.5]),
        ([0, 0, 0, 1 / 3, 1 / 3], 2, True, [1, 2, 5, 6]),
        ([2, 2, 1, 1], 2, False, [11, 10, 7, 6]),
    ],
)
def test_crop_resize_of_coremltools_tests(roi: list[float], size: int, normalized: bool, expected: list[float]) -> None:
    result = call(
        TABLE["crop_resize"], x=COUNTED, roi=_images(*roi, shape=(1, 1, len(roi), 1, 1)), target_width=size, target_height=size,
        normalized_coordinates=normalized, sampling_mode="ALIGN_CORNERS",
    )  # fmt: skip
    np.testing.assert_allclose(result, np.array(expected).reshape(1, 1, 1, size, size), atol=1e-5)


@pytest.mark.parametrize("pad", [0.0, 10.0])
@pytest.mark.parametrize("old", [True, False])
def test_pad_value_of_coremltools_tests(old: bool, pad: float) -> None:
    given: dict[str, Any] = {"boxes": BOXES, "box_indices": np.zeros(3, np.int32)}
    if old:
        given = {"roi": np.pad(BOXES, [(0, 0), (1, 0)]).reshape(3, 1, 5, 1, 1)}
    result = call(
        TABLE["crop_resize"], x=COUNTED, **given, target_width=2, target_height=2, normalized_coordinates=True,
        sampling_mode="ALIGN_CORNERS", pad_value=pad,
    )  # fmt: skip
    expected = np.array([3.1, 5.2, pad, pad, pad, 7.9, pad, 13.9, 2.2, 3.1, 9.4, 10.3])
    np.testing.assert_allclose(result, expected.reshape((3, 1, 1, 2, 2) if old else (3, 1, 2, 2)), atol=1e-4)


def _sampled(image: Array, rows: Array, columns: Array) -> Array:
    return _interpolated(_interpolated(image, 1, rows), 2, columns)


@pytest.mark.parametrize("mode", SAMPLING)
@pytest.mark.parametrize(
    ("coordinates", "order"),
    [
        ("CORNERS_HEIGHT_FIRST", [0, 1, 2, 3]), ("CORNERS_WIDTH_FIRST", [1, 0, 3, 2]), ("CENTER_SIZE_HEIGHT_FIRST", [0, 1, 2, 3]),
        ("CENTER_SIZE_WIDTH_FIRST", [1, 0, 3, 2]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [(3, 5), (1, 1)])
def test_boxes(size: tuple[int, int], coordinates: str, order: list[int], mode: str) -> None:
    """The grids are those of a resize of the box, which has `end - start + 1` elements."""
    x = _random(2, 3, 8, 9)
    corners = np.array([[1.0, 2.0, 5.0, 6.5], [0.5, 0.0, 7.0, 8.0], [3.0, 3.0, 3.0, 7.0]])
    images = np.array([1, 0, 1], np.int32)
    given = corners
    if coordinates.startswith("CENTER"):
        given = np.concatenate(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1)
    boxes = (given[:, order] * 2).astype(np.float32)
    result = call(
        TABLE["crop_resize"], x=x, boxes=boxes, box_indices=images, target_height=size[0], target_width=size[1], spatial_scale=0.5,
        box_coordinate_mode=coordinates, sampling_mode=mode,
    )  # fmt: skip
    for at, (top, left, bottom, right) in enumerate(corners):
        rows, columns = (
            start + _grid(mode, end - start + 1, count) for start, end, count in ((top, bottom, size[0]), (left, right, size[1]))
        )
        np.testing.assert_allclose(result[at], _sampled(x[images[at]], rows, columns), atol=1e-5)


def test_boxes_of_all_images() -> None:
    x, roi = _random(2, 1, 4, 4), _images(0, 0, 3, 3, 1, 1, 2, 3, shape=(2, 1, 4, 1, 1))
    result = call(TABLE["crop_resize"], x=x, roi=roi, target_height=2, target_width=2, sampling_mode="STRICT_ALIGN_CORNERS")
    assert result.shape == (2, 2, 1, 2, 2)
    np.testing.assert_allclose(result[0], x[:, :, ::3, ::3], atol=1e-6)
    np.testing.assert_allclose(result[1], x[:, :, 1:3, 1:4:2], atol=1e-6)
    each = call(TABLE["crop_resize"], x=x, boxes=np.array([[0, 0, 3, 3]] * 2, np.int32), target_height=4, target_width=4)
    np.testing.assert_allclose(each, x, atol=1e-6)


@pytest.mark.parametrize("target", ["iOS16", "iOS17"])
def test_in_a_program(target: str) -> None:
    from coremltools.converters.mil.mil import Builder as mb

    def build(x: Any) -> Any:
        given: dict[str, Any] = {"boxes": BOXES[2:]} if target == "iOS17" else {"roi": BOXES[2:].reshape(1, 1, 4, 1, 1)}
        crops = mb.crop_resize(x=x, **given, target_height=2, target_width=2, normalized_coordinates=True, sampling_mode="ALIGN_CORNERS")
        return crops, mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=1)

    crops, twice = run(build, {"x": COUNTED}, target, TABLE)
    np.testing.assert_allclose(crops.reshape(-1), [2.2, 3.1, 9.4, 10.3], atol=1e-4)
    assert crops.shape == ((1, 1, 2, 2) if target == "iOS17" else (1, 1, 1, 2, 2))
    np.testing.assert_array_equal(twice, np.repeat(COUNTED, 2, 2))
