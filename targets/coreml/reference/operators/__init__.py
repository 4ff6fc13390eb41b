"""The operators of MIL, by name, as functions on tensors.

Each takes its arguments by MIL's parameter names and has MIL's default values, from coremltools' documentation of the operator. Tensors
come in the type that operators compute in (float32, int32, bool); scalars are tensors of rank 0, strings are `str`, missing optional
arguments are None. The result, or the tuple of results, is rounded to the declared types by the executor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgekit.targets.coreml.reference.operators import (
    activation,
    compression,
    convolution,
    elementwise,
    gather,
    linear,
    lists,
    normalization,
    pooling,
    recurrent,
    reduction,
    resizing,
    tensor,
    transformation,
)

OPERATORS: dict[str, Callable[..., Any]] = {
    name: function
    for module in (
        activation, compression, convolution, elementwise, gather, linear, lists, normalization, pooling, recurrent, reduction, resizing,
        tensor, transformation,
    )
    for name, function in module.TABLE.items()
}  # fmt: skip
