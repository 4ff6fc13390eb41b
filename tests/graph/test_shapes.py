"""Pinning of inputs and inference of what follows."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgekit.errors import SourceError
from edgekit.graph.shapes import infer_shapes, pin_inputs, static_shape, without_weights

N = helper.make_node
SYMBOLIC = {"x": (1, ["batch", 3, "height", "width"])}


def reshaping(make, inputs):
    """x → Conv → Reshape to what Shape, Gather and Concat compute: needs data propagation."""
    nodes = [
        N("Conv", ["x", "w"], ["c"]),
        N("Shape", ["c"], ["s"]),
        N("Gather", ["s", "zero"], ["n"]),
        N("Concat", ["n", "minus"], ["target"], axis=0),
        N("Reshape", ["c", "target"], ["y"]),
    ]
    initializers = {"w": np.ones((8, 3, 3, 3), np.float32), "zero": np.array([0]), "minus": np.array([-1])}
    return ir.from_proto(make(nodes, inputs, initializers=initializers))


def shape_of(model, name):
    return static_shape(next(output for node in model.graph for output in node.outputs if output.name == name))


def test_pinned_inputs_make_everything_static(make):
    model = reshaping(make, SYMBOLIC)
    pin_inputs(model, {"x": ((2, 3, 10, 12), None)})
    infer_shapes(model)
    assert static_shape(model.graph.inputs[0]) == (2, 3, 10, 12)
    assert shape_of(model, "c") == (2, 8, 8, 10)
    assert shape_of(model, "y") == (2, 640)


def test_inferred_shapes_are_those_of_the_runtime(make, run):
    model = reshaping(make, SYMBOLIC)
    pin_inputs(model, {"x": ((2, 3, 7, 5), None)})
    infer_shapes(model)
    assert run(model, {"x": np.zeros((2, 3, 7, 5), np.float32)})[0].shape == shape_of(model, "y")


def test_what_is_known_is_kept(make):
    model = ir.from_proto(make([N("Fancy", ["x"], ["f"], domain="edgekit"), N("Relu", ["f"], ["y"])], {"x": (1, [2, 3])}))
    model.opset_imports["edgekit"] = 1
    model.graph[0].outputs[0].shape, model.graph[0].outputs[0].dtype = ir.Shape([4, 5]), ir.DataType.FLOAT
    infer_shapes(model)
    assert shape_of(model, "f") == (4, 5)
    assert shape_of(model, "y") == (4, 5)


def test_subgraphs_are_inferred(make):
    def branch(operator, name):
        return helper.make_graph([N(operator, ["x"], [name])], name, [], [helper.make_tensor_value_info(name, 1, None)])

    node = N("If", ["c"], ["y"], then_branch=branch("Relu", "t"), else_branch=branch("Neg", "e"))
    model = ir.from_proto(make([node], {"x": (1, [2, 3]), "c": (onnx.TensorProto.BOOL, [])}))
    infer_shapes(model)
    body = model.graph[0].attributes["then_branch"].as_graph()
    assert static_shape(body.outputs[0]) == (2, 3)
    assert shape_of(model, "y") == (2, 3)


def test_first_dimension_defaults_to_one_and_others_must_be_given(make):
    model = reshaping(make, {"x": (1, ["batch", 3, 9, 9])})
    pin_inputs(model, {})
    assert static_shape(model.graph.inputs[0]) == (1, 3, 9, 9)
    with pytest.raises(SourceError, match=r"dimension 2 .*'height'.* of input 'x'") as caught:
        pin_inputs(reshaping(make, SYMBOLIC), {})
    assert "--input x:1,3,224,224" in (caught.value.fix or "")


def test_one_name_is_one_size(make):
    inputs = {"x": (1, ["batch", "n"]), "z": (1, ["batch", "n"])}
    model = ir.from_proto(make([N("Add", ["x", "z"], ["y"])], inputs))
    pin_inputs(model, {"x": ((4, 7), None)})
    assert static_shape(model.graph.inputs[1]) == (4, 7)
    model = ir.from_proto(make([N("Add", ["x", "z"], ["y"])], inputs))
    with pytest.raises(SourceError, match="'n' is 7 in input 'x' and 8 in input 'z'"):
        pin_inputs(model, {"x": ((4, 7), None), "z": ((4, 8), None)})


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": ((1,), None)}, "no input 'q'"),
        ({"x": ((1, 3, 9), None)}, "4 dimensions, 3 were given"),
        ({"x": ((1, 4, 9, 9), None)}, "dimension 1 .* fixed to 3, 4 was given"),
        ({"x": ((1, 3, -9, 9), None)}, "negative"),
        ({"x": ((1, 3, 9, 9), "float16")}, "takes float32, not float16"),
        ({"x": ((1, 3, 9, 9), "flot")}, "'flot' is not a dtype"),
    ],
)
def test_contradictions_are_named(shapes, message, make):
    with pytest.raises(SourceError, match=message) as caught:
        pin_inputs(reshaping(make, SYMBOLIC), shapes)
    assert caught.value.where
    assert caught.value.fix


def test_stale_shapes_are_cleared(make):
    info = helper.make_tensor_value_info("c", 1, [1, 8, 222, 222])
    model = ir.from_proto(
        make([N("Relu", ["x"], ["c"]), N("Neg", ["c"], ["y"])], SYMBOLIC, {"y": (1, [1, 3, 224, 224])}, value_info=[info])
    )
    pin_inputs(model, {"x": ((1, 3, 6, 6), np.float32)})
    infer_shapes(model)
    assert shape_of(model, "c") == shape_of(model, "y") == (1, 3, 6, 6)


def test_weights_are_left_out_and_come_back(make):
    weight = np.ones((64, 64), np.float32)
    constant = N("Constant", [], ["k"], value=onnx.numpy_helper.from_array(weight))
    model = ir.from_proto(
        make([constant, N("MatMul", ["x", "k"], ["a"]), N("MatMul", ["a", "w"], ["y"])], {"x": (1, [2, 64])}, initializers={"w": weight})
    )
    tensor = model.graph.initializers["w"].const_value
    with without_weights(model) as weights:
        assert ir.to_proto(model).ByteSize() < 1000
        assert len(weights) == 2
    assert model.graph.initializers["w"].const_value is tensor
    np.testing.assert_array_equal(model.graph[0].attributes["value"].as_tensor().numpy(), weight)
    infer_shapes(model)
    assert shape_of(model, "y") == (2, 64)


def test_a_huge_model_is_inferred_without_its_data(make):
    model = ir.from_proto(make([N("MatMul", ["x", "w"], ["y"])], {"x": (1, [2, 1 << 20])}, initializers={"w": np.zeros(1, np.float32)}))
    value = model.graph.initializers["w"]
    value.const_value = ir.ExternalTensor("absent.bin", 0, None, ir.DataType.FLOAT, shape=ir.Shape([1 << 20, 1 << 10]), name="w")  # 4 GB
    value.shape = ir.Shape([1 << 20, 1 << 10])
    infer_shapes(model)
    assert shape_of(model, "y") == (2, 1 << 10)


@pytest.mark.parametrize("node", ["GroupNormalization<num_groups = 2>(x, scale, scale)", "MeanVarianceNormalization(x)", "Swish(x)"])
def test_operators_that_onnx_infers_nothing_for(node: str) -> None:
    """They have the shape of their first input, and so does what follows."""
    interface = "(float[1,6,4] x, float[6] scale) => (float[a,b,c] z)"
    text = f'<ir_version: 13, opset_import: ["" : 24]> net {interface} {{ y = {node} w = Relu(y) z = Exp(w) }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    infer_shapes(model)
    assert [static_shape(node.outputs[0]) for node in model.graph] == [(1, 6, 4)] * 3
