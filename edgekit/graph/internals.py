"""The values inside whole operators that a kernel may hold in the operator's own type: squares, their sums, exponentials, scores.

A graph shows what an operator takes and gives. A LayerNormalization whose input and output are small may still overflow float16 where its
kernel squares in float16, as accelerators do. `expose_internals` writes those steps out beside each operator, so that hooks see them, or in
its place, so that an emulated run computes as the narrowest kernel would.

The steps are the definitions in the ONNX operator specification, with the variance as the mean of squared differences (Ba et al. 2016,
equation 3). A mean is a sum that is divided then, since that is where it overflows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.shapes import static_shape


@dataclass(frozen=True)
class Internal:
    """A value inside a whole operator.

    Attributes:
        node: Name of the operator's node.
        label: What it is, such as `square`; with the name of the operator's result before it, the name of the value.
    """

    node: str
    label: str


def expose_internals(model: ir.Model, *, replace: bool = False) -> tuple[ir.Model, dict[str, Internal]]:
    """Returns a copy of `model` with the steps of whole operators written out, and what the new values are, by name.

    Args:
        model: The model; only nodes of its main graph are looked at. Weights are shared with the copy.
        replace: Whether the steps replace the operator. Otherwise they stand beside it, and nothing reads their results.
    """
    copy = model.clone()
    editor = GraphEditor(copy)
    found: dict[str, Internal] = {}
    for node in list(copy.graph):
        write = _STEPS.get(node.op_type) if node.domain == "" else None
        if write is None or not node.inputs or node.inputs[0] is None or node.inputs[0].shape is None:
            continue
        steps = _Steps(editor, node)
        result = write(steps, node)
        if result is None:
            steps.discard()
            continue
        found.update(steps.found)
        if replace and not any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            editor.replace_value(node.outputs[0], result)
            editor.remove([node])
    return copy, found


class _Steps:
    """Adds nodes before a whole operator, whose module they share."""

    def __init__(self, editor: GraphEditor, node: ir.Node) -> None:
        self.editor = editor
        self.node = node
        self.found: dict[str, Internal] = {}
        self._nodes: list[ir.Node] = []

    def add(self, op_type: str, inputs: Sequence[ir.Value], label: str, **attributes: int | float | Sequence[int]) -> ir.Value:
        """Adds a node and returns its result, called `RESULT/label`."""
        new = ir.node(op_type, inputs, attributes=attributes)
        new.name = self.editor.unique_name(f"{self.node.name}/{label}/{op_type}")
        output, source = new.outputs[0], self.node.inputs[0]
        output.name = self.editor.unique_name(f"{self.node.outputs[0].name}/{label}")
        if source is not None and source.dtype is not None:
            output.type = ir.TensorType(source.dtype)
        new.metadata_props.update({key: value for key, value in self.node.metadata_props.items() if key == MODULE_KEY})
        self.editor.graph.insert_before(self.node, new)
        self._nodes.append(new)
        self.found[output.name] = Internal(self.node.name or "", label)
        return output

    def number(self, value: float) -> ir.Value:
        """A constant of the operator's type."""
        source = self.node.inputs[0]
        dtype = source.dtype.numpy() if source is not None and source.dtype is not None else np.dtype(np.float32)
        return self.editor.add_initializer(f"{self.node.name}/number", np.asarray(value, dtype))

    def integers(self, values: Sequence[int]) -> ir.Value:
        """A constant vector of int64."""
        return self.editor.add_initializer(f"{self.node.name}/integers", np.asarray(values, np.int64))

    def mean(self, x: ir.Value, axes: Sequence[int], shape: Sequence[int], sum_label: str, label: str) -> ir.Value:
        """The mean of x, of `shape`, over `axes`, which stay with length 1."""
        total = self.add("ReduceSum", [x, self.integers(axes)], sum_label, keepdims=1)
        return self.add("Div", [total, self.number(math.prod(shape[axis] for axis in axes))], label)

    def discard(self) -> None:
        """Takes back what was added."""
        self.editor.remove(self._nodes)


def _x(node: ir.Node) -> tuple[ir.Value, tuple[int, ...]] | None:
    """The first input with its shape, None where that is not static or has no elements."""
    x, shape = node.inputs[0], static_shape(node.inputs[0])
    return (x, shape) if x is not None and shape and math.prod(shape) else None


def _normalized(steps: _Steps, x: ir.Value, axes: Sequence[int], shape: Sequence[int], epsilon: float, centred: bool = True) -> ir.Value:
    if centred:
        x = steps.add("Sub", [x, steps.mean(x, axes, shape, "sum", "mean")], "centred")
    square = steps.add("Mul", [x, x], "square")
    variance = steps.mean(square, axes, shape, "sum_of_squares", "variance")
    shifted = steps.add("Add", [variance, steps.number(epsilon)], "variance_and_epsilon")
    return steps.add("Div", [x, steps.add("Sqrt", [shifted], "deviation")], "normalized")


def _last_axes_norm(centred: bool) -> Callable[[_Steps, ir.Node], ir.Value | None]:
    def write(steps: _Steps, node: ir.Node) -> ir.Value | None:
        known = _x(node)
        if known is None:
            return None
        x, shape = known
        axes = range(node.attributes.get_int("axis", -1) % len(shape), len(shape))
        result = _normalized(steps, x, list(axes), shape, node.attributes.get_float("epsilon", 1e-5), centred)
        for op_type, parameter in zip(("Mul", "Add"), node.inputs[1:], strict=False):
            if parameter is not None:
                result = steps.add(op_type, [result, parameter], "scaled" if op_type == "Mul" else "shifted")
        return result

    return write


def _channel_norm(steps: _Steps, node: ir.Node) -> ir.Value | None:
    """InstanceNormalization and GroupNormalization (of opset 21 on: scale and bias per channel) of `[B, C, …]`."""
    known = _x(node)
    if known is None or len(known[1]) < 3 or len(node.inputs) < 3 or node.inputs[1] is None or node.inputs[2] is None:
        return None
    x, shape = known
    if static_shape(node.inputs[1]) != (shape[1],):
        return None
    groups = node.attributes.get_int("num_groups", shape[1])
    grouped = (shape[0], groups, math.prod(shape[1:]) // groups)
    rows = steps.add("Reshape", [x, steps.integers(grouped)], "groups")
    normalized = _normalized(steps, rows, [2], grouped, node.attributes.get_float("epsilon", 1e-5))
    result = steps.add("Reshape", [normalized, steps.integers(shape)], "channels")
    column = steps.integers([-1] + [1] * (len(shape) - 2))
    for op_type, parameter in (("Mul", node.inputs[1]), ("Add", node.inputs[2])):
        result = steps.add(op_type, [result, steps.add("Reshape", [parameter, column], "parameter")], "affine")
    return result


def _axes(node: ir.Node, rank: int) -> list[int] | None:
    """The axes of a reduction, not negative; None where they are not constant or it reduces none."""
    given = node.inputs[1] if len(node.inputs) > 1 else None
    array = constant_array(given)
    if given is not None and array is None:
        return None
    axes = array.reshape(-1).tolist() if array is not None else list(node.attributes.get_ints("axes", ()))
    if not axes and node.attributes.get_int("noop_with_empty_axes", False):
        return None
    return sorted({axis % rank for axis in axes}) or list(range(rank))


def _reduce_mean(steps: _Steps, node: ir.Node) -> ir.Value | None:
    known = _x(node)
    axes = _axes(node, len(known[1])) if known is not None else None
    if known is None or axes is None:
        return None
    total = steps.add("ReduceSum", [known[0], steps.integers(axes)], "sum", keepdims=node.attributes.get_int("keepdims", 1))
    return steps.add("Div", [total, steps.number(math.prod(known[1][axis] for axis in axes))], "mean")


def _global_average(steps: _Steps, node: ir.Node) -> ir.Value | None:
    known = _x(node)
    if known is None or len(known[1]) < 3:
        return None
    return steps.mean(known[0], list(range(2, len(known[1]))), known[1], "sum", "mean")


def _reduce_squares(rooted: bool) -> Callable[[_Steps, ir.Node], ir.Value | None]:
    def write(steps: _Steps, node: ir.Node) -> ir.Value | None:
        known = _x(node)
        axes = _axes(node, len(known[1])) if known is not None else None
        if known is None or axes is None:
            return None
        square = steps.add("Mul", [known[0], known[0]], "square")
        keep = node.attributes.get_int("keepdims", 1)
        total = steps.add("ReduceSum", [square, steps.integers(axes)], "sum_of_squares", keepdims=keep)
        return steps.add("Sqrt", [total], "root") if rooted else total

    return write


def _lp_normalization(steps: _Steps, node: ir.Node) -> ir.Value | None:
    if node.attributes.get_int("p", 2) != 2 or node.inputs[0] is None:
        return None
    x, axis = node.inputs[0], [node.attributes.get_int("axis", -1)]
    square = steps.add("Mul", [x, x], "square")
    total = steps.add("ReduceSum", [square, steps.integers(axis)], "sum_of_squares", keepdims=1)
    return steps.add("Div", [x, steps.add("Sqrt", [total], "root")], "normalized")


def _softmax(steps: _Steps, node: ir.Node) -> ir.Value | None:
    if node.inputs[0] is None or (node.version or 13) < 13:
        return None
    axis = steps.integers([node.attributes.get_int("axis", -1)])
    top = steps.add("ReduceMax", [node.inputs[0], axis], "largest", keepdims=1)
    powers = steps.add("Exp", [steps.add("Sub", [node.inputs[0], top], "distance")], "exp")
    return steps.add("Div", [powers, steps.add("ReduceSum", [powers, axis], "sum_of_exp", keepdims=1)], "probability")


def _softplus(steps: _Steps, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    powers = steps.add("Exp", [x], "exp")
    return steps.add("Log", [steps.add("Add", [powers, steps.number(1)], "exp_and_one")], "log")


def _mish(steps: _Steps, node: ir.Node) -> ir.Value:
    x = node.inputs[0]
    assert x is not None
    return steps.add("Mul", [x, steps.add("Tanh", [_softplus(steps, node)], "tanh")], "product")


def _gelu(steps: _Steps, node: ir.Node) -> ir.Value | None:
    """The tanh form; the exact one has no large values inside."""
    x = node.inputs[0]
    if x is None or node.attributes.get_string("approximate", "none") != "tanh":
        return None
    cube = steps.add("Mul", [steps.add("Mul", [x, x], "square"), x], "cube")
    inner = steps.add("Add", [x, steps.add("Mul", [cube, steps.number(0.044715)], "cubic")], "polynomial")
    tanh = steps.add("Tanh", [steps.add("Mul", [inner, steps.number(math.sqrt(2 / math.pi))], "argument")], "tanh")
    half = steps.add("Mul", [x, steps.number(0.5)], "half")
    return steps.add("Mul", [half, steps.add("Add", [tanh, steps.number(1)], "tanh_and_one")], "product")


_STEPS: dict[str, Callable[[_Steps, ir.Node], ir.Value | None]] = {
    "LayerNormalization": _last_axes_norm(centred=True),
    "RMSNormalization": _last_axes_norm(centred=False),
    "InstanceNormalization": _channel_norm,
    "GroupNormalization": _channel_norm,
    "LpNormalization": _lp_normalization,
    "ReduceMean": _reduce_mean,
    "GlobalAveragePool": _global_average,
    "ReduceL2": _reduce_squares(rooted=True),
    "ReduceSumSquare": _reduce_squares(rooted=False),
    "Softmax": _softmax,
    "Softplus": _softplus,
    "Mish": _mish,
    "Gelu": _gelu,
}
