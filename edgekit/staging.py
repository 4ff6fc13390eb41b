"""Writing a folder all at once: it is made beside its final place and renamed in when it is complete.

A compile that is killed leaves at most a hidden folder that the next compile to the same place removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from edgekit.errors import OutputError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What a file system says that has no room left, for this file at least."""


@contextlib.contextmanager
def staged(out: Path, replaceable: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Gives an empty folder that becomes `out` when the block ends without an error, and vanishes otherwise.

    Raises:
        OutputError: `out` exists (and is no artifact, or `force` is not set), cannot be written, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    folder = out.parent / f".{out.name}.edgekit-{os.getpid()}"
    created: list[Path] = []
    with _as_output_errors(out, folder):
        try:
            with _making(out):
                _clear_leftovers(out)
                _check_free(out, replaceable)
                created = _missing_parents(out.parent)
                out.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
            yield folder
            _move_in(folder, out)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in created:
                with contextlib.suppress(OSError):  # somebody else may have put something there
                    parent.rmdir()
            raise


def lacks_room(folder: Path, needed: int) -> bool:
    """Whether the file system of `folder` has no room for `needed` bytes: code in C++ often fails to write without saying why."""
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free < needed
    return False


def full_error(place: str, reason: str = "no space is left") -> OutputError:
    """The error of a full disk."""
    return OutputError(f"the disk is full: {reason}", where=place, fix="free some space, or give another place by --out")


def _check_free(out: Path, replaceable: Callable[[Path], bool] | None) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if replaceable is None:
        raise OutputError("the output folder exists", where=str(out), fix="give another by --out, or --force to replace it")
    if not out.is_dir() or out.is_symlink() or (any(out.iterdir()) and not replaceable(out)):
        raise OutputError(
            "the output place holds something that is not an artifact of edgekit", where=str(out), fix="give another by --out"
        )


def _missing_parents(parent: Path) -> list[Path]:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    return missing


def _clear_leftovers(out: Path) -> None:
    """Removes what killed compiles to the same place left; an artifact that had stepped aside for its successor goes back."""
    if not out.parent.is_dir():
        return
    pattern = re.compile(re.escape(f".{out.name}.edgekit-") + r"(?P<pid>\d+)(?P<old>-old)?")
    for sibling in out.parent.iterdir():
        match = pattern.fullmatch(sibling.name)
        if not match or (int(match["pid"]) != os.getpid() and psutil.pid_exists(int(match["pid"]))):
            continue
        if match["old"] and not out.exists():
            sibling.rename(out)
        else:
            shutil.rmtree(sibling, ignore_errors=True)


def _move_in(folder: Path, out: Path) -> None:
    if out.exists():
        # A rename cannot replace a folder that is not empty: the old one steps aside first.
        old = folder.with_name(folder.name + "-old")
        out.rename(old)
        try:
            folder.rename(out)
        except BaseException:  # an interrupt too: the old one must not stay hidden
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)


@contextlib.contextmanager
def _making(out: Path) -> Iterator[None]:
    """Whatever refuses the new folder is about the place that was given."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, OSError) and error.errno in FULL:
            raise full_error(str(out), str(error.strerror)) from error
        file = next((parent for parent in out.parents if parent.exists() and not parent.is_dir()), None)
        reason = f"{file} is not a folder" if file else error.strerror if isinstance(error, OSError) else str(error)
        raise _unwritable(out, str(reason)) from error


@contextlib.contextmanager
def _as_output_errors(out: Path, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise full_error(str(out), str(error.strerror)) from error
        refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTEMPTY)
        if refused or str(error.filename).startswith(str(folder)):
            raise _unwritable(out, str(error.strerror)) from error
        raise


def _unwritable(out: Path, reason: str) -> OutputError:
    return OutputError(f"the output folder cannot be written: {reason}", where=str(out), fix="give a place that you may write by --out")
