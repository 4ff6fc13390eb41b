"""A differentiable interpreter: runs an `ir.Model` on torch tensors, one small function per operator.

Written from the ONNX operator specification. What it knows is in docs/interpreter.md; everything else is refused by `UnsupportedOpError`.
"""

from edgekit.graph.interpreter.api import Interpreter, run

__all__ = ["Interpreter", "run"]
