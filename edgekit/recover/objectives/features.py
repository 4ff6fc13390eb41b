"""Values inside like the teacher's: their distance after a norm without weights, and as a share of what a block adds to its stream."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def whitened(x: Tensor) -> Tensor:
    """Layer norm over the channels, without weights."""
    return functional.layer_norm(x, x.shape[-1:])


def alignment(student: Tensor, teacher: Tensor, counts: Tensor | None = None) -> Tensor:
    """Smooth L1 of features `[S, B, N, C]`, both whitened, mean over everything that counts `[S, B, N, 1]`.

    Source: Xue et al. 2023, "Stare at What You See: Masked Image Modeling without Reconstruction", section 3.3 (the teacher is whitened).
    """
    distance = functional.smooth_l1_loss(whitened(student), whitened(teacher), reduction="none")
    return _mean(distance, counts)


def reconstruction(student: Tensor, teacher: Tensor, energy: float, counts: Tensor | None = None) -> Tensor:
    """Energy of a block's error over `energy`, that of what the teacher's block adds to its stream: 1 for a block that does nothing.

    Args:
        student: The student's values after the block, `[S, B, N, C]`.
        teacher: The teacher's.
        energy: Mean square of what the teacher's block adds.
        counts: Which count, `[S, B, N, 1]`; None: all.

    Source: the reconstruction of blocks is that of Li et al. 2021, "BRECQ", section 3.2; what it is divided by is ours.
    """
    return _mean((student - teacher).square(), counts) / max(energy, 1e-12)


def _mean(values: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return values.mean()
    weights = counts.to(values.dtype).expand_as(values)
    return (values * weights).sum() / weights.sum().clamp(min=1)


def dynamic_alignment(students: list[Tensor], mixing: Tensor, teachers: list[Tensor]) -> Tensor:
    """Mixtures of the student's layers like the teacher's layers: 2·smooth L1, mean over the teacher's.

    Args:
        students: Features of n layers, `[S, B, N, C]`.
        mixing: `[m, n]`, trained along; it starts as `start_mixing`.
        teachers: Features of m layers.

    Source: Xue et al. 2023, section 3.3 (Dynamic Alignment).
    """
    stacked = torch.stack(students)
    mixed = torch.einsum("mn,n...->m...", mixing, stacked)
    return torch.stack([2 * functional.smooth_l1_loss(one, whitened(other)) for one, other in zip(mixed, teachers, strict=True)]).mean()


def start_mixing(count: int) -> Tensor:
    """The identity with 0.01 added everywhere, `[n, n]`: every layer begins with a share of every other."""
    return torch.eye(count) + 0.01
