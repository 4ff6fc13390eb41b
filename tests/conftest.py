"""What several test files share."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before PyTorch is imported: on tiny tensors threads cost more than they gain

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, settings
from onnx import numpy_helper

from edgekit.isolation import Worker

settings.register_profile("edgekit", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("edgekit")

TINY = """
<ir_version: 10, opset_import: ["" : 18]>
tiny (float[1, 3, 8, 8] image) => (float[1, 4] logits)
{
    features = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(image, weight, bias)
    normal = BatchNormalization(features, scale, shift, mean, variance)
    active = Relu(normal)
    pooled = GlobalAveragePool(active)
    logits = Flatten(pooled)
}
"""


def tiny_model(seed: int = 0) -> onnx.ModelProto:
    """A Conv, a batch norm, a Relu and a pool with random weights: `[1, 3, 8, 8]` to `[1, 4]`."""
    rng = np.random.default_rng(seed)
    model = onnx.parser.parse_model(TINY)
    arrays = {"weight": rng.normal(0, 0.5, (4, 3, 3, 3))}
    arrays |= {name: rng.normal(0.1, 0.3, 4) for name in ("bias", "scale", "shift", "mean")}
    arrays["variance"] = rng.uniform(0.5, 1.5, 4)
    model.graph.initializer.extend(numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items())
    return model


def listing(folder: Path) -> list[tuple[str, int]]:
    """Every file and folder below `folder` with its size."""
    return sorted((str(path.relative_to(folder)), path.lstat().st_size) for path in folder.rglob("*"))


def command(*arguments: str, before: str = "") -> list[str]:
    """The command line `edgekit ARGUMENTS`; the statements `before` run first in its process."""
    return [sys.executable, "-c", f"{before}\nfrom edgekit.cli.app import main; main()", *arguments]


def edgekit(*arguments: str, before: str = "", **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `edgekit ARGUMENTS` as a process of its own; `options` are those of `subprocess.run`."""
    return subprocess.run(command(*arguments, before=before), capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    """One process for native code for the whole run; it is replaced when a test crashes it."""
    with Worker() as worker:
        yield worker


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """The file of `tiny_model`."""
    path = tmp_path / "tiny.onnx"
    onnx.save(tiny_model(), path)
    return path
