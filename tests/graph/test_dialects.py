"""Dialects of exporters that cannot run here, as graphs written by hand: TensorFlow by tf2onnx, Keras, ONNX Runtime; and what stays."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from edgekit.errors import UnsupportedOpError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.check import check_model
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes
from tests.graph.exporter_support import run


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(list(shape)).normal(0.2, 1, shape).astype(np.float32)


def parse(text: str, opset: int = 23, **arrays: np.ndarray) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> g {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items() if name in text)
    return ir.from_proto(proto)


def canonical(model: ir.Model, tolerance: float = 1e-5) -> Counter[str]:
    """Counts the operators of the canonical graph, which computes what the graph did."""
    feeds = {str(value.name): random(*value.shape.numpy()) for value in model.graph.inputs}
    before = run(model, feeds)
    after = canonicalize(to_opset(model.clone()))
    infer_shapes(after)
    for name, result in run(after, feeds).items():
        assert np.abs(result - before[name]).max() <= tolerance * np.abs(before[name]).max()
    return Counter(node.op_type for node in after.graph)


def only(nodes: Counter[str], **expected: int) -> bool:
    layout = {"Reshape", "Transpose", "Squeeze", "Unsqueeze"}
    return {op: count for op, count in nodes.items() if op not in layout} == expected


ARRAYS = {
    **{f"w{i}": random(16, 16) + i for i in range(4)},
    "gamma": random(16) + 2,
    "beta": random(16),
    "axes": np.array([-1]),
    "eps": np.float32(1e-6),
    "one": np.float32(1),
    "two": np.float32(2),
    "heads": np.array([0, 0, 4, 4]),
    "scale": np.float32(0.5),
    "half": np.float32(0.5),
    "root": np.float32(1.4142135),
    "k3": random(8, 16, 1, 1),
    "k8": random(8, 8, 3, 3),
    "bias": random(8),
    "per_channel": random(1, 8, 1, 1),
}
MOMENTS = "m = ReduceMean{axes}(x{axes_in}) d = Sub(x, m) q = Mul(d, d) v = ReduceMean{axes}(q{axes_in}) e = Add(v, eps) s = Sqrt(e)"


@pytest.mark.parametrize("opset", [11, 13, 18, 23])
def test_layer_norm_of_tensorflow(opset: int) -> None:
    """x·r·γ + (β − μ·r·γ), with 1/√ as Reciprocal of Sqrt."""
    axes = {"axes": "<axes = [-1]>", "axes_in": ""} if opset < 18 else {"axes": "", "axes_in": ", axes"}
    nodes = MOMENTS.format(**axes) + " r = Reciprocal(s) g = Mul(r, gamma) a = Mul(x, g) b = Mul(m, g) c = Sub(beta, b) y = Add(a, c)"
    assert only(canonical(parse(f"(float[2,6,16] x) => (float[2,6,16] y) {{ {nodes} }}", opset, **ARRAYS)), LayerNormalization=1)


def test_attention_of_keras_by_einsum() -> None:
    """MultiHeadAttention of Keras: products of [B, N, C] with kernels [C, H, D], then `aecd,abcd->acbe` and `acbe,aecd->abcd`."""
    nodes = """
        q0 = MatMul(x, w0) q = Reshape(q0, heads) k0 = MatMul(x, w1) k = Reshape(k0, heads) v0 = MatMul(x, w2) v = Reshape(v0, heads)
        qs = Mul(q, scale)
        s = Einsum<equation = "aecd,abcd->acbe">(k, qs) p = Softmax<axis = -1>(s)
        y = Einsum<equation = "acbe,aecd->abcd">(p, v)"""
    assert only(canonical(parse(f"(float[2,6,16] x) => (float[2,6,4,4] y) {{ {nodes} }}", **ARRAYS)), MatMul=3, Attention=1)


def test_gelu_of_tensorflow() -> None:
    nodes = "r = Div(x, root) e = Erf(r) a = Add(one, e) h = Mul(half, a) y = Mul(x, h)"
    assert only(canonical(parse(f"(float[2,6,16] x) => (float[2,6,16] y) {{ {nodes} }}", 13, **ARRAYS)), Gelu=1)


def test_channels_last_around_convolutions() -> None:
    """tf2onnx turns every convolution from channels last to channels first and back: the turns between two of them cancel."""
    nodes = """
        a = Transpose<perm = [0, 3, 1, 2]>(x) b = Conv(a, k3) c = Transpose<perm = [0, 2, 3, 1]>(b)
        d = Transpose<perm = [0, 3, 1, 2]>(c) e = Conv<pads = [1, 1, 1, 1]>(d, k8) f = Add(e, per_channel)
        y = Transpose<perm = [0, 2, 3, 1]>(f)"""
    found = canonical(parse(f"(float[1,5,6,16] x) => (float[1,5,6,8] y) {{ {nodes} }}", 13, **ARRAYS))
    assert found == Counter(Conv=2, Transpose=2)


@pytest.mark.parametrize("operator", ["FusedMatMul", "Attention", "BiasGelu", "SkipLayerNormalization"])
def test_operators_of_onnxruntime_are_refused_by_name(operator: str) -> None:
    model = parse("(float[2,6,16] x) => (float[2,6,16] y) { y = Relu(x) }")
    node = model.graph[0]
    node.op_type, node.domain, node.name = operator, "com.microsoft", "layer.0"
    model.opset_imports["com.microsoft"] = 1
    with pytest.raises(UnsupportedOpError, match=operator) as caught:
        check_model(model, "model.onnx")
    assert "com.microsoft" in str(caught.value)


NORM = "m = ReduceMean(x, axes) d = Sub(x, m) p = Mul(d, d) v = ReduceMean(p, axes) e = Add(v, eps) s = Sqrt(e) "
QKV = "float[2,4,6,8] q, float[2,4,6,8] k, float[2,4,6,8] v"
SCORES = "t = Transpose<perm = [0, 1, 3, 2]>(k) s = MatMul(q, t) "
ERF = "e = Erf(r) a = Add(e, one) h = Mul(a, half) y = Mul(x, h)"
X, XZ = "float[2,6,16] x", "float[2,6,16] x, float[2,6,16] z"
LATE = NORM.replace("e = Add(v, eps) s = Sqrt(e)", "e = Sqrt(v) s = Add(e, eps)")
OTHER_AXIS = NORM.replace("ReduceMean(p, axes)", "ReduceMean(p, first)")
STAYS = {
    "deviation of something else": ("float[2,6,16] x, float[2,6,16] z", NORM + "n = Div(z, s) y = Mul(n, gamma)"),
    "epsilon per channel": ("float[2,6,16] x", NORM.replace("eps", "beta") + "n = Div(d, s) y = Mul(n, gamma)"),
    "mean over another axis": (X, OTHER_AXIS + "n = Div(d, s) y = Mul(n, gamma)"),
    "epsilon after the root": (X, LATE + "y = Div(d, s)"),
    "gelu of another slope": (X, "r = Div(x, two) " + ERF),
    "gate of something else": (XZ, "r = Div(z, root) " + ERF),
    "softmax over another axis": (QKV, SCORES + "a = Softmax<axis = 2>(s) y = MatMul(a, v)"),
    "scale that is not constant": (QKV + ", float[1] u", SCORES + "z = Mul(s, u) a = Softmax(z) y = MatMul(a, v)"),
    "scale per query": (QKV, SCORES + "z = Mul(s, per_query) a = Softmax(z) y = MatMul(a, v)"),
    "mask that enlarges the batch": ("float[1,4,6,8] q, float[1,4,6,8] k, float[2,4,6,8] v, float[2,1,6,6] b",
                                     SCORES + "z = Add(s, b) a = Softmax(z) y = MatMul(a, v)"),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_what_is_almost_a_whole_operator_stays(name: str) -> None:
    inputs, nodes = STAYS[name]
    output = "float[2,4,6,8] y" if "q," in inputs else "float[2,6,16] y"
    arrays = {**ARRAYS, "first": np.array([1]), "beta": np.abs(random(16)) + 0.1, "per_query": np.abs(random(4, 6, 1))}
    model = parse(f"({inputs}) => ({output}) {{ {nodes} }}", **arrays)
    found = canonical(model)
    assert not {"LayerNormalization", "RMSNormalization", "Gelu", "Attention"} & set(found)


def test_epsilon_that_the_type_of_the_rest_cannot_hold() -> None:
    """An epsilon that is zero in float16 is not what the parts compute with; the whole operator takes it as float32."""
    nodes = NORM + "n = Div(d, s) y = Mul(n, gamma)"
    model = parse(f"(float16[2,6,16] x) => (float16[2,6,16] y) {{ {nodes} }}", **{
        **ARRAYS, "eps": np.float16(1e-5), "gamma": ARRAYS["gamma"].astype(np.float16)})  # fmt: skip
    canonicalize(model)
    (norm,) = [node for node in model.graph if node.op_type == "LayerNormalization"]
    assert norm.attributes["epsilon"].as_float() == pytest.approx(float(np.float16(1e-5)))


@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("operator", ["Mul", "Div"])
def test_a_temperature_for_each_head(shape: tuple[int, ...], operator: str) -> None:
    nodes = f"{SCORES} z = {operator}(s, u) a = Softmax(z) y = MatMul(a, v)"
    model = parse(f"({QKV}) => (float[2,4,6,8] y) {{ {nodes} }}", u=random(*shape) + 2)
    assert only(canonical(model), Attention=1, **{operator: 1})


def test_lists_of_parts() -> None:
    arrays = {"sizes": np.array([2, 4]), "three": np.array(3), "zero": np.array(0), "last": np.array(-1)}
    nodes = "q = SplitToSequence<axis = {axis}>(x, {sizes}) a = SequenceAt(q, zero) b = SequenceAt(q, last) y = Exp(a) z = Relu(b)"
    for axis, sizes in ((1, "sizes"), (-2, "three")):
        text = f"(float[2,6,16] x) => (float[2,N,16] y, float[2,M,16] z) {{ {nodes.format(axis=axis, sizes=sizes)} }}"
        model = parse(text, **arrays)
        assert canonical(model) == Counter(Split=1, Exp=1, Relu=1)


@pytest.mark.parametrize("nodes", [
    "q = SplitToSequence<axis = 1>(x, sizes) y = SequenceAt(q, i)",  # a position that is not known
    "q = SplitToSequence<axis = 1, keepdims = 0>(x) y = SequenceAt(q, zero)",  # parts without the axis
    "q = SplitToSequence<axis = 1>(x, sizes) n = SequenceLength(q) a = SequenceAt(q, zero) f = Cast<to = 1>(n) y = Mul(a, f)",
])  # fmt: skip
def test_lists_that_are_read_otherwise_stay(nodes: str) -> None:
    inputs = "float[2,6,16] x, int64 i" if ", i)" in nodes else "float[2,6,16] x"
    model = parse(f"({inputs}) => (float y) {{ {nodes} }}", sizes=np.array([2, 4]), zero=np.array(0))
    model.graph.outputs[0].shape = None
    canonicalize(model)
    assert "SplitToSequence" in {node.op_type for node in model.graph}
