"""How much of a spoiled network `edgekit.recover` wins back.

    python -m benchmarks.recover [--minutes 0.5] [--samples 512]

A ViT of 4 blocks is trained for half a minute, then spoiled in three ways, and recovered from unlabelled images by each level alone and by
all of them. Printed is the share of 2,000 other images with the teacher's prediction. Goals, for all levels: 92 % for weights of 2 bits,
88 % for linear attention, 95 % for an MLP cut to a quarter.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import onnx_ir as ir

from benchmarks.recovery_toys import SPOILED, feeds, images, teacher
from edgekit.recover import Settings, recover
from edgekit.recover.network import Network, stack
from edgekit.recover.settings import LEVELS

_TESTED = 2000


def predictions(model: ir.Model) -> np.ndarray:
    """Classes of the test images."""
    network = Network(model)
    outputs, _ = network.run(stack(feeds(model, _TESTED, 99), network.input_names), chunk=250)
    return next(iter(outputs.values())).argmax(-1).numpy().ravel()


def main() -> int:
    """Prints the table; the exit status is 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=0.5)
    parser.add_argument("--samples", type=int, default=512)
    options = parser.parse_args()
    master = teacher()
    expected = predictions(master)
    print(f"teacher: {100 * np.mean(expected == images(_TESTED, 99)[1].numpy()):.1f} % of {_TESTED} test images", flush=True)
    data = feeds(master, options.samples, 5)
    missed = 0
    for name, (spoil, goal) in SPOILED.items():
        spoiled = master.clone()
        spoil(spoiled)
        row = [f"none {100 * np.mean(predictions(spoiled) == expected):.1f} %"]
        for level in (*LEVELS, "auto"):
            student = spoiled.clone()
            begun = time.perf_counter()
            recover(student, master, data, Settings(level=level, minutes=options.minutes))  # type: ignore[arg-type]
            share = float(np.mean(predictions(student) == expected))
            row.append(f"{level} {100 * share:.1f} % in {time.perf_counter() - begun:.0f} s")
        missed += share < goal
        print(f"{name}: {', '.join(row)} (goal {100 * goal:.0f} %)", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
