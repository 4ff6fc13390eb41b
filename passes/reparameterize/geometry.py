"""The geometry of linear forms: which places of its source a convolution reads, and what it costs, without its weights.

A form says t[n, o, y] = bias[o] + Σ kernel[o, i, u] · source0[n, i, stride·y + offset(u)], where source0 is the source continued by zeros.
Offsets replace pads and dilations: the taps of one axis are `start, start + step, …` relative to the position `stride·y`. Two forms with
the same source, stride and output shape add tap by tap, whatever their kernel sizes, pads and dilations were; a form of a form is a form
as long as the second reads nothing outside the first that is not zero (Ding et al. 2021, "Diverse Branch Block: Building a Convolution as
an Inception-like Unit", sections 3.2 and 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce


@dataclass(frozen=True)
class Taps:
    """Where a kernel reads along one spatial axis: at `start + step·u` for u in 0 … count − 1."""

    start: int
    step: int
    count: int

    @property
    def last(self) -> int:
        """The offset of the last tap."""
        return self.start + self.step * (self.count - 1)

    def within(self, wide: Taps) -> slice:
        """The places of these taps among the taps `wide` that contain them."""
        return slice((self.start - wide.start) // wide.step, (self.last - wide.start) // wide.step + 1, max(1, self.step // wide.step))


def union(taps: Sequence[Taps]) -> Taps:
    """Returns the coarsest regular taps that contain all of `taps`."""
    start, last = min(tap.start for tap in taps), max(tap.last for tap in taps)
    step = reduce(math.gcd, [*(tap.step for tap in taps if tap.count > 1), *(tap.start - start for tap in taps)], 0) or 1
    return Taps(start, step, (last - start) // step + 1)


@dataclass(frozen=True)
class Geometry:
    """The shape of the convolution that a form is.

    Attributes:
        groups: Number of groups g.
        in_shape: `[N, I, *spatial]` of the source.
        out_shape: `[N, O, *spatial]`.
        stride: Per spatial axis.
        taps: Per spatial axis.
        has_bias: Whether there is a bias other than zero.
    """

    groups: int
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    stride: tuple[int, ...]
    taps: tuple[Taps, ...]
    has_bias: bool

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`[O, I/g, *kernel]`."""
        return (self.out_shape[1], self.in_shape[1] // self.groups, *(tap.count for tap in self.taps))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return math.prod(self.out_shape) * math.prod(self.weight_shape[1:])

    @property
    def kernel(self) -> str:
        """The kernel size as people write it, such as `3x3`."""
        return "x".join(str(tap.count) for tap in self.taps)

    @property
    def is_cropped(self) -> bool:
        """Whether rims of the source are left out that no Conv leaves out: its pads would be negative."""
        axes = zip(self.taps, self.stride, self.out_shape[2:], self.in_shape[2:], strict=True)
        return any(tap.start > 0 or (size - 1) * stride + tap.last - (source - 1) <= -stride for tap, stride, size, source in axes)

    def pads(self) -> list[int]:
        """ONNX's pads, begins then ends, of a geometry that is not cropped.

        An end pad that is negative by less than a stride (the last rows are never read) is 0: it gives the same output size.
        """
        begins = [-tap.start for tap in self.taps]
        ends = [
            max(0, (size - 1) * stride + tap.last - (source - 1))
            for size, stride, tap, source in zip(self.out_shape[2:], self.stride, self.taps, self.in_shape[2:], strict=True)
        ]
        return begins + ends


def identity_geometry(shape: tuple[int, ...]) -> Geometry:
    """Returns the geometry of the identity on `[N, C, *spatial]`: one group per channel and one tap."""
    rank = len(shape) - 2
    return Geometry(shape[1], shape, shape, (1,) * rank, (Taps(0, 1, 1),) * rank, False)


def merged_geometry(geometries: Sequence[Geometry]) -> Geometry:
    """Returns the geometry of the sum of forms with one source, stride and output shape.

    Groups are lifted to the greatest common divisor: a convolution of g groups is one of g' groups with zeros when g' divides g.
    """
    first = geometries[0]
    groups = math.gcd(*(geometry.groups for geometry in geometries))
    taps = tuple(union(axis) for axis in zip(*(geometry.taps for geometry in geometries), strict=True))
    return Geometry(groups, first.in_shape, first.out_shape, first.stride, taps, any(geometry.has_bias for geometry in geometries))


def reads_padding(second: Geometry, first: Geometry) -> bool:
    """Returns whether `second` reads places outside of what `first` makes."""
    axes = zip(second.taps, second.stride, second.out_shape[2:], first.out_shape[2:], strict=True)
    return any(tap.start < 0 or (size - 1) * stride + tap.last >= extent for tap, stride, size, extent in axes)


def is_zero_outside(second: Geometry, first: Geometry) -> bool:
    """Returns whether `first` without its bias would be zero at every place outside its output that `second` reads.

    That is so where no tap at such a place reaches the source; a 1x1 kernel without pads always is.
    """
    for tap, stride, size, inner, step, extent, source in zip(
        second.taps, second.stride, second.out_shape[2:], first.taps, first.stride, first.out_shape[2:], first.in_shape[2:], strict=True
    ):
        if tap.start < 0 and inner.last - step >= 0:  # the last tap at place −1
            return False
        if (size - 1) * stride + tap.last >= extent and step * extent + inner.start < source:  # the first tap at the place after the last
            return False
    return True


def why_not_composed(second: Geometry, first: Geometry) -> str | None:
    """Returns why `second` of `first` is not one form, or None where `composed_geometry` is exact."""
    if not reads_padding(second, first):
        return None
    if not is_zero_outside(second, first):
        return f"the {second.kernel} kernel pads what a {first.kernel} kernel makes: one convolution would not see these zeros"
    if first.has_bias:
        return f"the {second.kernel} kernel pads with zeros what has a bias before it"
    return None


def composed_geometry(second: Geometry, first: Geometry) -> Geometry:
    """Returns the geometry of `second` applied to what `first` makes, where `why_not_composed` finds nothing.

    Place z of the second reads places s₂·z + u₂ of the first, which read s₁·(s₂·z + u₂) + u₁ of the source.
    """
    taps = []
    for inner, stride, outer in zip(first.taps, first.stride, second.taps, strict=True):
        spread = [Taps(stride * (outer.start + outer.step * index) + inner.start, inner.step, inner.count) for index in range(outer.count)]
        taps.append(union(spread))
    return Geometry(
        math.gcd(second.groups, first.groups),
        first.in_shape,
        second.out_shape,
        tuple(a * b for a, b in zip(first.stride, second.stride, strict=True)),
        tuple(taps),
        first.has_bias or second.has_bias,
    )
