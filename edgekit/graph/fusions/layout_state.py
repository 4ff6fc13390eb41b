"""Chains of Reshape and Transpose as what they are: one permutation of the factors of a shape.

A reshape regroups the elements of a tensor in their order, a transpose permutes groups. Split every axis of the input into factors that all
reshapes of the chain cut between, and the chain is a permutation of these factors, read in groups. Two chains of one input and output shape
compute the same when their permutations agree, after factors that always stay together are joined and those of length 1 are left out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """A Transpose by `perm`, or a Reshape to `shape` when `perm` is None; `shape` is that of the result."""

    shape: Shape
    perm: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """A tensor as regrouped and permuted factors of an input; factors of length 1 are left out.

    Attributes:
        source: Shape of the input.
        shape: Shape of the result.
        sizes: The factors in the order of the input, row-major.
        source_axes: Per axis of the input, the indices of its factors.
        axes: Per axis of the result, the indices of its factors.
    """

    source: Shape
    shape: Shape
    sizes: tuple[int, ...]
    source_axes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[int, ...], ...]

    @property
    def key(self) -> tuple[Shape, Shape, tuple[int, ...], tuple[int, ...]]:
        """Equal for two layouts that compute the same."""
        blocks = self.blocks()
        order = sorted(blocks)
        sizes = tuple(math.prod(self.sizes[first:last]) for first, last in order)
        return self.source, self.shape, sizes, tuple(order.index(block) for block in blocks)

    def blocks(self) -> list[tuple[int, int]]:
        """Returns the factors that stay together as ranges [first, last) of the input's order, in the order of the result."""
        found: list[tuple[int, int]] = []
        for factor in itertools.chain.from_iterable(self.axes):
            if found and found[-1][1] == factor:
                found[-1] = (found[-1][0], factor + 1)
            else:
                found.append((factor, factor + 1))
        return found


def follow(source: Shape, steps: Sequence[Step]) -> Layout | None:
    """Applies `steps` to a tensor of shape `source`; None when a reshape cuts an axis where it has no factor, or a length is 0."""
    if 0 in source:
        return None
    layout: Layout | None = _start(source)
    for step in steps:
        assert layout is not None
        if step.perm is not None:
            axes = tuple(layout.axes[axis] for axis in step.perm)
            layout = Layout(layout.source, tuple(layout.shape[axis] for axis in step.perm), layout.sizes, layout.source_axes, axes)
        else:
            layout = _reshape(layout, step.shape)
        if layout is None:
            return None
    return layout


def _start(source: Shape) -> Layout:
    sizes = tuple(size for size in source if size != 1)
    numbers = itertools.count()
    axes = tuple((next(numbers),) if size != 1 else () for size in source)
    return Layout(source, source, sizes, axes, axes)


def _reshape(layout: Layout, shape: Shape) -> Layout | None:
    order = list(itertools.chain.from_iterable(layout.axes))
    if math.prod(shape) != math.prod(layout.sizes):
        return None
    axes: list[list[int]] = []
    position = 0
    for size in shape:
        axis: list[int] = []
        while size != 1:
            factor = order[position]
            length = layout.sizes[factor]
            if size % length:
                if length % size:
                    return None
                layout = _split(layout, factor, size)  # the outer part, `size` long, keeps the number
                order = [number + (number > factor) for number in order]
                order.insert(position + 1, factor + 1)
                axes = [[number + (number > factor) for number in done] for done in axes]
                axis = [number + (number > factor) for number in axis]
                length = size
            axis.append(factor)
            position += 1
            size //= length
        axes.append(axis)
    return Layout(layout.source, shape, layout.sizes, layout.source_axes, tuple(tuple(axis) for axis in axes))


def _split(layout: Layout, factor: int, outer: int) -> Layout:
    """Splits one factor into `outer` and the rest."""
    sizes = (*layout.sizes[:factor], outer, layout.sizes[factor] // outer, *layout.sizes[factor + 1 :])

    def renumber(axes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(new for old in axis for new in ((old, old + 1) if old == factor else (old + (old > factor),))) for axis in axes)

    return Layout(layout.source, layout.shape, sizes, renumber(layout.source_axes), renumber(layout.axes))


def shortest(layout: Layout) -> list[Step]:
    """Returns the fewest steps, at most three, that compute `layout` from its input."""
    if len(layout.blocks()) < 2:
        return [] if layout.source == layout.shape else [Step(layout.shape)]
    direct = _direct(layout)
    if direct is not None:
        return [direct]
    return _reshape_transpose(layout) or _transpose_reshape(layout) or _reshape_transpose_reshape(layout)


def _direct(layout: Layout) -> Step | None:
    """One Transpose, where each axis of the result is one of the input."""
    at = {factors: axis for axis, factors in enumerate(layout.source_axes) if factors}
    ones = iter(axis for axis, factors in enumerate(layout.source_axes) if not factors)
    perm = [at.get(factors) if factors else next(ones, None) for factors in layout.axes]
    if None in perm or len(perm) != len(layout.source):
        return None
    return Step(layout.shape, tuple(axis for axis in perm if axis is not None))


def _is_range(factors: Sequence[int]) -> bool:
    return all(second == first + 1 for first, second in itertools.pairwise(factors))


def _reshape_transpose(layout: Layout) -> list[Step]:
    """Reshape to the axes of the result in the order of the input, Transpose; empty when an axis of the result is torn in the input."""
    if not all(_is_range(factors) for factors in layout.axes):
        return []
    order = sorted(range(len(layout.axes)), key=lambda axis: layout.axes[axis] or (-1,))  # axes of length 1 first
    middle = tuple(layout.shape[axis] for axis in order)
    return [Step(middle), Step(layout.shape, tuple(order.index(axis) for axis in range(len(order))))]


def _transpose_reshape(layout: Layout) -> list[Step]:
    """Transpose of the axes of the input, Reshape; empty when an axis of the input is torn in the result."""
    place = {factor: index for index, factor in enumerate(itertools.chain.from_iterable(layout.axes))}
    places = [tuple(place[factor] for factor in factors) for factors in layout.source_axes]
    if not all(_is_range(found) for found in places):
        return []
    perm = tuple(sorted(range(len(places)), key=lambda axis: places[axis] or (-1,)))
    return [Step(tuple(layout.source[axis] for axis in perm), perm), Step(layout.shape)]


def _reshape_transpose_reshape(layout: Layout) -> list[Step]:
    blocks = layout.blocks()
    order = sorted(blocks)
    split = tuple(math.prod(layout.sizes[first:last]) for first, last in order)
    perm = tuple(order.index(block) for block in blocks)
    return [Step(split), Step(tuple(split[axis] for axis in perm), perm), Step(layout.shape)]


@dataclass(frozen=True)
class Rearrangement:
    """A layout that a whole operator computes.

    Attributes:
        op_type: `DepthToSpace` or `SpaceToDepth`.
        blocksize: Its block size r.
        mode: Of DepthToSpace: `DCR` or `CRD`; else "".
        channels: For SpaceToDepth in PyTorch's order of channels (C, r, r), how ONNX's (r, r, C) are to be gathered; else None.
    """

    op_type: str
    blocksize: int
    mode: str = ""
    channels: tuple[int, ...] | None = None


def rearrangement(layout: Layout) -> Rearrangement | None:
    """Recognizes depth-to-space and its inverse, `[N, C·r², H, W]` ↔ `[N, C, H·r, W·r]` (Shi et al. 2016, "sub-pixel convolution")."""
    if len(layout.source) != 4 or len(layout.shape) != 4 or layout.source[0] != layout.shape[0]:
        return None
    (n, c, h, w), (_, channels, height, width) = layout.source, layout.shape
    r = height // h if height >= h else h // height
    if r < 2:
        return None
    if (height, width, channels * r * r) == (h * r, w * r, c):
        depth_first = [Step((n, r, r, channels, h, w)), Step((n, channels, h, r, w, r), (0, 3, 4, 1, 5, 2)), Step(layout.shape)]
        if _is_same(layout, depth_first):
            return Rearrangement("DepthToSpace", r, "DCR")
        column_row = [Step((n, channels, r, r, h, w)), Step((n, channels, h, r, w, r), (0, 1, 4, 2, 5, 3)), Step(layout.shape)]
        return Rearrangement("DepthToSpace", r, "CRD") if _is_same(layout, column_row) else None
    if (height * r, width * r, channels) != (h, w, c * r * r):
        return None
    split = Step((n, c, height, r, width, r))
    if _is_same(layout, [split, Step((n, r, r, c, height, width), (0, 3, 5, 1, 2, 4)), Step(layout.shape)]):
        return Rearrangement("SpaceToDepth", r)
    if _is_same(layout, [split, Step((n, c, r, r, height, width), (0, 1, 3, 5, 2, 4)), Step(layout.shape)]):
        order = tuple(block * c + channel for channel in range(c) for block in range(r * r))
        return Rearrangement("SpaceToDepth", r, channels=order)
    return None


def _is_same(layout: Layout, steps: list[Step]) -> bool:
    other = follow(layout.source, steps)
    return other is not None and other.key == layout.key
