"""The pass `reparameterize`: all exact structural rewritings, run in turn until none finds anything more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass, Refusal
from edgekit.errors import PassError, UsageError, nearest
from edgekit.graph.census import losses, whole_nodes
from edgekit.passes.reparameterize.argmax import DropMonotonic
from edgekit.passes.reparameterize.attention_bias import DropAttentionBias
from edgekit.passes.reparameterize.commute import CommuteLinear
from edgekit.passes.reparameterize.dead_work import DropDeadWork
from edgekit.passes.reparameterize.drop_repeated import DropRepeated
from edgekit.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from edgekit.passes.reparameterize.fold_input_affine import FoldInputAffine
from edgekit.passes.reparameterize.fold_quantized_scale import FoldQuantizedScale
from edgekit.passes.reparameterize.fold_scale import FoldScale
from edgekit.passes.reparameterize.merge_branches import MergeBranches
from edgekit.passes.reparameterize.merge_linears import MergeLinears
from edgekit.passes.reparameterize.merge_sequential import MergeConvolutions
from edgekit.passes.reparameterize.single_query import AbsorbKeyValue
from edgekit.passes.reparameterize.small_maps import CropKernels

FAMILIES: tuple[type[Pass], ...] = (
    FoldBatchNorm,
    FoldScale,
    FoldQuantizedScale,
    MergeBranches,
    FoldInputAffine,
    MergeConvolutions,
    MergeLinears,
    CropKernels,
    CommuteLinear,
    DropDeadWork,
    AbsorbKeyValue,
    DropAttentionBias,
    DropRepeated,
    DropMonotonic,
)
"""The rule families in the order in which a round runs them."""

_MOST_ROUNDS = 16
"""A block nests sums and scalings a few levels deep; each round resolves one level."""


@dataclass(frozen=True)
class Reparameterize(Pass):
    """Rewrite the graph's linear structure exactly, by every rule family, until nothing more is found.

    Before:  x ─┬─ Conv ─ BatchNormalization ─┐
                ├─ Conv 1x1 ───────────────── Add ─ Mul(λ) ─ Add(x) ─► y
                └─ BatchNormalization ────────┘
    After:   x ─── Conv ─► y

    One family makes room for another: a sum that became a convolution takes the scaling after it, and is then itself a branch of the
    residual sum. So the families run in turn, round after round. Each fires only where it is exact and neither multiply-accumulates nor
    bytes of weights rise. A place is named `FAMILY: NODE` in the report, and is left out by that name.

    Source: Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again"; Ding et al. 2021, "Diverse Branch Block: Building a
    Convolution as an Inception-like Unit"; Vasu et al. 2023, "FastViT: A Fast Hybrid Vision Transformer using Structural
    Reparameterization".
    """

    name: ClassVar[str] = "reparameterize"
    effect: ClassVar[Effect] = Effect.EXACT
    default_order: ClassVar[int | None] = 10
    removes: ClassVar[frozenset[str]] = frozenset().union(*(family.removes for family in FAMILIES))

    without: tuple[str, ...] = ()
    """Families that are left out, by the names of their passes."""

    def __post_init__(self) -> None:
        names = [family.name for family in FAMILIES]
        for name in self.without:
            if name not in names:
                raise UsageError(f"'{name}' is no family of reparameterize", where="option 'without'", fix=nearest(name, names))

    def apply(self, model: ir.Model, context: Context) -> int:
        """Runs the families to a fixed point; returns how many places they rewrote in all.

        Raises:
            PassError: A family broke a whole operator that it does not declare to remove.
        """
        families = [family() for family in FAMILIES if family.name not in self.without]
        total = 0
        for _ in range(_MOST_ROUNDS):
            refusals: list[Refusal] = []
            found = sum(_run(family, model, context, refusals) for family in families)
            total += found
            if not found:
                break
        context.refusals += refusals  # of the last round: what still nearly matches
        return total


@dataclass
class _FamilyContext(Context):
    """What one family sees: its places bear its name in the context of the whole pass."""

    parent: Context = field(default_factory=Context)
    family: str = ""

    def skips(self, where: str) -> bool:
        """As `Context.skips`."""
        return self.parent.skips(f"{self.family}: {where}")

    def applied(self, where: str, rule: str = "") -> None:
        """As `Context.applied`."""
        self.parent.applied(f"{self.family}: {where}", rule=rule or self.family)


def _run(family: Pass, model: ir.Model, context: Context, refusals: list[Refusal]) -> int:
    own = _FamilyContext(context.calibration, context.target, context.generator, parent=context, family=family.name)
    before = whole_nodes(model)
    count = family.apply(model, own)
    # One family may drop work of any kind: what the pass as a whole may remove says nothing, so each is held to its own promise.
    if count and (lost := losses(before, whole_nodes(model), family.removes)):
        raise PassError(
            f"'{family.name}' broke whole operators into parts: {', '.join(map(str, lost))}",
            fix=f'reparameterize{{without=["{family.name}"]}}',
        )
    refusals += own.refusals
    return count
