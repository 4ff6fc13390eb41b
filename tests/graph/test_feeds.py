"""Feeds that do not fit are refused with the input's name, what was expected and what was given; nothing is converted."""

import numpy as np
import pytest

from edgekit.errors import UsageError
from edgekit.graph.feeds import check_feeds

DECLARED = {
    "image": (np.dtype("float32"), (1, 3, 8, 8)),
    "mask": (np.dtype("bool"), (4, None)),
    "step": (np.dtype("int64"), ()),
}
GOOD = {"image": np.zeros((1, 3, 8, 8), np.float32), "mask": np.zeros((4, 7), bool), "step": np.array(3)}


def refusal(**changes):
    inputs = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    with pytest.raises(UsageError) as caught:
        check_feeds(DECLARED, inputs)
    return caught.value


def test_fitting_feeds_pass_in_any_memory_layout():
    check_feeds(DECLARED, GOOD)
    check_feeds(DECLARED, {**GOOD, "image": np.asfortranarray(GOOD["image"]), "mask": np.zeros((4, 0), bool)})
    check_feeds({}, {})


def test_unknown_name_gives_the_nearest():
    error = refusal(imge=GOOD["image"])
    assert "'imge'" in error.what
    assert "did you mean 'image'" in error.fix


def test_missing_input_is_named_with_what_was_given():
    error = refusal(mask=None)
    assert "'mask' is missing" in error.what
    assert "image, step" in error.what


@pytest.mark.parametrize("dtype", ["float64", "float16", ">f4", "int32"])
def test_wrong_dtype_is_not_converted(dtype):
    error = refusal(image=np.zeros((1, 3, 8, 8), dtype))
    assert "expected float32 [1, 3, 8, 8]" in error.what
    assert f"given {np.dtype(dtype)}" in error.what


@pytest.mark.parametrize("shape", [(1, 3, 8, 9), (3, 8, 8), (1, 3, 8, 8, 1), ()])
def test_wrong_shape(shape):
    error = refusal(image=np.zeros(shape, np.float32))
    assert "'image'" in error.what
    assert "expected float32 [1, 3, 8, 8]" in error.what


def test_forgotten_batch_axis_is_recognized():
    assert "batch axis" in refusal(image=np.zeros((3, 8, 8), np.float32)).fix


def test_open_dimension_still_fixes_the_rank_and_the_others():
    assert "[4, ?]" in refusal(mask=np.zeros((5, 7), bool)).what
    assert "[4, ?]" in refusal(mask=np.zeros((4,), bool)).what


@pytest.mark.parametrize("value", [3, np.int64(3), [1, 2]])
def test_what_is_no_array_is_refused(value):
    error = refusal(step=value)
    assert type(value).__name__ in error.what
    assert "numpy.asarray" in error.fix
