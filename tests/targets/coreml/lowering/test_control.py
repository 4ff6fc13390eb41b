"""Control flow, lowered and run, against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx.backend.test.loader import load_model_tests

from edgekit.errors import UnsupportedOpError
from edgekit.graph.opset import to_opset
from edgekit.targets.coreml.convert import Converted
from tests.targets.coreml.lowered import lower, run

X = np.array([[1.5, -2.0, 0.25], [0.5, 1.0, -3.0]], np.float32)
YES, NO = np.array(True), np.array(False)


def model(text: str, **constants: object) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items())
    return proto


def check(proto: onnx.ModelProto, *feeds: dict[str, np.ndarray], half: bool = False) -> Converted:
    """Runs one package on each of the feeds, as ONNX Runtime runs the graph."""
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    expected = [session.run(names, feed) for feed in feeds]
    converted = lower(proto, half)
    for feed, arrays in zip(feeds, expected, strict=True):
        got = run(converted, feed)
        for name, array in zip(names, arrays, strict=True):
            assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
            tolerance = 2e-2 * np.abs(array).max() if half or array.dtype == np.float16 else 1e-5
            np.testing.assert_allclose(got[name].astype(np.float64), array.astype(np.float64), rtol=1e-5, atol=tolerance, err_msg=name)
    return converted


def operators(converted: Converted) -> list[str]:
    (function,) = converted.model.get_spec().mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    return [operation.type for operation in block.operations if operation.type != "const"]


BRANCHES = {
    "a capture and a constant": ("a = Add(x, w)", "b = Mul(x, w)"),
    "a constant result": ("a = Identity(w)", "b = Neg(x)"),
    "two nodes on each side": ("o = Abs(x) a = Sqrt(o)", "m = Mul(x, x) b = Neg(m)"),
    "the capture itself": ("a = Identity(x)", "b = Identity(z)"),
    "a branch in a branch": (
        "a = If (d) <then_branch = u () => (float[2,3] g) { g = Add(x, z) }, else_branch = v () => (float[2,3] f) { f = Sub(x, z) }>",
        "b = Mul(z, w)",
    ),
    "a branch that a constant chooses": (
        "a = If (yes) <then_branch = u () => (float[2,3] g) { g = Add(x, z) }, "
        "else_branch = v () => (float[3] f) { f = ReduceSum<keepdims=0>(x, k) }>",
        "b = Mul(z, w)",
    ),
    "a target shape from outside": ("a = Reshape(x, s)", "t = Transpose(x) b = Reshape(t, s)"),
}


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("case", BRANCHES)
def test_branches_that_the_running_model_chooses(case, half):
    true, false = BRANCHES[case]
    proto = model(
        f"""g (bool c, bool d, float[2,3] x) => (float[2,3] y, float[2,3] z, float[2,3] q) {{ z = Exp(x)
        r = If (c) <then_branch = t () => (float[2,3] a) {{ {true} }}, else_branch = e () => (float[2,3] b) {{ {false} }}>
        y = Tanh(r) q = Add(x, w) }}""",
        w=X * 2, yes=YES, s=np.array([2, 3]), k=np.array([0]),
    )  # fmt: skip
    feeds = [{"c": np.array(c), "d": np.array(d), "x": X} for c in (True, False) for d in (True, False)]
    assert "cond" in operators(check(proto, *feeds, half=half))


def test_several_results_of_several_types_and_a_computed_condition_of_one_element():
    proto = model(
        """g (float[2,3] x, int64[2] n) => (float[2,3] y, int64[2] m, bool[2] p) {
        s = ReduceSum(x, k) u = Reshape(s, one) c = Greater(u, zero)
        y, m, p = If (c) <then_branch = t () => (float[2,3] a, int64[2] b, bool[2] d) { a = Identity(x) b = Identity(n) d = Greater(n, n) },
            else_branch = e () => (float[2,3] f, int64[2] h, bool[2] i) { f = Add(x, x) h = Add(n, n) i = Equal(n, n) }> }""",
        k=np.array([0, 1]), one=np.array([1]), zero=np.zeros(1, np.float32),
    )  # fmt: skip
    check(proto, *({"x": sign * X, "n": np.array([3, -4])} for sign in (1, -1)))


def test_a_condition_that_is_known_leaves_nothing():
    proto = model(
        "g (float[2,3] x) => (float[2,3] y) { y = If (c) <then_branch = t () => (float[2,3] a) { a = Neg(x) }, "
        "else_branch = e () => (float[2,3] b) { b = NoSuchOperator(x) }> }",
        c=YES,
    )
    assert "cond" not in operators(lower(proto))


def test_float16_graphs():
    proto = model(
        """g (bool c, float16[3] x) => (float16[3] y) {
        y = If (c) <then_branch = t () => (float16[3] a) { a = Mul(x, w) }, else_branch = e () => (float16[3] b) { b = Sub(x, w) }> }""",
        w=np.array([0.5, 2, 3], np.float16),
    )
    check(proto, *({"c": np.array(c), "x": X[0].astype(np.float16)} for c in (True, False)))


WHILE = """g (float[2,3] x, int64 most, bool first) => (float[2,3] y, int64 count, float[2,3] q) {{ q = Exp(x)
    y, count = Loop <body = b (int64 i, bool go, float[M,N] h, int64 k) => (bool go_on, float[M,N] h1, int64 k1) {{
        {body} }}> ({call}, x, zero) }}"""
STEP = "g = Mul(h, half) f = Cast<to=1>(i) h1 = Add(g, f) k1 = Add(k, i)"
WHILES = {
    "a count": (f"go_on = Identity(go) {STEP}", "most, yes"),
    "a count, and a condition at first": (f"go_on = Identity(go) {STEP}", "most, first"),
    "a condition on the result": (f"{STEP} m = ReduceMax<keepdims=0>(h1) go_on = Less(m, limit)", '"", yes'),
    "both": (f"{STEP} m = ReduceMax<keepdims=0>(h1) go_on = Less(m, limit)", "most, first"),
    "a large count": (f"{STEP} m = ReduceMax<keepdims=0>(h1) go_on = Less(m, limit)", "huge, first"),
    "many iterations": ("go_on = Identity(go) h1 = Mul(h, near) k1 = Add(k, i)", "many, yes"),
    "what stays as it was, and what is always the same": ("go_on = Less(i, four) h1 = Identity(h) k1 = Identity(four)", "most, first"),
    "values that change places": ("go_on = Identity(go) h1 = Sub(q, h) k1 = Sub(i, k)", "most, yes"),
    "a branch inside": (
        f"{STEP.replace('h1', 'h2')} go_on = Identity(go) s = ReduceSum<keepdims=0>(h2) up = Greater(s, limit) "
        "h1 = If (up) <then_branch = t () => (float[2,3] a) { a = Neg(h2) }, else_branch = e () => (float[2,3] b) { b = Add(h2, x) }>",
        "most, yes",
    ),
    "a static loop inside": (
        "go_on = Identity(go) k1 = Add(k, i) h1 = Loop <body = c (int64 j, bool go2, float[2,3] p) => (bool go3, float[2,3] p1) "
        "{ go3 = Identity(go2) f = Cast<to=1>(j) p2 = Add(p, f) p1 = Mul(p2, half) }> (three, yes, h)",
        "most, yes",
    ),
    "a dynamic loop inside": (
        "go_on = Identity(go) k1 = Add(k, i) h1 = Loop <body = c (int64 j, bool go2, float[2,3] p) => (bool go3, float[2,3] p1) "
        "{ go3 = Identity(go2) f = Cast<to=1>(j) p2 = Add(p, f) p1 = Mul(p2, half) }> (i, yes, h)",
        "most, yes",
    ),
}  # fmt: skip
CONSTANTS = {
    "yes": YES, "half": np.float32(0.5), "zero": np.int64(0), "limit": np.float32(4), "huge": np.int64(2**62), "many": np.int64(2000),
    "near": np.float32(0.999), "four": np.int64(4), "three": np.int64(3),
}  # fmt: skip


@pytest.mark.parametrize("case", WHILES)
def test_loops_that_only_the_running_model_decides(case):
    body, call = WHILES[case]
    proto = model(WHILE.format(body=body, call=call), **CONSTANTS)
    feeds = [{"x": X, "most": np.array(most), "first": np.array(first)} for most, first in ((5, True), (0, True), (1, True), (4, False))]
    assert "while_loop" in operators(check(proto, *feeds))


def test_a_loop_in_half_precision():
    body, call = WHILES["both"]
    check(model(WHILE.format(body=body, call=call), **CONSTANTS), {"x": X, "most": np.array(5), "first": YES}, half=True)


def test_what_a_loop_starts_with_may_be_constant():
    """Zeros stay zeros in the first iteration, and only there."""
    proto = model(
        """g (int64 most) => (float[2] y) {
        y = Loop <body = b (int64 i, bool go, float[2] h) => (bool go_on, float[2] h1) {
            go_on = Identity(go) f = Cast<to=1>(i) h1 = Add(h, f) }> (most, yes, start) }""",
        yes=YES, start=np.zeros(2, np.float32),
    )  # fmt: skip
    check(proto, {"most": np.array(4)})


@pytest.mark.parametrize("half", [False, True])
def test_a_recurrent_network_written_as_a_loop_over_time(half):
    """As TorchScript writes `for t in range(x.shape[0])`: the trip count from a Shape, a Gather by the number, stacked states."""
    proto = model(
        """g (float[5,2,3] x, float[2,4] h0) => (float[2,4] h, float[5,2,4] all) { d = Shape(x) n = Gather(d, zero)
        h, all = Loop <body = b (int64 t, bool go, float[2,4] p) => (bool go_on, float[2,4] p1, float[2,4] o) { go_on = Cast<to=9>(yes)
            row = Gather(x, t) u = MatMul(row, w) v = MatMul(p, r) s = Add(u, v) p1 = Tanh(s) o = Identity(p1) }> (n, yes, h0) }""",
        zero=np.int64(0), yes=YES, w=np.random.default_rng(2).normal(size=(3, 4)).astype(np.float32),
        r=np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32),
    )  # fmt: skip
    rng = np.random.default_rng(4)
    feed = {"x": rng.normal(size=(5, 2, 3)).astype(np.float32), "h0": rng.normal(size=(2, 4)).astype(np.float32)}
    found = operators(check(proto, feed, half=half))
    assert (found.count("while_loop"), found.count("tanh")) == (0, 5)


REFUSED = {
    "branches give": """g (bool c, float[2,3] x) => (float y) {
        r = If (c) <then_branch = t () => (float[2,3] a) { a = Neg(x) }, else_branch = e () => (float[3,2] b) { b = Transpose(x) }>
        y = ReduceSum<keepdims=0>(r) }""",
    r"\[2, 3\] and \[\] for one result": """g (bool c, float[2,3] x) => (float y) {
        r = If (c) <then_branch = t () => (float[2,3] a) { a = Neg(x) }, else_branch = e () => (float b) { b = ReduceSum<keepdims=0>(x) }>
        y = ReduceSum<keepdims=0>(r) }""",
    "sequence": """g (bool c, float[2,3] x) => (float[2,3] y) {
        q = If (c) <then_branch = t () => (seq(float[2,3]) a) { a = SequenceConstruct(x) },
            else_branch = e () => (seq(float[2,3]) b) { n = Neg(x) b = SequenceConstruct(n) }> y = SequenceAt(q, zero) }""",
    "result for each iteration": """g (int64 n, float[3] x) => (float[3] y, float s) {
        y, z = Loop <body = b (int64 i, bool go, float[3] h) => (bool go_on, float[3] h1, float[3] e) {
            go_on = Identity(go) h1 = Add(h, x) e = Neg(h) }> (n, yes, x)
        s = ReduceSum<keepdims=0>(z) }""",
    "changes its shape": """g (int64 n, float[1,3] x) => (float[M,3] y) {
        y = Loop <body = b (int64 i, bool go, float[K,3] h) => (bool go_on, float[L,3] h1) {
            go_on = Identity(go) h1 = Concat<axis=0>(h, x) }> (n, yes, x) }""",
    "never ends": """g (float[3] x) => (float[3] y) {
        y = Loop <body = b (int64 i, bool go, float[3] h) => (bool go_on, float[3] h1) {
            go_on = Identity(go) h1 = Add(h, x) }> ("", "", x) }""",
    "high rank|rank 5 at most": """g (bool c, float[2,3] x) => (float[2,3] y) {
        y = If (c) <then_branch = t () => (float[2,3] a) {
            r = Reshape(x, six) p = Transpose<perm=[5,3,1,0,2,4]>(r) q = Exp(p) s = Reshape(q, two) a = Neg(s) },
            else_branch = e () => (float[2,3] b) { b = Neg(x) }> }""",
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason):
    constants = {"yes": YES, "zero": np.int64(0), "six": np.array([1, 2, 1, 3, 1, 1]), "two": np.array([2, 3])}
    with pytest.raises(UnsupportedOpError, match=reason):
        lower(model(REFUSED[reason], **constants))


NODE_TESTS = {case.name: case for case in load_model_tests(kind="node") if case.name.startswith(("test_if", "test_loop", "test_scan"))}


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", NODE_TESTS)
def test_cases_of_onnx(name, known):
    """Each is computed, with its trip count and condition as inputs or as constants, or refused."""
    case = NODE_TESTS[name]
    proto = onnx.ModelProto()
    proto.CopyFrom(case.model or onnx.load(f"{case.model_dir}/model.onnx"))
    expected = "test_if" if name == "test_if" or name.startswith("test_scan9") or (known and name == "test_loop11") else "refused"
    inputs, outputs = _data(case, proto)
    for value in [value for value in proto.graph.input if known and value.name in ("trip_count", "cond")]:
        proto.graph.input.remove(value)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(inputs.pop(value.name), value.name))
    if expected == "refused":
        with pytest.raises(UnsupportedOpError):
            lower(ir.to_proto(to_opset(ir.from_proto(proto))))
        return
    got = run(lower(ir.to_proto(to_opset(ir.from_proto(proto)))), inputs)
    for value, array in outputs.items():
        np.testing.assert_allclose(got[value], array, rtol=1e-5, err_msg=value)


def _data(case, proto: onnx.ModelProto) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    def read(values, kind: str) -> dict[str, np.ndarray]:
        found = {}
        for index, value in enumerate(values):
            if value.type.HasField("tensor_type"):
                tensor = onnx.load_tensor(f"{case.model_dir}/test_data_set_0/{kind}_{index}.pb")
                found[value.name] = onnx.numpy_helper.to_array(tensor)
        return found

    if case.model_dir:
        return read(proto.graph.input, "input"), read(proto.graph.output, "output")
    ((inputs, outputs),) = case.data_sets

    def named(values, arrays) -> dict[str, np.ndarray]:
        return {value.name: np.asarray(array) for value, array in zip(values, arrays, strict=True) if value.type.HasField("tensor_type")}

    return named(proto.graph.input, inputs), named(proto.graph.output, outputs)
