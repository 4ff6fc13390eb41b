"""Reads convolutions, average pooling, scales, shifts and identities as one thing: a linear form of a source value.

A value is followed backwards as far as each of its makers is linear and is read by nothing else; what is between it and the source is then
one convolution, whose geometry (`geometry.py`) says what it costs. Weights are read and multiplied (`composition.py`) only when it is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine import read_affine
from edgekit.passes.reparameterize.batch_norm import Affine, is_batch_norm, why_not_affine
from edgekit.passes.reparameterize.composition import Weights, added_weights, composed_weights
from edgekit.passes.reparameterize.geometry import Geometry, Taps, composed_geometry, identity_geometry, why_not_composed

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class LinearForm:
    """A value as a linear form of `source`.

    Attributes:
        source: The value that is read.
        geometry: The convolution that the form is.
        nodes: The nodes that compute the value from the source, in order; none for the identity.
        macs: Multiply-accumulates of these nodes.
        weights: Reads weight `[O, I/g, *kernel]` and bias `[O]` in float64.
    """

    source: ir.Value
    geometry: Geometry
    nodes: tuple[ir.Node, ...]
    macs: int
    weights: Callable[[], Weights]

    @property
    def has_convolution(self) -> bool:
        """Whether a Conv is among its nodes."""
        return any(node.op_type == "Conv" for node in self.nodes)


@dataclass(frozen=True)
class Obstacle:
    """Why a value that a linear operator makes is not read as a form of `source`."""

    source: ir.Value | None
    node: ir.Node
    why: str


def interpret(value: ir.Value, *, free: bool) -> tuple[LinearForm | None, Obstacle | None]:
    """Reads `value` as a linear form of the farthest source that it is one of.

    A value that no linear operator makes, or whose maker cannot be absorbed, is the identity form of itself; then the second result says
    why it could not be absorbed. No form at all: the value is no map `[N, C, *spatial]` of floats of known shape.

    Args:
        value: The value to read.
        free: Whether its maker may be absorbed: nothing reads the value but the sum that asks.
    """
    chain: list[LinearForm] = []
    obstacle = None
    current = value
    while (node := current.producer()) is not None:
        own = read_operator(node)
        if own is None:
            break
        alone = free if current is value else is_used_once(current)
        if isinstance(own, str) or not alone:
            why = own if isinstance(own, str) and alone else f"the output of {node.op_type} '{node.name}' is read elsewhere"
            obstacle = Obstacle(node.inputs[0], node, why)
            break
        chain.append(own)
        current = own.source
    form = identity_form(current)
    for own in reversed(chain):
        longer = own if form is None else compose(own, form)
        if isinstance(longer, str):
            assert form is not None
            obstacle, longer = Obstacle(form.source, own.nodes[0], longer), own
        form = longer
    return form, obstacle


def read_operator(node: ir.Node) -> LinearForm | str | None:
    """Reads one node as a form of its input; returns the condition that failed where it nearly is one, None for other operators.

    Read are Conv, AveragePool over windows of one size, Pad with zeros (or by less than nothing: a crop), and what scales and shifts
    channels by constants (`affine.py`).
    """
    if node.domain == "" and node.op_type == "Conv":
        return _read_conv(node)
    if node.domain == "" and node.op_type == "AveragePool":
        return _read_pool(node)
    if node.domain == "" and node.op_type == "Pad":
        return _read_pad(node)
    if is_batch_norm(node) and (why := why_not_affine(node)) is not None:
        return why
    found = read_affine(node)
    if found is None or found.axis not in (1, None):
        return None
    identity = identity_form(found.x)
    a = found.along(1) if identity is not None and found.map.scale.size in (1, identity.geometry.in_shape[1]) else None
    return None if identity is None or a is None else _affine_form(identity, node, a)


def identity_form(source: ir.Value) -> LinearForm | None:
    """Returns `source` `[N, C, *spatial]` as the form of itself; None where it is no map of floats of known shape."""
    shape = static_shape(source)
    if shape is None or len(shape) < 3 or source.dtype not in _FLOATS:
        return None
    geometry = identity_geometry(shape)
    return LinearForm(source, geometry, (), 0, lambda: (np.ones(geometry.weight_shape), np.zeros(shape[1])))


def compose(second: LinearForm, first: LinearForm) -> LinearForm | str:
    """Returns `second`, a form of what `first` makes, as a form of the source of `first`; or the condition that failed."""
    if not first.nodes:
        return second
    outer, inner = second.geometry, first.geometry
    why = why_not_composed(outer, inner)
    if why is not None:
        return why
    geometry = composed_geometry(outer, inner)
    return LinearForm(
        first.source,
        geometry,
        first.nodes + second.nodes,
        first.macs + second.macs,
        lambda: composed_weights(second.weights(), outer, first.weights(), inner, geometry),
    )


def merged_weights(forms: Iterable[tuple[LinearForm, int]], geometry: Geometry) -> Weights:
    """Adds forms, each so many times (subtracts where negative), in float64: weight `[O, I/g, *kernel]` and bias `[O]` of `geometry`."""
    return added_weights(((form.geometry, form.weights(), times) for form, times in forms), geometry)


def _affine_form(identity: LinearForm, node: ir.Node, a: Affine) -> LinearForm:
    geometry = replace(identity.geometry, has_bias=bool(a.shift.any()))
    return LinearForm(identity.source, geometry, (node,), 0, lambda: (a.scale.reshape(geometry.weight_shape).copy(), a.shift.copy()))


def _read_conv(conv: ir.Node) -> LinearForm | str:
    """Reads a Conv with constant weights, known shapes and pads that are not negative."""
    source, shape, out_shape = conv.inputs[0], static_shape(conv.inputs[0]), static_shape(conv.outputs[0])
    weight, bias = constant_array(conv.inputs[1]), constant_array(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if weight is None:
        return f"the weight of Conv '{conv.name}' is not a constant"
    if len(conv.inputs) > 2 and conv.inputs[2] is not None and bias is None:
        return f"the bias of Conv '{conv.name}' is not a constant"
    if source is None or shape is None or out_shape is None:
        return f"the shapes around Conv '{conv.name}' are not known"
    groups = conv.attributes.get_int("group", 1)
    if len(shape) != weight.ndim or len(shape) < 3 or source.dtype not in _FLOATS or groups * weight.shape[1] != shape[1]:
        return f"Conv '{conv.name}' has a rank, type or number of channels that is not supported"
    pads = conv_pads(conv)
    if any(pad < 0 for pad in pads):
        return f"Conv '{conv.name}' has negative pads"
    rank = len(shape) - 2
    taps = tuple(map(Taps, (-pad for pad in pads[:rank]), _per_axis(conv, "dilations", rank), weight.shape[2:]))
    geometry = Geometry(groups, shape, out_shape, _per_axis(conv, "strides", rank), taps, bias is not None and bool(bias.any()))

    def read() -> Weights:
        shift = np.zeros(weight.shape[0]) if bias is None else bias.astype(np.float64)
        return weight.astype(np.float64), shift

    return LinearForm(source, geometry, (conv,), geometry.macs, read)


def _read_pool(pool: ir.Node) -> LinearForm | str:
    """Reads an AveragePool whose windows all divide by the size of the kernel: a depthwise convolution with equal weights.

    Windows at the rim divide by fewer where padding does not count, and where `ceil_mode` lets the last one overrun the padded input.
    """
    source, shape, out_shape = pool.inputs[0], static_shape(pool.inputs[0]), static_shape(pool.outputs[0])
    kernel = tuple(pool.attributes.get_ints("kernel_shape", ()))
    if source is None or shape is None or out_shape is None or len(shape) < 3 or len(kernel) != len(shape) - 2:
        return f"the shapes around AveragePool '{pool.name}' are not known"
    rank = len(kernel)
    pads = _pads(pool, shape[2:], kernel)
    if any(pads) and not pool.attributes.get_int("count_include_pad", 0):
        return f"AveragePool '{pool.name}' does not count its padding: it divides by less at the rim"
    if any(pad < 0 for pad in pads):
        return f"AveragePool '{pool.name}' has negative pads"
    taps = tuple(map(Taps, (-pad for pad in pads[:rank]), _per_axis(pool, "dilations", rank), kernel))
    geometry = Geometry(shape[1], shape, out_shape, _per_axis(pool, "strides", rank), taps, False)
    if any(needed > given for needed, given in zip(geometry.pads()[rank:], pads[rank:], strict=True)):
        return f"the last window of AveragePool '{pool.name}' overruns its padding: it divides by less there"
    return LinearForm(
        source, geometry, (pool,), 0, lambda: (np.full(geometry.weight_shape, 1.0 / math.prod(kernel)), np.zeros(out_shape[1]))
    )


def _read_pad(pad: ir.Node) -> LinearForm | str | None:
    """Reads a Pad with zeros along spatial axes: the identity, read from another place."""
    value = pad.inputs[2] if len(pad.inputs) > 2 else None
    axes_value = pad.inputs[3] if len(pad.inputs) > 3 else None
    amounts, axes, constant = constant_array(pad.inputs[1]), constant_array(axes_value), constant_array(value)
    identity = identity_form(pad.inputs[0]) if pad.inputs[0] is not None else None
    out_shape = static_shape(pad.outputs[0])
    if identity is None or out_shape is None or amounts is None or (axes is None) != (axes_value is None):
        return None
    if pad.attributes.get_string("mode", "constant") != "constant" or (value is not None and (constant is None or constant.any())):
        return f"Pad '{pad.name}' does not pad with zeros"
    rank = len(out_shape)
    begins = [0] * rank
    for axis, begin in zip(range(rank) if axes is None else axes, amounts, strict=False):  # the begins are the first half
        begins[axis] = int(begin)
    if any(begins[:2]) or out_shape[:2] != identity.geometry.in_shape[:2]:
        return f"Pad '{pad.name}' pads channels"
    geometry = replace(identity.geometry, out_shape=out_shape, taps=tuple(Taps(-begin, 1, 1) for begin in begins[2:]))
    return LinearForm(identity.source, geometry, (pad,), 0, identity.weights)


def conv_pads(conv: ir.Node) -> list[int]:
    """Returns the pads of a Conv of known shapes, begins then ends, with `auto_pad` resolved.

    SAME pads so that the output has ceil(size/stride) positions; an odd pad is longer at the end (SAME_UPPER) or at the begin (SAME_LOWER).
    """
    return _pads(conv, (static_shape(conv.inputs[0]) or ())[2:], (static_shape(conv.inputs[1]) or ())[2:])


def _pads(node: ir.Node, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    rank = len(kernel)
    auto_pad = node.attributes.get_string("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        return list(node.attributes.get_ints("pads", ())) or [0] * 2 * rank
    if auto_pad == "VALID":
        return [0] * 2 * rank
    strides, dilations = _per_axis(node, "strides", rank), _per_axis(node, "dilations", rank)
    begins, ends = [], []
    for size, count, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + dilation * (count - 1) + 1 - size)
        small = total // 2
        begins.append(small if auto_pad == "SAME_UPPER" else total - small)
        ends.append(total - begins[-1])
    return begins + ends


def _per_axis(node: ir.Node, name: str, rank: int) -> tuple[int, ...]:
    return tuple(node.attributes.get_ints(name, ())) or (1,) * rank
