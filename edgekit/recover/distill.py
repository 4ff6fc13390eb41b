"""The whole student towards the whole teacher: its outputs, and the last sums of its stream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekit.recover.network import Network, Samples
from edgekit.recover.objectives.features import alignment
from edgekit.recover.objectives.logits import distance
from edgekit.recover.objectives.relations import relations
from edgekit.recover.pairs import Pair, aligned, find_pairs, kept_rows, token_marks
from edgekit.recover.task import Task, judged
from edgekit.recover.training import Schedule, Trainer

SCHEDULE = Schedule(5e-4, warm_up=20, clip=1.0)
EVALUATIONS = 20
PATIENCE = 6
"""Evaluations without a better state after which it ends."""


@dataclass(frozen=True)
class Whole:
    """The student with what its loss needs.

    Attributes:
        task: The task.
        network: The student.
        pair: The last sum that both have, or None.
        features: The teacher's values of it on the training samples.
    """

    task: Task
    network: Network
    pair: Pair | None
    features: Tensor | None

    @classmethod
    def of(cls, task: Task) -> Whole:
        """Makes the student ready, with the teacher's features where there are any and they count."""
        settings = task.settings
        pairs = find_pairs(task.student, task.teacher) if settings.features or settings.relations else []
        features = Network(task.teacher).run(task.train, [pairs[-1].name])[1][pairs[-1].name] if pairs else None
        return cls(task, Network(task.student, task.names), pairs[-1] if pairs else None, features)

    def loss(self, indices: np.ndarray) -> Tensor:
        """The loss of some training samples."""
        task, marks = self.task, token_marks(self.task.student)
        names = [self.pair.name, *marks] if self.pair is not None else []
        outputs, seen = self.network({name: tensor[indices] for name, tensor in task.train.items()}, names)
        loss = distance(outputs, {name: tensor[indices] for name, tensor in task.train_targets.items()})
        if self.pair is None or self.features is None:
            return loss
        rows = None
        if self.pair.shape != self.pair.teacher_shape:
            for name, mark in marks.items():
                rows = kept_rows(rows, seen[name], mark)
        student, teacher, counts = aligned(seen[self.pair.name], self.features[indices], rows)
        if task.settings.features:
            loss = loss + task.settings.features * alignment(student, teacher, counts)
        if task.settings.relations and counts is None:
            loss = loss + task.settings.relations * relations(student, teacher)
        return loss

    def trainer(self, steps: int) -> Trainer:
        """Trains all weights that may change."""
        settings = self.task.settings
        return Trainer(self.network.parameters, self.loss, self.task.train_count, settings.batch, steps, SCHEDULE, (settings.seed, 2))

    def judge(self) -> float:
        """SQNR of the outputs on held-out samples."""
        with torch.no_grad():
            outputs: Samples = self.network.run(self.task.held)[0]
        return judged(outputs, self.task.held_targets)[0]
