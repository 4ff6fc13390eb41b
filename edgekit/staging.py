"""Writing a folder all at once: it is made beside its final place and renamed in when it is complete.

A compile that is killed leaves at most a hidden folder that the next compile to the same place removes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from edgekit.errors import OutputError

MARKER = "report.json"
"""The file by which a folder is known to be an artifact, which `force` may replace."""


@contextlib.contextmanager
def staged(out: Path, force: bool = False) -> Iterator[Path]:
    """Gives an empty folder that becomes `out` when the block ends without an error, and vanishes otherwise.

    Raises:
        OutputError: `out` exists (and is no artifact, or `force` is not set), cannot be written, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    folder = out.parent / f".{out.name}.edgekit-{os.getpid()}"
    with _as_output_errors(out):
        _check_free(out, force)
        created = _missing_parents(out.parent)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(out)
            folder.mkdir()
            yield folder
            _move_in(folder, out, force)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in created:
                with contextlib.suppress(OSError):  # somebody else may have put something there
                    parent.rmdir()
            raise


def _check_free(out: Path, force: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise OutputError("the output folder exists", where=str(out), fix="give another by --out, or --force to replace it")
    if not out.is_dir() or out.is_symlink() or not ((out / MARKER).is_file() or not any(out.iterdir())):
        raise OutputError(
            "the output place holds something that is not an artifact of edgekit", where=str(out), fix="give another by --out"
        )


def _missing_parents(parent: Path) -> list[Path]:
    missing = []
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    return missing


def _remove_stale(out: Path) -> None:
    pattern = re.compile(re.escape(f".{out.name}.edgekit-") + r"(\d+)")
    for sibling in out.parent.iterdir():
        match = pattern.fullmatch(sibling.name)
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            shutil.rmtree(sibling, ignore_errors=True)


def _move_in(folder: Path, out: Path, force: bool) -> None:
    if force and out.exists():
        # A rename cannot replace a folder that is not empty: the old one steps aside first.
        old = folder.with_name(folder.name + "-old")
        out.rename(old)
        try:
            folder.rename(out)
        except OSError:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(out)


@contextlib.contextmanager
def _as_output_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"the disk is full: {error.strerror}", where=str(out), fix="free some space, or give another place by --out"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTEMPTY):
            raise OutputError(
                f"the output folder cannot be written: {error.strerror}", where=str(out), fix="give a place that you may write by --out"
            ) from error
        raise
