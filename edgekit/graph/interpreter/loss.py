"""Losses of classification."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.values import NotSupportedError


@operator("NegativeLogLikelihoodLoss")
def negative_log_likelihood(
    x: Tensor, target: Tensor, weight: Tensor | None = None, /, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Tensor:
    """Minus the log-probability `[B, C, …]` of the target class `[B, …]`, weighted by class and reduced."""
    ignored = torch.zeros_like(target, dtype=torch.bool) if ignore_index is None else target == ignore_index
    index = torch.where(ignored, 0, target).long()
    losses = -torch.gather(x, 1, index.unsqueeze(1)).squeeze(1)
    weights = torch.ones_like(losses) if weight is None else weight[index]
    weights = weights.masked_fill(ignored, 0.0)
    losses = torch.where(ignored, 0.0, losses * weights)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    if reduction == "mean":
        return losses.sum() / weights.sum()
    raise NotSupportedError(f"reduction '{reduction}'")


@operator("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy(
    scores: Tensor, labels: Tensor, weight: Tensor | None = None, /, *, ignore_index: int | None = None, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the softmax of scores `[B, C, …]`; gives the log-probabilities too."""
    log_probabilities = torch.log_softmax(scores, 1)
    loss = negative_log_likelihood(log_probabilities, labels, weight, ignore_index=ignore_index, reduction=reduction)
    return loss, log_probabilities
