"""Bad input ends in an error that says what, where and what next, with the right exit code, and nothing is written."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgekit.compiler import Job, Timing, run_job
from edgekit.errors import EdgekitError, OutputError, SourceError, UnsupportedOpError, UsageError
from edgekit.isolation import Worker
from edgekit.progress import Reporter
from edgekit.recipe import Recipe
from tests.conftest import tiny_model


def refused(path: Path, kind: type[EdgekitError], says: str, worker: Worker, out: Path | None = None, **more) -> None:
    before = sorted(item.name for item in path.parent.iterdir())
    with pytest.raises(EdgekitError) as caught:
        run_job(
            Job(Recipe(str(path), "onnxruntime", **more), timing=Timing(0)),
            out or path.parent / "out",
            reporter=Reporter(),
            worker=worker,
        )
    assert type(caught.value) is kind or isinstance(caught.value, kind)
    assert says in str(caught.value)
    assert caught.value.fix
    assert sorted(item.name for item in path.parent.iterdir()) == before


def changed(folder: Path, change) -> Path:
    model = tiny_model()
    change(model)
    path = folder / "changed.onnx"
    onnx.save(model, path)
    return path


def _unknown_operator(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type, model.graph.node[2].name = "Rellu", "active/Rellu"


def _foreign_domain(model: onnx.ModelProto) -> None:
    model.graph.node[2].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "active"


def _undefined(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[1] = "wieght"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node[1].output[0] = "features"
    model.graph.node[2].input[0] = "features"


def _poison(value: float):
    def poison(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
        array = numpy_helper.to_array(tensor).copy()
        array[1, 2, 0, 1] = value
        tensor.CopyFrom(numpy_helper.from_array(array, "weight"))

    return poison


def _cut(model: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
    tensor.raw_data = tensor.raw_data[:-4]


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (_unknown_operator, UnsupportedOpError, "active/Rellu"),
        (_unknown_operator, UnsupportedOpError, "Relu"),
        (_foreign_domain, UnsupportedOpError, "com.example"),
        (_cycle, SourceError, "cycle"),
        (_undefined, SourceError, "wieght"),
        (_twice, SourceError, "features"),
        (_poison(np.nan), SourceError, "weight"),
        (_poison(np.inf), SourceError, "weight"),
        (_cut, SourceError, "weight"),
    ],
)
def test_wrong_graphs(change, kind: type[EdgekitError], says: str, tmp_path: Path, worker: Worker) -> None:
    refused(changed(tmp_path, change), kind, says, worker)


def test_wrong_inputs_and_data(tiny: Path, worker: Worker) -> None:
    refused(tiny, SourceError, "image", worker, inputs=("image:1,5,8,8",))
    refused(tiny, SourceError, "image", worker, inputs=("imag:1,3,8,8",))
    refused(tiny, SourceError, "image", worker, inputs=("image:1,3,8",))
    refused(tiny, EdgekitError, "float32", worker, inputs=("image:1,3,8,8:int64",))
    np.savez(tiny.parent / "d.npz", image=np.zeros((4, 3, 9, 9), np.float32))
    refused(tiny, UsageError, "--input image:1,3,9,9", worker, data=str(tiny.parent / "d.npz"))


def test_output_places(tiny: Path, worker: Worker) -> None:
    (tiny.parent / "file").touch()
    refused(tiny, OutputError, "cannot be written", worker, out=tiny.parent / "file" / "out")
    (tiny.parent / "there").mkdir()
    refused(tiny, OutputError, "--force", worker, out=tiny.parent / "there")
    refused(tiny, OutputError, "cannot be written", worker, out=tiny.parent / ("x" * 300))


def test_an_operator_set_of_2017(tmp_path: Path, worker: Worker) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["" : 6]> old (float[1, 4] x) => (float[1, 4] y) { a = Neg(x)  b = Neg(a)  y = Relu(b) }'
    )
    onnx.save(model, tmp_path / "old.onnx")
    artifact = run_job(Job(Recipe(str(tmp_path / "old.onnx"), "onnxruntime"), timing=Timing(0)), tmp_path / "out", reporter=Reporter())
    x = np.array([[-1.0, 2.0, -3.0, 4.0]], np.float32)
    np.testing.assert_array_equal(artifact.run({"x": x})["y"], np.maximum(x, 0))


def test_a_full_disk(tmp_path: Path) -> None:
    model = tiny_model()
    extra = numpy_helper.from_array(np.random.default_rng(0).normal(0, 1, (4, 50000)).astype(np.float32), "wide")
    model.graph.initializer.append(extra)
    model.graph.node.append(helper.make_node("MatMul", ["logits", "wide"], ["more"]))
    model.graph.output[0].name = "more"
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 50000
    onnx.save(model, tmp_path / "wide.onnx")
    command = [sys.executable, "-c", "from edgekit.cli.app import main; main()"]
    command += ["compile", "wide.onnx", "--target", "onnxruntime", "--out", "out", "--seconds", "0", "--quiet"]

    def limit() -> None:  # the kernel refuses what goes beyond, as it does on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, preexec_fn=limit, check=False)
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["wide.onnx"]
