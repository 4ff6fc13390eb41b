"""The worker process: results, errors, crashes, time-outs, and its end."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from edgekit.errors import SourceError
from edgekit.isolation import Worker, WorkerDiedError, WorkerRaisedError


def _raise_own() -> None:
    raise SourceError("what", where="where", fix="fix")


def _raise_other() -> None:
    raise ValueError("odd")


def _segfault() -> None:
    ctypes.string_at(0)


def _print_then_abort() -> None:
    print("assertion failed in kernel 7", flush=True)
    os.abort()


@pytest.fixture
def worker():
    with Worker() as worker:
        yield worker


def test_results_come_back_and_the_process_is_kept(worker: Worker) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(worker.call(np.transpose, array), array.T)
    first = worker.pid
    assert worker.call(os.getpid) == first != os.getpid()


def test_errors_come_back_whole(worker: Worker) -> None:
    with pytest.raises(SourceError) as caught:
        worker.call(_raise_own)
    assert (caught.value.what, caught.value.where, caught.value.fix) == ("what", "where", "fix")
    with pytest.raises(WorkerRaisedError) as other:
        worker.call(_raise_other)
    assert other.value.kind == "ValueError"
    assert "_raise_other" in other.value.trace


@pytest.mark.parametrize(("crash", "name"), [(_segfault, "SIGSEGV"), (_print_then_abort, "SIGABRT")])
def test_a_crash_is_survived_and_named(worker: Worker, crash, name: str) -> None:
    with pytest.raises(WorkerDiedError) as caught:
        worker.call(crash)
    assert name in caught.value.reason
    if crash is _print_then_abort:
        assert "kernel 7" in caught.value.output
    assert worker.call(abs, -2) == 2  # a new process


def test_a_call_that_takes_too_long_is_ended() -> None:
    with Worker(time_limit=0.5) as worker, pytest.raises(WorkerDiedError, match=r"within 0.5 s"):
        worker.call(time.sleep, 30)


def test_printing_to_stdout_does_not_disturb(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    assert worker.call(print, "noise") is None
    assert "noise" not in capfd.readouterr().out


def test_it_ends_with_its_parent() -> None:
    code = (
        "import os, time\n"
        "from edgekit.isolation import Worker\n"
        "worker = Worker()\n"
        "print(worker.call(os.getpid), flush=True)\n"
        "worker.call(time.sleep, 60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    gone, alive = psutil.wait_procs([child], timeout=10)
    assert not alive
    assert gone
