"""Which nodes stay in float32 when a graph is lowered in float16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.ranges import FLOAT16_MAX

_MOVES = frozenset(
    {"Cast", "Concat", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad", "Reshape", "ScatterElements",
     "ScatterND", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Trilu", "Unsqueeze"}
)  # fmt: skip
"""Operators that hand values on as they are."""
_HUGE_PASSES = _MOVES | {
    "Add", "Sub", "Mul", "Div", "Neg", "Abs", "Where", "Max", "Min", "Sum", "ReduceMax", "ReduceMin", "Softmax", "LogSoftmax", "Attention",
}  # fmt: skip
"""Operators that hand a mask's huge values on to the operator after them, or end them."""
_HUGE_ENDS = frozenset({"Softmax", "LogSoftmax", "Attention"})
"""Operators after which a mask's huge values are gone."""
_TINY_STARTS = frozenset({"Add", "Sub", "Max", "Clip", "Div", "Pow"})
"""Operators that guard what follows against zero by a tiny constant."""
_TINY_PASSES = _MOVES | {"Sqrt", "Pow", "Max", "Clip", "Abs", "Neg", "Div", "Reciprocal", "Log"}
"""Operators that hand such a guard on, or end it."""
_TINY_ENDS = frozenset({"Div", "Reciprocal", "Log"})


def stays_float32(graph: ir.Graph) -> set[ir.Node]:
    """Nodes that read a finite float constant which float16 cannot hold, those that hand such values on, and the operator that ends them.

    A mask of -1e9 would become -inf, and a row that is masked whole NaN. A guard of 1e-12 would become 0, and what it divides NaN.
    """
    huge: set[ir.Node] = set()
    tiny: set[ir.Node] = set()
    for node in graph:
        if any(_is_huge(value) for value in node.inputs) or (
            node.op_type in _HUGE_PASSES and any(_carries(value, huge, _HUGE_ENDS) for value in node.inputs)
        ):
            huge.add(node)
        if (node.op_type in _TINY_STARTS and any(_vanishes(value) for value in node.inputs)) or (
            node.op_type in _TINY_PASSES and any(_carries(value, tiny, _TINY_ENDS) for value in node.inputs)
        ):
            tiny.add(node)
    return huge | tiny


def _vanishes(value: ir.Value | None) -> bool:
    """Whether it is a number that is 0 in float16 and is none."""
    if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return False
    array = constant_array(value)
    if array is None or array.size != 1:
        return False
    number = float(array.item())
    return number != 0 and float(np.float16(number)) == 0


def _is_huge(value: ir.Value | None) -> bool:
    if value is None or value.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return False
    array = constant_array(value)
    if array is None or array.size == 0:
        return False
    finite = np.abs(array[np.isfinite(array)])
    return bool(finite.size and finite.max() > FLOAT16_MAX)


def _carries(value: ir.Value | None, kept: set[ir.Node], ends: frozenset[str]) -> bool:
    producer = value.producer() if value is not None else None
    return producer in kept and producer.op_type not in ends
