"""Block after block: the student's own input, the teacher's output as target, and only a step back where held-out samples get worse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from edgekit.recover.network import Network, Samples
from edgekit.recover.objectives.features import reconstruction
from edgekit.recover.pairs import aligned
from edgekit.recover.segments import Segment, Stream, Walk, advanced_rows
from edgekit.recover.task import Task
from edgekit.recover.training import Schedule, Trainer

SCHEDULE = Schedule(1e-3)


@dataclass(frozen=True)
class Split:
    """What one block sees of one split of the samples.

    Attributes:
        inputs: What the student's part reads.
        target: The teacher's sum at the end, `[S, B, N, C]`.
        stream: Where the samples were before.
        segment: The segment.
    """

    inputs: Samples
    target: Tensor
    stream: Stream
    segment: Segment

    def aligned(self, seen: Samples, indices: np.ndarray | slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """The target at the student's tokens, and which of them count."""
        rows = None if self.stream.rows is None else self.stream.rows[indices]
        target = self.target[indices]
        _, found, counts = aligned(target, target, advanced_rows(self.segment, rows, seen))
        return found, counts


@dataclass(frozen=True)
class Unit:
    """One block, ready to be trained.

    Attributes:
        number: Its number.
        segment: What it computes.
        network: The student's part.
        train: The samples to train on.
        held: The samples to judge by.
        energy: Mean square of what the teacher's block adds to its stream.
    """

    number: int
    segment: Segment
    network: Network
    train: Split
    held: Split
    energy: float

    def loss(self, split: Split, indices: np.ndarray | slice = slice(None)) -> Tensor:
        """The reconstruction error of some samples."""
        names = [name for name, _ in self.segment.marks]
        outputs, seen = self.network({name: tensor[indices] for name, tensor in split.inputs.items()}, names)
        target, counts = split.aligned(seen, indices)
        return reconstruction(outputs[self.segment.pair.name], target, self.energy, counts)

    def judge(self) -> float:
        """The error on held-out samples."""
        count = len(self.held.target)
        with torch.no_grad():
            losses = [float(self.loss(self.held, np.arange(start, min(start + 32, count)))) for start in range(0, count, 32)]
        return float(np.mean(losses))

    def trainer(self, task: Task, steps: int) -> Trainer:
        """Trains the block's weights."""
        parameters = {name: self.network.parameters[name] for name in self.segment.trainable}
        return Trainer(parameters, lambda indices: self.loss(self.train, indices), task.train_count, task.settings.batch, steps, SCHEDULE,
                       (task.settings.seed, 1, self.number))  # fmt: skip

    def keep_if_better(self, task: Task, before: float, old: dict[str, Tensor]) -> bool:
        """Writes the block's weights into the student where its error is less than `before`; else takes `old` back."""
        after = self.judge()
        better = after < before
        if not better:
            self.network.restore(old)
        task.put(self.network.state())
        return better


def units(task: Task, found: list[Segment]) -> Iterator[Unit]:
    """The blocks in order; each is made when those before it are done, on what they give."""
    train, held = Walk(task.train), Walk(task.held)
    for number, segment in enumerate(found):
        goals = [walk.teacher_after(segment) for walk in (train, held)]
        energy = float((goals[0] - train.stream.teacher).square().mean() if train.stream.teacher is not None else goals[0].square().mean())
        splits = [Split(walk.student_inputs(segment), goal, walk.stream, segment) for walk, goal in zip((train, held), goals, strict=True)]
        yield Unit(number, segment, Network(segment.student, segment.trainable), splits[0], splits[1], energy)
        for walk, goal in zip((train, held), goals, strict=True):
            walk.advance(segment, goal)


def each(task: Task, found: list[Segment], change: Callable[[Unit], bool]) -> int:
    """Lets `change` work on each block that has weights to change; returns how many it kept."""
    return sum(change(unit) for unit in units(task, found) if unit.segment.trainable)
