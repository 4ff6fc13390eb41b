"""Whole compiles for Core ML, and packages that coremltools' own PyTorch converter wrote, against PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import edgekit
from edgekit import contracts
from edgekit.compiler import Timing
from edgekit.errors import UnsupportedOpError, UsageError
from edgekit.targets.coreml.reference.evaluator import Evaluator
from edgekit.targets.coreml.reference.package import open_package
from tests.conftest import edgekit as command
from tests.conftest import tiny_model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_digits", "mobileone_digits"])
def test_the_zoo_keeps_its_accuracy_in_float16(name: str, tmp_path: Path) -> None:
    artifact = edgekit.compile(name, target="coreml", data="digits", out=tmp_path / "out")
    report = artifact.report
    assert report["target"]["precision"] == "fp16"
    assert abs(report["artifact"]["metric"]["difference"]) <= 0.2
    assert report["artifact"]["parity"]["sqnr_db"] > 50
    assert report["latency"] is None
    assert any("latency was not measured" in note for note in report["notes"])
    artifact.verify()


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "tiny.onnx").write_bytes(tiny_model().SerializeToString())
    return tmp_path / "tiny.onnx"


def test_the_report_says_which_operator_asked_for_the_deployment_target(tiny: Path, tmp_path: Path) -> None:
    artifact = edgekit.compile(tiny, target='coreml{weights="int4"}', out=tmp_path / "out", timing=Timing(0), calibration=2)
    facts = artifact.report["target"]["facts"]
    assert facts["deployment_target"] == "iOS15", "the weights are too small to be stored in fewer bits"
    assert "evaluator" in facts["executed_by"]
    recipe = open_package(tmp_path / "out" / "model.mlpackage").spec.description.metadata.userDefined["edgekit.recipe"]
    assert recipe == (tmp_path / "out" / "recipe.toml").read_text()
    artifact.verify()


def test_a_deployment_target_that_is_too_old_names_the_operator(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(UnsupportedOpError, match="needs iOS16") as caught:
        edgekit.compile(
            module,
            torch.zeros(1, 64),
            target='coreml{weights="palette4",deployment_target="iOS15"}',
            out=tmp_path / "out",
            timing=Timing(0),
        )
    assert "node" in (caught.value.where or "")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="no deployment target 'iOS14'"):
        edgekit.compile(module, torch.zeros(1, 64), target='coreml{deployment_target="iOS14"}', timing=Timing(0))


def test_image_input_on_the_command_line(tiny: Path, tmp_path: Path) -> None:
    done = command(
        "compile",
        str(tiny),
        "-t",
        "coreml",
        "--image-input",
        "image:0.00392157,-0.5,RGB",
        "--out",
        "out",
        "--seconds",
        "0",
        "-q",
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, ""), "what coremltools prints on import stays in the worker"
    spec = open_package(tmp_path / "out" / "model.mlpackage").spec
    assert spec.description.input[0].type.WhichOneof("Type") == "imageType"
    assert command("verify", "out", "-q", cwd=tmp_path).returncode == 0
    wrong = command("compile", str(tiny), "-t", "coreml", "--image-input", "image:1,RGB", "--out", "other", cwd=tmp_path)
    assert wrong.returncode == 2
    assert "describes no image input" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_verify_against_an_onnx_file(tiny: Path, tmp_path: Path) -> None:
    edgekit.compile(tiny, target="coreml", precision="fp32", passes=[], out=tmp_path / "out", timing=Timing(0), calibration=2)
    (tmp_path / "out" / "model.mlpackage").rename(tmp_path / "net.mlpackage")
    done = command("verify", "net.mlpackage", "--against", "tiny.onnx", "--precision", "fp32", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sqnr_db" in done.stdout
    other = tiny_model(seed=1)
    (tmp_path / "other.onnx").write_bytes(other.SerializeToString())
    wrong = command("verify", "net.mlpackage", "--against", "other.onnx", "--precision", "fp32", cwd=tmp_path)
    assert wrong.returncode == 5, wrong.stderr
    for arguments, code in (
        (("verify", "none.mlpackage", "--against", "tiny.onnx"), 3),
        (("verify", "tiny.onnx", "--against", "tiny.onnx"), 2),
    ):
        assert command(*arguments, cwd=tmp_path).returncode == code


def test_a_package_of_coremltools_own_converter(tmp_path: Path) -> None:
    """Another lowering than ours, run in our evaluator: the two cannot share one misreading."""
    import coremltools as ct

    torch.manual_seed(0)
    module, x = contracts.models.get("mobileone_digits").build().eval(), torch.randn(contracts.models.get("mobileone_digits").input_shape)
    traced = torch.jit.trace(module, x)
    for precision, limit in ((ct.precision.FLOAT32, 1e-5), (ct.precision.FLOAT16, 0.02)):
        model = ct.convert(
            traced,
            inputs=[ct.TensorType("x", shape=tuple(x.shape))],
            convert_to="mlprogram",
            compute_precision=precision,
            skip_model_load=True,
        )
        path = tmp_path / f"{limit}.mlpackage"
        model.save(str(path))
        (found,) = Evaluator(path).run({"x": x.numpy()}).values()
        expected = module(x).detach().numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=limit * np.abs(expected).max())
