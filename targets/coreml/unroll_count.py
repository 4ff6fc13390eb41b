"""How often a Loop or Scan runs, where that follows from constants and the number of the iteration.

A loop that an exporter wrote for Python's `for` or `while` keeps its counter in the graph: its condition compares numbers that are known
before the model runs. Those few numbers are followed here from iteration to iteration, on arrays of a few elements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.reference.ops
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape

MAX_ITERATIONS = 1000
"""No loop is written out more often."""
_MAX_ELEMENTS = 64
_FOLLOWED = frozenset({
    *("Abs", "Add", "And", "Cast", "Ceil", "Concat", "Equal", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less"),
    *("LessOrEqual", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Reshape", "Squeeze", "Sub", "Unsqueeze", "Where", "Xor"),
})  # fmt: skip
"""Operators of counters and conditions, whose results are exact in any implementation and no larger than a product of their operands."""

Known = dict[ir.Value, np.ndarray | None]


def trip_count(node: ir.Node, opset: int) -> int | None:
    """How many iterations a Loop or Scan has: `MAX_ITERATIONS + 1` for more than that, None where it is not known before the model runs."""
    count = _scan_length(node) if node.op_type == "Scan" else _loop_count(node, opset)
    return None if count is None else min(count, MAX_ITERATIONS + 1)


def _scan_length(node: ir.Node) -> int | None:
    scanned = node.attributes.get_int("num_scan_inputs")
    axes = node.attributes.get_ints("scan_input_axes") or [0] * scanned
    shape = static_shape(node.inputs[len(node.inputs) - scanned])
    return shape[axes[0]] if shape is not None else None


def known_scalar(node: ir.Node, index: int) -> Any:
    """The number that an input is; None where it is computed."""
    array = constant_array(node.inputs[index])
    return array.reshape(-1)[0].item() if array is not None and array.size == 1 else None


def _loop_count(node: ir.Node, opset: int) -> int | None:
    bounded, conditional = node.inputs[0] is not None, node.inputs[1] is not None
    bound = known_scalar(node, 0) if bounded else MAX_ITERATIONS + 1
    condition = known_scalar(node, 1) if conditional else True
    if condition is False:
        return 0
    if bound is None or condition is None:
        return None
    bound = max(0, min(int(bound), MAX_ITERATIONS + 1))
    return _first_stop(node, bound, opset) if conditional else bound  # without the input, the condition that the body gives is ignored


def _first_stop(node: ir.Node, bound: int, opset: int) -> int | None:
    body = node.attributes["body"].as_graph()
    number, going, *carried = body.inputs
    following = dict(zip(carried, body.outputs[1:], strict=False))
    nodes, read = _what_decides(body, following)
    state: Known = {value: constant_array(initial) for value, initial in zip(carried, node.inputs[2:], strict=True) if value in read}
    for iteration in range(bound):
        known: Known = {**state, number: np.asarray(iteration, np.int64), going: np.asarray(True)}
        for inner in nodes:
            _follow(inner, known, opset)
        condition = _array(body.outputs[0], known)
        if condition is None or condition.size != 1:
            return None
        if not condition.reshape(-1)[0]:
            return iteration + 1
        state = {value: _array(following[value], known) for value in state}
    return bound


def _what_decides(body: ir.Graph, following: dict[ir.Value, ir.Value]) -> tuple[list[ir.Node], set[ir.Value]]:
    """The nodes of the body that its condition depends on, in order, and all values that they read or make."""
    read: set[ir.Value] = set()
    nodes: set[ir.Node] = set()
    waiting = [body.outputs[0]]
    while waiting:
        value = waiting.pop()
        if value in read:
            continue
        read.add(value)
        if value in following:
            waiting.append(following[value])
        producer = value.producer()
        if producer is not None and producer.graph is body:
            nodes.add(producer)
            waiting.extend(source for source in producer.inputs if source is not None)
    return [node for node in body if node in nodes], read


def _array(value: ir.Value, known: Known) -> np.ndarray | None:
    array = known[value] if value in known else constant_array(value)
    return array if array is not None and array.size <= _MAX_ELEMENTS else None


def _follow(node: ir.Node, known: Known, opset: int) -> None:
    """Computes the result of a node whose operands are all known."""
    operands = [None if value is None else _array(value, known) for value in node.inputs]
    complete = all(value is None or array is not None for value, array in zip(node.inputs, operands, strict=True))
    if node.domain != "" or node.op_type not in _FOLLOWED or not complete:
        return
    try:
        with np.errstate(all="ignore"):
            attributes = {name: attr.value for name, attr in node.attributes.items()}
            result = onnx.reference.ops.load_op("", node.op_type, opset).eval(*operands, **attributes)
    except Exception:  # the evaluators raise anything on malformed nodes; the loop is then left to the lowering, which refuses it
        return
    known[node.outputs[0]] = np.asarray(result[0] if isinstance(result, tuple) else result)
