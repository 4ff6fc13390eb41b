"""Quantization as ONNX's reference computes it, and the compressed forms that quantized constants are stored in."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from edgekit.errors import UnsupportedOpError
from edgekit.targets.coreml.convert import Converted
from tests.targets.coreml.lowered import lower, run
from tests.targets.coreml.lowering.expressions import check_all, graph, lower_all, operators, values

INTEGERS = [np.int8, np.uint8, np.int16, np.uint16, ml_dtypes.int4, ml_dtypes.uint4]
RANGES = {"int4": (-8, 7), "uint4": (0, 15)}


def _integers(dtype: Any, *shape: int, seed: int = 0) -> np.ndarray:
    name = np.dtype(dtype).name
    low, high = RANGES[name] if name in RANGES else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return np.asarray(np.random.default_rng(seed).integers(low, high, shape, endpoint=True)).astype(dtype)


def _scales(*shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(7).uniform(0.05, 0.3, shape), dtype=np.float32)


PER_TENSOR: tuple[tuple[int, ...], str] = ((), "")
PER_AXIS = ((4,), "<axis: int = 1>")
PER_LAST = ((6,), "<axis: int = -1>")
BLOCKED = ((3, 4, 2), "<axis: int = 2, block_size: int = 3>")
GRANULARITIES = [PER_TENSOR, PER_AXIS, PER_LAST, BLOCKED]


@pytest.mark.parametrize(("shape", "attributes"), GRANULARITIES, ids=["tensor", "axis", "last axis", "blocked"])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_back_and_forth(dtype: Any, shape: tuple[int, ...], attributes: str) -> None:
    texts = {
        "q": f"QuantizeLinear{attributes}(x, scale, zero)",
        "_r": f"QuantizeLinear{attributes}(x, scale, zero)",
        "y": f"DequantizeLinear{attributes}(_r, scale, zero)",
    }
    if np.dtype(dtype).name in RANGES:
        del texts["q"]  # numpy has no such type
    check_all(texts, {"x": values(3, 4, 6)}, scale=_scales(*shape), zero=_integers(dtype, *shape))


def test_without_zero_point_and_with_computed_parameters() -> None:
    inputs = {"x": values(3, 4), "s": _scales(), "z": _integers(np.int8), "ss": _scales(4), "zz": _integers(np.uint8, 4)}
    texts = {
        "a": "QuantizeLinear(x, scale)",
        "b": "QuantizeLinear<output_dtype: int = 3>(x, scale)",
        "c": "QuantizeLinear(x, s, z)",
        "d": "QuantizeLinear(x, ss, zz)",
        "e": "DequantizeLinear(c, s, z)",
        "f": "DequantizeLinear(d, ss, zz)",
        "g": "DequantizeLinear(b, s)",
    }
    check_all(texts, inputs, scale=_scales())


def test_rounding_of_halves_and_saturation() -> None:
    x = np.asarray([-1e9, -300, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 126.5, 127.5, 300, 1e9], np.float32)
    check_all(
        ["QuantizeLinear(x, one, zero)", "QuantizeLinear(x, one, odd)"], {"x": x}, one=np.float32(1), zero=np.int8(0), odd=np.uint8(3)
    )


def test_int32_and_float16() -> None:
    check_all(["DequantizeLinear(x, s)"], {"x": np.asarray([-100000, 0, 123456], np.int32)}, s=np.float32(0.01))
    check_all(
        {"_q": "QuantizeLinear(x, s, z)", "y": "DequantizeLinear(_q, s, z)"}, {"x": values(5)}, half=True, s=np.float32(0.1), z=np.int8(3)
    )


@pytest.mark.parametrize("x", [values(3, 4), np.abs(values(7)), -np.abs(values(2, 3)), np.zeros((2, 2), np.float32)])
def test_dynamic_quantization(x: np.ndarray) -> None:
    check_all({"y, scale, zero": "DynamicQuantizeLinear(x)"}, {"x": x})


@pytest.mark.parametrize(("left", "right"), [((3, 5), (5, 4)), ((2, 3, 5), (5, 4)), ((2, 3, 5), (2, 5, 4))])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_integer_products(dtype: Any, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    a, b = _integers(np.uint8, *left), _integers(dtype, *right, seed=1)
    zeros: dict[str, Any] = {"az": np.uint8(3), "bz": dtype(5), "columns": _integers(dtype, 4, seed=2)}
    texts = ["MatMulInteger(a, b)", "MatMulInteger(a, b, az)", "MatMulInteger(a, b, az, bz)", "MatMulInteger(a, w, az, columns)"]
    check_all(texts, {"a": a, "b": b}, w=b, **zeros)


def test_integer_products_with_zero_points_per_row() -> None:
    a, b, rows = _integers(np.uint8, 3, 5), _integers(np.int8, 5, 4, seed=1), _integers(np.uint8, 3, seed=2)
    found = run(lower(graph(["MatMulInteger(a, b, rows)"], {"a": a, "b": b}, rows=rows)), {"a": a, "b": b})["y0"]
    np.testing.assert_array_equal(found, (a.astype(np.int32) - rows[:, None]) @ b.astype(np.int32))


def test_quantized_products() -> None:
    a, b = _integers(np.uint8, 2, 3, 8), _integers(np.int8, 8, 4, seed=1)
    parameters: dict[str, Any] = {"s": np.float32(0.02), "az": np.uint8(120), "bz": np.int8(2), "ys": np.float32(0.31), "yz": np.uint8(100)}
    check_all(
        ["QLinearMatMul(a, s, az, b, s, bz, ys, yz)", "QLinearMatMul(a, s, az, w, s, bz, ys, yz)"], {"a": a, "b": b}, w=b, **parameters
    )


CONVOLUTIONS = [
    ("", (2, 3, 6, 7), (4, 3, 3, 2)),
    ("<pads: ints = [1, 0, 2, 1], strides: ints = [2, 1], dilations: ints = [1, 2]>", (1, 3, 7, 8), (4, 3, 3, 2)),
    ('<auto_pad: string = "SAME_LOWER", strides: ints = [2, 2]>', (1, 2, 7, 8), (4, 2, 2, 3)),
    ("<group: int = 2>", (1, 4, 5, 5), (6, 2, 3, 3)),
    ("<pads: ints = [1, 1]>", (2, 3, 9), (4, 3, 3)),
]


@pytest.mark.parametrize(("attributes", "data", "weight"), CONVOLUTIONS)
def test_integer_convolutions(attributes: str, data: tuple[int, ...], weight: tuple[int, ...]) -> None:
    x, w = _integers(np.uint8, *data), _integers(np.int8, *weight, seed=1)
    texts = [f"ConvInteger{attributes}(x, w)", f"ConvInteger{attributes}(x, w, xz, wz)"]
    check_all(texts, {"x": x}, w=w, xz=np.uint8(100), wz=np.int8(3))
    bias = np.arange(weight[0], dtype=np.int32) * 50
    parameters: dict[str, Any] = {
        "xs": np.float32(0.02),
        "ws": np.float32(0.01),
        "ys": np.float32(0.13),
        "yz": np.uint8(120),
        "xz": np.uint8(90),
        "wz": np.int8(0),
    }
    check_all([f"QLinearConv{attributes}(x, xs, xz, w, ws, wz, ys, yz, bias)"], {"x": x}, w=w, bias=bias, **parameters)


def test_scales_per_output_channel() -> None:
    x, w = _integers(np.uint8, 1, 2, 5, 5), _integers(np.int8, 3, 2, 3, 3, seed=1)
    parameters: dict[str, Any] = {
        "xs": np.float32(0.02),
        "ws": _scales(3) / 10,
        "ys": np.float32(0.13),
        "yz": np.int8(2),
        "xz": np.uint8(90),
        "wz": np.zeros(3, np.int8),
    }
    model = graph(["QLinearConv(x, xs, xz, w, ws, wz, ys, yz)"], {"x": x}, w=w, **parameters)
    integers = run(lower(graph(["ConvInteger(x, w, xz)"], {"x": x}, w=w, xz=np.uint8(90))), {"x": x})["y0"]
    factor = parameters["xs"] * parameters["ws"].reshape(1, 3, 1, 1) / parameters["ys"]
    np.testing.assert_array_equal(run(lower(model), {"x": x})["y0"], np.clip(np.rint(integers * factor) + 2, -128, 127))


def test_large_sums_are_split_and_stay_exact() -> None:
    x, w = np.full((1, 600, 2, 2), 255, np.uint8), np.full((1, 600, 1, 1), 127, np.int8)
    w[0, ::7] = -128
    converted = lower_all(["ConvInteger(x, w)"], {"x": x}, w=w)
    assert operators(converted).count("conv") == 2
    np.testing.assert_array_equal(run(converted, {"x": x})["y0"], np.full((1, 1, 2, 2), 255 * int(w.astype(np.int64).sum())))


def _product(dtype: Any, scale: np.ndarray, attributes: str = "", size: int = 64, half: bool = False, version: str = "iOS18") -> Converted:
    """x times a quantized weight, run and compared before it is returned."""
    rng = np.random.default_rng(3)
    low, high = RANGES.get(np.dtype(dtype).name, (-128, 127)) if np.dtype(dtype).name != "uint8" else (0, 255)
    weight, zero = rng.integers(low, high + 1, (size, size)).astype(dtype), np.full(scale.shape, 3).astype(dtype)
    texts = {
        "_w": f"DequantizeLinear{attributes}(weight, scale, zero)",
        "y": "MatMul(x, _w)",
        "z": "Add(_w, x)",
        "g": "Gemm<transB: int = 1>(x, _w)",
    }
    return check_all(texts, {"x": values(size, size)}, half=half, version=version, weight=weight, scale=scale, zero=zero)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize(("shape", "attributes"), [((), ""), ((64,), "<axis: int = 0>"), ((64,), "<axis: int = 1>")])
@pytest.mark.parametrize("half", [False, True])
def test_weights_of_8_bits_stay_quantized_from_ios16(dtype: Any, shape: tuple[int, ...], attributes: str, half: bool) -> None:
    assert "constexpr_affine_dequantize" in operators(_product(dtype, _scales(*shape), attributes, half=half, version="iOS16"))


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize("half", [False, True])
def test_blocked_weights_stay_quantized_from_ios18(dtype: Any, half: bool) -> None:
    found = operators(_product(dtype, _scales(4, 64), "<axis: int = 0, block_size: int = 16>", half=half))
    assert "constexpr_blockwise_shift_scale" in found


@pytest.mark.parametrize(("shape", "attributes"), [((), ""), ((64,), "<axis: int = 1>")])
def test_weights_of_4_bits_without_blocks(shape: tuple[int, ...], attributes: str) -> None:
    assert "constexpr_blockwise_shift_scale" in operators(_product(ml_dtypes.int4, _scales(*shape), attributes))


PLAIN = [
    ("an older target", np.int8, _scales(), {"version": "iOS15"}),
    ("4 bits before iOS18", ml_dtypes.int4, _scales(), {"version": "iOS17"}),
    ("small", np.int8, _scales(), {"size": 8}),
    ("a scale that float16 lacks", np.int8, np.float32(1e-6), {"half": True}),
    ("16 bits", np.int16, _scales(), {}),
]


@pytest.mark.parametrize(("dtype", "scale", "options"), [case[1:] for case in PLAIN], ids=[case[0] for case in PLAIN])
def test_otherwise_they_become_plain_constants(dtype: Any, scale: np.ndarray, options: dict[str, Any]) -> None:
    assert not any(name.startswith("constexpr") for name in operators(_product(dtype, np.asarray(scale), **options)))


REFUSED = [
    ("QuantizeLinear<output_dtype: int = 17>(f, s)", "FLOAT8E4M3FN"),
    ("QuantizeLinear<block_size: int = 2>(f, blocks)", "blocked scale"),
    ("MatMulInteger(vector, q)", "vectors"),
    ("ConvInteger(many, weights)", "2\\^24"),
]


@pytest.mark.parametrize(("text", "what"), REFUSED)
def test_what_has_no_exact_form_is_refused(text: str, what: str) -> None:
    inputs = {"f": values(2, 4), "blocks": _scales(2, 2), "vector": np.ones(4, np.uint8), "q": np.ones((4, 2), np.uint8)}
    large = {"many": np.ones((1, 600, 3, 3), np.uint8), "weights": np.ones((1, 600, 3, 3), np.uint8)}
    with pytest.raises(UnsupportedOpError, match=what):
        lower_all([text], {**inputs, **large}, s=np.float32(0.1))
