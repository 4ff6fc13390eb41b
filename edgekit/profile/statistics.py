"""Percentiles and intervals: what a difference of two measured numbers is worth."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np

from edgekit.errors import DataError

_BLOCK_ELEMENTS = 2**21
"""Resampled values held at once, so that many rounds do not cost gigabytes."""


def percentiles(samples: np.ndarray, levels: tuple[float, ...] = (50.0, 90.0, 99.0)) -> tuple[float, ...]:
    """Percentiles of `samples`, `[S]`, linear between order statistics (Hyndman & Fan 1996, type 7).

    With fewer than 100 samples the 99th percentile lies between the two largest.

    Raises:
        ValueError: There are no samples, or one is not finite.
    """
    samples = np.asarray(samples, dtype=np.float64)
    if samples.ndim != 1 or samples.size == 0 or not np.isfinite(samples).all():
        raise ValueError(f"percentiles need a non-empty vector of finite samples, not one of shape {samples.shape}")
    return tuple(float(value) for value in np.percentile(samples, levels))


def bootstrap_ratio(
    baseline: np.ndarray, candidate: np.ndarray, *, resamples: int = 2000, level: float = 0.95, rng: np.random.Generator
) -> tuple[float, float]:
    """Percentile bootstrap interval of `median(baseline) / median(candidate)` (Efron & Tibshirani 1993, chapter 13).

    Whole rounds are drawn: what slows the machine down for a while slows both of a round, and the pairs keep that.

    Args:
        baseline: Time of the baseline in each round, `[R]`.
        candidate: Time of the candidate in the same rounds, `[R]`.
        resamples: Number of bootstrap samples.
        level: Coverage of the interval, between 0 and 1.
        rng: Source of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: The two differ in length, are empty, or hold a time that is not positive and finite.
    """
    rounds = np.stack([_times(baseline, "baseline"), _times(candidate, "candidate")])
    _check_level(level)
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, it is {resamples}")
    count = rounds.shape[1]
    block = max(1, _BLOCK_ELEMENTS // count)
    ratios = np.empty(resamples)
    for start in range(0, resamples, block):
        stop = min(start + block, resamples)
        drawn = rng.integers(0, count, size=(stop - start, count))
        medians = np.median(rounds[:, drawn], axis=2)
        ratios[start:stop] = medians[0] / medians[1]
    low, high = np.quantile(ratios, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def paired_difference(correct_a: np.ndarray, correct_b: np.ndarray, level: float = 0.95) -> tuple[float, float, float]:
    """Accuracy of `b` minus accuracy of `a` on the same samples, with its interval from `paired_interval`.

    Args:
        correct_a: Whether `a` is right on each sample, `[S]` of bool.
        correct_b: The same of `b`, in the same order.
        level: Coverage of the interval, between 0 and 1.

    Returns:
        The observed difference, and the lower and upper end.

    Raises:
        DataError: There are no samples, or another number of them in `a` than in `b`.
    """
    correct_a, correct_b = np.asarray(correct_a), np.asarray(correct_b)
    if correct_a.ndim != 1 or correct_a.shape != correct_b.shape or correct_a.size == 0:
        raise DataError(
            f"paired results must be two vectors of the same samples, they have shapes {list(correct_a.shape)} and {list(correct_b.shape)}",
            fix="evaluate both models on the same labelled samples, at least one",
        )
    if correct_a.dtype != np.bool_ or correct_b.dtype != np.bool_:
        raise DataError(
            f"paired results must be boolean, they are {correct_a.dtype} and {correct_b.dtype}",
            fix="pass whether each prediction is right, not the prediction",
        )
    only_a = int(np.count_nonzero(correct_a & ~correct_b))
    only_b = int(np.count_nonzero(correct_b & ~correct_a))
    low, high = paired_interval(only_a, only_b, correct_a.size, level)
    return (only_b - only_a) / correct_a.size, float(low), float(high)


def paired_interval(only_a: Any, only_b: Any, samples: Any, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Adjusted Wald interval of a difference of matched proportions (Agresti & Min 2005, Statistics in Medicine 24:729-740).

    One half is added to each of the four cells of the table of matched pairs. So the interval has a width where the
    plain Wald interval has none: where the two models are right on exactly the same samples. Coverage is near the level
    on average, but not everywhere: a 95 % interval covers as rarely as 86 % of the time where one model never errs alone
    and the expected number of the other's lone errors is about two. All arguments broadcast.

    Args:
        only_a: Number of samples on which only `a` is right.
        only_b: Number of samples on which only `b` is right.
        samples: Number of all samples.
        level: Coverage of the interval, between 0 and 1.

    Returns:
        Lower and upper ends, within [-1, 1].
    """
    _check_level(level)
    b, c, n = (np.asarray(count, dtype=np.float64) for count in (only_a, only_b, samples))
    if np.any(b < 0) or np.any(c < 0) or np.any(n < 1) or np.any(b + c > n):
        raise ValueError("counts of discordant pairs must not be negative or exceed the number of samples, at least one")
    b, c, n = b + 0.5, c + 0.5, n + 2.0
    center = (c - b) / n
    half = NormalDist().inv_cdf((1.0 + level) / 2.0) * np.sqrt(b + c - (c - b) ** 2 / n) / n
    return np.clip(center - half, -1.0, 1.0), np.clip(center + half, -1.0, 1.0)


def _times(values: np.ndarray, name: str) -> np.ndarray:
    times = np.asarray(values, dtype=np.float64)
    if times.ndim != 1 or times.size == 0 or not np.isfinite(times).all() or (times <= 0).any():
        raise ValueError(f"the times of the {name} must be a non-empty vector of positive finite numbers")
    return times


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"a level of coverage lies between 0 and 1, it is {level}")
