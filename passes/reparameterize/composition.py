"""The algebra of the weights of linear forms in float64: lifting groups, adding, composing, and leaving out zeros.

Weights are `[O, I/g, *kernel]` and biases `[O]`, as of an ONNX Conv; the geometries say where their taps lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from edgekit.passes.reparameterize.geometry import Geometry, Taps

Weights: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Weight `[O, I/g, *kernel]` and bias `[O]`."""


def lift(weight: np.ndarray, groups: int, fewer: int) -> np.ndarray:
    """Returns the weight `[O, I/g, *kernel]` of g groups as one of `fewer` groups, a divisor of g, with zeros between the blocks."""
    if groups == fewer:
        return weight
    inner = groups // fewer  # so many of the groups lie in one of the new ones
    rows, columns, kernel = weight.shape[0] // groups, weight.shape[1], weight.shape[2:]
    lifted = np.zeros((fewer, inner, rows, inner, columns, *kernel))
    diagonal = np.arange(inner)
    lifted[:, diagonal, :, diagonal] = np.moveaxis(weight.reshape(fewer, inner, rows, columns, *kernel), 1, 0)
    return lifted.reshape(weight.shape[0], inner * columns, *kernel)


def added_weights(terms: Iterable[tuple[Geometry, Weights, int]], geometry: Geometry) -> Weights:
    """Adds forms, each so many times (subtracts where negative), as one of `geometry`, their `merged_geometry`."""
    total, total_bias = np.zeros(geometry.weight_shape), np.zeros(geometry.out_shape[1])
    for own, (weight, bias), times in terms:
        places: Any = (..., *(tap.within(wide) for tap, wide in zip(own.taps, geometry.taps, strict=True)))
        total[places] += times * lift(weight, own.groups, geometry.groups)
        total_bias += times * bias
    return total, total_bias


def composed_weights(second: Weights, outer: Geometry, first: Weights, inner: Geometry, geometry: Geometry) -> Weights:
    """Returns the weights of `second` (of geometry `outer`) applied to `first` (of geometry `inner`), as one of `geometry`.

    W[o, i, s₁·u₂ + u₁] += Σ_m W₂[o, m, u₂]·W₁[m, i, u₁] and b = b₂ + Σ_{m, u₂} W₂[o, m, u₂]·b₁[m], group by group.
    """
    total = np.zeros(geometry.weight_shape)
    for place in np.ndindex(*outer.weight_shape[2:]):
        slices: list[Any] = [...]
        for index, outer_tap, inner_tap, stride, wide in zip(place, outer.taps, inner.taps, inner.stride, geometry.taps, strict=True):
            start = stride * (outer_tap.start + outer_tap.step * index) + inner_tap.start
            slices.append(Taps(start, inner_tap.step, inner_tap.count).within(wide))
        total[tuple(slices)] += _product(second[0][(..., *place)], outer, first[0], inner)
    sums = second[0].reshape(outer.groups, -1, *outer.weight_shape[1:]).sum(axis=tuple(range(3, 3 + len(geometry.taps))))  # [g, O/g, M/g]
    return total, second[1] + (sums @ first[1].reshape(outer.groups, -1, 1)).reshape(-1)


def _product(mix: np.ndarray, outer: Geometry, weight: np.ndarray, inner: Geometry) -> np.ndarray:
    """Returns Σ_m mix[o, m]·weight[m, i, u] as `[O, I/g, *kernel]`, g = gcd(g₂, g₁); `mix` is one tap `[O, M/g₂]` of the second."""
    kernel = weight.shape[2:]
    if mix.shape[1] == 1 and outer.groups == mix.shape[0]:  # one factor per row
        rows: np.ndarray = mix.reshape(-1, *[1] * (weight.ndim - 1)) * weight
        return rows
    if weight.shape[1] == 1 and inner.groups == weight.shape[0]:  # one kernel per column
        columns = mix.reshape(outer.groups, -1, mix.shape[1], *[1] * len(kernel)) * weight.reshape(outer.groups, 1, mix.shape[1], *kernel)
        return np.reshape(columns, (*mix.shape, *kernel))
    groups = math.gcd(outer.groups, inner.groups)
    left = lift(mix, outer.groups, groups)
    right = lift(weight, inner.groups, groups)
    product = left.reshape(groups, -1, left.shape[1]) @ right.reshape(groups, left.shape[1], -1)
    return np.reshape(product, (mix.shape[0], right.shape[1], *kernel))


def composed_bias_map(second: Weights, outer: Geometry, bias: np.ndarray, extent: tuple[int, ...]) -> np.ndarray:
    """Returns what `second` makes of a map that is `bias` `[M]` within `extent` and zero outside: `[O, *spatial]`, its own bias included.

    Args:
        second: The weights of the form.
        outer: Its geometry.
        bias: The bias of what is before it.
        extent: The spatial shape of what is before it.
    """
    weight = second[0].reshape(outer.groups, -1, *outer.weight_shape[1:])  # [g, O/g, M/g, *kernel]
    taps = np.einsum("gom...,gm->go...", weight, bias.reshape(outer.groups, -1)).reshape(outer.out_shape[1], *outer.weight_shape[2:])
    for tap, stride, size, length in zip(outer.taps, outer.stride, outer.out_shape[2:], extent, strict=True):
        places = stride * np.arange(size)[:, None] + tap.start + tap.step * np.arange(tap.count)
        inside = ((places >= 0) & (places < length)).astype(np.float64)  # [size, count]
        taps = np.tensordot(taps, inside, axes=([1], [1]))
    return np.asarray(taps + second[1].reshape(-1, *[1] * len(extent)))


def without_zeros(geometry: Geometry, weights: Weights) -> tuple[Geometry, Weights]:
    """Returns the form with rims of the kernel, blocks between groups and the bias left out where they are exactly zero."""
    weight, bias = weights
    for axis in range(len(geometry.taps)):
        geometry, weight = _without_rim(geometry, weight, axis)
    geometry, weight = _with_more_groups(geometry, weight)
    return replace(geometry, has_bias=bool(bias.any())), (weight, bias)


def _without_rim(geometry: Geometry, weight: np.ndarray, axis: int) -> tuple[Geometry, np.ndarray]:
    """Crops the first and last taps of one spatial axis, as far as the pads of the cropped convolution are not negative."""
    tap = geometry.taps[axis]
    used: Any = np.moveaxis(weight, 2 + axis, 0).reshape(tap.count, -1).any(axis=1)
    end = (geometry.out_shape[2 + axis] - 1) * geometry.stride[axis] - (geometry.in_shape[2 + axis] - 1)
    first, last = 0, tap.count - 1
    while first < last and not used[first] and tap.start + tap.step * (first + 1) <= 0:
        first += 1
    while last > first and not used[last] and end + tap.start + tap.step * (last - 1) > -geometry.stride[axis]:
        last -= 1
    if last - first + 1 == tap.count:
        return geometry, weight
    cropped = Taps(tap.start + tap.step * first, tap.step, last - first + 1)
    kept: Any = (slice(None),) * (2 + axis) + (slice(first, last + 1),)
    return replace(geometry, taps=(*geometry.taps[:axis], cropped, *geometry.taps[axis + 1 :])), weight[kept]


def _with_more_groups(geometry: Geometry, weight: np.ndarray) -> tuple[Geometry, np.ndarray]:
    """Splits each group into as many as its blocks allow: all entries between the new groups are exactly zero."""
    groups, kernel = geometry.groups, weight.shape[2:]
    rows, columns = weight.shape[0] // groups, weight.shape[1]
    used: Any = weight.reshape(groups, rows, columns, -1).any(axis=3)
    if used.all() or not used.any():
        return geometry, weight
    for parts in (n for n in range(math.gcd(rows, columns), 1, -1) if rows % n == 0 and columns % n == 0):
        blocks = used.reshape(groups, parts, rows // parts, parts, columns // parts).any(axis=(0, 2, 4))
        if not blocks[~np.eye(parts, dtype=bool)].any():
            split = weight.reshape(groups, parts, rows // parts, parts, columns // parts, *kernel)
            diagonal = np.arange(parts)
            kept = np.moveaxis(split[:, diagonal, :, diagonal], 0, 1).reshape(weight.shape[0], columns // parts, *kernel)
            return replace(geometry, groups=groups * parts), kept
    return geometry, weight
