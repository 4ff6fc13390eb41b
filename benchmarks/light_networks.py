"""Compiles the nine networks that the onnx package carries to both targets and compares values with ONNX Runtime.

    python -m benchmarks.light_networks [NAME ...]

The files are real architectures at opset 9 whose weights are constants, so that every input gives one answer. They get
seeded random weights and batch-norm statistics first, and the values before the softmax are compared on two inputs whose
outputs differ. Prints, per network and target, the largest error relative to the largest value (goal: at most 1e-3) and the
compiled model's speed against ONNX Runtime on the original file, the two timed in turn in one run.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import numpy_helper

import edgekit
from edgekit.compiler import Timing
from edgekit.machine import available_threads
from edgekit.profile.measure import Latency, summarize, time_in_turn

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = tuple(sorted(path.stem.removeprefix("light_") for path in FOLDER.glob("light_*.onnx")))
TARGETS = ("openvino", "onnxruntime")
GOAL = 1e-3


def randomized(name: str, seed: int = 0) -> onnx.ModelProto:
    """Returns the network with seeded random weights and without its softmax.

    Convolution and linear weights are of variance 2 / fan-in, so that values keep their scale through the depth; scales are
    near 1, variances between 0.5 and 1.5, means and biases small.
    """
    model = onnx.load(FOLDER / f"light_{name}.onnx")
    graph = model.graph
    rng = np.random.default_rng(seed)
    roles = {}
    for node in graph.node:
        if node.op_type in ("Conv", "Gemm"):
            roles |= dict(zip(node.input[1:], ("weight", "small"), strict=False))
        elif node.op_type == "BatchNormalization":
            roles |= dict(zip(node.input[1:], ("scale", "small", "small", "variance"), strict=True))
    shapes = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    kept, made = [], []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            shape = tuple(int(dim) for dim in shapes[node.input[0]])
            made.append(numpy_helper.from_array(_draw(rng, roles.get(node.output[0], "scale"), shape), node.output[0]))
        elif node.op_type != "Softmax":
            kept.append(node)
    for tensor in graph.initializer:
        if (role := roles.get(tensor.name)) is not None:
            tensor.CopyFrom(numpy_helper.from_array(_draw(rng, role, tuple(tensor.dims)), tensor.name))
    if graph.node[-1].op_type == "Softmax":
        graph.output[0].name = graph.node[-1].input[0]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(made)
    return model


def _draw(rng: np.random.Generator, role: str, shape: tuple[int, ...]) -> np.ndarray:
    if role == "weight":
        fan_in = int(np.prod(shape[1:])) or 1
        values = rng.standard_normal(shape, dtype=np.float32) * np.float32(np.sqrt(2.0 / fan_in))
    elif role == "variance":
        values = rng.uniform(0.5, 1.5, shape)
    elif role == "scale":
        values = rng.uniform(0.8, 1.2, shape)
    else:
        values = rng.normal(0.0, 0.1, shape)
    return values.astype(np.float32)


def image(shape: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """An image `[1, 3, H, W]` of plain patches: fine noise would be averaged away by the last pooling, and all outputs be alike."""
    patches = rng.normal(0, 10, (1, shape[1], 7, 7)).astype(np.float32)
    return patches.repeat(shape[2] // 7, 2).repeat(shape[3] // 7, 3)


def largest_relative_error(artifact: edgekit.Artifact, session: ort.InferenceSession, feeds: list[dict[str, np.ndarray]]) -> float:
    """Largest error of the artifact against the session, relative to the largest value of that output.

    Raises:
        AssertionError: The outputs on different inputs do not differ, so that the comparison would prove nothing.
    """
    names = [output.name for output in session.get_outputs()]
    reference = [session.run(names, feed) for feed in feeds]
    assert all(not np.allclose(first, second, rtol=1e-2) for first, second in zip(reference[0], reference[1], strict=True))
    worst = 0.0
    for feed, expected in zip(feeds, reference, strict=True):
        result = artifact.run(feed)
        for name, array in zip(names, expected, strict=True):
            worst = max(worst, float(np.abs(result[name] - array).max() / np.abs(array).max()))
    return worst


def measure(name: str, target: str, path: Path, seconds: float) -> tuple[float, Latency]:
    """Compiles the file at `path` and returns its largest relative error and its latency beside ONNX Runtime on the file."""
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # the files are full of initializers that nothing reads
    settings.intra_op_num_threads = available_threads()
    session = ort.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    artifact = edgekit.compile(path, target=target, calibration=2, timing=Timing(0))
    declared = artifact.report["model"]["inputs"][0]
    rng = np.random.default_rng(1)
    feeds = [{declared["name"]: image(declared["shape"], rng)} for _ in range(2)]
    error = largest_relative_error(artifact, session, feeds)
    candidates = {"onnxruntime": partial(session.run, None, feeds[0]), "edgekit": partial(artifact.run, feeds[0])}
    times = time_in_turn(candidates, budget_s=seconds, max_runs=200, rng=np.random.default_rng(0))
    return error, summarize(times["edgekit"], times["onnxruntime"], device=name, threads=artifact.threads, rng=np.random.default_rng(0))


def main() -> int:
    """Prints the table; the exit status is 1 where a network misses the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NAMES))
    parser.add_argument("--seconds", type=float, default=6.0, help="time per network and target")
    options = parser.parse_args()
    missed = 0
    print(f"{'network':<14}{'target':<13}{'error / max':>12}{'speed against ONNX Runtime':>32}")
    for name in options.names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.onnx"
            onnx.save(randomized(name), path)
            for target in TARGETS:
                error, latency = measure(name, target, path, options.seconds)
                missed += error > GOAL
                low, high = latency.speedup_ci95 or (0.0, 0.0)
                print(f"{name:<14}{target:<13}{error:>12.1e}{f'{latency.speedup:.2f}x [{low:.2f}, {high:.2f}]':>32}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
