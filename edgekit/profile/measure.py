"""Timing of several candidates in turn, so that whatever else the machine does falls on all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgekit.errors import DeviceError, UsageError
from edgekit.profile.statistics import bootstrap_ratio, percentiles

Clock = Callable[[], int]
"""A clock that never goes back, in nanoseconds."""

MIN_RUNS = 20
"""Runs of each candidate that are made even over the budget."""
MIN_RUNS_SLOW = 5
"""Runs that are made of a candidate so slow that `MIN_RUNS` would take `OVERRUN` times the budget."""
OVERRUN = 4.0
"""The measurement stops at this multiple of the budget, once there are `MIN_RUNS_SLOW` runs."""
WARMUP_SHARE = 0.2
"""Warm-up ends at the latest after this share of the budget."""
MAX_WARMUP = 50
"""Warm-up ends at the latest after this many rounds."""
_WINDOW = 3
_STABLE = 0.05


@dataclass(frozen=True)
class Latency:
    """The latency of a model, beside that of its baseline. All times are in milliseconds per run.

    Attributes:
        device: What it ran on.
        threads: Threads that it ran on.
        runs: Number of timed runs of each of the two.
        median_ms: Half of the runs took no longer.
        p90_ms: Nine in ten runs took no longer.
        p99_ms: Ninety-nine in a hundred runs took no longer; under 100 runs it lies between the two slowest.
        min_ms: The fastest run.
        baseline_median_ms: The baseline's median; this and the rest is None where there is no baseline.
        baseline_p90_ms: The baseline's 90th percentile.
        baseline_p99_ms: The baseline's 99th percentile.
        speedup: The baseline's median over the model's: above 1 the model is faster.
        speedup_ci95: 95 % bootstrap interval of the speedup.
    """

    device: str
    threads: int
    runs: int
    median_ms: float
    p90_ms: float
    p99_ms: float
    min_ms: float
    baseline_median_ms: float | None = None
    baseline_p90_ms: float | None = None
    baseline_p99_ms: float | None = None
    speedup: float | None = None
    speedup_ci95: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them; the interval is a list."""
        fields = asdict(self)
        if self.speedup_ci95 is not None:
            fields["speedup_ci95"] = list(self.speedup_ci95)
        return fields


def summarize(times: np.ndarray, baseline: np.ndarray | None, *, device: str, threads: int, rng: np.random.Generator) -> Latency:
    """Makes the summary of what `time_in_turn` measured.

    Args:
        times: The model's milliseconds in each round, `[R]`.
        baseline: The baseline's in the same rounds, `[R]`, or None.
        device: What they ran on.
        threads: Threads that they ran on.
        rng: Source of the bootstrap's draws.
    """
    median, p90, p99 = percentiles(times)
    own = (device, threads, len(times), median, p90, p99, float(np.min(times)))
    if baseline is None:
        return Latency(*own)
    base_median, base_p90, base_p99 = percentiles(baseline)
    interval = bootstrap_ratio(baseline, times, rng=rng)
    return Latency(*own, base_median, base_p90, base_p99, base_median / median, interval)


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    *,
    budget_s: float,
    max_runs: int,
    max_warmup: int = MAX_WARMUP,
    clock: Clock = time.perf_counter_ns,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Times every candidate once a round, in an order that changes from round to round.

    An order is drawn for one round and reversed in the next, so that each candidate follows each other equally often.
    Rounds are made until the budget is spent or there are `max_runs`; there are at least `MIN_RUNS` of them even
    over the budget, or `MIN_RUNS_SLOW` where that many would take `OVERRUN` times as long. Garbage is
    collected between runs only, and results are freed outside of the timed region.

    Args:
        candidates: What to time, by name; each is called without arguments.
        budget_s: Seconds to measure for, all candidates together, after the warm-up.
        max_runs: Runs at most of each; below `MIN_RUNS_SLOW` it overrides that minimum.
        max_warmup: Rounds at most before anything is kept. The warm-up ends sooner where every candidate's median of
            the last three rounds is within 5 % of that of the three before, or a fifth of the budget is spent.
        clock: Nanoseconds.
        rng: Source of the orders.

    Returns:
        Milliseconds per run, `[R]`, by name. Position `r` of all belongs to the same round.

    Raises:
        UsageError: There is nothing to time, or a limit is not positive.
        DeviceError: The clock did not advance during a run.
    """
    if not candidates or not budget_s > 0 or max_runs < 1 or max_warmup < 1:
        raise UsageError(
            f"nothing can be timed with {len(candidates)} candidates, {budget_s} s, {max_runs} runs and {max_warmup} rounds of warm-up",
            fix="give at least one candidate, more than 0 seconds, one run and one round of warm-up",
        )
    orders = _orders(list(candidates), rng)
    _warm_up(candidates, orders, budget_s * WARMUP_SHARE, max_warmup, clock)
    rounds: list[dict[str, int]] = []
    start = clock()
    while _goes_on(len(rounds), (clock() - start) / 1e9, budget_s, max_runs):
        rounds.append(_round(candidates, next(orders), clock))
    times = {name: np.array([entry[name] for entry in rounds], dtype=np.float64) / 1e6 for name in candidates}
    for name, values in times.items():
        if (values <= 0).any():
            raise DeviceError(
                f"the clock did not advance during a run of '{name}'", fix="measure a larger input, or on a system with a finer clock"
            )
    return times


def _goes_on(rounds: int, elapsed_s: float, budget_s: float, max_runs: int) -> bool:
    if rounds >= max_runs:
        return False
    if rounds < MIN_RUNS_SLOW:
        return True
    if rounds < MIN_RUNS:
        return elapsed_s < OVERRUN * budget_s
    return elapsed_s < budget_s


def _orders(names: list[str], rng: np.random.Generator) -> Iterator[list[str]]:
    while True:
        order = [names[index] for index in rng.permutation(len(names))]
        yield order
        yield order[::-1]


def _warm_up(
    candidates: Mapping[str, Callable[[], object]], orders: Iterator[list[str]], budget_s: float, max_rounds: int, clock: Clock
) -> None:
    history: dict[str, list[int]] = {name: [] for name in candidates}
    start = clock()
    for _ in range(max_rounds):
        for name, elapsed in _round(candidates, next(orders), clock).items():
            history[name].append(elapsed)
        if clock() - start >= budget_s * 1e9 or all(_is_stable(values) for values in history.values()):
            return


def _is_stable(values: list[int]) -> bool:
    if len(values) < 2 * _WINDOW:
        return False
    earlier, later = np.median(values[-2 * _WINDOW : -_WINDOW]), np.median(values[-_WINDOW:])
    return bool(abs(later - earlier) <= _STABLE * earlier)


def _round(candidates: Mapping[str, Callable[[], object]], order: list[str], clock: Clock) -> dict[str, int]:
    return {name: _run(candidates[name], clock) for name in order}


def _run(candidate: Callable[[], object], clock: Clock) -> int:
    """Nanoseconds of one call."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        result = candidate()
        elapsed = clock() - start
    finally:
        if collecting:
            gc.enable()
    del result  # after the clock: freeing large outputs is not the model's latency
    return elapsed
