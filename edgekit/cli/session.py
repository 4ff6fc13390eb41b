"""What the options that every command has decide for the whole process: whose standard output is, and how much an error tells."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from typing import IO, Any

from edgekit.errors import UsageError


@dataclass
class Session:
    """One call of the command line.

    Attributes:
        verbose: Whether errors come with their traceback.
        output: The stream that JSON is written to; None: standard output belongs to everybody.
    """

    verbose: bool = False
    output: IO[str] | None = None

    def reserve_output(self) -> None:
        """Keeps standard output for `write_json`; what Python or native code prints there from now on goes to standard error.

        It stays so until the process ends: native libraries write what they hold, and functions of `atexit` print, at the very end.
        """
        try:
            self.output = os.fdopen(os.dup(1), "w", encoding="utf-8")
        except OSError as error:
            raise UsageError("--json writes to standard output, which is closed", fix="redirect it to a file instead") from error
        elsewhere = os.open(os.devnull, os.O_WRONLY) if sys.stderr is None else 2
        os.dup2(elsewhere, 1)

    def write_json(self, value: Any) -> None:
        """Writes JSON to the standard output that was reserved."""
        assert self.output is not None
        with self.output as stream:
            stream.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
