"""`to-float16`: which nodes become float16, where the Casts stand, and that ONNX Runtime runs the result close to float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from edgekit.contracts import Context, Effect
from edgekit.errors import UsageError
from edgekit.models.vit import VisionTransformer
from edgekit.passes.to_float16 import ToFloat16

CONV = "g (float[1,4,7,5] x) => (float[1,6,5,3] y) { c = Conv(x, w, b)  y = Relu(c) }"


@pytest.fixture
def arrays(rng):
    return {"w": rng.normal(size=(6, 4, 3, 3)).astype(np.float32), "b": rng.normal(size=6).astype(np.float32)}


@pytest.fixture
def feeds(rng):
    """Random values in the dtypes of a graph's inputs."""
    return lambda model: {v.name: rng.normal(0.3, 1, list(v.shape)).astype(v.dtype.numpy()) for v in model.graph.inputs}


@pytest.fixture
def convert(build, run, feeds):
    """Returns `convert(text, arrays, **options)`: the converted graph, the count and the context.

    The graph passes ONNX's full check, its recorded types are those that inference finds without them, it runs in ONNX Runtime within 1 %
    of the float32 graph, and a second application leaves it as it is.
    """

    def check(text, arrays, tolerance=1e-2, **options):
        model = build(text, arrays)
        values = feeds(model)
        references = run(model, values)
        context = Context()
        count = ToFloat16(**options).apply(model, context)
        assert_types_follow_from_the_inputs(model)
        typed = {value.name: values[value.name].astype(value.dtype.numpy()) for value in model.graph.inputs}
        for result, reference, output in zip(run(model, typed), references, model.graph.outputs, strict=True):
            assert ir.DataType.from_numpy(result.dtype) == output.dtype
            if reference.dtype.kind == "f":
                bound = tolerance * np.abs(reference).max()
                np.testing.assert_allclose(result.astype(np.float32), reference, rtol=0, atol=bound)
            else:
                np.testing.assert_array_equal(result, reference)
        after = ir.to_proto(model).SerializeToString()
        assert ToFloat16(**options).apply(model, Context()) == 0
        assert ir.to_proto(model).SerializeToString() == after
        return model, count, context

    return check


def assert_types_follow_from_the_inputs(model):
    recorded = {output.name: output.dtype for node in model.graph for output in node.outputs}
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    for info in (*inferred.graph.value_info, *inferred.graph.output):
        if info.name in recorded:
            assert recorded[info.name].value == info.type.tensor_type.elem_type, info.name


def types(model):
    """The dtype of each node's first output, by operator and in order."""
    return [(node.op_type, node.outputs[0].dtype.name) for node in model.graph]


def test_declaration():
    assert (ToFloat16.name, ToFloat16.effect, ToFloat16.default_order) == ("to-float16", Effect.APPROXIMATE, None)
    assert ToFloat16() == ToFloat16(keep_io=True, keep=())


def test_weights_and_arithmetic_become_float16(convert, arrays):
    model, count, context = convert(CONV, arrays)
    assert count == 2
    assert context.refusals == []
    assert types(model) == [("Cast", "FLOAT16"), ("Conv", "FLOAT16"), ("Relu", "FLOAT16"), ("Cast", "FLOAT")]
    assert {name: value.dtype.name for name, value in model.graph.initializers.items()} == {"w": "FLOAT16", "b": "FLOAT16"}
    assert [(value.name, value.dtype.name) for value in (*model.graph.inputs, *model.graph.outputs)] == [("x", "FLOAT"), ("y", "FLOAT")]
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), arrays["w"].astype(np.float16))


def test_inputs_and_outputs_on_demand(convert, arrays):
    model, _, _ = convert(CONV, arrays, keep_io=False)
    assert types(model) == [("Conv", "FLOAT16"), ("Relu", "FLOAT16")]
    assert [(value.name, value.dtype.name) for value in (*model.graph.inputs, *model.graph.outputs)] == [("x", "FLOAT16"), ("y", "FLOAT16")]


def test_value_that_is_given_out_and_read_keeps_its_name(convert, arrays):
    model, _, _ = convert(CONV.replace("=> (", "=> (float[1,6,5,3] c, "), arrays)
    assert [value.name for value in model.graph.outputs] == ["c", "y"]
    assert [op for op, _ in types(model)].count("Cast") == 3


def test_one_cast_serves_all_readers(convert, arrays):
    text = "g (float[1,4,7,5] x) => (float[1,6,5,3] y) { c = Conv(x, w, b)  d = Conv(x, w)  y = Add(c, d) }"
    model, _, _ = convert(text, arrays)
    assert [op for op, _ in types(model)] == ["Cast", "Conv", "Conv", "Add", "Cast"]


@pytest.mark.parametrize("pattern", ["Relu", "blocks.0/Relu", "blocks.0/*", "Re*"])
def test_kept_by_operator_or_name(convert, arrays, pattern):
    text = CONV.replace("y = Relu", '["blocks.0/Relu"] y = Relu')
    model, count, _ = convert(text, arrays, keep=(pattern,))
    assert count == 2
    assert types(model) == [("Cast", "FLOAT16"), ("Conv", "FLOAT16"), ("Cast", "FLOAT"), ("Relu", "FLOAT")]


def test_kept_node_keeps_the_float32_weight_that_it_shares(convert, arrays):
    text = "g (float[1,4,7,5] x) => (float[1,6,5,3] y) { c = Conv(x, w, b)  [head] d = Conv(x, w)  y = Add(c, d) }"
    model, count, _ = convert(text, arrays, keep=("head",))
    assert count == 2
    assert {name: value.dtype.name for name, value in model.graph.initializers.items()} == {
        "w": "FLOAT",
        "w.float16": "FLOAT16",
        "b": "FLOAT16",
    }


def test_pattern_that_fits_nothing_is_reported(convert, arrays):
    _, _, context = convert(CONV, arrays, keep=("Sofmax",))
    assert [(refusal.where, "'Sofmax'" in refusal.why) for refusal in context.refusals] == [("keep", True)]


def test_weight_beyond_the_range_keeps_its_reader_in_float32(convert, arrays):
    arrays["w"][0, 0, 0, 0] = -1e5
    text = CONV.replace("y = Relu(c)", "r = Relu(c)  y = Mul(r, b2)")
    model, count, context = convert(text, arrays | {"b2": np.float32([0.5])})
    assert count == 1
    assert types(model) == [("Conv", "FLOAT"), ("Cast", "FLOAT16"), ("Relu", "FLOAT16"), ("Mul", "FLOAT16"), ("Cast", "FLOAT")]
    (refusal,) = context.refusals
    assert refusal.where == "Conv_0"
    assert "'w' holds -100000" in refusal.why


def test_largest_float16_is_not_beyond_the_range(convert, arrays):
    arrays["b"][0] = 65504.0
    _, count, context = convert(CONV, arrays)
    assert (count, context.refusals) == (2, [])


def test_infinite_mask_stays_infinite(convert, rng):
    mask = np.where(np.tri(5, dtype=bool), 0, -np.inf).astype(np.float32)
    model, count, context = convert("g (float[5,5] x) => (float[5,5] y) { a = Add(x, mask)  y = Softmax(a) }", {"mask": mask})
    assert (count, context.refusals) == (1, [])
    assert np.isinf(model.graph.initializers["mask"].const_value.numpy()).sum() == 10


def test_weights_that_become_zero_are_counted(convert, arrays):
    arrays["w"].reshape(-1)[:3], arrays["b"][:2] = 1e-9, -1e-9
    _, count, context = convert(CONV, arrays)
    assert count == 2
    (refusal,) = context.refusals
    assert refusal.where == "w"
    assert "5 weights of 2 initializers" in refusal.why
    assert "3 of them here" in refusal.why


def test_epsilon_that_would_become_zero_keeps_its_reader_in_float32(convert, rng):
    text = "g (float[2,5] x) => (float[2,5] y) { n = ReduceL2<keepdims=1>(x, axes)  m = Max(n, eps)  d = Div(x, m)  y = Mul(d, w) }"
    arrays = {"axes": np.array([1]), "eps": np.float32(1e-12), "w": rng.normal(size=5).astype(np.float32)}
    model, count, context = convert(text, arrays)
    assert count == 1
    assert ("Max", "FLOAT") in types(model)
    assert "'eps' is a single number that would become zero" in context.refusals[0].why


def test_inputs_that_onnx_fixes_to_float32_stay(convert, arrays):
    text = 'g (float[1,6,5,3] x) => (float[1,6,10,6] y) { u = Mul(x, k)  y = Resize<mode="linear">(u, , scales) }'
    model, count, _ = convert(text, {"k": np.full((1, 6, 1, 1), 0.5, np.float32), "scales": np.float32([1, 1, 2, 2])})
    assert count == 1
    assert model.graph.initializers["scales"].dtype == ir.DataType.FLOAT
    assert ("Resize", "FLOAT16") in types(model)


def test_operator_without_float16_stays(convert):
    """ONNX's Range is defined on float32 and not on float16."""
    text = "g (float limit) => (float[n] y) { r = Range(zero, stop, one)  p = Mul(r, w)  y = Add(p, limit) }"
    arrays = {"zero": np.float32(0), "one": np.float32(1), "stop": np.float32(4), "w": np.float32([1, 2, 3, 4])}
    model, count, _ = convert(text, arrays)
    assert count == 1
    assert ("Range", "FLOAT") in types(model)
    assert ("Mul", "FLOAT16") in types(model)


def test_attributes_that_choose_float32_choose_float16(convert):
    text = """g (int64[3] i, float[3] x) => (float[3] y) {
        f = Cast<to=1>(i)  o = ConstantOfShape<value=float[1]{0.5}>(three)  a = Mul(f, o)  b = Mul(a, x)  y = Add(b, w) }"""
    model, count, _ = convert(text, {"three": np.array([3]), "w": np.float32([1, 2, 3])})
    assert count == 2  # w and the value of ConstantOfShape
    assert types(model)[1:3] == [("Cast", "FLOAT16"), ("ConstantOfShape", "FLOAT16")]
    assert [op for op, _ in types(model)].count("Cast") == 3  # of x, of i, of y


def test_constant_of_shape_beyond_the_range_stays(convert):
    text = "g (float[3] x) => (float[3] y) { o = ConstantOfShape<value=float[1]{-1e9}>(three)  a = Mul(x, w)  y = Max(a, o) }"
    model, count, _ = convert(text, {"three": np.array([3]), "w": np.float32([1, 2, 3])})
    assert count == 1
    assert ("ConstantOfShape", "FLOAT") in types(model)


def test_cast_to_integers_reads_what_is_there(convert, rng):
    """An index computed in float32 is not rounded to float16 before it becomes an integer."""
    text = "g (float[3] x) => (int64[3] y, float[3] z) { r = Range(a, e, one)  s = Cast<to=7>(r)  y = Identity(s)  z = Mul(x, w) }"
    arrays = {"a": np.float32(4097), "e": np.float32(4100), "one": np.float32(1), "w": np.float32([1, 2, 3])}
    model, _, _ = convert(text, arrays)
    assert [op for op, _ in types(model)] == ["Cast", "Range", "Cast", "Identity", "Mul", "Cast"]


def test_cast_and_shape_read_float16_without_another_cast(convert):
    text = "g (float[3] x) => (bool[3] y, int64[1] z) { p = Mul(x, w)  y = Cast<to=9>(p)  z = Shape(p) }"
    model, _, _ = convert(text, {"w": np.float32([1, 2, 3])})
    assert [op for op, _ in types(model)] == ["Cast", "Mul", "Cast", "Shape"]


def test_quantization_stays_in_float32(convert, arrays):
    text = """g (float[1,4,7,5] x) => (float[1,6,5,3] y) {
        q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  c = Conv(d, w, b)  y = Relu(c) }"""
    model, count, _ = convert(text, arrays | {"s": np.float32(0.01), "z": np.uint8(128)})
    assert count == 2
    assert ("DequantizeLinear", "FLOAT") in types(model)
    assert model.graph.initializers["s"].dtype == ir.DataType.FLOAT


def test_random_numbers_are_made_in_float32(build, run, arrays):
    text = "g (float[1,4,7,5] x) => (float[1,6,5,3] y) { n = RandomNormalLike<seed=1.0>(x)  a = Add(x, n)  y = Conv(a, w, b) }"
    text = text.replace("n = RandomNormalLike<seed=1.0>(x)", "n = RandomNormal<seed=1.0, shape=[1,4,7,5]>()")
    model = build(text, arrays)
    assert ToFloat16().apply(model, Context()) == 2
    assert_types_follow_from_the_inputs(model)
    assert {"RandomNormal": "FLOAT", "Add": "FLOAT16"}.items() <= dict(types(model)).items()


def test_subgraph_stays_in_float32_with_what_it_captures(convert, arrays):
    text = """g (float[1,4,7,5] x, bool flag) => (float[1,6,5,3] y) {
        c = Conv(x, w, b)
        i = If(flag) <then_branch = t () => (float[1,6,5,3] p) { p = Mul(c, k) }, else_branch = e () => (float[1,6,5,3] q) { q = Relu(c) }>
        y = Mul(i, k) }"""
    model, count, context = convert(text, arrays | {"k": np.full((1, 6, 1, 1), 0.5, np.float32)})
    assert count == 3
    assert dict(types(model)) | {"Cast": ""} == {"Cast": "", "Conv": "FLOAT16", "If": "FLOAT", "Mul": "FLOAT16"}
    assert [refusal.where for refusal in context.refusals] == ["If_1"]
    assert "it holds a subgraph" in context.refusals[0].why
    assert {name: value.dtype.name for name, value in model.graph.initializers.items() if name.startswith("k")} == {
        "k": "FLOAT",
        "k.float16": "FLOAT16",
    }


def test_weight_that_the_caller_may_override_is_cast_at_run_time(build, run, arrays):
    model = build(CONV.replace("x) =>", "x, float[6] b) =>"), arrays)
    assert ToFloat16().apply(model, Context()) == 1
    assert_types_follow_from_the_inputs(model)
    assert model.graph.initializers["b"].dtype == ir.DataType.FLOAT
    feeds = {"x": np.zeros((1, 4, 7, 5), np.float32), "b": np.arange(6, dtype=np.float32)}
    assert run(model, feeds)[0][0, :, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_foreign_operator_stays_and_says_so(build, arrays):
    model = build(CONV, arrays)
    model.graph[1].domain, model.graph[1].op_type = "somewhere", "Special"
    model.opset_imports["somewhere"] = 1
    context = Context()
    assert ToFloat16().apply(model, context) == 2
    assert types(model) == [("Cast", "FLOAT16"), ("Conv", "FLOAT16"), ("Cast", "FLOAT"), ("Special", "FLOAT")]
    assert "somewhere::Special stays in float32" in context.refusals[0].why


@pytest.mark.parametrize(("text", "arrays"), [
    ("g (float[3] x) => (float[3] y) { y = Relu(x) }", {}),
    ("g (float16[3] x) => (float16[3] y) { y = Mul(x, h) }", {"h": np.float16([1, 2, 3])}),
    ("g (int64[3] x) => (int64[3] y) { y = Mul(x, h) }", {"h": np.array([1, 2, 3])}),
])  # fmt: skip
def test_graph_without_float32_weights_is_left_as_it_is(build, text, arrays):
    model, context = build(text, arrays), Context()
    before = ir.to_proto(model).SerializeToString()
    assert ToFloat16().apply(model, context) == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert "no float32 weights" in context.refusals[0].why


@pytest.mark.parametrize("keep_io", [True, False])
def test_batch_norm_and_old_opset(build, run, feeds, rng, keep_io):
    """Opset 14 ties the statistics of a batch norm to the type of its input."""
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 14]>
        g (float[1,4,7,5] x) => (float[1,4,7,5] y) { y = BatchNormalization(x, s, t, m, v) }""")
    norm = {"s": rng.uniform(-1, 1, 4), "t": rng.normal(size=4), "m": rng.normal(size=4), "v": rng.uniform(0.1, 1.1, 4)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in norm.items())
    model = ir.from_proto(proto)
    values = feeds(model)
    (reference,) = run(model, values)
    assert ToFloat16(keep_io=keep_io).apply(model, Context()) == 4
    assert_types_follow_from_the_inputs(model)
    (result,) = run(model, {"x": values["x"].astype(np.float32 if keep_io else np.float16)})
    np.testing.assert_allclose(result.astype(np.float32), reference, rtol=0, atol=1e-2 * np.abs(reference).max())


@pytest.mark.parametrize("keep_io", [True, False])
def test_vision_transformer(trace, run, keep_io):
    torch.manual_seed(0)
    module = VisionTransformer(side=16, patch=4, channels=3, dim=32, depth=2, heads=2, mlp_ratio=2, classes=7)
    model = trace(module, (2, 3, 16, 16))
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.dtype == ir.DataType.FLOAT)
    context = Context()
    assert ToFloat16(keep_io=keep_io).apply(model, context) > 20
    assert context.refusals == []
    assert_types_follow_from_the_inputs(model)
    assert [op for op, _ in types(model)].count("Cast") == (2 if keep_io else 0)
    floats = [value.const_value for value in model.graph.initializers.values() if value.dtype.is_floating_point()]
    assert sum(tensor.nbytes for tensor in floats) * 2 == size
    x = torch.randn(2, 3, 16, 16)
    (result,) = run(model, {model.graph.inputs[0].name: x.numpy().astype(np.float32 if keep_io else np.float16)})
    expected = module(x).detach().numpy()
    np.testing.assert_allclose(result.astype(np.float32), expected, rtol=0, atol=1e-2 * np.abs(expected).max())


SQUARES = "g (float[2,4] x) => (float[2,4] y) { p = Mul(x, x)  r = Sqrt(p)  a = Mul(r, w)  y = Relu(a) }"


@pytest.fixture
def squares(build):
    """A graph whose squares overflow for the second of two inputs."""
    model = build(SQUARES, {"w": np.float32([1, 2, 3, 4])})
    for node, module in zip(model.graph, ("norm", "norm.root", "normal", "act"), strict=True):
        node.metadata_props["edgekit.module"] = module
    return model, np.full((2, 4), 10, np.float32), np.full((2, 4), 1000, np.float32)


def test_nodes_around_a_value_that_overflows_stay_and_say_so(squares, run):
    model, _, large = squares
    context = Context(calibration=[{"x": large}])
    assert ToFloat16().apply(model, context) == 1
    assert types(model) == [
        ("Mul", "FLOAT"), ("Sqrt", "FLOAT"), ("Cast", "FLOAT16"), ("Mul", "FLOAT16"), ("Relu", "FLOAT16"), ("Cast", "FLOAT")
    ]  # fmt: skip
    (refusal,) = context.refusals
    assert refusal.where == "Mul_0"
    assert "stays in float32: in 'p' it reaches 1e+06" in refusal.why
    np.testing.assert_array_equal(run(model, {"x": large})[0], np.float32([[1000, 2000, 3000, 4000]] * 2))


def test_values_in_range_change_nothing(squares):
    model, small, _ = squares
    context = Context(calibration=[{"x": small}])
    assert ToFloat16().apply(model, context) == 1
    assert context.refusals == []
    assert [op for op, type_ in types(model) if type_ == "FLOAT"] == ["Cast"]


def test_overflow_refuse_converts_nothing_and_ignore_everything(squares):
    model, _, large = squares
    before = ir.to_proto(model).SerializeToString()
    context = Context(calibration=[{"x": large}])
    assert ToFloat16(overflow="refuse").apply(model, context) == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert "is at risk" in context.refusals[0].why
    context = Context(calibration=[{"x": large}])
    assert ToFloat16(overflow="ignore").apply(model, context) == 1
    assert context.refusals == []
    with pytest.raises(UsageError, match="no overflow='kep'"):
        ToFloat16(overflow="kep")


@pytest.mark.parametrize(("keep", "stays"), [
    (("Sqrt_1",), ["Sqrt"]),
    (("norm",), ["Mul", "Sqrt"]),  # and not `normal`
    (("norm.root", "act"), ["Sqrt", "Relu"]),
])  # fmt: skip
def test_kept_are_nodes_and_modules_with_all_below(squares, keep, stays):
    model, _, _ = squares
    context = Context()
    ToFloat16(keep=keep).apply(model, context)
    assert [op for op, type_ in types(model) if type_ == "FLOAT" and op != "Cast"] == stays
    assert context.refusals == []


def test_name_of_nothing_is_refused(squares):
    context = Context()
    ToFloat16(keep=("nor",)).apply(squares[0], context)
    assert [(refusal.where, "'nor'" in refusal.why) for refusal in context.refusals] == [("keep", True)]


def test_whole_operator_whose_squares_overflow_stays(build):
    model = build("g (float[2,8] x) => (float[2,8] y) { n = LayerNormalization(x, s)  y = Mul(n, s) }", {"s": np.ones(8, np.float32)})
    context = Context(calibration=[{"x": np.linspace(-3000, 3000, 16, dtype=np.float32).reshape(2, 8)}])
    assert ToFloat16().apply(model, context) == 1
    assert ("LayerNormalization", "FLOAT") in types(model)
    assert ("Mul", "FLOAT16") in types(model)
    assert [refusal.where for refusal in context.refusals] == ["LayerNormalization_0"]
