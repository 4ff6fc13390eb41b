"""Every rule of `fold-batch-norm` against ONNX Runtime on the graph before it, and every condition under which it must not act."""

from __future__ import annotations

import math
import re

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from edgekit.contracts import Context, Effect
from edgekit.passes.reparameterize.fold_batch_norm import FoldBatchNorm

CONV = "g (float[1,4,7,5] x) => (float[1,6,7,5] y) { c = Conv<pads=[1,1,1,1]>(x, w, b)  y = BatchNormalization(c, s, t, m, v) }"


def norm_arrays(rng, channels, dtype=np.float32):
    """Scale of either sign, mean off zero, variance in [0.1, 1.1]."""
    return {
        "s": rng.uniform(-1, 1, channels).astype(dtype),
        "t": rng.normal(size=channels).astype(dtype),
        "m": rng.normal(0.5, 1, channels).astype(dtype),
        "v": rng.uniform(0.1, 1.1, channels).astype(dtype),
    }


@pytest.fixture
def arrays(rng):
    weights = {"w": rng.normal(size=(6, 4, 3, 3)).astype(np.float32), "b": rng.normal(size=6).astype(np.float32)}
    return weights | norm_arrays(rng, 6)


@pytest.fixture
def refused(build):
    """Returns a check that the pass leaves a graph as it is and says why."""

    def check(text, arrays, why):
        model = build(text, arrays)
        before, context = ir.to_proto(model).SerializeToString(), Context()
        assert FoldBatchNorm().apply(model, context) == 0
        assert ir.to_proto(model).SerializeToString() == before
        (refusal,) = context.refusals
        assert refusal.where.startswith("BatchNormalization_")
        assert why in refusal.why

    return check


@pytest.fixture
def folded(build, run, assert_equal_up_to_rounding):
    """Returns a check that one batch norm folds, that the result is right, and that a second application does nothing."""

    def check(text, arrays, feeds):
        model = build(text, arrays)
        reference = run(model, feeds)
        assert FoldBatchNorm().apply(model, Context()) == 1
        assert "BatchNormalization" not in [node.op_type for node in model.graph]
        assert_equal_up_to_rounding(run(model, feeds), reference)
        after = ir.to_proto(model).SerializeToString()
        assert FoldBatchNorm().apply(model, Context()) == 0
        assert ir.to_proto(model).SerializeToString() == after
        return model

    return check


def test_declaration():
    assert (FoldBatchNorm.name, FoldBatchNorm.effect, FoldBatchNorm.default_order) == ("fold-batch-norm", Effect.EXACT, None)


def test_conv(folded, arrays, rng):
    model = folded(CONV, arrays, {"x": rng.normal(size=(1, 4, 7, 5)).astype(np.float32)})
    (conv,) = model.graph
    assert [value.name for value in conv.inputs] == ["x", "w", "b"]  # the weights keep their names
    assert set(model.graph.initializers) == {"w", "b"}
    assert conv.outputs[0].name == "y"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_conv_in_float32_and_float64(build, run, assert_equal_up_to_rounding, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    transpose = data.draw(st.booleans())
    groups, (kh, kw) = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.tuples(st.integers(1, 5), st.integers(1, 4)))
    strides, dilations = data.draw(st.tuples(*[st.integers(1, 2)] * 2)), data.draw(st.tuples(*[st.integers(1, 2)] * 2))
    pads = [data.draw(st.integers(0, 2)) for _ in range(4)]
    bias, outputs = data.draw(st.booleans()), groups * data.draw(st.integers(1, 3))
    if transpose:
        pads = [min(pad, dilation * (k - 1) // 2) for pad, dilation, k in zip(pads, dilations * 2, (kh, kw) * 2, strict=True)]
    shape = (4, outputs // groups, kh, kw) if transpose else (outputs, 4 // groups, kh, kw)
    weights = {"w": rng.normal(size=shape), **({"b": rng.normal(size=outputs)} if bias else {}), **norm_arrays(rng, outputs, np.float64)}
    operator = "ConvTranspose" if transpose else "Conv"
    attributes = f"<group={groups}, strides={list(strides)}, dilations={list(dilations)}, pads={pads}>"

    def text(kind):
        inputs = "x, w, b" if bias else "x, w"
        return (
            f"g ({kind}[2,4,11,9] x) => ({kind}[n,c,h,w0] y) "
            f"{{ c = {operator}{attributes}({inputs})  y = BatchNormalization(c, s, t, m, v) }}"
        )

    x = rng.normal(0.3, 1, (2, 4, 11, 9))
    single = build(text("float"), {name: array.astype(np.float32) for name, array in weights.items()})
    feeds = {"x": x.astype(np.float32)}
    reference = run(single, feeds)
    assert FoldBatchNorm().apply(single, Context()) == 1
    assert_equal_up_to_rounding(run(single, feeds), reference)

    double = build(text("double"), weights)
    assert FoldBatchNorm().apply(double, Context()) == 1
    (conv,) = double.graph
    w, b = (torch.from_numpy(value.const_value.numpy()) for value in conv.inputs[1:])

    def convolve(w, b):
        source = torch.from_numpy(x)
        if not transpose:
            source = functional.pad(source, (pads[1], pads[3], pads[0], pads[2]))
            return functional.conv2d(source, w, b, strides, 0, dilations, groups)
        full = functional.conv_transpose2d(source, w, b, strides, 0, 0, groups, dilations)
        return full[:, :, pads[0] : full.shape[2] - pads[2], pads[1] : full.shape[3] - pads[3]]

    raw = convolve(torch.from_numpy(weights["w"]), torch.from_numpy(weights["b"]) if bias else None)
    s, t, m, v = (torch.from_numpy(weights[name]) for name in "stmv")
    expected = functional.batch_norm(raw, m, v, s, t, eps=float(np.float32(1e-5)))
    assert_equal_up_to_rounding([convolve(w, b).numpy()], [expected.numpy()])


@pytest.mark.parametrize("trans_b", [0, 1])
@pytest.mark.parametrize("bias", [(), (1,), (6,), (1, 6), (3, 6), (3, 1), None])
def test_gemm(folded, rng, trans_b, bias):
    arrays = {"w": rng.normal(size=(6, 5) if trans_b else (5, 6)).astype(np.float32)} | norm_arrays(rng, 6)
    if bias is not None:
        arrays["b"] = rng.normal(size=bias).astype(np.float32)
    text = f"""g (float[5,3] x) => (float[3,6] y) {{
        c = Gemm<alpha=0.5, beta=1.5, transA=1, transB={trans_b}>(x, w{", b" if bias is not None else ""})
        y = BatchNormalization(c, s, t, m, v) }}"""
    model = folded(text, arrays, {"x": rng.normal(size=(5, 3)).astype(np.float32)})
    assert [node.op_type for node in model.graph] == ["Gemm"]


@pytest.mark.parametrize(
    ("nodes", "bias", "left"),
    [
        ("c = MatMul(x, w)", None, ["MatMul", "Add"]),
        ("p = MatMul(x, w)  c = Add(p, b)", (6,), ["MatMul", "Add"]),
        ("p = MatMul(x, w)  c = Add(b, p)", (1, 6), ["MatMul", "Add"]),
        ("p = MatMul(x, w)  c = Add(b, p)", (), ["MatMul", "Add"]),
    ],
)
def test_matmul(folded, rng, nodes, bias, left):
    arrays = {"w": rng.normal(size=(5, 6)).astype(np.float32)} | norm_arrays(rng, 6)
    if bias is not None:
        arrays["b"] = rng.normal(size=bias).astype(np.float32)
    text = f"g (float[3,5] x) => (float[3,6] y) {{ {nodes}  y = BatchNormalization(c, s, t, m, v) }}"
    model = folded(text, arrays, {"x": rng.normal(size=(3, 5)).astype(np.float32)})
    assert [node.op_type for node in model.graph] == left


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("(float[2,7,6] y) { c = MatMul(x, w)  t0 = Transpose<perm=[0,2,1]>(c)  n = NORM(t0)  y = Transpose<perm=[0,2,1]>(n) }",
         ["MatMul", "Add"]),
        ("(float[2,7,6] y) { p = MatMul(x, w)  c = Add(p, b)  r = Reshape(c, flat)  n = NORM(r)  y = Reshape(n, back) }",
         ["MatMul", "Add"]),
        ("(float[2,6] y) { c = MatMul(x, w)  t0 = Transpose<perm=[0,2,1]>(c)  p = ReduceMean<keepdims=0>(t0, last)  y = NORM(p) }",
         ["MatMul", "Add", "Transpose", "ReduceMean"]),
    ],
)  # fmt: skip
def test_layout_between(folded, rng, text, left):
    arrays = {"w": rng.normal(size=(5, 6)).astype(np.float32), "b": rng.normal(size=6).astype(np.float32)} | norm_arrays(rng, 6)
    arrays |= {"flat": np.array([14, 6]), "back": np.array([2, 7, 6]), "last": np.array([-1])}
    text = re.sub(r"NORM\((\w+)\)", r"BatchNormalization(\1, s, t, m, v)", f"g (float[2,7,5] x) => {text}")
    used = re.findall(r"\w+", text)
    feeds = {"x": rng.normal(size=(2, 7, 5)).astype(np.float32)}
    model = folded(text, {name: array for name, array in arrays.items() if name in used}, feeds)
    assert [node.op_type for node in model.graph] == left


def test_value_between_that_is_read_elsewhere_is_refused(refused, arrays):
    text = CONV.replace("y = Batch", "p = AveragePool<kernel_shape=[2,2], pads=[1,1,0,0]>(c)  y = Batch").replace("(c, s", "(p, s")
    refused(text.replace("=> (", "=> (float[1,6,7,5] p, "), arrays, "the output of AveragePool 'AveragePool_1' is read elsewhere")


def test_two_norms_in_a_row_fold_both(build, run, assert_equal_up_to_rounding, arrays, rng):
    text = CONV.replace("y = Batch", "d = Batch").replace("}", " y = BatchNormalization<epsilon=0.1>(d, s, t, m, v) }")
    model, feeds = build(text, arrays), {"x": rng.normal(size=(1, 4, 7, 5)).astype(np.float32)}
    reference = run(model, feeds)
    assert FoldBatchNorm().apply(model, Context()) == 2
    assert [node.op_type for node in model.graph] == ["Conv"]
    assert_equal_up_to_rounding(run(model, feeds), reference)


def test_weight_shared_by_two_convs_is_not_changed_for_the_other(folded, arrays, rng):
    text = """g (float[1,4,7,5] x) => (float[1,6,7,5] y, float[1,6,7,5] z) {
        c = Conv<pads=[1,1,1,1]>(x, w, b)  z = Conv<pads=[1,1,1,1]>(x, w, b)  y = BatchNormalization(c, s, t, m, v) }"""
    model = folded(text, arrays, {"x": rng.normal(size=(1, 4, 7, 5)).astype(np.float32)})
    np.testing.assert_array_equal(model.graph.initializers["w"].const_value.numpy(), arrays["w"])
    assert {node.inputs[1].name for node in model.graph} == {"w", "w_1"}


def test_metadata_and_names_stay(build, arrays):
    model = build(CONV, arrays)
    model.graph[0].name, model.graph[0].metadata_props["edgekit.module"] = "stem.conv/Conv", "stem.conv"
    FoldBatchNorm().apply(model, Context())
    assert (model.graph[0].name, model.graph[0].metadata_props["edgekit.module"]) == ("stem.conv/Conv", "stem.conv")


def test_traced_module(trace, run, operators):
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, groups=1, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(8 * 5 * 3, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 4, bias=False), torch.nn.BatchNorm1d(4),
    )  # fmt: skip
    model = trace(module, (2, 3, 7, 5))
    assert FoldBatchNorm().apply(model, Context()) == 3
    assert "BatchNormalization" not in operators(model)
    x = torch.randn(2, 3, 7, 5) + 0.3
    (result,) = run(model, {model.graph.inputs[0].name: x.numpy()})
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=0, atol=1e-4)


def test_float16_model_folds_in_float64(build, arrays):
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    half["v"][:] = 6e-8  # the smallest of float16; its square root would be far off there
    model = build(CONV.replace("float", "float16"), half)
    assert FoldBatchNorm().apply(model, Context()) == 1
    scale = half["s"].astype(np.float64) / np.sqrt(half["v"].astype(np.float64) + np.float32(1e-5))
    expected = (half["w"].astype(np.float64) * scale[:, None, None, None]).astype(np.float16)
    np.testing.assert_array_equal(model.graph[0].inputs[1].const_value.numpy(), expected)


def test_folding_that_overflows_float16_is_refused(refused, arrays):
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    half["w"][0, 0, 0, 0], half["s"][0], half["v"][0] = 6e4, 1.0, 0.0
    refused(CONV.replace("float", "float16"), half, "would not be finite in float16")


@pytest.mark.parametrize("name", ["w", "b", "s", "t", "m", "v"])
def test_parameter_that_the_caller_may_override_is_refused(refused, arrays, name):
    shape = ",".join(map(str, arrays[name].shape))
    refused(CONV.replace("(float[1,4,7,5] x)", f"(float[1,4,7,5] x, float[{shape}] {name})"), arrays, "is not a constant")


def test_weight_that_a_node_computes_is_refused(refused, arrays):
    refused(CONV.replace("{ c", "{ u = Neg(w)  c").replace("x, w", "x, u"), arrays, "the weight of Conv 'Conv_1' is not a constant")


def test_training_mode_is_refused(refused, arrays):
    text = CONV.replace("y = BatchNormalization", "y, rm, rv = BatchNormalization<training_mode=1>")
    refused(text, arrays, "training mode")


@pytest.mark.parametrize("value", [-1e-5, -2.0, math.nan])
def test_variance_without_square_root_is_refused(refused, arrays, value):
    arrays["v"][3] = value
    refused(CONV, arrays, "in channel 3")


def test_conv_output_read_elsewhere_is_refused(refused, arrays):
    text = CONV.replace("=> (", "=> (float[1,6,7,5] z, ").replace("}", " z = Relu(c) }")
    refused(text, arrays, "the output of Conv 'Conv_0' is read elsewhere")


def test_conv_output_given_out_is_refused(refused, arrays):
    refused(CONV.replace("=> (", "=> (float[1,6,7,5] c, "), arrays, "is read elsewhere")


def test_norm_without_linear_operator_before_it_is_refused(refused, arrays):
    text = "g (float[1,6,7,5] x) => (float[1,6,7,5] y) { y = BatchNormalization(x, s, t, m, v) }"
    refused(text, {name: arrays[name] for name in "stmv"}, "graph input")
    refused(text.replace("{ y", "{ r = Relu(x)  y").replace("(x, s", "(r, s"), {name: arrays[name] for name in "stmv"}, "Relu 'Relu_0'")


def test_matmul_over_tokens_is_refused(refused, rng):
    text = "g (float[2,6,5] x) => (float[2,6,4] y) { c = MatMul(x, w)  y = BatchNormalization(c, s, t, m, v) }"
    refused(text, {"w": rng.normal(size=(5, 4)).astype(np.float32)} | norm_arrays(rng, 6), "does not give [B, C]")


def test_add_that_is_no_bias_is_refused(refused, arrays, rng):
    residual = CONV.replace("y = Batch", "r = Add(c, c)  y = Batch").replace("(c, s", "(r, s").replace("}", " z = Relu(r) }")
    refused(residual.replace("=> (", "=> (float[1,6,7,5] z, "), arrays, "is made by Add 'Add_1', which it cannot be folded into")
    text = "g (float[3,5] x, float[3,6] z) => (float[3,6] y) { p = MatMul(x, w)  c = Add(p, z)  y = BatchNormalization(c, s, t, m, v) }"
    refused(text, {"w": rng.normal(size=(5, 6)).astype(np.float32)} | norm_arrays(rng, 6), "the bias of Add 'Add_1' is not a constant")
    matrix = {"w": rng.normal(size=(5, 6)).astype(np.float32), "z": rng.normal(size=(3, 6)).astype(np.float32)} | norm_arrays(rng, 6)
    refused(text.replace(", float[3,6] z)", ")"), matrix, "is not one number per column")
