"""Fuses activation functions that exporters write in parts into whole operators.

    Before:  x ─ Div(√2) ─ Erf ─ Add(1) ─ Mul(x) ─ Mul(½) ─► y
    After:   x ─ Gelu ─► y

The forms, in whatever order their factors and constants stand:

1.  Gelu: x·½(1 + erf(x/√2)), and `approximate="tanh"`: x·½(1 + tanh(√(2/π)(x + 0.044715x³))) or the same by σ (Hendrycks & Gimpel 2016).
2.  x·σ(αx): Swish(alpha) from opset 24 on, which brought it. Before, it is two operators in one order, Mul(x, Sigmoid(x)), for α = 1
    (SiLU), and three, Mul(x, Sigmoid(Mul(x, α))), for others (QuickGELU: α = 1.702).
3.  HardSigmoid: clip(αx + ½, 0, 1), and HardSwish: x·clip(x/6 + ½, 0, 1), by Clip, Min, Max or Relu (Howard et al. 2019, "MobileNetV3").
4.  Mish: x·tanh(softplus(x)) (Misra 2019); Softplus: log(1 + eˣ), max(x, 0) + log(1 + e⁻ˡˣˡ), and the threshold that PyTorch sets it;
    Sigmoid: 1/(1 + e⁻ˣ).
5.  LeakyRelu: max(x, αx) and x > 0 ? x : αx; PRelu: relu(x) − α·relu(−x) with a constant α.

Constants must be equal to these but for rounding. What is read elsewhere too stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import (
    FIRST_OPSET,
    FLOATS,
    affine,
    close,
    either_order,
    insert,
    is_zero,
    made_by,
    operands,
    opset,
    polynomial,
    product,
    region,
    replace,
    same_rank,
    scalar,
    take_over,
)

_SWISH_OPSET = 24
_TANH_LINEAR, _TANH_CUBIC = math.sqrt(2 / math.pi), 0.044715 * math.sqrt(2 / math.pi)
_SOFTPLUS_THRESHOLD = 18.0
"""From here on softplus(x) − x < 1.6e-8, which is below the precision of float32."""

_Attributes = dict[str, int | float | str]


def fuse_activations(model: ir.Model) -> int:
    """Replaces decomposed activations of the main graph by whole operators, in place; returns how many were made or put in order.

    Expects shapes to be inferred and constants to be folded. Nothing happens below opset 23.
    """
    if opset(model) < FIRST_OPSET:
        return 0
    editor = GraphEditor(model)
    count = 0
    for node in list(model.graph):
        if node.graph is None or node.domain != "" or node.op_type not in _FUSERS or node.outputs[0].dtype not in FLOATS:
            continue
        count += any(fuse(node, editor, opset(model)) for fuse in _FUSERS[node.op_type])
    return count


def _fuse(editor: GraphEditor, root: ir.Node, x: ir.Value, op_type: str, attributes: _Attributes | None = None) -> bool:
    """Puts `op_type` of `x` in the place of what `root` ends, unless something else reads of it; True when it did."""
    nodes = region(root, [x])
    if nodes is None or not same_rank(root.outputs[0], x):
        return False
    replace(editor, root, nodes, op_type, [x], attributes)
    return True


def _gelu(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    whole = product(root)
    if len(whole.factors) != 2 or whole.divisors:
        return False
    for x, gate in (whole.factors, whole.factors[::-1]):
        scale, shift, inner = affine(gate)
        node = made_by(inner, "Erf", "Tanh", "Sigmoid")
        argument = polynomial(operands(node)[0], x, 3) if node is not None else None
        if node is None or argument is None or not is_zero(argument[0]) or not is_zero(argument[2]):
            continue
        sign = math.copysign(1.0, argument[1])  # all three are odd functions but for a shift
        linear, cubic = sign * argument[1], sign * argument[3]
        scale, shift = whole.scale * scale, whole.scale * shift
        if node.op_type == "Sigmoid":  # σ(2u) = ½(1 + tanh u)
            linear, cubic, scale, shift = linear / 2, cubic / 2, scale / 2, shift + scale / 2
        if not (close(sign * scale, 0.5, x) and close(shift, 0.5, x)):
            continue
        if node.op_type == "Erf" and close(linear, math.sqrt(0.5), x) and is_zero(cubic):
            return _fuse(editor, root, x, "Gelu", {"approximate": "none"})
        if node.op_type != "Erf" and close(linear, _TANH_LINEAR, x) and close(cubic, _TANH_CUBIC, x) and not is_zero(cubic):
            return _fuse(editor, root, x, "Gelu", {"approximate": "tanh"})
    return False


def _swish(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    """x·σ(αx), or x/(1 + e^(−αx))."""
    whole = product(root)
    if whole.scale != 1:
        return False
    alpha = None
    if len(whole.factors) == 2 and not whole.divisors:
        for x, gate in (whole.factors, whole.factors[::-1]):
            node = made_by(gate, "Sigmoid")
            alpha = _slope(operands(node)[0], x, 1.0) if node is not None else None
            if alpha is not None:
                break
    elif len(whole.factors) == len(whole.divisors) == 1:
        x = whole.factors[0]
        alpha = _exponential_slope(whole.divisors[0], x)
    if alpha is None or _is_ordered(root, x, version):
        return False
    nodes = region(root, [x])
    if nodes is None or not same_rank(root.outputs[0], x):
        return False
    alpha = next((known for known in (1.0, 1.702) if close(alpha, known, x)), alpha)
    if version >= _SWISH_OPSET:
        replace(editor, root, nodes, "Swish", [x], {"alpha": alpha})
        return True
    argument = x
    if alpha != 1:
        array = np.array(alpha, dtype=x.dtype.numpy() if x.dtype is not None else np.float32)
        factor = editor.add_initializer(f"{root.name}.alpha", array)
        argument = insert(editor, root, [root, *nodes], "Mul", [x, factor], x.shape).outputs[0]
    gate = insert(editor, root, [root, *nodes], "Sigmoid", [argument], x.shape).outputs[0]
    replace(editor, root, nodes, "Mul", [x, gate])
    return True


def _is_ordered(root: ir.Node, x: ir.Value, version: int) -> bool:
    """True for the form of x·σ(αx) that is kept below opset 24."""
    gate = made_by(root.inputs[1], "Sigmoid") if root.op_type == "Mul" and root.inputs[0] is x and version < _SWISH_OPSET else None
    if gate is None:
        return False
    argument = operands(gate)[0]
    scale = made_by(argument, "Mul")
    return argument is x or (scale is not None and scale.inputs[0] is x and scalar(scale.inputs[1]) is not None)


def _slope(value: ir.Value, x: ir.Value, sign: float) -> float | None:
    """Returns α when `value` is sign·α·x with α > 0."""
    found = polynomial(value, x, 1)
    return float(sign * found[1]) if found is not None and is_zero(found[0]) and sign * found[1] > 0 else None


def _exponential_slope(value: ir.Value, x: ir.Value) -> float | None:
    """Returns α when `value` is 1 + e^(−αx) with α > 0."""
    scale, shift, inner = affine(value)
    node = made_by(inner, "Exp")
    return _slope(operands(node)[0], x, -1.0) if node is not None and scale == 1 and shift == 1 else None


def _sigmoid(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    """1/(1 + e⁻ˣ)."""
    whole = product(root)
    if whole.scale != 1 or whole.factors or len(whole.divisors) != 1:
        return False
    scale, shift, inner = affine(whole.divisors[0])
    node = made_by(inner, "Exp")
    if node is None or scale != 1 or shift != 1:
        return False
    minus = operands(node)[0]
    slope, offset, x = affine(minus)
    return slope == -1 and offset == 0 and _fuse(editor, root, x, "Sigmoid")


@dataclass(frozen=True)
class _Clamp:
    """A value as min(max(slope · inner + offset, low), high)."""

    inner: ir.Value
    slope: float
    offset: float
    low: float
    high: float


def _clamp(value: ir.Value) -> _Clamp | None:
    """Reads a HardSigmoid, or a chain of Clip, Relu, Min and Max with numbers, of which nothing but the last is read elsewhere."""
    hard = made_by(value, "HardSigmoid")
    if hard is not None:
        slope, offset = hard.attributes.get_float("alpha", 0.2), hard.attributes.get_float("beta", 0.5)
        return _Clamp(operands(hard)[0], slope, offset, 0.0, 1.0)
    low, high = -math.inf, math.inf
    first = value
    while (node := value.producer()) is not None and node.domain == "" and (value is first or is_used_once(value)):
        bounds = _bounds(node)
        if bounds is None:
            break
        value, below, above = bounds
        low, high = max(low, min(high, below)), max(low, min(high, above))
    if value is first:
        return None
    slope, offset, inner = affine(value)
    return _Clamp(inner, slope, offset, low, high)


def _bounds(node: ir.Node) -> tuple[ir.Value, float, float] | None:
    """Returns the data and the bounds of one node that clips."""
    if node.op_type == "Relu" and node.inputs[0] is not None:
        return node.inputs[0], 0.0, math.inf
    if node.op_type == "Clip" and node.inputs[0] is not None:
        low, high = (scalar(value) if value is not None else default for value, default in
                     zip((*node.inputs[1:], None, None)[:2], (-math.inf, math.inf), strict=True))  # fmt: skip
        return (node.inputs[0], low, high) if low is not None and high is not None and low <= high else None
    if node.op_type in ("Min", "Max"):
        for data, other in either_order(node):
            bound = scalar(other)
            if bound is not None:
                return (data, -math.inf, bound) if node.op_type == "Min" else (data, bound, math.inf)
    return None


def _hard_swish(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    whole = product(root)
    if len(whole.factors) != 2 or whole.divisors:
        return False
    for x, gate in (whole.factors, whole.factors[::-1]):
        found = _clamp(gate)
        if found is None or found.inner is not x or not _is_unit(found, whole.scale, x):
            continue
        if close(whole.scale * found.slope, 1 / 6, x):
            return _fuse(editor, root, x, "HardSwish")
    return False


def _hard_sigmoid(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    scale, value = 1.0, root.outputs[0]
    if root.op_type in ("Mul", "Div"):
        whole = product(root)
        if len(whole.factors) != 1 or whole.divisors:
            return False
        scale, value = whole.scale, whole.factors[0]
    found = _clamp(value)
    if found is None or made_by(value, "HardSigmoid") is not None or not _is_unit(found, scale, found.inner):
        return False
    alpha = scale * found.slope
    alpha = next((known for known in (1 / 6, 0.2) if close(alpha, known, found.inner)), alpha)
    return alpha > 0 and _fuse(editor, root, found.inner, "HardSigmoid", {"alpha": alpha, "beta": 0.5})


def _is_unit(clamp: _Clamp, scale: float, x: ir.Value) -> bool:
    """True when scale · clamp runs from 0 to 1 and is ½ at 0: a hard sigmoid, and no clipping of values that are meant as they are."""
    if not math.isfinite(clamp.low) or not math.isfinite(clamp.high):
        return False
    return is_zero(scale * clamp.low) and close(scale * clamp.high, 1.0, x) and close(scale * clamp.offset, 0.5, x)


def _mish(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    whole = product(root)
    if whole.scale != 1 or len(whole.factors) != 2 or whole.divisors:
        return False
    for x, gate in (whole.factors, whole.factors[::-1]):
        tanh = made_by(gate, "Tanh")
        softplus = made_by(operands(tanh)[0], "Softplus") if tanh is not None else None
        if softplus is not None and softplus.inputs[0] is x:
            return _fuse(editor, root, x, "Mish")
    return False


def _softplus(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    """log(1 + eˣ)."""
    scale, shift, inner = affine(operands(root)[0])
    exponential = made_by(inner, "Exp")
    return exponential is not None and scale == 1 and shift == 1 and _fuse(editor, root, operands(exponential)[0], "Softplus")


def _stable_softplus(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    """max(x, 0) + softplus(−|x|)."""
    for positive, rest in either_order(root):
        softplus = made_by(rest, "Softplus")
        minus = made_by(operands(softplus)[0], "Neg") if softplus is not None else None
        absolute = made_by(operands(minus)[0], "Abs") if minus is not None else None
        producer = positive.producer()
        bounds = _bounds(producer) if producer is not None and producer.domain == "" else None
        if absolute is not None and bounds == (absolute.inputs[0], 0.0, math.inf):
            return _fuse(editor, root, bounds[0], "Softplus")
    return False


def _softplus_threshold(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    """βx > 20 ? x : softplus(βx)/β, where the second branch is as good for every x."""
    condition, x, smooth = operands(root)
    greater = made_by(condition, "Greater", "GreaterOrEqual")
    if greater is None or not same_rank(root.outputs[0], x):
        return False
    tested, threshold = operands(greater)[0], scalar(greater.inputs[1])
    scale, shift, inner = affine(smooth)
    softplus = made_by(inner, "Softplus")
    beta = _slope(tested, x, 1.0)
    if softplus is None or threshold is None or threshold < _SOFTPLUS_THRESHOLD or beta is None or shift != 0:
        return False
    if _slope(operands(softplus)[0], x, 1.0) != beta or not close(scale * beta, 1.0, x):
        return False
    if beta == 1:
        return _fuse(editor, root, x, "Softplus")
    if smooth.is_graph_output() or not is_used_once(smooth):
        return False
    take_over(editor, root.outputs[0], smooth)
    editor.remove([root])
    if not condition.uses() and not condition.is_graph_output():
        editor.remove([greater])
    return True


def _leaky_relu(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    """max(x, αx) with 0 < α < 1."""
    for x, scaled in either_order(root):
        alpha = _slope(scaled, x, 1.0) if scaled is not x else None
        if alpha is not None and alpha < 1:
            return _fuse(editor, root, x, "LeakyRelu", {"alpha": alpha})
    return False


def _chosen_leaky_relu(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    """x > 0 ? x : αx, or the same by x < 0."""
    condition, first, second = operands(root)
    test = made_by(condition, "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
    if test is None or scalar(test.inputs[1]) != 0:
        return False
    x, scaled = (first, second) if test.op_type.startswith("Greater") else (second, first)
    slope = polynomial(scaled, x, 1) if test.inputs[0] is x and scaled is not x else None
    if slope is None or not is_zero(slope[0]) or slope[1] == 0:
        return False
    return _fuse(editor, root, x, "LeakyRelu", {"alpha": float(slope[1])})


def _prelu(root: ir.Node, editor: GraphEditor, version: int) -> bool:
    """relu(x) − α·relu(−x): LeakyRelu for one number α, PRelu for an array."""
    pairs = either_order(root) if root.op_type == "Add" else iter([operands(root)])
    for positive, negative in pairs:
        relu, last = made_by(positive, "Relu"), made_by(negative, "Mul", "Div", "Neg")
        if relu is None or last is None or not is_used_once(negative):
            continue
        x, whole = operands(relu)[0], product(last)
        arrays = [value for value in whole.factors if constant_array(value) is not None]
        rest = [value for value in whole.factors if constant_array(value) is None]
        mirrored = made_by(rest[0], "Relu") if len(rest) == 1 and len(arrays) < 2 and not whole.divisors else None
        if mirrored is None or _slope(operands(mirrored)[0], x, -1.0) != 1:
            continue
        alpha = whole.scale if root.op_type == "Sub" else -whole.scale
        if not arrays:
            return _fuse(editor, root, x, "LeakyRelu", {"alpha": alpha})
        nodes = region(root, [x])
        if nodes is None or not same_rank(root.outputs[0], x) or root.outputs[0].shape != x.shape:
            return False
        slope = constant_array(arrays[0])
        assert slope is not None
        made = replace(editor, root, nodes, "PRelu", [x, arrays[0]]) if alpha == 1 else None
        if made is None:
            weight = editor.add_initializer(f"{root.name}.slope", (slope * alpha).astype(slope.dtype), made_from=[arrays[0]])
            replace(editor, root, nodes, "PRelu", [x, weight])
        return True
    return False


_Fuser = Callable[[ir.Node, GraphEditor, int], bool]
_FUSERS: dict[str, tuple[_Fuser, ...]] = {
    "Add": (_stable_softplus, _prelu),
    "Clip": (_hard_sigmoid,),
    "Div": (_gelu, _swish, _hard_swish, _hard_sigmoid, _mish, _sigmoid),
    "Log": (_softplus,),
    "Max": (_leaky_relu, _hard_sigmoid),
    "Min": (_hard_sigmoid,),
    "Mul": (_gelu, _swish, _hard_swish, _hard_sigmoid, _mish),
    "Reciprocal": (_sigmoid,),
    "Relu": (_hard_sigmoid,),
    "Sub": (_prelu,),
    "Where": (_softplus_threshold, _chosen_leaky_relu),
}
"""By the operator that ends a form, what it may be the end of."""
