"""What a bisection found, level by level."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from edgekit.bisection.nodes import NodeFound
from edgekit.bisection.particulars import Difference
from edgekit.bisection.remedy import Tried
from edgekit.bisection.reproduce import Reproducer
from edgekit.bisection.rewrites import RewritesFound
from edgekit.bisection.stages import StageFound
from edgekit.bisection.tensors import TensorFound


@dataclass
class Finding:
    """The culprit of a disagreement. A level that does not apply, or found nothing, is None.

    Attributes:
        model: What was looked at.
        stage: The first stage that disagrees with the original; None between two files.
        rewrite: The places of its pass.
        node: The node.
        tensor: The operand.
        reproducer: The files that show it; None where none were asked for.
        remedies: What was tried, up to the first that works.
        notes: What a reader must know besides.
        agree: Whether nothing disagrees.
    """

    model: str
    stage: StageFound | None = None
    rewrite: RewritesFound | None = None
    node: NodeFound | None = None
    tensor: TensorFound | None = None
    reproducer: Reproducer | None = None
    remedies: list[Tried] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    agree: bool = False

    @property
    def remedy(self) -> Tried | None:
        """The remedy that works, if one does."""
        return next((tried for tried in self.remedies if tried.works), None)

    def to_dict(self) -> dict[str, Any]:
        """The finding as JSON takes it."""
        return {
            "model": self.model,
            "agree": self.agree,
            "stage": self._stage(),
            "rewrite": self._rewrite(),
            "node": self._node(),
            "tensor": self._tensor(),
            "reproducer": None
            if self.reproducer is None
            else {"path": str(self.reproducer.path), "nodes": self.reproducer.nodes, "shows": self.reproducer.shows},
            "remedies": [
                {"text": tried.remedy.text, "options": tried.remedy.options, "works": tried.works, "why": tried.why}
                for tried in self.remedies
            ],
            "notes": self.notes,
        }

    def _stage(self) -> dict[str, Any] | None:
        found = self.stage
        if found is None:
            return None
        return {"name": found.name, "stages": list(found.stages), "why": found.why, "evaluations": found.evaluations, "bound": found.bound}

    def _rewrite(self) -> dict[str, Any] | None:
        found = self.rewrite
        if found is None:
            return None
        return {
            "places": list(found.places),
            "of": found.count,
            "complete": found.complete,
            "why_not": found.why_not,
            "evaluations": list(found.evaluations),
            "bound": found.bound,
        }

    def _node(self) -> dict[str, Any] | None:
        found = self.node
        if found is None:
            return None
        return {
            "name": found.node.name,
            "operator": found.node.op_type,
            "module": found.module,
            "output": found.output.name,
            "region": [node.name for node in found.region],
            "rewritten": found.changed,
            "alone": found.alone,
            "evaluations": found.evaluations,
            "bound": found.bound,
        }

    def _tensor(self) -> dict[str, Any] | None:
        found = self.tensor
        if found is None:
            return None
        return {
            "name": found.name,
            "role": found.role,
            "text": found.text,
            "tried": found.tried,
            "worst": _worst(found.difference),
        }


def _worst(found: Difference | None) -> dict[str, Any] | None:
    if found is None:
        return None

    def number(value: float) -> float | str:
        return value if math.isfinite(value) else str(value)

    return {
        "index": list(found.index),
        "channel": found.channel,
        "expected": number(found.expected),
        "found": number(found.found),
    }
