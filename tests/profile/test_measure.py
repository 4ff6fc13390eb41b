"""Timing in turn, on a clock that only moves when the test says so."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable

import numpy as np
import pytest

from edgekit.errors import DeviceError, UsageError
from edgekit.profile.measure import MAX_WARMUP, MIN_RUNS, MIN_RUNS_SLOW, Latency, summarize, time_in_turn


class FakeClock:
    """Nanoseconds that pass only in the candidates; remembers who ran."""

    def __init__(self) -> None:
        self.now = 0
        self.calls: list[str] = []

    def __call__(self) -> int:
        return self.now

    def candidate(self, name: str, *milliseconds: float) -> Callable[[], None]:
        """Takes the given times one call after the other, the last one from then on."""
        durations = list(milliseconds)

        def run() -> None:
            self.calls.append(name)
            self.now += round(1e6 * (durations.pop(0) if len(durations) > 1 else durations[0]))

        return run


def measure(clock: FakeClock, candidates: dict[str, Callable[[], object]], budget_s: float = 1.0, max_runs: int = 100, **options):
    return time_in_turn(
        candidates, budget_s=budget_s, max_runs=max_runs, clock=clock, rng=np.random.default_rng(options.pop("seed", 0)), **options
    )


def test_milliseconds_of_each_candidate():
    clock = FakeClock()
    times = measure(clock, {"a": clock.candidate("a", 2.0), "b": clock.candidate("b", 0.5)})
    assert set(times) == {"a", "b"}
    np.testing.assert_array_equal(times["a"], np.full(100, 2.0))
    np.testing.assert_array_equal(times["b"], np.full(100, 0.5))


def test_each_round_runs_every_candidate_once_and_is_reversed_in_the_next():
    clock = FakeClock()
    measure(clock, {name: clock.candidate(name, 1.0) for name in "abc"}, max_runs=40)
    rounds = ["".join(clock.calls[start : start + 3]) for start in range(0, len(clock.calls), 3)]
    assert all(sorted(order) == list("abc") for order in rounds)
    assert all(second == first[::-1] for first, second in zip(rounds[::2], rounds[1::2], strict=False))
    assert len(set(rounds)) == 6


def test_the_seed_decides_the_order():
    def order(seed: int) -> list[str]:
        clock = FakeClock()
        measure(clock, {name: clock.candidate(name, 1.0) for name in "abcd"}, seed=seed)
        return clock.calls

    assert order(3) == order(3)
    assert order(3) != order(4)


def test_a_slow_down_of_the_machine_falls_on_the_same_round():
    clock = FakeClock()
    rounds = {"count": 0}

    def run() -> None:
        rounds["count"] += 1
        clock.now += 1_000_000 * (1 + rounds["count"] // 60)

    times = measure(clock, {"a": run, "b": run})
    assert len(set(times["a"])) > 1
    assert np.mean(times["a"] == times["b"]) > 0.9


def test_warm_up_runs_are_not_kept():
    clock = FakeClock()
    times = measure(clock, {"a": clock.candidate("a", 90, 60, 30, 10, 5, 1.0)}, budget_s=10.0)
    assert (times["a"] == 1.0).all()
    assert len(times["a"]) == 100


def test_warm_up_ends_as_soon_as_it_is_stable():
    clock = FakeClock()
    times = measure(clock, {"a": clock.candidate("a", 1.0)})
    assert len(clock.calls) - len(times["a"]) == 6


def test_warm_up_waits_for_all_candidates():
    clock = FakeClock()
    slow_start = [float(ms) for ms in range(40, 20, -1)]
    times = measure(clock, {"a": clock.candidate("a", 1.0), "b": clock.candidate("b", *slow_start, 20.0)}, budget_s=100.0)
    assert times["b"].max() < 40.0 / 1.05**6
    assert (times["b"] == 20.0).sum() >= 80


def test_warm_up_is_bounded_in_rounds():
    clock = FakeClock()
    growing = clock.candidate("a", *(1.1**step for step in range(200)))
    times = measure(clock, {"a": growing}, budget_s=1e9, max_runs=10)
    assert len(clock.calls) - len(times["a"]) == MAX_WARMUP


def test_warm_up_is_bounded_in_time():
    clock = FakeClock()
    times = measure(clock, {"a": clock.candidate("a", 3000.0)}, budget_s=1.0)
    assert len(clock.calls) - len(times["a"]) == 1


@pytest.mark.parametrize(
    ("milliseconds", "runs"),
    [
        (1.0, 1000),  # 1 s within the budget: max_runs
        (4.0, 250),  # the budget
        (100.0, MIN_RUNS),  # 2 s for the least, twice the budget
        (300.0, 14),  # four times the budget, between the two least
        (5000.0, MIN_RUNS_SLOW),
    ],
)
def test_runs_within_the_budget(milliseconds, runs):
    clock = FakeClock()
    assert len(measure(clock, {"a": clock.candidate("a", milliseconds)}, budget_s=1.0, max_runs=1000)["a"]) == runs


def test_max_runs_overrides_the_least():
    clock = FakeClock()
    assert len(measure(clock, {"a": clock.candidate("a", 1.0)}, max_runs=3)["a"]) == 3


def test_garbage_is_not_collected_in_the_timed_region_and_the_collector_is_given_back():
    states = []
    clock = FakeClock()
    tick = clock.candidate("a", 1.0)

    def run() -> None:
        states.append(gc.isenabled())
        tick()

    assert gc.isenabled()
    measure(clock, {"a": run})
    assert not any(states)
    assert gc.isenabled()
    gc.disable()
    try:
        measure(clock, {"a": run})
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_collector_is_given_back_when_a_candidate_fails():
    def fail() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        measure(FakeClock(), {"a": fail})
    assert gc.isenabled()


def test_freeing_a_result_is_not_timed():
    clock = FakeClock()

    class Result:
        pass

    def free() -> None:
        clock.now += 500_000_000

    def run() -> Result:
        clock.now += 1_000_000
        result = Result()
        weakref.finalize(result, free)
        return result

    assert (measure(clock, {"a": run})["a"] == 1.0).all()


def test_a_clock_that_stands_still_is_an_error():
    with pytest.raises(DeviceError, match="'a'"):
        measure(FakeClock(), {"a": lambda: None})


@pytest.mark.parametrize("options", [{"budget_s": 0.0}, {"budget_s": float("nan")}, {"max_runs": 0}, {"max_warmup": 0}])
def test_limits_must_be_positive(options):
    with pytest.raises(UsageError):
        measure(FakeClock(), {"a": lambda: None}, **options)


def test_nothing_to_time():
    with pytest.raises(UsageError, match="0 candidates"):
        measure(FakeClock(), {})


def test_the_real_clock():
    times = time_in_turn({"a": lambda: sum(range(100))}, budget_s=0.01, max_runs=5, rng=np.random.default_rng(0))
    assert (times["a"] > 0).all()


def test_summary_against_numpy():
    rng = np.random.default_rng(1)
    times = rng.lognormal(0.0, 0.1, 200)
    baseline = 2.0 * times * rng.lognormal(0.0, 0.01, 200)
    latency = summarize(times, baseline, device="host", threads=2, rng=np.random.default_rng(2))
    assert (latency.device, latency.threads, latency.runs) == ("host", 2, 200)
    assert (latency.median_ms, latency.min_ms) == pytest.approx((np.median(times), times.min()))
    assert (latency.p90_ms, latency.p99_ms) == pytest.approx(tuple(np.percentile(times, [90, 99])))
    assert (latency.baseline_p90_ms, latency.baseline_p99_ms) == pytest.approx(tuple(np.percentile(baseline, [90, 99])))
    assert latency.baseline_median_ms == pytest.approx(np.median(baseline))
    assert latency.speedup == pytest.approx(np.median(baseline) / np.median(times))
    low, high = latency.speedup_ci95
    assert 1.9 < low < latency.speedup < high < 2.1


def test_summary_without_a_baseline():
    latency = summarize(np.array([3.0, 1.0, 2.0]), None, device="host", threads=1, rng=np.random.default_rng(0))
    assert (latency.median_ms, latency.min_ms, latency.runs) == (2.0, 1.0, 3)
    assert latency.speedup is latency.speedup_ci95 is latency.baseline_median_ms is None


def test_latency_as_json():
    latency = Latency("host", 1, 5, 1.0, 2.0, 3.0, 0.5, 2.0, 4.0, 6.0, 2.0, (1.5, 2.5))
    assert json.loads(json.dumps(latency.to_dict(), allow_nan=False)) == {
        "device": "host",
        "threads": 1,
        "runs": 5,
        "median_ms": 1.0,
        "p90_ms": 2.0,
        "p99_ms": 3.0,
        "min_ms": 0.5,
        "baseline_median_ms": 2.0,
        "baseline_p90_ms": 4.0,
        "baseline_p99_ms": 6.0,
        "speedup": 2.0,
        "speedup_ci95": [1.5, 2.5],
    }
