"""Inputs that real data seldom holds and that tell apart graphs which agree on it: zeros, large magnitudes and denormals.

A rewriting can be right on normalized images and still divide zero by zero where every element is equal, overflow a square, or lose what is
below the smallest normal number. Every stage of a compile runs on these inputs too. What they show is reported; only values that an exact
pass turns from finite to NaN or infinite stop the compile, since large magnitudes also enlarge what rounding legitimately does
(a softmax over large scores may pick another key by the last bit).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from edgekit.contracts import Arrays
from edgekit.errors import ParityError
from edgekit.verify import assert_close

if TYPE_CHECKING:
    from edgekit.data import Declared

ZEROS, LARGE, DENORMALS, MIXED = "zeros", "large", "denormals", "mixed"

SEPARATE_MACS = 300_000_000
"""Up to this many MACs the three kinds are three inputs. Beyond it they share one, which costs as much as one input of the data."""

_LARGE = 1e4
"""Standard deviation of large inputs: as raw 16-bit sensor counts, where data is normalized to about 1."""


def adversarial_batches(declared: Mapping[str, Declared], seed: int, macs: int = 0) -> dict[str, Arrays]:
    """Makes adversarial batches in the shapes and dtypes of the inputs, by kind.

    zeros:      every element is 0.
    large:      seeded noise of standard deviation 1e4, or a quarter of the square root of the dtype's largest number where that is less,
                so that a square is not infinite by itself.
    denormals:  seeded noise between the dtype's smallest normal number and its negative.
    mixed:      of a model of more than `SEPARATE_MACS` MACs, instead of the three: the first third of its rows, or of its longest
                axis where it has fewer than three rows, is zero, the second is large, the last is denormal.

    Integer and boolean inputs, which may be indices, take only 0 and 1: all 0, all 1, alternating; alternating in `mixed`.

    Args:
        declared: What the graph declares of its inputs.
        seed: Seed of the noise.
        macs: Multiply-accumulates of one run of the model.

    Returns:
        Nothing where an input takes text.
    """
    if any(what.dtype.kind in "OUST" for what in declared.values()):
        return {}
    rng = np.random.default_rng(seed)
    kinds: dict[str, Arrays] = {ZEROS: {}, LARGE: {}, DENORMALS: {}}
    for name, what in declared.items():
        noise = rng.normal(0.0, 1.0, what.shape), rng.uniform(-1.0, 1.0, what.shape)
        for batch, array in zip(kinds.values(), _arrays(what.shape, what.dtype, *noise), strict=True):
            batch[name] = array
    if macs <= SEPARATE_MACS:
        return kinds
    return {MIXED: {name: _thirds(*(batch[name] for batch in kinds.values())) for name in declared}}


def _arrays(shape: tuple[int, ...], dtype: np.dtype[Any], normal: np.ndarray, uniform: np.ndarray) -> tuple[np.ndarray, ...]:
    try:
        numbers = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]  # knows bfloat16 and float8 too
    except (TypeError, ValueError):
        alternating = np.arange(math.prod(shape)).reshape(shape) % 2
        return np.zeros(shape, dtype), np.ones(shape, dtype), alternating.astype(dtype)
    magnitude = min(_LARGE, math.sqrt(float(numbers.max)) / 4.0)
    denormal = uniform * float(numbers.smallest_normal)
    return np.zeros(shape, dtype), (normal * magnitude).astype(dtype), denormal.astype(dtype)


def _thirds(zeros: np.ndarray, large: np.ndarray, denormals: np.ndarray) -> np.ndarray:
    """One array of three parts; of integers the alternating one."""
    if zeros.dtype.kind in "iub":
        return denormals
    if max(zeros.shape, default=1) < 3:
        return large
    # Whole rows, or whole tokens of [B, N, C] where N > C, keep the kinds apart for as long as the model does.
    axis = 0 if zeros.shape[0] >= 3 else int(np.argmax(zeros.shape))
    mixed, third = zeros.copy(), zeros.shape[axis] / 3.0
    for part, source in ((1, large), (2, denormals)):
        where = [slice(None)] * zeros.ndim
        where[axis] = slice(round(part * third), round((part + 1) * third))
        mixed[tuple(where)] = source[tuple(where)]
    return mixed


@dataclass(frozen=True)
class Finding:
    """What a stage did on an adversarial input beyond rounding.

    Attributes:
        kind: The input's kind.
        text: What happened, as a sentence.
        lost: Whether values that were finite are no longer.
    """

    kind: str
    text: str
    lost: bool


def findings(kinds: Sequence[str], before: Sequence[Arrays], after: Sequence[Arrays], *, stage: str, precision: str) -> list[Finding]:
    """Judges a stage on adversarial inputs, each on its own: their outputs differ in scale by many orders of magnitude.

    Args:
        kinds: The kinds of inputs.
        before: Outputs of the graph before the stage, one entry a kind.
        after: Outputs after it.
        stage: Its name, for the texts.
        precision: As `assert_close` takes it.

    Returns:
        At most one finding a kind: values that were lost first, then finite values that differ by more than the tolerance.
    """
    found = []
    for kind, expected, result in zip(kinds, before, after, strict=True):
        lost = [name for name, array in expected.items() if name in result and _lost(array, result[name])]
        if lost:
            text = f"{stage} made output '{lost[0]}' NaN or infinite where it was finite before, on the adversarial input '{kind}'"
            found.append(Finding(kind, text, True))
            continue
        try:
            assert_close([_finite(expected, result)], [_finite(result, expected)], stage=stage, precision=precision)
        except ParityError as error:
            found.append(Finding(kind, f"on the adversarial input '{kind}' {error.what}", False))
    return found


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind in "fcV"


def _lost(before: np.ndarray, after: np.ndarray) -> bool:
    if not (_is_float(before) and _is_float(after)) or before.shape != after.shape:
        return False
    return bool((np.isfinite(before) & ~np.isfinite(after)).any())


def _finite(arrays: Arrays, others: Arrays) -> Arrays:
    """`arrays` with zeros where they or `others` are NaN or infinite."""
    masked = {}
    for name, array in arrays.items():
        other = others.get(name)
        if other is not None and _is_float(array) and _is_float(other) and array.shape == other.shape:
            finite = np.isfinite(array) & np.isfinite(other)
            array = array if finite.all() else np.where(finite, array, np.zeros((), array.dtype))
        masked[name] = array
    return masked
