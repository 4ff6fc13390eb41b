"""Which part of a tensor is meant: a set of places along each axis, called a box.

A box is the product of its sets, so a matrix whose rows 0 and 3 are read in columns 1 and 2 is read at four places. Sets and not intervals
are kept, because the class token, two distillation tokens or the odd rows are read as often as a range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

Places: TypeAlias = tuple[int, ...]
"""Places along one axis: sorted, each once, not negative."""
Box: TypeAlias = tuple[Places | None, ...]
"""Places per axis, None for all of them. The empty tuple is the whole of a tensor of any shape."""

WHOLE: Box = ()


def tidy(box: Sequence[Places | None], shape: Sequence[int]) -> Box:
    """Returns the one form of a box in a tensor of `shape`: None for full axes, `WHOLE` where every axis is full."""
    axes = tuple(None if places is None or len(places) == size else places for places, size in zip(box, shape, strict=True))
    return axes if any(places is not None for places in axes) else WHOLE


def per_axis(box: Box, rank: int) -> Box:
    """Returns the sets of all `rank` axes, also where the box is `WHOLE`."""
    return box or (None,) * rank


def shape_of(box: Box, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the part of a tensor of `shape` that lies in the box."""
    return tuple(size if places is None else len(places) for places, size in zip(per_axis(box, len(shape)), shape, strict=True))


def size_of(box: Box, shape: Sequence[int]) -> int:
    """Returns how many elements of a tensor of `shape` lie in the box."""
    return math.prod(shape_of(box, shape))


def union(a: Box, b: Box, shape: Sequence[int]) -> Box:
    """Returns the smallest box that contains both."""
    if not a or not b:
        return WHOLE
    joined = [None if p is None or q is None else tuple(sorted({*p, *q})) for p, q in zip(a, b, strict=True)]
    return tidy(joined, shape)


def contains(outer: Box, inner: Box) -> bool:
    """True when every place of `inner` is in `outer`."""
    if not outer or not inner:
        return not outer
    return all(p is None or (q is not None and set(q) <= set(p)) for p, q in zip(outer, inner, strict=True))


def places_within(outer: Box, inner: Box, rank: int) -> dict[int, Places]:
    """Returns, per axis along which the two differ, where the places of `inner` stand in the part of a tensor that `outer` has left."""
    found: dict[int, Places] = {}
    for axis, (has, wants) in enumerate(zip(per_axis(outer, rank), per_axis(inner, rank), strict=True)):
        if wants is not None and wants != has:
            found[axis] = wants if has is None else positions(has, wants)
    return found


def positions(has: Places | None, wants: Sequence[int]) -> Places:
    """Returns where each of `wants`, in its order, stands among the places `has`."""
    if has is None:
        return tuple(wants)
    where = {place: index for index, place in enumerate(has)}
    return tuple(where[place] for place in wants)
