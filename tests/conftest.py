"""What several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekit.isolation import Worker

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
