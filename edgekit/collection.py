"""Python's collector of reference cycles, kept out of the way where it costs more than the work itself."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def collected_later() -> Iterator[None]:
    """Within the block nothing looks for cycles.

    A collection walks everything that torch has loaded and tracing has made, a quarter of a second each time, and building a graph
    starts several. The blocks are short, and what they leave behind is found by the next collection.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def out_of_sight() -> Iterator[None]:
    """Within the block even a collection that a library starts itself looks only at what was made since the block began."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
