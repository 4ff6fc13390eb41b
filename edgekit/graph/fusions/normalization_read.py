"""Reads the arithmetic of a normalization, (x − μ)/√(σ² + ε) or x/√(mean x² + ε), in the orders that exporters write it.

It finds what is normalized over which axes; which operator that is, `normalization` decides with the scale and shift around it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.fusions.matching import Product, either_order, is_same, made_by, operands, product, scalar, sole_reader
from edgekit.graph.shapes import static_shape


@dataclass(frozen=True)
class Normalized:
    """A normalized value.

    Attributes:
        root: The node that ends it.
        source: What is normalized.
        centred: Whether the mean is taken off.
        axes: The axes over which mean and variance are taken, not negative, ascending.
        epsilon: What is added to the variance.
        scale: The constant that it is multiplied by already, if any.
        shift: The constant that is added to it already, if any.
    """

    root: ir.Node
    source: ir.Value
    centred: bool
    axes: tuple[int, ...]
    epsilon: float
    scale: ir.Value | None = None
    shift: ir.Value | None = None


def read_normalized(root: ir.Node) -> Normalized | None:
    """Reads the normalization that ends in `root`; None when there is none."""
    found = _read_folded(root) if root.op_type in ("Add", "Sub") else _read_quotient(root)
    return _without_casts(found) if found is not None else None


def _read_quotient(root: ir.Node) -> Normalized | None:
    """d/√(mean d² + ε), by Div, Reciprocal or Pow, perhaps times a constant."""
    whole = product(root)
    deviation = _inverse_deviation(whole)
    if deviation is None or whole.scale != 1:
        return None
    variance, rest = deviation
    constants = [value for value in rest if constant_array(value) is not None]
    data = [value for value in rest if constant_array(value) is None]
    if len(data) != 1 or len(constants) > 1:
        return None
    moment = _read_moment(variance)
    if moment is None or not is_same(moment[0], data[0]):
        return None
    centre = _centre(moment[0], moment[1])
    source = data[0] if centre is None else centre[0]
    return Normalized(root, source, centre is not None, moment[1], moment[2], constants[0] if constants else None)


def _read_folded(root: ir.Node) -> Normalized | None:
    """x·r + (β − μ·r) with r = γ/√(σ² + ε), as TensorFlow writes it; without β, x·r − μ·r."""
    pairs = list(either_order(root)) if root.op_type == "Add" else [(operands(root)[0], operands(root)[1])]
    for scaled, rest in pairs:
        shift = None
        if root.op_type == "Add":
            difference = made_by(rest, "Sub")
            if difference is None:
                continue
            shift, rest = operands(difference)
            if constant_array(shift) is None:
                continue
        first, second = made_by(scaled, "Mul"), made_by(rest, "Mul")
        if first is None or second is None:
            continue
        for x, factor in either_order(first):
            for mean, other in either_order(second):
                found = _read_factor(root, x, mean, factor) if factor is other else None
                if found is not None:
                    return replace(found, shift=shift)
    return None


def _read_factor(root: ir.Node, x: ir.Value, mean: ir.Value, factor: ir.Value) -> Normalized | None:
    """Reads `factor` as γ/√(σ² + ε) of `x` with its `mean`."""
    node = made_by(factor, "Mul", "Div", "Reciprocal")
    power = made_by(factor, "Pow")
    whole = product(node) if node is not None else Product(1.0, (factor,), ()) if power is not None else None
    deviation = _inverse_deviation(whole) if whole is not None else None
    if whole is None or deviation is None or whole.scale != 1 or len(deviation[1]) > 1:
        return None
    if any(constant_array(value) is None for value in deviation[1]):
        return None
    moment = _read_moment(deviation[0])
    centre = _centre(moment[0], moment[1]) if moment is not None else None
    if moment is None or centre is None or centre != (x, mean):
        return None
    return Normalized(root, x, True, moment[1], moment[2], deviation[1][0] if deviation[1] else None)


def _inverse_deviation(whole: Product) -> tuple[ir.Value, list[ir.Value]] | None:
    """Finds 1/√v among factors and divisors; returns v and the other factors. None when there are other divisors."""
    if len(whole.divisors) == 1:
        divisor = whole.divisors[0]
        root, power = made_by(divisor, "Sqrt"), made_by(divisor, "Pow")
        if root is not None:
            return operands(root)[0], list(whole.factors)
        if power is not None and scalar(power.inputs[1]) == 0.5:
            return operands(power)[0], list(whole.factors)
        return None
    if whole.divisors:
        return None
    for index, factor in enumerate(whole.factors):
        power = made_by(factor, "Pow")
        if power is not None and scalar(power.inputs[1]) == -0.5:
            return operands(power)[0], [*whole.factors[:index], *whole.factors[index + 1 :]]
    return None


def _read_moment(value: ir.Value) -> tuple[ir.Value, tuple[int, ...], float] | None:
    """Reads mean(d²) + ε; returns d, the axes and ε."""
    total = made_by(value, "Add")
    if total is None:
        return None
    for mean, constant in either_order(total):
        epsilon = scalar(constant)
        reduced = _read_mean(mean)
        if epsilon is None or epsilon < 0 or reduced is None:
            continue
        square = made_by(reduced[0], "Mul", "Pow")
        if square is None:
            return None
        base, other = operands(square)
        if is_same(base, other) if square.op_type == "Mul" else scalar(other) == 2:
            return base, reduced[1], epsilon
    return None


def _read_mean(value: ir.Value) -> tuple[ir.Value, tuple[int, ...]] | None:
    """Reads a ReduceMean with constant axes (an input, or an attribute) that it or a Reshape keeps; returns its data and axes."""
    view = made_by(value, "Reshape", "Unsqueeze")
    node = view.inputs[0].producer() if view is not None and view.inputs[0] is not None else value.producer()
    if node is None or node.domain != "" or node.op_type != "ReduceMean":
        return None
    data = node.inputs[0]
    if data is None or data.shape is None:
        return None
    rank = len(data.shape)
    given = node.inputs[1] if len(node.inputs) > 1 else None
    array = constant_array(given)
    if given is not None and array is None:
        return None
    axes = array.reshape(-1).tolist() if array is not None else list(node.attributes.get_ints("axes", ()))
    if not axes:
        axes = [] if node.attributes.get_int("noop_with_empty_axes", 0) else list(range(rank))
    axes = sorted({axis + rank if axis < 0 else axis for axis in axes})
    if view is not None or not node.attributes.get_int("keepdims", 1):
        shape = static_shape(data)
        if shape is None or static_shape(value) != tuple(1 if axis in axes else size for axis, size in enumerate(shape)):
            return None
    return (data, tuple(axes)) if axes else None


def _centre(value: ir.Value, axes: tuple[int, ...]) -> tuple[ir.Value, ir.Value] | None:
    """Reads x − mean(x) over `axes`; returns x and the mean."""
    node = made_by(value, "Sub")
    if node is None:
        return None
    x, mean = operands(node)
    reduced = _read_mean(mean)
    return (x, mean) if reduced is not None and is_same(reduced[0], x) and reduced[1] == axes else None


def _without_casts(found: Normalized) -> Normalized:
    """Takes in the casts to float32 and back around the normalization of a half-precision value: the operators compute so themselves."""
    up, result = made_by(found.source, "Cast"), found.root.outputs[0]
    if up is None or found.scale is not None or found.shift is not None or not is_used_once(result):
        return found
    down, narrow = next(iter(result.uses())).node, operands(up)[0]
    if down.op_type != "Cast" or down.domain != "" or narrow.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return found
    if found.source.dtype != ir.DataType.FLOAT or down.outputs[0].dtype != narrow.dtype:
        return found
    return replace(found, root=down, source=narrow)


@dataclass(frozen=True)
class Affine:
    """What a value is multiplied by and what is added then, with the node that ends it; constants, or None."""

    root: ir.Node
    scale: ir.Value | None
    shift: ir.Value | None


def affine_variants(root: ir.Node, scale: ir.Value | None = None, shift: ir.Value | None = None) -> list[Affine]:
    """Follows `root` through Mul and Add with constants that nothing else reads, as far as a scale and a shift go.

    Returns where it may end, the farthest first.
    """
    found = [Affine(root, scale, shift)]
    while shift is None and (reader := sole_reader(root.outputs[0])) is not None:
        node, other = reader
        if constant_array(other) is None or node.outputs[0].dtype != root.outputs[0].dtype:
            break
        if node.op_type == "Mul" and scale is None:
            scale = other
        elif node.op_type == "Add":
            shift = other
        else:
            break
        root = node
        found.append(Affine(root, scale, shift))
    return found[::-1]


def trailing(array: np.ndarray, rank: int, shape: tuple[int, ...]) -> np.ndarray | None:
    """Returns a constant that is broadcast over the leading axes alone as an array of `shape`, the last axes of `rank`; else None."""
    padded = (1,) * (rank - array.ndim) + array.shape
    first = rank - len(shape)
    if array.ndim > rank or any(size != 1 for size in padded[:first]):
        return None
    if any(size not in (1, wanted) for size, wanted in zip(padded[first:], shape, strict=True)):
        return None
    return np.ascontiguousarray(np.broadcast_to(array.reshape(padded[first:]), shape))
