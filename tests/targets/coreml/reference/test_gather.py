"""Gathers and scatters of the evaluator against loops over indices, numpy and coremltools' value inference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.targets.coreml.reference.operators.gather import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred, inferred_shape, run

Array = np.ndarray[Any, Any]
FOLDS: dict[str, Any] = {
    "update": lambda old, new: new,
    "add": lambda old, new: old + new,
    "sub": lambda old, new: old - new,
    "mul": lambda old, new: old * new,
    "div": lambda old, new: np.trunc(old / new) if old.dtype.kind == "i" else old / new,
    "max": np.maximum,
    "min": np.minimum,
}


def _values(kind: Any, *shape: int) -> Array:
    random = np.random.default_rng(sum(shape))
    return random.integers(1, 9, shape).astype(kind) if kind is np.int32 else random.normal(2, 0.5, shape).astype(kind)


def _indices(size: int, *shape: int) -> Array:
    return np.random.default_rng(size + len(shape)).integers(0, size, shape).astype(np.int32)


def test_signatures() -> None:
    check_signatures(TABLE)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather(axis: int, shape: tuple[int, ...], kind: Any) -> None:
    x = _values(kind, 4, 3, 5)
    indices = _indices(x.shape[axis], *shape)
    indices = np.where(indices % 2 == 0, indices, indices - x.shape[axis]).astype(np.int32)  # iOS15 and iOS16 count from the end too
    result = call(TABLE["gather"], x=x, indices=indices, axis=axis)
    np.testing.assert_array_equal(result, np.take(x, indices, axis))
    np.testing.assert_array_equal(result, inferred("gather", x=x, indices=indices, axis=axis))


def test_gather_of_a_vector_is_a_scalar() -> None:
    assert call(TABLE["gather"], x=np.array([3.0, 4.0], np.float32), indices=1).shape == ()


@pytest.mark.parametrize(
    ("x", "indices", "axis", "batch"),
    [
        ((2, 3, 4), (2, 5), 1, 1),
        ((2, 3, 4), (2,), -1, 1),
        ((2, 3, 4, 2), (2, 3, 2, 2), 2, 2),
        ((2, 3, 4), (2, 2), 2, 1),
        ((2, 3, 4), (2, 3), 2, 2),
    ],
)
def test_gather_of_batches(x: tuple[int, ...], indices: tuple[int, ...], axis: int, batch: int) -> None:
    data, places = _values(np.float32, *x), _indices(2, *indices)
    result = call(TABLE["gather"], x=data, indices=places, axis=axis, batch_dims=batch)
    expected = np.array([np.take(data[at], places[at], axis % len(x) - batch) for at in np.ndindex(*x[:batch])])
    assert result.shape == (*x[: axis % len(x)], *indices[batch:], *x[axis % len(x) + 1 :])
    np.testing.assert_array_equal(result, expected.reshape(result.shape))
    if axis >= 0:  # coremltools' inference takes a negative axis for one of the batch's slices
        np.testing.assert_array_equal(result, inferred("gather", "iOS16", x=data, indices=places, axis=axis, batch_dims=batch))


@pytest.mark.parametrize("axis", [0, 1, -1, -3])
def test_gather_along_axis(axis: int) -> None:
    x = _values(np.float32, 3, 4, 2)
    shape = [size + 1 if at == axis % 3 else size for at, size in enumerate(x.shape)]
    indices = _indices(x.shape[axis], *shape)
    indices[0, 0, 0] -= x.shape[axis]
    result = call(TABLE["gather_along_axis"], x=x, indices=indices, axis=axis)
    np.testing.assert_array_equal(result, np.take_along_axis(x, indices, axis))
    np.testing.assert_array_equal(result, inferred("gather_along_axis", x=x, indices=indices, axis=axis))


@pytest.mark.parametrize(
    ("x", "indices", "batch"),
    [
        ((3, 4), (2, 2), 0), ((3, 4), (5, 1), 0), ((3, 4, 2), (2, 3, 2), 0), ((3, 4), (2,), 0), ((2, 3, 4), (2, 5, 1), 1),
        ((2, 3, 4), (2, 3, 1), 2), ((2, 3, 4, 2), (2, 2, 2), 1), ((2, 3, 4), (2, 1), 1),
    ],
)  # fmt: skip
def test_gather_nd(x: tuple[int, ...], indices: tuple[int, ...], batch: int) -> None:
    data = _values(np.float32, *x)
    places = _indices(min(x[batch : batch + indices[-1]]), *indices)
    places.reshape(-1)[0] -= x[batch]
    result = call(TABLE["gather_nd"], x=data, indices=places, batch_dims=batch)
    expected = [data[(*at[:batch], *places[at])] for at in np.ndindex(*indices[:-1])]
    np.testing.assert_array_equal(result, np.array(expected).reshape((*indices[:-1], *x[batch + indices[-1] :])))
    assert result.shape == inferred_shape("gather_nd", "iOS16", x=data, indices=places, batch_dims=batch)


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("mode", FOLDS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter(axis: int, mode: str, kind: Any) -> None:
    """Of equal indices each takes its turn."""
    data, indices = _values(kind, 3, 4, 2), np.array([1, 0, 1, -1, 1], np.int32)
    updates = _values(kind, *[5 if at == axis % 3 else size for at, size in enumerate(data.shape)])
    result = call(TABLE["scatter"], data=data, indices=indices, updates=updates, axis=axis, mode=mode)
    expected = np.moveaxis(data.copy(), axis, 0)
    for at, index in enumerate(indices):
        expected[index] = FOLDS[mode](expected[index], np.moveaxis(updates, axis, 0)[at])
    assert result.dtype == kind
    np.testing.assert_allclose(result, np.moveaxis(expected, 0, axis), rtol=1e-6)


def test_scatter_of_the_documentation() -> None:
    data, updates = np.array([[1, 2, 3], [4, 5, 6]], np.int32), np.array([[5, 6, 7], [8, 9, 10]], np.int32)
    result = call(TABLE["scatter"], data=data, indices=np.array([1, 0], np.int32), updates=updates, axis=0, mode="add")
    np.testing.assert_array_equal(result, [[9, 11, 13], [9, 11, 13]])


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("mode", FOLDS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_scatter_along_axis(axis: int, mode: str, kind: Any) -> None:
    data = _values(kind, 3, 4, 2)
    shape = [5 if at == axis % 3 else size for at, size in enumerate(data.shape)]
    indices, updates = _indices(data.shape[axis], *shape), _values(kind, *shape)
    result = call(TABLE["scatter_along_axis"], data=data, indices=indices, updates=updates, axis=axis, mode=mode)
    expected = data.copy()
    for at in np.ndindex(*shape):
        place = (*at[: axis % 3], indices[at], *at[axis % 3 + 1 :])
        expected[place] = FOLDS[mode](expected[place], updates[at])
    np.testing.assert_allclose(result, expected, rtol=1e-5)
    if mode == "update":  # coremltools infers this mode, whichever the mode is
        unique = np.argsort(_values(np.float32, *data.shape), axis).astype(np.int32)
        given = {"data": data, "indices": unique, "updates": _values(kind, *data.shape), "axis": axis, "mode": mode}
        np.testing.assert_array_equal(call(TABLE["scatter_along_axis"], **given), inferred("scatter_along_axis", **given))


@pytest.mark.parametrize("kind", [np.float32, np.int32])
@pytest.mark.parametrize("mode", FOLDS)
@pytest.mark.parametrize("indices", [(6, 1), (5, 2), (2, 3, 2), (4, 3), (2,)])
def test_scatter_nd(indices: tuple[int, ...], mode: str, kind: Any) -> None:
    data = _values(kind, 2, 3, 2)
    places = _indices(2, *indices)
    places.reshape(-1)[-1] -= 2
    updates = _values(kind, *indices[:-1], *data.shape[indices[-1] :])
    result = call(TABLE["scatter_nd"], data=data, indices=places, updates=updates, mode=mode)
    expected = data.copy()
    for at in np.ndindex(*indices[:-1]):
        expected[tuple(places[at])] = FOLDS[mode](expected[tuple(places[at])], updates[at])
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_scatters_add_by_default() -> None:
    ones, zero = np.ones((2, 1), np.float32), np.zeros((1, 1), np.int32)
    for operator, indices in {"scatter": zero[0], "scatter_along_axis": zero, "scatter_nd": zero}.items():
        np.testing.assert_array_equal(call(TABLE[operator], data=ones, indices=indices, updates=ones[:1]), [[2], [1]])


def _given(operator: str, index: int) -> dict[str, Any]:
    x = np.arange(3, dtype=np.float32)
    indices = np.array([[index]] if operator.endswith("_nd") else [index], np.int32)
    return {"data": x, "indices": indices, "updates": x[:1]} if operator.startswith("scatter") else {"x": x, "indices": indices}


@pytest.mark.parametrize("operator", TABLE)
@pytest.mark.parametrize(
    ("index", "validate", "message"),
    [
        (3, None, "index 3 is out of bounds for a dimension of size 3"), (-4, None, "index -4"),
        (3, False, "index 3"), (3, True, "index 3"),
        (-1, False, "index -1 .*iOS17 takes no negative indices"), (-1, True, "index -1 .*iOS17 takes no negative indices"),
    ],
)  # fmt: skip
def test_indices_out_of_bounds_are_refused(operator: str, index: int, validate: bool | None, message: str) -> None:
    """From iOS17 on, where `validate_indices` is a parameter, negative ones too."""
    given = {} if validate is None else {"validate_indices": validate}
    with pytest.raises(IndexError, match=message):
        call(TABLE[operator], **_given(operator, index), **given)


@pytest.mark.parametrize("operator", TABLE)
def test_validated_indices_within_bounds(operator: str) -> None:
    np.testing.assert_array_equal(
        call(TABLE[operator], **_given(operator, 2), validate_indices=True), call(TABLE[operator], **_given(operator, -1))
    )


@pytest.mark.parametrize("operator", ["gather_nd", "scatter_nd"])
def test_each_part_of_an_index_has_its_own_bound(operator: str) -> None:
    x = np.zeros((2, 5), np.float32)
    for part, wrong in enumerate([2, 5]):
        indices = np.array([[1, 4], [0, 0]], np.int32)
        indices[1, part] = wrong
        given = {"data": x, "updates": x[0, :2]} if operator == "scatter_nd" else {"x": x}
        with pytest.raises(IndexError, match=f"index {wrong} is out of bounds for a dimension of size {wrong}"):
            call(TABLE[operator], **given, indices=indices)


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode 'xor'"):
        call(TABLE["scatter"], **_given("scatter", 0), mode="xor")


@pytest.mark.parametrize("target", ["iOS15", "iOS17"])
def test_in_a_program(target: str) -> None:
    from coremltools.converters.mil.mil import Builder as mb

    x = _values(np.float32, 3, 4)
    places = np.array([2, 0], np.int32)

    def build(x: Any) -> Any:
        taken = mb.gather(x=x, indices=places, axis=1)
        return mb.scatter(data=x, indices=places, updates=taken, axis=1, mode="sub")

    (result,) = run(build, {"x": x}, target, TABLE)
    x[:, [0, 2]] = 0
    np.testing.assert_array_equal(result, x)
