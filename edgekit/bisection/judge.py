"""When a stage, or a value inside a graph, counts as bad."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgekit.contracts import Arrays
from edgekit.errors import ParityError
from edgekit.verify import LOWEST_SQNR_DB, Parity, assert_close, compare, tolerance


@dataclass(frozen=True)
class Verdict:
    """What was found of outputs against their reference.

    Attributes:
        bad: Whether they differ by more than is allowed.
        why: By how much, in words.
        parity: The measurement; None where they cannot be compared.
    """

    bad: bool
    why: str
    parity: Parity | None = None


@dataclass(frozen=True)
class Judge:
    """The limit of a bisection.

    Attributes:
        min_sqnr: The least SQNR in dB that is still good, as stages need that change the numbers on purpose; None: the rounding that the
            precision allows (`edgekit.verify`).
    """

    min_sqnr: float | None = None

    def outputs(self, reference: Sequence[Arrays], result: Sequence[Arrays], precision: str) -> Verdict:
        """Judges outputs by name, batch after batch; `precision` is the lowest that either computes in."""
        result = [_as_reference(expected, found) for expected, found in zip(reference, result, strict=True)]
        try:
            parity = compare(reference, result)
            if self.min_sqnr is None:
                return Verdict(False, "", assert_close(reference, result, stage="it", precision=precision))
        except ParityError as error:
            try:
                parity_or_none = compare(reference, result)
            except ParityError:
                parity_or_none = None
            return Verdict(True, error.what, parity_or_none)
        bad = parity.sqnr_db < self.min_sqnr
        return Verdict(bad, f"SQNR {parity.sqnr_db:.1f} dB, {self.min_sqnr:g} dB are asked for" if bad else "", parity)

    def differs(self, reference: np.ndarray, found: np.ndarray, precision: str, slack: float = 1.0) -> bool:
        """Whether a value inside a graph is bad; `slack` below 1 makes the limit stricter by that factor."""
        if reference.shape != found.shape:
            return True
        if reference.dtype.kind not in "fV" and found.dtype.kind not in "fV":
            return bool((reference != found).any())
        if self.min_sqnr is not None:
            return sqnr(reference, found) < self.min_sqnr - 20.0 * math.log10(slack)
        limit = tolerance(precision)
        error, scale = largest_error(reference, found)
        # Without the floor that outputs have: a value inside may be small throughout, and vanish.
        return error > (slack * limit.relative * scale if scale else limit.absolute)

    def worst_batch(self, reference: Sequence[Arrays], result: Sequence[Arrays], precision: str) -> int | None:
        """The batch that is bad by itself and furthest off; None where none is bad by itself."""
        bad = []
        for index, (expected, found) in enumerate(zip(reference, result, strict=True)):
            verdict = self.outputs([expected], [found], precision)
            if verdict.bad:
                bad.append((math.inf if verdict.parity is None else verdict.parity.max_rel_error, -index))
        return -max(bad)[1] if bad else None


def largest_error(reference: np.ndarray, found: np.ndarray) -> tuple[float, float]:
    """Largest absolute error and largest magnitude of the reference, where that is finite; NaN or infinity in one alone: infinite."""
    expected, got = reference.astype(np.float64), found.astype(np.float64)
    both = ~np.isfinite(expected) & ~np.isfinite(got)
    with np.errstate(invalid="ignore", over="ignore"):
        error = np.where(both, 0.0, np.abs(got - expected))
    error = np.where(np.isnan(error), math.inf, error)
    finite = np.abs(expected[np.isfinite(expected)])
    return (float(error.max()) if error.size else 0.0), (float(finite.max()) if finite.size else 0.0)


def sqnr(reference: np.ndarray, found: np.ndarray) -> float:
    """Signal-to-quantization-noise ratio of one array in dB."""
    if reference.shape != found.shape:
        return LOWEST_SQNR_DB
    return compare([{"x": reference.astype(np.float64)}], [{"x": found.astype(np.float64)}]).sqnr_db


def _as_reference(reference: Arrays, result: Arrays) -> Arrays:
    """The outputs in the floating-point widths of the reference: a stage may give out float16 where the original gives float32."""

    def cast(name: str, array: np.ndarray) -> np.ndarray:
        wanted = reference[name].dtype if name in reference else array.dtype
        return array.astype(wanted) if wanted.kind == "f" and array.dtype.kind in "fV" else array

    return {name: cast(name, array) for name, array in result.items()}
