"""Reads nodes that scale and shift each channel by constants as what they are: one affine map y = scale ⊙ x + shift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.batch_norm import Affine, affine, is_batch_norm, why_not_affine

_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class AffineNode:
    """A node as an affine map of one of its inputs.

    Attributes:
        node: The node.
        x: The input that is mapped; the node's output has its shape.
        axis: The axis of x along which scale and shift vary, not negative; None where they are one number.
        map: Scale and shift, float64, `[C]` along `axis`, `[1]` where that is None.
    """

    node: ir.Node
    x: ir.Value
    axis: int | None
    map: Affine

    @property
    def output(self) -> ir.Value:
        """What the node makes."""
        return self.node.outputs[0]

    def along(self, axis: int) -> Affine | None:
        """The map with one scale and one shift for each place along `axis`; None where it varies along another axis."""
        shape = static_shape(self.x)
        if shape is None or (self.axis is not None and self.axis != axis):
            return None
        size = shape[axis]
        return Affine(np.broadcast_to(self.map.scale, (size,)), np.broadcast_to(self.map.shift, (size,)))


def read_affine(node: ir.Node | None) -> AffineNode | None:
    """Reads a BatchNormalization in inference, or an Add, Sub, Mul, Div or Neg with a constant that varies along at most one axis.

    None for anything else: other operators, two values that are both computed, a constant that makes the result larger than the value,
    a batch norm that is no constant map, division by the value or by zero, integers.
    """
    if node is None or node.domain != "":
        return None
    if is_batch_norm(node):
        x = node.inputs[0]
        return AffineNode(node, x, 1, affine(node)) if x is not None and why_not_affine(node) is None else None
    if node.op_type not in _ARITHMETIC or node.outputs[0].dtype not in _FLOATS:
        return None
    if node.op_type == "Neg":
        x = node.inputs[0]
        return None if x is None else AffineNode(node, x, None, Affine(np.array([-1.0]), np.array([0.0])))
    arrays = [constant_array(value) for value in node.inputs]
    if len(arrays) != 2 or (arrays[0] is None) == (arrays[1] is None):
        return None
    left = arrays[0] is not None
    x, constant = node.inputs[1 if left else 0], arrays[0] if left else arrays[1]
    found = _along_one_axis(constant, x, node.outputs[0])
    if x is None or found is None:
        return None
    axis, numbers = found
    scale_and_shift = _scale_and_shift(node.op_type, numbers, left)
    return None if scale_and_shift is None else AffineNode(node, x, axis, scale_and_shift)


def _along_one_axis(constant: np.ndarray | None, x: ir.Value | None, result: ir.Value) -> tuple[int | None, np.ndarray] | None:
    """Returns the axis of x along which a constant varies, and its numbers there as float64."""
    shape = static_shape(x)
    if constant is None or shape is None or shape != static_shape(result) or constant.ndim > len(shape):
        return None
    long = [axis for axis, size in enumerate(constant.shape, len(shape) - constant.ndim) if size != 1]
    if len(long) > 1:
        return None
    return long[0] if long else None, constant.astype(np.float64).reshape(-1)


def _scale_and_shift(op_type: str, numbers: np.ndarray, left: bool) -> Affine | None:
    ones, zeros = np.ones_like(numbers), np.zeros_like(numbers)
    if not np.isfinite(numbers).all():
        return None
    if op_type == "Add":
        return Affine(ones, numbers)
    if op_type == "Sub":
        return Affine(-ones, numbers) if left else Affine(ones, -numbers)
    if op_type == "Mul":
        return Affine(numbers, zeros)
    return None if left or (numbers == 0).any() else Affine(1.0 / numbers, zeros)


def compose(second: Affine, first: Affine) -> Affine:
    """The map second(first(x)), by broadcasting."""
    return Affine(second.scale * first.scale, second.scale * first.shift + second.shift)
