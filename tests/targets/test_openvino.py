"""OpenVINO artifacts give the values of ONNX Runtime and PyTorch, keep names and dtypes, and say in which precision they execute."""

import math
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper

from edgekit.errors import LoweringError, MissingToolError, UnsupportedOpError, UsageError
from edgekit.targets.openvino import OpenVino

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 8)).astype(np.float32)
W = (RNG.standard_normal((8, 8)) / 3).astype(np.float32)
MATMUL_GELU = [helper.make_node("MatMul", ["x", "w"], ["a"]), helper.make_node("Gelu", ["a"], ["y"])]


def test_values_of_a_pytorch_module(tmp_path):
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.Hardswish(),
        torch.nn.Flatten(),
        torch.nn.Linear(128, 5),
    ).eval()
    image = torch.randn(2, 3, 8, 8)
    program = torch.onnx.export(module, (image,), dynamo=True, opset_version=23, optimize=False, verbose=False)
    model = ir.from_proto(program.model_proto)
    target = OpenVino()
    target.legalize(model)
    target.lower(model, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]
    with torch.no_grad():
        expected = module(image).numpy()
    for _ in range(2):  # loaded anew from the folder each time
        executable = target.load(tmp_path, 1)
        (result,) = executable.run({model.graph.inputs[0].name: image.numpy()}).values()
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_facts_tell_the_precision_that_the_numbers_show(graphs, through, tmp_path, precision):
    executable = through(OpenVino(precision=precision), graphs.build(MATMUL_GELU, {"x": X}, constants={"w": W}))
    result = executable.run({"x": X})["y"].astype(np.float64)
    assert executable.facts["asked_precision"] == precision
    assert precision == "fp32" or executable.facts["executed_precision"] in ("fp32", precision)
    stored = W.astype(np.float16) if precision == "fp16" else W
    product = X.astype(np.float64) @ stored.astype(np.float64)
    error = np.abs(result - product * 0.5 * (1 + np.vectorize(math.erf)(product / math.sqrt(2)))).max()
    assert (error < 1e-5) == (executable.facts["executed_precision"] == "fp32")
    assert (tmp_path / "model.bin").stat().st_size == W.size * (2 if precision == "fp16" else 4)


def test_precision_settings_leave_nothing_to_the_plugin(graphs, through, tmp_path):
    import openvino as ov

    from edgekit.targets.openvino.executable import settings

    through(OpenVino(), graphs.build(MATMUL_GELU, {"x": X}, constants={"w": W}))
    compiled = ov.Core().compile_model(tmp_path / "model.xml", "CPU", settings("fp32", 1))
    assert compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    for cache in ("KV_CACHE_PRECISION", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION", "INFERENCE_PRECISION_HINT"):
        assert compiled.get_property(cache) == ov.Type.f32
    assert compiled.get_property("NUM_STREAMS") == 1


def test_interface_keeps_names_dtypes_and_order(graphs, through):
    """Scalars, integers and booleans; an input passed straight to an output; a no-op that OpenVINO merges into its input."""
    inputs = {"z": X, "scale": np.array(3, np.float32), "ids": np.array([2, -1], np.int64), "flag": np.array([True, False])}
    nodes = [
        helper.make_node("Dropout", ["z"], ["copy"]),
        helper.make_node("Reshape", ["z", "same"], ["a_first_in_the_alphabet"]),
        helper.make_node("Mul", ["a_first_in_the_alphabet", "scale"], ["scaled"]),
        helper.make_node("Neg", ["ids"], ["negative"]),
        helper.make_node("Not", ["flag"], ["inverse"]),
        helper.make_node("Mul", ["scale", "scale"], ["square"]),
    ]
    outputs = ["scaled", "copy", "negative", "inverse", "square"]
    model = graphs.build(nodes, inputs, outputs, {"same": np.array([2, 5, 8])})
    result = through(OpenVino(), model).run(inputs)
    expected = graphs.reference(model, inputs)
    assert list(result) == outputs
    for name in outputs:
        assert result[name].dtype == expected[name].dtype
        assert result[name].shape == expected[name].shape
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-6)


def test_outputs_are_copies(graphs, through):
    executable = through(OpenVino(), graphs.build(MATMUL_GELU, {"x": X}, constants={"w": W}))
    first = executable.run({"x": X})["y"]
    kept = first.copy()
    executable.run({"x": -X})
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(executable.run({"x": np.asfortranarray(X)})["y"], kept)


@pytest.mark.parametrize("feed", [{}, {"x": X, "y": X}, {"x": X.astype(np.float64)}, {"x": X[0]}, {"x": X.tolist()}])
def test_wrong_feeds_are_refused(graphs, through, feed):
    executable = through(OpenVino(), graphs.build(MATMUL_GELU, {"x": X}, constants={"w": W}))
    with pytest.raises(UsageError, match=r"input '[xy]'"):
        executable.run(feed)


def test_integers_beyond_32_bits_are_refused(graphs, through):
    ids = np.array([1, 2], np.int64)
    executable = through(OpenVino(), graphs.build([helper.make_node("Neg", ["ids"], ["y"])], {"ids": ids}))
    np.testing.assert_array_equal(executable.run({"ids": ids})["y"], [-1, -2])
    with pytest.raises(UsageError, match="32 bits"):
        executable.run({"ids": np.array([1, 2**31])})


def test_unknown_operator_is_named_with_its_node(graphs, through, tmp_path):
    nodes = [helper.make_node("Det", ["x"], ["d"], name="head/Det"), helper.make_node("Relu", ["d"], ["y"])]
    with pytest.raises(UnsupportedOpError, match="Det") as caught:
        through(OpenVino(), graphs.build(nodes, {"x": np.eye(3, dtype=np.float32)}))
    assert "head/Det" in caught.value.where
    assert not list(tmp_path.iterdir())


def test_failed_conversion_gives_the_reason(graphs, through):
    pads = np.array([0, 0, 1, 0, 0, 1])
    with pytest.raises(UnsupportedOpError, match=r"Pad.*wrap"):
        through(OpenVino(), graphs.build([helper.make_node("Pad", ["x", "p"], ["y"], mode="wrap")], {"x": X}, constants={"p": pads}))


def test_functions_are_inlined(graphs, through):
    body = helper.make_function(
        "edgekit", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 23)]
    )
    model = graphs.build([helper.make_node("Twice", ["x"], ["y"], domain="edgekit")], {"x": X}, functions=[body], domains=["edgekit"])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, X.shape))
    np.testing.assert_array_equal(through(OpenVino(), model).run({"x": X})["y"], 2 * X)


def test_large_weights_pass_through_external_data(graphs, through, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.graph.files.INLINE_LIMIT", 100)
    model = graphs.build(MATMUL_GELU, {"x": X}, constants={"w": np.tile(W, (1, 40))})
    result = through(OpenVino(), model).run({"x": X})["y"]
    np.testing.assert_allclose(result, graphs.reference(model, {"x": X})["y"], rtol=1e-4, atol=1e-5)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.bin", "model.xml"]


def test_missing_package_gives_the_command(graphs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingToolError) as caught:
        OpenVino().load(tmp_path, 1)
    assert caught.value.fix == "pip install -c constraints.txt 'edgekit[openvino]'"


def test_missing_and_damaged_artifacts(graphs, through, tmp_path):
    with pytest.raises(UsageError, match="missing"):
        OpenVino().load(tmp_path, 1)
    through(OpenVino(), graphs.build(MATMUL_GELU, {"x": X}, constants={"w": W}))
    (tmp_path / "model.xml").write_text("<net")
    with pytest.raises(LoweringError):
        OpenVino().load(tmp_path, 1)
    with pytest.raises(UsageError, match="0 threads"):
        OpenVino().load(tmp_path, 0)
