"""How long edgekit itself takes: canonical form, two passes, eight calibration inputs and parity on a ViT.

    python -m benchmarks.overhead [--runs 5]

The model is a 12-block ViT of 5.7 M parameters at 224 pixels with random weights. Imports, tracing, the target's compiler
and the timed runs of the result are not edgekit's and are left out (the stages `open`, `trace` and `lower to …`; and of `run artifact`
the loading, in which OpenVINO compiles for the processor: it is repeated and timed by itself): what is left is the sum of the stages
printed below. Goal: at most 1.5 s. The whole is repeated, and
set against one thing that any exporter user pays, `torch.onnx.export` of the same model, timed in the same runs.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.models import deit_tiny_like
from edgekit.compiler import Job, Timing, run_job
from edgekit.contracts import Target
from edgekit.isolation import Worker
from edgekit.machine import available_threads
from edgekit.profile.statistics import bootstrap_ratio
from edgekit.progress import Reporter
from edgekit.recipe import Recipe
from edgekit.targets.openvino import OpenVino

GOAL_S = 1.5
IMPORTED = ("onnxruntime", "openvino", "onnx_ir", "edgekit.native", "edgekit.profile.measure", "edgekit.targets.openvino")
NOT_OURS = ("open", "trace", "lower to")


def load_seconds(target: Target, folder: Path, threads: int) -> float:
    """Time of loading a lowered model, in which the target's runtime compiles it for this processor."""
    start = time.perf_counter()
    target.load(folder, threads)
    return time.perf_counter() - start


def main() -> int:
    """Prints the table; the exit status is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    module = deit_tiny_like()
    print(f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters, passes fold-batch-norm and merge-branches, 8 inputs")
    ours, traces, rows = [], [], {}
    with tempfile.TemporaryDirectory() as folder, Worker() as worker:
        for name in IMPORTED:
            worker.call(importlib.import_module, name)
        for index in range(options.runs + 1):
            reporter = Reporter()
            job = Job(
                Recipe("(in memory) vit", "openvino", passes=("fold-batch-norm", "merge-branches")),
                module=(module, torch.zeros(1, 3, 224, 224)),
                timing=Timing(0),
            )
            run_job(job, Path(folder) / str(index), reporter=reporter, worker=worker)
            if index == 0:
                continue  # the first run pays for imports and caches
            seconds = {stage.name: stage.seconds for stage in reporter.stages}
            mine = {name: spent for name, spent in seconds.items() if not name.startswith(NOT_OURS)}
            mine["run artifact"] -= worker.call(load_seconds, OpenVino(), Path(folder) / str(index), available_threads())
            for name, spent in mine.items():
                rows.setdefault(name, []).append(spent)
            ours.append(sum(mine.values()))
            traces.append(seconds["trace"])
    for name, times in rows.items():
        print(f"  {name:<24}{np.median(times):8.3f} s")
    ratio = float(np.median(traces) / np.median(ours))
    low, high = bootstrap_ratio(np.array(traces), np.array(ours), rng=np.random.default_rng(0))
    print(f"edgekit itself: median {np.median(ours):.2f} s, worst {max(ours):.2f} s of {len(ours)} (goal {GOAL_S} s)")
    print(f"tracing the model takes {ratio:.1f}x as long, 95 % interval [{low:.1f}, {high:.1f}]")
    return int(float(np.median(ours)) > GOAL_S)


if __name__ == "__main__":
    sys.exit(main())
