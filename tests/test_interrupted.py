"""A compile that is killed at any moment leaves no partial artifact and no process, and the next one succeeds."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-c", "from edgekit.cli.app import main; main()", "compile", "tiny.onnx", "--target", "onnxruntime"]


@pytest.mark.parametrize("stage", ["open", "run original", "canonicalize", "lower baseline"])
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed(tiny: Path, stage: str, kill: signal.Signals) -> None:
    folder = tiny.parent
    process = subprocess.Popen([*COMMAND, "--out", "out"], cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if f"] {stage}:" in line:
            break
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(kill)
    rest = process.stderr.read()
    assert process.wait(timeout=30) != 0
    assert "Traceback" not in rest
    assert not (folder / "out").exists()
    left = [path.name for path in folder.iterdir() if path != tiny]
    assert all(name.startswith(".out.edgekit-") for name in left)
    if kill != signal.SIGKILL:
        assert left == []
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    subprocess.run([*COMMAND, "--out", "out", "--seconds", "0"], cwd=folder, check=True, capture_output=True)
    assert sorted(path.name for path in folder.iterdir()) == ["out", "tiny.onnx"]
