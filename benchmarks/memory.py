"""Peak memory of a compile on an ONNX file with 1 GB of weights.

    python -m benchmarks.memory [--gigabytes 1.0]

Makes a file of linear layers, its weights once in the file itself and once beside it (external data), compiles each to both
targets in a fresh process, and samples the proportional set size of that process and of all its children together. Prints
the peak as a ratio to the weights (goal: at most 3), and beside it the same for ONNX Runtime's own session on the same file.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

GOAL = 3.0
WIDTH = 4096
COMPILE = "import sys, edgekit; from edgekit.compiler import Timing; edgekit.compile(sys.argv[1], target=sys.argv[2], timing=Timing(0))"
SESSION = (
    "import sys, numpy, onnxruntime as ort; s = ort.InferenceSession(sys.argv[1]); "
    f"s.run(None, {{'x': numpy.ones((1, {WIDTH}), numpy.float32)}})"
)


def write_model(path: Path, layers: int, external: bool) -> int:
    """Writes a chain of linear layers `[1, WIDTH]` and returns the bytes of its weights."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    value = "x"
    for index in range(layers):
        weights.append(numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH), dtype=np.float32) / np.float32(WIDTH**0.5), f"w{index}"))
        nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [value := f"y{index}"]))
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, WIDTH]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "chain", info[:1], info[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.name}.data" if external else None)
    return layers * WIDTH * WIDTH * 4


def peak_bytes(command: list[str]) -> int:
    """Runs a command and returns the peak of the summed proportional set sizes of it and its children."""
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    peak = 0
    while process.poll() is None:
        total = 0
        for member in [root, *_children(root)]:
            try:
                total += member.memory_full_info().pss
            except psutil.Error:
                continue
        peak = max(peak, total)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return peak


def _children(root: psutil.Process) -> list[psutil.Process]:
    try:
        return root.children(recursive=True)
    except psutil.Error:
        return []


def main() -> int:
    """Prints the table; the exit status is 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    options = parser.parse_args()
    layers = max(1, round(options.gigabytes * 1e9 / (WIDTH * WIDTH * 4)))
    worst = 0.0
    for external in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chain.onnx"
            maker = [sys.executable, "-c", f"from benchmarks.memory import *; write_model(Path({str(path)!r}), {layers}, {external})"]
            subprocess.run(maker, check=True)
            weights = layers * WIDTH * WIDTH * 4
            kind = "external data" if external else "one file"
            print(f"{kind}, weights {weights / 1e9:.2f} GB:", flush=True)
            print(f"  {'ONNX Runtime session':<24}{peak_bytes([sys.executable, '-c', SESSION, str(path)]) / weights:6.2f}x", flush=True)
            for target in ("openvino", "onnxruntime"):
                ratio = peak_bytes([sys.executable, "-c", COMPILE, str(path), target]) / weights
                worst = max(worst, ratio)
                print(f"  {'edgekit to ' + target:<24}{ratio:6.2f}x (goal: at most {GOAL:g}x)", flush=True)
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
