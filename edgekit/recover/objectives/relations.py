"""How tokens relate to each other, like the teacher's: independent of the basis of the channels, and of how many there are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def relation(x: Tensor, y: Tensor) -> Tensor:
    """Log of softmax(x·yᵀ/√d), `[S, B, N, N]`, of tokens `[S, B, N, d]`."""
    return functional.log_softmax(x @ y.transpose(-1, -2) / x.shape[-1] ** 0.5, -1)


def relations(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of the teacher's relations of values to themselves from the student's, mean over tokens, `[S, B, N, d]` each with a d of its own.

    Source: Shi et al. 2024, "Hybrid Distillation: Connecting Masked Autoencoders with Contrastive Learners", section 3; relations of values
    to themselves are those of Wang et al. 2020, "MiniLM", equation 6.
    """
    log_p, log_q = relation(teacher, teacher), relation(student, student)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def diversity(attention: Tensor) -> Tensor:
    """Normalized mutual information of query and key positions of attention weights `[..., N, N]`, in 0 … 1; 0: every query looks alike.

    Source: Park et al. 2023, "What Do Self-Supervised Vision Transformers Learn?", section 3.
    """
    weights = attention.double()
    count = weights.shape[-2]
    joint = weights / count
    keys = joint.sum(-2, keepdim=True)
    queries = torch.full_like(joint[..., :1], 1 / count)
    information = torch.where(joint > 0, joint * (joint / (queries * keys).clamp(min=1e-300)).log(), 0.0).sum((-1, -2))
    entropy_keys = -torch.where(keys > 0, keys * keys.clamp(min=1e-300).log(), 0.0).sum((-1, -2))
    entropy_queries = torch.tensor(float(count), dtype=torch.float64).log()
    return information / (entropy_queries * entropy_keys).sqrt().clamp(min=1e-12)
