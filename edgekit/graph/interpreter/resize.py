"""Resizing: one matrix of weights per axis, made from the specification's formulas in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.values import NotSupportedError


@dataclass(frozen=True)
class _Rule:
    """The attributes that say where an output element lies and what it is made of."""

    mode: str
    coordinates: str
    nearest: str
    cubic_a: float
    exclude_outside: bool
    antialias: bool


def _places(rule: _Rule, size: int, new: int, scale: float, span: tuple[float, float]) -> Tensor:
    """Coordinates of the output elements in the input, `[new]`."""
    x = torch.arange(new, dtype=torch.float64)
    if rule.coordinates == "half_pixel":
        return (x + 0.5) / scale - 0.5
    if rule.coordinates == "half_pixel_symmetric":
        adjustment = new / (size * scale)
        return size / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
    if rule.coordinates == "pytorch_half_pixel":
        return (x + 0.5) / scale - 0.5 if new > 1 else torch.zeros_like(x)
    if rule.coordinates == "align_corners":
        length = size * scale  # not rounded down, as the specification's output_width
        return x * (size - 1) / (length - 1) if new > 1 else torch.zeros_like(x)
    if rule.coordinates == "asymmetric":
        return x / scale
    if rule.coordinates == "tf_half_pixel_for_nn":
        return (x + 0.5) / scale
    if rule.coordinates == "tf_crop_and_resize":
        start, end = span
        if new > 1:
            return start * (size - 1) + x * (end - start) * (size - 1) / (new - 1)
        return torch.full_like(x, 0.5 * (start + end) * (size - 1))
    raise NotSupportedError(f"coordinate_transformation_mode '{rule.coordinates}'")


def _nearest(rule: _Rule, places: Tensor, size: int) -> Tensor:
    rounded: dict[str, Callable[[Tensor], Tensor]] = {
        "round_prefer_floor": lambda x: torch.ceil(x - 0.5),
        "round_prefer_ceil": lambda x: torch.floor(x + 0.5),
        "floor": torch.floor,
        "ceil": torch.ceil,
    }
    if rule.nearest not in rounded:
        raise NotSupportedError(f"nearest_mode '{rule.nearest}'")
    return rounded[rule.nearest](places).long().clamp(0, size - 1)


def _kernel(rule: _Rule, distance: Tensor) -> Tensor:
    """Weight of an element at a distance: a triangle, or Keys' cubic (1981, equation 4)."""
    d = distance.abs()
    if rule.mode == "linear":
        return (1 - d).clamp(min=0)
    a = rule.cubic_a
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return torch.where(d <= 1, inner, torch.where(d < 2, outer, 0.0))


def _weights(rule: _Rule, places: Tensor, size: int, scale: float) -> Tensor:
    """`[new, size]`. Elements outside repeat the edge, or are left out."""
    stretch = min(scale, 1.0) if rule.antialias else 1.0
    reach = int((1 if rule.mode == "linear" else 2) / stretch) + 2
    taps = torch.floor(places)[:, None] + torch.arange(-reach, reach + 1, dtype=torch.float64)
    weights = _kernel(rule, (taps - places[:, None]) * stretch)
    if rule.exclude_outside:
        weights = weights * ((taps >= 0) & (taps <= size - 1))
    if rule.exclude_outside or rule.antialias:
        weights = weights / weights.sum(1, keepdim=True)
    index = taps.long().clamp(0, size - 1)
    return torch.zeros(len(places), size, dtype=torch.float64).scatter_add_(1, index, weights)


def _along(x: Tensor, axis: int, weights: Tensor) -> Tensor:
    """`weights` `[new, size]` applied to one axis."""
    result: Tensor = torch.tensordot(x, weights.to(x.dtype), dims=([axis], [1]))  # type: ignore[no-untyped-call]
    return result.movedim(-1, axis)


@operator("Resize", since=10)
def resize_asymmetric(x: Tensor, scales: Tensor, /, *, mode: str = "nearest") -> Tensor:
    """As in opset 10: asymmetric coordinates, rounded down."""
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@operator("Upsample", since=7)
def upsample_by_attribute(x: Tensor, /, *, scales: Sequence[float], mode: str = "nearest") -> Tensor:
    """As in opset 7."""
    return resize_asymmetric(x, torch.tensor(list(scales)), mode=mode)


@operator("Upsample", since=9)
def upsample(x: Tensor, scales: Tensor, /, *, mode: str = "nearest") -> Tensor:
    """As in opset 9."""
    return resize_asymmetric(x, scales, mode=mode)


@operator("Resize", since=11)
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    /,
    *,
    antialias: int = 0,
    axes: Sequence[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resizes any axes by nearest, linear or cubic interpolation."""
    rule = _Rule(
        mode, coordinate_transformation_mode, nearest_mode, cubic_coeff_a, bool(exclude_outside), bool(antialias) and mode != "nearest"
    )
    if mode not in ("nearest", "linear", "cubic"):
        raise NotSupportedError(f"mode '{mode}'")
    chosen = list(range(x.dim())) if axes is None else [axis % x.dim() for axis in axes]
    if sizes is not None and sizes.numel():
        targets, factors = _from_sizes(x, chosen, sizes.tolist(), keep_aspect_ratio_policy)
    elif scales is not None and scales.numel():
        factors = scales.tolist()
        spans = _spans(rule, roi, len(chosen))
        targets = [int(x.shape[axis] * (end - start) * factor) for axis, factor, (start, end) in zip(chosen, factors, spans, strict=True)]
    else:
        raise ValueError("neither scales nor sizes is given")
    result = x if x.is_floating_point() else x.double()
    for axis, target, factor, span in zip(chosen, targets, factors, _spans(rule, roi, len(chosen)), strict=True):
        size = x.shape[axis]
        if target == size and factor == 1.0 and rule.coordinates != "tf_crop_and_resize":
            continue
        places = _places(rule, size, target, factor, span)
        if rule.mode == "nearest":
            result = result.index_select(axis, _nearest(rule, places, size))
        else:
            result = _along(result, axis, _weights(rule, places, size, factor))
        if rule.coordinates == "tf_crop_and_resize":
            view = [1] * x.dim()
            view[axis] = target
            result = torch.where(((places < 0) | (places > size - 1)).reshape(view), extrapolation_value, result)
    return result.to(x.dtype)


def _spans(rule: _Rule, roi: Tensor | None, count: int) -> list[tuple[float, float]]:
    """Start and end of the region per axis; all of it unless the mode crops."""
    if rule.coordinates != "tf_crop_and_resize" or roi is None or not roi.numel():
        return [(0.0, 1.0)] * count
    bounds = roi.tolist()
    return list(zip(bounds[:count], bounds[count:], strict=True))


def _from_sizes(x: Tensor, axes: Sequence[int], sizes: Sequence[int], policy: str) -> tuple[list[int], list[float]]:
    """Sizes and scales per axis, by the aspect ratio policy."""
    factors = [size / x.shape[axis] for size, axis in zip(sizes, axes, strict=True)]
    if policy == "stretch":
        return list(sizes), factors
    if policy not in ("not_larger", "not_smaller"):
        raise NotSupportedError(f"keep_aspect_ratio_policy '{policy}'")
    factor = min(factors) if policy == "not_larger" else max(factors)
    return [int(factor * x.shape[axis] + 0.5) for axis in axes], [factor] * len(axes)
