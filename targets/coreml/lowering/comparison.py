"""Comparisons, logic and choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.broadcasting import broadcast
from edgekit.targets.coreml.lowering.builder import Lowering


def _binary(name: str) -> Callable[[Lowering, ir.Node], Any]:
    return lambda b, node: b.op(name, x=b.x(node, 0), y=b.x(node, 1))


def _equal(b: Lowering, node: ir.Node) -> Any:
    """Equal: MIL's compares numbers only."""
    x, y = b.x(node, 0), b.x(node, 1)
    if b.dtype(node) == ir.DataType.BOOL:
        return b.op("logical_not", x=b.op("logical_xor", x=x, y=y))
    return b.op("equal", x=x, y=y)


def _not(b: Lowering, node: ir.Node) -> Any:
    return b.op("logical_not", x=b.x(node))


def _where(b: Lowering, node: ir.Node) -> Any:
    """Where: MIL gives the result the common shape of the two choices, so one of them is repeated where the condition is larger."""
    condition, x, y = b.xs(node)
    shape = b.out_shape(node)
    if np.broadcast_shapes(tuple(x.shape), tuple(y.shape)) != shape:
        known = b.known(node, 2)
        if known is None and b.known(node, 1) is not None:
            x = broadcast(b, b.known(node, 1), shape)
        else:
            y = broadcast(b, y if known is None else known, shape)
    return b.op("select", cond=condition, a=x, b=y)


def _is_nan(b: Lowering, node: ir.Node) -> Any:
    x = b.x(node)
    return b.op("not_equal", x=x, y=x)


def _is_inf(b: Lowering, node: ir.Node) -> Any:
    x = b.x(node)
    positive = node.attributes.get_int("detect_positive", 1) != 0
    negative = node.attributes.get_int("detect_negative", 1) != 0
    if not positive and not negative:
        return np.zeros(b.shape(node), dtype=np.bool_)
    if positive and negative:
        x = b.op("abs", x=x)
    return b.op("equal", x=x, y=float("inf") if positive else float("-inf"))


TABLE: dict[str, Callable[[Lowering, ir.Node], Any]] = {
    "Equal": _equal,
    "Greater": _binary("greater"),
    "GreaterOrEqual": _binary("greater_equal"),
    "Less": _binary("less"),
    "LessOrEqual": _binary("less_equal"),
    "And": _binary("logical_and"),
    "Or": _binary("logical_or"),
    "Xor": _binary("logical_xor"),
    "Not": _not,
    "Where": _where,
    "IsNaN": _is_nan,
    "IsInf": _is_inf,
}
