"""`edgekit inspect --stage` and `edgekit diff`: the graph at each stage, as data, as a table and as a file that runs."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from rich.console import Console

from edgekit import contracts
from edgekit.artifact import Artifact
from edgekit.cli.diff import diff_sources, diff_table
from edgekit.cli.stage import inspect_stage, stage_table
from edgekit.compiler import compile
from edgekit.contracts import Context, Effect, Pass, register_pass
from edgekit.errors import OutputError, PassError, SourceError, UsageError
from edgekit.recipe import Recipe
from tests.conftest import edgekit
from tests.test_compile import QUICK


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return compile("mobileone_digits", target="openvino", out=tmp_path_factory.mktemp("a") / "out", timing=QUICK)


PASSES = ("fold-batch-norm", "merge-branches")


def printed(renderable: object, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_stages_of_a_file_are_what_the_compile_makes_and_compute_what_it_does(tiny: Path, tmp_path: Path) -> None:
    feed = {"image": np.random.default_rng(1).normal(0.3, 1, (1, 3, 8, 8)).astype(np.float32)}
    (expected,) = ort.InferenceSession(tiny).run(None, feed)
    counts = {}
    for stage in ("canonical", "fold-batch-norm", "merge-branches", "lowered"):
        out = tmp_path / f"{stage}.onnx"
        found = inspect_stage(Recipe(str(tiny), "onnxruntime", passes=PASSES), stage, out)
        written = ir.load(out)
        assert found["files"] == [str(out)]
        assert found["stage"] == stage
        assert [node["operator"] for node in found["nodes"]] == [node.op_type for node in written.graph]
        counts[stage] = Counter(node.op_type for node in written.graph)
        (result,) = ort.InferenceSession(out).run(None, feed)
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)
    assert counts["canonical"]["BatchNormalization"] == 1
    assert counts["fold-batch-norm"]["BatchNormalization"] == 0
    assert counts["merge-branches"] == counts["fold-batch-norm"]
    optimized = compile(tiny, target="onnxruntime", passes=PASSES, out=tmp_path / "out", timing=QUICK).path / "optimized.onnx"
    assert counts["lowered"] == Counter(node.op_type for node in ir.load(optimized).graph)


def test_the_numbers_of_each_node(tiny: Path) -> None:
    found = inspect_stage(Recipe(str(tiny), ""), "canonical")
    conv = next(node for node in found["nodes"] if node["operator"] == "Conv")
    assert (conv["macs"], conv["parameters"], conv["bytes"]) == (64 * 4 * 27, 4 * 27 + 4, 4 * (4 * 27 + 4))
    assert conv["shape"] == [1, 4, 8, 8]
    assert found["macs"] == sum(node["macs"] for node in found["nodes"])
    assert (found["target"], found["native_operators"], found["passes"]) == (None, None, [])


def test_lowered_says_what_the_native_file_holds(artifact: Artifact) -> None:
    found = inspect_stage(Recipe(str(artifact.path), ""), "lowered")
    layers = Counter(layer.get("type") for layer in ElementTree.parse(artifact.path / "model.xml").getroot().find("layers") or ())
    assert found["native_operators"] == {kind: n for kind, n in layers.items() if kind not in ("Const", "Parameter", "Result")}
    assert found["native_operators"]["ReLU"] == found["operators"]["Relu"] == 13
    assert found["target"] == "openvino"
    again = inspect_stage(Recipe(str(artifact.path), "onnxruntime"), "lowered")
    assert again["native_operators"] == again["operators"]


def test_an_artifact_stands_for_its_optimized_graph(artifact: Artifact) -> None:
    optimized = ir.load(artifact.path / "optimized.onnx")
    found = inspect_stage(Recipe(str(artifact.path), "onnxruntime"), "lowered")
    assert [node["name"] for node in found["nodes"]] == [node.name for node in optimized.graph]
    assert found["passes"] == []
    added = inspect_stage(Recipe(str(artifact.path), "", passes=("to-float16",)), "to-float16")
    assert added["stage"].startswith("to-float16")
    assert added["bytes"] < found["bytes"]


def test_stages_that_do_not_exist(tiny: Path, tmp_path: Path) -> None:
    for stage, says in (
        ("reparametrize", "did you mean 'reparameterize'?"),
        ("canonica", "did you mean 'canonical'?"),
        ("", "known: canonical"),
    ):
        with pytest.raises(UsageError, match="there is no stage") as caught:
            inspect_stage(Recipe(str(tiny), ""), stage)
        assert says in (caught.value.fix or "")
    with pytest.raises(UsageError, match="no target to lower to"):
        inspect_stage(Recipe(str(tiny), ""), "lowered")
    with pytest.raises(UsageError, match="there is no stage 'to-float16'"):
        inspect_stage(Recipe(str(tiny), ""), "to-float16")
    for name, says in (("x.txt", "not the name of an ONNX file"), ("none/x.onnx", "no such folder"), ("tiny.onnx", "exists already")):
        with pytest.raises(OutputError, match=says):
            inspect_stage(Recipe(str(tiny), ""), "canonical", tmp_path / name)
    assert inspect_stage(Recipe(str(tiny), ""), "canonical", tmp_path / "tiny.onnx", force=True)["files"]


def test_a_pass_twice_and_one_that_fails(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts.passes, "_local", {})

    @register_pass
    @dataclass(frozen=True)
    class Count(Pass):
        name: ClassVar[str] = "count"
        effect: ClassVar[Effect] = Effect.EXACT
        times: int = 1

        def apply(self, model: ir.Model, context: Context) -> int:
            assert context.calibration[0]["image"].shape == (1, 3, 8, 8)
            if self.times > 2:
                raise ValueError("three times is too often")
            model.graph[0].metadata_props["times"] = str(self.times)
            return self.times

    passes = ("count", "count{times=2}", "count{times=3}")

    def rewrites(stage: str, *passes: str) -> list[int]:
        return [item["rewrites"] for item in inspect_stage(Recipe(str(tiny), "", passes=passes), stage)["passes"]]

    assert rewrites("count", *passes) == [1]  # the whole specification comes first
    assert rewrites("count{times=2}", *passes) == [1, 2]
    assert rewrites("count", "count{times=2}") == [2]
    with pytest.raises(PassError, match="failed: ValueError: three times") as caught:
        rewrites("count{times=3}", *passes)
    assert "'count{times=3}'" in caught.value.what


def test_diff_of_a_network_and_its_artifact(artifact: Artifact) -> None:
    found = diff_sources("mobileone_digits", str(artifact.path), depth=2)
    assert found["total"]["operators"]["BatchNormalization"] == {"a": 66, "b": 0}
    modules = {change["module"]: change for change in found["modules"]}
    assert {"stem.conv_kxk", "stages.0", "stages.1", "stages.2"} <= modules.keys()
    assert "head" not in modules
    optimized = ir.load(artifact.path / "optimized.onnx")
    convolutions = sum(node.op_type == "Conv" for node in optimized.graph)
    assert found["total"]["operators"]["Conv"]["b"] == convolutions
    assert found["total"]["parameters"]["b"] == artifact.report["passes"][-1]["parameters"]
    for width in (80, 140):
        lines = printed(diff_table(found), width).splitlines()
        assert max(map(len, lines)) <= width
        assert any("BatchNormalization" in line and "−66" in line for line in lines)
        assert "stages.2" in "".join(lines)
    assert "no difference in" in printed(diff_table(diff_sources(str(artifact.path), str(artifact.path))), 80)


def test_files_are_compared_as_they_are(tiny: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny)
    nodes = [node for node in model.graph.node if node.op_type != "Relu"]
    nodes[-2].input[0] = "normal"
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))  # files may list nodes in any order
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    found = diff_sources(str(tiny), str(other))
    assert found["total"]["operators"] == {"Relu": {"a": 1, "b": 0}}
    assert "0 came" in printed(diff_table(found), 80)
    with pytest.raises(SourceError, match="no such file"):
        diff_sources(str(tiny), "none.onnx")


def test_tables_fit_their_terminal(artifact: Artifact) -> None:
    found = inspect_stage(Recipe(str(artifact.path), ""), "lowered")
    for width in (80, 140):
        lines = printed(stage_table(found), width).splitlines()
        assert max(map(len, lines)) <= width
        text = " ".join(" ".join(lines).split())
        for words in ("stage lowered", "openvino", "stages.2.3", "Conv", "1×128×4×4", "262.1 k", "in the target's file", "Convolution 7"):
            assert words in text


def test_on_the_command_line(tiny: Path, artifact: Artifact) -> None:
    folder = tiny.parent
    done = edgekit("inspect", str(tiny), "--stage", "lowered", "-t", "onnxruntime", "-o", "low.onnx", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == ["low.onnx"]
    assert (folder / "low.onnx").is_file()
    done = edgekit("diff", str(tiny), "low.onnx", "--json", cwd=folder)
    found = json.loads(done.stdout)
    assert found["total"]["operators"]["BatchNormalization"] == {"a": 1, "b": 0}
    shown = edgekit("diff", str(tiny), "low.onnx", cwd=folder)
    assert "what went and came" in shown.stdout
    for arguments, code, says in (
        (("inspect", str(tiny), "-p", "to-float16"), 2, "belong to a stage"),
        (("inspect", str(tiny), "--stage", "lowerd", "-t", "openvino"), 2, "did you mean 'lowered'?"),
        (("diff", str(tiny), "none.onnx"), 3, "no such file"),
    ):
        done = edgekit(*arguments, cwd=folder)
        assert done.returncode == code, done.stderr
        assert says in done.stderr
    shown = edgekit("verify", str(artifact.path))
    assert "parity with the original model, stage by stage" in shown.stdout
    assert "on denormals" in shown.stdout
