"""Changes of shape that the lowerings of several subjects need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.targets.coreml.lowering.builder import Lowering


def reshaped(b: Lowering, x: Any, shape: Sequence[int]) -> Any:
    """`x` in another shape of as many elements; MIL's reshape has no form for rank 0, squeeze has."""
    if tuple(x.shape) == tuple(shape):
        return x
    if shape:
        return b.op("reshape", x=x, shape=list(shape))
    return b.op("squeeze", x=x if len(x.shape) == 1 else b.op("reshape", x=x, shape=[1]))


def broadcast(b: Lowering, x: Any, shape: Sequence[int]) -> Any:
    """`x`, a MIL variable or an array, repeated to `shape` by numpy's rules."""
    if isinstance(x, np.ndarray):
        return b.var(np.broadcast_to(x, shape))
    if tuple(x.shape) == tuple(shape):
        return x
    full = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
    repeats = [wanted // size for wanted, size in zip(shape, full, strict=True)]
    x = reshaped(b, x, full)
    return x if set(repeats) == {1} else b.op("tile", x=x, reps=repeats)
