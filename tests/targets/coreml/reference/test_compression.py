"""Quantization and compressed constants, against coremltools' decompression, the documentation's examples and saved packages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from coremltools.converters.mil.mil.ops.defs.iOS16 import constexpr_ops as packed
from coremltools.converters.mil.mil.ops.defs.iOS18 import compression as unpacked
from coremltools.optimize import _utils as optimize

from edgekit.targets.coreml.reference.operators import elementwise
from edgekit.targets.coreml.reference.operators.compression import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred, run

RNG = np.random.default_rng


def _integers(low: int, high: int, shape: tuple[int, ...], kind: Any, seed: int = 0) -> np.ndarray:
    return RNG(seed).integers(low, high, shape).astype(kind)


def _scales(shape: tuple[int, ...], kind: Any = np.float32, seed: int = 1) -> np.ndarray:
    return np.asarray(RNG(seed).uniform(0.01, 0.2, shape), kind)


def _close(result: Any, expected: Any, kind: Any = np.float32) -> None:
    np.testing.assert_allclose(np.asarray(result, np.float32), np.asarray(expected, np.float32), rtol=2e-3 if kind is np.float16 else 1e-6)


SHAPE = (2, 3, 4)
AXES: list[tuple[tuple[int, ...], int]] = [((), 0), ((2,), 0), ((3,), 1), ((4,), -1), ((3,), -2)]
"""Shapes of the scale, with the axis along which it lies."""


@pytest.mark.parametrize(("shape", "axis"), AXES)
@pytest.mark.parametrize(("kind", "low", "high"), [(np.int8, -128, 128), (np.uint8, 0, 256)])
@pytest.mark.parametrize("to", [np.float32, np.float16])
def test_affine_dequantize(kind: Any, low: int, high: int, to: Any, shape: tuple[int, ...], axis: int) -> None:
    data, zero = _integers(low, high, SHAPE, kind), _integers(low, high, shape, kind, 2)
    for zero_point in (zero, np.asarray(zero, np.float32) + np.float32(0.5)):
        result = call(TABLE["constexpr_affine_dequantize"], quantized_data=data, zero_point=zero_point, scale=_scales(shape, to), axis=axis)
        _close(result, packed.constexpr_affine_dequantize.decompress(data, zero_point, _scales(shape, to), axis), to)


@pytest.mark.parametrize(("shape", "axis"), AXES)
@pytest.mark.parametrize(("dtype", "low", "high"), [("int8", -128, 128), ("uint8", 0, 256)])
def test_quantize_and_dequantize(dtype: str, low: int, high: int, shape: tuple[int, ...], axis: int) -> None:
    x = RNG(3).normal(0, 10, SHAPE).astype(np.float32)
    given: dict[str, Any] = {"axis": axis} if shape else {}
    for zero_point in ({}, {"zero_point": _integers(low // 4, high // 4, shape, np.dtype(dtype), 4)}):
        parameters: dict[str, Any] = {"scale": _scales(shape), **zero_point, **given}
        quantized = call(TABLE["quantize"], input=x, output_dtype=dtype, **parameters)
        np.testing.assert_array_equal(quantized, inferred("quantize", "iOS17", input=x, output_dtype=dtype, **parameters))
        stored = quantized.astype(dtype)
        assert {low, high - 1} & set(stored.reshape(-1).tolist())  # some values lie outside of the range
        result = call(TABLE["dequantize"], input=stored, **parameters)
        _close(result, inferred("dequantize", "iOS17", input=stored, **parameters))


def test_quantize_rounds_to_even_and_refuses_other_types() -> None:
    x = np.array([0.5, 1.5, 2.5, -0.5, 1000], np.float32)
    assert call(TABLE["quantize"], input=x, scale=np.float32(1), zero_point=np.int8(1), output_dtype="int8").tolist() == [1, 3, 3, 1, 127]
    with pytest.raises(ValueError, match="'int32'"):
        call(TABLE["quantize"], input=x, scale=np.float32(1), output_dtype="int32")
    with pytest.raises(ValueError, match="axis"):
        call(TABLE["dequantize"], input=np.zeros(2, np.int8), scale=np.ones(2, np.float32))


def test_cast() -> None:
    values = np.array([[1.5, -2.25]], np.float16)
    result = call(TABLE["constexpr_cast"], source_val=values, output_dtype="fp32")
    assert (result.dtype, result.tolist()) == (np.float32, values.tolist())
    with pytest.raises(ValueError, match="'fp16'"):
        call(TABLE["constexpr_cast"], source_val=values, output_dtype="fp16")


def test_packed_elements_as_documented() -> None:
    # constexpr_lut_to_dense of iOS16: i0 in the lowest bits of the first byte, i4 in those of the second.
    indices = np.array([0b01101100, 0b00000011], np.uint8)
    lut = np.array([10, 20, 30, 40], np.float32)
    assert call(TABLE["constexpr_lut_to_dense"], indices=indices, lut=lut, shape=np.array([5])).tolist() == [10, 40, 30, 20, 40]
    mask = np.array([0b00001100], np.uint8)
    result = call(TABLE["constexpr_sparse_to_dense"], nonzero_data=np.array([1.5, 2.5], np.float32), mask=mask, shape=np.array([5]))
    assert result.tolist() == [0, 0, 1.5, 2.5, 0]


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 3, 1, 5)])
@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8, np.uint8])
def test_packed_lookup_table(bits: int, shape: tuple[int, ...], kind: Any) -> None:
    indices = optimize.pack_elements_into_bits(_integers(0, 2**bits, shape, np.uint8), bits)
    lut = _integers(0, 100, (2**bits,), kind, 5)
    result = call(TABLE["constexpr_lut_to_dense"], indices=indices, lut=lut, shape=np.array(shape))
    np.testing.assert_array_equal(result, packed.constexpr_lut_to_dense.decompress(lut, indices, shape))


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 4, 1, 2)])
@pytest.mark.parametrize("kind", [np.float32, np.float16, np.int8, np.uint8])
def test_sparse(shape: tuple[int, ...], kind: Any) -> None:
    mask = _integers(0, 2, shape, np.uint8)
    data = _integers(1, 100, (int(mask.sum()),), kind, 6)
    dense = np.zeros(shape, kind)
    dense[mask != 0] = data
    bits = np.packbits(mask, bitorder="little")
    np.testing.assert_array_equal(call(TABLE["constexpr_sparse_to_dense"], nonzero_data=data, mask=bits, shape=np.array(shape)), dense)
    np.testing.assert_array_equal(call(TABLE["constexpr_sparse_to_dense"], nonzero_data=data, mask=mask), dense)
    np.testing.assert_array_equal(dense, unpacked.constexpr_sparse_to_dense.decompress(data, mask))


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 ones has 1 values"):
        call(TABLE["constexpr_sparse_to_dense"], nonzero_data=np.ones(1, np.float32), mask=np.array([1, 0, 1], np.uint8))
    with pytest.raises(ValueError, match="1 bytes hold fewer"):
        call(TABLE["constexpr_lut_to_dense"], indices=np.zeros(1, np.uint8), lut=np.zeros(16, np.float32), shape=np.array([3]))
    with pytest.raises(ValueError, match="blocks"):
        call(TABLE["constexpr_blockwise_shift_scale"], data=np.zeros((3, 4), np.int8), scale=np.ones((2, 1), np.float32))
    with pytest.raises(ValueError, match="vector_axis"):
        call(TABLE["constexpr_lut_to_dense"], indices=np.zeros((2, 2), np.uint8), lut=np.zeros((1, 1, 2, 2), np.float32))


@pytest.mark.parametrize("blocks", [(1, 1, 1), (4, 1, 1), (1, 3, 2), (2, 6, 1), (4, 6, 8)])
@pytest.mark.parametrize(("kind", "low", "high"), [(np.int8, -8, 8), (np.uint8, 0, 16), (np.float32, -9, 9)])
def test_blockwise_shift_scale(blocks: tuple[int, ...], kind: Any, low: int, high: int) -> None:
    data = _integers(low, high, (4, 6, 8), kind)
    for offset in (None, _integers(low, high, blocks, kind, 7), _scales(blocks, seed=8)):
        result = call(TABLE["constexpr_blockwise_shift_scale"], data=data, scale=_scales(blocks), offset=offset)
        _close(result, unpacked.constexpr_blockwise_shift_scale.decompress(data, _scales(blocks), offset))


def test_grouped_lookup_tables_as_documented() -> None:
    # Case 1 of constexpr_lut_to_dense, iOS18. The documentation gives lut1 the values 2, 10, 18, 26.
    indices = np.array([2, 3, 3, 0, 1, 0, 3, 0, 2, 1, 0, 3], np.uint8).reshape(6, 2)
    lut = np.array([1, 5, 9, 13, 2, 10, 18, 26], np.float32).reshape(2, 1, 4, 1)
    result = call(TABLE["constexpr_lut_to_dense"], indices=indices, lut=lut)
    assert result.tolist() == [[9, 13], [13, 1], [5, 1], [26, 2], [18, 10], [2, 26]]


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        (1, [[[1, 1], [2, 2], [3, 3], [7, 1], [8, 2], [9, 3]], [[7, 7], [8, 8], [9, 9], [1, 1], [2, 2], [3, 3]]]),
        (2, [[[1, 2, 3, 1, 2, 3], [7, 8, 9, 1, 2, 3]], [[7, 8, 9, 7, 8, 9], [1, 2, 3, 1, 2, 3]]]),
    ],
)
def test_vectors_in_lookup_tables_as_documented(axis: int, expected: list[Any]) -> None:
    # Cases 2.1 and 2.2 of constexpr_lut_to_dense, iOS18, with a = 1, 2, 3 and b = 7, 8, 9.
    indices = np.array([[[0, 0], [1, 0]], [[1, 1], [0, 0]]], np.uint8)
    lut = np.array([1, 2, 3, 7, 8, 9], np.int8).reshape(1, 1, 1, 2, 3)
    for at in (axis, axis - 3):
        assert call(TABLE["constexpr_lut_to_dense"], indices=indices, lut=lut, vector_axis=at).tolist() == expected


LUTS: list[tuple[tuple[int, ...], int, int, int | None]] = [
    ((1, 1), 4, 1, None), ((2, 1), 8, 1, None), ((1, 4), 16, 1, 0), ((4, 2), 2, 1, None), ((1, 1), 64, 2, 0), ((1, 1), 4, 4, 1),
    ((2, 1), 4, 3, 0), ((2, 4), 4, 2, 1), ((2, 2), 4, 2, -2), ((4, 1), 256, 2, -1),
]  # fmt: skip
"""Groups, entries, sizes of the vectors and their axis."""


@pytest.mark.parametrize(("groups", "entries", "vector", "axis"), LUTS)
def test_lookup_tables(groups: tuple[int, ...], entries: int, vector: int, axis: int | None) -> None:
    indices = _integers(0, entries, (4, 8), np.uint8)
    lut = RNG(9).normal(0, 1, (*groups, entries, vector)).astype(np.float32)
    expected = unpacked.constexpr_lut_to_dense.decompress(indices, lut, axis)
    np.testing.assert_array_equal(call(TABLE["constexpr_lut_to_dense"], indices=indices, lut=lut, vector_axis=axis), expected)
    mask = _integers(0, 2, (4, 8), np.uint8, 10)
    sparse = call(TABLE["constexpr_lut_to_sparse"], indices_mask=mask, indices_nonzero_data=indices[mask != 0], lut=lut, vector_axis=axis)
    for ours, theirs in zip(sparse, unpacked.constexpr_lut_to_sparse.decompress(mask, indices[mask != 0], lut, axis), strict=True):
        np.testing.assert_array_equal(ours, theirs)


MASK = np.array([[1, 1, 0, 0, 0, 0], [1, 1, 0, 0, 0, 1], [0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 0, 0]], np.uint8)
NONZERO = np.array([0, 1, 1, 0, 1, 1, 0, 0, 1], np.uint8)


def test_sparse_lookup_as_documented() -> None:
    lut = np.array([2, 3], np.float32).reshape(1, 1, 2, 1)
    mask, data = call(TABLE["constexpr_lut_to_sparse"], indices_mask=MASK, indices_nonzero_data=NONZERO, lut=lut)
    assert mask.tolist() == MASK.tolist()
    assert data.tolist() == [2, 3, 3, 2, 3, 3, 2, 2, 3]
    vectors = np.array([[2, 2], [3, 3]], np.float32).reshape(1, 1, 2, 2)
    mask, data = call(TABLE["constexpr_lut_to_sparse"], indices_mask=MASK, indices_nonzero_data=NONZERO, lut=vectors, vector_axis=0)
    assert mask.tolist() == np.repeat(MASK, 2, 0).tolist()
    assert data.tolist() == [2, 3, 2, 3, 3, 2, 3, 3, 2, 3, 3, 2, 2, 3, 2, 2, 3, 3]


def test_sparse_shift_scale_as_documented() -> None:
    # The documentation's picture repeats its first row; its values of the second output follow from the formula.
    mask = np.array([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [1, 1, 0, 0]], np.uint8)
    data = np.array([10, 11, 3, 4, 5, 6, 7, 8, 9], np.int8)
    scale, offset = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32), np.array([[1, 2, 3, 4]], np.int8)
    kept, result = call(TABLE["constexpr_sparse_blockwise_shift_scale"], data_mask=mask, nonzero_data=data, scale=scale, offset=offset)
    assert kept.tolist() == mask.tolist()
    np.testing.assert_allclose(result, [0.9, 1.8, 0.2, 0.4, 0.6, 0.9, 1.2, 0.7, 1.4], rtol=1e-6)
    _, plain = call(TABLE["constexpr_sparse_blockwise_shift_scale"], data_mask=mask, nonzero_data=data, scale=scale)
    _close(plain, unpacked.constexpr_sparse_blockwise_shift_scale.decompress(mask, data, scale, None)[1])


def _affine() -> Any:
    data, zero = _integers(-128, 128, (3, 4), np.int8), _integers(-9, 9, (3,), np.int8)
    return mb.constexpr_affine_dequantize(quantized_data=data, zero_point=zero, scale=_scales((3,)), axis=0)


def _cast() -> Any:
    return mb.constexpr_cast(source_val=RNG(1).normal(0, 1, (3, 4)).astype(np.float16), output_dtype="fp32")


def _packed_lut() -> Any:
    indices = optimize.pack_elements_into_bits(_integers(0, 64, (3, 4), np.uint8), 6)
    return mb.constexpr_lut_to_dense(indices=indices, lut=_scales((64,)), shape=np.array([3, 4], np.uint32))


def _packed_sparse() -> Any:
    mask = _integers(0, 2, (3, 4), np.uint8)
    bits = np.packbits(mask, bitorder="little")
    return mb.constexpr_sparse_to_dense(nonzero_data=_scales((int(mask.sum()),)), mask=bits, shape=np.array([3, 4], np.uint32))


def _blockwise() -> Any:
    data = _integers(-8, 8, (3, 4), np.int8).astype(types.np_int4_dtype)
    offset = _integers(-8, 8, (3, 2), np.int8, 2).astype(types.np_int4_dtype)
    return mb.constexpr_blockwise_shift_scale(data=data, scale=_scales((3, 2)), offset=offset)


def _lut() -> Any:
    indices = _integers(0, 8, (3, 2), np.uint8).astype(types.np_uint3_dtype)
    return mb.constexpr_lut_to_dense(indices=indices, lut=_scales((3, 1, 8, 2)), vector_axis=np.int32(1))


def _mask() -> np.ndarray:
    return _integers(0, 2, (3, 4), np.uint8).astype(types.np_uint1_dtype)


def _sparse_lut() -> Any:
    indices = _integers(0, 4, (int(_mask().astype(int).sum()),), np.uint8).astype(types.np_uint2_dtype)
    mask, data = mb.constexpr_lut_to_sparse(indices_mask=_mask(), indices_nonzero_data=indices, lut=_scales((1, 2, 4, 1)))
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)


def _sparse_blockwise() -> Any:
    count = int(_mask().astype(int).sum())
    data = _integers(0, 16, (count,), np.uint8).astype(types.np_uint4_dtype)
    mask, data = mb.constexpr_sparse_blockwise_shift_scale(data_mask=_mask(), nonzero_data=data, scale=_scales((1, 2)))
    return mb.constexpr_sparse_to_dense(nonzero_data=data, mask=mask)


def _lut_of_quantized() -> Any:
    indices = _integers(0, 4, (3, 4), np.uint8).astype(types.np_uint2_dtype)
    table = mb.constexpr_lut_to_dense(indices=indices, lut=_integers(-9, 9, (1, 1, 4, 1), np.int8))
    return mb.constexpr_blockwise_shift_scale(data=table, scale=_scales((1, 2)))


PROGRAMS: list[tuple[str, Callable[[], Any]]] = [
    *(("iOS16", constant) for constant in (_affine, _cast, _packed_lut, _packed_sparse)),
    *(("iOS17", constant) for constant in (_affine, _packed_lut)),
    *(("iOS18", constant) for constant in (_affine, _cast, _blockwise, _lut, _sparse_lut, _sparse_blockwise, _lut_of_quantized)),
]


@pytest.mark.parametrize(("target", "constant"), PROGRAMS, ids=lambda value: value if isinstance(value, str) else value.__name__)
def test_constants_of_a_saved_package(target: str, constant: Callable[[], Any]) -> None:
    expected = []

    def build(x: Any) -> Any:
        made = constant()
        expected.append(made.op.materialized_val_inference())
        return mb.add(x=x, y=made)

    (result,) = run(build, {"x": np.zeros((3, 4), np.float32)}, target, {**TABLE, **elementwise.TABLE})
    assert result.any()
    _close(result, expected[0])


def test_parameters_of_every_version() -> None:
    check_signatures(TABLE)
