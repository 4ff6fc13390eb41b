"""Control flow written out, against ONNX Runtime on the graph as it was."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from edgekit.errors import UnsupportedOpError
from edgekit.graph.cost import MODULE_KEY
from edgekit.targets.coreml import unroll as subject
from edgekit.targets.coreml.unroll import unroll

COUNTING = "Loop <body = b (int64 i, bool go, float[2] h) => (bool go_on, float[2] h1{more}) {{ {body} }}>"
X = np.array([1.5, -2.0], np.float32)
ROWS = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def model(text: str, **constants: object) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    return proto


def execute(proto: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def written_out(proto: onnx.ModelProto, inputs: dict[str, np.ndarray], left: int = 0) -> ir.Model:
    """The model after `unroll`, which computes the same and has `left` nodes with graphs inside."""
    expected = execute(proto, inputs)
    graph = ir.from_proto(proto)
    assert unroll(graph) > 0
    after = ir.to_proto(graph)
    onnx.checker.check_model(after, full_check=True)
    assert sum(node.op_type in ("If", "Loop", "Scan") for node in graph.graph.all_nodes()) == left
    got = execute(after, inputs)
    assert list(got) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(got[name], array, err_msg=name)
    names = [node.name for node in graph.graph.all_nodes()]
    assert len(set(names)) == len(names)
    return graph


def loop(
    body: str,
    more: str = "",
    call: str = "(n, yes, x)",
    outputs: str = "y",
    types: str = "float[2] y",
    before: str = "",
    **constants: object,
) -> onnx.ModelProto:
    """A model with one Loop, three times by default, that carries a vector."""
    constants = {"n": np.int64(3), "yes": np.True_, **constants}
    return model(f"g (float[2] x) => ({types}) {{ {before} {outputs} = {COUNTING.format(more=more, body=body)} {call} }}", **constants)


def test_a_loop_becomes_its_iterations_with_readable_names():
    proto = loop("go_on = Identity(go) half = Cast<to=1>(i) s = Add(h, half) h1 = Mul(s, w)", w=np.float32(0.5))
    proto.graph.node[0].name = "loop"
    for inner, path in zip(proto.graph.node[0].attribute[0].g.node, ("", "", "cell.add", ""), strict=True):
        inner.name = inner.op_type.lower()
        if path:
            inner.metadata_props.add(key=MODULE_KEY, value=path)
    proto.graph.node[0].metadata_props.add(key=MODULE_KEY, value="rnn")
    graph = written_out(proto, {"x": X})
    found = {node.name: node.metadata_props[MODULE_KEY] for node in graph.graph}
    assert found == {f"loop/{step}/{name}": path for step in range(3) for name, path in (("add", "cell.add"), ("mul", "rnn"))}
    assert [tuple(node.inputs[1].shape) for node in graph.graph] == [()] * 6, "the number of the iteration is a constant"


TRIPS = {
    "a count": ("go_on = Identity(go) h1 = Add(h, h)", "(n, yes, x)", 3),
    "a count without condition": ("go_on = Identity(go) h1 = Add(h, h)", '(n, "", x)', 3),
    "a constant in the body": ("go_on = Constant<value = bool {1}>() h1 = Add(h, h)", "(n, yes, x)", 3),
    "a constant false in the body": ("go_on = Constant<value = bool {0}>() h1 = Add(h, h)", "(n, yes, x)", 1),
    "an earlier stop by the number": ("go_on = Less(i, one) h1 = Add(h, h)", "(n, yes, x)", 2),
    "no count": ("ten = Mul(i, three) go_on = LessOrEqual(ten, five) h1 = Add(h, h)", '("", yes, x)', 3),
    "a condition that is false at first": ("go_on = Identity(go) h1 = Add(h, h)", "(n, no, x)", 0),
    "no iteration": ("go_on = Identity(go) h1 = Add(h, h)", "(zero, yes, x)", 0),
}


@pytest.mark.parametrize("case", TRIPS)
def test_how_often_a_loop_runs(case):
    body, call, count = TRIPS[case]
    numbers = {"one": np.int64(1), "three": np.int64(3), "five": np.int64(5), "zero": np.int64(0), "no": np.False_}
    proto = loop(body, call=call, **numbers)
    graph = ir.from_proto(proto)
    unroll(graph)
    assert sum(node.op_type == "Add" for node in graph.graph) == count
    np.testing.assert_array_equal(execute(ir.to_proto(graph), {"x": X})["y"], X * 2**count)


def test_a_counter_that_is_carried_decides_when_a_while_ends():
    proto = model(
        """g (float[2] x) => (int64 k, float[2] y) {
        k, y = Loop <body = b (int64 i, bool go, int64 c, float[2] h) => (bool go_on, int64 c1, float[2] h1) {
            c1 = Add(c, step) go_on = Less(c1, end) f = Cast<to=1>(c) h1 = Add(h, f) }> ("", yes, start, x) }""",
        yes=np.True_, step=np.int64(4), start=np.int64(-7), end=np.int64(10),
    )  # fmt: skip
    graph = written_out(proto, {"x": X})
    assert sum(node.op_type == "Add" for node in graph.graph) == 5


def test_results_of_iterations_are_stacked_and_captures_and_initializers_are_shared():
    body = "go_on = Identity(go) row = Gather(table, i) h1 = Add(h, outer) e = Mul(h1, row) f = Identity(i)"
    proto = loop(
        body, ", float[2] e, int64 f", outputs="y, rows, numbers", types="float[2] y, float[3,2] rows, int64[3] numbers",
        before="outer = Neg(x)",
    )  # fmt: skip
    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    inner = next(node for node in proto.graph.node if node.op_type == "Loop").attribute[0].g
    inner.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    written_out(proto, {"x": X})


def test_what_is_the_same_in_all_iterations_is_computed_once():
    body = "go_on = Identity(go) f = DequantizeLinear(w, scale) m = Mul(f, x) h1 = Add(h, m)"
    graph = written_out(loop(body, w=np.array([3, -5], np.int8), scale=np.float32(0.5)), {"x": X})
    assert [node.op_type for node in graph.graph] == ["DequantizeLinear", "Mul", "Add", "Add", "Add"]


def test_a_value_that_grows_gets_its_shapes_anew():
    proto = model(
        """g (float[1,2] x) => (float[N,2] y) {
        y = Loop <body = b (int64 i, bool go, float[M,2] h) => (bool go_on, float[K,2] h1) {
            go_on = Identity(go)
            d = Shape <start=0, end=1> (h) f = Cast<to=1>(d) m = Mul(h, f) h1 = Concat<axis=0>(m, h) }> (n, yes, x) }""",
        n=np.int64(3), yes=np.True_,
    )  # fmt: skip
    graph = written_out(proto, {"x": X[None]})
    assert tuple(graph.graph.outputs[0].shape) == (8, 2)
    assert not any(node.op_type == "Shape" for node in graph.graph)


def test_nested_loops_of_which_the_inner_one_depends_on_the_outer_one():
    proto = model(
        """g (float[2] x) => (float[2] y) {
        y = Loop <body = b (int64 i, bool go, float[2] h) => (bool go_on, float[2] h2) {
            go_on = Identity(go)
            h2 = Loop <body = c (int64 j, bool go2, float[2] k) => (bool go3, float[2] k1) {
                go3 = Identity(go2) s = Add(i, j) f = Cast<to=1>(s) a = Mul(k, f) k1 = Sub(a, x) }> (i, go, h) }> (n, yes, x) }""",
        n=np.int64(4), yes=np.True_,
    )  # fmt: skip
    graph = written_out(proto, {"x": X})
    assert sum(node.op_type == "Sub" for node in graph.graph) == 0 + 1 + 2 + 3


def test_a_branch_that_a_constant_chooses_in_an_iteration():
    body = """go_on = Identity(go) first = Equal(i, zero)
        h1 = If (first) <then_branch = t () => (float[2] a) { a = Add(h, x) }, else_branch = e () => (float[2] b) { b = Mul(h, x) }>"""
    graph = written_out(loop(body, zero=np.int64(0)), {"x": X})
    assert [node.op_type for node in graph.graph] == ["Add", "Mul", "Mul"]


def test_a_dynamic_branch_keeps_its_own_copy_in_each_iteration():
    body = """go_on = Identity(go) s = ReduceSum<keepdims=0>(h) up = Greater(s, limit)
        h1 = If (up) <then_branch = t () => (float[2] a) { f = Cast<to=1>(i) a = Add(h, f) },
            else_branch = e () => (float[2] b) { b = Mul(h, w) }>"""
    written_out(loop(body, limit=np.float32(0), w=X), {"x": X}, left=3)


def test_a_loop_inside_a_dynamic_branch():
    proto = model(
        """g (bool up, float[2] x) => (float[2] y) {
        y = If (up) <then_branch = t () => (float[2] a) {
            a = Loop <body = b (int64 i, bool go, float[2] h) => (bool go_on, float[2] h1) {
                go_on = Identity(go) h1 = Mul(h, x) }> (n, yes, x) },
            else_branch = e () => (float[2] b) { b = Neg(x) }> }""",
        n=np.int64(3), yes=np.True_,
    )  # fmt: skip
    for up in (True, False):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        written_out(copy, {"x": X, "up": np.array(up)}, left=1)


def test_values_that_pass_through_and_graph_outputs_keep_their_names():
    proto = model(
        """g (float[2] x) => (float[2] y, float[2] z, float[2] w) {
        y, z, w = Loop <body = b (int64 i, bool go, float[2] p, float[2] q, float[2] r)
            => (bool go_on, float[2] q2, float[2] p2, float[2] r2) {
            go_on = Identity(go) q2 = Identity(q) p2 = Identity(p) r2 = Identity(c) }> (n, yes, x, c, x) }""",
        n=np.int64(3), yes=np.True_, c=X + 1,
    )  # fmt: skip
    written_out(proto, {"x": X})


@pytest.mark.parametrize("output_axis", [0, 1, -1])
@pytest.mark.parametrize("input_axis", [0, 1, -2])
@pytest.mark.parametrize(("inward", "outward"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_scans(input_axis, output_axis, inward, outward):
    length, width = ROWS.shape if input_axis != 1 else ROWS.shape[::-1]
    stacked = f"{length},{width}" if output_axis == 0 else f"{width},{length}"
    proto = model(
        f"""g (float[{width}] h0, float[4,3] x, float[{length}] s) => (float[{width}] h, float[{stacked}] all, float[{length}] sums) {{
        h, all, sums = Scan <num_scan_inputs = 2, scan_input_axes = [{input_axis}, 0], scan_input_directions = [{inward}, 0],
            scan_output_axes = [{output_axis}, 0], scan_output_directions = [{outward}, 1],
            body = b (float[{width}] p, float[{width}] e, float t) => (float[{width}] p1, float[{width}] o, float v) {{
                m = Mul(p, t) p1 = Add(m, e) o = Tanh(p1) v = ReduceSum<keepdims=0>(p1) }}> (h0, x, s) }}"""
    )
    rng = np.random.default_rng(1)
    written_out(proto, {"x": ROWS, "h0": rng.random(width, np.float32), "s": rng.random(length, np.float32)})


def test_a_scan_without_states_and_with_defaults():
    proto = model(
        """g (float[4,3] x) => (float[4,3] y) {
        y = Scan <num_scan_inputs = 1, body = b (float[3] e) => (float[3] o) { o = Mul(e, e) }> (x) }"""
    )
    graph = written_out(proto, {"x": ROWS})
    assert graph.graph.outputs[0].name == "y"


STACKED = ("go_on = Identity(go) h1 = Add(h, h) e = Identity(h)", ", float[2] e")
REFUSED = {
    "never runs": loop(*STACKED, outputs="y, e2", types="float[2] y, float[0,2] e2", n=np.int64(0)),
    "more than 1000 iterations": loop(*STACKED, outputs="y, e2", types="float[2] y, float[M,2] e2", n=np.int64(1001)),
    "when written out": loop("go_on = Identity(go) h1 = Add(h, h)", n=np.int64(1000)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason, monkeypatch):
    monkeypatch.setattr(subject, "MAX_NODES", 2000)
    with pytest.raises(UnsupportedOpError, match=reason):
        unroll(ir.from_proto(REFUSED[reason]))


LEFT = {
    "a computed count": ("go_on = Identity(go) h1 = Add(h, h)", "(m, yes, x)"),
    "a condition on what is computed": ("s = ReduceSum<keepdims=0>(h) go_on = Less(s, limit) h1 = Add(h, h)", '("", yes, x)'),
    "many iterations without results": ("go_on = Identity(go) h1 = Mul(h, limit)", "(many, yes, x)"),
    "no end": ("go_on = Identity(go) h1 = Mul(h, limit)", '("", yes, x)'),
}


@pytest.mark.parametrize("case", LEFT)
def test_loops_that_only_the_running_model_decides_stay_and_know_the_shapes_that_they_carry(case):
    body, call = LEFT[case]
    proto = loop(body, call=call, before="t = ReduceMax<keepdims=0>(x) m = Cast<to=7>(t)", limit=np.float32(9), many=np.int64(10**6))
    for value in (*proto.graph.node[-1].attribute[0].g.input[2:], *proto.graph.node[-1].attribute[0].g.output[1:]):
        value.type.tensor_type.ClearField("shape")
    graph = ir.from_proto(proto)
    assert unroll(graph) == 0
    (node,) = [node for node in graph.graph if node.op_type == "Loop"]
    assert tuple(node.attributes["body"].as_graph().inputs[2].shape) == (2,)


def test_a_graph_without_control_flow_is_left_alone():
    graph = ir.from_proto(model("g (float[2] x) => (float[2] y) { a = Identity(x) y = Add(a, x) }"))
    assert unroll(graph) == 0
    assert [node.op_type for node in graph.graph] == ["Identity", "Add"]
