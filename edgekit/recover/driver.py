"""`recover`: a compressed graph wins back what it lost, with the uncompressed one as its teacher and no labels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor

from edgekit.contracts import Arrays
from edgekit.recover.blockwise import Unit, each, units
from edgekit.recover.checkpoint import Checkpoint, key_of
from edgekit.recover.closed_form import refit
from edgekit.recover.distill import EVALUATIONS, PATIENCE, Whole
from edgekit.recover.network import threads
from edgekit.recover.segments import Segment, segments
from edgekit.recover.settings import LevelResult, Progress, Recovered, Settings
from edgekit.recover.task import Task
from edgekit.recover.training import Trainer

_BLOCK_SHARE = 0.6
"""Of the time, what the blocks get where distillation follows."""
_MOST_BLOCK_STEPS = 300
_MOST_STEPS = 5000


def _silent(_: Progress) -> None:
    """Tells nobody."""


def recover(
    student: ir.Model,
    teacher: ir.Model,
    feeds: Sequence[Arrays],
    settings: Settings | None = None,
    *,
    progress: Callable[[Progress], None] = _silent,
    checkpoint: Path | None = None,
    resume: bool = False,
) -> Recovered:
    """Trains the weights of `student` towards `teacher`, in place; the graph itself stays.

    Levels run in order: each block's last product by least squares, then block-wise reconstruction, then distillation of the whole. Each is
    undone where the outputs on held-out samples (a tenth of the batches) are not nearer to the teacher's than before it.

    Args:
        student: The compressed graph.
        teacher: The uncompressed one, of the same inputs and outputs.
        feeds: Unlabelled batches.
        settings: How; None: three minutes of everything.
        progress: Told how far it has come.
        checkpoint: A file that it can be taken up from after it was killed; it is removed at the end.
        resume: Whether to take it up from that file, to the same bits, if it is there.

    Raises:
        DataError: There are too few batches, or they hold NaN.
        UsageError: No weight matches what is trainable, or the checkpoint is of another recovery.
    """
    settings = settings or Settings()
    with threads(settings.threads):
        task = Task(student, teacher, feeds, settings)
        saver = Checkpoint(checkpoint, key_of(task.weights(), feeds, settings), settings.checkpoint_s)
        state = saver.load() if resume else None
        return _Recovery(task, saver, progress).run(state)


class _Recovery:
    def __init__(self, task: Task, saver: Checkpoint, progress: Callable[[Progress], None]) -> None:
        self._task, self._saver, self._progress = task, saver, progress
        self._begun = time.monotonic()
        self._steps: dict[str, int] = dict(task.settings.steps)
        self._results: list[LevelResult] = []
        self._sqnr = 0.0
        self._first: tuple[float, float | None] = (0.0, None)

    def run(self, state: dict[str, Any] | None) -> Recovered:
        self._first = self._task.judge()
        if state is not None:
            self._steps, self._first = dict(state["steps"]), tuple(state["first"])
            self._results = [LevelResult(**result) for result in state["results"]]
        for level in self._task.settings.levels:
            if any(result.level == level for result in self._results):
                continue
            self._level(level, state if state is not None and state["level"] == level else None)
            state = None
        last = self._task.judge()
        self._saver.remove()
        agreement = None if self._first[1] is None or last[1] is None else (self._first[1], last[1])
        held = len(next(iter(self._task.held.values())))
        return Recovered(tuple(self._results), dict(self._steps), self._first[0], last[0], agreement, held)

    def _level(self, level: str, state: dict[str, Any] | None) -> None:
        begun = time.monotonic()
        old = self._task.weights() if state is None else state["old"]
        self._task.put(old)
        before = self._task.judge()[0]
        self._sqnr = before
        if state is not None:
            self._task.put(state["weights"])
        run = {"closed-form": self._closed_form, "blocks": self._blocks, "distill": self._distill}[level]
        steps, note = run(old, state)
        after = self._task.judge()[0]
        accepted = after > before
        if not accepted:
            self._task.put(old)
        self._results.append(LevelResult(level, steps, time.monotonic() - begun, before, after, accepted, note))

    def _state(self, level: str, old: dict[str, Tensor], **more: Any) -> dict[str, Any]:
        return {
            "level": level, "old": old, "weights": self._task.weights(), "steps": self._steps, "first": list(self._first),
            "results": [result.__dict__ for result in self._results], **more,
        }  # fmt: skip

    def _left_s(self) -> float:
        return 60 * self._task.settings.minutes - (time.monotonic() - self._begun)

    def _closed_form(self, old: dict[str, Tensor], state: dict[str, Any] | None) -> tuple[int, str]:
        found = segments(self._task)
        if not found:
            return 0, "no sum of the stream bears the same name in both graphs"

        def change(unit: Unit) -> bool:
            self._tell("closed-form", unit.number / len(found), 0.0)
            weights = refit(unit)
            if not weights:
                return False
            before, kept = unit.judge(), unit.network.state()
            unit.network.restore(weights)
            return unit.keep_if_better(self._task, before, kept)

        self._task.put(old)  # it takes seconds, and starts over
        kept = each(self._task, found, change)
        return 0, f"{kept} of {len(found)} products were refitted"

    def _blocks(self, old: dict[str, Tensor], state: dict[str, Any] | None) -> tuple[int, str]:
        found = segments(self._task)
        trained = [segment for segment in found if segment.trainable]
        if not trained:
            return 0, "no sum of the stream bears the same name in both graphs"
        steps, kept = self._block_steps(found), 0
        start = -1 if state is None else int(state["unit"])
        for unit in units(self._task, found):
            if unit.number < start or not unit.segment.trainable:
                continue
            kept += self._block(unit, steps, found, old, state if unit.number == start else None)
        return steps * len(trained), f"{kept} of {len(trained)} blocks were nearer to the teacher's afterwards"

    def _block_steps(self, found: list[Segment]) -> int:
        """Steps of each block: as told, or what the time allows."""
        if "blocks" not in self._steps:
            unit = next(unit for unit in units(self._task, found) if unit.segment.trainable)
            share = _BLOCK_SHARE if "distill" in self._task.settings.levels else 1.0
            allowed = share * self._left_s() / (len(found) * max(unit.trainer(self._task, 1).seconds_a_step(), 1e-4))
            self._steps["blocks"] = int(min(max(allowed, 10), _MOST_BLOCK_STEPS))
        return self._steps["blocks"]

    def _block(self, unit: Unit, steps: int, found: list[Segment], old: dict[str, Tensor], state: dict[str, Any] | None) -> bool:
        trainer = unit.trainer(self._task, steps)
        before, start = (unit.judge(), unit.network.state()) if state is None else (float(state["before"]), state["start"])
        if state is not None:
            trainer.restore(state["trainer"])
        while trainer.step < steps:
            self._saver.offer(lambda: self._state("blocks", old, unit=unit.number, trainer=trainer.state(), before=before, start=start))
            begun = time.monotonic()
            trainer.advance()
            left = (time.monotonic() - begun) * ((len(found) - unit.number) * steps - trainer.step)
            self._tell("blocks", (unit.number + trainer.step / steps) / len(found), left)
        return unit.keep_if_better(self._task, before, start)

    def _distill(self, old: dict[str, Tensor], state: dict[str, Any] | None) -> tuple[int, str]:
        whole = Whole.of(self._task)
        if "distill" not in self._steps:
            allowed = self._left_s() / max(whole.trainer(1).seconds_a_step(), 1e-4)
            self._steps["distill"] = int(min(max(allowed, 0), _MOST_STEPS))
        steps = self._steps["distill"]
        trainer = whole.trainer(steps)
        best, weights, stale = whole.judge(), whole.network.state(), 0
        if state is not None:
            trainer.restore(state["trainer"])
            best, weights, stale = float(state["best"]), state["best_weights"], int(state["stale"])
        every = max(steps // EVALUATIONS, 1)
        while trainer.step < steps and stale < PATIENCE:
            self._offer_distill(old, trainer, best, weights, stale)
            begun = time.monotonic()
            trainer.advance()
            if trainer.step % every == 0 or trainer.step == steps:
                self._sqnr = whole.judge()
                if self._sqnr > best:
                    best, weights, stale = self._sqnr, whole.network.state(), 0
                else:
                    stale += 1
            self._tell("distill", trainer.step / steps, (time.monotonic() - begun) * (steps - trainer.step))
        self._task.put(weights)
        return trainer.step, "it ended early: held-out samples got no better" if trainer.step < steps else ""

    def _offer_distill(self, old: dict[str, Tensor], trainer: Trainer, best: float, weights: dict[str, Tensor], stale: int) -> None:
        self._saver.offer(lambda: self._state("distill", old, trainer=trainer.state(), best=best, best_weights=weights, stale=stale))

    def _tell(self, level: str, done: float, left: float) -> None:
        self._progress(Progress(level, done, self._sqnr, left))
