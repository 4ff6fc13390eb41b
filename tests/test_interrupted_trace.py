"""An interrupt while PyTorch traces is not taken for a failure of the exporter."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from edgekit.errors import TraceError
from edgekit.source import from_module
from edgekit.trace import trace

COMMAND = [sys.executable, "-c", "from edgekit.cli.app import main; main()", "compile", "mobileone_digits", "--target", "onnxruntime"]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("kill", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_the_trace_ends_the_compile(tmp_path: Path, delay: float, kill: signal.Signals, code: int) -> None:
    process = subprocess.Popen(COMMAND, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "] open:" in line:
            break
    time.sleep(delay)
    process.send_signal(kill)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == code, rest
    assert "Traceback" not in rest
    assert list(tmp_path.iterdir()) == []


class Stops(torch.nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            raise self.error
        except BaseException:
            raise AttributeError("module 'torch._dynamo' has no attribute 'exc'")  # noqa: B904 (what torch was seen to do)


def test_an_interrupt_behind_an_error_of_torch_is_raised_again() -> None:
    with pytest.raises(KeyboardInterrupt):
        trace(from_module(Stops(KeyboardInterrupt()), torch.ones(2)), "torchscript")
    with pytest.raises(TraceError):
        trace(from_module(Stops(ValueError()), torch.ones(2)), "torchscript")
