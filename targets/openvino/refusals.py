"""What OpenVINO converts without complaint and then computes wrongly (measured on OpenVINO 2026.4.1, CPU).

The table was made by running the ONNX node tests, and a few hundred combinations of options, through OpenVINO and through ONNX Runtime.
`legalize` mends what it can; the rest is refused here, so that nothing is silently wrong. Known and not refused, since no graph shows it:
a NaN that reaches Relu, Max, Min, Clip or a cast to bool becomes a number; ReduceMax over nothing but -inf gives the lowest float32;
infinities of float64 intermediates become the largest float32; sums of int32 beyond its range saturate; QuantizeLinear and
DynamicQuantizeLinear round exact ties up or down by one level where the zero point is odd; NonMaxSuppression suppresses a box whose
overlap equals the threshold; Resize with align_corners and scales that give fractional sizes goes by the sizes (as ONNX Runtime does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.errors import UnsupportedOpError
from edgekit.graph.shapes import static_shape
from edgekit.targets.openvino.legalize import causal_is_misplaced

MAX_OPSET = 26
"""The newest opset whose operators were compared; OpenVINO ignores attributes that it does not know without a word."""

_EIGHT_BITS = (ir.DataType.INT8, ir.DataType.UINT8)
_WIDE_INTEGERS = (ir.DataType.INT64, ir.DataType.UINT64, ir.DataType.UINT32)
_PORTABLE = {
    ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BOOL,
    ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
}  # fmt: skip
_BORDER = {ir.DataType.DOUBLE: "float64 would be computed in float32"}
_SATURATING = {"Slice", "Clip"}
"""Operators for which a bound beyond int32 means the same as the largest int32."""


@dataclass(frozen=True)
class _Rule:
    """One reason to refuse an operator: where `applies`, OpenVINO's values are wrong as `reason` says."""

    applies: Callable[[ir.Node], bool]
    reason: str


def refuse_wrong_operators(model: ir.Model) -> None:
    """Refuses a graph that OpenVINO would compute wrongly. Shapes and dtypes must have been inferred.

    Raises:
        UnsupportedOpError: Names the operators, each with the node and the reason.
    """
    opset = model.graph.opset_imports.get("", 0)
    if opset > MAX_OPSET:
        raise UnsupportedOpError(
            f"OpenVINO reads ONNX up to opset {MAX_OPSET}; this graph is of opset {opset}",
            where=f"graph '{model.graph.name}'",
            fix=f"export the model with opset_version={MAX_OPSET} or lower",
        )
    found = [*_interface(model.graph), *_operators(model.graph.all_nodes()), *_constants(model)]
    if not found:
        return
    names = sorted({op_type for op_type, _, _ in found})
    reasons = "; ".join(dict.fromkeys(reason for *_, reason in found))
    places = [place for _, place, _ in found]
    raise UnsupportedOpError(
        f"OpenVINO would compute wrong values for: {', '.join(names)}. {reasons}",
        where="; ".join(places[:5]) + (f"; and {len(places) - 5} more" if len(places) > 5 else ""),
        fix="express it with other operators, or compile for --target onnxruntime",
    )


def _operators(nodes: Iterable[ir.Node]) -> Iterator[tuple[str, str, str]]:
    for node in nodes:
        for rule in _RULES.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ():
            if rule.applies(node):
                yield node.op_type, f"node '{node.name or node.outputs[0].name}' ({node.op_type})", rule.reason


def _interface(graph: ir.Graph) -> Iterator[tuple[str, str, str]]:
    for kind, values in (("input", graph.inputs), ("output", graph.outputs)):
        for value in values:
            if value.dtype is not None and value.dtype not in _PORTABLE:
                yield (
                    str(value.dtype),
                    f"{kind} '{value.name}'",
                    _BORDER.get(value.dtype, f"{value.dtype} cannot be given as a numpy array"),
                )


def _constants(model: ir.Model) -> Iterator[tuple[str, str, str]]:
    """Yields consumers of integer constants beyond int32: the CPU plugin computes 64-bit integers in 32 bits."""
    for graph in model.graphs():
        produced = (node.outputs[0] for node in graph if node.op_type == "Constant" and node.domain == "")
        for value in (*graph.initializers.values(), *produced):
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is None or tensor.dtype not in _WIDE_INTEGERS or tensor.size == 0 or fits_int32(tensor.numpy()):
                continue
            for node in value.consumers():
                if node.op_type not in _SATURATING:
                    where = f"node '{node.name or node.outputs[0].name}' ({node.op_type})"
                    yield node.op_type, where, f"constant '{value.name}' exceeds 32 bits, and OpenVINO's CPU plugin computes integers in 32"


def fits_int32(array: np.ndarray) -> bool:
    """Whether all values of an integer array can be represented in int32."""
    limits = np.iinfo(np.int32)
    return array.size == 0 or (int(array.min()) >= limits.min and int(array.max()) <= limits.max)


def _int(name: str, value: int, default: int = 0) -> Callable[[ir.Node], bool]:
    return lambda node: node.attributes.get_int(name, default) == value


def _string(name: str, value: str) -> Callable[[ir.Node], bool]:
    return lambda node: node.attributes.get_string(name) == value


def _has_input(index: int) -> Callable[[ir.Node], bool]:
    return lambda node: index < len(node.inputs) and node.inputs[index] is not None


def _has_output(index: int) -> Callable[[ir.Node], bool]:
    return lambda node: index < len(node.outputs) and bool(node.outputs[index].name)


def _eight_bit(node: ir.Node) -> bool:
    return any(value is not None and value.dtype in _EIGHT_BITS for value in node.inputs)


def _integer(node: ir.Node) -> bool:
    value = node.inputs[0]
    return value is not None and value.dtype is not None and value.dtype.is_integer()


def _ignored_reduction(node: ir.Node) -> bool:
    return bool(node.attributes.get_int("noop_with_empty_axes", 0)) and not _has_input(1)(node)


def _empty(node: ir.Node) -> bool:
    shape = static_shape(node.inputs[0])
    return shape is not None and 0 in shape


def _interpolates(node: ir.Node) -> bool:
    return node.attributes.get_string("mode", "nearest") != "nearest"


def _cubic_off_the_last_axes(node: ir.Node) -> bool:
    before, after = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if node.attributes.get_string("mode", "nearest") != "cubic":
        return False
    return before is None or after is None or before[:-2] != after[:-2]


def _keeps_aspect_ratio(node: ir.Node) -> bool:
    return node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch"


def _windowed(node: ir.Node) -> bool:
    return any(node.attributes.get_int(name, -1) != -1 for name in ("left_window_size", "right_window_size"))


_WRAPS = _Rule(_eight_bit, "8-bit integer arithmetic saturates instead of wrapping around")
_BATCH_FIRST = _Rule(_int("layout", 1), "layout=1 (batch first) is ignored")
_NO_REDUCTION = _Rule(_ignored_reduction, "noop_with_empty_axes skips the function as well as the reduction")
_INTEGER_LOG = _Rule(_integer, "integer inputs are rounded before the logarithm, not truncated after it")
_EMPTY = _Rule(_empty, "the extremum of nothing is the largest finite float32, not infinity")

_RULES: dict[str, tuple[_Rule, ...]] = {
    "Abs": (_WRAPS,),
    "Add": (_WRAPS,),
    "Attention": (
        _Rule(causal_is_misplaced, "is_causal with a past of unknown shape is misplaced"),
        _Rule(_windowed, "left_window_size and right_window_size are ignored"),
    ),
    "AveragePool": (_Rule(_int("ceil_mode", 1), "ceil_mode with auto_pad or unknown shapes gives other windows"),),
    "BitShift": (
        _Rule(lambda node: _eight_bit(node) and node.attributes.get_string("direction", "") == "LEFT", "8-bit shifts to the left saturate"),
    ),
    "ConvTranspose": (
        _Rule(
            _string("auto_pad", "SAME_UPPER"),
            "auto_pad=SAME_UPPER with unknown shapes pads the wrong side",
        ),
    ),
    "DFT": (_Rule(lambda node: True, "the axis input is ignored, and one-sided and inverse transforms have the wrong shape"),),
    "GRU": (_BATCH_FIRST,),
    "LRN": (_Rule(lambda node: node.attributes.get_int("size", 1) % 2 == 0, "an even size is not centred as ONNX defines"),),
    "LSTM": (_BATCH_FIRST, _Rule(_has_input(7), "peephole weights are ignored")),
    "MaxPool": (
        _Rule(_int("ceil_mode", 1), "ceil_mode with auto_pad or unknown shapes gives other windows"),
        _Rule(lambda node: _int("storage_order", 1)(node) and _has_output(1)(node), "column-major indices have the wrong shape"),
    ),
    "Mul": (_WRAPS,),
    "Neg": (_WRAPS,),
    "RNN": (_BATCH_FIRST,),
    "ReduceL1": (_NO_REDUCTION,),
    "ReduceL2": (_NO_REDUCTION,),
    "ReduceLogSum": (_NO_REDUCTION, _INTEGER_LOG),
    "ReduceLogSumExp": (_INTEGER_LOG,),
    "ReduceMax": (_EMPTY,),
    "ReduceMin": (_EMPTY,),
    "Resize": (
        _Rule(_int("antialias", 1), "antialias is ignored"),
        _Rule(
            lambda node: node.attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch",
            "keep_aspect_ratio_policy is ignored",
        ),
        _Rule(lambda node: _interpolates(node) and _int("exclude_outside", 1)(node), "exclude_outside is ignored"),
        _Rule(lambda node: _interpolates(node) and _integer(node), "integers are rounded, not truncated, after interpolation"),
        _Rule(_cubic_off_the_last_axes, "cubic interpolation is right only along the last two axes"),
    ),
    "RoiAlign": (_Rule(_string("mode", "max"), "mode=max takes the maximum of other samples"),),
    "Sub": (_WRAPS,),
}
