"""A stage that an interrupt ended is not taken for one that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import signal
from edgekit.cli.interrupts import Interrupts
from edgekit.errors import SourceError
from edgekit.progress import Reporter
from edgekit.source import open_source

before = signal.getsignal(signal.SIGTERM)
interrupts, reporter = Interrupts(), Reporter()
reporter.check = interrupts.check
with interrupts.handled():
    for name, expected in (("leaves", SourceError), ("net", SystemExit)):
        try:
            with reporter.stage("open"):
                open_source(f"killed_nets:{name}")
        except BaseException as error:
            assert type(error) is expected, error
            code = getattr(error, "code", None)
assert code == 143
assert reporter.stages == []
assert signal.getsignal(signal.SIGTERM) == before
"""


def test_a_signal_in_the_code_of_the_user_ends_the_work(tmp_path: Path) -> None:
    (tmp_path / "killed_nets.py").write_text(
        "import os, signal\ndef net(): os.kill(os.getpid(), signal.SIGTERM)\ndef leaves(): raise SystemExit(143)\n"
    )
    # In a process of its own: signals of this one may meet what native libraries made of its signal stack.
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
