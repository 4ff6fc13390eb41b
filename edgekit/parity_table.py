"""The parity table of a compile: every stage against the original and the stage before it, on the data and on adversarial inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from edgekit.contracts import Arrays
from edgekit.errors import ParityError
from edgekit.evaluate import Outcome
from edgekit.verify import Parity, compare


@dataclass(frozen=True)
class Compared:
    """A stage's outputs on the same inputs against two others'.

    Attributes:
        original: Against the original model's own outputs; None for the original itself, and where they cannot be compared.
        previous: Against the stage before; None likewise, and where the stage changed nothing.
    """

    original: Parity | None
    previous: Parity | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        return {key: None if parity is None else parity.to_dict() for key, parity in vars(self).items()}


@dataclass(frozen=True)
class ParityRow:
    """A stage in the table.

    Attributes:
        stage: `torch` or `file` (the original), `traced`, `canonical`, the specification of a pass, or `lowered`.
        data: On the calibration data.
        adversarial: On each adversarial input, by kind; None where the stage could not run on them.
    """

    stage: str
    data: Compared
    adversarial: dict[str, Compared] | None

    def to_dict(self) -> dict[str, Any]:
        """The row of `parity_table` in report.json."""
        rows = None if self.adversarial is None else [{"input": kind, **item.to_dict()} for kind, item in self.adversarial.items()]
        return {"stage": self.stage, "data": self.data.to_dict(), "adversarial": rows}


@dataclass
class ParityTable:
    """Collects the rows while a compile goes on.

    Attributes:
        kinds: The kinds of adversarial inputs.
        rows: The rows so far.
    """

    kinds: Sequence[str] = ()
    rows: list[ParityRow] = field(default_factory=list)
    _first: Outcome | None = None
    _last: Outcome | None = None

    def add(self, stage: str, outcome: Outcome, previous: Parity | None = None) -> ParityRow:
        """Adds a stage's row and returns it.

        Args:
            stage: Its name.
            outcome: What it computes. The first is the original; that of the stage before, the same object, is one that changed nothing.
            previous: Its parity on the data with the stage before, where it is known already.
        """
        first, last = self._first, self._last
        if first is None or last is None:
            self._first = first = last = outcome
        same = outcome is last
        before = None if same else previous or _parity(last.outputs, outcome.outputs)
        # The second stage's two comparisons are one.
        whole = None if outcome is first else before if last is first and not same else _parity(first.outputs, outcome.outputs)
        row = ParityRow(stage, Compared(whole, before), self._on_adversarial(first, last, outcome))
        self._last = outcome
        self.rows.append(row)
        return row

    def _on_adversarial(self, first: Outcome, last: Outcome, now: Outcome) -> dict[str, Compared] | None:
        if now.adversarial is None:
            return None

        def parity(reference: Outcome, index: int) -> Parity | None:
            if reference is now or reference.adversarial is None or now.adversarial is None:
                return None
            return _parity([reference.adversarial[index]], [now.adversarial[index]])

        return {kind: Compared(parity(first, index), parity(last, index)) for index, kind in enumerate(self.kinds)}


def _parity(reference: Sequence[Arrays], result: Sequence[Arrays]) -> Parity | None:
    try:
        return compare(reference, result)
    except ParityError:  # other shapes, which only adversarial inputs can bring about: the stages' own checks look at the data
        return None
