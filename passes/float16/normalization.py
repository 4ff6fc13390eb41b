"""Layer, RMS, instance, group and Lp norms whose sums or squares float16 does not hold: the norm of s·x with ε·s² is that of x with ε.

Where ε·s² would be zero in float16, rows of equal numbers would be divided by zero. If every variance of the calibration data is so large
that 2^-24, the smallest float16 number, is below its rounding in float32, then 2^-24 takes the place of ε·s².
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.fusions.matching import made_by, operands, region, scalar
from edgekit.graph.fusions.normalization_read import Normalized, read_normalized
from edgekit.graph.ranges import FLOAT16_MAX, OVERFLOW, VANISH
from edgekit.passes.float16.places import LIMIT, Places, power_below

_WHOLE = ("LayerNormalization", "RMSNormalization", "InstanceNormalization", "GroupNormalization", "LpNormalization")
_FIRST_DEGREE = ("sum", "mean", "centred")
_SECOND_DEGREE = ("square", "sum_of_squares", "variance", "variance_and_epsilon")
_SMALLEST = 2.0**-24
"""The smallest float16 number."""
_ROUNDING = 2.0**-23
"""Of the variance; of its root, half of that: half a unit in the last place of float32."""


def stabilize_norms(places: Places) -> int:
    """Scales the inputs of norms by powers of two; returns how many."""
    return _whole_norms(places) + _decomposed_norms(places)


def choose_scale(first: float, second: float, epsilon: float) -> float:
    """The power of two by which the input of a norm is to be scaled; 1 where nothing is to be done.

    As little as possible, so that small values keep their digits and ε does not become zero: ε is worth more than headroom.

    Args:
        first: Largest magnitude of the values that grow with the input.
        second: Largest magnitude of those that grow with its square.
        epsilon: What is added to the variance; 0: nothing.
    """

    def most(limit: float) -> float:
        by_first = limit / first if first else math.inf
        by_second = math.sqrt(limit / second) if second else math.inf
        return power_below(min(by_first, by_second, 2.0**100))

    if max(first, second) >= OVERFLOW:
        for limit in (LIMIT, FLOAT16_MAX):
            scale = min(1.0, most(limit))
            if epsilon == 0 or epsilon * scale**2 > VANISH:
                return scale
        return min(1.0, most(LIMIT))
    if 0 < epsilon <= VANISH:
        needed = 2.0 ** math.ceil(math.log2(math.sqrt(_SMALLEST / epsilon)))
        return needed if needed <= most(LIMIT) else 1.0
    return 1.0


def _whole_norms(places: Places) -> int:
    count = 0
    for node in places.nodes(*_WHOLE):
        x = node.inputs[0]
        if x is None or not places.fits(x) or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            continue
        has_epsilon = node.op_type != "LpNormalization"
        epsilon = node.attributes.get_float("epsilon", 1e-5) if has_epsilon else 0.0
        scale = choose_scale(places.inside(node, *_FIRST_DEGREE), places.inside(node, *_SECOND_DEGREE), epsilon)
        if scale == 1:
            continue
        node.replace_input_with(0, places.scaled(node, x, scale))
        if has_epsilon:
            scaled = _scaled_epsilon(places, node, epsilon, scale, places.smallest_inside(node, "variance_and_epsilon"))
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", scaled)
        places.handled.add(node)
        places.context.applied(node.name or node.op_type)
        count += 1
    return count


@dataclass(frozen=True)
class _Moment:
    """The variance of a decomposed norm: the nodes that add ε, take the mean, and square."""

    add: ir.Node
    mean: ir.Node
    square: ir.Node


def _decomposed_norms(places: Places) -> int:
    count = 0
    for root in places.nodes("Div", "Mul", "Add", "Sub"):
        found = read_normalized(root)
        nodes = region(found.root, [found.source]) if found is not None else None
        moment = _moment(nodes, found.epsilon) if found is not None and nodes is not None else None
        if found is None or nodes is None or moment is None or not places.handled.isdisjoint(nodes) or not places.fits(found.source):
            continue
        second = max(
            places.largest(moment.square.outputs[0]),
            places.largest(moment.mean.outputs[0]),
            places.largest(moment.add.outputs[0]),
            places.inside(moment.mean, "sum"),
        )
        scale = choose_scale(_first_degree(places, nodes, moment), second, found.epsilon)
        if scale == 1:
            continue
        epsilon = _scaled_epsilon(places, root, found.epsilon, scale, places.smallest(moment.add.outputs[0]))
        _rescale(places, nodes, found, moment, scale, epsilon)
        places.handled.update(nodes)
        places.context.applied(root.name or root.op_type)
        count += 1
    return count


def _moment(nodes: Sequence[ir.Node], epsilon: float) -> _Moment | None:
    for node in nodes:
        if node.op_type != "Add" or epsilon not in (scalar(value) for value in operands(node)):
            continue
        means = [made_by(value, "ReduceMean") or _reduced(value) for value in operands(node)]
        mean = next((mean for mean in means if mean is not None), None)
        square = mean.inputs[0].producer() if mean is not None and mean.inputs[0] is not None else None
        if mean is not None and square is not None:
            return _Moment(node, mean, square)
    return None


def _reduced(value: ir.Value) -> ir.Node | None:
    """A ReduceMean whose optional axes are left out."""
    node = value.producer()
    return node if node is not None and node.op_type == "ReduceMean" and node.domain == "" else None


def _first_degree(places: Places, nodes: Sequence[ir.Node], moment: _Moment) -> float:
    """The largest magnitude of what is computed on the way to the square."""
    largest, stack, inner = 0.0, [moment.square], set(nodes)
    while stack:
        for value in stack.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer in inner:
                largest = max(largest, places.largest(value), places.inside(producer, "sum", "mean"))
                stack.append(producer)
    return largest


def _rescale(places: Places, nodes: Sequence[ir.Node], found: Normalized, moment: _Moment, scale: float, epsilon: float) -> None:
    readers = [node for node in places.model.graph if node in set(nodes) and found.source in node.inputs]
    scaled = places.scaled(readers[0], found.source, scale)
    for reader in readers:
        for index, value in enumerate(reader.inputs):
            if value is found.source:
                reader.replace_input_with(index, scaled)
    index = next(i for i, value in enumerate(moment.add.inputs) if constant_array(value) is not None)
    array = constant_array(moment.add.inputs[index])
    assert array is not None
    places.editor.set_constant(moment.add, index, np.full_like(array, epsilon))


def _scaled_epsilon(places: Places, node: ir.Node, epsilon: float, scale: float, smallest: float) -> float:
    """ε·s², or 2^-24 where float16 holds only that and float32 cannot tell; `smallest` is the least of variance + ε."""
    scaled = epsilon * scale**2
    if scaled > VANISH or epsilon == 0:
        return scaled
    if _ROUNDING * smallest * scale**2 >= _SMALLEST:
        return _SMALLEST
    name = node.name or node.op_type
    places.context.refuse(
        name,
        f"its ε becomes {scaled:.1e}, zero in float16: rows of equal numbers are divided by zero where a kernel keeps ε in float16; "
        f'if there are such rows, to-float16{{keep=["{name}"]}}',
    )
    return scaled
