"""How far a compile has come: a bar with the time left on a terminal, plain lines elsewhere. Both write to standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from edgekit.progress import Reporter, StageTime

if TYPE_CHECKING:
    from rich.progress import TaskID


class PlainReporter(Reporter):
    """One line a stage, for logs."""

    def __init__(self) -> None:
        super().__init__()
        self._expected = 0

    def expect(self, stages: int) -> None:
        """Keeps the number of stages."""
        self._expected = stages

    def finished(self, stage: StageTime) -> None:
        """Writes the stage and its time."""
        done = len(self.stages)
        sys.stderr.write(f"[{done}/{max(self._expected, done)}] {stage.name}: {stage.seconds:.2f} s\n")
        sys.stderr.flush()


class BarReporter(Reporter):
    """A bar over all stages, and one for a stage whose length is known; a context manager that owns the display."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        super().__init__()
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None)

    def __enter__(self) -> BarReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def expect(self, stages: int) -> None:
        """Sets the length of the bar."""
        self._progress.update(self._task, total=stages)

    def started(self, name: str) -> None:
        """Shows the stage that runs."""
        self._progress.update(self._task, description=name)

    def finished(self, stage: StageTime) -> None:
        """Moves the bar on and leaves a line of the finished stage above it."""
        self._progress.advance(self._task)
        self._progress.console.print(f"  [green]✓[/green] {stage.name} [dim]{stage.seconds:.2f} s[/dim]", highlight=False)
