"""MIL operators that resize images: by a grid of positions along each dimension, by boxes, or by a position for every pixel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgekit.targets.coreml.reference.operators.arguments import ints, number

Ints = torch.Tensor | Sequence[int]
Number = torch.Tensor | float
Flag = torch.Tensor | bool


def _steps(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.float64)


def _strict(size: torch.Tensor, count: int) -> torch.Tensor:
    return _steps(count) * (size - 1) / max(count - 1, 1)


def _aligned(size: torch.Tensor, count: int) -> torch.Tensor:
    return _strict(size, count) if count > 1 else (size - 1) / 2 + _steps(1)


def _default(size: torch.Tensor, count: int) -> torch.Tensor:
    return _steps(count) * size / count  # (Xin - Xin / Xout) / (Xout - 1) is Xin / Xout


def _offset(size: torch.Tensor, count: int) -> torch.Tensor:
    return (_steps(count) + 0.5) * (size - 1).clamp(min=1) / count


def _unaligned(size: torch.Tensor, count: int) -> torch.Tensor:
    return (_steps(count) + 0.5) * size / count - 0.5


SAMPLING: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "STRICT_ALIGN_CORNERS": _strict,
    "ALIGN_CORNERS": _aligned,
    "DEFAULT": _default,
    "OFFSET_CORNERS": _offset,
    "UNALIGN_CORNERS": _unaligned,
}
"""Positions of `count` samples in an interval of `size` elements, which may be a column of sizes."""


def grid(size: float | torch.Tensor, count: int, sampling_mode: str) -> torch.Tensor:
    """Where the samples lie, from 0 to `size - 1`."""
    if sampling_mode not in SAMPLING:
        raise ValueError(f"sampling mode '{sampling_mode}' is none of {', '.join(SAMPLING)}")
    sizes = torch.as_tensor(size, dtype=torch.float64)
    return torch.minimum(SAMPLING[sampling_mode](sizes, count).clamp(min=0), sizes - 1)


def _linear(x: torch.Tensor, axis: int, positions: torch.Tensor) -> torch.Tensor:
    """`x` interpolated along one axis."""
    low = positions.floor().to(torch.int64)
    high = (low + 1).clamp(max=x.shape[axis] - 1)
    weight = (positions - low).to(x.dtype).reshape(-1, *[1] * (x.dim() - 1 - axis))
    return x.index_select(axis, low) * (1 - weight) + x.index_select(axis, high) * weight


def _nearest(x: torch.Tensor, axis: int, places: torch.Tensor) -> torch.Tensor:
    return x.index_select(axis, places.to(torch.int64).clamp(max=x.shape[axis] - 1))


def _resized(x: torch.Tensor, sizes: Sequence[int], sampling_mode: str) -> torch.Tensor:
    """`x` with its last dimensions interpolated to `sizes`; integers in float64, for the executor to round."""
    result = x if x.is_floating_point() else x.double()
    for axis, count in enumerate(sizes, x.dim() - len(sizes)):
        if count != x.shape[axis] or sampling_mode == "OFFSET_CORNERS":
            result = _linear(result, axis, grid(x.shape[axis], count, sampling_mode))
    return result


def _resized_nearest(x: torch.Tensor, sizes: Sequence[int], sampling_mode: str) -> torch.Tensor:
    """`x` with the nearest elements of its last dimensions taken.

    The documentation gives no rule of rounding. By coremltools' tests, and by its conversion of TensorFlow's half-pixel resize, "DEFAULT"
    takes the element in which the centre of the output element lies. Those are also the nearest to the positions of "UNALIGN_CORNERS",
    ties rounded up; the other modes round their positions in that way.
    """
    mode = "UNALIGN_CORNERS" if sampling_mode == "DEFAULT" else sampling_mode
    for axis, count in enumerate(sizes, x.dim() - len(sizes)):
        x = _nearest(x, axis, (grid(x.shape[axis], count, mode) + 0.5).floor())
    return x


def resize_bilinear(
    x: torch.Tensor, target_size_height: Number = 1, target_size_width: Number = 1, sampling_mode: str = "DEFAULT"
) -> torch.Tensor:
    """The last two dimensions interpolated to a size."""
    return _resized(x, [int(number(target_size_height)), int(number(target_size_width))], sampling_mode)


def resize_nearest_neighbor(x: torch.Tensor, target_size_height: Number, target_size_width: Number) -> torch.Tensor:
    """The last two dimensions resized to a size, the nearest elements taken."""
    return _resized_nearest(x, [int(number(target_size_height)), int(number(target_size_width))], "DEFAULT")


def resize(
    x: torch.Tensor, shape: Ints, resized_dims: Number, interpolation_mode: str = "LINEAR", sampling_mode: str = "DEFAULT"
) -> torch.Tensor:
    """The last `resized_dims` dimensions resized to the last sizes of `shape`; 0 keeps a size."""
    count = int(number(resized_dims))
    sizes = ints(shape)
    last = sizes[len(sizes) - count :]
    targets = [size or kept for size, kept in zip(last, x.shape[x.dim() - count :], strict=True)]
    functions = {"LINEAR": _resized, "NEAREST_NEIGHBOR": _resized_nearest}
    if interpolation_mode not in functions:
        raise ValueError(f"interpolation mode '{interpolation_mode}' is none of {', '.join(functions)}")
    return functions[interpolation_mode](x, targets, sampling_mode)


def _scaled(x: torch.Tensor, height: Number, width: Number) -> list[int]:
    """`floor(size * factor)` of the last two dimensions, in float32 as coremltools infers the shape."""
    factors = torch.stack([torch.as_tensor(factor, dtype=torch.float32) for factor in (height, width)])
    return [int(size) for size in (torch.tensor(x.shape[-2:], dtype=torch.float32) * factors).floor()]


def upsample_nearest_neighbor(x: torch.Tensor, scale_factor_height: Number = 1, scale_factor_width: Number = 1) -> torch.Tensor:
    """The last two dimensions scaled, output element `i` taking input element `floor(i * size_in / size_out)`."""
    for axis, count in enumerate(_scaled(x, scale_factor_height, scale_factor_width), x.dim() - 2):
        x = _nearest(x, axis, torch.arange(count) * x.shape[axis] // count)
    return x


def upsample_bilinear(
    x: torch.Tensor,
    scale_factor_height: Number = 1,
    scale_factor_width: Number = 1,
    align_corners: Flag = True,
    half_pixel_centers: Flag | None = None,
) -> torch.Tensor:
    """The last two dimensions scaled and interpolated; the scale is that of the sizes, as the factors may not give whole ones."""
    corners = bool(number(align_corners))
    centers = not corners if half_pixel_centers is None else bool(number(half_pixel_centers))
    if corners and centers:
        raise ValueError("align_corners and half_pixel_centers cannot both be true")
    mode = "STRICT_ALIGN_CORNERS" if corners else "UNALIGN_CORNERS" if centers else "DEFAULT"
    return _resized(x, _scaled(x, scale_factor_height, scale_factor_width), mode)


def crop(x: torch.Tensor, crop_height: Ints, crop_width: Ints) -> torch.Tensor:
    """The last two dimensions with elements cut off at both ends."""
    (top, bottom), (left, right) = ints(crop_height), ints(crop_width)
    return x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]


def _corners(boxes: torch.Tensor, mode: str) -> torch.Tensor:
    """`[height start, width start, height end, width end]` of each box."""
    if mode.endswith("WIDTH_FIRST"):
        boxes = boxes[:, [1, 0, 3, 2]]
    if mode.startswith("CENTER_SIZE_"):
        center, size = boxes[:, :2], boxes[:, 2:]
        return torch.cat((center - size / 2, center + size / 2), -1)
    if not mode.startswith("CORNERS_"):
        raise ValueError(f"unknown box_coordinate_mode '{mode}'")
    return boxes


def _box_grid(start: torch.Tensor, end: torch.Tensor, count: int, sampling_mode: str) -> torch.Tensor:
    """Positions of the samples in each box, which spans `|end - start| + 1` elements and may run backwards."""
    size = (end - start).abs()[:, None] + 1
    direction = torch.where(end < start, -1.0, 1.0)[:, None]
    positions = start[:, None] + direction * grid(size, count, sampling_mode)
    low, high = torch.minimum(start, end)[:, None], torch.maximum(start, end)[:, None]
    return torch.minimum(torch.maximum(positions, low), high)  # rounding must not leave a box that ends at the border


def crop_resize(
    x: torch.Tensor,
    roi: torch.Tensor | None = None,
    boxes: torch.Tensor | None = None,
    box_indices: Ints | None = None,
    target_height: Number = 1,
    target_width: Number = 1,
    normalized_coordinates: Flag = False,
    spatial_scale: Number = 1.0,
    box_coordinate_mode: str = "CORNERS_HEIGHT_FIRST",
    sampling_mode: str = "DEFAULT",
    pad_value: Number = 0.0,
) -> torch.Tensor:
    """Boxes cut out of images and resized; samples outside the image are `pad_value`.

    `roi` of iOS15 and iOS16 is `[N, 1, 4 or 5, 1, 1]`, 5 with the number of an image first: the result is `[N, B or 1, C, h, w]`. From
    iOS17 on `boxes` are `[N, 4]` with `box_indices`: the result is `[N, C, h, w]`.
    """
    if boxes is None and roi is not None:
        flat = roi.reshape(roi.shape[0], -1)
        count = 1 if flat.shape[1] == 5 else x.shape[0]
        images = flat[:, :1].long() if flat.shape[1] == 5 else torch.arange(count).expand(len(flat), count)
        places, corners = images.reshape(-1), flat[:, -4:].repeat_interleave(count, 0)
    elif boxes is not None:
        count, corners = 0, boxes
        places = torch.tensor(list(range(len(boxes))) if box_indices is None else ints(box_indices), dtype=torch.int64)
    else:
        raise ValueError("crop_resize needs roi or boxes")
    height, width = x.shape[-2:]
    corners = _corners(corners.double(), box_coordinate_mode) * float(number(spatial_scale))
    if number(normalized_coordinates):
        corners = corners * torch.tensor([height - 1, width - 1] * 2)
    rows = _box_grid(corners[:, 0], corners[:, 2], int(number(target_height)), sampling_mode)
    columns = _box_grid(corners[:, 1], corners[:, 3], int(number(target_width)), sampling_mode)
    shape = (len(corners), rows.shape[1], columns.shape[1])
    rows, columns = rows[:, :, None].expand(shape), columns[:, None, :].expand(shape)
    inside = (rows >= 0) & (rows <= height - 1) & (columns >= 0) & (columns <= width - 1)
    samples = _bilinear(x[places], rows.clamp(0, height - 1), columns.clamp(0, width - 1), 0.0)
    result = torch.where(inside[:, None], samples, float(number(pad_value)))
    return result.reshape(-1, count, *result.shape[1:]) if count else result


def _pixels(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, outside: float) -> torch.Tensor:
    """Pixels of `[B, C, H, W]` at whole positions `[B, h, w]`."""
    height, width = x.shape[-2:]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    flat = (rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)).long()
    found = x.flatten(2).gather(2, flat.reshape(len(flat), 1, -1).expand(-1, x.shape[1], -1))
    return torch.where(inside[:, None], found.reshape(*x.shape[:2], *flat.shape[1:]), outside)


def _bilinear(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, outside: float) -> torch.Tensor:
    """`[B, C, H, W]` interpolated at positions `[B, h, w]`; the image is surrounded by `outside`."""
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top).to(x.dtype)[:, None], (columns - left).to(x.dtype)[:, None]
    upper = _pixels(x, top, left, outside) * (1 - right) + _pixels(x, top, left + 1, outside) * right
    lower = _pixels(x, top + 1, left, outside) * (1 - right) + _pixels(x, top + 1, left + 1, outside) * right
    return upper * (1 - down) + lower * down


def _nearest_pixel(x: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, outside: float) -> torch.Tensor:
    """Ties go to the even position, as in PyTorch's `grid_sample`, which coremltools converts to this; the documentation has no rule."""
    return _pixels(x, rows.round(), columns.round(), outside)


_SAMPLERS: dict[str, Callable[..., torch.Tensor]] = {"bilinear": _bilinear, "nearest": _nearest_pixel}


def _minus_one_to_one(coordinates: torch.Tensor, size: int, align_corners: bool) -> torch.Tensor:
    return _zero_to_one((coordinates + 1) / 2, size, align_corners)


def _zero_to_one(coordinates: torch.Tensor, size: int, align_corners: bool) -> torch.Tensor:
    return coordinates * (size - 1) if align_corners else coordinates * size - 0.5


_COORDINATES: dict[str, Callable[[torch.Tensor, int, bool], torch.Tensor]] = {
    "unnormalized": lambda coordinates, size, align_corners: coordinates,
    "normalized_minus_one_to_one": _minus_one_to_one,
    "normalized_zero_to_one": _zero_to_one,
}


def _mirrored(positions: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Positions brought between two mirrors."""
    span = high - low
    if span == 0:
        return torch.full_like(positions, low)
    away = (positions - low).remainder(2 * span)
    return low + torch.minimum(away, 2 * span - away)


_PADDING: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "constant": lambda positions, size: positions,
    "border": lambda positions, size: positions.clamp(0, size - 1),
    "reflection": lambda positions, size: _mirrored(positions, 0, size - 1),
    "symmetric": lambda positions, size: _mirrored(positions, -0.5, size - 0.5).clamp(0, size - 1),
}


def resample(
    x: torch.Tensor,
    coordinates: torch.Tensor,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Number,
    coordinates_mode: str,
    align_corners: Flag,
) -> torch.Tensor:
    """The image sampled at `coordinates` `[B, h, w, 2]`, each as (column, row)."""
    positions = [
        _PADDING[padding_mode.lower()](_COORDINATES[coordinates_mode.lower()](part, size, bool(number(align_corners))), size)
        for part, size in ((coordinates[..., 1].double(), x.shape[2]), (coordinates[..., 0].double(), x.shape[3]))
    ]
    return _SAMPLERS[sampling_mode.lower()](x, *positions, float(number(padding_value)))


def affine(
    x: torch.Tensor,
    transform_matrix: torch.Tensor,
    output_height: Number,
    output_width: Number,
    sampling_mode: str,
    padding_mode: str,
    padding_value: Number,
    coordinates_mode: str,
    align_corners: Flag,
) -> torch.Tensor:
    """The image sampled where a linear map takes each position of the result, both in normalized coordinates."""
    if coordinates_mode.lower() != "normalized_minus_one_to_one":
        raise ValueError(f"affine takes no coordinates_mode '{coordinates_mode}'")
    rows, columns = (_centers(int(number(count)), bool(number(align_corners))) for count in (output_height, output_width))
    y, column = torch.meshgrid(rows, columns, indexing="ij")
    matrix = transform_matrix.double().reshape(-1, 2, 3).expand(x.shape[0], 2, 3)
    coordinates = torch.einsum("bij,jhw->bhwi", matrix, torch.stack((column, y, torch.ones_like(y))))
    return resample(x, coordinates, sampling_mode, padding_mode, padding_value, coordinates_mode, align_corners)


def _centers(count: int, align_corners: bool) -> torch.Tensor:
    """Normalized coordinates of `count` elements; a lone one is in the middle."""
    if align_corners:
        return _steps(count) * 2 / (count - 1) - 1 if count > 1 else _steps(1)
    return (_steps(count) * 2 + 1) / count - 1


TABLE: dict[str, Callable[..., Any]] = {
    "affine": affine,
    "crop": crop,
    "crop_resize": crop_resize,
    "resample": resample,
    "resize": resize,
    "resize_bilinear": resize_bilinear,
    "resize_nearest_neighbor": resize_nearest_neighbor,
    "upsample_bilinear": upsample_bilinear,
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
