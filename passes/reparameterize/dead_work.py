"""The pass `drop-dead-work`: rows, channels and whole branches that nothing reads are not computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.census import WHOLE as WHOLE_OPERATORS
from edgekit.graph.constants import GraphEditor
from edgekit.graph.fusions.matching import FIRST_OPSET, opset
from edgekit.passes.reparameterize.liveness import plan
from edgekit.passes.reparameterize.slicing import carry_out

_MOST_ROUNDS = 8
"""A node that goes may have been the other reader of a weight, which can be cut in the next round; the last finds nothing."""


@dataclass(frozen=True)
class DropDeadWork(Pass):
    """Compute only what is read: after the last attention of a classifier on the class token, one row instead of all.

    Before:  x ─┬─ MatMul(Wqkv) ─ Attention ─ MatMul ─ Add ─┬─ MLP ─ Add ─ Norm ─ Gather(0) ─ MatMul(head) ─► y
                └──────────────────────────────────┘ └──────────┘                            [B, N, C] until Gather
    After:   x ─┬─ MatMul(Wkv) ────────── K, V ─ Attention ─ MatMul ─ Add ─┬─ MLP ─ Add ─ Norm ─ MatMul(head) ─► y
                └─ Slice(0) ─┬─ MatMul(Wq) ── Q ──┘                   │    └────────┘      [B, 1, C] from Slice on
                             └────────────────────────────────────────┘

    What is read of each value is propagated from the outputs backwards through every operator whose rule is known, as a set of places along
    each axis; then each operator is left to compute that part, weights, shapes and indices are cut down with it, and slices that choose
    everything disappear. So unread channels of a linear layer, unread rows of a fused projection and unread outputs of a Split go too. A
    value is computed in part only when

    1. nothing reads the rest: no node, no graph output, no subgraph;
    2. the places are constants: all places count as read where indices are computed as the model runs;
    3. every operator on the way has a rule for that axis: softmax and norms need all of the axis that they work along, causal attention all
       rows, attention all keys and values;
    4. a weight that is cut is a constant and nothing else reads it (a vector may be copied);
    5. some operator before it goes, multiplies less or holds less of a weight; none multiplies more.

    Source: Touvron et al. 2021, "Going deeper with Image Transformers", section 3 (class attention: the class token alone is the query);
    the analysis is liveness (Kildall 1973, "A unified approach to global program optimization") with places in the role of variables.
    """

    name: ClassVar[str] = "drop-dead-work"
    effect: ClassVar[Effect] = Effect.EXACT
    removes: ClassVar[frozenset[str]] = frozenset(WHOLE_OPERATORS)

    def apply(self, model: ir.Model, context: Context) -> int:
        """Drops dead work of the main graph; returns how many nodes go, multiply less or hold less of a weight."""
        if opset(model) < FIRST_OPSET:
            return 0
        places: dict[str, None] = {}
        refusals: dict[str, str] = {}
        for _ in range(_MOST_ROUNDS):
            found = plan(model.graph, [node for node in model.graph if context.skips(_where(node))])
            refusals = found.refusals
            if not found.savings:
                break
            places.update(dict.fromkeys(_where(node) for node in found.savings))
            carry_out(found, GraphEditor(model))
        for where in places:
            context.applied(where)
        for where, why in refusals.items():
            context.refuse(where, why)
        return len(places)


def _where(node: ir.Node) -> str:
    return node.name or node.op_type
