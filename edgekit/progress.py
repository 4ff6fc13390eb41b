"""Telling somebody how far a compile has come, and keeping the time of each stage."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class StageTime:
    """A finished stage and its wall-clock time."""

    name: str
    seconds: float


def _go_on() -> None:
    """Never stops anything."""


class Reporter:
    """Keeps the stages and says nothing; the command line's reporters override the hooks.

    Attributes:
        stages: The finished stages.
        check: Called around each stage; raises where the work is to stop.
    """

    def __init__(self) -> None:
        self.stages: list[StageTime] = []
        self.check: Callable[[], None] = _go_on

    @contextlib.contextmanager
    def stage(self, name: str, seconds: float | None = None) -> Iterator[None]:
        """Marks the stage `name`, which takes `seconds` where that is known before; a stage that raises is not kept."""
        self.check()
        self.started(name, seconds)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.check()  # whatever was raised may be what somebody's code made of an interrupt
        done = StageTime(name, time.perf_counter() - start)
        self.stages.append(done)
        self.finished(done)

    def expect(self, stages: int) -> None:
        """Is told how many stages there will be."""

    def started(self, name: str, seconds: float | None) -> None:
        """Is told that a stage began, and how long it takes where that is known."""

    def said(self, text: str) -> None:
        """Is told how the running stage stands, many times."""

    def finished(self, stage: StageTime) -> None:
        """Is told that a stage ended."""
