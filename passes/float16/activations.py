"""Activations whose exponentials or cubes float16 does not hold although their results fit.

Above some c each of them is x but for less than float32 can tell, so it is computed below c only:

- softplus(x) = max(x, 0) + log(1 + exp(−|x|)), which holds everywhere;
- Mish(x) = Mish(min(x, 10)) + max(x − 10, 0): 1 − tanh(softplus(10)) = 4e-9;
- GELU of the tanh form = GELU(clip(x, ±10)) + max(x − 10, 0): its tanh is ±1 beyond ±10.

The whole operators stay whole. Source: Blanchard et al. 2021, "Accurately computing the log-sum-exp and softmax functions"; Misra 2019
("Mish"), equation 1; Hendrycks & Gimpel 2016 ("GELU"), section 2.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgekit.graph.fusions.matching import either_order, made_by, operands, polynomial, region, scalar
from edgekit.graph.ranges import OVERFLOW
from edgekit.passes.float16.places import Places

_CUT = 10.0
_SATURATED = 10.0
"""tanh(10) is 1 in float32."""


def stabilize_activations(places: Places) -> int:
    """Rewrites what overflows; returns at how many places."""
    return _softplus(places) + _mish(places) + _gelu(places) + _tanh_of_cubic(places)


def _softplus(places: Places) -> int:
    """Whole, where its exponential overflows; written out as log(1 + exp(x)), there and wherever no range is known."""
    count = 0
    for node in places.nodes("Softplus", "Log"):
        nodes: list[ir.Node] | None = [node]
        x, power = node.inputs[0], places.inside(node, "exp")
        if node.op_type == "Log":
            x, powers = _exponent(node)
            nodes = region(node, [x]) if x is not None else None
            power = places.largest(powers) if places.measured else OVERFLOW
        if x is None or nodes is None or power < OVERFLOW or not places.fits(x):
            continue
        below = places.add(node, "Softplus", [places.add(node, "Neg", [places.add(node, "Abs", [x])])])
        places.put(node, nodes, "Add", [places.add(node, "Relu", [x]), below])
        count += 1
    return count


def _exponent(log: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Reads log(1 + exp(x)); returns x and the exponential."""
    total = made_by(log.inputs[0], "Add")
    for powers, one in either_order(total) if total is not None else ():
        exp = made_by(powers, "Exp")
        if exp is not None and scalar(one) == 1:
            return exp.inputs[0], powers
    return None, None


def _mish(places: Places) -> int:
    count = 0
    for node in places.nodes("Mish"):
        x = node.inputs[0]
        if x is not None and places.inside(node, "exp", "exp_and_one") >= OVERFLOW and places.fits(x):
            _split(places, node, x, places.add(node, "Min", [x, places.number(x, _CUT)]))
            count += 1
    return count


def _gelu(places: Places) -> int:
    count = 0
    for node in places.nodes("Gelu"):
        x = node.inputs[0]
        if x is not None and places.inside(node, "square", "cube", "cubic", "polynomial", "argument") >= OVERFLOW and places.fits(x):
            _split(places, node, x, places.add(node, "Clip", [x, places.number(x, -_CUT), places.number(x, _CUT)]))
            count += 1
    return count


def _split(places: Places, node: ir.Node, x: ir.Value, inner: ir.Value) -> None:
    """f(x) = f(inner) + max(x − 10, 0)."""
    above = places.add(node, "Relu", [places.add(node, "Sub", [x, places.number(x, _CUT)])])
    places.put(node, [node], "Add", [places.copy(node, [inner]), above])


def _tanh_of_cubic(places: Places) -> int:
    """tanh(a·x + b·x³) with a, b >= 0, as GELU is written out: it is ±1 from ±10 on, so x may be clipped there."""
    count = 0
    for node in places.nodes("Tanh"):
        for x in _leaves(node.inputs[0]):
            found = polynomial(node.inputs[0], x, 3) if node.inputs[0] is not None else None
            nodes = region(node, [x]) if found is not None else None
            if found is None or nodes is None or not _saturates(found) or not places.handled.isdisjoint(nodes) or not places.fits(x):
                continue
            if all(places.fits(inner.outputs[0]) for inner in nodes):
                break
            readers = [reader for reader in places.model.graph if reader in set(nodes) and x in reader.inputs]
            clipped = places.add(readers[0], "Clip", [x, places.number(x, -_CUT), places.number(x, _CUT)])
            for reader in readers:
                for index, value in enumerate(reader.inputs):
                    if value is x:
                        reader.replace_input_with(index, clipped)
            places.handled.update(nodes)
            places.context.applied(node.name or node.op_type)
            count += 1
            break
    return count


def _saturates(coefficients: np.ndarray) -> bool:
    even = coefficients[0] == coefficients[2] == 0
    return bool(even and coefficients[1] >= 0 and coefficients[3] > 0 and np.polyval(coefficients[::-1], _CUT) >= _SATURATED)


def _leaves(value: ir.Value | None) -> list[ir.Value]:
    """What a polynomial may be of: the values that its products, sums and powers read."""
    found: dict[ir.Value, None] = {}
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        node = made_by(item, "Add", "Mul", "Pow", "Div", "Sub") if depth < 6 else None
        for operand in operands(node) if node is not None else ():
            if scalar(operand) is None and operand not in found:
                found[operand] = None
                stack.append((operand, depth + 1))
    return list(found)
