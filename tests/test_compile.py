"""Whole compiles, from each kind of source to each target, against PyTorch and ONNX Runtime."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jsonschema
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from rich.console import Console
from torch import nn

import edgekit
from edgekit.artifact import open_artifact
from edgekit.cli.inspect import inspect_model
from edgekit.cli.show import report_table
from edgekit.compiler import Job, Timing, compile, run_job
from edgekit.contracts import Context, Effect, Pass, register_pass
from edgekit.errors import BudgetError, EdgekitError, LoweringError, ParityError, SourceError, UsageError
from edgekit.progress import Reporter
from edgekit.recipe import load_recipe

SCHEMA = json.loads((Path(edgekit.__file__).parent / "report" / "schema.json").read_text())
QUICK = Timing(0)
HEADER = '<ir_version: 10, opset_import: ["" : 18]> '
TARGETS = ["openvino", "onnxruntime"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["vit_digits", "mobileone_digits"])
def test_zoo_models_keep_their_accuracy(name: str, target: str) -> None:
    artifact = compile(name, target=target, data="digits", timing=Timing(0.5))
    report = artifact.report
    jsonschema.validate(report, SCHEMA)
    assert report["artifact"]["metric"]["samples"] == 597
    assert report["artifact"]["metric"]["value"] >= 0.975
    assert report["artifact"]["metric"]["difference"] == 0.0
    assert report["data"]["held_out"]
    assert "597 held-out samples" in printed(report)
    assert report["artifact"]["parity"]["max_abs_error"] < 1e-3
    assert report["latency"]["runs"] >= 5
    if name == "mobileone_digits":
        (merged,) = report["passes"]
        assert merged["rules"]["fold-batch-norm"] > 0
        assert merged["rules"]["merge-branches"] > 0
        assert merged["parameters"] < report["model"]["parameters"]
        assert merged["macs"] < report["model"]["macs"]


def printed(report: dict[str, Any]) -> str:
    """What the terminal shows of a report, in one line."""
    console = Console(file=io.StringIO(), width=80)
    console.print(report_table(report))
    return " ".join(console.file.getvalue().split())


def test_accuracy_on_the_calibration_inputs_is_called_so(tiny: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(tiny.parent / "d.npz", image=rng.normal(0.3, 1, (20, 3, 8, 8)), labels=rng.integers(0, 4, 20))
    report = compile(tiny, target="onnxruntime", data=str(tiny.parent / "d.npz"), timing=QUICK).report
    jsonschema.validate(report, SCHEMA)
    assert report["data"]["held_out"] is False
    assert report["artifact"]["metric"]["samples"] == 20
    assert "20 samples, the calibration inputs among them" in printed(report)
    assert "held-out" not in printed(report)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.skip = nn.BatchNorm2d(3)
        for norm in (self.bn, self.skip):
            nn.init.normal_(norm.running_mean, 0.1, 0.5)
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
        self.head = nn.Linear(3, 5)

    def forward(self, image: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.conv(image)) + self.skip(image)) * scale
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize("target", TARGETS)
def test_a_module_in_memory(target: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Branches()
    examples = (torch.randn(2, 3, 9, 7), torch.randn(2, 1, 1, 1))
    artifact = edgekit.compile(module, examples, target=target, out=tmp_path / "out", timing=QUICK)
    inputs = {"image": np.random.default_rng(1).normal(0, 1, (2, 3, 9, 7)).astype(np.float32), "scale": np.ones((2, 1, 1, 1), np.float32)}
    with torch.no_grad():
        expected = module.eval()(*(torch.from_numpy(array) for array in inputs.values())).numpy()
    np.testing.assert_allclose(artifact.run(inputs)["output"], expected, rtol=1e-4, atol=1e-5)
    assert artifact.report["passes"][0]["rules"]["merge-branches"] == 1
    nodes = [node.op_type for node in onnx.load(tmp_path / "out" / "optimized.onnx").graph.node]
    assert nodes.count("Conv") == 1
    assert "BatchNormalization" not in nodes
    with pytest.raises(UsageError, match="image"):
        artifact.run({"imag": inputs["image"], "scale": inputs["scale"]})
    with pytest.raises(SourceError, match="in memory"):
        run_job(Job(load_recipe(tmp_path / "out" / "recipe.toml"), timing=QUICK), tmp_path / "again", reporter=Reporter())


@pytest.mark.parametrize("target", TARGETS)
def test_an_onnx_file(target: str, tiny: Path, tmp_path: Path) -> None:
    artifact = compile(tiny, target=target, timing=QUICK, out=tmp_path / "out")
    session = ort.InferenceSession(tiny)
    feed = {"image": np.random.default_rng(1).normal(0.3, 1, (1, 3, 8, 8)).astype(np.float32)}
    (expected,) = session.run(None, feed)
    np.testing.assert_allclose(artifact.run(feed)["logits"], expected, rtol=1e-4, atol=1e-6)
    assert artifact.report["passes"][0]["rules"]["fold-batch-norm"] == 1
    assert any("noise" in note for note in artifact.report["notes"])
    assert artifact.verify().max_abs_error < 1e-5


def test_the_recipe_repeats_the_compile(tiny: Path, tmp_path: Path, worker) -> None:
    first = compile(tiny, target="onnxruntime", passes=["fold-batch-norm", "to-float16{keep_io=true}"], timing=QUICK, out=tmp_path / "a")
    again = run_job(Job(load_recipe(tmp_path / "a" / "recipe.toml"), timing=QUICK), tmp_path / "b", reporter=Reporter(), worker=worker)
    assert first.report["artifact"]["files"] == again.report["artifact"]["files"]
    assert (tmp_path / "a" / "optimized.onnx").read_bytes() == (tmp_path / "b" / "optimized.onnx").read_bytes()


DAMAGES: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda report: [report.pop(key) for key in list(report) if key != "schema"], "no entry 'artifact'"),
    (lambda report: report.pop("model"), "no entry 'model'"),
    (lambda report: report["artifact"].pop("precision"), "no entry 'precision'"),
    (lambda report: report["artifact"].update(precision="fp7"), "fp7"),
    (lambda report: report["artifact"].update(files=[]), "damaged"),
    (lambda report: report["artifact"]["files"].update({"model.bin": {"bytes": "7"}}), "no entry 'sha256'|not of type int"),
    (lambda report: report["model"]["inputs"][0].update(dtype="float7"), "float7"),
    (lambda report: report["model"].update(inputs=[3]), "damaged"),
]
"""Changes of a report, and what is said of the entries that are then missing or wrong."""


def test_an_artifact_opens_and_is_checked_again(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compile(tiny, target="openvino", timing=Timing(0.3), out=out)
    artifact = open_artifact(out)
    assert artifact.verify().sqnr_db > 80
    assert artifact.report["artifact"]["path"] == str(out)
    assert json.loads((out / "report.json").read_text())["artifact"]["path"] == "."
    latency = artifact.profile(budget_s=0.3)
    assert latency["speedup_ci95"][0] <= latency["speedup"] <= latency["speedup_ci95"][1]
    weights = out / "model.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x40
    weights.write_bytes(content)
    with pytest.raises(SourceError, match="changed"):
        artifact.verify()
    weights.write_bytes(content[:-1])
    with pytest.raises(SourceError, match="bytes"):
        artifact.verify()
    weights.unlink()
    with pytest.raises(SourceError, match="missing"):
        artifact.verify()
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**report, "schema": 99}))
    with pytest.raises(SourceError, match="schema 99"):
        open_artifact(out)
    for change, says in DAMAGES:
        damaged = json.loads(json.dumps(report))
        change(damaged)
        (out / "report.json").write_text(json.dumps(damaged))
        with pytest.raises(SourceError, match=says):
            open_artifact(out)
    (out / "report.json").write_text("{")
    with pytest.raises(SourceError, match="cannot be read"):
        open_artifact(out)


def test_float16_halves_the_weights_and_is_measured(tiny: Path) -> None:
    artifact = compile(tiny, target="onnxruntime", passes=["to-float16"], timing=QUICK)
    (result,) = artifact.report["passes"]
    assert result["effect"] == "approximate"
    assert 30 < result["parity"]["sqnr_db"] < 90
    assert result["bytes"] < 0.6 * artifact.report["model"]["bytes"]
    assert artifact.report["artifact"]["precision"] == "fp16"
    assert [item["dtype"] for item in artifact.report["model"]["inputs"]] == ["float32"]


def test_float16_inputs_and_outputs(tiny: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        artifact = compile(tiny, target=target, passes=["to-float16{keep_io=false}"], timing=Timing(0.2), out=tmp_path / target)
        assert [item["dtype"] for item in artifact.report["artifact"]["inputs"]] == ["float16"]
        outputs = artifact.run({"image": np.ones((1, 3, 8, 8), np.float16)})
        assert outputs["logits"].dtype == np.float16
        assert open_artifact(tmp_path / target).verify().sqnr_db > 30
        assert artifact.profile(budget_s=0.1)["speedup"] is not None


def test_an_overflow_of_float16_is_seen(tmp_path: Path) -> None:
    text = HEADER + "g (float[1, 4] x) => (float[1, 4] y) <float a = {30000}> { z = Mul(x, a) y = Mul(z, a) }"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "large.onnx")
    blindly = 'to-float16{overflow="ignore"}'
    with pytest.raises(ParityError, match=r"to-float16.*NaN or infinity"):
        compile(tmp_path / "large.onnx", target="onnxruntime", passes=[blindly], timing=QUICK)
    report = compile(tmp_path / "large.onnx", target="onnxruntime", passes=[blindly], max_drop=0.0, timing=QUICK).report
    assert "infinity" in report["passes"][0]["undone"]
    report = compile(tmp_path / "large.onnx", target="onnxruntime", passes=["to-float16"], timing=QUICK).report
    assert any("65504" in refusal["why"] for refusal in report["passes"][0]["refusals"])


def test_a_budget_needs_something_to_measure(tmp_path: Path) -> None:
    text = HEADER + "g (float[1, 2, 4] x) => (float[1, 2, 4] y) { y = Relu(x) }"
    onnx.save(onnx.parser.parse_model(text), tmp_path / "map.onnx")
    with pytest.raises(UsageError, match="something to measure"):
        compile(tmp_path / "map.onnx", target="onnxruntime", passes=["to-float16"], max_drop=0.0, timing=QUICK)


def test_force_keeps_what_only_looks_like_an_artifact(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "project"
    compile(tiny, target="onnxruntime", timing=QUICK, out=out)
    compile(tiny, target="onnxruntime", timing=QUICK, out=out, force=True)
    (out / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="not an artifact"):
        compile(tiny, target="onnxruntime", timing=QUICK, out=out, force=True)
    assert (out / "precious.txt").exists()


def test_a_baseline_that_the_target_refuses_is_left_out(tmp_path: Path) -> None:
    # 2 ** 40 does not fit OpenVINO's int32; the canonical graph has folded it away.
    text = (
        HEADER + "g (float[1, 4] x) => (float[1, 4] y) <int64[1] big = {1099511627776}, int64[1] one = {1}> "
        "{ d = Div(big, big) s = Mul(d, one) f = Cast<to = 1>(s) y = Mul(x, f) }"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "big.onnx")
    report = compile(tmp_path / "big.onnx", target="openvino", timing=Timing(0.2)).report
    jsonschema.validate(report, SCHEMA)
    assert report["latency"]["baseline_median_ms"] is None
    assert any("could not be timed" in note for note in report["notes"])


@register_pass
@dataclass(frozen=True)
class Scramble(Pass):
    """Negates the weights of the first convolution, which nobody wants."""

    name: ClassVar[str] = "test-scramble"
    effect: ClassVar[Effect] = Effect.APPROXIMATE

    def apply(self, model: ir.Model, context: Context) -> int:
        value = next(node for node in model.graph if node.op_type == "Conv").inputs[1]
        assert value is not None
        assert value.const_value is not None
        value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)
        return 1


@register_pass
@dataclass(frozen=True)
class FalselyExact(Scramble):
    """The same, but promised to be exact."""

    name: ClassVar[str] = "test-falsely-exact"
    effect: ClassVar[Effect] = Effect.EXACT


def test_a_pass_that_breaks_its_promise_stops_the_compile(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="test-falsely-exact"):
        compile(tiny, target="onnxruntime", passes=["fold-batch-norm", "test-falsely-exact"], timing=QUICK, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.onnx"]


def test_the_accuracy_budget(tmp_path: Path) -> None:
    artifact = compile("mobileone_digits", target="onnxruntime", data="digits", passes=["test-scramble"], max_drop=1.0, timing=QUICK)
    assert "points of accuracy" in artifact.report["passes"][0]["undone"]
    assert artifact.report["artifact"]["metric"]["difference"] == 0.0


def test_the_budget_is_held_by_the_artifact_too(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgekit.pipeline import Budget

    monkeypatch.setattr(Budget, "exceeded", lambda self, base, now: "it costs 9 points" if now.facts is not None else None)
    with pytest.raises(BudgetError) as caught:
        compile(tiny, target="onnxruntime", max_drop=1.0, timing=QUICK, out=tmp_path / "out")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "out").exists()


def test_precisions_of_openvino(tiny: Path) -> None:
    for precision in ("fp16", "bf16"):
        report = compile(tiny, target="openvino", precision=precision, timing=QUICK).report
        executed = report["target"]["facts"]["executed_precision"]
        assert report["target"]["precision"] == precision
        assert report["artifact"]["precision"] == ("fp16" if precision == "fp16" else executed)  # fp16 weights, whatever computes
        assert any("was asked for" in note for note in report["notes"]) == (executed != precision)
    with pytest.raises(UsageError, match="two precisions"):
        compile(tiny, target='openvino{precision="fp16"}', precision="bf16", timing=QUICK)
    with pytest.raises(UsageError, match="fp16"):
        compile(tiny, target="onnxruntime", precision="fp16", timing=QUICK)


def test_symbolic_dimensions_are_pinned(tmp_path: Path) -> None:
    from tests.conftest import tiny_model

    model = tiny_model()
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[0].dim_param, dims[2].dim_param = "batch", "height"
    path = tmp_path / "dynamic.onnx"
    onnx.save(model, path)
    with pytest.raises(EdgekitError) as caught:
        compile(path, target="onnxruntime", timing=QUICK)
    assert "--input image:" in str(caught.value)
    report = compile(path, target="onnxruntime", inputs=["image:2,3,10,8"], timing=QUICK).report
    assert report["model"]["inputs"][0]["shape"] == [2, 3, 10, 8]
    assert not any("dynamic" in note for note in report["notes"])
    with pytest.raises(EdgekitError, match="image"):
        compile(path, target="onnxruntime", inputs=["image:2,5,10,8"], timing=QUICK)


def test_a_batch_axis_that_was_set_to_1_is_noted(tmp_path: Path) -> None:
    text = (
        HEADER + "g (float[batch, 4] x, float[batch, 4] y, float[2, 4] w) => (float[m, 4] z) { s = Add(x, y) z = Concat<axis = 0>(s, w) }"
    )
    path = tmp_path / "dynamic.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    report = compile(path, target="onnxruntime", timing=QUICK).report
    notes = [f"the first dimension of '{name}' is dynamic: it was set to 1 (--input {name}:N,4 sets another)" for name in "xy"]
    assert [note for note in report["notes"] if "dynamic" in note] == notes
    assert inspect_model(str(path), [], None, 0)["notes"] == notes
    assert inspect_model(str(path), ["x:3,4"], None, 0)["notes"] == []  # the same name is the same size


def test_damaged_kept_inputs(tiny: Path, tmp_path: Path) -> None:
    artifact = compile(tiny, target="onnxruntime", timing=QUICK, out=tmp_path / "out")
    with np.load(tmp_path / "out" / "parity.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    for kept in ({}, {name: array for name, array in arrays.items() if not name.startswith("expected/0")}):
        np.savez(tmp_path / "out" / "parity.npz", **kept)
        for check in (artifact.verify, artifact.profile):
            with pytest.raises(SourceError, match="not complete"):
                check()


def test_a_compiler_that_crashes_is_survived(tiny: Path, tmp_path: Path) -> None:
    from tests.crashing_target import CrashingTarget

    edgekit.register_target(CrashingTarget)
    with pytest.raises(LoweringError, match="SIGSEGV") as caught:
        compile(tiny, target="test-crashing", timing=QUICK, out=tmp_path / "out")
    assert "lower to test-crashing" in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.onnx"]


def test_an_artifact_without_a_place_lives_as_long_as_its_object(tiny: Path) -> None:
    artifact = compile(tiny, target="onnxruntime", timing=QUICK)
    path = artifact.path
    assert (path / "report.json").is_file()
    del artifact
    import gc

    gc.collect()
    assert not path.exists()
