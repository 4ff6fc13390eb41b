"""Latency of lowered models on this machine."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekit import native
from edgekit.evaluate import in_worker
from edgekit.isolation import Worker
from edgekit.machine import processor
from edgekit.native import Timed
from edgekit.profile.measure import summarize


def latency(worker: Worker, timed: dict[str, Timed], threads: int, budget_s: float, max_runs: int, seed: int) -> dict[str, Any]:
    """Times the lowered model `timed["result"]`, in turn with `timed["baseline"]` if there is one.

    Args:
        worker: The process to run in.
        timed: What is timed.
        threads: Threads to run on.
        budget_s: Seconds to measure for.
        max_runs: Runs at most of each.
        seed: Seed of the order of runs and of the bootstrap.

    Returns:
        The dictionary `latency` of report.json.
    """
    times = in_worker(worker, "latency", native.time_lowered, timed, threads, budget_s, max_runs, seed)
    return summarize(
        times["result"], times.get("baseline"), device=f"host ({processor()})", threads=threads, rng=np.random.default_rng(seed)
    ).to_dict()
