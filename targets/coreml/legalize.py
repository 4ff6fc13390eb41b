"""Rewrites, exactly, what MIL has no form for before the graph is lowered node by node."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from edgekit.graph.shapes import infer_shapes
from edgekit.targets.coreml.biases import fuse_biases
from edgekit.targets.coreml.functions import expand_functions
from edgekit.targets.coreml.rank import lower_ranks
from edgekit.targets.coreml.unroll import unroll


def legalize(model: ir.Model) -> None:
    """Brings a graph, in place, to operators that the lowering has.

    Functions are inlined, composite operators written out, control flow that constants decide unrolled, ranks lowered to 5, and the biases
    of matrix products put into them.
    """
    if model.functions:
        InlinePass()(model)
    expand_functions(model)
    unroll(model)
    infer_shapes(model)
    lower_ranks(model)
    fuse_biases(model)
