"""Facts about this machine and the installed packages, for reports."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

PACKAGES = ("edgekit", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "numpy")


def available_threads() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    """Version of an installed package, without importing it; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def install_command(extra: str, packages: Iterable[str]) -> str:
    """The command that installs what a target lacks: the extra of edgekit that it declares, or the packages themselves."""
    wanted = f"'edgekit[{extra}]'" if extra else " ".join(packages)
    return f"pip install -c constraints.txt {wanted}"


def versions(more: Iterable[str] = ()) -> dict[str, str]:
    """Versions of Python and of the packages that decide what a compile gives; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *more):
        if (installed := version(package)) is not None:
            found[package] = installed
    return found
