"""Helpers over onnx_ir graphs that passes, targets and the driver share.

edgekit.graph.run(model_or_path, {name: array})    runs a graph on torch tensors
edgekit.graph.cost(model)                          counts parameters, MACs, bytes and activation memory
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgekit.graph.cost import cost  # the function takes the place of its module as an attribute of this package

if TYPE_CHECKING:
    from edgekit.graph.interpreter import run

__all__ = ["cost", "run"]


def __getattr__(name: str) -> Any:
    # Lazy, since the interpreter loads torch.
    if name == "run":
        from edgekit.graph.interpreter import run

        return run
    raise AttributeError(f"module 'edgekit.graph' has no attribute '{name}'")
