"""ONNX operators in the terms of MIL: one small function per operator, in flat tables grouped by subject.

A function takes the `Lowering` and the node and returns a MIL variable, or a tuple of them for several results; an array for a result
that is known. What it cannot express exactly it refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from edgekit.targets.coreml.lowering import (
    activation,
    arithmetic,
    attention,
    comparison,
    control,
    convolution,
    gather,
    linear,
    normalization,
    pooling,
    quantization,
    recurrent,
    reduction,
    resizing,
    sampling,
    scatter,
    sequences,
    shaping,
    slicing,
)
from edgekit.targets.coreml.lowering.builder import Lowering

Lower = Callable[[Lowering, ir.Node], Any]

OPERATORS: dict[str, Lower] = {
    name: function
    for module in (
        activation, arithmetic, attention, comparison, control, convolution, gather, linear, normalization, pooling, quantization,
        recurrent, reduction, resizing, sampling, scatter, sequences, shaping, slicing,
    )
    for name, function in module.TABLE.items()
}  # fmt: skip
