"""Lists of the evaluator, whose operators return new lists, against the documentation."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

from edgekit.targets.coreml.reference.operators import elementwise
from edgekit.targets.coreml.reference.operators.lists import TABLE
from tests.targets.coreml.reference.mil_support import argument, check_signatures, run

SHAPE = [np.int32(2), np.int32(3)]


def _value(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, shape or (2, 3)).astype(np.float32))


def _read(ls: list[Any], index: int) -> torch.Tensor:
    value: torch.Tensor = TABLE["list_read"](ls=ls, index=torch.tensor(index))
    return value


def _made(**arguments: Any) -> list[Any]:
    made: list[Any] = TABLE["make_list"](
        **{name: value if isinstance(value, bool) else argument(value) for name, value in arguments.items()}
    )
    return made


@pytest.mark.parametrize(
    ("dtype", "held"), [("fp32", torch.float32), ("fp16", torch.float32), ("int32", torch.int32), ("bool", torch.bool)]
)
def test_make_list(dtype: str, held: torch.dtype) -> None:
    made = _made(elem_shape=SHAPE, init_length=4, dynamic_length=False, dtype=dtype)
    assert int(TABLE["list_length"](ls=made)) == 4
    assert all(item.shape == (2, 3) and item.dtype == held and not item.any() for item in made)


def test_make_list_by_default() -> None:
    made = _made(elem_shape=[np.int32(2)])
    assert TABLE["list_length"](ls=made).dtype == torch.int32
    assert len(made) == 1
    assert made[0].dtype == torch.float32
    assert _made(elem_shape=[]) == [torch.zeros(())]
    with pytest.raises(ValueError, match="type 'fp8'"):
        _made(elem_shape=[], dtype="fp8")


def test_an_element_of_open_shape_has_no_value_before_it_is_written() -> None:
    made = _made(elem_shape=["batch", np.int32(3)], init_length=2)
    with pytest.raises(ValueError, match="before it is written"):
        _read(made, 1)
    value = _value(0)
    assert torch.equal(_read(TABLE["list_write"](ls=made, index=torch.tensor(1), value=value), 1), value)


def test_list_write_returns_a_new_list() -> None:
    made = _made(elem_shape=SHAPE, init_length=2, dynamic_length=False)
    value = _value(1)
    written = TABLE["list_write"](ls=made, index=torch.tensor(1), value=value)
    assert torch.equal(_read(written, 1), value)
    assert not _read(written, 0).any()
    assert not _read(made, 1).any()


def test_a_list_of_dynamic_length_grows() -> None:
    made = _made(elem_shape=SHAPE)
    value = _value(2)
    written = TABLE["list_write"](ls=made, index=torch.tensor(3), value=value)
    assert (len(made), len(written)) == (1, 4)
    assert torch.equal(_read(written, 3), value)
    assert not _read(written, 2).any()
    scattered = TABLE["list_scatter"](ls=made, indices=torch.tensor([2, 0]), value=torch.stack([value, -value]))
    assert len(scattered) == 3
    assert torch.equal(_read(scattered, 0), -value)


def test_a_list_of_fixed_length_does_not_grow() -> None:
    made = _made(elem_shape=SHAPE, init_length=2, dynamic_length=False)
    written = TABLE["list_write"](ls=made, index=torch.tensor(0), value=_value(3))
    for ls in (made, written):
        with pytest.raises(ValueError, match="outside a list of 2"):
            TABLE["list_write"](ls=ls, index=torch.tensor(2), value=_value(3))


@pytest.mark.parametrize("index", [-1, 2])
def test_reading_outside_of_a_list(index: int) -> None:
    made = _made(elem_shape=SHAPE, init_length=2)
    with pytest.raises(ValueError, match="outside a list of 2"):
        _read(made, index)
    with pytest.raises(ValueError, match="outside a list of 2"):
        TABLE["list_gather"](ls=made, indices=torch.tensor([0, index]))


def test_writing_before_a_list() -> None:
    with pytest.raises(ValueError, match="index -1"):
        TABLE["list_write"](ls=_made(elem_shape=SHAPE), index=torch.tensor(-1), value=_value(4))


def test_gather_and_scatter() -> None:
    values = _value(5, 3, 2, 3)
    made = _made(elem_shape=SHAPE, init_length=5)
    scattered = TABLE["list_scatter"](ls=made, indices=torch.tensor([4, 0, 2]), value=values)
    gathered = TABLE["list_gather"](ls=scattered, indices=torch.tensor([0, 2, 4, 0, 1]))
    assert gathered.shape == (5, 2, 3)
    assert torch.equal(gathered, torch.stack([values[1], values[2], values[0], values[1], torch.zeros(2, 3)]))
    with pytest.raises(ValueError):
        TABLE["list_scatter"](ls=made, indices=torch.tensor([0, 1]), value=values)


def test_of_scalars() -> None:
    written = TABLE["list_write"](ls=_made(elem_shape=[], init_length=2), index=torch.tensor(1), value=torch.tensor(3.0))
    assert TABLE["list_gather"](ls=written, indices=torch.tensor([1, 0])).tolist() == [3.0, 0.0]


def test_a_list_in_the_loop_of_a_saved_package() -> None:
    def build(x: Any) -> Any:
        def more(i: Any, ls: Any) -> Any:
            return mb.less(x=i, y=3)

        def write(i: Any, ls: Any) -> Any:
            return mb.add(x=i, y=1), mb.list_write(ls=ls, index=i, value=mb.mul(x=x, y=mb.cast(x=i, dtype="fp32")))

        made = mb.make_list(init_length=4, dynamic_length=False, elem_shape=(2,), dtype="fp32")
        _, filled = mb.while_loop(_cond=more, _body=write, loop_vars=(np.int32(0), made))
        scattered = mb.list_scatter(ls=filled, indices=np.array([3], np.int32), value=mb.expand_dims(x=x, axes=[0]))
        return mb.list_gather(ls=scattered, indices=[3, 2, 0]), mb.list_read(ls=filled, index=1), mb.list_length(ls=scattered)

    table = {**TABLE, **elementwise.TABLE, "expand_dims": lambda x, axes: x.unsqueeze(int(axes[0]))}
    gathered, read, length = run(build, {"x": np.array([1.0, -2.0], np.float32)}, "iOS15", table)
    assert gathered.tolist() == [[1, -2], [2, -4], [0, 0]]
    assert read.tolist() == [1, -2]
    assert length == 4


def test_parameters_of_every_version() -> None:
    check_signatures(TABLE)
