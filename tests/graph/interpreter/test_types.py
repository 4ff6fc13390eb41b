"""Types that torch lacks: what is carried in a wider type is exactly what the type holds."""

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.graph.interpreter import run
from edgekit.graph.interpreter.values import Precision, from_array, to_array

NARROW = [
    *(np.uint16, np.uint32, np.uint64, ml_dtypes.int4, ml_dtypes.uint4, ml_dtypes.int2, ml_dtypes.uint2, ml_dtypes.bfloat16),
    *(ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz, ml_dtypes.float4_e2m1fn),
    ml_dtypes.float8_e8m0fnu,
]


def all_values(dtype: type) -> np.ndarray:
    """Every bit pattern of a narrow type; of a wide one its ends."""
    kind = np.dtype(dtype)
    if kind in (np.uint16, np.uint32, np.uint64):
        return np.array([0, 1, np.iinfo(kind).max // 2 + 1, np.iinfo(kind).max], kind)
    if kind == ml_dtypes.bfloat16:
        return np.arange(2**16, dtype=np.uint16).view(kind)
    bits = ir.DataType.from_numpy(kind).bitwidth
    return np.arange(2**bits, dtype=np.uint8).view(kind) if bits == 8 else _unpacked(kind, bits)


def _unpacked(kind: np.dtype, bits: int) -> np.ndarray:
    if kind == ml_dtypes.float4_e2m1fn:
        return np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32).astype(kind)
    signed = kind in (ml_dtypes.int4, ml_dtypes.int2)
    return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(kind) if signed else np.arange(2**bits).astype(kind)


@pytest.mark.parametrize("dtype", NARROW)
def test_a_round_trip_keeps_every_value(dtype: type) -> None:
    values = all_values(dtype)
    got = to_array(from_array(values, Precision()))
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got.astype(np.float64), values.astype(np.float64))


@pytest.mark.parametrize("name", ["uint16", "uint32", "uint64"])
@settings(deadline=None, derandomize=True, max_examples=30)
@given(st.data())
def test_unsigned_arithmetic_wraps_as_in_numpy(name: str, data: st.DataObject) -> None:
    kind = np.dtype(name)
    numbers = st.integers(0, int(np.iinfo(kind).max))
    a, b = (np.array(data.draw(st.lists(numbers, min_size=4, max_size=4)), kind) for _ in range(2))
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 23]>
            graph ({name}[4] a, {name}[4] b) => ({name}[4] s, {name}[4] d, {name}[4] p, {name}[4] x) {{
                s = Add(a, b) d = Sub(a, b) p = Mul(a, b) x = BitwiseXor(a, b)
            }}"""
        )
    )
    got = run(model, {"a": a, "b": b})
    with np.errstate(over="ignore"):
        for result, want in {"s": a + b, "d": a - b, "p": a * b, "x": a ^ b}.items():
            assert got[result].dtype == kind
            np.testing.assert_array_equal(got[result], want)


@pytest.mark.parametrize("dtype", NARROW[8:12])
def test_saturating_casts_to_float8(dtype: type) -> None:
    target = ir.DataType.from_numpy(np.dtype(dtype))
    largest = float(ml_dtypes.finfo(dtype).max)
    values = all_values(dtype).astype(np.float32)
    finite = np.sort(values[np.isfinite(values)])
    between = (finite[1:] + finite[:-1]) / 2
    x = np.concatenate([finite, between, np.nextafter(between, np.inf), [largest * 1.01, -largest * 4, np.inf, np.nan]]).astype(np.float32)
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"""<ir_version: 10, opset_import: ["" : 23]>
            graph (float[N] x) => (float[N] y) {{ h = Cast<to={target.value}>(x) y = Cast<to=1>(h) }}"""
        )
    )
    want = np.clip(x, -largest, largest).astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(run(model, {"x": x})["y"], want)


def test_quantize_and_dequantize_to_four_bits() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            """<ir_version: 10, opset_import: ["" : 23]>
            graph (float[2, 3] x, float[3] s, int4[3] z) => (int4[2, 3] q, float[2, 3] y) {
                q = QuantizeLinear<axis = 1>(x, s, z)
                y = DequantizeLinear<axis = 1>(q, s, z)
            }"""
        )
    )
    x, s = np.array([[0.5, -3.0, 9.0], [100.0, -0.26, 0.1]], np.float32), np.array([0.5, 0.5, 1.0], np.float32)
    z = np.array([1, 0, -2])
    q = np.clip(np.rint(x / s) + z, -8, 7)
    got = run(model, {"x": x, "s": s, "z": z.astype(ml_dtypes.int4)})
    assert got["q"].dtype == ml_dtypes.int4
    np.testing.assert_array_equal(got["q"].astype(np.int8), q)
    np.testing.assert_array_equal(got["y"], ((q - z) * s).astype(np.float32))
