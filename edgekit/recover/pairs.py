"""Which values of the student stand for which of the teacher: sums of the residual stream that bear the same name in both graphs."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape
from edgekit.graph.token_steps import Mark, marks


@dataclass(frozen=True)
class Pair:
    """A value of the student and the teacher's of the same name.

    Attributes:
        name: Their name.
        shape: The student's.
        teacher_shape: The teacher's, which may have more tokens (axis 1).
    """

    name: str
    shape: tuple[int, ...]
    teacher_shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Elements but for the channels, of one sample."""
        result = 1
        for size in self.shape[:-1]:
            result *= size
        return result


def find_pairs(student: ir.Model, teacher: ir.Model) -> list[Pair]:
    """Residual sums `[B, N, C]`, `[B, C, H, W]` … in the student's order; of token streams the student's may be shorter.

    A stream whose tokens were merged stands for none of the teacher's from there on, and ends the list.
    """
    there = {str(value.name): static_shape(value) for value in _sums(teacher)}
    merged = any(mark.role in ("stay", "absorbed") for mark in marks(student.graph).values())
    pairs = []
    for value in _sums(student):
        shape, other = static_shape(value), there.get(str(value.name))
        if shape is None or other is None or len(shape) != len(other):
            continue
        if shape == other:
            pairs.append(Pair(str(value.name), shape, other))
        elif merged:
            break
        elif len(shape) == 3 and (shape[0], shape[2]) == (other[0], other[2]) and shape[1] < other[1]:
            pairs.append(Pair(str(value.name), shape, other))
    return pairs


def _sums(model: ir.Model) -> list[ir.Value]:
    return [
        node.outputs[0]
        for node in model.graph
        if node.op_type == "Add" and node.domain == "" and all(value is not None and constant_array(value) is None for value in node.inputs)
        and len(static_shape(node.outputs[0]) or ()) >= 3
    ]  # fmt: skip


def token_marks(student: ir.Model) -> dict[str, Mark]:
    """The values that say which tokens stay, in order; none where tokens are merged."""
    found = marks(student.graph)
    return {name: mark for name, mark in found.items() if mark.role in ("kept", "fused")}


def kept_rows(before: Tensor | None, places: Tensor, mark: Mark) -> Tensor:
    """The teacher's row of each of the student's tokens, `[S, B, k]`, after one more step; −1: the token was made of others and is none.

    Args:
        before: The rows before the step; None: all, in order.
        places: Which tokens after the prefix stay, `[S, B, k]`.
        mark: The step.
    """
    prefix = torch.arange(mark.prefix).expand(*places.shape[:-1], mark.prefix)
    here = torch.cat([prefix, places + mark.prefix], -1)
    rows = here if before is None else torch.gather(before, -1, here)
    return torch.cat([rows, torch.full_like(rows[..., :1], -1)], -1) if mark.role == "fused" else rows


def aligned(student: Tensor, teacher: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The student's values, the teacher's that they stand for, and which of them count `[S, B, n, 1]` (None: all)."""
    if rows is None:
        return student, teacher, None
    index = rows.clamp(min=0).unsqueeze(-1).expand(*rows.shape, teacher.shape[-1])
    return student, torch.gather(teacher, 2, index), (rows >= 0).unsqueeze(-1)
