"""What is particular about a wrong tensor: how it differs from the right one, in words that lead to the cause."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

_HALF_MAX = 65504.0
_HALF_TINY = 2.0**-24
"""Smallest positive number of float16."""
_HALF_NORMAL = 2.0**-14
"""Smallest normal number of float16."""
_CLOSE = 1e-4
"""Share of the largest magnitude up to which a relation between two tensors counts as exact."""


@dataclass(frozen=True)
class Difference:
    """Where two tensors differ most.

    Attributes:
        index: Of the largest error.
        channel: That index on the channel axis; None of a tensor without one.
        expected: The right value there.
        found: The wrong one.
        particular: How they differ, in words; empty where nothing stands out.
    """

    index: tuple[int, ...]
    channel: int | None
    expected: float
    found: float
    particular: str


def difference(expected: np.ndarray, found: np.ndarray, *, weight: bool = False, half: bool = False) -> Difference:
    """Compares two tensors.

    Args:
        expected: The right one.
        found: The wrong one.
        weight: Whether they are weights, whose channels lie on axis 0; those of activations on axis 1 of `[N, C, H, W]`, else on the last.
        half: Whether float16 takes part, whose range may be the reason.
    """
    text = particular(expected, found, half)
    if expected.shape != found.shape or not expected.size:
        return Difference((), None, float("nan"), float("nan"), text)
    a, b = expected.astype(np.float64), found.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(np.isfinite(a) == np.isfinite(b), np.nan_to_num(np.abs(a - b), nan=0.0, posinf=0.0), np.inf)
    if not error.any() and a.size:
        error = np.asarray(a != b).astype(np.float64)
    index = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
    axis = None if not index else 0 if weight else 1 if len(index) >= 4 else len(index) - 1
    return Difference(index, None if axis is None else index[axis], float(a[index]), float(b[index]), text)


def particular(expected: np.ndarray, found: np.ndarray, half: bool = False) -> str:
    """Names the relation between a right and a wrong tensor; empty where none of those that are known holds."""
    if expected.shape != found.shape:
        order = _transposition(expected, found)
        if order is not None:
            return f"transposed: it is the right one with axes in the order {list(order)}"
        return f"its shape is {list(found.shape)} instead of {list(expected.shape)}"
    a, b = expected.astype(np.float64), found.astype(np.float64)
    return _not_finite(a, b, half) or _relation(a, b) or _small(a, b, half) or _partial(a, b)


def _not_finite(a: np.ndarray, b: np.ndarray, half: bool) -> str:
    lost = np.isfinite(a) & ~np.isfinite(b)
    if lost.any():
        largest = float(np.abs(a[lost]).max())
        kind = "NaN" if np.isnan(b[lost]).all() else "infinite"
        if half and largest > _HALF_MAX:
            return f"overflow: up to {largest:g} where float16 ends at 65504; {int(lost.sum())} of {a.size} values are {kind}"
        return f"{int(lost.sum())} of {a.size} values are {kind} where they were finite"
    return ""


def _small(a: np.ndarray, b: np.ndarray, half: bool) -> str:
    zeroed = (a != 0) & (b == 0)
    if zeroed.any() and zeroed.sum() >= 0.05 * np.count_nonzero(a):
        largest = float(np.abs(a[zeroed]).max())
        if half and largest <= _HALF_TINY:
            return f"vanished: {int(zeroed.sum())} of {a.size} values of at most {largest:.2g} are zero in float16"
        return f"{int(zeroed.sum())} of {a.size} values are zero where they were not"
    if half and a.size and 0 < np.abs(a).max() < _HALF_NORMAL:
        return f"denormal: all values are below {_HALF_NORMAL:.2g}, where float16 loses digits"
    return ""


def _relation(a: np.ndarray, b: np.ndarray) -> str:
    scale = float(np.abs(a).max()) if a.size else 0.0
    if scale == 0 or not np.isfinite(a).all() or not np.isfinite(b).all():
        return ""

    def equal(one: np.ndarray, other: np.ndarray, limit: float = _CLOSE) -> bool:
        return float(np.abs(one - other).max()) <= limit * max(float(np.abs(one).max()), float(np.abs(other).max()))

    if equal(-a, b):
        return "of the opposite sign"
    factor = float((a * b).sum() / (a * a).sum())
    if factor and equal(factor * a, b):
        return f"wrong by the constant factor {factor:.6g}"
    offset = float((b - a).mean())
    if offset and a.size > 1 and equal(a + offset, b, _CLOSE * 0.1):
        return f"wrong by the constant {offset:+.6g}"
    order = _transposition(a, b)
    if order is not None:
        return f"transposed: it is the right one with axes in the order {list(order)}"
    return _moved(a, b)


def _transposition(a: np.ndarray, b: np.ndarray) -> tuple[int, ...] | None:
    if a.ndim != b.ndim or not 2 <= a.ndim <= 4 or a.size < 2:
        return None
    limit = _CLOSE * float(np.abs(a).max())
    for order in itertools.permutations(range(a.ndim)):
        turned = a.transpose(order)
        if order != tuple(range(a.ndim)) and turned.shape == b.shape and float(np.abs(turned - b).max()) <= limit:
            return order
    return None


def _moved(a: np.ndarray, b: np.ndarray) -> str:
    """Whether slices along one axis stand in another order."""
    limit = _CLOSE * float(np.abs(a).max())
    for axis in range(a.ndim):
        length = a.shape[axis]
        if not 2 <= length <= 4096:
            continue
        rows, others = (np.moveaxis(array, axis, 0).reshape(length, -1) for array in (a, b))
        if rows.shape[1] * length * length > 1 << 26:
            continue
        source = [int(np.abs(rows - other).max(axis=1).argmin()) for other in others]
        if sorted(source) != list(range(length)) or float(np.abs(rows[source] - others).max()) > limit:
            if length > 2 and (step := _slid(rows, others, limit)):
                return f"shifted by {step} along axis {axis}"
            continue
        step = source.index(0)
        if source == [(index - step) % length for index in range(length)]:
            return f"shifted by {step} along axis {axis}, the end to the start"
        moved = [index for index, place in enumerate(source) if index != place]
        return f"permuted along axis {axis}: {len(moved)} slices, such as {moved[0]}, which is {source[moved[0]]} of the right one"
    return ""


def _slid(rows: np.ndarray, others: np.ndarray, limit: float) -> int:
    for step in (1, -1, 2, -2):
        if abs(step) >= len(rows) - 1:
            continue
        mine, theirs = (rows[:-step], others[step:]) if step > 0 else (rows[-step:], others[:step])
        if np.ptp(mine) > limit and float(np.abs(mine - theirs).max()) <= limit:
            return step
    return 0


def _partial(a: np.ndarray, b: np.ndarray) -> str:
    if not a.any() or not np.isfinite(a).all() or not np.isfinite(b).all():
        return ""
    if a.ndim < 2:
        wrong = np.abs(a - b) > _CLOSE * np.abs(a).max()
        return f"wrong at {int(wrong.sum())} of {a.size} places" if 0 < wrong.sum() < a.size else ""
    for axis in range(a.ndim):
        rest = tuple(i for i in range(a.ndim) if i != axis)
        energy = (a * a).sum(axis=rest, keepdims=True)
        factor = (a * b).sum(axis=rest, keepdims=True) / np.where(energy == 0, 1, energy)
        if a.size > 2 * a.shape[axis] and float(np.abs(factor * a - b).max()) <= _CLOSE * float(np.abs(a).max()):
            return f"scaled by a factor of its own at each index of axis {axis}, {factor.min():.4g} to {factor.max():.4g}"
    wrong = np.abs(a - b) > _CLOSE * np.abs(a).max()
    for axis in range(a.ndim):
        rest = tuple(i for i in range(a.ndim) if i != axis)
        slices = np.flatnonzero(wrong.any(axis=rest))
        if 0 < len(slices) < a.shape[axis]:
            shown = ", ".join(map(str, slices[:6])) + (", …" if len(slices) > 6 else "")
            return f"wrong only at {len(slices)} of {a.shape[axis]} indices of axis {axis}: {shown}"
    return ""
