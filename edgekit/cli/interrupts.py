"""Ctrl-C and SIGTERM that cannot get lost: libraries below may swallow the exception that a signal raises in their code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupts:
    """Remembers the first signal; an instance is handed to what asks between two stages whether to go on."""

    def __init__(self) -> None:
        self._received: int | None = None

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within the block, SIGINT and SIGTERM raise here and are remembered."""
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raises again what a signal raised before.

        Raises:
            KeyboardInterrupt: SIGINT was received.
            SystemExit: SIGTERM was received.
        """
        if self._received == signal.SIGINT:
            raise KeyboardInterrupt
        if self._received is not None:
            raise SystemExit(128 + self._received)  # unwinds, so that half-written folders are removed

    def _receive(self, number: int, frame: object) -> None:
        self._received = number
        self.check()
