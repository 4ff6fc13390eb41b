"""How MIL's arguments are read where an operator needs Python's integers and not tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ints(value: torch.Tensor | Sequence[int | torch.Tensor]) -> list[int]:
    """The integers of a tensor of rank 0 or 1, or of a list."""
    if isinstance(value, torch.Tensor):
        return [int(item) for item in value.reshape(-1).tolist()]
    return [int(item) for item in value]


def number(value: torch.Tensor | float) -> int | float | bool:
    """The number of a tensor with one element; a Python number is returned as it is."""
    return value.item() if isinstance(value, torch.Tensor) else value


def dims(axes: torch.Tensor | Sequence[int | torch.Tensor], rank: int) -> list[int]:
    """The axes, negative ones counted from the end of `rank` dimensions."""
    return [axis + rank if axis < 0 else axis for axis in ints(axes)]
