"""The stage `recover` of a compile: the graph is trained towards what it was before the first approximate pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgekit.contracts import Arrays
from edgekit.errors import UsageError
from edgekit.evaluate import Evaluator, Outcome
from edgekit.progress import Reporter
from edgekit.recover.settings import Progress, Recovered, Settings

STAGE = "recover"


@dataclass(frozen=True)
class Wish:
    """What the user asks of a recovery.

    Attributes:
        minutes: How long it may take.
        steps: Steps of each level, of an earlier recovery that is to be repeated.
        seed: Seed of every random choice.
        threads: Threads to train on.
        checkpoint: The file that it can be taken up from.
        resume: Whether to take it up.
    """

    minutes: float
    steps: Mapping[str, int]
    seed: int
    threads: int
    checkpoint: Path
    resume: bool = False


def checkpoint_of(out: Path) -> Path:
    """Where the recovery of a compile into `out` keeps its state: beside it, and there only while it runs or after it was killed."""
    return out.with_name(f".{out.name}.recover")


def require_possible(minutes: float | None, several_shapes: bool, resume: bool) -> None:
    """Checks what the user asks for before anything slow.

    Raises:
        UsageError: It is to be taken up and not to be done, or the model takes several shapes.
    """
    if minutes is None and resume:
        raise UsageError(
            "--resume takes up a recovery, and none is asked for", fix="give --recover MINUTES as in the compile that was killed"
        )
    if minutes is not None and several_shapes:
        raise UsageError(
            "a model for several shapes of its inputs cannot be recovered", where="--recover", fix="recover it at one shape of the inputs"
        )


def recover_graph(
    student: ir.Model, teacher: ir.Model, feeds: Sequence[Arrays], wish: Wish, evaluator: Evaluator, reporter: Reporter
) -> tuple[Outcome, Recovered]:
    """Trains `student` in place; returns what it computes then, and what was done.

    Raises:
        DataError, UsageError: As of `edgekit.recover.recover`.
    """
    from edgekit.recover import recover

    def tell(progress: Progress) -> None:
        reporter.check()
        reporter.said(f"{progress.level} {100 * progress.done:.0f} %, {progress.sqnr_db:.1f} dB, {progress.left_s:.0f} s left")

    settings = Settings(minutes=wish.minutes, steps=wish.steps, seed=wish.seed, threads=wish.threads)
    with reporter.stage(STAGE, 60 * wish.minutes):
        done = recover(student, teacher, feeds, settings, progress=tell, checkpoint=wish.checkpoint, resume=wish.resume)
        return evaluator.run(student, STAGE), done
