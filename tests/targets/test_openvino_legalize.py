"""What OpenVINO computes wrongly by itself is right after `legalize`, or refused; the reference is ONNX Runtime or a formula."""

import functools

import numpy as np
import pytest
from onnx import helper

from edgekit.errors import UnsupportedOpError
from edgekit.targets.openvino import OpenVino

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def agree(graphs, through, nodes, inputs, outputs=("y",), constants=None, opset=23, formula=None):
    """Holds OpenVINO against `formula(inputs)`, or else against ONNX Runtime."""
    model = graphs.build(nodes, inputs, outputs, constants, opset)
    result = through(OpenVino(), model).run(inputs)
    reference = formula(**inputs) if formula else graphs.reference(model, inputs).values()
    for name, expected in zip(outputs, reference, strict=True):
        np.testing.assert_allclose(result[name], expected, rtol=1e-4, atol=1e-5)


MASKS = {
    "none": None,
    "float": draw(5, 10),
    "broadcast over queries": draw(2, 1, 1, 10),
    "bool": RNG.random((5, 10)) > 0.2,
    "bool, broadcast": RNG.random((2, 1, 1, 10)) > 0.2,
}


def attend(q, k, v, m=None, pk=None, pv=None, causal=1):
    """ONNX's Attention in float64; query i sees key j iff j <= i + (length of the past). ONNX Runtime refuses masks with one row."""

    def split(array):
        return array if array.ndim == 4 else array.reshape(*array.shape[:2], 4, -1).transpose(0, 2, 1, 3)

    rank3 = q.ndim == 3
    q, k, v = split(q), split(k), split(v)
    past = 0 if pk is None else pk.shape[2]
    if past:
        k, v = np.concatenate([pk, k], 2), np.concatenate([pv, v], 2)
    scores = q.astype(np.float64) @ k.transpose(0, 1, 3, 2) / np.sqrt(q.shape[-1])
    if m is not None:
        scores = np.where(m, scores, -np.inf) if m.dtype == bool else scores + m
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], past, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = weights / weights.sum(-1, keepdims=True) @ v
    return (y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1) if rank3 else y, *((k, v) if past else ()))


@pytest.mark.parametrize("opset", [23, 24])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("causal", [0, 1])
def test_attention_with_past(graphs, through, mask, causal, opset):
    inputs = {"q": draw(2, 4, 5, 8), "k": draw(2, 4, 7, 8), "v": draw(2, 4, 7, 6), "pk": draw(2, 4, 3, 8), "pv": draw(2, 4, 3, 6)}
    if MASKS[mask] is not None:
        inputs["m"] = MASKS[mask].copy()
        inputs["m"][..., 0] = True if inputs["m"].dtype == bool else 0.5  # no row is masked as a whole
    names = ["q", "k", "v", "m" if "m" in inputs else "", "pk", "pv"]
    node = helper.make_node("Attention", names, ["y", "present_k", "present_v"], is_causal=causal)
    formula = functools.partial(attend, causal=causal)
    agree(graphs, through, [node], inputs, ["y", "present_k", "present_v"], opset=opset, formula=formula)


@pytest.mark.parametrize("rank3", [False, True])
def test_causal_attention_with_broadcast_mask(graphs, through, rank3):
    shape = (lambda length, width: (2, length, 4 * width)) if rank3 else (lambda length, width: (2, 4, length, width))
    heads = {"q_num_heads": 4, "kv_num_heads": 4} if rank3 else {}
    inputs = {"q": draw(*shape(5, 8)), "k": draw(*shape(7, 8)), "v": draw(*shape(7, 6)), "m": draw(2, 1, 1, 7)}
    agree(graphs, through, [helper.make_node("Attention", ["q", "k", "v", "m"], ["y"], is_causal=1, **heads)], inputs, formula=attend)


POOLS = [
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
    {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1},
    {"kernel_shape": [1, 1], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 3], "strides": [3, 2], "ceil_mode": 1, "pads": [0, 1, 1, 0]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1], "dilations": [2, 2]},
]


@pytest.mark.parametrize("size", [(7, 9), (8, 6)])
@pytest.mark.parametrize("options", POOLS, ids=str)
@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "AveragePool, padding counts"])
def test_pooling_with_ceil_mode(graphs, through, op, options, size):
    op_type, _, counts = op.partition(",")
    extra = {"count_include_pad": 1} if counts else {}
    agree(graphs, through, [helper.make_node(op_type, ["x"], ["y"], **options, **extra)], {"x": draw(1, 2, *size)})


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "NOTSET"])
def test_transposed_convolution_puts_odd_padding_where_onnx_does(graphs, through, auto_pad):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], output_shape=[14, 18], auto_pad=auto_pad)
    agree(graphs, through, [node], {"x": draw(1, 2, 7, 9)}, constants={"w": draw(2, 3, 3, 3)})


@pytest.mark.parametrize("order", [1, 2])
def test_normalization_of_short_vectors(graphs, through, order):
    x = np.array([[3e-5, -4e-5], [3, 4]], np.float32)
    model = graphs.build([helper.make_node("LpNormalization", ["x"], ["y"], p=order, axis=-1)], {"x": x})
    expected = x / np.linalg.norm(x.astype(np.float64), ord=order, axis=-1, keepdims=True)
    np.testing.assert_allclose(through(OpenVino(), model).run({"x": x})["y"], expected, rtol=1e-5)


def test_uneven_split(graphs, through):
    agree(graphs, through, [helper.make_node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3)], {"x": draw(2, 8)}, ["a", "b", "c"])


@pytest.mark.parametrize("largest", [0, 1])
def test_topk_gives_the_lower_index_of_equal_values(graphs, through, largest):
    x = RNG.integers(0, 5, (2, 300)).astype(np.float32)
    node = helper.make_node("TopK", ["x", "k"], ["y", "i"], largest=largest)
    model = graphs.build([node], {"x": x}, ["y", "i"], {"k": np.array([100])})
    result = through(OpenVino(), model).run({"x": x})
    expected = np.argsort(-x if largest else x, axis=-1, kind="stable")[:, :100]
    np.testing.assert_array_equal(result["i"], expected)


@pytest.mark.parametrize("zero_point", [np.uint8(128), np.int8(0)])
def test_quantized_products_do_not_saturate(graphs, through, zero_point):
    """Weights over the full int8 range: on CPUs without VNNI, 8-bit kernels that sum pairs in 16 bits are off by tens of percent."""
    x, scale = draw(4, 64), 0.02
    weight = RNG.integers(-128, 128, (64, 8)).astype(np.int8)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"]),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    constants = {"s": np.float32(scale), "z": np.asarray(zero_point), "w": weight, "ws": np.float32(0.01)}
    executable = through(OpenVino(), graphs.build(nodes, {"x": x}, constants=constants))
    limits = np.iinfo(zero_point.dtype)
    rounded = np.clip(np.round(x / np.float32(scale)) + float(zero_point), limits.min, limits.max) - float(zero_point)
    expected = (rounded * scale) @ (weight * 0.01)
    np.testing.assert_allclose(executable.run({"x": x})["y"], expected, rtol=1e-4, atol=1e-3)
    assert executable.facts["quantized_operators"]


I8 = np.array([100, -100], np.int8)
IMAGE = draw(1, 2, 6, 6)
REFUSED = {
    "antialias": ("Resize", ["x", "", "s"], {"mode": "linear", "antialias": 1}, {"x": IMAGE}, {"s": np.float32([1, 1, 0.5, 0.5])}),
    "exclude_outside": ("Resize", ["x", "", "s"], {"mode": "cubic", "exclude_outside": 1}, {"x": IMAGE}, {"s": np.float32([1, 1, 2, 2])}),
    "keep_aspect_ratio_policy": (
        "Resize", ["x", "", "", "z"], {"keep_aspect_ratio_policy": "not_larger", "axes": [2, 3]}, {"x": IMAGE}, {"z": np.array([9, 12])},
    ),
    "saturates": ("Add", ["a", "b"], {}, {"a": I8, "b": I8}, {}),
    "size is not centred": ("LRN", ["x"], {"size": 4}, {"x": IMAGE}, {}),
    "batch first": (
        "LSTM", ["x", "w", "r"], {"hidden_size": 3, "layout": 1}, {"x": draw(2, 4, 5)}, {"w": draw(1, 12, 5), "r": draw(1, 12, 3)},
    ),
    "exceeds 32 bits": ("Add", ["i", "c"], {}, {"i": np.array([1, 2])}, {"c": np.array([2**40, 1])}),
    "noop_with_empty_axes": ("ReduceL2", ["x"], {"noop_with_empty_axes": 1}, {"x": IMAGE}, {}),
    "float64": ("Neg", ["x"], {}, {"x": IMAGE.astype(np.float64)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_silently_wrong_is_refused(graphs, through, reason):
    op_type, names, attributes, inputs, constants = REFUSED[reason]
    model = graphs.build([helper.make_node(op_type, names, ["y"], name="the/node", **attributes)], inputs, constants=constants)
    with pytest.raises(UnsupportedOpError, match=reason.replace("size is", "even size is")) as caught:
        through(OpenVino(), model)
    assert "the/node" in caught.value.where or reason == "float64"


def test_slice_to_the_end_is_not_refused(graphs, through):
    constants = {"start": np.array([1]), "end": np.array([np.iinfo(np.int64).max]), "axis": np.array([1])}
    agree(graphs, through, [helper.make_node("Slice", ["x", "start", "end", "axis"], ["y"])], {"x": draw(2, 5)}, constants=constants)


def test_newer_opsets_are_refused(graphs, through):
    model = graphs.build([helper.make_node("Relu", ["x"], ["y"])], {"x": IMAGE})
    model.opset_import[0].version = 27
    with pytest.raises(UnsupportedOpError, match="opset 27"):
        through(OpenVino(), model)
