"""Which nodes stay in float32 when a graph is lowered in float16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.ranges import FLOAT16_MAX

_PASSES_ON = frozenset({"Add", "Sub", "Where", "Softmax", "LogSoftmax", "Max", "Min", "Reshape", "Transpose", "Expand", "Concat"})
"""Operators that hand a mask's huge values on to the operator after them."""
_ABSORBS = frozenset({"Softmax", "LogSoftmax"})
"""Operators after which a mask's huge values are gone."""


def stays_float32(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that read a finite float constant which float16 cannot hold, those that hand such values on, and the softmax that ends them.

    A mask of -1e9 would become -inf, and a row that is masked whole NaN.
    """
    kept: set[ir.Node] = set()
    for node in graph:
        huge = any(_is_huge(value) for value in node.inputs)
        handed = node.op_type in _PASSES_ON and any(_carries(value, kept) for value in node.inputs)
        if huge or handed:
            kept.add(node)
    return kept


def _is_huge(value: ir.Value | None) -> bool:
    if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return False
    array = constant_array(value)
    if array is None or array.size == 0:
        return False
    finite = np.abs(array[np.isfinite(array)])
    return bool(finite.size and finite.max() > FLOAT16_MAX)


def _carries(value: ir.Value | None, kept: set[ir.Node]) -> bool:
    producer = value.producer() if value is not None else None
    return producer in kept and producer.op_type not in _ABSORBS
