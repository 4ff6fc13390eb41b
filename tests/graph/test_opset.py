"""Conversion of old opsets, by value: ONNX Runtime (or numpy, where it no longer runs the old form) before against after."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgekit.errors import SourceError, UnsupportedOpError
from edgekit.graph.check import check_model
from edgekit.graph.opset import to_opset

N = helper.make_node
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


X = normal(2, 3, 4, 4)
BN = {"s": normal(3), "b": normal(3), "m": normal(3), "v": np.abs(normal(3)) + 0.5}
PER_CHANNEL = {name: array.reshape(1, 3, 1, 1) for name, array in BN.items()}
BN_RESULT = (X - PER_CHANNEL["m"]) / np.sqrt(PER_CHANNEL["v"] + 1e-5) * PER_CHANNEL["s"] + PER_CHANNEL["b"]
I64 = np.int64
MATRIX, WEIGHT, WEIGHT_T, BIAS = normal(3, 4), normal(4, 5), normal(5, 4), normal(5)

# name: (opset, nodes, inputs, initializers, expected or None: what ONNX Runtime makes of the old model)
CASES = {
    "softmax flattens": (9, [N("Softmax", ["x"], ["y"], axis=1)], {"x": X}, {}, None),
    "softmax default axis": (12, [N("Softmax", ["x"], ["y"])], {"x": X}, {}, None),
    "logsoftmax": (11, [N("LogSoftmax", ["x"], ["y"], axis=2)], {"x": X}, {}, None),
    "hardmax default axis": (11, [N("Hardmax", ["x"], ["y"])], {"x": normal(3, 4)}, {}, None),
    "batch norm 1": (
        1,
        [N("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], is_test=1, consumed_inputs=[0, 0, 0, 1, 1])],
        {"x": X},
        BN,
        BN_RESULT,
    ),
    "batch norm 6": (6, [N("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], is_test=1)], {"x": X}, BN, BN_RESULT),
    "batch norm 8 spatial": (8, [N("BatchNormalization", ["x", "s", "b", "m", "v"], ["y"], spatial=1)], {"x": X}, BN, BN_RESULT),
    "dropout 6": (6, [N("Dropout", ["x"], ["y"], is_test=1)], {"x": X}, {}, X),
    "dropout 9": (9, [N("Dropout", ["x"], ["y"], ratio=0.3)], {"x": X}, {}, X),
    "upsample 7 nearest": (7, [N("Upsample", ["x"], ["y"], scales=[1.0, 1.0, 2.0, 3.0], mode="nearest")], {"x": X}, {}, None),
    "upsample 7 linear": (7, [N("Upsample", ["x"], ["y"], scales=[1.0, 1.0, 2.0, 2.0], mode="linear")], {"x": X}, {}, None),
    "upsample 9 linear": (9, [N("Upsample", ["x", "c"], ["y"], mode="linear")], {"x": X}, {"c": np.float32([1, 1, 2, 2])}, None),
    "resize 10 linear": (10, [N("Resize", ["x", "c"], ["y"], mode="linear")], {"x": X}, {"c": np.float32([1, 1, 1.5, 2])}, None),
    "resize 10 nearest up": (10, [N("Resize", ["x", "c"], ["y"], mode="nearest")], {"x": X}, {"c": np.float32([1, 1, 1.3, 1.7])}, None),
    "resize 10 nearest down": (
        10,
        [N("Resize", ["x", "c"], ["y"], mode="nearest")],
        {"x": normal(1, 1, 8, 8)},
        {"c": np.float32([1, 1, 0.6, 0.4])},
        None,
    ),
    "resize 11": (
        11,
        [N("Resize", ["x", "roi", "c"], ["y"], mode="linear")],
        {"x": X},
        {"roi": np.float32([]), "c": np.float32([1, 1, 2, 2])},
        None,
    ),
    "clip": (7, [N("Clip", ["x"], ["y"], min=-0.3, max=0.5)], {"x": X}, {}, np.clip(X, -0.3, 0.5)),
    "clip one side": (10, [N("Clip", ["x"], ["y"], max=0.5)], {"x": X}, {}, np.minimum(X, 0.5)),
    "squeeze": (11, [N("Unsqueeze", ["x"], ["u"], axes=[0, 3]), N("Squeeze", ["u"], ["y"], axes=[0])], {"x": X}, {}, X[:, :, None]),
    "reduce sum": (11, [N("ReduceSum", ["x"], ["y"], axes=[1, 3], keepdims=0)], {"x": X}, {}, X.sum((1, 3))),
    "reduce max": (17, [N("ReduceMax", ["x"], ["y"], axes=[2])], {"x": X}, {}, X.max(2, keepdims=True)),
    "split": (11, [N("Split", ["x"], ["a", "b"], axis=1, split=[1, 2]), N("Concat", ["b", "a"], ["y"], axis=1)], {"x": X}, {}, None),
    "pad": (9, [N("Pad", ["x"], ["y"], pads=[0, 0, 1, 1, 0, 0, 2, 2], value=3.0)], {"x": X}, {}, None),
    "slice": (9, [N("Slice", ["x"], ["y"], starts=[1, 0], ends=[3, 100], axes=[2, 3])], {"x": X}, {}, X[:, :, 1:3]),
    "top k": (9, [N("TopK", ["x"], ["y", "i"], k=2, axis=-1)], {"x": X}, {}, -np.sort(-X)[..., :2]),
    "add from the front": (6, [N("Add", ["x", "b"], ["y"], broadcast=1, axis=1)], {"x": X}, {"b": BN["b"]}, X + PER_CHANNEL["b"]),
    "mul at the end": (6, [N("Mul", ["x", "k"], ["y"], broadcast=1)], {"x": X}, {"k": BIAS[:4]}, X * BIAS[:4]),
    "prelu of channels": (6, [N("PRelu", ["x", "s"], ["y"])], {"x": X}, {"s": BN["s"]}, np.where(X > 0, X, X * PER_CHANNEL["s"])),
    "gemm": (6, [N("Gemm", ["x", "w", "c"], ["y"], broadcast=1)], {"x": MATRIX}, {"w": WEIGHT, "c": BIAS}, MATRIX @ WEIGHT + BIAS),
    "gemm transposed": (
        6,
        [N("Gemm", ["x", "w", "c"], ["y"], broadcast=1, transB=1)],
        {"x": MATRIX},
        {"w": WEIGHT_T, "c": BIAS},
        MATRIX @ WEIGHT_T.T + BIAS,
    ),
    "reshape attribute": (4, [N("Reshape", ["x"], ["y"], shape=[2, -1])], {"x": X}, {}, X.reshape(2, -1)),
    "concat without axis": (3, [N("Concat", ["x", "x"], ["y"])], {"x": X}, {}, np.concatenate([X, X], 1)),
    "average pool": (11, [N("AveragePool", ["x"], ["y"], kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)], {"x": X}, {}, None),
    "convolution": (9, [N("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])], {"x": X}, {"w": normal(80, 3, 3, 3)}, None),
    "lstm": (
        7,
        [N("LSTM", ["x", "w", "r"], ["y"], hidden_size=4)],
        {"x": normal(5, 2, 3)},
        {"w": normal(1, 16, 3), "r": normal(1, 16, 4)},
        None,
    ),
    "grid sample": (16, [N("GridSample", ["x", "g"], ["y"], mode="bilinear")], {"x": X, "g": np.tanh(normal(2, 3, 3, 2))}, {}, None),
    "expand": (8, [N("Expand", ["x", "e"], ["y"])], {"x": X}, {"e": np.array([2, 2, 3, 4, 4], I64)}, np.broadcast_to(X, (2, 2, 3, 4, 4))),
}


@pytest.mark.parametrize("name", CASES)
def test_old_operator_keeps_its_values(name, make, run):
    opset, nodes, inputs, initializers, expected = CASES[name]
    outputs = {"y": (onnx.TensorProto.FLOAT, None)}
    proto = make(nodes, inputs, outputs, initializers, opset=opset)
    if expected is None:
        expected = run(proto, inputs)[0]
    model = ir.from_proto(proto)
    check_model(model, name)
    converted = to_opset(model)
    assert converted.opset_imports[""] == 23
    assert [value.name for value in converted.graph.inputs] == list(inputs)
    np.testing.assert_allclose(run(converted, inputs)[0], expected, rtol=1e-5, atol=1e-5)


def test_group_normalization_18_spreads_groups_over_channels(make, run):
    x, scale, bias = normal(2, 4, 3, 3), normal(2), normal(2)
    proto = make([N("GroupNormalization", ["x", "s", "b"], ["y"], num_groups=2)], {"x": x}, initializers={"s": scale, "b": bias}, opset=18)
    grouped = x.reshape(2, 2, 2, 3, 3).astype(np.float64)
    mean, variance = grouped.mean((2, 3, 4), keepdims=True), grouped.var((2, 3, 4), keepdims=True)
    expected = (grouped - mean) / np.sqrt(variance + 1e-5) * scale.reshape(1, 2, 1, 1, 1) + bias.reshape(1, 2, 1, 1, 1)
    np.testing.assert_allclose(run(to_opset(ir.from_proto(proto)), {"x": x})[0], expected.reshape(x.shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("opset", "node", "initializers", "message"),
    [
        (5, N("Cast", ["x"], ["y"], to="INT32"), {}, "'Cast' of opset 5"),
        (1, N("Pad", ["x"], ["y"], paddings=[0, 0, 1, 1, 0, 0, 1, 1]), {}, "'Pad' of opset 1"),
        (9, N("BatchNormalization", ["x", "s", "b", "m", "v"], ["y", "a", "c", "d", "e"]), BN, "'BatchNormalization' of opset 9"),
        (11, N("Hardmax", ["x"], ["y"], axis=1), {}, "'Hardmax' of opset 11"),
        (6, N("Add", ["x", "z"], ["y"], broadcast=1, axis=1), {}, "'Add' of opset 6"),
    ],
)
def test_what_cannot_be_converted_is_named(opset, node, initializers, message, make):
    proto = make([node], {"x": X, **({"z": BN["b"]} if "z" in node.input else {})}, initializers=initializers, opset=opset)
    with pytest.raises(UnsupportedOpError, match=message) as caught:
        to_opset(ir.from_proto(proto))
    assert caught.value.where
    assert caught.value.fix


def test_dropout_mask_of_old_opset_is_refused(make):
    nodes = [N("Dropout", ["x"], ["d", "mask"]), N("Cast", ["mask"], ["m"], to=1), N("Add", ["d", "m"], ["y"])]
    with pytest.raises(UnsupportedOpError, match="'Dropout' of opset 10"):
        to_opset(ir.from_proto(make(nodes, {"x": X}, opset=10)))


def test_newer_opsets_stay_and_unknown_ones_are_refused(make):
    newest = onnx.defs.onnx_opset_version()
    node = N("Relu", ["x"], ["y"])
    assert to_opset(ir.from_proto(make([node], {"x": X}, opset=newest))).opset_imports[""] == newest
    with pytest.raises(SourceError, match=f"opset {newest + 1}"):
        to_opset(ir.from_proto(make([node], {"x": X}, opset=newest + 1)))


def test_initializers_stop_being_inputs_and_inputs_stay(make):
    weight = normal(4, 3, 3, 3)
    spec = {"w": weight, "x": X}
    model = ir.from_proto(make([N("Conv", ["x", "w"], ["y"])], spec, initializers={"w": weight}, opset=7, ir_version=3))
    to_opset(model)
    assert [value.name for value in model.graph.inputs] == ["x"]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), weight)


def test_large_weights_never_enter_the_converter(make, monkeypatch):
    sizes = []
    convert = onnx.version_converter.convert_version

    def spy(proto, version):
        sizes.append(proto.ByteSize())
        return convert(proto, version)

    monkeypatch.setattr(onnx.version_converter, "convert_version", spy)
    weight = normal(256, 3, 20, 20)
    model = ir.from_proto(make([N("Conv", ["x", "w"], ["y"])], {"x": (1, [1, 3, 32, 32])}, initializers={"w": weight}, opset=9))
    tensor = model.graph.initializers["w"].const_value
    to_opset(model)
    assert sizes == [pytest.approx(300, abs=300)]
    assert model.graph.initializers["w"].const_value is tensor


def test_node_metadata_survives(make):
    proto = make([N("Relu", ["x"], ["y"], name="act")], {"x": X}, opset=9)
    model = ir.from_proto(proto)
    model.graph[0].metadata_props["edgekit.module"] = "blocks.0.act"
    assert to_opset(model).graph[0].metadata_props["edgekit.module"] == "blocks.0.act"


def test_all_light_networks_convert(light_nets):
    assert len(light_nets) == 9
    for name, path in light_nets.items():
        model = ir.load(path)
        check_model(model, name)
        inputs = [value.name for value in model.graph.inputs if value.name not in model.graph.initializers]
        operators = sorted(node.op_type for node in model.graph if node.op_type in ("Conv", "BatchNormalization", "Concat", "Gemm"))
        to_opset(model)
        assert model.opset_imports[""] == 23
        assert [value.name for value in model.graph.inputs] == inputs
        assert sorted(node.op_type for node in model.graph if node.op_type in ("Conv", "BatchNormalization", "Concat", "Gemm")) == operators
        check_model(model, name)


def give_random_weights(model: ir.Model, seed: int) -> None:
    """Replaces the constants of a light network by seeded weights (He's variance) and batch-norm statistics."""
    rng = np.random.default_rng(seed)
    variances = {node.inputs[4] for node in model.graph if node.op_type == "BatchNormalization"}
    for node in list(model.graph):
        if node.op_type != "ConstantOfShape":
            continue
        shape = node.inputs[0].const_value.numpy()
        array = rng.normal(scale=np.sqrt(2 / max(1, np.prod(shape[1:]))), size=shape).astype(np.float32)
        array = np.abs(array) + 0.5 if node.outputs[0] in variances else array
        value = ir.Value(name=f"{node.outputs[0].name}_random", const_value=ir.Tensor(array), type=ir.TensorType(ir.DataType.FLOAT))
        value.shape = ir.Shape(shape.tolist())
        model.graph.register_initializer(value)
        node.outputs[0].replace_all_uses_with(value)
        model.graph.remove(node, safe=True)
    for value in model.graph.initializers.values():
        if value.const_value.dtype != ir.DataType.FLOAT or value.name.endswith("_random"):
            continue
        array = rng.normal(size=value.const_value.shape.numpy()).astype(np.float32)
        value.const_value = ir.Tensor(np.abs(array) + 0.5 if value in variances else array * 0.02, name=value.name)


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet", "inception_v1"])
def test_light_network_with_random_weights_keeps_its_values(name, light_nets, run):
    model = ir.load(light_nets[name])
    give_random_weights(model, seed=0)
    softmax = next(node for node in model.graph if node.op_type == "Softmax")
    logits = softmax.inputs[0].name
    before = ir.to_proto(model)
    before.graph.output.append(onnx.ValueInfoProto(name=logits))
    (data,) = [value.name for value in model.graph.inputs if value.name not in model.graph.initializers]
    after = ir.to_proto(to_opset(model))
    after.graph.output.append(onnx.ValueInfoProto(name=logits))
    rng = np.random.default_rng(1)
    seen = []
    for _ in range(2):
        image = {data: (rng.normal(size=(1, 3, 224, 224)) + rng.normal()).astype(np.float32)}
        (probabilities, expected), (new_probabilities, actual) = run(before, image), run(after, image)
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        np.testing.assert_allclose(new_probabilities, probabilities, rtol=1e-3, atol=1e-6)
        seen.append(expected)
    assert np.abs(seen[0] - seen[1]).max() > 0.01 * np.abs(seen[0]).max()
