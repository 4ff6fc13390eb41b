"""Operators on images and boxes: sampling grids, regions of interest, suppression of overlapping boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.sampling import linear_samples
from edgekit.graph.interpreter.values import NotSupportedError, scalar


@operator("AffineGrid")
def affine_grid(theta: Tensor, size: Tensor, /, *, align_corners: int = 0) -> Tensor:
    """Positions of an output image in the input image, `[B, …, 2 or 3]` (Jaderberg et al. 2015, equation 1)."""
    return functional.affine_grid(theta, size.tolist(), align_corners=bool(align_corners))


@operator("GridSample")
def grid_sample(x: Tensor, grid: Tensor, /, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros") -> Tensor:
    """Reads `[B, C, …]` at normalized positions; opset 16 calls the modes bilinear and bicubic."""
    names = {"linear": "bilinear", "bilinear": "bilinear", "cubic": "bicubic", "bicubic": "bicubic", "nearest": "nearest"}
    if mode not in names:
        raise NotSupportedError(f"mode '{mode}'")
    if x.dim() not in (4, 5) or (x.dim() == 5 and names[mode] == "bicubic"):
        raise NotSupportedError(f"mode '{mode}' on {x.dim() - 2} spatial axes")
    return functional.grid_sample(x, grid.to(x.dtype), names[mode], padding_mode, bool(align_corners))


@operator("RoiAlign", since=10)
def roi_align_unshifted(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    /,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """As up to opset 15: without the shift by half a pixel."""
    return _roi_align(x, rois, batch, mode, (output_height, output_width), sampling_ratio, spatial_scale, False)


@operator("RoiAlign", since=16)
def roi_align(
    x: Tensor,
    rois: Tensor,
    batch: Tensor,
    /,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Pools regions `[R, 4]` (x1, y1, x2, y2) of `[B, C, H, W]` to `[R, C, h, w]` by interpolation (He et al. 2017)."""
    shifted = coordinate_transformation_mode == "half_pixel"
    return _roi_align(x, rois, batch, mode, (output_height, output_width), sampling_ratio, spatial_scale, shifted)


def _roi_align(x: Tensor, rois: Tensor, batch: Tensor, mode: str, bins: tuple[int, int], ratio: int, scale: float, shifted: bool) -> Tensor:
    if mode not in ("avg", "max"):
        raise NotSupportedError(f"mode '{mode}'")
    if mode == "max":
        raise NotSupportedError("mode 'max', whose samples the specification leaves open")
    pooled = []
    for roi, index in zip(rois, batch.tolist(), strict=True):
        left, top, right, bottom = (roi * scale - (0.5 if shifted else 0.0)).unbind()
        extents = [bottom - top, right - left]
        if not shifted:
            extents = [extent.clamp(min=1.0) for extent in extents]
        grids: list[tuple[Tensor, int, int]] = []
        for start, extent, count in zip((top, left), extents, bins, strict=True):
            samples = ratio if ratio > 0 else max(math.ceil(float(extent) / count), 1)
            steps = (torch.arange(count * samples, dtype=x.dtype) + 0.5) / samples
            grids.append((start + steps * (extent / count), samples, x.shape[2 + len(grids)]))
        (ys, rows, height), (xs, columns, width) = grids
        # As in Mask R-CNN: up to one pixel outside the border counts as the border, beyond that as zero.
        inside = ((ys >= -1) & (ys <= height))[:, None] & ((xs >= -1) & (xs <= width))
        places = torch.meshgrid(ys.clamp(0, height - 1), xs.clamp(0, width - 1), indexing="ij")
        sampled = linear_samples(x[index : index + 1], [place[None] for place in places])[0] * inside
        pooled.append(sampled.reshape(x.shape[1], bins[0], rows, bins[1], columns).mean((2, 4)))
    return torch.stack(pooled) if pooled else x.new_zeros(0, x.shape[1], *bins)


@operator("NonMaxSuppression", since=10)
def non_max_suppression(
    boxes: Tensor,
    scores: Tensor,
    max_output_boxes_per_class: Tensor | None = None,
    iou_threshold: Tensor | None = None,
    score_threshold: Tensor | None = None,
    /,
    *,
    center_point_box: int = 0,
) -> Tensor:
    """Keeps, per image and class, boxes in the order of their scores that overlap none kept before; `[K, 3]` (image, class, box)."""
    limit = int(scalar(max_output_boxes_per_class, 0))
    overlap = float(scalar(iou_threshold, 0.0))
    kept: list[list[int]] = []
    for image in range(scores.shape[0]):
        corners = _corners(boxes[image], center_point_box)
        for label in range(scores.shape[1]):
            confidence = scores[image, label]
            order = torch.sort(confidence, descending=True, stable=True).indices
            if score_threshold is not None:
                order = order[confidence[order] > scalar(score_threshold)]
            chosen: list[int] = []
            for candidate in order.tolist():
                if len(chosen) >= limit:
                    break
                if not chosen or not bool((_overlaps(corners[candidate], corners[chosen]) > overlap).any()):
                    chosen.append(candidate)
            kept += [[image, label, box] for box in chosen]
    return torch.tensor(kept, dtype=torch.int64).reshape(-1, 3)


def _corners(boxes: Tensor, centered: int) -> Tensor:
    """Boxes as (y1, x1, y2, x2) with y1 <= y2 and x1 <= x2."""
    if centered:
        x, y, width, height = boxes.unbind(-1)
        return torch.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], -1)
    first, second = boxes[:, :2], boxes[:, 2:]
    return torch.cat([torch.minimum(first, second), torch.maximum(first, second)], -1)


def _overlaps(box: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of one box with others."""
    extents = (torch.minimum(box[2:], others[:, 2:]) - torch.maximum(box[:2], others[:, :2])).clamp(min=0)
    shared = extents.prod(-1)
    union = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(-1) - shared
    return torch.where(union > 0, shared / union, 0.0)
