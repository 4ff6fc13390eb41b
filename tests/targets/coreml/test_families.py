"""Whole networks of five families, compiled for target `coreml`, against PyTorch; benchmarks/coreml_families.py measures all families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from benchmarks.coreml_networks import canonical, images, package, prepare, run_package
from edgekit.graph.files import save_model
from tests.timm_support import create_timm

NETWORKS: dict[str, tuple[int, dict[str, Any]]] = {
    "mobilenetv3_small_050": (64, {}),
    "mobilevit_xxs": (64, {}),
    "test_convnext": (64, {}),
    "deit_tiny_patch16_224": (64, {"img_size": 64, "depth": 2}),
    "swin_tiny_patch4_window7_224": (64, {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}),
}
"""By name of timm, the size of the image and what is smaller than published: inverted residuals, attention over unfolded patches,
layer norm over channels, a ViT, shifted windows of rank 6."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_against_pytorch(name: str, tmp_path: Path) -> None:
    size, options = NETWORKS[name]
    module, _ = create_timm(name, **options)
    batch = images((1, 3, size, size), 4)
    prepare(module, batch)
    with torch.no_grad():
        expected = module(batch).double().numpy()
    assert np.abs(np.diff(expected, axis=0)).max() > 0.05 * np.abs(expected).max()  # the network tells the images apart
    model, _ = canonical(module, batch[:1], name, ("torchscript",))
    save_model(model, tmp_path / "canonical.onnx")
    for half, limit in ((False, 1e-3), (True, 0.02)):
        path = tmp_path / f"{half}.mlpackage"
        package(ir.load(tmp_path / "canonical.onnx"), half, path)
        got = run_package(path, batch.numpy())
        assert np.abs(got - expected).max() <= limit * np.abs(expected).max()
