"""Networks that the onnx package carries, with random weights: compiled, they compute what ONNX Runtime does on the original.

The two with the most weights are left to `python -m benchmarks.light_networks`, which runs all nine.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from benchmarks.light_networks import GOAL, NAMES, TARGETS, image, randomized
from edgekit.compiler import Job, Timing, run_job
from edgekit.isolation import Worker
from edgekit.progress import Reporter
from edgekit.recipe import Recipe

QUICK = ("shufflenet", "squeezenet")
LARGE = ("vgg19", "zfnet512")


def test_all_nine_are_there() -> None:
    assert len(NAMES) == 9
    assert set(QUICK + LARGE) < set(NAMES)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in LARGE]
)
def test_values_before_the_softmax(name: str, tmp_path: Path, worker: Worker) -> None:
    path = tmp_path / f"{name}.onnx"
    onnx.save(randomized(name), path)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # the files are full of initializers that nothing reads
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (declared,), (output,) = session.get_inputs(), session.get_outputs()
    rng = np.random.default_rng(1)
    images = [image(declared.shape, rng) for _ in range(2)]
    expected = [session.run(None, {declared.name: picture})[0] for picture in images]
    variation = np.abs(expected[0] - expected[1]).max()
    for target in TARGETS:
        job = Job(Recipe(str(path), target, calibration=1), timing=Timing(0))
        artifact = run_job(job, tmp_path / target, reporter=Reporter(), worker=worker)
        for picture, values in zip(images, expected, strict=True):
            error = np.abs(artifact.run({declared.name: picture})[output.name] - values).max()
            assert error <= GOAL * np.abs(values).max()
            assert error <= 0.01 * variation  # it tells the two inputs apart, and is no constant
