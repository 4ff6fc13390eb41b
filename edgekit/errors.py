"""The errors that edgekit shows to people: what was wrong, where, and what to do about it.

Every error that bad input can cause is one of these; each class owns the exit code of the command line.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class EdgekitError(Exception):
    """Base of all errors meant for the user.

    Args:
        what: One sentence that says what was wrong.
        where: The place: a file, a node name, a module path.
        fix: One sentence that says what to do next.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.fix = fix

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  try:   {self.fix}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders (edgekit.isolation); keyword arguments would be lost by default.
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(cls: type[EdgekitError], what: str, where: str | None, fix: str | None) -> EdgekitError:
    return cls(what, where=where, fix=fix)


class UsageError(EdgekitError):
    """A command, option, name or output folder that cannot be used as given."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe file or a pass specification that cannot be read or does not fit the pass."""


class DataError(UsageError):
    """Calibration or evaluation data that cannot be read or does not fit the model's inputs."""


class SourceError(EdgekitError):
    """A model that cannot be found, read or trusted."""

    exit_code = 3


class TraceError(EdgekitError):
    """A PyTorch module that cannot be turned into a graph that computes the same."""

    exit_code = 3


class UnsupportedOpError(EdgekitError):
    """An operator that a stage or a target does not know."""

    exit_code = 4


class LoweringError(EdgekitError):
    """A target's compiler refused the graph, failed or crashed."""

    exit_code = 4


class ParityError(EdgekitError):
    """A stage that must keep the numbers did not."""

    exit_code = 5


class PassError(ParityError):
    """A pass failed, or left a graph that cannot run."""


class OutputError(UsageError):
    """An output folder that cannot be written: it exists, is not writable, or the disk is full."""


class BudgetError(EdgekitError):
    """No setting of an approximate pass stays within the accuracy budget."""

    exit_code = 6


class DeviceError(EdgekitError):
    """A device that is unreachable, unsuitable or failed during a measurement."""

    exit_code = 7


class MissingToolError(EdgekitError):
    """An optional package or external tool that is needed is not installed."""

    exit_code = 8


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message that names what exists: `did you mean 'x'? known: x, y`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}known: {', '.join(names) if names else 'none'}"
