"""Each rule of `stabilize-float16` on the smallest graph that needs it; every result is held to float64 by the fixture `stabilize`."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.contracts import Context
from edgekit.passes.float16.normalization import choose_scale
from edgekit.passes.float16.stabilize import StabilizeFloat16

RNG = np.random.default_rng(0)
LARGE = RNG.normal(50, 3000, (2, 8, 64)).astype(np.float32)
SCALE, SHIFT = RNG.normal(1, 0.2, 64).astype(np.float32), RNG.normal(size=64).astype(np.float32)


def types(model):
    return [node.op_type for node in model.graph]


def assert_saved(before, after, sqnr=45):
    """Overflowed before, does not after, and what is left of the noise is that of float16."""
    assert before.overflows
    assert after.overflows == ()
    assert after.lost == 0
    assert after.sqnr_db > sqnr
    assert not before.sqnr_db > sqnr


NORMS = {
    "layer": "y = LayerNormalization(x, s, b)",
    "rms": "y = RMSNormalization(x, s)",
    "instance": "y = InstanceNormalization(x, c, d)",
    "group": "y = GroupNormalization<num_groups=2>(x, c, d)",
    "lp": "y = LpNormalization(x)",
    "written out": (
        "m = ReduceMean(x, a)  e = Sub(x, m)  q = Pow(e, two)  v = ReduceMean(q, a)  w = Add(v, eps)  r = Sqrt(w)  y = Div(e, r)"
    ),
    "written out, rms": "q = Mul(x, x)  v = ReduceMean(q, a)  w = Add(v, eps)  r = Sqrt(w)  i = Reciprocal(r)  y = Mul(x, i)",
}


@pytest.mark.parametrize("norm", NORMS)
def test_norm_whose_squares_overflow(stabilize, norm):
    arrays = {"s": SCALE, "b": SHIFT, "c": SCALE[:8], "d": SHIFT[:8], "a": np.array([-1]), "two": np.float32(2), "eps": np.float32(1e-5)}
    text = f"g (float[2,8,64] x) => (float[2,8,64] y) {{ {NORMS[norm]} }}"
    used = {name: array for name, array in arrays.items() if f"{name})" in text or f"{name}," in text.partition("=>")[2]}
    model, context, before, after = stabilize(text, {"x": LARGE}, used)
    assert_saved(before, after)
    assert types(model).count("Mul") == types_of(text).count("Mul") + 1
    assert context.refusals == []


def types_of(text):
    return [part.split("(")[0].split("<")[0].strip() for part in text.partition("{")[2].split("=") if "(" in part]


def test_epsilon_moves_with_the_scale(stabilize):
    """Rows of small variance beside large ones: ε counts there, so a wrong one would show."""
    x = LARGE.copy()
    x[0, 0] = RNG.normal(0, 1, 64)
    text = "g (float[2,8,64] x) => (float[2,8,64] y) { y = LayerNormalization<epsilon=1.0>(x, s) }"
    model, _context, _, _ = stabilize(text, {"x": x}, {"s": SCALE})
    norm = next(node for node in model.graph if node.op_type == "LayerNormalization")
    scale = float(next(node for node in model.graph if node.op_type == "Mul").inputs[1].const_value.numpy())
    assert norm.attributes["epsilon"].as_float() == scale**2
    assert np.log2(scale).is_integer()
    assert scale < 1


def test_epsilon_that_vanishes_is_raised_where_float32_cannot_tell_and_named_elsewhere(stabilize):
    text = "g (float[2,8,64] x) => (float[2,8,64] y) { y = LayerNormalization<epsilon=1e-12>(x, s) }"
    model, context, _, _ = stabilize(text, {"x": LARGE}, {"s": SCALE})
    assert next(node for node in model.graph if node.op_type == "LayerNormalization").attributes["epsilon"].as_float() == 2.0**-24
    assert context.refusals == []
    x = LARGE.copy()
    x[0, 0] = 7
    _, context, _, _ = stabilize(text, {"x": x}, {"s": SCALE})
    assert "its ε becomes" in context.refusals[0].why


def test_small_input_is_scaled_up_so_that_epsilon_does_not_vanish(stabilize):
    x = RNG.normal(0, 1e-3, (2, 8, 64)).astype(np.float32)
    text = "g (float[2,8,64] x) => (float[2,8,64] y) { y = LayerNormalization<epsilon=1e-9>(x, s) }"
    model, _, before, after = stabilize(text, {"x": x}, {"s": SCALE})
    assert next(node for node in model.graph if node.op_type == "LayerNormalization").attributes["epsilon"].as_float() >= 2.0**-24
    assert after.sqnr_db > before.sqnr_db


@pytest.mark.parametrize(
    ("first", "second", "epsilon"), [(1e3, 1e6, 1e-5), (1e5, 1e4, 1e-5), (6e4, 1e9, 1e-6), (10, 65520, 1e-5), (1, 1e12, 0)]
)
def test_scale_is_a_power_of_two_that_brings_sums_and_squares_into_range(first, second, epsilon):
    scale = choose_scale(first, second, epsilon)
    assert np.log2(scale).is_integer()
    assert scale < 1
    assert max(scale * first, scale**2 * second) <= 65504


def test_scale_leaves_headroom_unless_epsilon_would_vanish():
    assert choose_scale(0, 2.0**22, 1e-4) == 2.0**-5  # a quarter of the range is reached, ε·s² is 1e-7
    assert choose_scale(0, 2.0**22, 1e-5) == 2.0**-4  # ε·s² is 4e-8, it would be 1e-8 with headroom
    assert choose_scale(0, 2.0**22, 1e-6) == 2.0**-5  # ε·s² is zero in float16 either way


def test_scale_is_one_where_everything_fits():
    assert choose_scale(65504, 65504, 1e-5) == 1
    assert choose_scale(0, 0, 0) == 1
    assert choose_scale(6e4, 6e4, 1e-12) == 1


SUMS = {
    "mean": ("y = ReduceMean(x, a)", [2, 8, 1]),
    "pool": ("y = GlobalAveragePool(x)", [2, 8, 1]),
    "norm": ("y = ReduceL2(x, a)", [2, 8, 1]),
    "norm, written out": ("q = Mul(x, x)  t = ReduceSum(q, a)  y = Sqrt(t)", [2, 8, 1]),
    "mean, written out": ("t = ReduceSum(x, a)  y = Div(t, n)", [2, 8, 1]),
}


@pytest.mark.parametrize("case", SUMS)
def test_sum_that_overflows_although_its_result_fits(stabilize, case):
    body, shape = SUMS[case]
    text = f"g (float[2,8,64] x) => (float{shape} y) {{ {body} }}".replace(" 8", "8").replace(" 1]", "1]")
    arrays = {"a": np.array([-1]), "n": np.float32(64)}
    x = np.abs(LARGE) + 2000
    _model, context, before, after = stabilize(text, {"x": x}, {name: array for name, array in arrays.items() if f" {name})" in text})
    assert_saved(before, after)
    assert context.refusals == []


@pytest.mark.parametrize("after", ["y = Mul(p, c)", "y = Mul(c, p)", "y = Div(p, i)"])
def test_scale_of_scores_moves_before_the_product(stabilize, after):
    x = RNG.normal(0, 60, (2, 8, 64)).astype(np.float32)
    text = f"g (float[2,8,64] x) => (float[2,8,8] y) {{ t = Transpose<perm=[0,2,1]>(x)  p = MatMul(x, t)  {after} }}"
    arrays = {"c": np.float32(0.125)} if "c" in after else {"i": np.float32(8)}
    model, _context, before, proof = stabilize(text, {"x": x}, arrays)
    assert_saved(before, proof)
    assert types(model) == ["Transpose", "Mul", "MatMul", after.split()[2].split("(")[0]]


def test_product_that_is_read_twice_stays_and_is_named(stabilize):
    x = RNG.normal(0, 60, (2, 8, 64)).astype(np.float32)
    text = """g (float[2,8,64] x) => (float[2,8,8] y, float[2,8,8] z) {
        t = Transpose<perm=[0,2,1]>(x)  p = MatMul(x, t)  y = Mul(p, c)  z = Relu(p) }"""
    _, context, _, _ = stabilize(text, {"x": x}, {"c": np.float32(0.125)}, rewrites=0)
    assert "MatMul_1" in {refusal.where for refusal in context.refusals}


POINTS = np.concatenate([np.float32([-90, -1e-3, 0, 1e-3, 9.99, 10, 10.01, 60, 85, 600]), np.linspace(-40, 40, 390, dtype=np.float32)])[
    None
]
ACTIVATIONS = {
    "softplus": ("y = Softplus(x)", "Softplus", lambda x: np.logaddexp(0, x)),
    "softplus, written out": ("e = Exp(x)  p = Add(e, one)  y = Log(p)", "Softplus", lambda x: np.logaddexp(0, x)),
    "mish": ("y = Mish(x)", "Mish", lambda x: x * np.tanh(np.logaddexp(0, x))),
    "mish, written out": (
        "e = Exp(x)  p = Add(one, e)  l = Log(p)  t = Tanh(l)  y = Mul(x, t)",
        "Softplus",
        lambda x: x * np.tanh(np.logaddexp(0, x)),
    ),
    "gelu": ('y = Gelu<approximate="tanh">(x)', "Gelu", lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3)))),
    "gelu, written out": (
        "q = Pow(x, three)  r = Mul(q, k)  u = Add(x, r)  a = Mul(u, c)  t = Tanh(a)  o = Add(t, one)  h = Mul(x, half)  y = Mul(h, o)",
        "Clip",
        lambda x: 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x**3))),
    ),
}
NUMBERS = {"one": 1, "three": 3, "k": 0.044715, "c": 0.7978845608, "half": 0.5}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activation_has_its_formula_and_no_overflow(stabilize, run, case):
    body, left, formula = ACTIVATIONS[case]
    text = f"g (float[1,400] x) => (float[1,400] y) {{ {body} }}"
    arrays = {name: np.float32(number) for name, number in NUMBERS.items() if f" {name})" in body or f"({name}," in body}
    points = POINTS if "written" not in case or "gelu" in case else np.minimum(POINTS, 80)  # float32 itself overflows at 89
    model, context, before, after = stabilize(text, {"x": points}, arrays)
    assert before.overflows
    assert after.overflows == ()
    assert left in types(model)
    assert context.refusals == []
    expected = formula(points.astype(np.float64))
    np.testing.assert_allclose(run(model, {"x": points})[0], expected, rtol=2e-6, atol=3e-7)


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activation_of_small_values_is_left_alone(stabilize, case):
    body, _, _ = ACTIVATIONS[case]
    arrays = {name: np.float32(number) for name, number in NUMBERS.items() if f" {name})" in body or f"({name}," in body}
    stabilize(f"g (float[1,400] x) => (float[1,400] y) {{ {body} }}", {"x": np.clip(POINTS, -9, 9)}, arrays, rewrites=0)


def test_written_out_softplus_is_rewritten_without_data_and_nothing_else_is(build):
    model = build("g (float[2,8] x) => (float[2,8] y) { e = Exp(x)  p = Add(e, one)  l = Log(p)  y = LayerNormalization(l, s) }",
                  {"one": np.float32(1), "s": np.ones(8, np.float32)})  # fmt: skip
    context = Context()
    assert StabilizeFloat16().apply(model, context) == 1
    assert types(model) == ["Abs", "Neg", "Softplus", "Relu", "Add", "LayerNormalization"]
