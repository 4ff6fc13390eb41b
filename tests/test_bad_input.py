"""Bad input ends in an error that says what, where and what next, with the right exit code, and nothing is written.

Each case is a whole compile in this process, where it costs milliseconds; `test_exit_codes` asks the command line.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgekit.compiler import Job, Timing, run_job
from edgekit.errors import DataError, EdgekitError, OutputError, RecipeError, SourceError, UnsupportedOpError, UsageError
from edgekit.isolation import Worker
from edgekit.progress import Reporter
from edgekit.recipe import Recipe, load_recipe
from tests.conftest import listing, tiny_model

Change = Callable[[ModelProto], Any]


def run(folder: Path, worker: Worker, model: str | Path, out: Path | None = None, **recipe: Any):
    job = Job(Recipe(str(model), **{"target": "onnxruntime", "threads": 1, "calibration": 2, **recipe}), timing=Timing(0))
    return run_job(job, out or folder / "out", reporter=Reporter(), worker=worker)


def refused(
    folder: Path, worker: Worker, kind: type[EdgekitError], *says: str, model: str | Path, out: Path | None = None, **recipe: Any
) -> None:
    """Asserts that a compile is refused by exactly `kind`, that the message says all of `says`, and that `folder` is unchanged."""
    before = listing(folder)
    with pytest.raises(EdgekitError) as caught:
        run(folder, worker, model, out, **recipe)
    assert type(caught.value) is kind, caught.value
    assert caught.value.what
    assert caught.value.fix
    for words in says:
        assert words in str(caught.value), caught.value
    assert listing(folder) == before


def changed(folder: Path, change: Change) -> Path:
    model = tiny_model()
    change(model)
    path = folder / "changed.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def weight(model: ModelProto, name: str = "weight") -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _unknown_operator(model: ModelProto) -> None:
    model.graph.node[2].op_type, model.graph.node[2].name = "Rellu", "active/Rellu"


def _foreign_operator(model: ModelProto) -> None:
    model.graph.node[2].domain, model.graph.node[2].name = "com.example", "active/Relu"
    model.opset_import.append(helper.make_opsetid("com.example", 1))


def _foreign_domain(model: ModelProto) -> None:
    model.graph.node[2].domain, model.graph.node[2].op_type = "com.microsoft", "FusedGelu"


def _twice(model: ModelProto) -> None:
    model.graph.node[1].output[0] = model.graph.node[2].input[0] = "features"


def _poison(name: str, value: float) -> Change:
    def poison(model: ModelProto) -> None:
        array = numpy_helper.to_array(weight(model, name)).copy()
        array.reshape(-1)[2] = value
        weight(model, name).CopyFrom(numpy_helper.from_array(array, name))

    return poison


def _poison_constant(model: ModelProto) -> None:
    constant = numpy_helper.from_array(np.array([1, np.nan, 1, 1], np.float32), "k")
    model.graph.node[4].output[0] = "flat"
    model.graph.node.append(helper.make_node("Constant", [], ["k"], name="head/Constant", value=constant))
    model.graph.node.append(helper.make_node("Add", ["flat", "k"], ["logits"]))


def _replace_weight(array: np.ndarray) -> Change:
    return lambda model: weight(model).CopyFrom(numpy_helper.from_array(array, "weight"))


def _set(path: str, value: Any) -> Change:
    """A change that sets one field, such as `graph.node[0].input[0]`."""

    def change(model: ModelProto) -> None:
        owner: Any = model
        *parts, last = re.findall(r"\w+", path)
        for part in parts:
            owner = owner[int(part)] if part.isdigit() else getattr(owner, part)
        if last.isdigit():
            owner[int(last)] = value
        else:
            setattr(owner, last, value)

    return change


GRAPHS: dict[str, tuple[Change, type[EdgekitError], tuple[str, ...]]] = {
    "unknown operator": (_unknown_operator, UnsupportedOpError, ("'Rellu'", "'active/Rellu'", "'ai.onnx'", "did you mean 'Relu'?")),
    "foreign operator": (_foreign_operator, UnsupportedOpError, ("'Relu'", "'active/Relu'", "'com.example'")),
    "foreign domain": (_foreign_domain, UnsupportedOpError, ("'FusedGelu'", "'active'", "'com.microsoft'", "import")),
    "opset of the future": (_set("opset_import[0].version", 99), SourceError, ("opset 99", "pip install -U onnx")),
    "IR version of the future": (_set("ir_version", 99), SourceError, ("IR version 99",)),
    "no opset": (lambda model: model.ClearField("opset_import"), SourceError, ("not a complete ONNX model",)),
    "cycle": (_set("graph.node[0].input[0]", "active"), SourceError, ("cycle", "'features'", "Relu")),
    "node that feeds itself": (_set("graph.node[0].input[0]", "features"), SourceError, ("cycle", "Conv")),
    "undefined input": (_set("graph.node[0].input[1]", "wieght"), SourceError, ("'wieght'", "Conv")),
    "undefined output": (_set("graph.output[0].name", "logit"), SourceError, ("'logit'",)),
    "no nodes": (lambda model: model.graph.ClearField("node"), SourceError, ("'logits'",)),
    "value made twice": (_twice, SourceError, ("'features'",)),
    "node twice": (lambda model: model.graph.node.append(model.graph.node[2]), SourceError, ("'active'",)),
    "input twice": (lambda model: model.graph.input.append(model.graph.input[0]), SourceError, ("'image'",)),
    "initializer twice": (lambda model: model.graph.initializer.append(weight(model)), SourceError, ("'weight'",)),
    "unknown attribute": (_set("graph.node[0].attribute[0].name", "kernel_shap"), SourceError, ("'kernel_shap'", "'kernel_shape'", "Conv")),
    "NaN": (_poison("weight", np.nan), SourceError, ("'weight'", "NaN")),
    "infinity": (_poison("bias", np.inf), SourceError, ("'bias'", "infinite")),
    "minus infinity": (_poison("variance", -np.inf), SourceError, ("'variance'", "infinite")),
    "NaN in a constant": (_poison_constant, SourceError, ("'head/Constant'", "NaN")),
    "too few bytes": (lambda model: setattr(weight(model), "raw_data", weight(model).raw_data[:-4]), SourceError, ("428 bytes", "432")),
    "too many bytes": (lambda model: setattr(weight(model), "raw_data", b"1234" * 109), SourceError, ("436 bytes", "'weight'")),
    "negative dimension": (lambda model: weight(model).dims.__setitem__(0, -4), SourceError, ("'weight'", "[-4, 3, 3, 3]")),
    "huge dimension": (lambda model: weight(model).dims.__setitem__(0, 2**40), SourceError, ("'weight'", "432 bytes")),
    "unknown dtype": (lambda model: setattr(weight(model), "data_type", 77), SourceError, ("77",)),
    "weight of another shape": (_replace_weight(np.ones((4, 5, 3, 3), np.float32)), SourceError, ("Conv",)),
    "weight of another dtype": (_replace_weight(np.ones((4, 3, 3, 3))), SourceError, ("Conv", "double")),
    "output of another dtype": (_set("graph.output[0].type.tensor_type.elem_type", 7), SourceError, ("logits", "int64")),
    "input without a type": (lambda model: model.graph.input[0].ClearField("type"), SourceError, ("'image'", "dtype")),
    "input of unknown dtype": (_set("graph.input[0].type.tensor_type.elem_type", 0), SourceError, ("--input image:1,3,8,8:float32",)),
    "input without a name": (_set("graph.input[0].name", ""), SourceError, ("no name",)),
    "input that is a sequence": (
        lambda model: model.graph.input[0].type.CopyFrom(helper.make_sequence_type_proto(helper.make_tensor_type_proto(1, [1]))),
        SourceError,
        ("'image'", "not a dense tensor"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRAPHS)
def test_wrong_graphs(name: str, tmp_path: Path, worker: Worker) -> None:
    change, kind, says = GRAPHS[name]
    path = changed(tmp_path, change)
    where = () if name.startswith("input ") and "name" not in name and "twice" not in name else (str(path),)
    refused(tmp_path, worker, kind, *says, *where, model=path)


def test_files_that_are_no_model(tiny: Path, tmp_path: Path, worker: Worker) -> None:
    content = tiny.read_bytes()
    path = tmp_path / "x.onnx"
    refused(tmp_path, worker, SourceError, "no such file", str(path), model=path)
    for wrong, says in ((b"", "empty"), (b"hello, world\n" * 9, "not an ONNX model"), (content[: len(content) // 2], "truncated")):
        path.write_bytes(wrong)
        refused(tmp_path, worker, SourceError, says, str(path), model=path)
    path.unlink()
    os.mkfifo(path)
    refused(tmp_path, worker, SourceError, "not a regular file", model=path)
    path.unlink()
    path.mkdir()
    refused(tmp_path, worker, SourceError, "a folder", model=path)
    (tmp_path / "model.tflite").write_bytes(content)
    refused(tmp_path, worker, SourceError, "known endings: .onnx", model=tmp_path / "model.tflite")
    refused(tmp_path, worker, SourceError, "cannot be read", model="nul\0.onnx")
    refused(tmp_path, worker, SourceError, "did you mean 'vit_digits'?", model="vit_digit")


EXTERNAL: dict[str, tuple[str, Callable[[Path, Path], Any], str]] = {
    "missing": ("w.bin", lambda folder, data: None, "is missing"),
    "too short": ("w.bin", lambda folder, data: (folder / "w.bin").write_bytes(data.read_bytes()[:-1]), "too short"),
    "above": ("../w.bin", lambda folder, data: None, "outside the model's folder"),
    "in and out": ("sub/../../w.bin", lambda folder, data: (folder / "sub").mkdir(), "outside the model's folder"),
    "absolute": ("/etc/hostname", lambda folder, data: None, "outside the model's folder"),
    "symbolic link": ("w.bin", lambda folder, data: (folder / "w.bin").symlink_to(data), "symbolic link"),
    "linked folder": ("sub/w.bin", lambda folder, data: (folder / "sub").symlink_to(data.parent), "symbolic link"),
    "hard link": ("w.bin", lambda folder, data: os.link(data, folder / "w.bin"), "hard link"),
}


@pytest.mark.parametrize("name", EXTERNAL)
def test_external_data(name: str, tmp_path: Path, worker: Worker) -> None:
    location, prepare, says = EXTERNAL[name]
    folder = tmp_path / "model"
    folder.mkdir()

    def move_out(model: ModelProto) -> None:
        tensor = weight(model)
        (tmp_path / "w.bin").write_bytes(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    path = changed(folder, move_out)
    prepare(folder, tmp_path / "w.bin")
    refused(tmp_path, worker, SourceError, says, location, "'weight'", str(path), model=path)


def test_external_data_beside_an_old_file_is_read(tmp_path: Path, worker: Worker) -> None:
    model = tiny_model()
    model.opset_import[0].version = 11
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "old.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    artifact = run(tmp_path, worker, path)
    image = np.random.default_rng(0).normal(0, 1, (1, 3, 8, 8)).astype(np.float32)
    (expected,) = ort.InferenceSession(path).run(None, {"image": image})
    np.testing.assert_allclose(artifact.run({"image": image})["logits"], expected, rtol=1e-5, atol=1e-6)


def test_the_newest_ir_version_is_no_obstacle(tmp_path: Path, worker: Worker) -> None:
    path = changed(tmp_path, _set("ir_version", onnx.IR_VERSION))
    assert run(tmp_path, worker, path).report["artifact"]["parity"]["max_abs_error"] < 1e-4


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".ckpt", ".bin"])
def test_pickles_are_not_opened(suffix: str, tmp_path: Path, worker: Worker) -> None:
    path = (tmp_path / "model").with_suffix(suffix)
    path.write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    refused(tmp_path, worker, SourceError, "pickle", str(path), ".safetensors", ".pt2", model=path)
    refused(tmp_path, worker, SourceError, "cannot be read safely", str(path), ".safetensors", model="vit_digits", weights=str(path))
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # it would have been seen


INPUTS: dict[str, tuple[type[EdgekitError], tuple[str, ...]]] = {
    "image:1,5,8,8": (SourceError, ("dimension 1 of input 'image' is fixed to 3, 5 was given", "--input image:1,3,8,8")),
    "image:1,3,8": (SourceError, ("'image' has 4 dimensions, 3 were given", "--input image:1,3,8,8")),
    "imag:1,3,8,8": (SourceError, ("'imag'", "did you mean 'image'?")),
    "image:1,3,8,8:int64": (SourceError, ("'image' takes float32, not int64",)),
    "image:1,3,8,8:flaot": (UsageError, ("'flaot'", "float32")),
    "image:1,3,-8,8": (UsageError, ("does not describe an input", "name:1,3,224,224")),
    "image:0,3,8,8": (UsageError, ("zero",)),
}


@pytest.mark.parametrize("given", INPUTS)
def test_wrong_inputs(given: str, tiny: Path, worker: Worker) -> None:
    kind, says = INPUTS[given]
    refused(tiny.parent, worker, kind, *says, model=tiny, inputs=(given,))


ARRAYS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "shape": ({"image": np.zeros((4, 3, 9, 9), np.float32)}, ("[1, 3, 9, 9]", "[1, 3, 8, 8]", "--input image:1,3,9,9")),
    "rank": ({"image": np.zeros((4, 8, 8), np.float32)}, ("[1, 8, 8]",)),
    "dtype": ({"image": np.zeros((4, 3, 8, 8), complex)}, ("complex128", "float32")),
    "name": ({"imag": np.zeros((4, 3, 8, 8), np.float32), "other": np.zeros(4)}, ("'image'", "imag, other")),
    "NaN": ({"image": np.full((4, 3, 8, 8), np.nan, np.float32)}, ("NaN",)),
    "none": ({"image": np.zeros((0, 3, 8, 8), np.float32)}, ("too few samples",)),
    "pickled": ({"image": np.array([{}], dtype=object)}, ("plain arrays",)),
    "labels": ({"image": np.zeros((4, 3, 8, 8), np.float32), "labels": np.arange(3.0)}, ("'labels' must be 4 whole numbers",)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_wrong_data(name: str, tiny: Path, worker: Worker) -> None:
    arrays, says = ARRAYS[name]
    path = tiny.parent / "data.npz"
    np.savez(path, **arrays)
    refused(tiny.parent, worker, DataError, *says, str(path), model=tiny, data=str(path))


def test_data_that_is_not_there_or_not_data(tiny: Path, worker: Worker) -> None:
    folder = tiny.parent
    refused(folder, worker, DataError, "did you mean 'digits'?", model=tiny, data="digit")
    refused(folder, worker, DataError, "no such file", "none.npz", model=tiny, data="none.npz")
    refused(folder, worker, DataError, "'no_such_package' cannot be imported", model=tiny, data="no_such_package:loader")
    (folder / "cut.npz").write_bytes(b"PK\x03\x04 cut")
    refused(folder, worker, DataError, "plain arrays", model=tiny, data=str(folder / "cut.npz"))
    (folder / "images").mkdir()
    refused(folder, worker, DataError, "no images", model=tiny, data=str(folder / "images"))
    (folder / "images" / "a.png").write_bytes(b"no image")
    refused(folder, worker, DataError, "cannot be read", "a.png", model=tiny, data=str(folder / "images"))


SPECS: dict[str, tuple[dict[str, Any], type[EdgekitError], tuple[str, ...]]] = {
    "pass": ({"passes": ("fold-batchnorm",)}, UsageError, ("'fold-batchnorm'", "did you mean 'fold-batch-norm'?")),
    "option": ({"passes": ("to-float16{keepio=true}",)}, RecipeError, ("'to-float16'", "'keepio'", "did you mean 'keep_io'?")),
    "type": ({"passes": ('to-float16{keep_io="yes"}',)}, RecipeError, ("'keep_io'", "true or false", '"yes"')),
    "quotes": ({"passes": ("to-float16{keep_io=yes}",)}, RecipeError, ("keep_io=yes", "quotes")),
    "braces": ({"passes": ("to-float16{",)}, RecipeError, ("'to-float16{'", "name{option=value")),
    "target": ({"target": "openvin"}, UsageError, ("'openvin'", "did you mean 'openvino'?")),
    "target option": ({"target": "openvino{precison=1}"}, RecipeError, ("'precison'", "did you mean 'precision'?")),
    "target option type": ({"target": "openvino{precision=3}"}, RecipeError, ("'precision'", "a quoted string, not 3")),
    "precision": ({"target": "openvino", "precision": "fp8"}, UsageError, ("'fp8'", "fp32, fp16, bf16")),
}


@pytest.mark.parametrize("name", SPECS)
def test_wrong_names_and_options(name: str, tiny: Path, worker: Worker) -> None:
    recipe, kind, says = SPECS[name]
    refused(tiny.parent, worker, kind, *says, model=tiny, **recipe)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('tagret = "openvino"', "did you mean 'target'?"),
        ('calibration = "8"', "takes a whole number"),
        ("calibration = 0", "at least one"),
        ("threads = 1000000000", "threads"),
        ("max_drop = nan", "max_drop"),
        ("max_drop = -1", "max_drop"),
        ('passes = "to-float16"', "'passes'"),
        ("passes = [", "line"),
    ],
)
def test_wrong_recipes(line: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'model = "tiny.onnx"\ntarget = "onnxruntime"\n{line}\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert says in str(caught.value)
    assert caught.value.fix


OLD: dict[str, tuple[int, str, Callable[[np.ndarray], np.ndarray]]] = {
    "added along an axis": (6, "y = Add<broadcast = 1, axis = 1>(x, k)", lambda x: x + np.array([1.0, 2, 3]).reshape(3, 1)),
    "in training form": (6, "y = Dropout<is_test = 1>(x)", lambda x: x),
    "optimized in place": (5, "a = Exp<consumed_inputs = [0]>(x) y = Relu<consumed_inputs = [0]>(a)", np.exp),
    "reshaped by an attribute": (4, "a = Reshape<shape = [2, 12]>(x) y = Reshape<shape = [2, 3, 4]>(a)", lambda x: x),
    "softmax of all axes": (7, "y = Softmax(x)", lambda x: np.exp(x) / np.exp(x).sum((1, 2), keepdims=True)),
    "clipped by attributes": (6, "y = Clip<min = -0.5, max = 0.75>(x)", lambda x: np.clip(x, -0.5, 0.75)),
    "sloped per channel": (6, "y = PRelu(x, k)", lambda x: np.where(x < 0, x * np.array([1.0, 2, 3]).reshape(3, 1), x)),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", OLD)
def test_an_operator_set_of_2017_is_converted(name: str, target: str, tmp_path: Path, worker: Worker) -> None:
    opset, body, formula = OLD[name]
    header = f'<ir_version: 3, opset_import: ["" : {opset}]> old (float[2, 3, 4] x) => (float[2, 3, 4] y) <float[3] k = {{1, 2, 3}}>'
    path = tmp_path / "old.onnx"
    onnx.save(onnx.parser.parse_model(f"{header} {{ {body} }}"), path)
    artifact = run(tmp_path, worker, path, target=target)
    x = np.random.default_rng(3).normal(0, 1, (2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(artifact.run({"x": x})["y"], formula(x), rtol=1e-5, atol=1e-6)
    assert any(f"opset {opset}" in note for note in artifact.report["notes"]) == (opset < 7)


def test_an_operator_set_of_2017_is_refused_by_name(tmp_path: Path, worker: Worker) -> None:
    text = '<ir_version: 3, opset_import: ["" : 5]> old (float[2] x) => (int32[2] y) { y = Cast<to = "INT32">(x) }'
    path = tmp_path / "old.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    refused(tmp_path, worker, UnsupportedOpError, "'Cast' of opset 5", "'y/Cast'", "export the model again at opset 18", model=path)


def test_output_places(tiny: Path, worker: Worker) -> None:
    folder = tiny.parent
    (folder / "file").touch()
    (folder / "there").mkdir()
    (folder / "dangling").symlink_to("nowhere")
    for out in (folder / "file" / "out", folder / "file" / "deep" / "out"):
        refused(folder, worker, OutputError, f"{folder / 'file'} is not a folder", str(out), "--out", model=tiny, out=out)
    for out in (Path("/proc/out"), Path("/proc/deep/out"), folder / ("x" * 300), folder / "nul\0", folder / "dangling" / "out"):
        refused(folder, worker, OutputError, "cannot be written", str(out), "--out", model=tiny, out=out)
    for out in (folder / "there", folder / "file", folder / "dangling", Path("/")):
        refused(folder, worker, OutputError, "exists", str(out), "--force", model=tiny, out=out)
