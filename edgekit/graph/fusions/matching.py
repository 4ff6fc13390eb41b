"""What the fusions share: reading a pattern backwards from its last node, and putting one node in its place.

Reading changes nothing: functions return what they found, or None. Exporters write one formula in many orders; so scales, shifts and
products are read as numbers (`affine`, `polynomial`, `product`) and not as trees of nodes. A pattern that was read is replaced only when
`region` finds that nothing outside needs its inner values.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, common_module, constant_array, is_used_once
from edgekit.graph.cost import MODULE_KEY

FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
FIRST_OPSET = 23
"""The whole operators are those of this opset; models below it are left alone."""
_MAX_DEPTH = 8


def scalar(value: ir.Value | None) -> float | None:
    """Returns the number in a constant of one element, else None."""
    array = constant_array(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def close(found: float, wanted: float, value: ir.Value) -> bool:
    """True when a constant of the dtype of `value` is `wanted` but for rounding: 1e-5 relative, 1e-3 in float16, 4e-3 in bfloat16.

    1e-5 lets constants pass that people write with five digits (0.70711, 0.79788); against 0 the difference is absolute.
    """
    relative = {ir.DataType.FLOAT16: 1e-3, ir.DataType.BFLOAT16: 4e-3}.get(value.dtype or ir.DataType.FLOAT, 1e-5)
    return abs(found - wanted) <= relative * (abs(wanted) or 1.0)


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Returns the node that makes `value` when it is one of these standard operators and all its inputs are present."""
    node = value.producer() if value is not None else None
    if node is None or node.domain != "" or node.op_type not in op_types or any(operand is None for operand in node.inputs):
        return None
    return node


def operands(node: ir.Node) -> tuple[ir.Value, ...]:
    """Returns the inputs of a node, all of which are present."""
    return tuple(value for value in node.inputs if value is not None)


def either_order(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yields the two inputs of a commutative node in both orders."""
    pair = operands(node)
    if len(pair) == 2:
        yield pair[0], pair[1]
        yield pair[1], pair[0]


def sole_reader(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """Returns the only node that reads `value`, a binary standard operator, and its other operand."""
    if not is_used_once(value):
        return None
    node, index = next(iter(value.uses()))
    if node.domain != "" or len(node.inputs) != 2:
        return None
    other = node.inputs[1 - index]
    return (node, other) if other is not None else None


def is_same(a: ir.Value | None, b: ir.Value | None) -> bool:
    """True when the two are one value, or are made in the same way from the same values (a Sub, a Cast or a mean that is written twice)."""
    if a is b:
        return a is not None
    first, second = a.producer() if a is not None else None, b.producer() if b is not None else None
    if first is None or second is None or first.domain != second.domain or first.op_type != second.op_type:
        return False
    if first.domain != "" or first.op_type not in ("Sub", "Cast", "ReduceMean") or len(first.inputs) != len(second.inputs):
        return False
    if {name: attr.value for name, attr in first.attributes.items()} != {name: attr.value for name, attr in second.attributes.items()}:
        return False
    if first.op_type == "ReduceMean" and len(first.inputs) == 2:
        return is_same(first.inputs[0], second.inputs[0]) and _are_same_axes(first, second)
    return all(is_same(x, y) for x, y in zip(first.inputs, second.inputs, strict=True))


def _are_same_axes(first: ir.Node, second: ir.Node) -> bool:
    """True for constant axes that are the same ones, counted from either end."""
    data, arrays = first.inputs[0], [constant_array(node.inputs[1]) for node in (first, second)]
    if arrays[0] is None or arrays[1] is None or data is None or data.shape is None or not arrays[0].size:
        return False
    rank = len(data.shape)
    return {int(axis) % rank for axis in arrays[0]} == {int(axis) % rank for axis in arrays[1]}


def same_rank(a: ir.Value, b: ir.Value) -> bool:
    """True when both ranks are known and equal: constants of one element did not add axes of length 1."""
    return a.shape is not None and b.shape is not None and len(a.shape) == len(b.shape)


def affine(value: ir.Value) -> tuple[float, float, ir.Value]:
    """Reads `value` as scale · inner + shift, through Add, Sub, Mul, Div and Neg with constant numbers, as far as nothing else reads it."""
    scale, shift = 1.0, 0.0
    while is_used_once(value) and (node := made_by(value, "Add", "Sub", "Mul", "Div", "Neg")) is not None:
        inputs = operands(node)
        if node.op_type == "Neg":
            scale, value = -scale, inputs[0]
            continue
        left, right = scalar(inputs[0]), scalar(inputs[1])
        if (left is None) == (right is None):
            break
        number, inner = (left, inputs[1]) if left is not None else (right, inputs[0])
        assert number is not None
        if node.op_type == "Add":
            shift += scale * number
        elif node.op_type == "Mul":
            scale *= number
        elif node.op_type == "Sub":
            shift += scale * number if left is not None else -scale * number
            scale = -scale if left is not None else scale
        elif left is None and number != 0:
            scale /= number
        else:
            break
        value = inner
    return scale, shift, value


def polynomial(value: ir.Value, x: ir.Value, degree: int, depth: int = _MAX_DEPTH) -> np.ndarray | None:
    """Reads `value` as a polynomial of `x` with constant coefficients; returns these, `[degree + 1]`, lowest first, or None."""
    if value is x:
        return _padded(np.array([0.0, 1.0]), degree)
    number = scalar(value)
    if number is not None:
        return _padded(np.array([number]), degree)
    node = made_by(value, "Add", "Sub", "Mul", "Div", "Neg", "Pow")
    if node is None or depth == 0:
        return None
    inputs = operands(node)
    first = polynomial(inputs[0], x, degree, depth - 1)
    if first is None or node.op_type == "Neg":
        return None if first is None else np.negative(first)
    second = polynomial(inputs[1], x, degree, depth - 1)
    if second is None:
        return None
    if node.op_type in ("Add", "Sub"):
        return np.asarray(first + second if node.op_type == "Add" else first - second)
    if node.op_type == "Mul":
        return _padded(np.polynomial.polynomial.polymul(first, second), degree)
    if second[1:].any():
        return None
    if node.op_type == "Div":
        return np.asarray(first / second[0]) if second[0] != 0 else None
    exponent = int(second[0]) if second[0] in (1, 2, 3) else None
    return _padded(np.polynomial.polynomial.polypow(first, exponent), degree) if exponent is not None else None


def _padded(coefficients: np.ndarray, degree: int) -> np.ndarray | None:
    """Returns the coefficients up to `degree`; None when higher ones are not zero."""
    if coefficients[degree + 1 :].any():
        return None
    return np.pad(coefficients[: degree + 1], (0, max(0, degree + 1 - coefficients.size)))


@dataclass(frozen=True)
class Product:
    """A value as scale · ∏ factors / ∏ divisors; constants of more than one element are factors or divisors."""

    scale: float
    factors: tuple[ir.Value, ...]
    divisors: tuple[ir.Value, ...]


def product(root: ir.Node) -> Product:
    """Flattens the Mul, Div, Neg and Reciprocal nodes whose last is `root`, as far as nothing else reads what is between them."""
    scale = 1.0
    factors: list[ir.Value] = []
    divisors: list[ir.Value] = []
    stack: list[tuple[ir.Value, bool, int]] = [(root.outputs[0], False, 0)]
    while stack:
        value, below, depth = stack.pop()
        node = made_by(value, "Mul", "Div", "Neg", "Reciprocal") if depth == 0 or is_used_once(value) else None
        number = scalar(value)
        if number is not None and not (below and number == 0):
            scale = scale / number if below else scale * number
        elif node is not None and depth < _MAX_DEPTH:
            scale = -scale if node.op_type == "Neg" else scale
            flips = {"Div": (False, True), "Reciprocal": (True,)}.get(node.op_type, (False, False))
            stack.extend((operand, below != flip, depth + 1) for operand, flip in zip(operands(node), flips, strict=False))
        else:
            (divisors if below else factors).append(value)
    return Product(scale, tuple(factors), tuple(divisors))


def region(root: ir.Node, leaves: Collection[ir.Value]) -> list[ir.Node] | None:
    """Returns the nodes that compute the output of `root` from `leaves` and constants.

    None when they read anything else, or when anything outside (the graph's outputs too) reads a value between the leaves and the root.
    """
    found: dict[ir.Node, None] = {}
    stack = [root]
    while stack:
        node = stack.pop()
        if node in found:
            continue
        found[node] = None
        for value in node.inputs:
            if value is None or value in leaves or constant_array(value) is not None:
                continue
            producer = value.producer()
            if producer is None or producer.graph is not root.graph:
                return None
            stack.append(producer)
    for node in found:
        for output in node.outputs if node is not root else node.outputs[1:]:
            if output.is_graph_output() or any(use.node not in found for use in output.uses()):
                return None
    return list(found)


def insert(
    editor: GraphEditor,
    before: ir.Node,
    nodes: Sequence[ir.Node],
    op_type: str,
    inputs: Sequence[ir.Value],
    shape: ir.Shape | Sequence[int] | None,
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
) -> ir.Node:
    """Adds a node of one output, of the dtype of its first input, before `before`; it belongs to the module that `nodes` have in common."""
    module = common_module(nodes)
    node = ir.node(op_type, inputs, attributes=dict(attributes or {}))
    node.name = editor.unique_name(f"{module}/{op_type}" if module else f"{nodes[0].name}/{op_type}")
    if module:
        node.metadata_props[MODULE_KEY] = module
    output, dtype = node.outputs[0], inputs[0].dtype
    output.name = node.name
    if shape is not None:
        output.shape = ir.Shape(shape)
    if dtype is not None:
        output.type = ir.TensorType(dtype)
    editor.graph.insert_before(before, node)
    return node


def replace(
    editor: GraphEditor,
    root: ir.Node,
    nodes: Sequence[ir.Node],
    op_type: str,
    inputs: Sequence[ir.Value],
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
) -> ir.Node:
    """Puts one node in the place of `nodes`, the region of `root`; its output takes over name, dtype and shape. Returns the node."""
    old = root.outputs[0]
    node = insert(editor, root, [root, *nodes], op_type, inputs, old.shape, attributes)
    take_over(editor, old, node.outputs[0])
    editor.remove(nodes)
    return node


def take_over(editor: GraphEditor, old: ir.Value, new: ir.Value) -> None:
    """Lets `new`, the output of a node, be read instead of `old`, under the name of `old`, by which users know it."""
    name, given_out = old.name, old.is_graph_output()
    editor.replace_value(old, new)
    if not given_out:
        old.name = editor.unique_name(f"{name}_replaced")
        new.name = name


def per_channel(value: ir.Value | None, rank: int, channels: int) -> np.ndarray | None:
    """Returns the array of a constant that holds one number per channel (axis 1 of `rank`) or one for all, as `[channels]`, else None."""
    array = constant_array(value)
    if array is None or array.ndim > rank:
        return None
    shape = (1,) * (rank - array.ndim) + array.shape
    if array.size not in (1, channels) or (array.size > 1 and shape[1] != channels):
        return None
    return np.ascontiguousarray(np.broadcast_to(array.reshape(-1), (channels,)))


def in_range(array: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """Returns `array` in `dtype`, None when a finite number would not be finite there."""
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(dtype)
    return result if np.isfinite(result).all() else None


def opset(model: ir.Model) -> int:
    """Returns the opset of the standard operators that `model` is written in."""
    return model.opset_imports.get("", 0)


def is_zero(number: float) -> bool:
    """True for a coefficient that is 0 but for the rounding of its computation."""
    return math.isclose(number, 0.0, abs_tol=1e-9)
