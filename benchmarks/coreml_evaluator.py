"""How fast the evaluator of ML Programs is, against PyTorch itself on the same network.

    python -m benchmarks.coreml_evaluator [--runs 20] [--threads 1]

A ViT of DeiT-tiny's size with random weights is compiled for target `coreml` in float32. One image is then run through the package in the
evaluator and through the module in eager mode, in turn, on the same threads. The goal is at most three times PyTorch's time: a check of
many images against the original should not take much longer than the original. The float16 package, whose every result is rounded, is
printed beside it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.coreml_networks import canonical, package
from benchmarks.models import deit_tiny_like
from edgekit.graph.files import save_model
from edgekit.profile.statistics import bootstrap_ratio
from edgekit.targets.coreml.executable import load_package

GOAL = 3.0


def seconds(function: Callable[[], Any]) -> float:
    """Time of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def main() -> int:
    """Prints the ratios; the exit status is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = deit_tiny_like()
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    ways: dict[str, Callable[[], Any]] = {"PyTorch": torch.no_grad()(lambda: module(image))}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, _ = canonical(module, image, "vit", ("torchscript",))
        save_model(model, folder / "vit.onnx")
        for precision, half in (("float32", False), ("float16", True)):
            path = folder / f"{precision}.mlpackage"
            package(ir.load(folder / "vit.onnx"), half, path)
            loaded = load_package(path, options.threads)
            ways[precision] = partial(loaded.run, {loaded.inputs[0]: image.numpy()})
    times: dict[str, list[float]] = {name: [] for name in ways}
    for index in range(options.runs + 2):
        for name, way in ways.items():
            spent = seconds(way)
            if index >= 2:  # the first runs make caches
                times[name].append(spent)
    baseline = np.array(times["PyTorch"])
    print(f"PyTorch: median {1000 * np.median(baseline):.1f} ms of {len(baseline)} on {options.threads} threads")
    ratios = {}
    for name in ("float32", "float16"):
        candidate = np.array(times[name])
        ratios[name] = float(np.median(candidate) / np.median(baseline))
        low, high = bootstrap_ratio(candidate, baseline, rng=np.random.default_rng(0))
        goal = f" (goal {GOAL})" if name == "float32" else ""
        print(f"evaluator, {name}: {1000 * np.median(candidate):.1f} ms, {ratios[name]:.2f}x, 95 % interval [{low:.2f}, {high:.2f}]{goal}")
    return int(ratios["float32"] > GOAL)


if __name__ == "__main__":
    sys.exit(main())
