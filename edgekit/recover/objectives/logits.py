"""Outputs like the teacher's: class scores by their softened probabilities, others by their distance."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

TEMPERATURE = 2.0


def distance(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], temperature: float = TEMPERATURE) -> Tensor:
    """τ²·KL(softmax(teacher/τ) ‖ softmax(student/τ)) of class scores `[S, B, K]`, mean over samples; of other outputs the relative energy.

    Source: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    losses = [_one(student[name], teacher[name], temperature) for name in teacher if teacher[name].is_floating_point()]
    return torch.stack(losses).sum() if losses else torch.zeros(())


def is_scores(output: Tensor) -> bool:
    """Whether an output of samples, `[S, B, K]`, is taken for class scores."""
    return output.dim() == 3 and output.shape[-1] > 1


def _one(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    if not is_scores(teacher):
        return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)
    log_q = functional.log_softmax(student / temperature, -1).flatten(0, -2)
    log_p = functional.log_softmax(teacher / temperature, -1).flatten(0, -2)
    return temperature**2 * functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
