"""The pass `fold-batch-norm`: a batch norm after a linear operator disappears into its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor
from edgekit.graph.fusions.layout import merge_layout
from edgekit.passes.reparameterize.affine import read_affine
from edgekit.passes.reparameterize.affine_paths import on_value
from edgekit.passes.reparameterize.batch_norm import is_batch_norm, why_not_affine
from edgekit.passes.reparameterize.linear_producers import Outcome, Terms, fold_back


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold batch normalization into the convolution or matrix product before it.

    Before:  x ─ Conv(W, b) ─ BatchNormalization(γ, β, μ, σ²) ─► y
    After:   x ─ Conv(a·W, a·b + c) ─► y            a = γ/√(σ²+ε),  c = β − μ·a,  one of each per output channel

    The same for ConvTranspose, Gemm, MatMul and MatMul ─ Add(bias), where a MatMul without bias becomes MatMul ─ Add. A bias is made where
    there is none. It is done in float64 and cast back once. Between the two may stand what the map commutes with: layout operators, as in
    MatMul ─ Transpose ─ BatchNormalization ─ Transpose over tokens, which then cancel out, and averages over space. A batch norm stays when

    1. it is in training mode, its parameters are not constants, or σ²+ε is not positive somewhere;
    2. no linear operator is before it, or that operator's weights are not constants;
    3. the operator's output, or a value between, is read elsewhere or is a graph output;
    4. the folded weights would not be finite in their dtype.

    A weight that other nodes read as well is left as it is for them.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", equation 14.
    """

    name: ClassVar[str] = "fold-batch-norm"
    effect: ClassVar[Effect] = Effect.EXACT
    default_order: ClassVar[int | None] = None
    removes: ClassVar[frozenset[str]] = frozenset({"BatchNormalization"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Folds every batch norm of the main graph that can be; returns how many."""
        norms = [node for node in model.graph if is_batch_norm(node)]
        editor = GraphEditor(model) if norms else None
        folded, moved = 0, False
        for norm in norms:
            assert editor is not None
            where = norm.name or "BatchNormalization"
            if context.skips(where):
                continue
            outcome = _fold(norm, editor)
            if outcome.why is None:
                folded += 1
                moved |= outcome.moved
                context.applied(where)
            else:
                context.refuse(where, outcome.why)
        if moved:
            merge_layout(model)  # what stood around a batch norm may cancel out
        return folded


def _fold(norm: ir.Node, editor: GraphEditor) -> Outcome:
    """Folds `norm` into its producer."""
    why = why_not_affine(norm)
    if why is not None:
        return Outcome(why)
    found = read_affine(norm)
    if found is None or found.x.shape is None:
        return Outcome("the rank of what the batch norm reads is not known")
    return fold_back(norm, found.x, on_value(found), _TERMS, editor)


_TERMS = Terms("batch norm", copies=True, new_add=True)
