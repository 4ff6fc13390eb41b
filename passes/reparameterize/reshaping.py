"""Places of a tensor before and after a Reshape: which elements of the source a part of the result holds."""

from __future__ import annotations

import math

import numpy as np

from edgekit.passes.reparameterize.boxes import Box, Places

Shape = tuple[int, ...]

_MOST_ELEMENTS = 1 << 22
"""Reshapes that mix more elements than this into one group of axes are not followed: their places are listed one by one."""


def reshaped(box: Box, output: Shape, source: Shape) -> tuple[Box, Box] | None:
    """Returns which part of the result of a reshape can be had, and from which part of its source; None for empty tensors.

    Axes fall into groups that are split and merged among themselves (`[B, N, H·D]` to `[B, N, H, D]`: B, N and H·D). Within a group the
    wanted elements must again be a product of places along the source's axes: reading them in order then gives the same order.
    """
    available: list[Places | None] = list(box)
    wanted: list[Places | None] = [None] * len(source)
    groups = _groups(output, source)
    if groups is None:
        return None
    for outs, ins in groups:
        if all(available[axis] is None for axis in outs):
            continue
        if len(outs) == len(ins) == 1:
            wanted[ins[0]] = available[outs[0]]
            continue
        found = _same_elements([available[a] for a in outs], [output[a] for a in outs], [source[a] for a in ins])
        for axis, places in zip(ins, found or (None,) * len(ins), strict=True):
            wanted[axis] = places
        if found is None:
            for axis in outs:
                available[axis] = None
    return tuple(available), tuple(wanted)


def _groups(output: Shape, source: Shape) -> list[tuple[list[int], list[int]]] | None:
    """Splits the axes of both shapes, in order, into the smallest groups of equal size."""
    if 0 in output or 0 in source:
        return None
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(output) and j < len(source):
        outs, ins, a, b = [i], [j], output[i], source[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                outs.append(i)
                a, i = a * output[i], i + 1
            else:
                ins.append(j)
                b, j = b * source[j], j + 1
        groups.append((outs, ins))
    return groups  # axes of length 1 may be left over: they have all their places


def _same_elements(wanted: list[Places | None], sizes: list[int], source: list[int]) -> list[Places] | None:
    """Returns the places along axes of sizes `source` of the elements `wanted` along `sizes`, where these are a product too."""
    if math.prod(sizes) > _MOST_ELEMENTS:
        return None
    chosen = np.ix_(*(range(size) if places is None else places for places, size in zip(wanted, sizes, strict=True)))
    flat = np.arange(math.prod(sizes)).reshape(sizes)[chosen].reshape(-1)
    found = [np.unique(along) for along in np.unravel_index(flat, source)]
    if math.prod(along.size for along in found) != flat.size:
        return None
    return [tuple(along.tolist()) for along in found]
