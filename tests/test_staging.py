"""An output folder appears whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from edgekit.errors import OutputError
from edgekit.staging import staged


def _holds_report(folder: Path) -> bool:
    return (folder / "report.json").exists()


def _siblings(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_it_is_renamed_in_when_complete(tmp_path: Path) -> None:
    with staged(tmp_path / "a" / "out") as folder:
        (folder / "report.json").write_text("{}")
        assert not (tmp_path / "a" / "out").exists()
    assert _siblings(tmp_path / "a") == ["out"]
    assert (tmp_path / "a" / "out" / "report.json").read_text() == "{}"


def test_an_error_leaves_nothing_not_even_new_parents(tmp_path: Path) -> None:
    with pytest.raises(KeyError), staged(tmp_path / "a" / "b" / "out"):
        raise KeyError
    assert _siblings(tmp_path) == []


def test_an_existing_folder_is_kept_without_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("old")
    with pytest.raises(OutputError, match="exists"), staged(out):
        pass
    with staged(out, _holds_report) as folder:
        (folder / "report.json").write_text("new")
    assert (out / "report.json").read_text() == "new"
    assert _siblings(tmp_path) == ["out"]


def test_an_error_under_force_keeps_the_old_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("old")
    with pytest.raises(KeyError), staged(out, _holds_report):
        raise KeyError
    assert (out / "report.json").read_text() == "old"


def test_force_never_replaces_what_is_no_artifact(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not an artifact"), staged(out, _holds_report):
        pass
    assert (out / "thesis.tex").exists()
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(OutputError, match="not an artifact"), staged(file, _holds_report):
        pass


def test_leftovers_of_a_killed_compile_are_removed(tmp_path: Path) -> None:
    dead = tmp_path / ".out.edgekit-999999999"
    alive = tmp_path / f".out.edgekit-{os.getppid()}"
    other = tmp_path / ".other.edgekit-999999999"
    for folder in (dead, alive, other):
        folder.mkdir()
    with staged(tmp_path / "out"):
        pass
    assert _siblings(tmp_path) == sorted([alive.name, other.name, "out"])


@pytest.mark.parametrize(
    ("code", "says"), [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written"), (errno.EROFS, "cannot be")]
)
def test_file_system_errors_are_explained(tmp_path: Path, code: int, says: str) -> None:
    with pytest.raises(OutputError, match=says) as caught, staged(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert caught.value.exit_code == 2
    assert _siblings(tmp_path) == []


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"), staged(tmp_path / "file" / "out"):
        pass
