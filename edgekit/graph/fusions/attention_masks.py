"""Makes one `attn_mask`, or `is_causal`, of the masks and biases of a decomposed attention.

`Attention` gives zeros in a row that hides every key; a Softmax gives NaN there when the hidden scores are minus infinity, and a mean over
all keys when they are finite. Constant masks are looked through for such rows. For a mask that is only known when the model runs:

- minus infinity becomes a boolean mask. Only what was NaN changes, to zeros, and not even that where the exporter guards against NaN;
- a finite score stays an added number, so that the mean stays too. It is at least -1e30: scores vanish beside that, and ONNX Runtime
  takes the lowest number of a type for minus infinity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.fusions.attention_build import Builder, Dims, UnfitError, dims, elements, static
from edgekit.graph.fusions.attention_scores import Term

_ABSORBS = -1e30
"""Added to a score of any size met in practice, this is the sum."""
_CAUSAL = -1e9
"""An added number at or below this hides for certain, in float16 its lowest number."""


@dataclass(frozen=True, eq=False)
class _Part:
    """One mask of `[B, H, N, S]` or broadcast to it: a constant `array` or a `value`, boolean (True attends) or added."""

    array: np.ndarray | None = None
    value: ir.Value | None = None
    boolean: bool = False


def build_mask(builder: Builder, terms: tuple[Term, ...], guarded: bool, shape: Dims, dtype: ir.DataType) -> tuple[bool, ir.Value | None]:
    """Expresses masks and biases as inputs of `Attention`.

    Args:
        builder: Makes the nodes.
        terms: The masks and biases.
        guarded: Whether NaN after the Softmax becomes 0.
        shape: The scores `[B, H, N, S]`.
        dtype: Of the scores.

    Returns:
        `is_causal`, and `attn_mask` or None.

    Raises:
        UnfitError: They cannot be expressed exactly.
    """
    alone = len(terms) == 1
    parts = [_part(builder, term, alone, guarded, shape, dtype) for term in terms]
    parts = [part for part in parts if part.array is None or not (part.array.all() if part.boolean else not part.array.any())]
    causal = [part for part in parts if _is_causal(part, len(parts) == 1, shape, dtype)]
    parts = [part for part in parts if part not in causal]
    parts = _merge_constants(parts, guarded, shape, bool(causal), dtype)
    if not parts:
        return bool(causal), None
    boolean = all(part.boolean for part in parts)
    mask, *rest = [_as_value(builder, part, boolean, dtype) for part in parts]
    for other in rest:
        both = np.broadcast_shapes(static(dims(mask) or ()), static(dims(other) or ()))
        mask = builder.node("And" if boolean else "Add", [mask, other], both)
    return bool(causal), mask


def _part(builder: Builder, term: Term, alone: bool, guarded: bool, shape: Dims, dtype: ir.DataType) -> _Part:
    array = constant_array(term.value)
    if term.fill is None:
        if array is None:
            value = builder.node("Neg", [term.value], dims(term.value) or ()) if term.negative else term.value
            return _Part(value=_fit(builder, value, term.view, shape))
        added = _fit_array(-array if term.negative else array, term.view, shape)
        _refuse_hidden_rows(np.isneginf(added), guarded)
        if alone and added.size and (np.max(added, axis=-1) <= _ABSORBS).any() and not np.isneginf(added).any():
            added = np.maximum(added, _lowest(dtype)).astype(array.dtype)
        if added.shape == array.shape and np.array_equal(added, array) and term.value.is_initializer():
            return _Part(array=added, value=term.value)
        return _Part(array=added)
    if array is not None:
        attends = _fit_array(array == term.attends, term.view, shape)
        hidden_rows = bool((~attends).all(-1).any())
        if np.isneginf(term.fill):
            _refuse_hidden_rows(~attends, guarded)
            return _Part(array=attends, boolean=True)
        if alone and not hidden_rows:
            return _Part(array=attends, boolean=True)
        return _Part(array=np.where(attends, 0, _fill(term, alone, dtype)).astype(dtype.numpy()))
    if np.isneginf(term.fill):
        value = term.value if term.attends else builder.node("Not", [term.value], dims(term.value) or ())
        return _Part(value=_fit(builder, value, term.view, shape), boolean=True)
    fill = _fill(term, alone, dtype)
    if term.added is not None and fill == term.fill:
        return _Part(value=_fit(builder, term.added, term.view, shape))
    return _Part(value=_fit(builder, _choose(builder, term.value, term.attends, fill, dtype), term.view, shape))


def _fill(term: Term, alone: bool, dtype: ir.DataType) -> float:
    """The finite number to add where a condition hides, with the same result in rows that hide every key."""
    assert term.fill is not None
    if term.added is not None and term.fill > _ABSORBS:
        return term.fill
    if alone:
        return _lowest(dtype)
    if term.fill > _ABSORBS:  # another term would show through, where the original replaced the score
        raise UnfitError
    return term.fill


def _lowest(dtype: ir.DataType) -> float:
    if dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.BFLOAT16):
        raise UnfitError  # float16 has no number beside which a score vanishes
    return _ABSORBS


def _refuse_hidden_rows(hidden: np.ndarray, guarded: bool) -> None:
    if not guarded and hidden.all(-1).any():
        raise UnfitError


def _choose(builder: Builder, condition: ir.Value, attends: bool, fill: float, dtype: ir.DataType) -> ir.Value:
    """`Where(condition, 0, fill)`, or the other way round."""
    kind = dtype.numpy()
    zero, low = builder.constant("attend", np.array(0, dtype=kind)), builder.constant("hide", np.array(fill, dtype=kind))
    branches = [zero, low] if attends else [low, zero]
    value = builder.node("Where", [condition, *branches], dims(condition) or ())
    value.type = ir.TensorType(dtype)
    return value


def _fit(builder: Builder, value: ir.Value, view: Dims, shape: Dims) -> ir.Value:
    """Brings a mask that joined the scores in shape `view` to two to four axes, the last two `[N, S]`, that broadcast to `shape`.

    ONNX Runtime does not broadcast the last two axes.
    """
    own = dims(value)
    if own is None:
        raise UnfitError
    if view == shape:
        if len(own) >= 2 and own[-2:] == shape[-2:]:
            return value
        return builder.expand(value, (*own[:-2], *shape[-2:]))
    if own[-2:] == shape[-2:] and all(dim == 1 for dim in own[:-2]):
        return value if len(own) <= 4 else builder.reshape(value, (1, 1, *shape[-2:]))
    elements(view)
    return builder.reshape(builder.expand(value, view), shape)


def _fit_array(array: np.ndarray, view: Dims, shape: Dims) -> np.ndarray:
    """As `_fit`, for a constant; leading axes along which it repeats get length 1."""
    if view == shape:
        return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:-2], *static(shape[-2:]))))
    full = np.broadcast_to(array, static(view)).reshape(static(shape))
    for axis in (0, 1):
        first = full[:1] if axis == 0 else full[:, :1]
        if np.array_equal(full, np.broadcast_to(first, full.shape)):
            full = first
    return np.ascontiguousarray(full)


def _is_causal(part: _Part, alone: bool, shape: Dims, dtype: ir.DataType) -> bool:
    """True for a constant that hides exactly what lies above the diagonal of `[N, S]`, at every batch and head."""
    if part.array is None:
        return False
    try:
        lower = _lower(shape)
    except UnfitError:
        return False
    plane = part.array.reshape(-1, *part.array.shape[-2:])
    if part.boolean:
        return bool((plane == lower).all())
    hides = plane <= max(_CAUSAL, float(dtype.min)) if alone else np.isneginf(plane)
    return bool((np.where(lower, plane == 0, hides)).all())


def _lower(shape: Dims) -> np.ndarray:
    """True on and below the diagonal of the last two axes."""
    rows, columns = static(shape[-2:])
    lower: np.ndarray = np.tri(rows, columns) > 0
    return lower


def _merge_constants(parts: list[_Part], guarded: bool, shape: Dims, causal: bool, dtype: ir.DataType) -> list[_Part]:
    """Makes one of all constant parts, and looks at the rows that they hide together."""
    constants = [part for part in parts if part.array is not None]
    if len(constants) + causal < 2:
        return parts
    boolean = all(part.boolean for part in constants)
    arrays = [part.array if boolean else _added(part, dtype) for part in constants if part.array is not None]
    merged = arrays[0] if arrays else np.ones((1, 1), dtype=bool)
    for array in arrays[1:]:
        merged = merged & array if boolean else merged + array
    hidden: np.ndarray = np.logical_not(merged) if boolean else np.isneginf(merged)
    _refuse_hidden_rows(hidden | ~_lower(shape) if causal else hidden, guarded)
    rest = [part for part in parts if part.array is None]
    return [*([_Part(array=merged, boolean=boolean, value=constants[0].value if len(constants) == 1 else None)] if arrays else []), *rest]


def _added(part: _Part, dtype: ir.DataType) -> np.ndarray:
    assert part.array is not None
    return np.where(part.array, 0, -np.inf).astype(dtype.numpy()) if part.boolean else part.array


def _as_value(builder: Builder, part: _Part, boolean: bool, dtype: ir.DataType) -> ir.Value:
    if part.array is not None and not (part.boolean and boolean):
        return part.value if part.value is not None else builder.constant("attn_mask", _added(part, dtype))
    if part.array is not None:
        return builder.constant("attn_mask", part.array)
    assert part.value is not None
    return part.value if part.boolean == boolean else _choose(builder, part.value, True, -np.inf, dtype)
