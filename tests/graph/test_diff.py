"""What went and came between two graphs, counted by module."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from edgekit.graph.cost import cost
from edgekit.graph.diff import NO_MODULE, diff_models, module_of
from edgekit.graph.shapes import infer_shapes

BEFORE = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[2, 3] x) => (float[2, 4] y)
<float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[4] b = {1, 2, 3, 4}>
{
    [body_0_fc_MatMul] z = MatMul(x, w)
    [body_0_fc_Add] s = Add(z, b)
    [body_1_act] a = Relu(s)
    [body_2_norm] y = Softmax(a)
}
"""
AFTER = BEFORE.replace("z = MatMul(x, w)\n    [body_0_fc_Add] s = Add(z, b)", "s = Gemm(x, w, b)")


def model(text: str, modules: dict[str, str]) -> ir.Model:
    made = ir.from_proto(onnx.parser.parse_model(text))
    for node in made.graph:
        assert node.name
        node.metadata_props["edgekit.module"] = modules[node.name]
    infer_shapes(made)
    return made


MODULES = {"body_0_fc_MatMul": "body.0.fc", "body_0_fc_Add": "body.0.fc", "body_1_act": "body.1", "body_2_norm": "body.2"}


def test_a_fused_layer() -> None:
    found = diff_models(model(BEFORE, MODULES), model(AFTER, MODULES))
    (change,) = found.modules
    assert change.module == "body.0.fc"
    assert change.operators == {"Add": (1, 0), "Gemm": (0, 1), "MatMul": (1, 0)}
    assert (change.before.parameters, change.after.parameters) == (16, 16)
    assert (change.before.macs, change.after.macs) == (24, 24)
    assert found.unchanged == 2
    assert found.total.operators == change.operators
    assert found.total.before.operators == {"Add": 1, "MatMul": 1, "Relu": 1, "Softmax": 1}
    assert not found.same


def test_nothing_differs_between_a_graph_and_its_copy() -> None:
    one = model(BEFORE, MODULES)
    found = diff_models(one, one.clone())
    assert found.same
    assert found.unchanged == 3
    assert found.to_dict()["modules"] == []


def test_weights_alone_are_a_difference_too() -> None:
    other = model(BEFORE, MODULES)
    other.graph.initializers["b"].const_value = ir.tensor(np.ones((1, 4), np.float64), name="b")
    found = diff_models(model(BEFORE, MODULES), other)
    (change,) = found.modules
    assert change.operators == {}
    assert change.after.bytes - change.before.bytes == 4 * 4
    assert found.to_dict()["modules"][0]["bytes"] == {"a": 64, "b": 80}


def test_totals_are_those_of_the_cost() -> None:
    one, other = model(BEFORE, MODULES), model(AFTER, MODULES)
    total = diff_models(one, other).total
    for side, graph in ((total.before, one), (total.after, other)):
        whole = cost(graph)
        assert (side.parameters, side.macs, side.bytes) == (whole.parameters, whole.macs, whole.bytes)


def test_depth_groups_modules_and_new_ones_stand_behind_what_precedes_them() -> None:
    moved = {**MODULES, "body_1_act": "extra.act"}
    found = diff_models(model(BEFORE, MODULES), model(BEFORE, moved))
    assert [change.module for change in found.modules] == ["extra.act", "body.1"]
    found = diff_models(model(BEFORE, MODULES), model(BEFORE, moved), depth=1)
    assert [(change.module, change.operators) for change in found.modules] == [("body", {"Relu": (1, 0)}), ("extra", {"Relu": (0, 1)})]


@pytest.mark.parametrize(
    ("name", "module", "expected"),
    [
        ("anything/MatMul", "blocks.3.attn", "blocks.3.attn"),
        ("blocks.3.attn.qkv/MatMul", "", "blocks.3.attn.qkv"),
        ("/blocks/blocks.3/attn/MatMul", "", "blocks.3.attn"),
        ("/blocks/blocks.3/blocks.3.0/Conv_1", "", "blocks.3.0"),
        ("model/layer1/conv/Conv2D", "", "model.layer1.conv"),
        ("MatMul_12", "", NO_MODULE),
        ("/MatMul", "", NO_MODULE),
        ("", "", NO_MODULE),
    ],
)
def test_module_of_a_node(name: str, module: str, expected: str) -> None:
    assert module_of(name, module) == expected


def test_nodes_of_subgraphs_and_of_other_domains_count() -> None:
    branches = {
        f"{side}_branch": helper.make_graph(
            [helper.make_node(op, ["x"], [f"{side}_y"])], side, [], [helper.make_tensor_value_info(f"{side}_y", 1, [2])]
        )
        for side, op in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [helper.make_node("If", ["c"], ["p"], **branches), helper.make_node("Sign", ["p"], ["y"], domain="edgekit")]
    tensors = [helper.make_tensor_value_info("x", 1, [2]), helper.make_tensor_value_info("c", onnx.TensorProto.BOOL, [])]
    graph = helper.make_graph(nodes, "g", tensors, [helper.make_tensor_value_info("y", 1, [2])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23), helper.make_opsetid("edgekit", 1)])
    total = diff_models(ir.from_proto(proto), ir.from_proto(proto)).total
    assert total.before.operators == {"If": 1, "Neg": 1, "Relu": 1, "edgekit.Sign": 1}
