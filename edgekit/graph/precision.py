"""The lowest floating-point precision that a graph computes in, which decides how much rounding error is allowed."""

from __future__ import annotations

import onnx_ir as ir

_NAMES = {ir.DataType.DOUBLE: "fp64", ir.DataType.FLOAT: "fp32", ir.DataType.FLOAT16: "fp16", ir.DataType.BFLOAT16: "bf16"}
_ORDER = ("bf16", "fp16", "fp32", "fp64")


def lowest(*precisions: str) -> str:
    """The least precise of some precisions (`bf16` has fewer significant bits than `fp16`)."""
    return min(precisions, key=_ORDER.index)


def graph_precision(model: ir.Model) -> str:
    """The least precise floating-point type among the values of the main graph; `fp32` where there is none."""
    found = {
        _NAMES[value.dtype]
        for node in model.graph
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.dtype in _NAMES
    }
    return lowest(*found) if found else "fp32"
