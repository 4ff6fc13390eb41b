"""Values that are computed and known to be finite, which a mask must be for the weights of attention to sum to one."""

from __future__ import annotations

import onnx_ir as ir

FINITE = "edgekit.finite"
"""Metadata key of a value whose elements are finite whatever the inputs; its value is "1"."""

_VIEWS = frozenset({"Expand", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"})


def is_finite(value: ir.Value) -> bool:
    """Whether `value`, or what it is a view of, is marked as finite."""
    seen: ir.Value | None = value
    while seen is not None:
        if seen.metadata_props.get(FINITE) == "1":
            return True
        node = seen.producer()
        seen = node.inputs[0] if node is not None and node.op_type in _VIEWS and node.domain in ("", "ai.onnx") else None
    return False
