"""Keeps what libraries log of bad input off the terminal, where edgekit's own error says it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def muted(name: str) -> Iterator[None]:
    """Within the block, the logger `name` tells nothing short of what ends the process."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
