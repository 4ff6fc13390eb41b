"""A target whose compiler ends with a signal."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from edgekit.contracts import Executable, Target


@dataclass(frozen=True)
class CrashingTarget(Target):
    """Reads address 0 in `lower`."""

    name: ClassVar[str] = "test-crashing"

    def lower(self, model: ir.Model, folder: Path) -> None:
        (folder / "half-written.bin").write_bytes(b"x" * 100)
        ctypes.string_at(0)

    def load(self, folder: Path, threads: int) -> Executable:
        raise AssertionError("nothing was lowered")
