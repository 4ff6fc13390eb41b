"""The proof that a graph survives float16: it is run with every value rounded, those inside whole operators too, and held to float64.

A target's kernel may hold the steps of a layer norm or a softmax in a wider type. The proof does not count on it: it runs the graph with
these steps written out, each rounded to float16, so what holds here holds on the narrowest hardware.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Arrays
from edgekit.graph.internals import expose_internals

if TYPE_CHECKING:
    from torch import Tensor

_WORSE_DB = 1.0
"""Rewriting moves roundings about; less than this is no loss."""


@dataclass(frozen=True)
class Proof:
    """How a graph in float16 compares to itself in float64.

    Attributes:
        samples: Rows of the first output, over all batches.
        max_abs_error: Largest difference of an output element; infinite where one is NaN or infinite in float16 alone.
        sqnr_db: Signal-to-noise ratio over all floating-point outputs, in dB; minus infinity where elements are lost.
        top1_agreement: Share of rows of the outputs `[B, K]`, K >= 2, with the same largest element; None without such an output.
            A row with a NaN agrees with nothing.
        lost: Share of output elements that are finite in float64 and not in float16.
        overflows: Names of the values, those inside whole operators included, that are finite in float64 and not in float16.
    """

    samples: int
    max_abs_error: float
    sqnr_db: float
    top1_agreement: float | None
    lost: float
    overflows: tuple[str, ...]

    def is_worse_than(self, other: Proof) -> bool:
        """True when more output elements are lost than in `other`, or as many and the noise is more than 1 dB above."""
        if self.lost != other.lost:
            return self.lost > other.lost
        return other.sqnr_db - self.sqnr_db > _WORSE_DB

    def __str__(self) -> str:
        agreement = "" if self.top1_agreement is None else f", top-1 agreement {self.top1_agreement:.1%}"
        overflows = f", {len(self.overflows)} values overflow" if self.overflows else ", no value overflows"
        return f"SQNR {self.sqnr_db:.1f} dB{agreement}{overflows} on {self.samples} samples"


def prove_float16(model: ir.Model, calibration: Sequence[Arrays]) -> Proof:
    """Runs `model` in emulated float16 and in float64.

    Args:
        model: The graph; it is not changed.
        calibration: Batches of inputs, `{input name: array}`; at least one.

    Raises:
        UnsupportedOpError: The interpreter does not know an operator.
        DataError: The data do not fit the model.
    """
    import torch

    from edgekit.graph.interpreter import Interpreter
    from edgekit.graph.interpreter.values import to_array

    exposed, _ = expose_internals(model, replace=True)
    wide, narrow = Interpreter(exposed, dtype="float64"), Interpreter(exposed, dtype="float16")
    tally, lost_values = _Tally(), dict[str, None]()
    with torch.no_grad():
        for batch in calibration:
            feed = {name: batch[name] for name in wide.input_names if name in batch}
            before, after = _NotFinite(), _NotFinite()
            expected, found = wide(feed, before.hook), narrow(feed, after.hook)
            lost_values.update(dict.fromkeys(name for name, count in after.counts.items() if count > before.counts.get(name, 0)))
            tally.add(
                [to_array(value) for value in expected.values()],
                [to_array(value) for value in found.values()],
            )
    return tally.proof(tuple(lost_values))


class _NotFinite:
    """Counts the elements of each value that are not finite."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def hook(self, name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and (count := tensor.numel() - int(tensor.isfinite().sum())):
            self.counts[name] = count


class _Tally:
    """Adds up outputs over the batches."""

    def __init__(self) -> None:
        self.samples = self.elements = self.lost = self.rows = self.agreeing = 0
        self.largest = self.signal = self.noise = 0.0

    def add(self, expected: Iterable[np.ndarray | None], found: Iterable[np.ndarray | None]) -> None:
        for index, (wanted, given) in enumerate(zip(expected, found, strict=True)):
            if not isinstance(wanted, np.ndarray) or not isinstance(given, np.ndarray):
                continue
            if index == 0:
                self.samples += wanted.shape[0] if wanted.ndim else 1
            if wanted.dtype.kind != "f":
                continue
            given = given.astype(np.float64)
            finite = np.isfinite(wanted)
            kept = finite & np.isfinite(given)
            self.elements += wanted.size
            self.lost += int(finite.sum() - kept.sum())
            error = np.abs(given[kept] - wanted[kept])
            self.largest = max(self.largest, float(error.max(initial=0.0)))
            self.signal += float(np.sum(wanted[kept] ** 2))
            self.noise += float(np.sum(error**2))
            if wanted.ndim == 2 and wanted.shape[1] >= 2:
                self.rows += len(wanted)
                self.agreeing += int(((wanted.argmax(1) == given.argmax(1)) & ~np.isnan(given).any(1)).sum())

    def proof(self, overflows: tuple[str, ...]) -> Proof:
        sqnr = math.inf if self.noise == 0 else 10 * math.log10(self.signal / self.noise) if self.signal else -math.inf
        return Proof(
            self.samples,
            math.inf if self.lost else self.largest,
            -math.inf if self.lost else sqnr,
            self.agreeing / self.rows if self.rows else None,
            self.lost / max(self.elements, 1),
            overflows,
        )
