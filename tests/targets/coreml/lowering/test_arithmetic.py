"""Arithmetic as ONNX's reference computes it: the functions of floats, and integers whose width and rounding MIL's do not have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import lower, run
from tests.targets.coreml.lowering.expressions import check_all, graph, lower_all, operators, values

REAL = ("Neg", "Abs", "Exp", "Sin", "Cos", "Tan", "Atan", "Sinh", "Cosh", "Asinh", "Erf", "Ceil", "Floor", "Round", "Sign")
POSITIVE = ("Sqrt", "Log", "Reciprocal")
WITHIN_ONE = ("Asin", "Acos", "Atanh")
VARIADIC = ("Max", "Min", "Sum", "Mean")
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64)


def _integers(dtype: Any, *shape: int, seed: int = 0) -> np.ndarray:
    """Of the whole range, as far as products of two fit in 32 bits or wrap at less."""
    info = np.iinfo(dtype)
    low, high = (max(info.min, -30000), min(info.max, 30000)) if info.bits > 16 else (info.min, info.max)
    return np.random.default_rng(seed).integers(low, high, shape, dtype=dtype, endpoint=True)


def _result(text: str, inputs: dict[str, np.ndarray], **constants: Any) -> np.ndarray:
    """The lowered expression's value, for a reference other than ONNX's."""
    (found,) = run(lower(graph([text], inputs, **constants)), inputs).values()
    return found


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("names", "x"),
    [
        (REAL, values(3, 4)),
        (POSITIVE, np.abs(values(3, 4)) + 0.1),
        (WITHIN_ONE, np.tanh(values(3, 4)) * 0.99),
        (("Acosh",), np.abs(values(3, 4)) + 1.01),
    ],
    ids=["real", "positive", "within one", "above one"],
)
def test_functions(names: tuple[str, ...], x: np.ndarray, half: bool) -> None:
    check_all([f"{name}(x)" for name in names], {"x": x.astype(np.float32)}, half=half)


def test_rounding_of_halves_is_to_even() -> None:
    check_all(["Round(x)", "Ceil(x)", "Floor(x)"], {"x": np.asarray([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.4999], np.float32)})


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_ends_of_the_domains() -> None:
    x = np.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, 1.0], np.float32)
    check_all([f"{name}(x)" for name in ("Log", "Sqrt", "Reciprocal", "Exp", "Asinh", "Acosh", "Atanh", "Asin")], {"x": x})


@pytest.mark.parametrize(
    ("name", "function", "x"),
    [
        ("Asinh", np.arcsinh, np.concatenate([sign * np.logspace(-30, 37, 135) for sign in (-1, 1)])),
        ("Acosh", np.arccosh, np.concatenate([1 + np.logspace(-6, 0, 30), np.logspace(0.4, 37, 75)])),
    ],
)
def test_inverse_hyperbolic_functions_are_accurate_over_all_magnitudes(name: str, function: Callable[..., Any], x: np.ndarray) -> None:
    x = x.astype(np.float32)
    np.testing.assert_allclose(_result(f"{name}(x)", {"x": x}), function(x.astype(np.float64)), rtol=1e-6)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 3)), ((2, 3, 4), (4,)), ((3, 1), (1, 4)), ((), (3,))])
def test_floats_with_broadcast(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    x, y = np.asarray(np.abs(values(*shapes[0])) + 0.1, np.float32), values(*shapes[1], seed=1)
    check_all(
        [f"{name}(x, y)" for name in ("Add", "Sub", "Mul", "Div", "Pow")] + ["Mod<fmod: int = 1>(y, x)", "Add(x, c)"], {"x": x, "y": y}, c=y
    )


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_variadic_operators(count: int, dtype: Any) -> None:
    inputs = {f"x{index}": values(*shape, seed=index).astype(dtype) for index, shape in enumerate([(2, 3), (3,), (2, 1), ()][:count])}
    check_all([f"{name}({', '.join(inputs)})" for name in VARIADIC], inputs, tolerance=0.002 if dtype == np.float16 else 0.0)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_wrap_and_divide_as_onnx_defines(dtype: Any) -> None:
    x, y = _integers(dtype, 50), _integers(dtype, 50, seed=1)
    y[y == 0] = 3
    signed = ["Abs(x)", "Sign(x)"]
    if np.iinfo(dtype).min < 0:
        signed.append("Neg(x)")
        y[y == -1] = -2  # the smallest integer divided by -1 overflows
    both = [f"{name}(x, y)" for name in ("Add", "Sub", "Mul", "Mod", "Max", "Min")] + ["Mod<fmod: int = 1>(x, y)"]
    check_all(signed + both, {"x": x, "y": y})
    wide_x, wide_y = x.astype(np.int64), y.astype(np.int64)
    toward_zero = np.sign(wide_x) * np.sign(wide_y) * (np.abs(wide_x) // np.abs(wide_y))
    np.testing.assert_array_equal(_result("Div(x, y)", {"x": x, "y": y}), toward_zero.astype(dtype))


def test_integer_division_of_every_sign() -> None:
    x = np.arange(-9, 10, dtype=np.int32)
    for divisor in (-4, -3, 3, 4):
        np.testing.assert_array_equal(_result("Div(x, y)", {"x": x}, y=np.int32(divisor)), np.trunc(x / divisor).astype(np.int32))


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainders_of_floats(fmod: int) -> None:
    x = np.asarray([5.3, -5.3, 5.3, -5.3, 0.0, 6.0, -6.0, 1e6], np.float32)
    y = np.asarray([2.0, 2.0, -2.0, -2.0, 3.0, 3.0, 3.0, 0.7], np.float32)
    found = _result(f"Mod<fmod: int = {fmod}>(x, y)", {"x": x, "y": y})
    np.testing.assert_allclose(found, np.fmod(x, y) if fmod else np.mod(x, y), rtol=1e-6)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, -1.0, -2.0])
def test_whole_powers_of_negative_numbers(exponent: float) -> None:
    check_all(["Pow(x, y)", "Pow(x, n)"], {"x": values(3, 4)}, y=np.float32(exponent), n=np.int64(exponent))


def test_other_powers() -> None:
    x = np.abs(values(3, 4)) + 0.1
    counts = np.asarray([1, 2, 3, -1], np.int32)
    check_all(["Pow(x, root)", "Pow(x, each)", "Pow(x, n)"], {"x": x, "n": counts}, root=np.float32(0.5), each=values(4))
    check_all(
        ["Pow(i, two)", "Pow(i, five)", "Pow(i, real)"], {"i": np.arange(-5, 6)}, two=np.int64(2), five=np.int64(5), real=np.float32(3)
    )
    check_all(["Pow(i, n)"], {"i": np.arange(-5, 6, dtype=np.int32), "n": np.arange(11, dtype=np.int32) % 4})


@pytest.mark.parametrize("dtype", INTEGERS)
def test_bits(dtype: Any) -> None:
    x, y = _integers(dtype, 2, 3, 5), _integers(dtype, 5, seed=1)
    if np.iinfo(dtype).bits == 32:
        x[0, 0] = [np.iinfo(dtype).min, np.iinfo(dtype).max, -1, 0, 1]
    check_all(
        [f"{name}(x, y)" for name in ("BitwiseAnd", "BitwiseOr", "BitwiseXor")] + ["BitwiseNot(x)", "BitwiseAnd(x, c)"],
        {"x": x, "y": y},
        c=y,
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int8, np.int32])
@pytest.mark.parametrize("direction", ["LEFT", "RIGHT"])
def test_shifts(dtype: Any, direction: str) -> None:
    bits = np.iinfo(dtype).bits
    x = _integers(dtype, 4, bits)
    by = np.arange(bits).astype(dtype)
    found = [f'BitShift<direction: string = "{direction}">(x, {name})' for name in ("computed", "constant")]
    check_all(found, {"x": x, "computed": by}, opset=28, constant=by)


def test_shifts_beyond_the_width() -> None:
    x = np.asarray([-8, -1, 0, 1, 100], np.int8)
    texts = [f'BitShift<direction: string = "{direction}">(x, {by})' for direction in ("LEFT", "RIGHT") for by in ("computed", "constant")]
    by = np.asarray([-1, 9, 8, 127, -128], np.int8)
    check_all(texts, {"x": x, "computed": by}, opset=28, constant=by)


NAMES = {
    np.float32: 1,
    np.uint8: 2,
    np.int8: 3,
    np.uint16: 4,
    np.int16: 5,
    np.int32: 6,
    np.int64: 7,
    np.bool_: 9,
    np.float16: 10,
    np.float64: 11,
}


@pytest.mark.parametrize("source", NAMES)
def test_casts_between_all_types(source: Any) -> None:
    x = np.asarray([0, 1, 2, 3.75, 100, 120.5]).astype(source)
    check_all([f"Cast<to: int = {number}>(x)" for number in NAMES.values()], {"x": x})


def test_casts_truncate_and_wrap() -> None:
    check_all(
        ["Cast<to: int = 6>(x)", "Cast<to: int = 9>(x)"],
        {"x": np.asarray([-2.7, -0.5, 0.5, 2.7, np.nan, 0.0], np.float32)[[0, 1, 2, 3, 5]]},
    )
    check_all(
        [f"Cast<to: int = {to}>(x)" for to in (2, 3, 4, 5)], {"x": np.asarray([-70000, -300, -129, -1, 128, 255, 256, 70000], np.int32)}
    )
    check_all(["Cast<to: int = 9>(x)"], {"x": np.asarray([np.nan, np.inf, 1e-30, 0.0], np.float32)})
    check_all(["CastLike(x, like)"], {"x": np.asarray([-2.7, 2.7], np.float32), "like": np.ones(1, np.int32)})


def test_cast_of_small_integers() -> None:
    x = onnx.numpy_helper.from_array(np.arange(-8, 8).astype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.INT4)), "q")
    model = graph(["Add(x, f)", "Add(i, f)"], {"x": np.zeros(16, np.float32), "i": np.zeros(16, np.float32)}, f=np.zeros(1, np.float32))
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.initializer.append(x)
    for index, to in enumerate((1, 6)):
        model.graph.node.append(onnx.helper.make_node("Cast", ["q"], [f"c{index}"], to=to))
    model.graph.node.append(onnx.helper.make_node("Cast", ["c1"], ["c2"], to=1))
    model.graph.node.extend([onnx.helper.make_node("Add", ["x", "c0"], ["y0"]), onnx.helper.make_node("Add", ["i", "c2"], ["y1"])])
    found = run(lower(model), {"x": np.zeros(16, np.float32), "i": np.zeros(16, np.float32)})
    for array in found.values():
        np.testing.assert_array_equal(array, np.arange(-8, 8))


def test_dropout_in_inference() -> None:
    check_all(
        {"y, m": "Dropout(x)", "z": "Dropout(x, ratio, training)"}, {"x": values(2, 3)}, ratio=np.float32(0.3), training=np.bool_(False)
    )
    check_all({"y, m": "Dropout(x, ratio, training)"}, {"x": values(2, 3)}, ratio=np.float32(0.0), training=np.bool_(True))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (4, 4), (2, 3, 3), (2, 2, 3, 3)])
def test_determinants(shape: tuple[int, ...]) -> None:
    check_all(["Det(x)"], {"x": values(*shape)})


def test_reciprocal_is_a_division() -> None:
    assert "inverse" not in operators(lower_all(["Reciprocal(x)"], {"x": values(3)}))  # MIL's adds one


REFUSED = [
    ("Add(x, x)", np.ones(3, np.uint32), "UINT32"),
    ("Sub(x, x)", np.ones(3, np.uint64), "UINT64"),
    ("BitwiseNot(x)", np.ones(3, np.uint32), "UINT32"),
    ('BitShift<direction: string = "LEFT">(x, x)', np.ones(3, np.uint32), "UINT32"),
    ("Cast<to: int = 16>(x)", values(3), "BFLOAT16"),
    ("Cast<to: int = 17>(x)", values(3), "FLOAT8E4M3FN"),
    ("Cast<to: int = 22>(x)", values(3), "INT4"),
    ("Pow(x, fraction)", np.ones(3, np.int32), "exponent"),
    ("Pow(x, fractions)", np.ones(3, np.int32), "exponent"),
    ("Dropout(x, fraction, yes)", values(3), "training"),
    ("Det(x)", values(5, 5), "5 x 5"),
]


@pytest.mark.parametrize(("text", "x", "what"), REFUSED, ids=[text for text, _, _ in REFUSED])
def test_what_has_no_exact_form_is_refused(text: str, x: np.ndarray, what: str) -> None:
    with pytest.raises(UnsupportedOpError, match=what):
        lower_all([text], {"x": x}, fraction=np.float32(0.5), fractions=np.ones(3, np.float32), yes=np.bool_(True))
