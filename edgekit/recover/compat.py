"""The objective `compat`: an embedding that stays comparable with the vectors that an app has stored already.

A student replaces a model whose vectors are kept in an index. Two of its outputs are trained: n, its free embedding, towards a teacher, and
its compatible part towards the model that made the stored vectors. All functions take torch tensors and are differentiable.

Source: Zhou et al. 2023, "BT²: Backward-compatible Training with Basis Transformation"; the pseudo-classifier is that of Shen et al. 2020,
"Towards Backward-Compatible Representation Learning".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.errors import DataError


@dataclass(frozen=True)
class CompatWeights:
    """Weights of the terms.

    Attributes:
        teacher: λ1, of the distance between n and the teacher's embedding.
        classes: λ2, of the cross-entropy of the compatible part under the pseudo-classifier.
        stored: λ3, of the distance between the compatible part and the stored model's embedding.
    """

    teacher: float = 1.0
    classes: float = 10.0
    stored: float = 5.0


@dataclass(frozen=True)
class PseudoClasses:
    """Classes as directions in the space of the stored vectors.

    Attributes:
        means: The matrix M, `[K, D]`: per class the mean of its stored vectors.
        labels: Class of each sample, `[S]`.
    """

    means: Tensor
    labels: Tensor


def class_means(stored: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Returns the pseudo-classifier M `[classes, D]`: per class the mean of the stored vectors `[S, D]` of its samples.

    Raises:
        DataError: A class has no sample, or a label is out of range.
    """
    if labels.shape != stored.shape[:1] or (labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes):
        raise DataError(f"labels of {len(stored)} samples must be numbers from 0 to {classes - 1}", fix="give one label per vector")
    counts = torch.bincount(labels, minlength=classes)
    if int(counts.min()) == 0:
        raise DataError(f"class {int(counts.argmin())} has no sample", fix="leave it out, or give vectors of every class")
    sums = torch.zeros(classes, stored.shape[1], dtype=stored.dtype, device=stored.device).index_add_(0, labels, stored)
    return sums / counts[:, None].to(stored.dtype)


def cluster_classes(stored: Tensor, classes: int, seed: int = 0) -> PseudoClasses:
    """Makes pseudo-classes without labels: k-means of the stored vectors `[S, D]`, of which M is the centres.

    Raises:
        DataError: There are fewer vectors than classes.
    """
    if len(stored) < classes or classes < 1:
        raise DataError(f"{len(stored)} vectors cannot be put into {classes} classes", fix="give more samples or ask for fewer classes")
    from sklearn.cluster import KMeans

    found = KMeans(classes, n_init=4, random_state=seed).fit(stored.detach().cpu().double().numpy())
    labels = torch.from_numpy(found.labels_).long().to(stored.device)
    return PseudoClasses(torch.from_numpy(found.cluster_centers_).to(stored), labels)


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """Returns the mean over the batch of 1 − cos(a, b) for `[B, D]` and `[B, D]`; a scalar from 0 to 2."""
    return (1 - functional.cosine_similarity(a, b, dim=1)).mean()


def compat_loss(
    new: Tensor,
    compatible: Tensor,
    *,
    teacher: Tensor,
    stored: Tensor,
    means: Tensor | None = None,
    labels: Tensor | None = None,
    logits: Tensor | None = None,
    weights: CompatWeights | None = None,
) -> Tensor:
    """Returns L = CE(logits, y) + λ2·CE(ĉ·Mᵀ, y) + λ3·(1 − cos(c, stored)) + λ1·(1 − cos(n, teacher)), a scalar.

    Args:
        new: The student's free embedding n, `[B, D_new]`.
        compatible: Its compatible part c, `[B, D_old]`; ĉ is c at length 1.
        teacher: The teacher's embedding of the same inputs, `[B, D_new]`.
        stored: The stored model's embedding of them, `[B, D_old]`.
        means: The pseudo-classifier M `[K, D_old]`; None leaves λ2's term out.
        labels: Class y of each input, `[B]`; needed with `means` and with `logits`.
        logits: The student's own classifier, `[B, K]`; None leaves the first term out, as where no labels exist.
        weights: λ1 to λ3.

    Raises:
        DataError: Shapes do not fit, or `means` or `logits` are given without labels.
    """
    weights = weights or CompatWeights()
    if new.shape != teacher.shape or compatible.shape != stored.shape:
        raise DataError(
            f"embeddings of shape {tuple(new.shape)} and {tuple(compatible.shape)} are compared with "
            f"{tuple(teacher.shape)} and {tuple(stored.shape)}",
            fix="give the teacher's and the stored model's embeddings of the same inputs, in the student's dimensions",
        )
    total = weights.teacher * cosine_distance(new, teacher) + weights.stored * cosine_distance(compatible, stored)
    if (means is not None or logits is not None) and labels is None:
        raise DataError("a cross-entropy needs the class of each input", fix="give labels, or those of cluster_classes")
    if means is not None and labels is not None:
        total = total + weights.classes * functional.cross_entropy(functional.normalize(compatible, dim=1) @ means.T, labels)
    if logits is not None and labels is not None:
        total = total + functional.cross_entropy(logits, labels)
    return total
