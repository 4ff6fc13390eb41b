"""Reads convolutions, batch norms and identities as one thing, a linear form of a source value, and adds such forms.

A form says t[n, o, y] = bias[o] + Σ kernel[o, i, u] · source0[n, i, stride·y + offset(u)], where source0 is the source continued by zeros.
Offsets replace pads and dilations: the taps of one axis are `start, start + step, …` relative to the position `stride·y`. Two forms with
the same source, stride and output shape add tap by tap, whatever their kernel sizes, pads and dilations were (Ding et al. 2021, "Diverse
Branch Block: Building a Convolution as an Inception-like Unit", section 3.2).

What a form costs follows from its geometry; its weights are read only when it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.batch_norm import affine, is_batch_norm, why_not_affine

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Taps:
    """Where a kernel reads along one spatial axis: at `start + step·u` for u in 0 … count − 1."""

    start: int
    step: int
    count: int

    @property
    def last(self) -> int:
        """The offset of the last tap."""
        return self.start + self.step * (self.count - 1)


def union(taps: Sequence[Taps]) -> Taps:
    """Returns the coarsest regular taps that contain all of `taps`."""
    start, last = min(tap.start for tap in taps), max(tap.last for tap in taps)
    step = reduce(math.gcd, [*(tap.step for tap in taps if tap.count > 1), *(tap.start - start for tap in taps)], 0) or 1
    return Taps(start, step, (last - start) // step + 1)


@dataclass(frozen=True)
class Geometry:
    """The shape of the convolution that a form is.

    Attributes:
        groups: Number of groups g.
        in_channels: Channels I of the source.
        out_shape: `[N, O, *spatial]`.
        stride: Per spatial axis.
        taps: Per spatial axis.
        has_bias: Whether there is a bias.
    """

    groups: int
    in_channels: int
    out_shape: tuple[int, ...]
    stride: tuple[int, ...]
    taps: tuple[Taps, ...]
    has_bias: bool

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`[O, I/g, *kernel]`."""
        return (self.out_shape[1], self.in_channels // self.groups, *(tap.count for tap in self.taps))

    @property
    def parameters(self) -> int:
        """Elements of weight and bias."""
        return math.prod(self.weight_shape) + (self.out_shape[1] if self.has_bias else 0)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return math.prod(self.out_shape) * math.prod(self.weight_shape[1:])

    def pads(self, in_spatial: Sequence[int]) -> list[int]:
        """ONNX's pads, begins then ends, for a source of spatial size `in_spatial`.

        An end pad that is negative by less than a stride (the last rows are never read) is 0: it gives the same output size.
        """
        begins = [-tap.start for tap in self.taps]
        ends = [
            max(0, (size - 1) * stride + tap.last - (source - 1))
            for size, stride, tap, source in zip(self.out_shape[2:], self.stride, self.taps, in_spatial, strict=True)
        ]
        return begins + ends


@dataclass(frozen=True)
class LinearForm:
    """A value as a linear form of `source`: a convolution or the identity, followed by batch norms.

    Attributes:
        source: The value that is read.
        geometry: The convolution that the form is.
        conv: The Conv node, or None for the identity.
        norms: The BatchNormalization nodes after it, in order.
        macs: Multiply-accumulates of these nodes.
        parameters: Elements of their weights.
    """

    source: ir.Value
    geometry: Geometry
    conv: ir.Node | None
    norms: tuple[ir.Node, ...]
    macs: int
    parameters: int

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The nodes that compute the form from its source."""
        return self.norms if self.conv is None else (self.conv, *self.norms)

    def weight_and_bias(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the weight `[O, I/g, *kernel]` and the bias `[O]` in float64."""
        channels = self.geometry.out_shape[1]
        bias = np.zeros(channels)
        if self.conv is None:
            weight = np.ones(self.geometry.weight_shape)
        else:
            arrays = [constant_array(value) for value in self.conv.inputs[1:]]
            assert arrays[0] is not None
            weight = arrays[0].astype(np.float64)
            if len(arrays) > 1 and arrays[1] is not None:
                bias = arrays[1].astype(np.float64)
        for norm in self.norms:
            a = affine(norm)
            weight *= a.scale.reshape(-1, *[1] * (weight.ndim - 1))
            bias = a.scale * bias + a.shift
        return weight, bias


@dataclass(frozen=True)
class Obstacle:
    """Why a value that a convolution or batch norm makes is not read as a form of `source`."""

    source: ir.Value | None
    node: ir.Node
    why: str


def interpret(value: ir.Value, *, free: bool) -> tuple[LinearForm | None, Obstacle | None]:
    """Reads `value` as a linear form.

    A value that no convolution or batch norm makes, or whose maker cannot be absorbed, is the identity form of itself; then the second
    result says why it could not be absorbed. No form at all: the value is no map `[N, C, *spatial]` of floats of known shape.

    Args:
        value: The value to read.
        free: Whether its maker may be absorbed: nothing reads the value but the sum that asks.
    """
    norms: list[ir.Node] = []
    node, current = value.producer(), value
    obstacle = None
    while is_batch_norm(node):
        assert node is not None
        why = _why_not_absorbed(node, free if current is value else is_used_once(current)) or why_not_affine(node)
        if why is not None or node.inputs[0] is None:
            obstacle = Obstacle(node.inputs[0], node, why or "it reads nothing")
            break
        norms.insert(0, node)
        current = node.inputs[0]
        node = current.producer()
    conv = None
    if obstacle is None and node is not None and node.op_type == "Conv" and node.domain == "":
        why = _why_not_absorbed(node, free if current is value else is_used_once(current)) or _why_not_regular(node)
        if why is None:
            conv = node
        else:
            obstacle = Obstacle(node.inputs[0], node, why)
    form = _conv_form(conv, norms) if conv is not None else _identity_form(current, norms)
    return form, obstacle


def _why_not_absorbed(node: ir.Node, free: bool) -> str | None:
    return None if free else f"the output of {node.op_type} '{node.name}' is read elsewhere"


def _why_not_regular(conv: ir.Node) -> str | None:
    """Returns why a Conv is not a linear form with constant weights and known shapes."""
    shape, out_shape, weight = static_shape(conv.inputs[0]), static_shape(conv.outputs[0]), constant_array(conv.inputs[1])
    if weight is None:
        return f"the weight of Conv '{conv.name}' is not a constant"
    if len(conv.inputs) > 2 and conv.inputs[2] is not None and constant_array(conv.inputs[2]) is None:
        return f"the bias of Conv '{conv.name}' is not a constant"
    if shape is None or out_shape is None:
        return f"the shapes around Conv '{conv.name}' are not known"
    if len(shape) != weight.ndim or any(pad < 0 for pad in conv_pads(conv)):
        return f"Conv '{conv.name}' has pads or a rank that are not supported"
    return None


def conv_pads(conv: ir.Node) -> list[int]:
    """Returns the pads of a Conv of known shapes, begins then ends, with `auto_pad` resolved.

    SAME pads so that the output has ceil(size/stride) positions; an odd pad is longer at the end (SAME_UPPER) or at the begin (SAME_LOWER).
    """
    weight, shape = static_shape(conv.inputs[1]) or (), static_shape(conv.inputs[0]) or ()
    rank = len(weight) - 2
    auto_pad = conv.attributes.get_string("auto_pad", "NOTSET")
    if auto_pad == "NOTSET":
        return list(conv.attributes.get_ints("pads", ())) or [0] * 2 * rank
    if auto_pad == "VALID":
        return [0] * 2 * rank
    strides, dilations = _per_axis(conv, "strides", rank), _per_axis(conv, "dilations", rank)
    begins, ends = [], []
    for size, kernel, stride, dilation in zip(shape[2:], weight[2:], strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size)
        small = total // 2
        begins.append(small if auto_pad == "SAME_UPPER" else total - small)
        ends.append(total - begins[-1])
    return begins + ends


def _per_axis(conv: ir.Node, name: str, rank: int) -> tuple[int, ...]:
    return tuple(conv.attributes.get_ints(name, ())) or (1,) * rank


def _conv_form(conv: ir.Node, norms: list[ir.Node]) -> LinearForm:
    source, shape, out_shape = conv.inputs[0], static_shape(conv.inputs[0]), static_shape(conv.outputs[0])
    weight_shape = static_shape(conv.inputs[1])
    if source is None or shape is None or out_shape is None or weight_shape is None:
        raise ValueError("the form of a Conv needs known shapes")
    rank = len(shape) - 2
    begins = conv_pads(conv)[:rank]
    taps = tuple(
        Taps(-pad, step, count) for pad, step, count in zip(begins, _per_axis(conv, "dilations", rank), weight_shape[2:], strict=True)
    )
    has_bias = len(conv.inputs) > 2 and conv.inputs[2] is not None
    groups, stride = conv.attributes.get_int("group", 1), _per_axis(conv, "strides", rank)
    alone = Geometry(groups, shape[1], out_shape, stride, taps, has_bias)
    geometry = Geometry(groups, shape[1], out_shape, stride, taps, has_bias or bool(norms))
    extra = len(norms)
    return LinearForm(
        source, geometry, conv, tuple(norms), alone.macs + extra * math.prod(out_shape), alone.parameters + 4 * extra * out_shape[1]
    )


def _identity_form(source: ir.Value, norms: list[ir.Node]) -> LinearForm | None:
    shape = static_shape(source)
    if shape is None or len(shape) < 3 or source.dtype not in _FLOATS:
        return None
    rank = len(shape) - 2
    geometry = Geometry(shape[1], shape[1], shape, (1,) * rank, (Taps(0, 1, 1),) * rank, bool(norms))
    return LinearForm(source, geometry, None, tuple(norms), len(norms) * math.prod(shape), 4 * len(norms) * shape[1])


def merged_geometry(geometries: Sequence[Geometry]) -> Geometry:
    """Returns the geometry of the sum of forms with one source, stride and output shape.

    Groups are lifted to the greatest common divisor: a convolution of g groups is one of g' groups with zeros when g' divides g.
    """
    first = geometries[0]
    groups = reduce(math.gcd, [geometry.groups for geometry in geometries])
    taps = tuple(union(axis) for axis in zip(*(geometry.taps for geometry in geometries), strict=True))
    return Geometry(groups, first.in_channels, first.out_shape, first.stride, taps, any(geometry.has_bias for geometry in geometries))


def merged_weights(forms: Sequence[tuple[LinearForm, int]], geometry: Geometry) -> tuple[np.ndarray, np.ndarray]:
    """Adds forms, each so many times, in float64: weight `[O, I/g, *kernel]` and bias `[O]` of `geometry`."""
    total = np.zeros(geometry.weight_shape)
    total_bias = np.zeros(geometry.out_shape[1])
    kernel = geometry.weight_shape[2:]
    for form, times in forms:
        weight, bias = form.weight_and_bias()
        own = form.geometry
        slices: tuple[Any, ...] = tuple(
            slice((tap.start - wide.start) // wide.step, (tap.last - wide.start) // wide.step + 1, max(1, tap.step // wide.step))
            for tap, wide in zip(own.taps, geometry.taps, strict=True)
        )
        outer, inner = geometry.groups, own.groups // geometry.groups  # `inner` of the form's groups lie in one merged group
        rows, columns = own.out_shape[1] // own.groups, own.in_channels // own.groups
        target = total.reshape(outer, inner, rows, inner, columns, *kernel)
        blocks = np.moveaxis(weight.reshape(outer, inner, rows, columns, *weight.shape[2:]), 1, 0)
        diagonal: Any = np.arange(inner)
        every: Any = slice(None)
        target[every, diagonal, every, diagonal, every, *slices] += times * blocks
        total_bias += times * bias
    return total, total_bias
