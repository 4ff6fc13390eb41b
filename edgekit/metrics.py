"""Accuracy on labelled samples, and the difference between two models with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgekit.contracts import Arrays
from edgekit.errors import DataError
from edgekit.profile.statistics import paired_difference
from edgekit.verify import is_class_scores

TOP1 = "top1"


@dataclass(frozen=True)
class Metric:
    """A metric of one model.

    Attributes:
        name: `top1`: the share of samples whose largest score is that of the labelled class.
        value: Between 0 and 1.
        samples: Number of samples.
    """

    name: str
    value: float
    samples: int

    @classmethod
    def of(cls, correct: np.ndarray) -> Metric:
        """The accuracy from whether each prediction is right, `[S]` of bool.

        Raises:
            DataError: There are no samples.
        """
        _require_samples(correct)
        return cls(TOP1, float(np.mean(correct)), len(correct))

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return asdict(self)


@dataclass(frozen=True)
class MetricDifference:
    """A metric of a model and how far it is from that of the uncompressed model on the same samples.

    Attributes:
        name: As in `Metric`.
        value: As in `Metric`.
        samples: As in `Metric`.
        difference: The model's value minus the uncompressed model's: below 0 the model is worse.
        ci95: 95 % interval of the difference for matched pairs (Agresti & Min 2005).
    """

    name: str
    value: float
    samples: int
    difference: float
    ci95: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them; the interval is a list."""
        return {**asdict(self), "ci95": list(self.ci95)}


def difference(base: np.ndarray, correct: np.ndarray) -> MetricDifference:
    """The accuracy of a model beside that of the uncompressed one.

    Args:
        base: Whether the uncompressed model is right on each sample, `[S]` of bool.
        correct: The same of the model, in the same order.

    Raises:
        DataError: There are no samples, or another number of them in one than in the other.
    """
    gain, low, high = paired_difference(base, correct)
    metric = Metric.of(correct)
    return MetricDifference(metric.name, metric.value, metric.samples, gain, (low, high))


def top1(outputs: Sequence[Arrays], labels: np.ndarray) -> np.ndarray:
    """Whether each sample's largest score is that of its label.

    A sample with a NaN score is wrong whatever its label; of equal scores the first counts, as in every runtime's argmax.

    Args:
        outputs: Outputs batch after batch. One of them is the scores: floats of shape `[B, K]` with K classes, K >= 2.
        labels: The class of each sample, `[S]` of integers, S being the sum of all B.

    Returns:
        `[S]` of bool.

    Raises:
        DataError: The model has no such output or several, fewer classes than the labels name, or another number of
            samples than there are labels.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"labels must be a vector of class numbers, they are {labels.dtype} {list(labels.shape)}", fix="give one integer a sample"
        )
    if labels.size == 0 or not outputs:
        raise DataError("there is no labelled sample to measure accuracy on", fix="give at least one sample with its label")
    name = _scores_name(outputs[0])
    for index, batch in enumerate(outputs):
        if name not in batch or not is_class_scores(batch[name]) or batch[name].shape[1] != outputs[0][name].shape[1]:
            raise DataError(
                f"output '{name}' is not [B, K] scores of the same K classes in every batch",
                where=f"output '{name}', batch {index}",
                fix="evaluate without labels, or export the model with a static number of classes",
            )
    scores = np.concatenate([batch[name].astype(np.float64) for batch in outputs])
    if len(scores) != len(labels):
        raise DataError(f"the model gave scores for {len(scores)} samples, there are {len(labels)} labels", fix="give one label a sample")
    _check_range(labels, scores.shape[1], name)
    correct: np.ndarray = (scores.argmax(axis=1) == labels) & ~np.isnan(scores).any(axis=1)
    return correct


def _scores_name(batch: Arrays) -> str:
    names = [name for name, array in batch.items() if is_class_scores(array)]
    if len(names) == 1:
        return names[0]
    shapes = ", ".join(f"'{name}' {array.dtype} {list(array.shape)}" for name, array in batch.items()) or "none"
    what = "no output with scores [B, K] of K >= 2 classes" if not names else f"{len(names)} outputs that look like class scores"
    raise DataError(
        f"accuracy cannot be measured: the model has {what}",
        where=f"outputs: {shapes}",
        fix="give the data without labels, or a model with one output of class scores",
    )


def _check_range(labels: np.ndarray, classes: int, name: str) -> None:
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise DataError(
            f"label {wrong[0]} is not one of the model's {classes} classes",
            where=f"output '{name}' [B, {classes}]",
            fix=f"give labels from 0 to {classes - 1}, or the model that was trained on them",
        )


def _require_samples(correct: np.ndarray) -> None:
    if len(correct) == 0:
        raise DataError("there is no labelled sample to measure accuracy on", fix="give at least one sample with its label")
