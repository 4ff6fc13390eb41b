"""How far a compile has come: a bar with the time left on a terminal, plain lines elsewhere. Both write to standard error."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.markup import escape

from edgekit.progress import Reporter, StageTime

if TYPE_CHECKING:
    from rich.console import RenderableType
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
    """A bar over all stages, and a second one for a stage whose length is known; a context manager that owns the display."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
        from rich.text import Text

        class Clocked(Progress):
            """A task with a field `clocked` moves with the clock."""

            def get_renderables(self) -> Iterable[RenderableType]:
                for task in self.tasks:
                    if task.fields.get("clocked") and task.total is not None:
                        task.completed = min(task.elapsed or 0.0, task.total)
                yield from super().get_renderables()

        class Left(ProgressColumn):
            """The time left, at the pace so far."""

            def render(self, task: Task) -> Text:
                if not task.total or not task.completed or task.elapsed is None:
                    return Text("-:--", style="progress.remaining")
                minutes, seconds = divmod(round(task.elapsed / task.completed * (task.total - task.completed)), 60)
                return Text(f"{minutes}:{seconds:02d}", style="progress.remaining")

        super().__init__()
        self._progress = Clocked(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            Left(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID = self._progress.add_task("starting", total=None)
        self._clocked: TaskID | None = None

    def __enter__(self) -> BarReporter:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def expect(self, stages: int) -> None:
        """Sets the length of the bar."""
        self._progress.update(self._task, total=stages)

    def started(self, name: str, seconds: float | None) -> None:
        """Shows the stage that runs."""
        self._progress.update(self._task, description=escape(name))
        if seconds is not None:
            self._clocked = self._progress.add_task(f"  {escape(name)}", total=seconds, clocked=True)

    def said(self, text: str) -> None:
        """Shows it beside the bar of a stage whose length is known."""
        if self._clocked is not None:
            self._progress.update(self._clocked, description=f"  {escape(text)}")

    def finished(self, stage: StageTime) -> None:
        """Moves the bar on and leaves a line of the finished stage above it."""
        if self._clocked is not None:
            self._progress.remove_task(self._clocked)
            self._clocked = None
        self._progress.advance(self._task)
        self._progress.console.print(f"  [green]✓[/green] {escape(stage.name)} [dim]{stage.seconds:.2f} s[/dim]", highlight=False)
