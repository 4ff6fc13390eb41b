"""Rewrites, exactly, what MIL has no form for before the graph is lowered node by node."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from edgekit.graph.shapes import infer_shapes
from edgekit.targets.coreml.rank import lower_ranks
from edgekit.targets.coreml.unroll import unroll


def legalize(model: ir.Model) -> None:
    """Inlines functions, writes out control flow that constants decide and brings every value to a rank of 5 at most, in place."""
    if model.functions:
        InlinePass()(model)
    unroll(model)
    infer_shapes(model)
    lower_ranks(model)
