"""Operators that move elements, against numpy, PyTorch, coremltools' value inference and the examples of its documentation and tests."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from edgekit.targets.coreml.reference.operators.transformation import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred, inferred_shape, run

Array = np.ndarray[Any, Any]


def _counted(*shape: int, kind: Any = np.float32) -> Array:
    return np.arange(1, int(np.prod(shape)) + 1).reshape(shape).astype(kind)


def _ints(*values: int) -> Array:
    return np.array(values, np.int32)


def test_signatures() -> None:
    check_signatures(TABLE)


# operator, shape of x, parameters, numpy's way; each is inferred by coremltools too
SIMPLE: list[tuple[str, tuple[int, ...], dict[str, Any], Any]] = [
    ("expand_dims", (2, 3), {"axes": _ints(0)}, lambda x: x[None]),
    ("expand_dims", (2, 3), {"axes": _ints(-1, 1)}, lambda x: x[:, None, :, None]),
    ("expand_dims", (2, 3), {"axes": _ints(3, 0, -3)}, lambda x: x.reshape(1, 2, 1, 1, 3)),
    ("squeeze", (1, 2, 1, 3), {}, lambda x: x.reshape(2, 3)),
    ("squeeze", (1, 2, 1, 3), {"axes": _ints(-2)}, lambda x: x.reshape(1, 2, 3)),
    ("squeeze", (1, 2, 1, 3), {"axes": _ints(2, 0)}, lambda x: x.reshape(2, 3)),
    ("transpose", (2, 3, 4), {"perm": _ints(2, 0, 1)}, lambda x: x.transpose(2, 0, 1)),
    ("transpose", (2, 3, 4), {"perm": _ints(-1, 0, -2)}, lambda x: x.transpose(2, 0, 1)),
    ("reshape", (2, 6), {"shape": _ints(3, 4)}, lambda x: x.reshape(3, 4)),
    ("reshape", (2, 6), {"shape": _ints(0, -1)}, lambda x: x),
    ("reshape", (2, 6), {"shape": _ints(-1)}, lambda x: x.reshape(12)),
    ("reshape", (2, 3, 4), {"shape": _ints(4, -1, 2)}, lambda x: x.reshape(4, 3, 2)),
    ("reverse", (2, 3), {}, lambda x: x[::-1, ::-1]),
    ("reverse", (2, 3), {"axes": _ints(-1)}, lambda x: x[:, ::-1]),
    ("reverse", (2, 3, 4), {"axes": _ints(0, 2)}, lambda x: x[::-1, :, ::-1]),
    ("slice_by_size", (4, 5), {"begin": _ints(1, 2), "size": _ints(2, 3)}, lambda x: x[1:3, 2:5]),
    ("slice_by_size", (4, 5), {"begin": _ints(0, 3), "size": _ints(-1, -1)}, lambda x: x[:, 3:]),
    ("slice_by_size", (4, 5), {"begin": _ints(-2, 1), "size": _ints(1, -1)}, lambda x: x[2:3, 1:]),
]


@pytest.mark.parametrize("kind", [np.float32, np.int32, np.bool_])
@pytest.mark.parametrize(("operator", "shape", "given", "expected"), SIMPLE)
def test_simple(operator: str, shape: tuple[int, ...], given: dict[str, Any], expected: Any, kind: Any) -> None:
    x = (_counted(*shape) % 3).astype(kind) if kind is np.bool_ else _counted(*shape, kind=kind)
    result = call(TABLE[operator], x=x, **given)
    assert result.dtype == kind
    np.testing.assert_array_equal(result, expected(x))
    np.testing.assert_array_equal(result, inferred(operator, x=x, **given))


def test_a_scalar_is_expanded_and_squeezed() -> None:
    expanded = call(TABLE["expand_dims"], x=3.0, axes=_ints(0, 1))
    np.testing.assert_array_equal(expanded, [[3]])
    assert call(TABLE["squeeze"], x=expanded).shape == ()
    assert call(TABLE["reshape"], x=expanded, shape=np.zeros(0, np.int32)).shape == ()


def test_squeeze_of_the_documentation() -> None:
    assert call(TABLE["squeeze"], x=_counted(2, 3, 4), axes=_ints(0, 1)).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        ((2, 50), (1, 0, -1, 0), (1, 1, 2, 50)),
        ((2, 3, 4), (-1, 0), (6, 4)),
        ((2, 3), (0, 0, 0), (1, 2, 3)),
        ((6, 4), (2, 0, 0, 2), (2, 1, 6, 2)),
    ],
)
def test_reshape_of_ios17(shape: tuple[int, ...], target: tuple[int, ...], expected: tuple[int, ...]) -> None:
    x = _counted(*shape)
    result = call(TABLE["reshape"], x=x, shape=_ints(*target))
    np.testing.assert_array_equal(result, x.reshape(expected))
    np.testing.assert_array_equal(result, inferred("reshape", "iOS17", x=x, shape=_ints(*target)))


def test_reshape_like() -> None:
    """The example of the documentation, and one reference alone, which the executor gives without a list."""
    x = _counted(4, 45)
    given: dict[str, Any] = {"begins": [0, 1], "ends": [2, 0], "end_masks": [np.bool_(False), np.bool_(True)]}
    result = call(TABLE["reshape_like"], x=x, ref_tensors=[_counted(2, 3, 4), _counted(1, 5, 6)], **given)
    np.testing.assert_array_equal(result, x.reshape(2, 3, 5, 6))
    single = call(TABLE["reshape_like"], x=x, ref_tensors=_counted(7, 9, 20), begins=1, ends=3, end_masks=np.bool_(False))
    np.testing.assert_array_equal(single, x.reshape(9, 20))


@pytest.mark.parametrize(("sequence", "batch"), [(0, 1), (1, 0), (2, 0), (-1, 1), (0, -1)])
def test_reverse_sequence(sequence: int, batch: int) -> None:
    x = _counted(3, 4, 5)
    length, count = x.shape[sequence], x.shape[batch]
    lengths = np.random.default_rng(1).integers(0, length + 1, count).astype(np.int32)
    lengths[:2] = 0, length
    result = call(TABLE["reverse_sequence"], x=x, lengths=lengths, seq_axis=sequence, batch_axis=batch)
    expected = x.copy()
    for at in np.ndindex(*x.shape):
        moved = list(at)
        if at[sequence] < lengths[at[batch]]:
            moved[sequence] = lengths[at[batch]] - 1 - at[sequence]
        expected[at] = x[tuple(moved)]
    np.testing.assert_array_equal(result, expected)


def test_reverse_sequence_along_its_batch_axis_is_refused() -> None:
    with pytest.raises(ValueError, match="seq_axis"):
        call(TABLE["reverse_sequence"], x=_counted(2, 2), lengths=_ints(1, 2))


SLICES: list[tuple[dict[str, Any], Any]] = [
    ({"begin": _ints(1, 0, 2), "end": _ints(3, 2, 5)}, np.s_[1:3, 0:2, 2:5]),
    ({"begin": _ints(-3, 0, -2), "end": _ints(-1, 100, 5)}, np.s_[-3:-1, 0:100, -2:5]),
    ({"begin": _ints(0, 0, 0), "end": _ints(4, 3, 5), "stride": _ints(2, 1, 3)}, np.s_[::2, :, ::3]),
    ({"begin": _ints(9, 9, 9), "end": _ints(1, 3, 4), "begin_mask": np.array([True] * 3)}, np.s_[:1, :3, :4]),
    ({"begin": _ints(1, 2, 3), "end": _ints(0, 0, 0), "end_mask": np.array([True] * 3)}, np.s_[1:, 2:, 3:]),
    ({"begin": _ints(3, 2, -1), "end": _ints(0, 0, 1), "stride": _ints(-1, -2, -2)}, np.s_[3:0:-1, 2:0:-2, -1:1:-2]),
    (
        {
            "begin": _ints(0, 0, 0), "end": _ints(0, 0, 0), "stride": _ints(-1, 1, -2), "begin_mask": np.array([True] * 3),
            "end_mask": np.array([True] * 3),
        },
        np.s_[::-1, :, ::-2],
    ),
    ({"begin": _ints(2, 0, 1), "end": _ints(0, 3, 5), "squeeze_mask": np.array([True, False, False])}, np.s_[2, :, 1:]),
    ({"begin": _ints(-1, 1, 4), "end": _ints(0, 3, 0), "squeeze_mask": np.array([True, False, True])}, np.s_[-1, 1:3, 4]),
    (
        {"begin": _ints(1, 2, 0), "end": _ints(0, 0, 0), "stride": _ints(1, -1, 1), "squeeze_mask": np.array([True, False, False])}
        | {"end_mask": np.array([False, True, True])},
        np.s_[1, 2::-1, :],
    ),
]  # fmt: skip


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize(("given", "index"), SLICES)
def test_slice_by_index(given: dict[str, Any], index: Any, kind: Any) -> None:
    x = _counted(4, 3, 5, kind=kind)
    result = call(TABLE["slice_by_index"], x=x, **given)
    np.testing.assert_array_equal(result, x[index])
    np.testing.assert_array_equal(result, inferred("slice_by_index", x=x, **given))


@pytest.mark.parametrize(("given", "index"), SLICES)
def test_slice_update(given: dict[str, Any], index: Any) -> None:
    x = _counted(4, 3, 5)
    update = -_counted(*x[index].shape)
    result = call(TABLE["slice_update"], x=x, update=update, **given)
    expected = x.copy()
    expected[index] = update
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(result, inferred("slice_update", "iOS18", x=x, update=update, **given))
    np.testing.assert_array_equal(x, _counted(4, 3, 5))


def test_slices_to_scalars_and_to_nothing() -> None:
    x = _counted(4)
    result = call(TABLE["slice_by_index"], x=x, begin=_ints(-2), end=_ints(0), squeeze_mask=np.array([True]))
    assert result.shape == ()
    assert result == 3
    assert call(TABLE["slice_by_index"], x=x, begin=_ints(2), end=_ints(2)).shape == (0,)
    assert call(TABLE["slice_by_index"], x=x, begin=_ints(1), end=_ints(3), stride=_ints(-1)).shape == (0,)


@pytest.mark.parametrize("index", [4, -5])
def test_a_single_index_out_of_bounds_is_refused(index: int) -> None:
    with pytest.raises(IndexError, match=f"index {index} is out of bounds for dimension 0 of size 4"):
        call(TABLE["slice_by_index"], x=_counted(4), begin=_ints(index), end=_ints(0), squeeze_mask=np.array([True]))


@pytest.mark.parametrize(("axis", "size", "stride"), [(0, 2, None), (1, 3, 1), (-1, 2, 2), (-3, 4, 3), (1, 5, 2)])
def test_sliding_windows(axis: int, size: int, stride: int | None) -> None:
    x = _counted(4, 5, 3)
    given = {"axis": axis, "size": size} | ({} if stride is None else {"stride": stride})
    result = call(TABLE["sliding_windows"], x=x, **given)
    starts = range(0, x.shape[axis] - size + 1, stride or 1)
    windows = np.stack([x.take(range(start, start + size), axis) for start in starts], axis % 3)
    np.testing.assert_array_equal(result, windows)
    assert result.shape == inferred_shape("sliding_windows", x=x, **given)


@pytest.mark.parametrize("block", [2, 3])
def test_depth_and_space(block: int) -> None:
    """TensorFlow's order, in which the channels of the result lie together."""
    x = _counted(2, 2 * block * block, 2, 3)
    result = call(TABLE["depth_to_space"], x=x, block_size=block)
    expected = np.zeros((2, 2, 2 * block, 3 * block), np.float32)
    for row, column, channel in itertools.product(range(block), range(block), range(2)):
        expected[:, channel, row::block, column::block] = x[:, (row * block + column) * 2 + channel]
    np.testing.assert_array_equal(result, expected)
    np.testing.assert_array_equal(call(TABLE["space_to_depth"], x=result, block_size=block), x)


def test_depth_to_space_of_coremltools_tests() -> None:
    x = np.array([[[[9.0]], [[5.0]], [[1.0]], [[3.0]]]], np.float32)
    np.testing.assert_array_equal(call(TABLE["depth_to_space"], x=x, block_size=2), [[[[9, 5], [1, 3]]]])


@pytest.mark.parametrize("factor", [2, 3])
def test_pixel_shuffles_are_those_of_pytorch(factor: int) -> None:
    x = _counted(2, 2 * factor * factor, 2, 3)
    shuffled = call(TABLE["pixel_shuffle"], x=x, upscale_factor=factor)
    np.testing.assert_array_equal(shuffled, torch.nn.PixelShuffle(factor)(torch.from_numpy(x)).numpy())
    np.testing.assert_array_equal(call(TABLE["pixel_unshuffle"], x=shuffled, downscale_factor=np.uint32(factor)), x)


def test_space_and_batch_of_coremltools_tests() -> None:
    x, paddings = _counted(2, 1, 2, 4), np.array([[0, 0], [2, 0]], np.int32)
    batches = np.array([[0, 1, 3], [0, 9, 11], [0, 2, 4], [0, 10, 12], [0, 5, 7], [0, 13, 15], [0, 6, 8], [0, 14, 16]])
    result = call(TABLE["space_to_batch"], x=x, block_shape=_ints(2, 2), paddings=paddings)
    np.testing.assert_array_equal(result, batches.reshape(8, 1, 1, 3))
    np.testing.assert_array_equal(call(TABLE["batch_to_space"], x=result, block_shape=_ints(2, 2), crops=paddings), x)


@pytest.mark.parametrize(("block", "amounts"), [((2, 3), [[1, 1], [0, 2]]), ((1, 2), [[2, 0], [1, 1]]), ((3, 1), [[0, 2], [0, 0]])])
def test_space_and_batch(block: tuple[int, int], amounts: list[list[int]]) -> None:
    x = _counted(2, 3, 4, 4)
    result = call(TABLE["space_to_batch"], x=x, block_shape=_ints(*block), paddings=np.array(amounts, np.int32))
    wide = np.pad(x, [(0, 0), (0, 0), *amounts])
    for number, (row, column) in enumerate(np.ndindex(*block)):
        np.testing.assert_array_equal(result[2 * number : 2 * number + 2], wide[:, :, row :: block[0], column :: block[1]])
    np.testing.assert_array_equal(call(TABLE["batch_to_space"], x=result, block_shape=_ints(*block), crops=np.array(amounts, np.int32)), x)


def test_in_a_program() -> None:
    from coremltools.converters.mil.mil import Builder as mb

    x = _counted(2, 3, 4)

    def build(x: Any) -> Any:
        flat = mb.reshape_like(x=x, ref_tensors=(mb.reshape(x=x, shape=[6, 4]),), begins=(0,), ends=(0,), end_masks=(True,))
        return mb.slice_by_index(
            x=mb.transpose(x=flat, perm=[1, 0]), begin=[0, 1], end=[0, 6], stride=[-1, 2], begin_mask=[True, False], end_mask=[True, False]
        )

    (result,) = run(build, {"x": x}, "iOS16", TABLE)
    np.testing.assert_array_equal(result, x.reshape(6, 4).T[::-1, 1:6:2])
