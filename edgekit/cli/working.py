"""How a command tells what it is at: a bar on a terminal, lines elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgekit.progress import Reporter


@contextlib.contextmanager
def reporting(quiet: bool) -> Iterator[Reporter]:
    """Tells how far the work has come, and stops it between two stages after a signal."""
    from edgekit.cli.interrupts import Interrupts

    interrupts = Interrupts()
    with interrupts.handled(), _display(quiet) as reporter:
        reporter.check = interrupts.check
        yield reporter


@contextlib.contextmanager
def working(quiet: bool, stage: str) -> Iterator[None]:
    """Tells of a command that is one stage."""
    with reporting(quiet) as reporter:
        reporter.expect(1)
        with reporter.stage(stage):
            yield


@contextlib.contextmanager
def _display(quiet: bool) -> Iterator[Reporter]:
    if quiet:
        from edgekit.progress import Reporter

        yield Reporter()
    elif sys.stderr.isatty():
        from edgekit.cli.progress import BarReporter

        with BarReporter() as bar:
            yield bar
    else:
        from edgekit.cli.progress import PlainReporter

        yield PlainReporter()
