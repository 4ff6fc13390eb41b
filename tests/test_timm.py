"""Models of timm as sources: `timm:NAME`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.compiler import Timing, compile
from edgekit.errors import SourceError
from tests.conftest import edgekit, listing
from tests.timm_support import create_timm


@pytest.mark.slow
def test_a_model_of_timm_against_pytorch() -> None:
    module, _ = create_timm("repvgg_a0")
    artifact = compile("timm:repvgg_a0", target="onnxruntime", inputs=["x:1,3,64,64"], calibration=2, timing=Timing(0))
    report = artifact.report
    assert report["model"]["parameters"] == sum(parameter.numel() for parameter in module.parameters())
    assert any("random weights" in note for note in report["notes"])
    assert set(report["passes"][0]["rules"]) >= {"fold-batch-norm", "merge-branches"}
    assert report["passes"][-1]["parameters"] < report["model"]["parameters"]
    image = np.random.default_rng(0).normal(0, 1, (1, 3, 64, 64)).astype(np.float32)
    with torch.no_grad():
        expected = module(torch.from_numpy(image)).numpy()  # the same seed, hence the same weights
    (result,) = artifact.run({"x": image}).values()
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(result, expected, atol=1e-3 * np.abs(expected).max())


def test_the_published_size_is_the_default() -> None:
    _, example = create_timm("test_resnet")
    report = compile("timm:test_resnet", target="openvino", calibration=1, timing=Timing(0)).report
    assert report["model"]["inputs"][0]["shape"] == list(example.shape)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    create_timm("test_resnet")
    with pytest.raises(SourceError, match="timm has no model 'resnet81'") as caught:
        compile("timm:resnet81", target="onnxruntime")
    assert "did you mean one of: resnet18, " in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_torchvision_without_its_operators_is_explained(tmp_path: Path) -> None:
    done = edgekit("compile", "timm:resnet18", "--target", "onnxruntime", "--input", "x:1,3,32,32", "--seconds", "0", cwd=tmp_path)
    if done.returncode == 0:
        pytest.skip("the installed torchvision has its compiled operators, so that their absence was NOT tested")
    assert done.returncode == 8, done.stderr
    assert "torchvision lacks its compiled operators" in done.stderr
    assert f"torch {torch.__version__}" in done.stderr
    assert "install torch and torchvision of the same release" in done.stderr
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == []
