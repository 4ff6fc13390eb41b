"""Sampling at computed places: GridSample, AffineGrid and RoiAlign.

Where MIL has no operator with ONNX's rules, each element that takes part is gathered as a row of channels and weighted. Places are computed
in float32 even in a float16 program: in float16 they would be off by more than an element on images over 1024.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering import spectral
from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.layout import cast, gather, piece, refuser, reshape, transpose

Tap = tuple[Any, Any]
"""An element on one axis that takes part: its index, int32, and its weight (None for 1)."""


def _grid_sample(b: Lowering, node: ir.Node) -> Any:
    attributes = node.attributes
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(given := attributes.get_string("mode", "linear"), given)
    padding, aligned = attributes.get_string("padding_mode", "zeros"), bool(attributes.get_int("align_corners", 0))
    if mode not in _TAPS or padding not in ("zeros", "border", "reflection"):
        raise b.refuse(
            f"GridSample with mode '{mode}' and padding_mode '{padding}'", "use linear, nearest or cubic; zeros, border or reflection"
        )
    if mode == "linear" and b.rank(node) == 4:
        return _resample(b, node, padding, aligned)
    b.half = False
    x, grid, shape = b.x(node), b.x(node, 1), b.shape(node)
    spatial, count = shape[2:], math.prod(b.shape(node, 1)[1:-1])
    flat = reshape(b, grid, [shape[0], count, len(spatial)])
    taps = []
    for axis, size in enumerate(spatial):
        last = len(spatial) - 1 - axis  # the grid names the last axis first
        place = _denormalized(b, reshape(b, piece(b, flat, 2, last, last + 1), [shape[0], count]), size, aligned)
        place = _nearest_even(b, place) if mode == "nearest" else place
        place = _padded(b, place, size, padding, aligned)
        taps.append([_tap(b, index, weight, size, padding, aligned) for index, weight in _TAPS[mode](b, place)])
    rows, offsets = _rows(b, x), np.arange(shape[0])[:, None] * math.prod(spatial)
    total = None
    for chosen in itertools.product(*taps):
        value = _weighted(b, rows, chosen, spatial, offsets)
        total = value if total is None else b.op("add", x=total, y=value)
    sampled = transpose(b, reshape(b, total, [shape[0], count, shape[1]]), [0, 2, 1])
    return reshape(b, sampled, b.out_shape(node))


def _resample(b: Lowering, node: ir.Node, padding: str, aligned: bool) -> Any:
    """MIL's operator, which documents linear sampling as ONNX does; of `nearest` it does not say where halves go."""
    x = b.x(node)
    half, b.half = b.half, False
    grid = b.x(node, 1)
    b.half = half
    reflection = "reflection" if aligned else "symmetric"  # about the centers or about the edges of the border elements
    return b.op(
        "resample",
        x=x,
        coordinates=cast(b, grid, "fp32"),
        sampling_mode="bilinear",
        padding_mode={"zeros": "constant", "border": "border", "reflection": reflection}[padding],
        padding_value=0.0,
        coordinates_mode="normalized_minus_one_to_one",
        align_corners=aligned,
    )


def _rows(b: Lowering, x: Any) -> Any:
    """`[N, C, ...]` as one row of channels for each place, `[N * places, C]`."""
    batch, channels, *spatial = x.shape
    moved = transpose(b, reshape(b, x, [batch, channels, math.prod(spatial)]), [0, 2, 1])
    return reshape(b, moved, [batch * math.prod(spatial), channels])


def _weighted(b: Lowering, rows: Any, taps: Sequence[Tap], spatial: Sequence[int], offsets: Any) -> Any:
    """The rows at the places that the taps of all axes name, times their weights, `[places, C]`."""
    strides = [math.prod(spatial[axis + 1 :]) for axis in range(len(spatial))]
    parts = [index if stride == 1 else b.op("mul", x=index, y=stride) for (index, _), stride in zip(taps, strides, strict=True)]
    index = functools.reduce(lambda one, other: b.op("add", x=one, y=other), [*parts, offsets])
    found = gather(b, rows, reshape(b, index, [math.prod(index.shape)]), 0)
    factors = [weight for _, weight in taps if weight is not None]
    if not factors:
        return found
    weight = functools.reduce(lambda one, other: b.op("mul", x=one, y=other), factors)
    return b.op("mul", x=found, y=reshape(b, weight, [math.prod(weight.shape), 1]))


def _denormalized(b: Lowering, place: Any, size: int, aligned: bool) -> Any:
    """From [-1, 1] to elements: the ends are the centers of the border elements, or their edges."""
    from_zero = b.op("add", x=place, y=1.0)
    if aligned:
        return b.op("mul", x=b.op("mul", x=from_zero, y=0.5), y=float(size - 1))
    return b.op("mul", x=b.op("sub", x=b.op("mul", x=from_zero, y=float(size)), y=1.0), y=0.5)


def _nearest_even(b: Lowering, x: Any) -> Any:
    """Rounded, halves to the even number."""
    low = b.op("floor", x=x)
    rest = b.op("sub", x=x, y=low)
    halved = b.op("mul", x=low, y=0.5)
    odd = b.op("not_equal", x=halved, y=b.op("floor", x=halved))
    tie = b.op("logical_and", x=b.op("equal", x=rest, y=0.5), y=odd)
    up = b.op("logical_or", x=b.op("greater", x=rest, y=0.5), y=tie)
    return b.op("add", x=low, y=cast(b, up, "fp32"))


def _padded(b: Lowering, place: Any, size: int, padding: str, aligned: bool) -> Any:
    """Places beyond the border, moved back where the padding mode reflects.

    With "border" each of the elements around the place is held to the border, as in PyTorch and ONNX Runtime, and not the place itself, as
    in ONNX's reference: the two differ where cubic weights reach beyond the neighbours.
    """
    if padding != "reflection":
        return place
    low, high = (0.0, size - 1.0) if aligned else (-0.5, size - 0.5)
    outside = b.op("logical_or", x=b.op("less", x=place, y=low), y=b.op("greater", x=place, y=high))
    return b.op("select", cond=outside, a=_reflected(b, place, low, high), b=place)


def _clip(b: Lowering, x: Any, low: float, high: float) -> Any:
    return b.op("minimum", x=b.op("maximum", x=x, y=low), y=high)


def _reflected(b: Lowering, x: Any, low: float, high: float) -> Any:
    """`x` reflected at both borders until it lies between them."""
    span = high - low
    if span == 0:
        return b.op("add", x=b.op("mul", x=x, y=0.0), y=low)
    distance = b.op("abs", x=b.op("sub", x=x, y=low))
    periods = b.op("floor", x=b.op("mul", x=distance, y=1 / (2 * span)))
    phase = b.op("sub", x=distance, y=b.op("mul", x=periods, y=2 * span))
    back = b.op("abs", x=b.op("sub", x=phase, y=span))
    return b.op("sub", x=high, y=back)


def _tap(b: Lowering, index: Any, weight: Any, size: int, padding: str, aligned: bool) -> Tap:
    """An element that takes part, by an index that may lie outside: there its weight is 0, or another element stands for it."""
    if padding == "zeros":
        inside = b.op("logical_and", x=b.op("greater_equal", x=index, y=0.0), y=b.op("less_equal", x=index, y=size - 1.0))
        mask = cast(b, inside, "fp32")
        weight = mask if weight is None else b.op("mul", x=weight, y=mask)
    elif padding == "reflection":
        index = _reflected(b, index, 0.0 if aligned else -0.5, size - 1.0 if aligned else size - 0.5)
    return b.op("cast", x=_clip(b, index, 0.0, size - 1.0), dtype="int32"), weight


def _linear_taps(b: Lowering, place: Any) -> list[Tap]:
    low = b.op("floor", x=place)
    rest = b.op("sub", x=place, y=low)
    return [(low, b.op("sub", x=1.0, y=rest)), (b.op("add", x=low, y=1.0), rest)]


def _cubic_taps(b: Lowering, place: Any) -> list[Tap]:
    """Keys' kernel with a = -0.75, which GridSample fixes."""
    low = b.op("floor", x=place)
    rest = b.op("sub", x=place, y=low)
    remaining = b.op("sub", x=1.0, y=rest)
    a = -0.75
    inner, outer = (a + 2, -(a + 3), 0.0, 1.0), (a, -5 * a, 8 * a, -4 * a)
    distances = [(b.op("add", x=rest, y=1.0), outer), (rest, inner), (remaining, inner), (b.op("add", x=remaining, y=1.0), outer)]
    return [(b.op("add", x=low, y=at - 1.0), _polynomial(b, distance, factors)) for at, (distance, factors) in enumerate(distances)]


def _polynomial(b: Lowering, x: Any, factors: Sequence[float]) -> Any:
    """By Horner's rule, the highest power first."""
    result: Any = b.op("mul", x=x, y=factors[0])
    for factor in factors[1:-1]:
        result = b.op("mul", x=b.op("add", x=result, y=factor), y=x)
    return b.op("add", x=result, y=factors[-1])


_TAPS = {"nearest": lambda b, place: [(place, None)], "linear": _linear_taps, "cubic": _cubic_taps}
"""The elements on an axis that take part in a sample, by mode: indices, as floats, and weights."""


def _affine_grid(b: Lowering, node: ir.Node) -> Any:
    sizes = b.out_shape(node)[1:-1]
    aligned = bool(node.attributes.get_int("align_corners", 0))
    if aligned and 1 in sizes:
        raise b.refuse("AffineGrid with align_corners over an axis of size 1, which ONNX does not define", "set align_corners to 0")
    b.half = False
    axes = [np.linspace(-1, 1, size) if aligned else (2 * np.arange(size) + 1) / size - 1 for size in sizes]
    grids = np.meshgrid(*axes, indexing="ij")
    points = np.stack([grid.reshape(-1) for grid in [*reversed(grids), np.ones(sizes)]], axis=-1)
    moved = b.op("matmul", x=points[None], y=b.x(node), transpose_y=True)
    return reshape(b, moved, b.out_shape(node))


def _roi_align(b: Lowering, node: ir.Node) -> Any:
    attributes = node.attributes
    samples, mode = attributes.get_int("sampling_ratio", 0), attributes.get_string("mode", "avg")
    shifts = {"half_pixel": 0.5, "output_half_pixel": 0.0}
    coordinates = attributes.get_string("coordinate_transformation_mode", "half_pixel")
    if samples <= 0:
        raise b.refuse("RoiAlign with sampling_ratio 0, which adapts to the regions", "set sampling_ratio to 1 or more")
    if mode not in ("avg", "max") or coordinates not in shifts:
        raise b.refuse(f"RoiAlign with mode '{mode}' and coordinates '{coordinates}'", "use avg or max, half_pixel or output_half_pixel")
    b.half = False
    x, regions, shape = b.x(node), b.x(node, 1), b.shape(node)
    height, width = attributes.get_int("output_height", 1), attributes.get_int("output_width", 1)
    scaled = b.op("sub", x=b.op("mul", x=regions, y=attributes.get_float("spatial_scale", 1.0)), y=shifts[coordinates])
    rows, columns, down, across = np.meshgrid(*(np.arange(count) for count in (height, width, samples, samples)), indexing="ij")
    insides, taps = [], []
    for axis, bins, at, sample in ((0, height, rows, down), (1, width, columns, across)):
        inner = (at + (sample + 0.5) / samples).reshape(1, -1)
        begin, end = (piece(b, scaled, 1, column, column + 1) for column in (1 - axis, 3 - axis))
        place = _roi_places(b, begin, end, inner / bins, at_least_one=coordinates == "output_half_pixel")
        inside, axis_taps = _roi_taps(b, place, shape[2 + axis])
        insides.append(inside)
        taps.append(axis_taps)
    inside = b.op("mul", x=insides[0], y=insides[1])
    taps[0] = [(index, b.op("mul", x=weight, y=inside)) for index, weight in taps[0]]
    batch = b.op("mul", x=reshape(b, b.x(node, 2), [regions.shape[0], 1]), y=shape[2] * shape[3])
    table = _rows(b, x)
    corners = [_weighted(b, table, chosen, shape[2:], batch) for chosen in itertools.product(*taps)]
    merged = functools.reduce(lambda one, other: b.op("add" if mode == "avg" else "maximum", x=one, y=other), corners)
    grouped = reshape(b, merged, [regions.shape[0], height * width, samples * samples, shape[1]])
    pooled = b.op("reduce_mean" if mode == "avg" else "reduce_max", x=grouped, axes=[2], keep_dims=False)
    return reshape(b, transpose(b, pooled, [0, 2, 1]), b.out_shape(node))


def _roi_places(b: Lowering, begin: Any, end: Any, parts: np.ndarray, at_least_one: bool) -> Any:
    """Coordinates of the samples on one axis, `[regions, samples]`; `parts` says how far each lies into the region."""
    length = b.op("sub", x=end, y=begin)
    if at_least_one:
        length = b.op("maximum", x=length, y=1.0)
    return b.op("add", x=begin, y=b.op("mul", x=length, y=parts))


def _roi_taps(b: Lowering, place: Any, size: int) -> tuple[Any, list[Tap]]:
    """Whether each sample counts (1 or 0), and the two elements that it lies between; beyond the border the border element."""
    inside = b.op("logical_and", x=b.op("greater_equal", x=place, y=-1.0), y=b.op("less_equal", x=place, y=float(size)))
    held = _clip(b, place, 0.0, size - 1.0)
    (low, low_weight), (high, high_weight) = _linear_taps(b, held)
    high = b.op("minimum", x=high, y=size - 1.0)
    return cast(b, inside, "fp32"), [
        (b.op("cast", x=low, dtype="int32"), low_weight),
        (b.op("cast", x=high, dtype="int32"), high_weight),
    ]


_DYNAMIC = "leave it out of the model and apply it to the model's outputs"
TABLE = {
    **spectral.TABLE,
    "AffineGrid": _affine_grid,
    "GridSample": _grid_sample,
    "ImageDecoder": refuser("ImageDecoder", "give the decoded image to the model"),
    "NonMaxSuppression": refuser("NonMaxSuppression, whose result has no static shape", _DYNAMIC),
    "RoiAlign": _roi_align,
    **dict.fromkeys(
        ("RegexFullMatch", "StringConcat", "StringNormalizer", "StringSplit", "TfIdfVectorizer"),
        refuser("strings", "encode them outside the model"),
    ),
}
"""By ONNX operator."""
