"""Whole networks of five families, compiled for target `coreml` and held against PyTorch; benchmarks/coreml_families.py measures all families."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks.coreml_families import canonical, images, package, prepare, run_package
from edgekit.graph.files import save_model
from tests.timm_support import create_timm

NETWORKS = {
    "mobilenetv3_small_050": 64,
    "mobilevit_xxs": 64,
    "test_convnext": 64,
    "deit_tiny_patch16_224": 224,
    "swin_s3_tiny_224": 224,
}
"""By name of timm, the size of the image: convolutions, attention over unfolded patches, layer norm over channels, a ViT, windows of rank 6."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_against_pytorch(name: str, tmp_path: Path) -> None:
    module, _ = create_timm(name)
    batch = images((1, 3, NETWORKS[name], NETWORKS[name]), 4)
    prepare(module, batch)
    with torch.no_grad():
        expected = module(batch).double().numpy()
    assert np.ptp(expected.argmax(axis=1)) > 0 or np.abs(np.diff(expected, axis=0)).max() > 0.1  # the images are told apart
    model, _ = canonical(module, batch[:1], name)
    save_model(model, tmp_path / "canonical.onnx")
    for half, limit in ((False, 1e-3), (True, 0.02)):
        path = tmp_path / f"{half}.mlpackage"
        package(ir.load(tmp_path / "canonical.onnx"), half, path)
        got = run_package(path, batch.numpy())
        assert np.abs(got - expected).max() <= limit * np.abs(expected).max()
