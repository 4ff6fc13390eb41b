"""Constants are read only where they are constant, and edits keep names, metadata and what others read."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from edgekit.graph.constants import GraphEditor, common_module, constant_array, is_used_once


@pytest.fixture
def model() -> ir.Model:
    """`a = x + w; b = a + w; y = b + v`, where v is an input of the graph with a default value."""
    proto = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[2] x, float[2] v) => (float[2] y) { a = Add(x, w)  b = Add(a, w)  y = Add(b, v) }
    """)
    for name, node in zip("abc", proto.graph.node, strict=True):
        node.name = f"node_{name}"
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.float32), "w"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([3, 4], np.float32), "v"))
    return ir.from_proto(proto)


def test_initializer_is_constant_unless_it_is_an_input(model):
    first, _, last = model.graph
    assert constant_array(first.inputs[1]).tolist() == [1, 2]
    assert constant_array(last.inputs[1]) is None
    assert constant_array(first.inputs[0]) is None
    assert constant_array(first.outputs[0]) is None
    assert constant_array(None) is None


def test_constant_node_is_constant():
    node = ir.node("Constant", [], {"value": helper.make_tensor("t", onnx.TensorProto.FLOAT, [2], [5, 6])})
    assert constant_array(node.outputs[0]).tolist() == [5, 6]


def test_used_once_counts_inputs_and_outputs_of_the_graph(model):
    first, second, last = model.graph
    assert is_used_once(first.outputs[0])
    assert not is_used_once(first.inputs[1])  # w, read by two nodes
    assert not is_used_once(last.outputs[0])  # given out
    last.replace_input_with(1, second.outputs[0])  # b + b
    assert not is_used_once(second.outputs[0])


def test_common_module_compares_whole_components():
    nodes = [ir.node("Add", [], metadata_props={"edgekit.module": path}) for path in ("a.bc.d", "a.bd.e")]
    assert common_module(nodes) == "a"
    assert common_module(nodes[:1]) == "a.bc.d"
    assert common_module([*nodes, ir.node("Add", [])]) == ""
    assert common_module([]) == ""


def test_names_are_unique_among_values_and_nodes(model):
    editor = GraphEditor(model)
    assert editor.unique_name("new") == "new"
    assert editor.unique_name("new") == "new_1"
    assert editor.unique_name("node_a") == "node_a_1"
    assert editor.add_initializer("b", np.zeros(1, np.float32)).name == "b_1"


def test_shared_constant_is_replaced_for_one_node_only(model):
    first, second, _ = model.graph
    GraphEditor(model).set_constant(first, 1, np.array([7, 8], np.float32))
    assert constant_array(first.inputs[1]).tolist() == [7, 8]
    assert constant_array(second.inputs[1]).tolist() == [1, 2]
    assert set(model.graph.initializers) == {"w", "v", "w_1"}


def test_constant_read_by_one_node_passes_on_its_name(model):
    first, second, _ = model.graph
    second.replace_input_with(1, second.inputs[0])
    old = first.inputs[1].const_value
    GraphEditor(model).set_constant(first, 1, np.array([7, 8], np.float32))
    assert first.inputs[1].name == "w"
    assert set(model.graph.initializers) == {"w", "v"}
    assert old.numpy().tolist() == [1, 2]  # a clone of the model may still hold the old tensor


def test_absent_input_gets_the_given_name(model):
    first = model.graph[0]
    GraphEditor(model).set_constant(first, 2, np.zeros(1, np.float32), name="bias")
    assert [value.name for value in first.inputs] == ["x", "w", "bias"]


def test_graph_output_keeps_its_name_type_and_shape(model):
    last = model.graph[2]
    new = ir.node("Relu", [last.inputs[0]], name="new")
    model.graph.append(new)
    editor = GraphEditor(model)
    editor.replace_value(last.outputs[0], new.outputs[0])
    editor.remove([last])
    (output,) = model.graph.outputs
    assert output is new.outputs[0]
    assert (output.name, output.dtype, list(output.shape)) == ("y", ir.DataType.FLOAT, [2])
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


def test_removed_nodes_take_their_own_initializers_along(model):
    first, second, last = model.graph
    editor = GraphEditor(model)
    editor.replace_value(second.outputs[0], first.outputs[0])
    editor.remove([second])
    assert "w" in model.graph.initializers  # the first node reads it
    editor.replace_value(first.outputs[0], second_source := ir.node("Relu", [model.graph.inputs[0]]).outputs[0])
    model.graph.insert_before(first, second_source.producer())
    editor.remove([first])
    assert set(model.graph.initializers) == {"v"}
    assert last.inputs[0] is second_source


def test_node_whose_result_is_read_is_not_removed(model):
    with pytest.raises(ValueError, match="still being used"):
        GraphEditor(model).remove([model.graph[0]])
