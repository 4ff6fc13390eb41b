"""Activation memory against hand-worked graphs, and against arrays that are really held while ONNX's reference runs node by node."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from edgekit.errors import UsageError
from edgekit.graph.cost import cost
from edgekit.graph.memory import activation_memory
from edgekit.graph.shapes import infer_shapes

N = helper.make_node
X = np.zeros((4, 8), np.float32)  # 128 bytes


@pytest.fixture
def inferred(make):
    def build(*args, **kwargs) -> ir.Model:
        model = ir.from_proto(make(*args, **kwargs))
        infer_shapes(model)
        return model

    return build


def test_residual_block(inferred):
    nodes = [
        N("Relu", ["x"], ["a"], name="a"),
        N("MatMul", ["a", "wide"], ["b"], name="b"),  # [4, 32]
        N("MatMul", ["b", "narrow"], ["c"], name="c"),
        N("Add", ["a", "c"], ["y"], name="y"),
    ]
    weights = {"wide": np.zeros((8, 32), np.float32), "narrow": np.zeros((32, 8), np.float32)}
    memory = activation_memory(inferred(nodes, {"x": X}, initializers=weights).graph)
    assert memory.nodes == ("a", "b", "c", "y")
    assert memory.live_bytes == (256, 128 + 512, 128 + 512 + 128, 3 * 128)
    assert (memory.peak_bytes, memory.peak_node, memory.complete) == (768, "c", True)


def test_inputs_live_to_their_last_reader_and_outputs_to_the_end(inferred):
    nodes = [N("Relu", ["x"], ["first"]), N("Exp", ["x"], ["a"]), N("Exp", ["a"], ["b"]), N("Exp", ["b"], ["y"])]
    model = inferred(nodes, {"x": X, "unread": X}, outputs=("first", "y"))
    assert activation_memory(model.graph).live_bytes == (256, 384, 384, 384)


def test_views_share_memory_unless_they_are_copies(inferred):
    shape = {"shape": np.array([32]), "axes": np.array([0])}
    nodes = [
        N("Exp", ["x"], ["a"], name="a"),
        N("Reshape", ["a", "shape"], ["b"], name="b"),
        N("Unsqueeze", ["b", "axes"], ["c"], name="c"),
        N("Exp", ["c"], ["d"], name="d"),
        N("Flatten", ["a"], ["e"], name="e"),  # `a` is still needed here
        N("Transpose", ["e"], ["y"], name="y"),  # moves the elements: no view
    ]
    model = inferred(nodes, {"x": X}, outputs=("d", "y"), initializers=shape)
    assert activation_memory(model.graph).live_bytes == (256, 128, 128, 256, 256, 384)
    assert activation_memory(model.graph, free_views=False).live_bytes == (256, 256, 384, 384, 384, 384)


def test_bodies_count_while_their_node_runs(inferred):
    """Each branch reads `a` from outside, so it stays alive; the larger one holds 128 + 256 bytes of its own."""
    small = helper.make_graph([N("Relu", ["a"], ["s"])], "small", [], [helper.make_tensor_value_info("s", 1, [4, 8])])
    nodes = [N("Concat", ["a", "a"], ["two"], axis=0), N("ReduceMax", ["two"], ["m"], keepdims=0), N("Add", ["a", "m"], ["l"])]
    large = helper.make_graph(nodes, "large", [], [helper.make_tensor_value_info("l", 1, [4, 8])])
    outer = [N("Exp", ["x"], ["a"]), N("If", ["condition"], ["y"], then_branch=small, else_branch=large)]
    model = inferred(outer, {"x": X, "condition": np.zeros((), bool)})
    # The body's peak: `two` (256) and `m` (4) together. Outside: a, y and the condition.
    assert activation_memory(model.graph).live_bytes == (128 + 128 + 1, 128 + 128 + 1 + 260)


def test_the_schedule_decides(inferred):
    """Two wide branches one after the other need less than both opened at first."""
    wide = {"w": np.zeros((8, 80), np.float32)}
    nodes = [
        N("MatMul", ["x", "w"], ["a"], name="a"),
        N("MatMul", ["x", "w"], ["b"], name="b"),
        N("ReduceMax", ["a"], ["c"], name="c", keepdims=0),
        N("ReduceMax", ["b"], ["d"], name="d", keepdims=0),
        N("Add", ["c", "d"], ["y"], name="y"),
    ]
    model = inferred(nodes, {"x": X}, initializers=wide)
    a, b, c, d, y = model.graph
    assert activation_memory(model.graph).peak_bytes == 2 * 1280 + 128
    better = activation_memory(model.graph, [a, c, b, d, y])
    assert (better.peak_bytes, better.nodes) == (1280 + 128 + 4, ("a", "c", "b", "d", "y"))
    rows = {row.name: row.live_bytes for row in cost(model, [a, c, b, d, y]).per_node}
    assert rows == dict(zip(better.nodes, better.live_bytes, strict=True))
    assert cost(model).memory.peak_bytes == 2 * 1280 + 128


def test_bad_schedules_are_refused_by_name(inferred):
    model = inferred([N("Relu", ["x"], ["a"], name="one"), N("Relu", ["a"], ["y"], name="two")], {"x": X})
    one, two = model.graph
    with pytest.raises(UsageError, match="runs node 'two' before 'one', which makes its input 'a'"):
        activation_memory(model.graph, [two, one])
    with pytest.raises(UsageError, match="lacks node 'two'"):
        activation_memory(model.graph, [one])
    with pytest.raises(UsageError, match="twice"):
        activation_memory(model.graph, [one, two, one])
    with pytest.raises(UsageError, match="'other', which is not in the graph"):
        activation_memory(model.graph, [one, two, ir.node("Relu", [], name="other")])


def test_unknown_sizes_are_named(inferred):
    model = inferred([N("NonZero", ["x"], ["y"])], {"x": X}, outputs={"y": (onnx.TensorProto.INT64, None)})
    memory = activation_memory(model.graph)
    assert (memory.unknown, memory.complete, memory.peak_bytes) == (("y",), False, 128)


def test_small_types_and_empty_graphs(inferred):
    model = inferred([N("Cast", ["x"], ["y"], to=onnx.TensorProto.INT4)], {"x": X[:1, :3]}, outputs={"y": (onnx.TensorProto.INT4, None)})
    assert activation_memory(model.graph).live_bytes == (12 + 2,)
    assert activation_memory(ir.Graph([], [], nodes=[])).peak_bytes == 0


@st.composite
def graphs(draw) -> onnx.ModelProto:
    """Random graphs without views: values of several sizes, read any number of times or never."""
    count = draw(st.integers(1, 9))
    values = ["x0", "x1"]
    nodes = []
    for index in range(count):
        pick = st.sampled_from(values)
        inputs, kind = [draw(pick), draw(pick)], draw(st.sampled_from(["Concat", "Add", "Split", "Cast"]))
        name = f"v{index}"
        if kind == "Concat":
            nodes.append(N("Concat", inputs, [name], axis=0))
        elif kind == "Add":  # a row at most: the operands have different numbers of rows
            nodes += [N("ReduceMax", inputs[:1], [f"{name}r"], keepdims=1), N("Add", [f"{name}r", inputs[1]], [name])]
        elif kind == "Split":  # the second part is read by nobody
            nodes += [N("Concat", inputs[:1] * 2, [f"{name}c"], axis=0), N("Split", [f"{name}c"], [name, f"{name}u"], num_outputs=2)]
        else:
            nodes += [N("Cast", inputs[:1], [f"{name}d"], to=onnx.TensorProto.DOUBLE), N("Cast", [f"{name}d"], [name], to=1)]
        values.append(name)
    outputs = draw(st.lists(st.sampled_from(values[2:]), min_size=1, max_size=3, unique=True))
    infos = [helper.make_tensor_value_info(name, 1, [rows, 5]) for name, rows in (("x0", 2), ("x1", 3))]
    results = [helper.make_tensor_value_info(name, 1, None) for name in outputs]
    return helper.make_model(helper.make_graph(nodes, "g", infos, results), opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def held_bytes(model: onnx.ModelProto) -> list[int]:
    """Runs the nodes one by one, drops every array after its last reader, and adds up what is held at each node."""
    graph = model.graph
    held = {"x0": np.ones((2, 5), np.float32), "x1": np.ones((3, 5), np.float32)}
    kept = {output.name for output in graph.output}
    found = []
    for index, node in enumerate(graph.node):
        later = set(itertools.chain.from_iterable(other.input for other in graph.node[index:])) | kept
        held = {name: array for name, array in held.items() if name in later}
        for name, result in zip(node.output, ReferenceEvaluator(node).run(None, {name: held[name] for name in node.input}), strict=True):
            held[name] = result
        found.append(sum(array.nbytes for array in held.values()))
    return found


@given(graphs())
@settings(deadline=None, derandomize=True, max_examples=40)
def test_equals_what_is_held_in_a_real_run(model):
    graph = ir.from_proto(model)
    infer_shapes(graph)
    memory = activation_memory(graph.graph)
    assert list(memory.live_bytes) == held_bytes(model)
    assert memory.peak_bytes == max(memory.live_bytes)
    assert memory.complete
