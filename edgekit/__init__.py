"""edgekit: compile neural networks for phones and small boards, with passes that are checked.

import edgekit
artifact = edgekit.compile("mobileone_digits", target="openvino", data="digits")
artifact.run({"x": image})
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from edgekit.artifact import Artifact
    from edgekit.bisection.run import bisect
    from edgekit.compiler import compile
    from edgekit.contracts import Context, Effect, Pass, Target, register_pass, register_target

__all__ = ["Artifact", "Context", "Effect", "Pass", "Target", "bisect", "compile", "register_pass", "register_target"]

_HOMES = {
    "bisect": "edgekit.bisection.run",
    "compile": "edgekit.compiler",
    "Artifact": "edgekit.artifact",
    "Context": "edgekit.contracts",
    "Effect": "edgekit.contracts",
    "Pass": "edgekit.contracts",
    "Target": "edgekit.contracts",
    "register_pass": "edgekit.contracts",
    "register_target": "edgekit.contracts",
}


def __getattr__(name: str) -> Any:
    # Imports are lazy so that `edgekit --help` does not load onnx, numpy or torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'edgekit' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
