"""The pass `fold-quantized-scale`: a scaling after a layer with quantized weights disappears into their dequantization scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import in_range, take_over
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine import AffineNode, read_affine
from edgekit.passes.reparameterize.batch_norm import Affine, is_batch_norm


@dataclass(frozen=True)
class FoldQuantizedScale(Pass):
    """Fold a scale per output channel into the dequantization scales of the layer before it; the quantized weights stay bit for bit.

    Before:  q ─ DequantizeLinear(s, z) ─┐
             x ───────────────────────── MatMul ─ Add(b) ─ Mul(a) ─► y            (Conv with its bias; Div, Neg, BatchNormalization)
    After:   q ─ DequantizeLinear(s·a, z) ┐
             x ───────────────────────── MatMul ─ Add(a·b) ─► y

    (q − z)·s·a is what was computed before, and the zero point is not touched. It is done in float64 and cast once. The scaling stays when

    1. no MatMul `[in, out]` or Conv with constant quantized weights makes the value, perhaps with a bias between;
    2. it varies along another axis than the output channels;
    3. the scales vary along an axis other than the output channels and none has a number per output channel;
    4. the layer's output, or the dequantized weight, is read elsewhere or is a graph output;
    5. the new scales would not be positive (quantized operators of runtimes expect that) or not finite in their dtype, or too small for it;
    6. it shifts as well and the layer has no bias, so that one node would make room for another.

    One scale for the whole matrix becomes one per channel where the factor needs that.

    Source: Nair, Valanarasu & Patel 2024, "Diffscaler: Enhancing the Generative Prowess of Diffusion Transformers" (scale and shift per
    task); Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3.1.2 (scales per channel).
    """

    name: ClassVar[str] = "fold-quantized-scale"
    effect: ClassVar[Effect] = Effect.EXACT
    removes: ClassVar[frozenset[str]] = frozenset({"BatchNormalization"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Folds in the main graph; returns how many scalings went."""
        if not any(node.op_type == "DequantizeLinear" and node.domain == "" for node in model.graph):
            return 0
        editor = GraphEditor(model)
        folded = 0
        for node in list(model.graph):
            scaling, where = read_affine(node), node.name or node.op_type
            if scaling is None or (scaling.map.scale == 1).all() or context.skips(where):
                continue
            layer = _layer_before(scaling)
            if layer is None:
                continue
            why = _fold(scaling, layer, editor)
            if why is None:
                folded += 1
                context.applied(where)
            else:
                context.refuse(where, why)
        return folded


@dataclass(frozen=True)
class _Layer:
    """A MatMul or Conv with quantized weights before a scaling.

    Attributes:
        node: The MatMul or Conv.
        dequantize: What makes its weight.
        axis: The axis of the output channels in the weight.
        channels: Their axis in the output.
        bias: The Add between the layer and the scaling, if there is one.
    """

    node: ir.Node
    dequantize: ir.Node
    axis: int
    channels: int
    bias: AffineNode | None


def _layer_before(scaling: AffineNode) -> _Layer | None:
    bias = read_affine(scaling.x.producer())
    if bias is not None and (is_batch_norm(bias.node) or not (bias.map.scale == 1).all()):
        return None
    value = scaling.x if bias is None else bias.x
    node, shape = value.producer(), static_shape(value)
    if node is None or node.domain != "" or node.op_type not in ("MatMul", "Conv") or shape is None:
        return None
    weight = node.inputs[1]
    made_by = weight.producer() if weight is not None else None
    if made_by is None or made_by.op_type != "DequantizeLinear" or made_by.domain != "":
        return None
    if node.op_type == "Conv":
        return _Layer(node, made_by, 0, 1, bias)
    return _Layer(node, made_by, 1, len(shape) - 1, bias) if len(static_shape(weight) or ()) == 2 else None


def _fold(scaling: AffineNode, layer: _Layer, editor: GraphEditor) -> str | None:
    """Folds the scaling into the layer; returns the condition that failed when it cannot."""
    factor = scaling.along(layer.channels)
    if factor is None:
        return f"it varies along axis {scaling.axis}, which is not that of the output channels of {layer.node.op_type} '{layer.node.name}'"
    weight = layer.dequantize.outputs[0]
    between = [layer.node.outputs[0], *([layer.bias.output] if layer.bias is not None else [])]
    if not all(is_used_once(value) for value in between):
        return f"the output of {layer.node.op_type} '{layer.node.name}' is read elsewhere"
    if not is_used_once(weight):
        return f"the dequantized weight of {layer.node.op_type} '{layer.node.name}' is read elsewhere"
    if constant_array(layer.dequantize.inputs[0]) is None:
        return f"the quantized weight of {layer.node.op_type} '{layer.node.name}' is not a constant"
    one = scaling.axis is None and not is_batch_norm(scaling.node)
    scales = _scales(layer, factor, one)
    if isinstance(scales, str):
        return scales
    biases = _biases(layer, factor)
    if isinstance(biases, str):
        return biases
    _write(scaling, layer, scales, biases, editor)
    return None


def _scales(layer: _Layer, factor: Affine, one: bool) -> _Scales | str:
    """The scales times the factor, and the zero points that go with them; or the condition that failed."""
    dequantize = layer.dequantize
    scale = constant_array(dequantize.inputs[1])
    point_value = dequantize.inputs[2] if len(dequantize.inputs) > 2 else None
    point = constant_array(point_value)
    if scale is None or (point_value is not None and point is None):
        return "the dequantization scale or zero point is not a constant"
    shape = static_shape(dequantize.outputs[0]) or ()
    axis = dequantize.attributes.get_int("axis", 1) % len(shape)
    new_axis = None
    if one:
        new = scale.astype(np.float64) * factor.scale[0]
    elif scale.size == 1 and scale.ndim <= 1:
        new, new_axis = scale.astype(np.float64).reshape(()) * factor.scale, layer.axis
        point = None if point is None else np.repeat(point.reshape(-1), factor.scale.size)
    elif scale.ndim == 1 and axis == layer.axis:
        new = scale.astype(np.float64) * factor.scale
    elif scale.ndim == len(shape) and scale.shape[layer.axis] == factor.scale.size:  # blocks along another axis
        new = scale.astype(np.float64) * factor.scale.reshape([-1 if at == layer.axis else 1 for at in range(len(shape))])
    else:
        return f"the scales of '{dequantize.name}' have no number per output channel"
    if not (new > 0).all():
        return "the scales would not be positive"
    cast = in_range(new, scale.dtype)
    if cast is None or not (cast >= np.finfo(scale.dtype).tiny if scale.dtype.kind == "f" else cast > 0).all():
        return f"the scales would not be numbers of full precision in {scale.dtype.name}"
    return _Scales(cast, point if new_axis is not None else None, new_axis)


@dataclass(frozen=True)
class _Scales:
    """New scales; zero points and axis where they change from one for all to one per channel."""

    scale: np.ndarray
    point: np.ndarray | None
    axis: int | None


@dataclass(frozen=True)
class _Biases:
    """The new bias of the layer itself and that of the Add after it; None for one that is not there."""

    own: np.ndarray | None
    added: np.ndarray | None


def _biases(layer: _Layer, factor: Affine) -> _Biases | str:
    """The biases times the scale, the last of them plus the shift; or the condition that failed."""
    value = layer.node.inputs[2] if layer.node.op_type == "Conv" and len(layer.node.inputs) > 2 else None
    array = constant_array(value)
    if value is not None and array is None:
        return f"the bias of Conv '{layer.node.name}' is not a constant"
    old = layer.bias.along(layer.channels) if layer.bias is not None else None
    if layer.bias is not None and old is None:
        return "the bias between varies along another axis than the output channels"
    if value is None and old is None and factor.shift.any():
        return "it shifts, and the layer has no bias to take that"
    dtype = layer.node.outputs[0].dtype
    assert dtype is not None
    own = None if array is None else array.astype(np.float64) * factor.scale + (factor.shift if old is None else 0)
    added = None if old is None else old.shift * factor.scale + factor.shift
    cast = [None if bias is None else in_range(bias, dtype.numpy()) for bias in (own, added)]
    if (own is not None and cast[0] is None) or (added is not None and cast[1] is None):
        return f"the folded bias would not be finite in {dtype.numpy().name}"
    return _Biases(*cast)


def _write(scaling: AffineNode, layer: _Layer, scales: _Scales, biases: _Biases, editor: GraphEditor) -> None:
    editor.set_constant(layer.dequantize, 1, scales.scale)
    if scales.axis is not None:
        layer.dequantize.attributes["axis"] = ir.AttrInt64("axis", scales.axis)
        if scales.point is not None:
            editor.set_constant(layer.dequantize, 2, scales.point)
    if biases.own is not None:
        editor.set_constant(layer.node, 2, biases.own)
    if layer.bias is not None and biases.added is not None:
        _set_bias(layer.bias, biases.added, layer.channels, editor)
    take_over(editor, scaling.output, layer.node.outputs[0] if layer.bias is None else layer.bias.output)
    editor.remove([scaling.node])


def _set_bias(add: AffineNode, bias: np.ndarray, channels: int, editor: GraphEditor) -> None:
    """Gives an Add, or a Sub of a constant, its new constant, which has one number per channel."""
    index = next(place for place, value in enumerate(add.node.inputs) if value is not add.x)
    rank = len(static_shape(add.x) or ())
    shaped = bias.reshape(-1, *[1] * (rank - 1 - channels))
    editor.set_constant(add.node, index, -shaped if add.node.op_type == "Sub" else shaped)
