"""A compile that is killed at any moment leaves no partial artifact and no process, and the next one succeeds."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from edgekit.artifact import open_artifact
from tests.conftest import command, edgekit, listing

COMPILE = ("compile", "tiny.onnx", "--target", "openvino", "--out", "out")
MOMENTS = ["open", "run original", "pass reparameterize", "run artifact", "lower baseline"]
"""Stages after whose end the signal comes: while the next one runs."""


def start(folder: Path, moment: str, *more: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A compile in `folder` that has just finished the stage `moment`, and the processes that it started."""
    process = subprocess.Popen(command(*COMPILE, *more), cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if f"] {moment}:" in line:
            return process, psutil.Process(process.pid).children(recursive=True)
    raise AssertionError(f"never came to {moment}: {seen}")


def ended(process: subprocess.Popen[str], children: list[psutil.Process]) -> tuple[int, str]:
    """Waits for the end of all; returns the exit status and what was said."""
    output, rest = process.communicate(timeout=30)
    assert output == ""
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not alive
    return process.returncode, rest


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("kill", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed(tiny: Path, moment: str, kill: signal.Signals, status: int) -> None:
    folder = tiny.parent
    process, children = start(folder, moment)
    assert bool(children) == (moment != "open")
    process.send_signal(kill)
    code, rest = ended(process, children)
    assert code == status
    assert "Traceback" not in rest
    left = [path.name for path in folder.iterdir() if path != tiny]
    assert left == ([f".out.edgekit-{process.pid}"] if kill == signal.SIGKILL else [])
    if kill == signal.SIGKILL:
        done = edgekit(*COMPILE, "--seconds", "0", cwd=folder)
        assert done.returncode == 0, done.stderr
        assert sorted(path.name for path in folder.iterdir()) == ["out", "tiny.onnx"]
        assert open_artifact(folder / "out").verify().max_abs_error < 1e-4


def test_the_earlier_artifact_survives(tiny: Path) -> None:
    folder = tiny.parent
    assert edgekit(*COMPILE, "--seconds", "0", cwd=folder).returncode == 0
    before = listing(folder / "out")
    for kill in (signal.SIGTERM, signal.SIGKILL):
        process, children = start(folder, "lower baseline", "--force")
        process.send_signal(kill)
        ended(process, children)
        assert listing(folder / "out") == before


def test_the_worker_is_killed(tiny: Path) -> None:
    """As the kernel does when memory runs out."""
    folder = tiny.parent
    process, children = start(folder, "lower baseline")
    (worker,) = children
    worker.kill()
    code, rest = ended(process, children)
    assert code == 4
    assert "crashed with SIGKILL" in rest
    assert "latency" in rest
    assert "Traceback" not in rest
    assert listing(folder) == [("tiny.onnx", tiny.stat().st_size)]


DIES_BETWEEN_RENAMES = """
import os, signal, sys
from pathlib import Path
from edgekit.staging import staged

rename = Path.rename

def once(self, target):
    rename(self, target)
    os.kill(os.getpid(), signal.SIGKILL)

with staged(Path(sys.argv[1]), lambda folder: True) as folder:
    (folder / "report.json").write_text("new")
    Path.rename = once
"""


def test_killed_between_the_two_renames_of_a_replacement(tmp_path: Path) -> None:
    from edgekit.errors import OutputError
    from edgekit.staging import staged

    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("old")
    died = subprocess.run([sys.executable, "-c", DIES_BETWEEN_RENAMES, str(out)], check=False)
    assert died.returncode == -9
    assert not out.exists()
    with pytest.raises(OutputError, match="exists"), staged(out):
        pass
    assert (out / "report.json").read_text() == "old"
    assert listing(tmp_path) == [("out", out.lstat().st_size), ("out/report.json", 3)]
