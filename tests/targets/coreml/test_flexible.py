"""Packages for inputs of several shapes, from graphs with symbolic dimensions: the evaluator at other shapes against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import edgekit
from edgekit.artifact import Artifact
from edgekit.compiler import Timing
from edgekit.errors import EdgekitError, UnsupportedOpError, UsageError
from edgekit.targets.coreml import predict
from edgekit.targets.coreml.reference.package import open_package

RNG = np.random.default_rng(0)
CONVOLUTIONS = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[batch,3,height,width] image) => (float[batch,4] scores, float[batch,8,h,w] features)
{
    mixed = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(image, kernel)
    features = Relu(mixed)
    pooled = GlobalAveragePool(features)
    flat = Flatten(pooled)
    scores = MatMul(flat, head)
}
"""
ENCODER = """
<ir_version: 10, opset_import: ["" : 23]>
net (int64[batch,length] ids, int64[batch,length] mask) => (float[batch,8] sentence)
{
    words = Gather(table, ids)
    shape = Shape(ids)
    length = Gather(shape, one)
    lengths = Unsqueeze(length, zeros)
    places = Slice(positions, zeros, lengths, zeros)
    x = Add(words, places)
    qkv = MatMul(x, mix)
    q, k, v = Split<axis = -1, num_outputs = 3>(qkv)
    wide = Unsqueeze(mask, ones)
    kept = Cast<to = 9>(wide)
    bias = Where(kept, zero, low)
    k_t = Transpose<perm = [0, 2, 1]>(k)
    logits = MatMul(q, k_t)
    masked = Add(logits, bias)
    weights = Softmax(masked)
    y = MatMul(weights, v)
    sentence = ReduceMean<keepdims = 0>(y, ones)
}
"""
ARRAYS = {
    "kernel": RNG.normal(size=(8, 3, 3, 3)).astype(np.float32) / 4, "head": RNG.normal(size=(8, 4)).astype(np.float32),
    "table": RNG.normal(size=(2, 8)).astype(np.float32), "positions": RNG.normal(size=(64, 8)).astype(np.float32),
    "mix": RNG.normal(size=(8, 24)).astype(np.float32) / 3, "zero": np.float32(0), "low": np.float32(-1e4),
    "one": np.int64(1), "zeros": np.array([0]), "ones": np.array([1]),
}  # fmt: skip


def written(text: str, folder: Path, **arrays: np.ndarray) -> Path:
    model = onnx.parser.parse_model(text)
    read = {name for node in model.graph.node for name in node.input}
    given = {name: array for name, array in (ARRAYS | arrays).items() if name in read}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in given.items())
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


def compiled(path: Path, *inputs: str, options: str = 'precision="fp32"') -> Artifact:
    return edgekit.compile(
        path, target=f"coreml{{{options}}}", inputs=inputs, out=path.parent / "out.edgekit", timing=Timing(0), force=True
    )


def differ(artifact: Artifact, path: Path, feeds: dict[str, np.ndarray]) -> float:
    """The largest difference of the package, through the public evaluator, to ONNX Runtime on the file with its symbolic dimensions."""
    session = ort.InferenceSession(path)
    expected = dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))
    given = {name: array.astype(np.int32) if array.dtype == np.int64 else array for name, array in feeds.items()}
    results = predict(artifact.path / "model.mlpackage", given)
    assert {name: array.shape for name, array in results.items()} == {name: array.shape for name, array in expected.items()}
    return max(float(np.abs(results[name] - array).max()) for name, array in expected.items())


def description(artifact: Artifact, name: str) -> Any:
    spec = open_package(artifact.path / "model.mlpackage").spec
    return next(feature for feature in (*spec.description.input, *spec.description.output) if feature.name == name).type


def test_ranges_of_batch_height_and_width(tmp_path: Path) -> None:
    path = written(CONVOLUTIONS, tmp_path)
    artifact = compiled(path, "image:1..6,3,8..40,8..40")
    for shape in ((1, 3, 8, 8), (6, 3, 40, 40), (3, 3, 17, 26), (2, 3, 9, 40)):
        assert differ(artifact, path, {"image": RNG.normal(size=shape).astype(np.float32)}) < 1e-5
    spans = description(artifact, "image").multiArrayType.shapeRange.sizeRanges
    assert [(span.lowerBound, span.upperBound) for span in spans] == [(1, 6), (3, 3), (8, 40), (8, 40)]
    assert not description(artifact, "features").multiArrayType.shape
    with pytest.raises(UsageError, match="does not take"):
        artifact.run({"image": np.zeros((7, 3, 8, 8), np.float32)})
    checked = [tuple(check["inputs"]["image"]) for check in artifact.report["artifact"]["shapes"]]
    assert {(6, 3, 40, 40), (1, 3, 8, 8), (2, 3, 40, 40), (6, 3, 8, 40), (6, 3, 40, 8)} < set(checked)


def test_a_text_encoder_of_any_length(tmp_path: Path) -> None:
    """The mask was not described: its dimensions bear the names of the others. Positions are cut from the table for the longest."""
    path = written(ENCODER, tmp_path)
    artifact = compiled(path, "ids:1..3,1..20")
    for batch, length in ((1, 1), (3, 20), (2, 13), (1, 20)):
        ids, mask = RNG.integers(0, 2, (batch, length)), RNG.integers(0, 2, (batch, length))
        mask[:, 0] = 1
        assert differ(artifact, path, {"ids": ids, "mask": mask}) < 1e-5
    spans = description(artifact, "mask").multiArrayType.shapeRange.sizeRanges
    assert [(span.lowerBound, span.upperBound) for span in spans] == [(1, 3), (1, 20)]


def test_listed_shapes_of_an_image(tmp_path: Path) -> None:
    path = written(CONVOLUTIONS, tmp_path)
    artifact = compiled(path, "image:1,3,16|24|12,16|20|32", options='precision="fp32",image_inputs=["image:0.5,-1,RGB"]')
    image = description(artifact, "image").imageType
    assert (image.height, image.width) == (16, 16)
    assert [(size.height, size.width) for size in image.enumeratedSizes.sizes] == [(16, 16), (24, 20), (12, 32)]
    pixels = RNG.integers(0, 256, (1, 3, 12, 32)).astype(np.float32)
    (expected,) = ort.InferenceSession(path).run(["scores"], {"image": pixels * np.float32(0.5) - 1})
    found = predict(artifact.path / "model.mlpackage", {"image": pixels})["scores"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="does not take"):
        predict(artifact.path / "model.mlpackage", {"image": np.zeros((1, 3, 24, 32), np.float32)})


@pytest.mark.slow
def test_listed_shapes_of_several_inputs_need_ios18(tmp_path: Path) -> None:
    path = written(ENCODER, tmp_path)
    artifact = compiled(path, "ids:1,4|8", "mask:1,4|8")
    shapes = [tuple(shape.shape) for shape in description(artifact, "mask").multiArrayType.enumeratedShapes.shapes]
    assert shapes == [(1, 4), (1, 8)]
    assert artifact.report["target"]["facts"]["deployment_target"] == "iOS18"
    with pytest.raises(UnsupportedOpError, match="iOS18"):
        compiled(path, "ids:1,4|8", options='deployment_target="iOS17"')


def test_coremltools_reads_the_program(tmp_path: Path) -> None:
    """Its own type inference, with symbols for the sizes, accepts every operation that computes a size."""
    from coremltools.converters.mil.frontend.milproto.load import load

    artifact = compiled(written(ENCODER, tmp_path), "ids:1..3,1..20")
    package = open_package(artifact.path / "model.mlpackage")
    program = load(package.spec, specification_version=package.spec.specificationVersion, file_weights_dir=str(package.weights / "weights"))
    (output,) = program.functions["main"].outputs
    assert len(output.shape) == 2
    assert output.shape[1] == 8


@pytest.mark.slow
def test_compressed_weights_and_float16(tmp_path: Path) -> None:
    path = written(CONVOLUTIONS, tmp_path)
    artifact = compiled(path, "image:1..4,3,16,16", options='weights="palette4"')
    one = compiled(path, "image:4,3,16,16", options='weights="palette4"')
    feeds = {"image": RNG.normal(size=(4, 3, 16, 16)).astype(np.float32)}
    several = artifact.run(feeds)
    for name, array in one.run(feeds).items():
        np.testing.assert_array_equal(several[name], array)


def test_weights_that_depend_on_the_shape_are_refused_by_name(tmp_path: Path) -> None:
    """A position table that is resized to the image: its numbers differ at every size."""
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float[1,2,height,width] x) => (float[1,2,height,width] y)
    {
        shape = Shape(x)
        resized = Resize<mode = "linear">(places, , , shape)
        y = Add(x, resized)
    }
    """
    path = written(text, tmp_path, places=RNG.normal(size=(1, 2, 4, 4)).astype(np.float32))
    with pytest.raises(UnsupportedOpError, match="other numbers") as caught:
        compiled(path, "x:1,2,6..12,6..12")
    assert caught.value.where
    assert not (tmp_path / "out.edgekit").exists()


EVERY_FOURTH = """
    shape = Shape(x)
    length = Gather(shape, last)
    over = Mod(length, four)
    lack = Sub(four, over)
    rest = Mod(lack, four)
    pads = Concat<axis = 0>(none, rest)
    y = Pad(x, pads)
"""


@pytest.mark.parametrize("text", [
    "y = MaxPool<kernel_shape = [2], strides = [2], ceil_mode = 1>(x)",
    'y = Conv<auto_pad = "SAME_UPPER", strides = [2], kernel_shape = [3]>(x, taps)',
    EVERY_FOURTH,
])  # fmt: skip
@pytest.mark.parametrize("sizes", ["2..18", "4..36"])
def test_what_depends_on_remainders_is_refused_or_right(text: str, sizes: str, tmp_path: Path) -> None:
    """Ends and middle are all even, or all multiples of four: rules that only hold there must not be taken for the truth."""
    extra = {"taps": np.ones((3, 2, 3), np.float32), "last": np.array([2]), "four": np.array([4]), "none": np.zeros(5, np.int64)}
    header = '<ir_version: 10, opset_import: ["" : 23]> net (float[1,2,length] x) => (float[1,channels,result] y)'
    path = written(f"{header} {{ {text} }}", tmp_path, **extra)
    with pytest.raises(UnsupportedOpError) as caught:
        compiled(path, f"x:1,2,{sizes}")
    assert caught.value.where
    assert not (tmp_path / "out.edgekit").exists()


def test_a_model_that_does_not_run_at_another_shape(tmp_path: Path) -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    net (float[n,4] x) => (float[n,4] y) { y = Add(x, pair) }
    """
    path = written(text, tmp_path, pair=np.ones((2, 4), np.float32))
    with pytest.raises(EdgekitError) as caught:
        compiled(path, "x:2..5,4")
    assert "5×4" in str(caught.value.where)
