"""Checks the arrays that a caller feeds to a loaded model, so that every target refuses a wrong feed in the same words.

Runtimes differ in what they do with a wrong feed: one converts silently, another crashes. edgekit converts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.errors import UsageError, nearest

Declared = Mapping[str, tuple[np.dtype[Any], Sequence[int | None]]]
"""Dtype and shape of each input by name; a dimension of None may have any size."""


def check_feeds(declared: Declared, inputs: Mapping[str, Any]) -> None:
    """Holds `inputs` against what the model declares.

    Raises:
        UsageError: An input is missing or unknown, is not a numpy array, or has another dtype or shape; the message names the input, what
            was expected and what was given.
    """
    for name in inputs:
        if name not in declared:
            raise UsageError(f"the model has no input '{name}'", where=f"input '{name}'", fix=nearest(name, declared))
    missing = [name for name in declared if name not in inputs]
    if missing:
        given = f"given: {', '.join(inputs)}" if inputs else "nothing was given"
        raise UsageError(
            f"input '{missing[0]}' is missing ({given})",
            where=f"input '{missing[0]}'",
            fix=f"give an array for each of: {', '.join(declared)}",
        )
    for name, (dtype, shape) in declared.items():
        _check_array(name, inputs[name], dtype, shape)


def _check_array(name: str, array: Any, dtype: np.dtype[Any], shape: Sequence[int | None]) -> None:
    expected = f"expected {dtype} {_shape_text(shape)}"
    if not isinstance(array, np.ndarray):
        raise UsageError(
            f"input '{name}' is a {type(array).__name__}, not a numpy array ({expected})",
            where=f"input '{name}'",
            fix=f"numpy.asarray(value, dtype='{dtype}')",
        )
    given = f"given {array.dtype} {_shape_text(array.shape)}"
    if array.dtype != dtype:
        raise UsageError(
            f"input '{name}' has the wrong dtype: {expected}, {given}",
            where=f"input '{name}'",
            fix=f"array.astype('{dtype}'), if that loses nothing: edgekit converts no values silently",
        )
    if len(array.shape) != len(shape) or any(want is not None and want != got for want, got in zip(shape, array.shape, strict=True)):
        fix = f"feed an array of shape {_shape_text(shape)}; compile the model again with --input for another shape"
        if array.ndim + 1 == len(shape) and tuple(shape[1:]) == array.shape and shape[0] == 1:
            fix = "add the batch axis: array[None]"
        raise UsageError(f"input '{name}' has the wrong shape: {expected}, {given}", where=f"input '{name}'", fix=fix)


def _shape_text(shape: Sequence[int | None]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"
