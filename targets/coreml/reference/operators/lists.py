"""MIL's lists of tensors, as Python lists. An operator that changes a list returns a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from edgekit.targets.coreml.reference.operators.arguments import ints, number
from edgekit.targets.coreml.reference.types import HELD, computed

Elements = list[torch.Tensor | None]
"""The elements of a list; None is one of unknown shape that nothing has written yet."""


class FixedList(list[torch.Tensor | None]):
    """A list made with `dynamic_length = False`: its length never changes."""


def _make_list(
    elem_shape: Sequence[torch.Tensor | str] | None = None,
    init_length: torch.Tensor | int = 1,
    dynamic_length: torch.Tensor | bool = True,
    dtype: str = "fp32",
) -> Elements:
    """A list of zeros. An element has no value before it is written where `elem_shape` leaves a size open, by a name."""
    if dtype not in HELD:
        raise ValueError(f"a list has no elements of type '{dtype}'")
    count = int(number(init_length))
    element: torch.Tensor | None = None
    if elem_shape is not None and not any(isinstance(size, str) for size in elem_shape):
        element = computed(torch.zeros(ints([size for size in elem_shape if not isinstance(size, str)]), dtype=HELD[dtype]))
    elements: Elements = [element] * count
    return elements if number(dynamic_length) else FixedList(elements)


def _written(ls: Elements, updates: Sequence[tuple[int, torch.Tensor]]) -> Elements:
    """A copy of the list with elements replaced. It grows as far as the largest index, with zeros in between, unless it is fixed."""
    elements = type(ls)(ls)
    for index, value in updates:
        if index < 0 or (index >= len(elements) and isinstance(ls, FixedList)):
            raise ValueError(f"index {index} lies outside a list of {len(elements)} elements")
        elements.extend([torch.zeros_like(value)] * (index + 1 - len(elements)))
        elements[index] = value
    return elements


def _element(ls: Elements, index: int) -> torch.Tensor:
    if not 0 <= index < len(ls):
        raise ValueError(f"index {index} lies outside a list of {len(ls)} elements")
    value = ls[index]
    if value is None:
        raise ValueError(f"element {index} of a list is read before it is written")
    return value


def _list_gather(ls: Elements, indices: torch.Tensor) -> torch.Tensor:
    return torch.stack([_element(ls, index) for index in ints(indices)])


def _list_length(ls: Elements) -> torch.Tensor:
    return torch.tensor(len(ls), dtype=torch.int32)


def _list_read(ls: Elements, index: torch.Tensor) -> torch.Tensor:
    return _element(ls, int(number(index)))


def _list_scatter(ls: Elements, indices: torch.Tensor, value: torch.Tensor) -> Elements:
    return _written(ls, list(zip(ints(indices), value.unbind(0), strict=True)))


def _list_write(ls: Elements, index: torch.Tensor, value: torch.Tensor) -> Elements:
    return _written(ls, [(int(number(index)), value)])


TABLE: dict[str, Callable[..., Any]] = {
    "list_gather": _list_gather,
    "list_length": _list_length,
    "list_read": _list_read,
    "list_scatter": _list_scatter,
    "list_write": _list_write,
    "make_list": _make_list,
}
