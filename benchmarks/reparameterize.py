"""Unmerged networks against merged ones, timed in turn in one run; and how the time of the pass grows with the graph.

    python -m benchmarks.reparameterize [NAME ...] [--seconds S] [--targets openvino onnxruntime]
    python -m benchmarks.reparameterize --growth

The networks are timm's in their training form with random weights, their batch norms set from noise. The unmerged side is what the exporter
gives by default, for the same target. Where the interval of the ratio contains 1 the table says that there is no gain. `--growth` times the
pass alone on ViTs of depth 12, 24, 48 and 96 and prints the slope of log time over log depth (1: linear).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.models import Vit
from edgekit.compiler import Timing, compile
from edgekit.contracts import Context
from edgekit.errors import EdgekitError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.reparameterize import Reparameterize
from edgekit.source import Source
from edgekit.trace import trace
from tests.timm_support import create_timm

NETWORKS = (
    *("mobileone_s0", "mobileone_s1", "mobileone_s2", "mobileone_s3", "mobileone_s4"),
    *("repvgg_a0", "repvgg_b0", "fastvit_t8", "fastvit_sa12", "repvit_m1"),
    *("deit_tiny_patch16_224", "deit_small_patch16_224", "crossvit_15_240"),
)

DEPTHS = (12, 24, 48, 96)


def settle(module: torch.nn.Module, example: torch.Tensor) -> None:
    """Sets the statistics of the batch norms from noise: untrained ones let activations grow from block to block."""
    norms = [part for part in module.modules() if isinstance(part, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    with torch.no_grad():
        module(torch.randn(4, *example.shape[1:], generator=torch.Generator().manual_seed(0)))
    module.eval()


def ratios(names: list[str], targets: list[str], seconds: float) -> None:
    """Prints, for each network and target, what the pass did and the ratio of latencies."""
    print(f"{'network':28}{'target':13}{'parameters':>24}{'MACs':>24}{'nodes':>6}  speed, 95 % interval")
    for name in names:
        module, example = create_timm(name)
        settle(module, example)
        for target in targets:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "a"
                try:
                    report = compile(
                        module, example, target=target, passes=["reparameterize"], calibration=1, timing=Timing(seconds), out=out
                    ).report
                except EdgekitError as error:
                    print(f"{name:28}{target:13}failed: {error.what}", flush=True)
                    continue
            row, latency = report["passes"][0], report["latency"]
            low, high = latency["speedup_ci95"]
            verdict = f"{latency['speedup']:.2f}x [{low:.2f}, {high:.2f}]" + ("  no gain within noise" if low <= 1 <= high else "")
            parameters = f"{report['model']['parameters']:,} > {row['parameters']:,}"
            macs = f"{report['model']['macs'] / 1e9:.3f} > {row['macs'] / 1e9:.3f} G"
            print(f"{name:28}{target:13}{parameters:>24}{macs:>24}{row['rewrites']:>6}  {verdict}", flush=True)


def growth(runs: int) -> None:
    """Prints the time of the pass by depth, and the slope of its logarithm."""
    seconds = []
    for depth in DEPTHS:
        torch.manual_seed(0)
        module = Vit(depth=depth, width=64, heads=1, classes=10).eval()
        graph = trace(Source("vit", module=module, example_inputs=(torch.zeros(1, 3, 224, 224),)), "dynamo").model
        infer_shapes(graph)
        graph = canonicalize(to_opset(graph))
        infer_shapes(graph)
        times = []
        for _ in range(runs):
            model = graph.clone()
            start = time.perf_counter()
            Reparameterize().apply(model, Context())
            times.append(time.perf_counter() - start)
        seconds.append(float(np.median(times)))
        print(f"depth {depth:3}: {len(graph.graph):5} nodes, {seconds[-1]:.3f} s, median of {runs}", flush=True)
    print(f"slope of log time over log depth: {np.polyfit(np.log(DEPTHS), np.log(seconds), 1)[0]:.2f}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--targets", nargs="+", default=["openvino", "onnxruntime"])
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    if options.growth:
        growth(options.runs)
    else:
        ratios(options.names, options.targets, options.seconds)


if __name__ == "__main__":
    main()
