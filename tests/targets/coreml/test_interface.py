"""Names, types, images, class labels and states of a package, run in the evaluator against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgekit.errors import UnsupportedOpError, UsageError
from edgekit.targets.coreml import CoreMl, predict
from edgekit.targets.coreml.images import ImageInput, parse_images
from edgekit.targets.coreml.interface import Wishes, parse_states, read_labels
from tests.targets.coreml.lowered import check, lower, run

IMAGE = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[1,3,4,4] pixels) => (float[1,3] scores) { pooled = GlobalAveragePool(pixels) scores = Flatten(pooled) }
"""
CACHE = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[1,4] x, float[1,4] past) => (float[1,4] y, float[1,4] present) { present = Add(x, past) y = Mul(present, two) }
"""


def parsed(text: str, **constants: float) -> onnx.ModelProto:
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.float32(value), name) for name, value in constants.items())
    return model


def test_types_that_core_ml_lacks_and_names_that_it_refuses() -> None:
    """Scalars, bool, int64, uint8 and float64 come back in their ONNX types; names are cleaned, and unique."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float s, bool[2] b, int64[2] i, uint8[2] u, double[2] d) => (float t, bool[2] c, int64[2] j, uint8[2] v, double[2] e)
    { t = Neg(s) c = Not(b) j = Neg(i) v = Identity(u) e = Neg(d) }
    """
    model = parsed(text)
    for value, name in zip(model.graph.input, ["a.b", "a/b", "a:b", "3", "a_b"], strict=True):
        for node in model.graph.node:
            node.input[:] = [name if item == value.name else item for item in node.input]
        value.name = name
    feeds = {"a.b": np.float32(2), "a/b": np.array([True, False]), "a:b": np.array([3, -4]), "3": np.array([5, 255], np.uint8)}
    feeds = {name: np.asarray(array) for name, array in feeds.items()} | {"a_b": np.array([0.5, -0.25])}
    converted = check(model, feeds)
    names = [port.name for port in converted.interface.inputs]
    assert len(set(names)) == 5
    assert all(name.isidentifier() for name in names)
    with pytest.raises(UsageError, match="beyond 32 bits"):
        run(converted, feeds | {"a:b": np.array([2**40, 0])})


@pytest.mark.parametrize(("colour", "bias"), [("RGB", "-0.5/-0.25/0.125"), ("BGR", "-0.5"), ("RGB", "0")])
def test_images_take_pixels(colour: str, bias: str, tmp_path: Path) -> None:
    images = parse_images([f"pixels:0.0078125,{bias},{colour}"])
    converted = lower(parsed(IMAGE), wishes=Wishes(images=images))
    (feature,) = converted.model.get_spec().description.input
    assert feature.type.WhichOneof("Type") == "imageType"
    pixels = np.random.default_rng(0).integers(0, 256, (1, 3, 4, 4)).astype(np.float32)
    converted.model.save(str(tmp_path / "net.mlpackage"))
    expected = pixels.mean((2, 3)) * 0.0078125 + np.array(images[0].bias)
    np.testing.assert_allclose(predict(tmp_path / "net.mlpackage", {"pixels": pixels})["scores"], expected, atol=1e-5)
    x = np.random.default_rng(1).normal(size=(1, 3, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(run(converted, {"pixels": x})["scores"], x.mean((2, 3)), atol=1e-5)


def test_grayscale() -> None:
    text = IMAGE.replace("float[1,3,4,4]", "float[1,1,4,4]").replace("float[1,3] scores", "float[1,1] scores")
    x = np.random.default_rng(1).normal(size=(1, 1, 4, 4)).astype(np.float32)
    converted = lower(parsed(text), wishes=Wishes(images=(ImageInput("pixels", 0.5, (1.0,), "GRAYSCALE"),)))
    np.testing.assert_allclose(run(converted, {"pixels": x})["scores"], x.mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pixels", "describes no image input"),
        ("pixels:1,0", "describes no image input"),
        ("pixels:1,0,CMYK", "no layout of colours"),
        ("pixels:one,0,RGB", "no number"),
        ("pixels:0,0,RGB", "no pixel can have"),
        ("pixels:1,nan,RGB", "no pixel can have"),
        ("pixels:1,0/0,RGB", "2 biases"),
    ],
)
def test_images_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        CoreMl(image_inputs=(text,))


def test_inputs_that_cannot_be_images() -> None:
    with pytest.raises(UsageError, match="no input 'pixel'"):
        lower(parsed(IMAGE), wishes=Wishes(images=(ImageInput("pixel", 1, (0.0,) * 3, "RGB"),)))
    with pytest.raises(UsageError, match="cannot be a GRAYSCALE image"):
        lower(parsed(IMAGE), wishes=Wishes(images=(ImageInput("pixels", 1, (0.0,), "GRAYSCALE"),)))


def test_class_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\n dog \n\nbird\n")
    labels = read_labels(str(tmp_path / "labels.txt"))
    converted = lower(parsed(IMAGE), wishes=Wishes(labels=labels))
    x = np.zeros((1, 3, 4, 4), np.float32)
    x[0, 1] = 2
    np.testing.assert_array_equal(run(converted, {"pixels": x})["scores"], [[0, 2, 0]])
    converted.model.save(str(tmp_path / "net.mlpackage"))
    found = predict(tmp_path / "net.mlpackage", {"pixels": x})
    assert found["classLabel"] == "dog"
    assert {"cat": 0.0, "dog": 2.0, "bird": 0.0} in found.values()


def test_labels_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 class labels do not fit"):
        lower(parsed(IMAGE), wishes=Wishes(labels=("cat", "dog")))
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    with pytest.raises(UsageError, match="'cat' is named twice"):
        read_labels(str(tmp_path / "twice.txt"))
    with pytest.raises(UsageError, match="cannot be read"):
        read_labels(str(tmp_path / "none.txt"))


def test_states_keep_a_cache_between_calls(tmp_path: Path) -> None:
    converted = lower(parsed(CACHE, two=2), wishes=Wishes(states=parse_states(["past=present"])))
    assert converted.version == "iOS18"
    assert "a state" in str(converted.needs["iOS18"])
    feeds = {"x": np.ones((1, 4), np.float32), "past": np.full((1, 4), 3, np.float32)}
    found = run(converted, feeds)
    np.testing.assert_array_equal(found["y"], np.full((1, 4), 8))
    np.testing.assert_array_equal(found["present"], np.full((1, 4), 4))
    converted.model.save(str(tmp_path / "net.mlpackage"))
    state = {"past": np.zeros((1, 4), np.float16)}
    for call in range(1, 4):
        np.testing.assert_array_equal(predict(tmp_path / "net.mlpackage", {"x": feeds["x"]}, state)["y"], np.full((1, 4), 2 * call))


def test_states_that_are_none() -> None:
    with pytest.raises(UsageError, match="names no state"):
        CoreMl(states=("past",))
    with pytest.raises(UsageError, match="no output 'presents'"):
        lower(parsed(CACHE, two=2), wishes=Wishes(states=(("past", "presents"),)))
    with pytest.raises(UnsupportedOpError, match="a state needs iOS18"):
        lower(parsed(CACHE, two=2), version="iOS17", wishes=Wishes(states=(("past", "present"),)))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("net (float[1,1,1,1,1,2] x) => (float[1,1,1,1,1,2] y) { y = Neg(x) }", "rank 5 at most"),
        ("net (float[0,2] x) => (float[0,2] y) { y = Neg(x) }", "empty tensors"),
        ("net (string[2] x) => (string[2] y) { y = Identity(x) }", "type STRING"),
        ("net (float[N,2] x) => (float[N,2] y) { y = Neg(x) }", "shape and type of every input"),
    ],
)
def test_inputs_that_core_ml_lacks(text: str, says: str) -> None:
    with pytest.raises(UnsupportedOpError, match=says):
        lower(parsed('<ir_version: 10, opset_import: ["" : 23]>' + text))
