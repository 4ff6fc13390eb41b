"""Percentiles and intervals against scipy, exact enumeration and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import DataError
from edgekit.profile import statistics as subject
from edgekit.profile.statistics import bootstrap_ratio, paired_difference, paired_interval, percentiles


def test_percentiles_are_scipys():
    samples = np.random.default_rng(0).lognormal(size=57)
    expected = scipy.stats.mstats.mquantiles(samples, [0.5, 0.9, 0.99], alphap=1, betap=1)
    np.testing.assert_allclose(percentiles(samples), expected, rtol=1e-12)


def test_percentiles_by_hand():
    assert percentiles(np.array([1.0, 2.0, 3.0, 4.0, 5.0]), (0, 50, 90, 100)) == pytest.approx((1.0, 3.0, 4.6, 5.0))


@pytest.mark.parametrize("samples", [[], [1.0, np.nan], [1.0, np.inf], [[1.0]]])
def test_percentiles_refuse_what_they_cannot_order(samples):
    with pytest.raises(ValueError, match="finite samples"):
        percentiles(np.array(samples))


def rounds_with_common_drift(rng: np.random.Generator, count: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Times of two candidates that the same slow-downs of the machine fall on."""
    drift = rng.lognormal(0.0, 0.5, count)
    return ratio * drift * rng.lognormal(0.0, 0.02, count), drift * rng.lognormal(0.0, 0.02, count)


def test_bootstrap_is_scipys_paired_percentile_bootstrap():
    baseline, candidate = rounds_with_common_drift(np.random.default_rng(1), 60, 1.5)
    expected = scipy.stats.bootstrap(
        (baseline, candidate),
        lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    low, high = bootstrap_ratio(baseline, candidate, resamples=9999, rng=np.random.default_rng(3))
    assert (low, high) == pytest.approx((expected.low, expected.high), rel=0.01)


def test_bootstrap_covers_the_true_ratio():
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        baseline, candidate = rounds_with_common_drift(rng, 40, 1.3)
        low, high = bootstrap_ratio(baseline, candidate, resamples=300, rng=rng)
        covered += low <= 1.3 <= high
    assert 0.90 <= covered / 200 <= 1.0


def test_bootstrap_keeps_the_pairs():
    """Drawn apart, rounds of the common drift give an interval many times as wide."""
    rng = np.random.default_rng(5)
    baseline, candidate = rounds_with_common_drift(rng, 100, 1.0)
    low, high = bootstrap_ratio(baseline, candidate, rng=rng)
    low_apart, high_apart = bootstrap_ratio(baseline, rng.permutation(candidate), rng=rng)
    assert high - low < 0.5 * (high_apart - low_apart)


def test_bootstrap_of_identical_times_is_one():
    times = np.random.default_rng(6).lognormal(size=30)
    assert bootstrap_ratio(times, times, rng=np.random.default_rng(0)) == (1.0, 1.0)


def test_bootstrap_in_blocks_is_the_same(monkeypatch):
    baseline, candidate = rounds_with_common_drift(np.random.default_rng(7), 50, 2.0)
    whole = bootstrap_ratio(baseline, candidate, resamples=100, rng=np.random.default_rng(8))
    monkeypatch.setattr(subject, "_BLOCK_ELEMENTS", 350)
    assert bootstrap_ratio(baseline, candidate, resamples=100, rng=np.random.default_rng(8)) == whole


def test_a_higher_level_gives_a_wider_interval():
    baseline, candidate = rounds_with_common_drift(np.random.default_rng(9), 50, 2.0)
    low, high = bootstrap_ratio(baseline, candidate, level=0.5, rng=np.random.default_rng(0))
    wide_low, wide_high = bootstrap_ratio(baseline, candidate, level=0.99, rng=np.random.default_rng(0))
    assert wide_low < low < high < wide_high


@pytest.mark.parametrize(
    ("baseline", "candidate"), [([1.0], [1.0, 2.0]), ([], []), ([1.0], [0.0]), ([1.0, np.nan], [1.0, 1.0]), ([-1.0], [1.0])]
)
def test_bootstrap_refuses_what_has_no_ratio(baseline, candidate):
    with pytest.raises(ValueError):
        bootstrap_ratio(np.array(baseline), np.array(candidate), rng=np.random.default_rng(0))


def pairs(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    counts = [both, only_a, only_b, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def wald_of_augmented_table(only_a: int, only_b: int, samples: int, level: float) -> tuple[float, float]:
    """The plain Wald interval of differences in {-1, 0, 1} weighted by the augmented cells (both concordant cells are 0)."""
    values = np.array([-1.0, 1.0, 0.0])
    weights = np.array([only_a + 0.5, only_b + 0.5, samples - only_a - only_b + 1.0])
    mean = np.average(values, weights=weights)
    variance = np.average((values - mean) ** 2, weights=weights)
    return scipy.stats.norm.interval(level, loc=mean, scale=np.sqrt(variance / weights.sum()))


@pytest.mark.parametrize("cells", [(53, 16, 8, 9), (580, 5, 2, 10), (10, 0, 0, 2), (0, 1, 0, 0)])
@pytest.mark.parametrize("level", [0.9, 0.95, 0.99])
def test_paired_difference_is_wald_on_the_augmented_table(cells, level):
    difference, low, high = paired_difference(*pairs(*cells), level=level)
    _, only_a, only_b, _ = cells
    assert difference == pytest.approx((only_b - only_a) / sum(cells))
    expected = np.clip(wald_of_augmented_table(only_a, only_b, sum(cells), level), -1, 1)
    assert (low, high) == pytest.approx(tuple(expected), abs=1e-12)


def test_paired_difference_by_hand():
    # 86 patients, 16 better on a only, 8 on b only: center -8/88, half width 1.95996 sqrt(25 - 64/88)/88.
    difference, low, high = paired_difference(*pairs(53, 16, 8, 9))
    assert difference == pytest.approx(-8 / 86)
    assert (low, high) == pytest.approx((-0.200639, 0.018821), abs=1e-6)


def test_no_discordant_pair_still_has_a_width():
    correct = np.ones(597, dtype=bool)
    difference, low, high = paired_difference(correct, correct)
    assert difference == 0.0
    assert (low, high) == pytest.approx((-1.959964 / 599, 1.959964 / 599), rel=1e-6)


def exact_coverage(samples: int, p_a: float, p_b: float) -> float:
    """Probability that the interval holds `p_b - p_a`, summed over every possible pair of discordant counts."""
    only_a, only_b = np.mgrid[: samples + 1, : samples + 1].reshape(2, -1)
    possible = only_a + only_b <= samples
    only_a, only_b = only_a[possible], only_b[possible]
    counts = np.stack([only_a, only_b, samples - only_a - only_b], axis=-1)
    probability = scipy.stats.multinomial.pmf(counts, samples, [p_a, p_b, 1 - p_a - p_b])
    low, high = paired_interval(only_a, only_b, samples)
    return float(probability[(low <= p_b - p_a) & (p_b - p_a <= high)].sum())


@pytest.mark.parametrize(("p_a", "p_b"), [(0.01, 0.01), (0.05, 0.02), (0.1, 0.2), (0.3, 0.3)])
@pytest.mark.parametrize("samples", [30, 100])
def test_exact_coverage_for_few_samples(samples, p_a, p_b):
    assert exact_coverage(samples, p_a, p_b) >= 0.93


def test_coverage_where_only_one_model_ever_errs_alone():
    """The interval's weak side, which its docstring tells: no discordant pair is seen though they exist."""
    coverage = [exact_coverage(100, p_a, 0.0) for p_a in (*np.linspace(0.002, 0.2, 40), 0.0193)]
    assert 0.85 <= min(coverage) < 0.87
    assert np.mean(coverage) >= 0.94


@pytest.mark.parametrize(("p_a", "p_b"), [(0.003, 0.003), (0.01, 0.005), (0.03, 0.03)])
def test_coverage_by_simulation_on_597_samples(p_a, p_b):
    counts = np.random.default_rng(10).multinomial(597, [p_a, p_b, 1 - p_a - p_b], size=20000)
    low, high = paired_interval(counts[:, 0], counts[:, 1], 597)
    covered = np.mean((low <= p_b - p_a) & (p_b - p_a <= high))
    assert 0.94 <= covered <= 0.99


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_swapping_the_models_mirrors_the_interval(results):
    correct_a, correct_b = np.array(results, dtype=bool).T
    difference, low, high = paired_difference(correct_a, correct_b)
    assert paired_difference(correct_b, correct_a) == pytest.approx((-difference, -high, -low))
    assert -1 <= low < high <= 1
    assert low <= difference <= high
    assert difference == pytest.approx(correct_b.mean() - correct_a.mean())


@pytest.mark.parametrize(
    ("correct_a", "correct_b"),
    [(np.ones(3, bool), np.ones(4, bool)), (np.ones(0, bool), np.ones(0, bool)), (np.ones((2, 2), bool), np.ones((2, 2), bool))],
)
def test_paired_difference_needs_the_same_samples(correct_a, correct_b):
    with pytest.raises(DataError, match="same samples"):
        paired_difference(correct_a, correct_b)


def test_paired_difference_refuses_predictions_in_place_of_correctness():
    with pytest.raises(DataError, match="boolean"):
        paired_difference(np.array([3, 1]), np.array([3, 2]))


@pytest.mark.parametrize(("only_a", "only_b", "samples"), [(-1, 0, 5), (3, 3, 5), (0, 0, 0)])
def test_paired_interval_refuses_impossible_counts(only_a, only_b, samples):
    with pytest.raises(ValueError, match="discordant"):
        paired_interval(only_a, only_b, samples)


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_level_is_a_share(level):
    with pytest.raises(ValueError, match="level"):
        paired_interval(1, 1, 5, level)
