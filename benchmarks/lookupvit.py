"""The speed of LookupViT-S with 25 compressed tokens beside ViT-S.

    python -m benchmarks.lookupvit [--seconds 30]

Both at 224 pixels and batch 1, after the default passes, timed in turn in one process on two threads, on OpenVINO and ONNX Runtime. Printed
is the time of LookupViT over that of ViT with its 95 % interval; the goal is 0.6.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

import edgekit
from edgekit.compiler import Timing
from edgekit.models.lookupvit_reference import build
from edgekit.models.vit import VisionTransformer
from edgekit.profile.measure import time_in_turn
from edgekit.profile.statistics import bootstrap_ratio

GOAL = 0.6
TARGETS = ("openvino", "onnxruntime")


def main() -> int:
    """Prints the ratios; the exit status is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    torch.manual_seed(0)
    vit = VisionTransformer(side=224, patch=16, channels=3, dim=384, depth=12, heads=6, mlp_ratio=4, classes=1000).eval()
    example = torch.zeros(1, 3, 224, 224)
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        for target in TARGETS:
            made = {
                name: edgekit.compile(module, example, target=target, out=Path(folder) / f"{name}-{target}", threads=2, timing=Timing(0))
                for name, module in (("vit", vit), ("lookupvit", build(25)))
            }
            feed = {"x": np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)}
            runs = {name: partial(artifact.run, feed) for name, artifact in made.items()}
            times = time_in_turn(runs, budget_s=options.seconds, max_runs=2000, rng=np.random.default_rng(0))
            ratio = float(np.median(times["lookupvit"]) / np.median(times["vit"]))
            low, high = bootstrap_ratio(times["lookupvit"], times["vit"], rng=np.random.default_rng(0))
            missed += ratio > GOAL
            medians = ", ".join(f"{name} {np.median(spent):.1f} ms" for name, spent in times.items())
            print(f"{target}: {medians}: {ratio:.3f} of the time, 95 % interval [{low:.3f}, {high:.3f}] (goal {GOAL})", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
