"""A student, its teacher, and the samples that both see: what every level of a recovery works on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgekit.contracts import Arrays
from edgekit.errors import DataError
from edgekit.recover.network import Network, Samples, chosen, stack, write
from edgekit.recover.objectives.logits import is_scores
from edgekit.recover.settings import Settings

_HELD_OUT = 10
"""Of so many batches one is never trained on."""


class Task:
    """What is recovered.

    Attributes:
        student: The graph that is changed.
        teacher: The graph that it is to equal.
        names: Names of the weights that may change.
        train: Inputs to train on, `[S, ...]` by name.
        held: Inputs to judge by.
        train_targets: The teacher's outputs on `train`.
        held_targets: The teacher's outputs on `held`.

    Raises:
        DataError: There are fewer than two batches, or they hold NaN.
        UsageError: A pattern of weights matches none.
    """

    def __init__(self, student: ir.Model, teacher: ir.Model, feeds: Sequence[Arrays], settings: Settings) -> None:
        self.student, self.teacher, self.settings = student, teacher, settings
        _require_samples(feeds)
        self.names = chosen(student, settings.trainable)
        network, master = Network(student, self.names), Network(teacher)
        order = np.random.default_rng([settings.seed, len(feeds)]).permutation(len(feeds))
        count = max(len(feeds) // _HELD_OUT, 1)
        samples = stack(feeds, network.input_names)
        held, train = np.sort(order[:count]), np.sort(order[count:])
        self.held: Samples = {name: tensor[held] for name, tensor in samples.items()}
        self.train: Samples = {name: tensor[train] for name, tensor in samples.items()}
        self.train_targets, self.held_targets = master.run(self.train)[0], master.run(self.held)[0]

    @property
    def train_count(self) -> int:
        """Number of batches to train on."""
        return len(next(iter(self.train.values())))

    def judge(self) -> tuple[float, float | None]:
        """SQNR of the student's outputs on held-out samples in dB, and its agreement with the teacher where there are class scores."""
        outputs, _ = Network(self.student).run(self.held)
        return judged(outputs, self.held_targets)

    def weights(self) -> dict[str, Tensor]:
        """The student's weights that may change."""
        return Network(self.student, self.names).state()

    def put(self, weights: dict[str, Tensor]) -> None:
        """Writes weights into the student."""
        write(self.student, weights)


def judged(outputs: Samples, targets: Samples) -> tuple[float, float | None]:
    """SQNR in dB over all outputs of floats, and the share of equal predictions of those that are class scores."""
    floats = [name for name in targets if targets[name].is_floating_point()]
    signal = sum(float(targets[name].double().square().sum()) for name in floats)
    noise = sum(float((outputs[name].double() - targets[name].double()).square().sum()) for name in floats)
    if not math.isfinite(noise):
        return -math.inf, None
    scores = [name for name in floats if is_scores(targets[name])]
    equal = [(outputs[name].argmax(-1) == targets[name].argmax(-1)).double().mean() for name in scores]
    agreement = float(torch.stack(equal).mean()) if equal else None
    return 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300)), agreement


def _require_samples(feeds: Sequence[Arrays]) -> None:
    if len(feeds) < 2:
        raise DataError(
            f"{len(feeds)} batches cannot be both trained on and judged by", where="recover", fix="give --calibration 64 or more"
        )
    for feed in feeds:
        for name, array in feed.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise DataError(f"the calibration input '{name}' holds NaN or infinity", where="recover", fix="clean the data")
