"""Resize: where an element of the result lies in the input, and what it is made of, is known for each axis before the model runs.

So nearest-neighbour resizing selects constant indices and interpolation multiplies by a constant matrix, axis by axis (ONNX's operator
specification of Resize; the cubic kernel is Keys, "Cubic convolution interpolation for digital image processing", 1981, equation 4).
Where these are the indices or the matrix that MIL documents for an operator of its own, that operator is used: it runs faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.layout import is_float, take, transpose

_ROUNDING = 2.0**-23


@dataclass(frozen=True)
class Axis:
    """How one axis is resized.

    Attributes:
        size: Its size in the input.
        new: Its size in the result.
        scale: ONNX's scale, which need not be `new / size`.
        start: Where the region of interest begins, as a part of the axis.
        end: Where it ends.
    """

    size: int
    new: int
    scale: float
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Rule:
    """The attributes of Resize that say what an element of the result is made of."""

    mode: str = "nearest"
    coordinates: str = "half_pixel"
    nearest: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False


def _over_scale(x: np.ndarray, axis: Axis) -> np.ndarray:
    """`x / scale`, as ONNX Runtime and PyTorch compute it: in float32, where 1 / (1/3) is 3 and the next element is not missed.

    A scale that is the quotient of the sizes but for its rounding to float32 is taken for that quotient.
    """
    if abs(axis.scale - axis.new / axis.size) <= _ROUNDING * axis.scale:
        return x * axis.size / axis.new
    return (x.astype(np.float32) / np.float32(axis.scale)).astype(np.float64)


def _symmetric(x: np.ndarray, axis: Axis) -> np.ndarray:
    return axis.size / 2 * (1 - axis.new / (axis.size * axis.scale)) + (x + 0.5) / axis.scale - 0.5


def _half_pixel(x: np.ndarray, axis: Axis) -> np.ndarray:
    return _over_scale(x + 0.5, axis) - 0.5


def _aligned(x: np.ndarray, axis: Axis) -> np.ndarray:
    length = axis.size * axis.scale  # the specification does not round it
    return x * (axis.size - 1) / (length - 1) if length != 1 else 0 * x


def _cropped(x: np.ndarray, axis: Axis) -> np.ndarray:
    if axis.new == 1:
        return 0 * x + (axis.start + axis.end) * (axis.size - 1) / 2
    return axis.start * (axis.size - 1) + x * (axis.end - axis.start) * (axis.size - 1) / (axis.new - 1)


PLACES: dict[str, Callable[[np.ndarray, Axis], np.ndarray]] = {
    "half_pixel": _half_pixel,
    "half_pixel_symmetric": _symmetric,
    "pytorch_half_pixel": lambda x, axis: _half_pixel(x, axis) if axis.new > 1 else 0 * x,
    "align_corners": _aligned,
    "asymmetric": _over_scale,
    "tf_crop_and_resize": _cropped,
}
"""Coordinates in the input by `coordinate_transformation_mode`."""
ROUNDED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}
"""By `nearest_mode`."""
GRIDS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "UNALIGN_CORNERS": lambda i, size, new: (i + 0.5) * size / new - 0.5,
    "STRICT_ALIGN_CORNERS": lambda i, size, new: i * (size - 1) / max(new - 1, 1),
    "DEFAULT": lambda i, size, new: i * (size - size / new) / max(new - 1, 1),
}
"""The grid that MIL documents for `resize_bilinear`, before it is clamped to the input, by `sampling_mode`."""


def places(rule: Rule, axis: Axis) -> np.ndarray:
    """Coordinates of the elements of the result in the input."""
    return PLACES[rule.coordinates](np.arange(axis.new, dtype=np.float64), axis)


def indices(rule: Rule, axis: Axis) -> np.ndarray:
    """The element of the input that each element of the result is, for the mode `nearest`."""
    found: np.ndarray = ROUNDED[rule.nearest](places(rule, axis)).astype(np.int64).clip(0, axis.size - 1)
    return found


def _kernel(rule: Rule, distance: np.ndarray) -> np.ndarray:
    """The weight of an element at a distance."""
    d = np.abs(distance)
    if rule.mode == "linear":
        triangle: np.ndarray = np.maximum(1 - d, 0)
        return triangle
    a = rule.cubic_a
    inner = (a + 2) * d**3 - (a + 3) * d**2 + 1
    outer = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
    return np.where(d <= 1, inner, np.where(d < 2, outer, 0.0))


def weights(rule: Rule, axis: Axis) -> np.ndarray:
    """The matrix `[new, size]` that resizes an axis; elements outside the input repeat its edge, or are left out."""
    at = places(rule, axis)
    stretch = min(axis.scale, 1.0) if rule.antialias else 1.0
    reach = math.ceil((1 if rule.mode == "linear" else 2) / stretch) + 1
    taps = np.floor(at)[:, None] + np.arange(-reach, reach + 1)
    part = _kernel(rule, (taps - at[:, None]) * stretch)
    if rule.exclude_outside:
        part = part * ((taps >= 0) & (taps < axis.size))
    if rule.exclude_outside or rule.antialias:
        total = part.sum(1, keepdims=True)
        part = part / np.where(total == 0, 1, total)
    matrix = np.zeros((axis.new, axis.size))
    np.add.at(matrix, (np.arange(axis.new)[:, None], taps.astype(np.int64).clip(0, axis.size - 1)), part)
    return matrix


def _resize(b: Lowering, node: ir.Node) -> Any:
    rule = _rule(b, node)
    axes = _axes(b, node, rule)
    moved = {at: axis for at, axis in axes.items() if axis != Axis(axis.size, axis.size, 1.0)}
    x = b.x(node)
    if rule.mode == "nearest":
        x = _nearest(b, x, {at: indices(rule, axis) for at, axis in moved.items()})
    else:
        if not is_float(x):
            raise b.refuse(f"Resize of integers in mode '{rule.mode}'", "resize floats and round the result")
        x = _interpolated(b, x, rule, moved)
    if rule.coordinates != "tf_crop_and_resize":
        return x
    return _extrapolated(b, node, x, {at: places(rule, axis) for at, axis in moved.items()}, moved)


def _rule(b: Lowering, node: ir.Node) -> Rule:
    attributes = node.attributes
    rule = Rule(
        attributes.get_string("mode", "nearest"),
        attributes.get_string("coordinate_transformation_mode", "half_pixel"),
        attributes.get_string("nearest_mode", "round_prefer_floor"),
        attributes.get_float("cubic_coeff_a", -0.75),
        bool(attributes.get_int("exclude_outside", 0)),
        bool(attributes.get_int("antialias", 0)),
    )
    allowed = {"mode": ("nearest", "linear", "cubic"), "coordinate_transformation_mode": tuple(PLACES), "nearest_mode": tuple(ROUNDED)}
    for (name, choices), value in zip(allowed.items(), (rule.mode, rule.coordinates, rule.nearest), strict=True):
        if value not in choices:
            raise b.refuse(f"Resize with {name} '{value}'", f"use one of {', '.join(choices)}")
    if rule.antialias and rule.mode == "nearest":
        raise b.refuse("Resize with antialias in mode 'nearest', which ONNX does not define", "use mode 'linear'")
    return rule


def _axes(b: Lowering, node: ir.Node, rule: Rule) -> dict[int, Axis]:
    """How each of the axes that the node names is resized."""
    shape, wanted = b.shape(node), b.out_shape(node)
    chosen = [axis % len(shape) for axis in node.attributes.get_ints("axes", tuple(range(len(shape))))]
    scales = b.need_known(node, 2, "scales") if b.has(node, 2) and b.shape(node, 2) != (0,) else None
    if scales is None:
        ratios = [wanted[axis] / shape[axis] for axis in chosen]
        policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            ratios = [_kept_ratio(b, node, policy, [shape[axis] for axis in chosen])] * len(chosen)
    else:
        ratios = [float(scale) for scale in scales]
    spans = [(0.0, 1.0)] * len(chosen)
    if rule.coordinates == "tf_crop_and_resize":
        roi = b.need_known(node, 1, "roi").astype(np.float64)
        spans = list(zip(roi[: len(chosen)].tolist(), roi[len(chosen) :].tolist(), strict=True))
        if scales is not None and any(wanted[axis] != shape[axis] * ratio for axis, ratio in zip(chosen, ratios, strict=True)):
            raise b.refuse("Resize by a region of interest and scales that do not give whole sizes", "give sizes")
    return {axis: Axis(shape[axis], wanted[axis], ratio, *span) for axis, ratio, span in zip(chosen, ratios, spans, strict=True)}


def _kept_ratio(b: Lowering, node: ir.Node, policy: str, shape: Sequence[int]) -> float:
    """The one scale of all axes where the aspect ratio is kept."""
    choices = {"not_larger": min, "not_smaller": max}
    if policy not in choices:
        raise b.refuse(f"Resize with keep_aspect_ratio_policy '{policy}'", "use stretch, not_larger or not_smaller")
    sizes = b.need_known(node, 3, "sizes")
    return choices[policy](float(size) / old for size, old in zip(sizes, shape, strict=True))


def _nearest(b: Lowering, x: Any, chosen: dict[int, np.ndarray]) -> Any:
    """By MIL's operator where it is a repetition of rows and columns by whole numbers, else by selection."""
    rank = len(x.shape)
    repeats = {at: max(len(found) // x.shape[at], 1) for at, found in chosen.items()}
    repeated = all(np.array_equal(found, np.repeat(np.arange(x.shape[at]), repeats[at])) for at, found in chosen.items())
    if chosen and repeated and is_float(x) and rank >= 3 and min(chosen) >= rank - 2:
        height, width = repeats.get(rank - 2, 1), repeats.get(rank - 1, 1)
        return b.op("upsample_nearest_neighbor", x=x, scale_factor_height=height, scale_factor_width=width)
    for at, found in sorted(chosen.items(), key=lambda item: len(item[1]) / x.shape[item[0]]):
        x = take(b, x, found, at)
    return x


def _interpolated(b: Lowering, x: Any, rule: Rule, axes: dict[int, Axis]) -> Any:
    """By MIL's operator where its documented grid gives the same matrices, else by a product with the matrix of each axis."""
    rank = len(x.shape)
    matrices = {at: weights(rule, axis) for at, axis in axes.items()}
    if axes and rank >= 3 and min(axes) >= rank - 2:
        for mode, grid in GRIDS.items():
            if all(_same(matrix, grid) for matrix in matrices.values()):
                height, width = (len(matrices[at]) if at in matrices else x.shape[at] for at in (rank - 2, rank - 1))
                return b.op("resize_bilinear", x=x, target_size_height=height, target_size_width=width, sampling_mode=mode)
    for at, matrix in sorted(matrices.items(), key=lambda item: len(item[1]) / x.shape[item[0]]):
        x = _multiplied(b, x, at, matrix)
    return x


def _same(matrix: np.ndarray, grid: Callable[[np.ndarray, int, int], np.ndarray]) -> bool:
    """Whether linear interpolation at the points of the grid is the matrix."""
    new, size = matrix.shape
    if new == 1 and size > 1:
        return False  # the documented spacing divides by zero
    at = grid(np.arange(new, dtype=np.float64), size, new).clip(0, size - 1)
    return bool(np.allclose(matrix, np.maximum(1 - np.abs(np.arange(size)[None, :] - at[:, None]), 0), rtol=0, atol=1e-6))


def _multiplied(b: Lowering, x: Any, axis: int, matrix: np.ndarray) -> Any:
    """`matrix` `[new, size]` applied to one axis."""
    rank = len(x.shape)
    if axis == rank - 2:
        return b.op("matmul", x=matrix, y=x)
    order = [at for at in range(rank) if at != axis] + [axis]
    product = b.op("matmul", x=transpose(b, x, order), y=matrix.T)
    return transpose(b, product, np.argsort(order).tolist())


def _extrapolated(b: Lowering, node: ir.Node, x: Any, found: dict[int, np.ndarray], axes: dict[int, Axis]) -> Any:
    """`x` with the elements that lie outside the input replaced."""
    outside = np.zeros([1] * len(x.shape), bool)
    for at, where in found.items():
        view = [-1 if other == at else 1 for other in range(len(x.shape))]
        outside = outside | ((where < 0) | (where > axes[at].size - 1)).reshape(view)
    if not outside.any():
        return x
    value = node.attributes.get_float("extrapolation_value", 0.0)
    filler = np.full([1] * len(x.shape), value, np.float32 if is_float(x) else np.int64)
    return b.op("select", cond=np.logical_not(outside), a=x, b=b.var(filler))


def _upsample(b: Lowering, node: ir.Node) -> Any:
    """Resize as it was before opset 10: coordinates are divided by the scale, and nearest means rounded down."""
    shape, wanted = b.shape(node), b.out_shape(node)
    rule = Rule(node.attributes.get_string("mode", "nearest"), "asymmetric", "floor")
    if rule.mode not in ("nearest", "linear") or (rule.mode == "linear" and not b.is_float(node)):
        raise b.refuse(f"Upsample with mode '{rule.mode}' of this type", "use Resize")
    scales = [float(scale) for scale in b.need_known(node, 1, "scales")]
    sizes = zip(shape, wanted, scales, strict=True)
    axes = {at: Axis(size, new, scale) for at, (size, new, scale) in enumerate(sizes) if (new, scale) != (size, 1.0)}
    if rule.mode == "nearest":
        return _nearest(b, b.x(node), {at: indices(rule, axis) for at, axis in axes.items()})
    return _interpolated(b, b.x(node), rule, axes)


TABLE = {"Resize": _resize, "Upsample": _upsample}
"""By ONNX operator."""
