"""The pass `stabilize-float16`: what overflows float16, or vanishes in it, in a form that is equal and does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.errors import UnsupportedOpError
from edgekit.graph.float16_proof import prove_float16
from edgekit.graph.ranges import risks, value_ranges
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.float16.activations import stabilize_activations
from edgekit.passes.float16.masks import stabilize_masks
from edgekit.passes.float16.normalization import stabilize_norms
from edgekit.passes.float16.places import Places
from edgekit.passes.float16.sums import stabilize_sums

_RULES: tuple[Callable[[Places], int], ...] = (stabilize_norms, stabilize_masks, stabilize_activations, stabilize_sums)


@dataclass(frozen=True)
class StabilizeFloat16(Pass):
    """Rewrite what float16 does not hold into forms that are equal and that it holds; to be followed by `to-float16`.

    Before:  x ─ LayerNormalization(ε) ─►                     (x² reaches 1e6)
    After:   x ─ Mul(2^-5) ─ LayerNormalization(ε·2^-10) ─►

    Before:  scores ─ Add(mask of -1e9) ─ Softmax ─►
    After:   scores ─ Add(mask of -3e4) ─ Softmax ─►

    Before:  x ─ Exp ─ Add(1) ─ Log ─►                        (exp(x) reaches 1e6)
    After:   x ─ Abs ─ Neg ─ Softplus ─ Add(Relu(x)) ─►

    1. Norms, whole and written out: the input times a power of two s, ε times s² (`normalization`).
    2. Masks that are added to scores: clamped to -3e4 where they still mask exactly (`masks`).
    3. Softplus, Mish, GELU of the tanh form: computed where they are not x itself (`activations`).
    4. Means, L2 norms, products that are scaled afterwards: a power of two before, its inverse after (`sums`).

    The range of every value on the calibration data, the steps inside whole operators included, decides where: places that float16 holds
    are left alone. The graph is then run in emulated float16, before and after (`edgekit.graph.float16_proof`); if rewriting does not
    help there, nothing is rewritten. What still overflows is named. Without calibration data only the written-out softplus is rewritten.

    Source: Micikevicius et al. 2018, "Mixed Precision Training", section 3; Higham 2002, "Accuracy and Stability of Numerical Algorithms",
    section 27.8 (scaling of norms).
    """

    name: ClassVar[str] = "stabilize-float16"
    effect: ClassVar[Effect] = Effect.EXACT
    default_order: ClassVar[int | None] = None

    def apply(self, model: ir.Model, context: Context) -> int:
        """Rewrites the main graph; returns at how many places."""
        try:
            ranges = value_ranges(model, context.calibration)
            if not context.calibration:
                return _rewrite(Places(model, context, ranges))
            trial = model.clone()
            quiet = dataclasses.replace(context, rewrites=[], refusals=[])
            if not _rewrite(Places(trial, quiet, ranges)):
                context.refusals.extend(quiet.refusals)
                _name_rest(context, [(risk.range.node or risk.range.name, risk.range.name, risk.why) for risk in risks(ranges)])
                return 0
            infer_shapes(trial)
            before, after = prove_float16(model, context.calibration), prove_float16(trial, context.calibration)
        except UnsupportedOpError as error:
            context.refuse("graph", f"its ranges are not known: {error.what}")
            return 0
        if after.is_worse_than(before):
            context.refuse("graph", f"in emulated float16 the stable forms are worse: {after}; as it is: {before}")
            return 0
        count = _rewrite(Places(model, context, ranges))
        left = [risk for risk in risks(value_ranges(trial, context.calibration)) if risk.kind == "overflow"] if after.overflows else []
        _name_rest(context, [(risk.range.node or risk.range.name, risk.range.name, risk.why) for risk in left])
        return count


def _rewrite(places: Places) -> int:
    return sum(rule(places) for rule in _RULES)


def _name_rest(context: Context, left: list[tuple[str, str, str]]) -> None:
    """Names what the rules left, once a node."""
    named = {refusal.where for refusal in context.refusals}
    for node, value, why in left:
        if node not in named:
            named.add(node)
            context.refuse(node, f"value '{value}' is not rewritten: {why}; keep it in float32: to-float16{{keep=[\"{node}\"]}}")
