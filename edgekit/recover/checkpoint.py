"""Where a recovery stands, in a file that is there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.contracts import Arrays
from edgekit.errors import SourceError, UsageError
from edgekit.recover.settings import Settings


class Checkpoint:
    """Writes states to a file, at most every so many seconds.

    Args:
        path: The file; None: nothing is written.
        key: What the states belong to.
        every_s: Seconds between two.
    """

    def __init__(self, path: Path | None, key: str, every_s: float) -> None:
        self._path, self._key, self._every = path, key, every_s
        self._last = time.monotonic()

    def offer(self, state: Callable[[], Mapping[str, Any]], *, now: bool = False) -> None:
        """Writes a state if it is time, or `now`."""
        if self._path is None or (not now and time.monotonic() - self._last < self._every):
            return
        partial = self._path.with_name(f"{self._path.name}.partial")
        torch.save({"key": self._key, **state()}, partial)
        os.replace(partial, self._path)
        self._last = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The state in the file; None: there is no file.

        Raises:
            SourceError: It cannot be read.
            UsageError: It is of another recovery.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._path, weights_only=True)
        except Exception as error:  # torch raises several kinds for a damaged file
            raise SourceError("the checkpoint cannot be read", where=str(self._path), fix="delete it and start again") from error
        if state.get("key") != self._key:
            raise UsageError(
                "the checkpoint is of another model, other data or other settings", where=str(self._path), fix="delete it and start again"
            )
        return state

    def remove(self) -> None:
        """Deletes the file: the recovery is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def key_of(weights: Mapping[str, Tensor], feeds: Sequence[Arrays], settings: Settings) -> str:
    """A hash of what a recovery starts from."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + np.ascontiguousarray(weights[name].numpy()).tobytes())
    for feed in feeds:
        for name in sorted(feed):
            digest.update(np.ascontiguousarray(feed[name]).tobytes())
    kept = (
        settings.level,
        settings.minutes,
        dict(settings.steps),
        settings.seed,
        settings.trainable,
        settings.batch,
        settings.features,
        settings.relations,
    )
    return digest.hexdigest() + repr(kept)
