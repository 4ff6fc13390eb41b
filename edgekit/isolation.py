"""A worker process for native code that may crash: runtimes and compilers written in C++.

A signal inside such a library ends the worker, never the user's process; the caller gets `WorkerDiedError` with the signal's
name and the last lines that the worker printed. The worker is kept for further calls and replaced after a crash.

Requests and answers are cloudpickle frames over two pipes of their own, since native code prints to stdout at will. The
worker ends by itself when its parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from typing import IO, Any, TypeVar

import cloudpickle

from edgekit.errors import EdgekitError

R = TypeVar("R")

_HEADER = struct.Struct("<Q")
_PARENT_POLL_S = 0.5
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Lets PyTorch's threads sleep while they wait: on a busy machine those that spin make a small network ten times slower."""


class WorkerDiedError(Exception):
    """The worker ended in the middle of a call."""

    def __init__(self, reason: str, output: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.output = output


class WorkerRaisedError(Exception):
    """The call raised an error that is not one of edgekit's."""

    def __init__(self, kind: str, message: str, trace: str, errno: int | None = None) -> None:
        super().__init__(f"{kind}: {message}")
        self.add_note(f"In the worker:\n{trace}")
        self.kind = kind
        self.message = message
        self.trace = trace
        self.errno = errno


class Worker:
    """A process that runs functions; use it as a context manager.

    Args:
        memory_limit: Bytes of address space that the process may take; None: no limit.
        time_limit: Seconds that a call may take; None: no limit.
    """

    def __init__(self, memory_limit: int | None = None, time_limit: float | None = None) -> None:
        self._memory_limit = memory_limit
        self._time_limit = time_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._requests: IO[bytes] | None = None
        self._answers: IO[bytes] | None = None
        self._log: IO[bytes] | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, or None."""
        return self._process.pid if self._process else None

    def call(self, function: Callable[..., R], *arguments: Any) -> R:
        """Runs `function(*arguments)` in the worker and returns its result.

        Raises:
            EdgekitError: The function raised it.
            WorkerRaisedError: The function raised something else.
            WorkerDiedError: The process crashed, was killed, or ran past the time limit.
        """
        if self._process is None or self._process.poll() is not None:
            self._start()
        assert self._requests is not None
        try:
            _send(self._requests, (function, arguments))
            kind, value = self._receive()
        except (EOFError, BrokenPipeError):
            raise self._died() from None
        except BaseException:  # an interrupt must not leave an answer behind for the next call
            self.close()
            raise
        if kind == "result":
            return value  # type: ignore[no-any-return]
        if kind == "edgekit":
            raise value
        raise WorkerRaisedError(*value)

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        for stream in (self._requests, self._answers, self._log):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        self._process = self._requests = self._answers = self._log = None

    def _start(self) -> None:
        self.close()
        request_read, request_write = os.pipe()
        answer_read, answer_write = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `close`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "edgekit.isolation", str(request_read), str(answer_write), str(os.getpid())],
            pass_fds=(request_read, answer_write),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the worker
            env={**PASSIVE, **os.environ},
        )
        os.close(request_read)
        os.close(answer_write)
        self._requests = os.fdopen(request_write, "wb")
        self._answers = os.fdopen(answer_read, "rb")
        _send(self._requests, (sys.path, self._memory_limit))

    def _receive(self) -> tuple[str, Any]:
        assert self._answers is not None
        assert self._process is not None
        if self._time_limit is not None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._answers, selectors.EVENT_READ)
                if not selector.select(self._time_limit):
                    self._process.kill()
                    raise self._died(f"did not finish within {self._time_limit:g} s")
        kind, value = _load(self._answers)
        return kind, value

    def _died(self, reason: str | None = None) -> WorkerDiedError:
        assert self._process is not None
        assert self._log is not None
        code = self._process.wait()
        if reason is None and code < 0:
            with contextlib.suppress(ValueError):
                reason = f"crashed with {signal.Signals(-code).name}"
        self._log.seek(0)
        output = self._log.read().decode(errors="replace")
        self.close()
        return WorkerDiedError(reason or f"ended with status {code}", "\n".join(output.strip().splitlines()[-10:]))


def _send(stream: IO[bytes], message: object) -> None:
    data = cloudpickle.dumps(message)
    stream.write(_HEADER.pack(len(data)))
    stream.write(data)
    stream.flush()


def _load(stream: IO[bytes]) -> Any:
    header = stream.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise EOFError
    (size,) = _HEADER.unpack(header)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return cloudpickle.loads(data)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_PARENT_POLL_S)
    os._exit(1)


def _serve(request_fd: int, answer_fd: int, parent: int) -> None:
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()
    with os.fdopen(request_fd, "rb") as requests, os.fdopen(answer_fd, "wb") as answers:
        path, memory_limit = _load(requests)
        sys.path[:] = path
        if memory_limit is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
        while True:
            answer: tuple[str, Any]
            try:
                function, arguments = _load(requests)
                answer = ("result", function(*arguments))
            except EOFError:
                return
            except EdgekitError as error:
                answer = ("edgekit", error)
            except Exception as error:
                answer = ("other", (type(error).__name__, str(error), traceback.format_exc(), getattr(error, "errno", None)))
            _send(answers, answer)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
