"""Packages that anybody wrote: what is wrong with one is told, and nothing is guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from edgekit.errors import EdgekitError, LoweringError, SourceError, UnsupportedOpError, UsageError
from edgekit.targets.coreml import predict
from edgekit.targets.coreml.reference.evaluator import Evaluator
from edgekit.targets.coreml.reference.package import open_package
from tests.targets.coreml.packages import conv_package, half_package, state_package

MODEL = Path("Data") / "com.apple.CoreML" / "model.mlmodel"
WEIGHTS = Path("Data") / "com.apple.CoreML" / "weights" / "weight.bin"
X = {"x": np.ones((1, 3, 8, 8), np.float32)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conv_package(tmp_path_factory.mktemp("whole") / "net.mlpackage")


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "net.mlpackage")
    return tmp_path / "net.mlpackage"


def edit(package: Path, change) -> None:
    opened = open_package(package)
    change(opened.spec)
    (package / MODEL).write_bytes(opened.spec.SerializeToString())


def fails(package: Path, kind: type[EdgekitError], says: str, inputs=X) -> None:
    with pytest.raises(kind, match=says) as caught:
        predict(package, inputs)
    assert caught.value.fix


def test_it_runs(package: Path) -> None:
    assert predict(package, X)["y"].shape == (1, 16, 8, 8)


def test_truncated_anywhere_in_the_model_file(package: Path) -> None:
    content = (package / MODEL).read_bytes()
    for size in (0, 1, 7, len(content) // 3, len(content) // 2, len(content) - 3):
        (package / MODEL).write_bytes(content[:size])
        with pytest.raises((SourceError, UnsupportedOpError)):
            predict(package, X)


def test_truncated_weights(package: Path) -> None:
    content = (package / WEIGHTS).read_bytes()
    for size in (0, 10, 64, len(content) // 2, len(content) - 100):
        (package / WEIGHTS).write_bytes(content[:size])
        fails(package, SourceError, "weights are damaged")


def test_missing_parts(package: Path, tmp_path: Path) -> None:
    fails(tmp_path / "nowhere.mlpackage", SourceError, "no such package")
    (tmp_path / "file.mlpackage").write_bytes(b"x")
    fails(tmp_path / "file.mlpackage", SourceError, "a file, not a .mlpackage folder")
    (tmp_path / "empty.mlpackage").mkdir()
    fails(tmp_path / "empty.mlpackage", SourceError, "no Manifest.json")
    (package / WEIGHTS).unlink()
    fails(package, SourceError, "is missing from the package")
    (package / MODEL).unlink()
    fails(package, SourceError, "model file is missing")
    (package / "Manifest.json").write_text("{")
    fails(package, SourceError, "Manifest.json is damaged")


def test_a_manifest_that_leaves_the_package(package: Path) -> None:
    manifest = json.loads((package / "Manifest.json").read_text())
    manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"] = "../../other"
    (package / "Manifest.json").write_text(json.dumps(manifest))
    fails(package, SourceError, "outside the package")


def test_weights_outside_the_package(package: Path) -> None:
    def outside(spec) -> None:
        for function in spec.mlProgram.functions.values():
            for block in function.block_specializations.values():
                for operation in block.operations:
                    value = operation.attributes.get("val")
                    if value is not None and value.WhichOneof("value") == "blobFileValue":
                        value.blobFileValue.fileName = "@model_path/../../../../../etc/passwd"

    edit(package, outside)
    fails(package, SourceError, "outside its package")


def test_newer_specification(package: Path) -> None:
    edit(package, lambda spec: setattr(spec, "specificationVersion", 99))
    fails(package, SourceError, "specification 99")


def test_no_ml_program(package: Path) -> None:
    edit(package, lambda spec: spec.neuralNetwork.layers.add(name="layer"))
    fails(package, UnsupportedOpError, "type 'neuralNetwork', not an ML Program")


def operations(spec):
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    return [operation for operation in block.operations if operation.type != "const"]


def test_unknown_operators_are_named(package: Path) -> None:
    edit(package, lambda spec: setattr(operations(spec)[0], "type", "custom_layer"))
    fails(package, UnsupportedOpError, "'custom_layer'")


def test_a_value_that_nothing_defines(package: Path) -> None:
    edit(package, lambda spec: setattr(operations(spec)[-1].inputs["x"].arguments[0], "name", "ghost"))
    fails(package, SourceError, "reads 'ghost', which nothing before it defines")


def test_shapes_that_do_not_fit(package: Path) -> None:
    def narrower(spec) -> None:
        spec.mlProgram.functions["main"].inputs[0].type.tensorType.dimensions[1].constant.size = 4

    edit(package, narrower)
    fails(package, LoweringError, "'conv' cannot be computed", {"x": np.ones((1, 4, 8, 8), np.float32)})


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "'x' is missing"),
        ({"y": X["x"]}, "no input 'y'"),
        ({"x": X["x"][0]}, "shape"),
        ({"x": X["x"].astype(np.float64)}, "float32"),
        ({"x": X["x"].tolist()}, "expected float32"),
    ],
)
def test_wrong_inputs(package: Path, inputs, says: str) -> None:
    fails(package, UsageError, says, inputs)


def test_functions_by_name(package: Path) -> None:
    with pytest.raises(UsageError, match="no function 'mian'"):
        predict(package, X, function="mian")
    assert Evaluator(package, "main").name == "main"


def test_states_are_changed_in_place(tmp_path: Path) -> None:
    evaluator = Evaluator(state_package(tmp_path / "state.mlpackage"))
    state, ones = evaluator.new_state(), {"x": np.ones((1, 4), np.float16)}
    first, second = evaluator.run(ones, state)["y"], evaluator.run(ones, state)["y"]
    np.testing.assert_array_equal(np.stack([first, second])[:, 0, 0], [2, 4])
    np.testing.assert_array_equal(state["total"], np.full((1, 4), 2, np.float16))
    np.testing.assert_array_equal(evaluator.run(ones)["y"], first)
    with pytest.raises(UsageError, match=r"no input 'sum'|missing"):
        evaluator.run(ones, {"sum": state["total"]})


def test_float16_is_rounded_after_each_operation_and_not_within_one(tmp_path: Path) -> None:
    """1 + 2^-11 is 1 in float16, twice; rounded once only, it would be 1 + 2^-10. 300² exceeds float16, the norm of 300s does not."""
    evaluator = Evaluator(half_package(tmp_path / "half.mlpackage"))
    ones, small = np.ones(4, np.float16), np.full(4, 2.0**-11, np.float16)
    np.testing.assert_array_equal(evaluator.run({"x": ones, "small": small})["y"], ones)
    found = evaluator.run({"x": ones * 300, "small": small})["norm"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.array([600], np.float16))
