"""The ONNX Runtime target is the reference: it computes in float32 whatever its library's defaults are, and refuses what it cannot."""

import numpy as np
import pytest
from onnx import helper

from edgekit.errors import LoweringError, UnsupportedOpError, UsageError
from edgekit.targets.onnxruntime import OnnxRuntime

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 64)).astype(np.float32)
RELU = [helper.make_node("Relu", ["x"], ["y"])]


def test_values_files_and_feeds(graphs, through, tmp_path):
    executable = through(OnnxRuntime(), graphs.build(RELU, {"x": X}), threads=2)
    np.testing.assert_array_equal(executable.run({"x": X})["y"], np.maximum(X, 0))
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    assert executable.facts["provider"] == "CPUExecutionProvider"
    with pytest.raises(UsageError, match="float64"):
        executable.run({"x": X.astype(np.float64)})
    np.testing.assert_array_equal(OnnxRuntime().load(tmp_path, 1).run({"x": -X})["y"], np.maximum(-X, 0))


def test_large_weights_lie_beside_the_model(graphs, through, tmp_path, monkeypatch):
    monkeypatch.setattr("edgekit.graph.files.INLINE_LIMIT", 100)
    weight = RNG.standard_normal((64, 300)).astype(np.float32)
    executable = through(OnnxRuntime(), graphs.build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": X}, constants={"w": weight}))
    np.testing.assert_allclose(executable.run({"x": X})["y"], X.astype(np.float64) @ weight, rtol=1e-4, atol=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


def test_products_with_dequantized_weights_stay_float32(graphs, through):
    weight = RNG.integers(-128, 128, (64, 8)).astype(np.int8)
    scale = (RNG.random(8) + 0.1).astype(np.float32)
    nodes = [helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=1), helper.make_node("MatMul", ["x", "d"], ["y"])]
    executable = through(OnnxRuntime(), graphs.build(nodes, {"x": X}, constants={"w": weight, "s": scale, "z": np.zeros(8, np.int8)}))
    np.testing.assert_allclose(executable.run({"x": X})["y"], X.astype(np.float64) @ (weight * scale), rtol=1e-4, atol=2e-3)


def test_quantized_products_do_not_saturate(graphs, through):
    weight = RNG.integers(-128, 128, (64, 8)).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"]),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    constants = {"s": np.float32(0.02), "z": np.uint8(128), "w": weight, "ws": np.float32(0.01)}
    executable = through(OnnxRuntime(), graphs.build(nodes, {"x": X}, constants=constants))
    rounded = (np.clip(np.round(X / np.float32(0.02)) + 128, 0, 255) - 128) * 0.02
    np.testing.assert_allclose(executable.run({"x": X})["y"], rounded @ (weight * 0.01), rtol=1e-4, atol=1e-3)


def test_saturating_integer_products_are_refused(graphs, through):
    inputs = {"a": np.zeros((2, 8), np.uint8), "b": np.zeros((8, 3), np.int8)}
    with pytest.raises(UnsupportedOpError, match="saturates"):
        through(OnnxRuntime(), graphs.build([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], inputs))


def test_missing_kernel_is_named_with_its_node(graphs, through, tmp_path):
    node = helper.make_node("GlobalLpPool", ["x"], ["y"], name="neck/pool")
    with pytest.raises(UnsupportedOpError, match="GlobalLpPool") as caught:
        through(OnnxRuntime(), graphs.build([node], {"x": np.zeros((1, 2, 3), np.float32)}))
    assert "neck/pool" in caught.value.where
    assert not list(tmp_path.iterdir())


def test_unknown_domain_is_named(graphs, through):
    model = graphs.build([helper.make_node("Foo", ["x"], ["y"], domain="my.own")], {"x": X}, domains=["my.own"])
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", 1, X.shape))
    with pytest.raises(UnsupportedOpError, match="Foo"):
        through(OnnxRuntime(), model)


def test_newer_ir_version_is_lowered_and_newer_opset_refused(graphs, through):
    newer = graphs.build(RELU, {"x": X}, ir_version=14)
    np.testing.assert_array_equal(through(OnnxRuntime(), newer).run({"x": X})["y"], np.maximum(X, 0))
    newer.opset_import[0].version = 28
    with pytest.raises(UnsupportedOpError, match="opset"):
        through(OnnxRuntime(), newer)


def test_missing_and_damaged_artifacts(tmp_path):
    with pytest.raises(UsageError, match="missing"):
        OnnxRuntime().load(tmp_path, 1)
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(LoweringError):
        OnnxRuntime().load(tmp_path, 1)
