"""Fusion of dialects of attention that are built by hand, against the same graph before in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.graph.cost import MODULE_KEY


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support = _beside("attention_support")
fused, unchanged = support.fused, support.unchanged
MINUS_INFINITY = support.MINUS_INFINITY
LOWEST = support.LOWEST
random = support.random
parse = support.parse
count = support.count
the_attention = support.the_attention
attributes = support.attributes

# Batch 2, heads 4, queries 5, keys 6, head size 8, value size 3.
QKV = "float[2,4,5,8] q, float[2,4,6,8] k, float[2,4,6,3] v"
Y = "float[2,4,5,3] y"
TURN = "t = Transpose<perm = [0, 1, 3, 2]>(k)"
SCALED = f"{TURN} p = MatMul(q, t) s = Mul(p, half)"
WEIGHTED = "a = Softmax<axis = -1>(m) y = MatMul(a, v)"
HALF = {"half": np.float32(0.5)}
CAUSAL = np.tri(5, 6, dtype=bool)
KEEP = np.array([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0], [1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]], dtype=bool)


def feeds(model: ir.Model, **given: np.ndarray) -> dict[str, np.ndarray]:
    return {
        value.name: given.get(value.name, random(*value.shape.numpy(), seed=seed).astype(value.dtype.numpy()))
        for seed, value in enumerate(model.graph.inputs)
    }


@pytest.mark.parametrize(
    ("nodes", "scale"),
    [
        ("u = Mul(half, q) t = Transpose<perm = [0, 1, 3, 2]>(k) m = MatMul(u, t)", 0.5),
        ("t = Transpose<perm = [0, 1, 3, 2]>(k) u = Div(t, half) m = MatMul(q, u)", 2.0),
        ("w = Mul(k, half) t = Transpose<perm = [0, 1, 3, 2]>(w) u = Div(q, third) m = MatMul(u, t)", 1.5),
        ("t = Transpose<perm = [0, 1, 3, 2]>(k) p = MatMul(q, t) w = Mul(third, p) m = Div(w, half)", 2 / 3),
        ("t = Transpose<perm = [0, 1, 3, 2]>(k) m = MatMul(q, t)", 1.0),
        ("u = Identity(q) t = Transpose<perm = [0, 1, 3, 2]>(k) p = MatMul(u, t) m = Mul(p, matrix)", 0.25),
    ],
)
def test_where_the_scale_stands(fused, nodes, scale):
    constants = {**HALF, "third": np.float32([1 / 3]), "matrix": np.full((1, 1, 1, 1), 0.25, np.float32)}
    model = parse(f"({QKV}) => ({Y}) {{ {nodes} {WEIGHTED} }}", constants)
    assert attributes(fused(model, feeds(model))) == {"scale": pytest.approx(scale)}
    assert len(model.graph) == 1


def test_scale_before_the_heads_are_split(fused):
    text = f"""(float[2,5,32] x, float[2,4,6,8] k, float[2,4,6,3] v) => ({Y}) {{
        u = Mul(x, half) r = Reshape(u, split) q = Transpose<perm = [0, 2, 1, 3]>(r) {TURN} m = MatMul(q, t) {WEIGHTED} }}"""
    model = parse(text, {**HALF, "split": np.array([2, 5, 4, 8])})
    assert attributes(fused(model, feeds(model))) == {"scale": pytest.approx(0.5)}
    assert count(model, "Mul") == 0


def test_scaled_queries_that_are_read_elsewhere_stay(fused):
    model = parse(f"({QKV}) => ({Y}, float[2,4,5,8] u) {{ u = Mul(q, half) {TURN} m = MatMul(u, t) {WEIGHTED} }}", HALF)
    fused(model, feeds(model))
    assert count(model, "Mul") == 1


@pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 5, 6), (1, 5, 6), (4, 1, 6), (2, 1, 1, 6), (2, 1, 5, 6), (1, 4, 5, 6), (2, 4, 5, 1)])
@pytest.mark.parametrize("nodes", ["m = Add(s, b)", "m = Add(b, s)", "m = Sub(s, b)", "c = Greater(b, zero) m = Where(c, s, low)"])
def test_shapes_of_dynamic_masks(fused, shape, nodes):
    dims = ",".join(map(str, shape))
    model = parse(
        f"({QKV}, float[{dims}] b) => ({Y}) {{ {SCALED} {nodes} {WEIGHTED} }}", {**HALF, "zero": np.float32(-9), "low": np.float32(-1e9)}
    )
    fused(model, feeds(model))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (4, 5, 6), (2, 1, 1, 6), (2, 4, 5, 1)])
@pytest.mark.parametrize("op_type", ["Add", "Sub"])
def test_shapes_of_constant_masks(fused, shape, op_type):
    model = parse(f"({QKV}) => ({Y}) {{ {SCALED} m = {op_type}(s, b) {WEIGHTED} }}", {**HALF, "b": random(*shape)})
    fused(model, feeds(model))


def test_relative_position_bias_keeps_its_initializer(fused):
    model = parse(f"({QKV}) => ({Y}) {{ {SCALED} m = Add(s, table) {WEIGHTED} }}", {**HALF, "table": random(1, 4, 5, 6)})
    fused(model, feeds(model))
    assert the_attention(model).inputs[3].name == "table"


@pytest.mark.parametrize("fill", [MINUS_INFINITY, LOWEST, -1e9, -1e4])
@pytest.mark.parametrize(
    "nodes",
    [
        "m = Where(keep, s, low)",
        "m = Where(drop, low, s)",
        "n = Not(drop) m = Where(n, s, low)",
        "w = Where(keep, zero, low) m = Add(s, w)",
    ],
)
def test_constant_conditions(fused, nodes, fill):
    keep = KEEP
    constants = {**HALF, "keep": keep, "drop": ~keep, "low": np.float32(fill), "zero": np.float32(0)}
    model = parse(f"({QKV}) => ({Y}) {{ {SCALED} {nodes} {WEIGHTED} }}", constants)
    mask = the_attention(fused(model, feeds(model))).inputs[3]
    assert mask.is_initializer()
    assert mask.dtype == (ir.DataType.FLOAT if "Add" in nodes else ir.DataType.BOOL)


@pytest.mark.parametrize("fill", [MINUS_INFINITY, LOWEST, -1e9, -1e4])
@pytest.mark.parametrize("nodes", ["m = Where(c, s, low)", "d = Not(c) m = Where(d, low, s)", "w = Where(c, zero, low) m = Add(w, s)"])
def test_dynamic_conditions(fused, nodes, fill):
    model = parse(
        f"({QKV}, bool[2,1,1,6] c) => ({Y}) {{ {SCALED} {nodes} {WEIGHTED} }}", {**HALF, "low": np.float32(fill), "zero": np.float32(0)}
    )
    keep = np.array([[1, 1, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]], bool).reshape(2, 1, 1, 6)
    if fill != MINUS_INFINITY:
        keep[1] = False  # the mean of the values, or the attention as if nothing were hidden
    fused(model, feeds(model, c=keep))


@pytest.mark.parametrize("fill", [MINUS_INFINITY, LOWEST, -1e9])
@pytest.mark.parametrize("kind", ["added", "chosen"])
def test_causal(fused, fill, kind):
    if kind == "added":
        nodes, constants = "m = Add(s, b)", {"b": np.where(CAUSAL, 0, fill).astype(np.float32)[None]}
    else:
        nodes, constants = "m = Where(b, s, low)", {"b": CAUSAL, "low": np.float32(fill)}
    model = parse(f"({QKV}) => ({Y}) {{ {SCALED} {nodes} {WEIGHTED} }}", {**HALF, **constants})
    assert attributes(fused(model, feeds(model))) == {"is_causal": 1, "scale": pytest.approx(0.5)}
    assert len(the_attention(model).inputs) == 3


@pytest.mark.parametrize(
    "mask",
    [
        np.where(np.tri(5, 6, 1), 0, -np.inf),  # shifted
        np.where(CAUSAL, 0.1, -np.inf),
        np.where(CAUSAL, 0, -5.0),
        np.where(CAUSAL.T[:5, :5].repeat(2, 1)[:, :6] | (np.arange(6) == 5), 0, -np.inf),
    ],
)
def test_almost_causal_stays_a_mask(fused, mask):
    model = parse(f"({QKV}) => ({Y}) {{ {SCALED} m = Add(s, b) {WEIGHTED} }}", {**HALF, "b": mask.astype(np.float32)})
    assert "is_causal" not in attributes(fused(model, feeds(model)))
    assert the_attention(model).inputs[3].name == "b"


@pytest.mark.parametrize("fill", [MINUS_INFINITY, -1e30])
def test_causal_and_padding(fused, fill):
    """With finite numbers, a query whose visible keys are all padding attends to all keys alike."""
    nodes = "u = Add(s, b) m = Add(u, p4)"
    model = parse(
        f"({QKV}, float[2,1,1,6] p4) => ({Y}) {{ {SCALED} {nodes} {WEIGHTED} }}",
        {**HALF, "b": np.where(CAUSAL, 0, fill).astype(np.float32)},
    )
    padding = np.zeros((2, 1, 1, 6), np.float32)
    padding[1, ..., 4:] = fill
    if fill != MINUS_INFINITY:
        padding[0, ..., :2] = fill
    fused(model, feeds(model, p4=padding))
    assert ("is_causal" in attributes(model)) == (fill == MINUS_INFINITY)


@pytest.mark.parametrize(
    "nodes",
    [
        "u = Where(c, s, low) m = Where(d, s_u, low)".replace("s_u", "u"),
        "u = Where(c, s, low) m = Add(u, f)",
        "u = Add(s, f) m = Where(c, u, low)",
        "u = Add(s, g) m = Where(c, u, low)",
        "u = Add(s, f) m = Add(u, g)",
    ],
)
def test_several_masks(fused, nodes):
    inputs = f"{QKV}, bool[5,6] c, bool[2,1,5,6] d, float[5,6] f"
    keep = KEEP
    model = parse(f"({inputs}) => ({Y}) {{ {SCALED} {nodes} {WEIGHTED} }}", {**HALF, "low": np.float32(-np.inf), "g": random(1, 4, 5, 6)})
    fused(model, feeds(model, c=keep, d=np.broadcast_to(keep, (2, 1, 5, 6))))


def test_guard_makes_rows_without_keys_exact(fused):
    guard = "n = IsNaN(e) a = Where(n, zero, e) y = MatMul(a, v)"
    model = parse(
        f"({QKV}, bool[5,6] c) => ({Y}) {{ {SCALED} m = Where(c, s, low) e = Softmax(m) {guard} }}",
        {**HALF, "low": np.float32(-np.inf), "zero": np.float32(0)},
    )
    keep = CAUSAL.copy()
    keep[3] = False
    fused(model, feeds(model, c=keep))


def test_batch_and_heads_merged(fused):
    """As PyTorch decomposes matmul: four axes to three around each product."""
    nodes = """
        q3 = Reshape(q, qs) k3 = Reshape(k, ks) v3 = Reshape(v, vs) t = Transpose<perm = [0, 2, 1]>(k3) p3 = MatMul(q3, t)
        p = Reshape(p3, ps) s = Mul(p, half) m = Add(s, b) a = Softmax(m) a3 = Reshape(a, as) y3 = MatMul(a3, v3) y = Reshape(y3, ys)"""
    shapes = {"qs": [8, 5, 8], "ks": [-1, 6, 8], "vs": [8, 6, 3], "ps": [2, 4, 5, 6], "as": [8, 5, 6], "ys": [2, 4, 5, 3]}
    constants = {**HALF, **{name: np.array(shape) for name, shape in shapes.items()}}
    model = parse(f"({QKV}, float[2,1,1,6] b) => ({Y}) {{ {nodes} }}", constants)
    fused(model, feeds(model))
    assert [node.op_type for node in model.graph] == ["Expand", "Attention"]


def test_three_axes_with_a_mask_of_batch_times_heads(fused):
    nodes = f"t = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, t) m = Add(s, b) {WEIGHTED}"
    model = parse(f"(float[6,5,8] q, float[6,7,8] k, float[6,7,3] v, float[6,5,7] b) => (float[6,5,3] y) {{ {nodes} }}")
    fused(model, feeds(model))


def test_five_axes(fused):
    """Windows beside the batch; the bias is one for each head."""
    nodes = f"t = Transpose<perm = [0, 1, 2, 4, 3]>(k) s = MatMul(q, t) m = Add(s, b) {WEIGHTED}"
    model = parse(f"(float[2,3,4,5,8] q, float[2,3,4,6,8] k, float[2,3,4,6,3] v, float[3,1,5,6] b) => (float[2,3,4,5,3] y) {{ {nodes} }}")
    fused(model, feeds(model))
    assert list(the_attention(model).inputs[0].shape) == [6, 4, 5, 8]


def test_groups_of_queries_on_an_axis_of_their_own(fused):
    nodes = f"t = Transpose<perm = [0, 1, 2, 4, 3]>(k) m = MatMul(q, t) {WEIGHTED}"
    model = parse(f"(float[2,3,4,5,8] q, float[2,3,1,6,8] k, float[2,3,1,6,3] v) => (float[2,3,4,5,3] y) {{ {nodes} }}")
    fused(model, feeds(model))
    assert [value.shape[1] for value in the_attention(model).inputs] == [12, 3, 3]


@pytest.mark.parametrize(
    ("repeat", "heads"),
    [
        ("{x}4 = Gather<axis = 1>({x}, pairs)", 2),
        ("{x}5 = Unsqueeze({x}, two) {x}6 = Tile({x}5, times) {x}4 = Reshape({x}6, {x}s)", 2),
        ("{x}4 = Gather<axis = 1>({x}, turns)", 4),  # not how Attention groups: stays repeated
    ],
)
def test_repeated_heads(fused, repeat, heads):
    nodes = f"{repeat.format(x='k')} {repeat.format(x='v')} t = Transpose<perm = [0, 1, 3, 2]>(k4)"
    nodes += " m = MatMul(q, t) a = Softmax(m) y = MatMul(a, v4)"
    shapes = {"two": [2], "times": [1, 1, 2, 1, 1], "ks": [2, 4, 6, 8], "vs": [2, 4, 6, 3], "pairs": [0, 0, 1, 1], "turns": [0, 1, 0, 1]}
    model = parse(
        f"(float[2,4,5,8] q, float[2,2,6,8] k, float[2,2,6,3] v) => ({Y}) {{ {nodes} }}", {name: np.array(x) for name, x in shapes.items()}
    )
    fused(model, feeds(model))
    assert the_attention(model).inputs[1].shape[1] == heads


def test_one_head_of_keys_for_all_queries(fused):
    nodes = f"{TURN} m = MatMul(q, t) {WEIGHTED}"
    model = parse(f"(float[2,4,5,8] q, float[2,1,6,8] k, float[2,1,6,3] v) => ({Y}) {{ {nodes} }}")
    fused(model, feeds(model))
    assert len(model.graph) == 1


def test_queries_shared_by_the_batch(fused):
    nodes = f"{TURN} m = MatMul(q, t) {WEIGHTED}"
    model = parse(f"(float[2,4,6,8] k, float[2,4,6,3] v) => ({Y}) {{ {nodes} }}", {"q": random(1, 4, 5, 8)})
    fused(model, feeds(model))


@pytest.mark.parametrize(
    ("split", "perm"),
    [
        ("g = Transpose<perm = [2, 0, 3, 1, 4]>(x5) q5, k5, v5 = Split<axis = 0, num_outputs = 3>(g)", 0),
        ("q5, k5, v5 = Split<axis = 2, num_outputs = 3>(x5)", 2),
        ("g = Transpose<perm = [2, 0, 3, 1, 4]>(x5) q5 = Slice(g, i0, i1, i0) k5 = Slice(g, i1, i2, i0) v5 = Slice(g, i2, i3, i0)", 0),
    ],
)
def test_one_product_for_queries_keys_and_values(fused, split, perm):
    squeeze = f"q4 = Squeeze(q5, i{perm}) k4 = Squeeze(k5, i{perm}) v4 = Squeeze(v5, i{perm})"
    rest = (
        "q = Identity(q4) t = Transpose<perm = [0, 1, 3, 2]>(k4) v = Identity(v4)"
        if perm == 0
        else "q = Transpose<perm = [0, 2, 1, 3]>(q4) t = Transpose<perm = [0, 2, 3, 1]>(k4) v = Transpose<perm = [0, 2, 1, 3]>(v4)"
    )
    nodes = f"h = MatMul(x, w) x5 = Reshape(h, five) {split} {squeeze} {rest} m = MatMul(q, t) {WEIGHTED}"
    text = f"(float[2,5,16] x) => (float[2,2,5,8] y) {{ {nodes} }}"
    model = parse(text, {"w": random(16, 48), "five": np.array([2, 5, 3, 2, 8]), **{f"i{i}": np.array([i]) for i in range(4)}})
    before = count(model, "Transpose")
    fused(model, feeds(model))
    assert count(model, "Transpose") == (before - 1 if perm == 0 else before)


def test_einsum_whose_keys_lack_the_heads(fused):
    nodes = 's = Einsum<equation = "b h i d, b j d -> b h i j">(q, k) a = Softmax(s) y = Einsum<equation = "bjd,bhij->bihd">(v, a)'
    model = parse(f"(float[2,4,5,8] q, float[2,6,8] k, float[2,6,3] v) => (float[2,5,4,3] y) {{ {nodes} }}")
    fused(model, feeds(model))
    assert the_attention(model).inputs[1].shape[1] == 1


def test_softmax_in_float32_of_float16(fused):
    nodes = f"{SCALED} m = Cast<to = 1>(s) e = Softmax(m) a = Cast<to = 10>(e) y = MatMul(a, v)"
    text = f"({QKV}) => ({Y}) {{ {nodes} }}".replace("float[", "float16[")
    model = parse(text, {"half": np.float16(0.5)})
    fused(model, feeds(model), tolerance=2e-3)
    assert attributes(model)["softmax_precision"] == 1


def test_module_path_of_what_it_was_made_of(fused):
    model = parse(f"({QKV}) => ({Y}) {{ {SCALED} {WEIGHTED.replace('(m)', '(s)')} }}", HALF)
    for node in model.graph:
        node.metadata_props[MODULE_KEY] = "blocks.3.attn" if node.op_type != "Softmax" else "blocks.3.attn.softmax"
    node = the_attention(fused(model, feeds(model)))
    assert node.metadata_props[MODULE_KEY] == "blocks.3.attn"
    assert node.name == "blocks.3.attn/Attention"


def test_two_layers(fused):
    layer = "t{i} = Transpose<perm = [0, 1, 3, 2]>({x}) m{i} = MatMul({x}, t{i}) a{i} = Softmax(m{i}) {y} = MatMul(a{i}, {x})"
    model = parse(f"(float[1,2,5,8] x) => (float[1,2,5,8] y) {{ {layer.format(i=0, x='x', y='h')} {layer.format(i=1, x='h', y='y')} }}")
    fused(model, feeds(model), expected=2)


def test_symbolic_batch(fused):
    text = f"({QKV}, float[5,6] b) => ({Y}) {{ {SCALED} m = Add(s, b) {WEIGHTED} }}".replace("[2,", "[batch,")
    model = parse(text, HALF)
    fused(model, {"q": random(3, 4, 5, 8), "k": random(3, 4, 6, 8), "v": random(3, 4, 6, 3), "b": random(5, 6)})


PLAIN = "a = Softmax(s) y = MatMul(a, v)"
UNCHANGED = {
    "other axis": f"({QKV}) => ({Y}) {{ {SCALED} a = Softmax<axis = 2>(s) y = MatMul(a, v) }}",
    "scores given out": f"({QKV}) => ({Y}, float[2,4,5,6] s) {{ {SCALED} {PLAIN} }}",
    "product read elsewhere": f"({QKV}) => ({Y}, float[2,4,5,6] z) {{ {SCALED} {PLAIN} z = Relu(p) }}",
    "probabilities given out": f"({QKV}) => ({Y}, float[2,4,5,6] a) {{ {SCALED} {PLAIN} }}",
    "probabilities read elsewhere": f"({QKV}) => ({Y}, float[2,4,5,6] z) {{ {SCALED} {PLAIN} z = Relu(a) }}",
    "scale of queries": f"({QKV}) => ({Y}) {{ {TURN} p = MatMul(q, t) s = Mul(p, perquery) {PLAIN} }}",
    "unknown scale": f"({QKV}, float u) => ({Y}) {{ {TURN} p = MatMul(q, t) s = Mul(p, u) {PLAIN} }}",
    "negative scale": f"({QKV}) => ({Y}) {{ {TURN} p = MatMul(q, t) s = Mul(p, minus) {PLAIN} }}",
    "scale after the mask": f"({QKV}, float[5,6] b) => ({Y}) {{ {TURN} p = MatMul(q, t) u = Add(p, b) s = Mul(u, half) {PLAIN} }}",
    "mask replaced by a middling number": f"({QKV}, bool[5,6] c) => ({Y}) {{ {TURN} p = MatMul(q, t) s = Where(c, p, minus) {PLAIN} }}",
    "something else in between": f"({QKV}) => ({Y}) {{ {TURN} p = MatMul(q, t) s = Relu(p) {PLAIN} }}",
    "tanh without a bound": f"({QKV}) => ({Y}) {{ {TURN} p = MatMul(q, t) s = Tanh(p) {PLAIN} }}",
    "mask that enlarges": f"""(float[1,4,5,8] q, float[1,4,6,8] k, float[2,4,6,3] v, float[2,1,5,6] b) => ({Y}) {{
        {TURN} p = MatMul(q, t) s = Add(p, b) {PLAIN} }}""",
    "constant keys and values": "(float[2,4,5,8] q) => (float[2,4,5,8] y) { s = MatMul(q, weight) a = Softmax(s) y = MatMul(a, weight2) }",
    "constant keys": f"({QKV}) => ({Y}) {{ p = MatMul(q, weight) s = Add(p, half) {PLAIN} }}".replace("float[2,4,6,8] k, ", ""),
    "row without keys": f"({QKV}) => ({Y}) {{ {TURN} p = MatMul(q, t) s = Add(p, hidden) {PLAIN} }}",
    "probabilities transposed": f"""(float[2,4,5,8] q, float[2,4,5,8] k, float[2,4,5,3] v) => ({Y}) {{
        {TURN} s = MatMul(q, t) a = Softmax(s) b = Transpose<perm = [0, 1, 3, 2]>(a) y = MatMul(b, v) }}""",
    "mask in the wider type": f"""({QKV}, float[5,6] b) => ({Y}) {{ {TURN} p = MatMul(q, t) w = Cast<to = 11>(p) b64 = Cast<to = 11>(b)
        s = Add(w, b64) a64 = Softmax(s) a = Cast<to = 1>(a64) y = MatMul(a, v) }}""",
}


@pytest.mark.parametrize("name", UNCHANGED)
def test_unchanged(unchanged, name):
    constants = {
        **HALF,
        "minus": np.float32(-2),
        "perquery": random(4, 5, 1),
        "weight": random(8, 6),
        "weight2": random(6, 8),
        "hidden": np.where(np.arange(5)[:, None] == 2, -np.inf, np.zeros((5, 6))).astype(np.float32),
    }
    text = UNCHANGED[name]
    model = parse(text, {key: array for key, array in constants.items() if key in text})
    assert count(model, "Softmax") == 1
    unchanged(model)


def test_below_opset_23(unchanged):
    model = parse(f"({QKV}) => ({Y}) {{ {SCALED} {PLAIN} }}", HALF)
    model.opset_imports[""] = 22
    unchanged(model)
