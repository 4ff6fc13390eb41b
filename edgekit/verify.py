"""Parity: how far a model's outputs are from those of a reference on the same inputs, and whether that is only rounding."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from edgekit.contracts import Arrays
from edgekit.errors import ParityError, UsageError, nearest

_CHANNEL_SHARE = 0.2
LOWEST_SQNR_DB = -1000.0
"""SQNR where the error is unbounded or the reference has no signal, and the least that is ever reported."""


@dataclass(frozen=True)
class Tolerance:
    """How much rounding error an output may carry: `max(relative * max|y|, absolute)`, max|y| over all batches.

    The scale is that of the whole output and not of each element: an element near zero carries the rounding of the
    terms that cancelled in it.

    Attributes:
        relative: Share of the output's largest magnitude.
        absolute: Floor for outputs that are zero throughout. It is far below any real output's scale, so that small
            probabilities are still held to `relative`.
        why: Where the numbers come from.
    """

    relative: float
    absolute: float
    why: str


# Rounding of one operation is 2^-53, 2^-24, 2^-11 and 2^-8. "Seen" is the largest error over max|y| of a 12-block ViT and of two
# batch-normalized convolutional networks of 25 and 50 layers (random weights, PyTorch on a CPU) against float64; the limit leaves room
# for deeper and trained networks, and is far below the error of a wrong graph, which is of the order of the output itself.
_TOLERANCES = {
    "fp64": Tolerance(1e-9, 1e-16, "rounding 1.1e-16; a choice, nothing was measured: it separates float64 from float32 computation"),
    "fp32": Tolerance(1e-4, 1e-8, "rounding 6.0e-8, seen up to 6e-7; floor: less than one rounding of values near 1"),
    "fp16": Tolerance(2e-2, 2.0**-24, "rounding 4.9e-4, seen up to 9e-4; floor: one step of float16's subnormal numbers"),
    "bf16": Tolerance(8e-2, 1e-8, "rounding 3.9e-3, seen up to 8e-3; floor: as float32, whose range it shares"),
}
_EXACT = Tolerance(0.0, 0.0, "integers, booleans and strings are not rounded, and types of 8 bits and fewer are stored, not computed in")
_PRECISION = {"float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "complex128": "fp64", "complex64": "fp32"}


@dataclass(frozen=True)
class Parity:
    """How far outputs are from the reference, over all batches and outputs.

    The error of an element of an integer, boolean or string output is 1 where it differs and 0 where it does not.
    NaN or infinity counts as equal where both have it, and is then left out of every sum; elsewhere it is an infinite error.

    Attributes:
        max_abs_error: Largest absolute error.
        max_rel_error: Largest error of an output over that output's largest magnitude, infinite where that is zero.
        sqnr_db: Signal-to-quantization-noise ratio over all floating-point outputs,
            10 log10(sum ref^2 / sum (ref - result)^2) in dB; infinite: no error at all; never below `LOWEST_SQNR_DB`.
            Of a model without such outputs: 10 log10(elements / elements that differ).
        cosine: Of the angle between all floating-point outputs as one vector; None where it is undefined.
        top1_agreement: Share of samples whose largest score is at the same class, of the output where it is lowest;
            None without class scores. Scores of the reference that tie within rounding count as the same class.
        unequal: Share of elements of integer, boolean and string outputs that differ; None without such outputs.
        worst_output: Name of the output with the largest `max_rel_error`; None where nothing differs.
    """

    max_abs_error: float
    max_rel_error: float
    sqnr_db: float
    cosine: float | None
    top1_agreement: float | None
    unequal: float | None
    worst_output: str | None

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them: an infinite error is None, and an infinite `sqnr_db`, no error at all, is None."""
        return {name: None if value in (math.inf, -math.inf) else value for name, value in asdict(self).items()}


def tolerance(kind: str | np.dtype[Any]) -> Tolerance:
    """How much rounding error a precision (`fp32`), or an output of a dtype (`float32`), may carry.

    Raises:
        UsageError: There is no such precision or dtype.
    """
    try:
        name = kind if isinstance(kind, str) and kind in _TOLERANCES else np.dtype(kind).name
    except TypeError as error:
        raise UsageError(f"unknown precision or dtype '{kind}'", fix=nearest(str(kind), [*_TOLERANCES, *_PRECISION])) from error
    return _TOLERANCES.get(_PRECISION.get(name, name), _EXACT)


def is_class_scores(array: np.ndarray) -> bool:
    """Whether an output looks like scores of classes: floats of shape `[B, K]` with K >= 2."""
    return array.ndim == 2 and array.shape[1] >= 2 and _family(array.dtype) == "floating-point"


def compare(reference: Sequence[Arrays], result: Sequence[Arrays]) -> Parity:
    """Measures how far `result` is from `reference`; floating-point outputs may differ in width.

    Args:
        reference: Outputs by name, batch after batch.
        result: The same of the model that is judged.

    Raises:
        ParityError: An output is missing or not in the reference, or differs in shape or in kind of dtype; or there is nothing
            to compare.
    """
    return _parity(_tally(reference, result, "the model", same_dtype=False))


def assert_close(reference: Sequence[Arrays], result: Sequence[Arrays], *, stage: str, precision: str | None = None) -> Parity:
    """Holds `result` to `reference` up to rounding, every output on its own.

    Args:
        reference: Outputs by name, batch after batch.
        result: The same of the model that is judged.
        stage: What it went through, for the message.
        precision: The lowest precision that either computes in, as `tolerance` takes it; None: that of each output's dtype.
            An output whose own dtype is coarser is allowed the rounding of that.

    Returns:
        The parity that was found.

    Raises:
        ParityError: An output exceeds its tolerance, or cannot be compared (see `compare`), or differs in dtype.
        UsageError: There is no such precision.
    """
    tallies = _tally(reference, result, stage, same_dtype=True)
    floor = _EXACT if precision is None else tolerance(precision)
    checked = [(tally, _judge(tally, floor)) for tally in tallies]
    exceeded = [check for check in checked if not check[1].error <= check[1].allowed]
    if exceeded:
        tally, verdict = max(exceeded, key=lambda check: _ratio(check[1].error, check[1].allowed))
        more = f"; {len(exceeded)} of {len(tallies)} outputs exceed their limit, this one most" if len(exceeded) > 1 else ""
        raise ParityError(
            f"{stage} changed output '{tally.name}': {_describe(tally, verdict)}{more}",
            where=f"output '{tally.name}' {tally.dtype}, worst at batch {tally.worst[0]}, index {list(tally.worst[1])}",
            fix="report it with the model: this stage must keep the numbers up to rounding; a pass can be left out meanwhile",
        )
    return _parity(tallies)


def outputs_vary(outputs: Sequence[Arrays]) -> bool:
    """Whether outputs differ between inputs by more than the rounding that parity allows; if not, parity proves little.

    Args:
        outputs: Outputs by name on distinct inputs, batch after batch. Of a single batch the rows are compared, `[B, ...]`.

    Returns:
        False also where there is only one input, since then nothing shows that they vary.
    """
    if len(outputs) == 1:
        outputs = [{name: array[row : row + 1] for name, array in outputs[0].items()} for row in range(_rows(outputs[0]))]
    if len(outputs) < 2:
        return False
    first, others = outputs[0], outputs[1:]
    if any(name in first and array.shape != first[name].shape for other in others for name, array in other.items()):
        return True
    tallies = _tally([first] * len(others), others, "the model", same_dtype=True)
    verdicts = [_judge(tally, _EXACT) for tally in tallies]
    return any(verdict.error > verdict.allowed for verdict in verdicts)


def _rows(batch: Arrays) -> int:
    """Number of rows that all outputs have; 0 where they have not the same number."""
    counts = {array.shape[0] if array.ndim else 0 for array in batch.values()}
    return counts.pop() if len(counts) == 1 else 0


@dataclass
class _Tally:
    """What is known of one output after some batches."""

    name: str
    dtype: str
    family: str
    scale: float = 0.0
    max_abs_error: float = 0.0
    worst: tuple[int, tuple[int, ...]] = (0, ())
    elements: int = 0
    unequal: int = 0
    noise: float = 0.0
    aligned: list[tuple[float, float, float]] = field(default_factory=list)  # cosine and both norms, per batch
    samples: int = 0
    agreeing: int = 0
    channels: bool = True  # whether every batch so far has the same last axis
    channel_scale: np.ndarray = field(default_factory=lambda: np.zeros(0))
    channel_error: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def exact(self) -> bool:
        return self.family not in ("floating-point", "complex")

    @property
    def max_rel_error(self) -> float:
        return self.max_abs_error if self.exact else _ratio(self.max_abs_error, self.scale)

    def add(self, batch: int, reference: np.ndarray, result: np.ndarray) -> None:
        if self.exact:
            error = np.asarray(reference != result).astype(np.float64)
            self.unequal += int(np.count_nonzero(error))
        else:
            error = self._add_floats(reference, result)
        self.elements += reference.size
        if error.size and (largest := float(error.max())) > self.max_abs_error:
            self.max_abs_error = largest
            self.worst = batch, tuple(int(index) for index in np.unravel_index(int(error.argmax()), error.shape))

    def _add_floats(self, reference: np.ndarray, result: np.ndarray) -> np.ndarray:
        """Adds a batch and returns the absolute error of each element."""
        if self.family == "complex":  # real and imaginary parts as two numbers, in a last axis
            reference, result = (np.stack([array.real, array.imag], axis=-1) for array in (reference, result))
        elif is_class_scores(reference):
            self.samples += len(reference)
            self.agreeing += int(np.count_nonzero(_same_class(reference, result)))
        expected, found = reference.astype(np.float64), result.astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            error: np.ndarray = np.abs(found - expected)
        if not np.isfinite(error).all():
            expected, found, error = _without_non_finite(expected, found, error)
        self.scale = max(self.scale, _largest(expected))
        self._add_channels(expected, error)
        self.noise = math.hypot(self.noise, _norm(error))
        self.aligned.append((_cosine(expected, found), _norm(expected), _norm(found)))
        return error

    def _add_channels(self, expected: np.ndarray, error: np.ndarray) -> None:
        length = expected.shape[-1] if expected.ndim >= 2 else 0
        if not self.channel_scale.size:
            self.channel_scale, self.channel_error = np.zeros(length), np.zeros(length)
        self.channels = self.channels and 0 < length == len(self.channel_scale)
        if self.channels and expected.size:
            rest = tuple(range(expected.ndim - 1))
            self.channel_scale = np.maximum(self.channel_scale, np.abs(expected).max(axis=rest))
            self.channel_error = np.maximum(self.channel_error, error.max(axis=rest))


def _tally(reference: Sequence[Arrays], result: Sequence[Arrays], stage: str, *, same_dtype: bool) -> list[_Tally]:
    if not reference or not reference[0]:
        raise ParityError("there are no outputs to compare", where=stage, fix="give at least one batch of inputs, and a model with outputs")
    if len(reference) != len(result):
        raise ParityError(
            f"{stage} gave outputs for {len(result)} batches, the reference for {len(reference)}", fix="run both on the same inputs"
        )
    tallies: dict[str, _Tally] = {}
    for batch, (expected, found) in enumerate(zip(reference, result, strict=True)):
        for names, what in ((expected.keys() - found.keys(), "lost"), (found.keys() - expected.keys(), "added")):
            if names:
                raise ParityError(
                    f"{stage} {what} output '{min(names)}'",
                    where=f"batch {batch}; outputs of the reference: {', '.join(expected)}",
                    fix="keep the names and the number of the graph's outputs",
                )
        for name, array in expected.items():
            _require_comparable(name, array, found[name], stage, same_dtype)
            tally = tallies.setdefault(name, _Tally(name, str(array.dtype), _family(array.dtype)))
            tally.add(batch, array, found[name])
    return list(tallies.values())


def _require_comparable(name: str, reference: np.ndarray, result: np.ndarray, stage: str, same_dtype: bool) -> None:
    fix = "keep the types and shapes of the graph's outputs"
    if not isinstance(reference, np.ndarray) or not isinstance(result, np.ndarray):
        raise ParityError(f"output '{name}' is not a tensor", where=stage, fix="make only tensors outputs of the graph")
    if reference.shape != result.shape:
        raise ParityError(
            f"{stage} changed the shape of output '{name}' from {list(reference.shape)} to {list(result.shape)}",
            where=f"output '{name}'",
            fix=fix,
        )
    families = _family(reference.dtype), _family(result.dtype)
    width_matters = (same_dtype or families[0] == "exact") and families[0] != "string"
    if families[0] != families[1] or (width_matters and reference.dtype != result.dtype):
        raise ParityError(
            f"{stage} changed the dtype of output '{name}' from {reference.dtype} to {result.dtype}", where=f"output '{name}'", fix=fix
        )


def _family(dtype: np.dtype[Any]) -> str:
    """How an output is compared: `floating-point`, `complex`, `string` or `exact`."""
    if dtype.kind in "OUST":
        return "string"
    if dtype.kind == "c":
        return "complex"
    return "exact" if _epsilon(dtype) is None else "floating-point"


def _epsilon(dtype: np.dtype[Any]) -> float | None:
    """Distance from 1 to the next number; None of a dtype that is not floating-point."""
    try:
        return float(ml_dtypes.finfo(dtype).eps)  # type: ignore[no-untyped-call]  # knows bfloat16 and float8 too
    except (TypeError, ValueError):
        return None


def _same_class(reference: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Whether the result's largest score is at one of the reference's largest, `[B]`; NaN only where both have it.

    Only ties of the reference count: a broken model that scores all classes alike must not agree with everything.
    """
    rounding = 4.0 * (_epsilon(reference.dtype) or 0.0)
    expected, found = reference.astype(np.float64), result.astype(np.float64)
    scale = np.where(np.isfinite(expected), np.abs(expected), 0.0).max(axis=1)
    at_pick = np.take_along_axis(expected, found.argmax(axis=1)[:, None], axis=1)[:, 0]
    close = at_pick >= expected.max(axis=1) - rounding * scale
    nan_expected, nan_found = np.isnan(expected), np.isnan(found)
    agree: np.ndarray = np.where((nan_expected | nan_found).any(axis=1), (nan_expected == nan_found).all(axis=1), close)
    return agree


def _without_non_finite(expected: np.ndarray, found: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zeros in place of what is NaN or infinite on either side; its error is 0 where both sides have it, else infinite."""
    finite = np.isfinite(expected) & np.isfinite(found)
    equal = (expected == found) | (np.isnan(expected) & np.isnan(found))
    error = np.where(finite, error, np.where(equal, 0.0, math.inf))
    return np.where(finite, expected, 0.0), np.where(finite, found, 0.0), error


@dataclass(frozen=True)
class _Verdict:
    """The error of an output where it is nearest to, or furthest over, what is allowed there."""

    error: float
    allowed: float
    kind: Tolerance
    channel: int | None = None


def _judge(tally: _Tally, floor: Tolerance) -> _Verdict:
    """Holds an output to the rounding of its own dtype or to `floor`, whichever is more.

    Every channel (position on the last axis) is held to its own magnitude, so that large channels do not hide wrong small ones: boxes
    in pixels beside scores below 1, say. A channel is allowed a share of what the whole output is, since its values may be small
    differences of large ones.
    """
    if tally.exact:
        return _Verdict(tally.max_abs_error, 0.0, _EXACT)
    kinds = tolerance(tally.dtype), floor
    kind = max(kinds, key=lambda kind: max(kind.relative * tally.scale, kind.absolute))
    whole = _Verdict(tally.max_abs_error, max(kind.relative * tally.scale, kind.absolute), kind)
    if not tally.channels or not math.isfinite(tally.max_abs_error):
        return whole
    allowed = np.maximum(kind.relative * np.maximum(tally.channel_scale, _CHANNEL_SHARE * tally.scale), kind.absolute)
    worst = int((tally.channel_error / allowed).argmax())
    return _Verdict(float(tally.channel_error[worst]), float(allowed[worst]), kind, worst)


def _describe(tally: _Tally, verdict: _Verdict) -> str:
    if tally.exact:
        return f"{tally.unequal:,} of {tally.elements:,} elements differ, none may ({tally.dtype})"
    if math.isinf(verdict.error):
        return "NaN or infinity on one side only"
    channel = "" if verdict.channel is None else f" in channel {verdict.channel}"
    limit = f"{verdict.kind.relative:g} of the largest magnitude, {tally.scale:.3g} in the whole output"
    return f"max abs error {verdict.error:.3g}{channel}, allowed {verdict.allowed:.3g} ({limit}; at least {verdict.kind.absolute:.3g})"


def _parity(tallies: Sequence[_Tally]) -> Parity:
    floats = [tally for tally in tallies if not tally.exact]
    exacts = [tally for tally in tallies if tally.exact]
    unequal = _ratio(sum(tally.unequal for tally in exacts), sum(tally.elements for tally in exacts)) if exacts else None
    if floats:
        signal = math.hypot(*(norm for tally in floats for _, norm, _ in tally.aligned))
        noise = math.hypot(*(tally.noise for tally in floats))
        sqnr = _decibels(signal, noise)
    else:
        sqnr = _decibels(1.0, math.sqrt(unequal or 0.0))
    agreements = [tally.agreeing / tally.samples for tally in tallies if tally.samples]
    worst = max(tallies, key=lambda tally: (tally.max_rel_error, tally.max_abs_error))
    return Parity(
        max_abs_error=max(tally.max_abs_error for tally in tallies),
        max_rel_error=worst.max_rel_error,
        sqnr_db=sqnr,
        cosine=_total_cosine(floats),
        top1_agreement=min(agreements, default=None),
        unequal=unequal,
        worst_output=worst.name if worst.max_abs_error > 0 else None,
    )


def _total_cosine(floats: Sequence[_Tally]) -> float | None:
    if not floats or any(math.isinf(tally.noise) for tally in floats):
        return None
    if all(tally.noise == 0 for tally in floats):
        return 1.0
    parts = [part for tally in floats for part in tally.aligned]
    total, other = math.hypot(*(norm for _, norm, _ in parts)), math.hypot(*(norm for _, _, norm in parts))
    if total == 0 or other == 0:
        return None
    cosine = math.fsum(part * (norm / total) * (norm_other / other) for part, norm, norm_other in parts)
    return min(1.0, max(-1.0, cosine))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0 or signal == 0 or math.isinf(noise):
        return LOWEST_SQNR_DB if noise else math.inf
    return max(LOWEST_SQNR_DB, 20.0 * (math.log10(min(signal, sys.float_info.max)) - math.log10(noise)))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf if part else 0.0


def _largest(values: np.ndarray) -> float:
    return max(float(values.max()), -float(values.min())) if values.size else 0.0


def _scaled(values: np.ndarray) -> tuple[np.ndarray, float]:
    """A vector and a factor whose product is `values`, such that sums of squares of the vector stay in float64's range."""
    largest = _largest(values)
    factor = 1.0 if largest == 0 or 1e-100 < largest < 1e100 else largest
    return (values if factor == 1.0 else values / factor).ravel(), factor


def _norm(values: np.ndarray) -> float:
    """Euclidean norm; infinite where a value is."""
    if math.isinf(_largest(values)):
        return math.inf
    vector, factor = _scaled(values)
    return factor * math.sqrt(float(vector @ vector))


def _cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Cosine of the angle between two arrays as vectors; 0 where one is zero."""
    (first, _), (second, _) = _scaled(first), _scaled(second)
    norms = math.sqrt(float(first @ first)) * math.sqrt(float(second @ second))
    return float(first @ second) / norms if norms else 0.0
