"""Adversarial inputs of every dtype and shape, and what they tell of a stage."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from edgekit.adversarial import DENORMALS, LARGE, MIXED, SEPARATE_MACS, ZEROS, adversarial_batches, findings
from edgekit.data import Declared

FLOATS = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
WHOLE_NUMBERS = [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, np.bool_]
SHAPES = [(), (1,), (2,), (1, 3, 8, 8), (1, 50), (4, 7), (0, 3)]


def batches(dtype: type, shape: tuple[int, ...], macs: int = 0, seed: int = 0):
    return adversarial_batches({"x": Declared(shape, np.dtype(dtype))}, seed, macs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE_NUMBERS])
@pytest.mark.parametrize("macs", [0, SEPARATE_MACS + 1])
def test_every_batch_has_the_dtype_and_shape_that_the_graph_takes(dtype: type, shape: tuple[int, ...], macs: int) -> None:
    found = batches(dtype, shape, macs)
    assert list(found) == ([MIXED] if macs else [ZEROS, LARGE, DENORMALS])
    for batch in found.values():
        assert batch["x"].dtype == dtype
        assert batch["x"].shape == shape
        assert np.isfinite(batch["x"].astype(np.float64)).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_are_zero_large_and_denormal(dtype: type) -> None:
    found = {kind: batch["x"].astype(np.float64) for kind, batch in batches(dtype, (1, 3, 8, 8)).items()}
    numbers = ml_dtypes.finfo(dtype)
    assert not found[ZEROS].any()
    assert np.abs(found[DENORMALS]).max() <= float(numbers.smallest_normal)
    assert found[DENORMALS].any()
    largest = np.abs(found[LARGE]).max()
    assert largest > min(1e4, np.sqrt(float(numbers.max)) / 4)
    assert largest**2 <= float(numbers.max)  # so that an infinity downstream is not the input's own doing


@pytest.mark.parametrize("dtype", WHOLE_NUMBERS)
def test_whole_numbers_may_be_indices(dtype: type) -> None:
    found = {kind: batch["x"] for kind, batch in batches(dtype, (3, 5)).items()}
    assert not found[ZEROS].any()
    assert (found[LARGE] == 1).all()
    assert set(np.unique(found[DENORMALS])) == {0, 1}


def test_a_large_model_gets_the_three_kinds_in_one_input() -> None:
    for shape, axis in (((6, 4), 0), ((1, 3, 9, 9), 2), ((1, 90, 4), 1), ((2, 9), 1)):
        array = np.moveaxis(batches(np.float32, shape, SEPARATE_MACS + 1)[MIXED]["x"], axis, 0)
        third = len(array) // 3
        assert not array[:third].any()
        assert np.abs(array[third : 2 * third]).min() > 1e-3
        assert 0 < np.abs(array[2 * third :]).max() <= np.finfo(np.float32).smallest_normal


def test_the_seed_decides_and_text_has_no_extremes() -> None:
    one, same, other = (batches(np.float32, (4, 4), seed=seed)[LARGE]["x"] for seed in (1, 1, 2))
    assert (one == same).all()
    assert (one != other).all()
    assert adversarial_batches({"x": Declared((2,), np.dtype(object)), "y": Declared((2,), np.dtype(np.float32))}, 0) == {}


def judged(before: np.ndarray, after: np.ndarray):
    return findings(["zeros"], [{"y": before}], [{"y": after}], stage="pass 'p'", precision="fp32")


def test_findings() -> None:
    fine = np.array([[1.0, 2.0]], np.float32)
    assert judged(fine, fine * np.float32(1 + 1e-6)) == []
    (found,) = judged(fine, fine * np.float32(1.01))
    assert not found.lost
    assert "zeros" in found.text
    assert "'p'" in found.text
    for value in (np.nan, np.inf):
        (found,) = judged(fine, np.array([[1.0, value]], np.float32))
        assert found.lost
    assert judged(np.array([[1.0, np.inf]], np.float32), np.array([[1.0, np.nan]], np.float32)) == []  # it was lost before
    assert judged(np.array([[1.0, np.nan]], np.float32), fine) == []  # more than was there
    (found,) = judged(np.array([[1.0, np.nan]], np.float32), fine + 1)  # what was finite is compared all the same
    assert not found.lost


def test_integers_are_never_lost() -> None:
    assert judged(np.array([1, 2]), np.array([1, 2])) == []
    (found,) = judged(np.array([1, 2]), np.array([1, 3]))
    assert not found.lost
