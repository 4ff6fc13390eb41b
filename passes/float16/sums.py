"""Sums that float16 does not hold although what is made of them fits: means, L2 norms, and products that are scaled down afterwards."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.fusions.matching import made_by, operands, region, scalar, sole_reader
from edgekit.graph.ranges import OVERFLOW
from edgekit.passes.float16.places import Places, power_below, power_for


def stabilize_sums(places: Places) -> int:
    """Scales down before what overflows and up after it; returns at how many places."""
    return _whole(places) + _roots_of_squares(places) + _scaled_afterwards(places)


def _whole(places: Places) -> int:
    """mean(x) = mean(s·x)/s, and so is ‖x‖."""
    count = 0
    for node in places.nodes("ReduceMean", "GlobalAveragePool", "ReduceL2"):
        x, result = node.inputs[0], node.outputs[0]
        first, second = places.inside(node, "sum"), places.inside(node, "square", "sum_of_squares")
        if x is None or max(first, second) < OVERFLOW or not places.fits(x) or not places.fits(result):
            continue
        scale = power_for(max(first, second)) if node.op_type != "ReduceL2" else _root_scale(second)
        rest = [value for value in node.inputs[1:] if value is not None]
        inner = places.copy(node, [places.scaled(node, x, scale), *rest])
        places.put(node, [node], "Mul", [inner, places.number(inner, 1 / scale)])
        count += 1
    return count


def _root_scale(second: float) -> float:
    """The scale for values of which `second` is the square."""
    return min(1.0, power_below(float(np.sqrt(power_for(second)))))


def _roots_of_squares(places: Places) -> int:
    """√Σx² = √Σ(s·x)² / s, where it is written out."""
    count = 0
    for root in places.nodes("Sqrt"):
        (total,) = operands(root) if len(operands(root)) == 1 else (None,)
        reduced = made_by(total, "ReduceSum", "ReduceSumSquare")
        square = made_by(reduced.inputs[0], "Mul", "Pow") if reduced is not None and reduced.op_type == "ReduceSum" else None
        if reduced is None or (reduced.op_type == "ReduceSum" and square is None):
            continue
        x = reduced.inputs[0] if square is None else square.inputs[0]
        if square is not None and not (square.inputs[1] is x if square.op_type == "Mul" else scalar(square.inputs[1]) == 2):
            continue
        chain = region(root, [x]) if x is not None else None
        second = max(places.largest(reduced.outputs[0]), places.largest(reduced.inputs[0]) if square is not None else 0.0)
        if x is None or chain is None or second < OVERFLOW or not places.fits(x) or not places.handled.isdisjoint(chain):
            continue
        scale = _root_scale(second)
        first = square or reduced
        scaled = places.scaled(first, x, scale)
        for index, value in enumerate(first.inputs):
            if value is x:
                first.replace_input_with(index, scaled)
        inner = places.copy(root, operands(root))
        places.put(root, [root], "Mul", [inner, places.number(inner, 1 / scale)])
        places.handled.update(chain)
        count += 1
    return count


def _scaled_afterwards(places: Places) -> int:
    """(x·W)·c = ((s·x)·W)·(c/s): the scale of attention scores, or the count of a mean, moves before the sum by a power of two."""
    count = 0
    for node in places.nodes("MatMul", "ReduceSum"):
        result = node.outputs[0]
        reader = sole_reader(result)
        if reader is None or places.largest(result) < OVERFLOW:
            continue
        after, other = reader
        number, x = constant_array(other), node.inputs[0]
        divides = after.op_type == "Div" and after.inputs[0] is result
        if number is None or number.size != 1 or not (after.op_type == "Mul" or divides) or after in places.handled:
            continue
        if x is None or not places.fits(x) or not places.fits(after.outputs[0]):
            continue
        scale = power_for(places.largest(result))
        node.replace_input_with(0, places.scaled(node, x, scale))
        places.editor.set_constant(after, _index(after, other), np.asarray(number * scale if divides else number / scale, number.dtype))
        places.handled.update((node, after))
        places.context.applied(node.name or node.op_type)
        count += 1
    return count


def _index(node: ir.Node, value: ir.Value) -> int:
    return next(index for index, item in enumerate(node.inputs) if item is value)
