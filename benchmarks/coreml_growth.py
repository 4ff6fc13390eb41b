"""How the time of converting a network for target `coreml` grows with its depth.

    python -m benchmarks.coreml_growth [--runs 5]

A ViT of 12 blocks and one of 48, with random weights, are traced (by TorchScript, the faster way) and canonicalized once. Legalizing the
graph, writing it as an ML Program in float16 and saving the package is then timed for each in turn. Four times the blocks should take four
times as long: the goal is 4.4. Anything that looks through the whole graph for every node would show here.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.coreml_networks import canonical, package
from benchmarks.models import Vit
from edgekit.graph.files import save_model
from edgekit.profile.statistics import bootstrap_ratio

GOAL = 4.4
SHALLOW, DEEP = 12, 48


def convert_seconds(file: Path, folder: Path) -> float:
    """Processor time, which other programs disturb less, from a canonical graph to a saved package; reading the graph is left out."""
    model = ir.load(file)
    begun = time.process_time()
    package(model, True, folder / f"{file.stem}.mlpackage")
    return time.process_time() - begun


def main() -> int:
    """Prints the times and their ratio; the exit status is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    times: dict[int, list[float]] = {SHALLOW: [], DEEP: []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for depth in times:
            torch.manual_seed(0)
            model, _ = canonical(Vit(depth).eval(), torch.zeros(1, 3, 224, 224), f"vit{depth}", ("torchscript",))
            save_model(model, folder / f"vit{depth}.onnx")
        convert_seconds(folder / f"vit{SHALLOW}.onnx", folder)  # pays for imports
        for _ in range(options.runs):
            for depth, spent in times.items():
                spent.append(convert_seconds(folder / f"vit{depth}.onnx", folder))
    shallow, deep = np.array(times[SHALLOW]), np.array(times[DEEP])
    ratio = float(np.median(deep) / np.median(shallow))
    low, high = bootstrap_ratio(deep, shallow, rng=np.random.default_rng(0))
    for depth, spent in times.items():
        print(f"{depth} blocks: median {np.median(spent):.2f} s, from {min(spent):.2f} to {max(spent):.2f} s of {len(spent)}")
    print(f"{DEEP // SHALLOW} times the blocks take {ratio:.2f}x as long, 95 % interval [{low:.2f}, {high:.2f}] (goal {GOAL})")
    return int(ratio > GOAL)


if __name__ == "__main__":
    sys.exit(main())
