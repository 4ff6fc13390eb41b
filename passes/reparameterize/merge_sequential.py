"""The pass `merge-convolutions`: two convolutions in a row become one where that is cheaper."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, common_module, constant_array, is_used_once
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.composition import Weights, composed_bias_map, composed_weights, lift
from edgekit.passes.reparameterize.convolutions import freed_bytes, insert_convolution, insert_like, narrowed, why_not_replaced
from edgekit.passes.reparameterize.geometry import Geometry, composed_geometry, is_zero_outside
from edgekit.passes.reparameterize.linear_form import LinearForm, compose, read_operator


@dataclass(frozen=True)
class MergeConvolutions(Pass):
    """Merge a convolution into the convolution after it.

    Before:  x ─ Conv 3x3 (W₁, b₁) ─ Conv 1x1 (W₂, b₂) ─► y
    After:   x ─ Conv 3x3 (W₂·W₁, W₂·b₁ + b₂) ─► y

    The merged kernel covers the taps s₁·u₂ + u₁ of the two, with stride s₁·s₂, the pads of the first and as many groups as both are made
    of. The same for ConvTranspose before a 1x1 convolution; and a Pad with zeros before a convolution becomes its pads. Two are merged when

    1. nothing else reads what is between them;
    2. their weights are constants;
    3. the second pads nothing (a 1x1 kernel never needs to); or the first is 1x1 without pads and has no bias: then what is padded is zero
       in both forms. With a bias, y is Conv(x) + map with a constant map `[1, O, H', W']` instead of the bias;
    4. one convolution (with its map) costs neither more multiply-accumulates nor more bytes than the two. So a depthwise convolution and
       the 1x1 after it stay, as do pairs with few channels between them: they are cheaper.

    Source: Ding et al. 2021, "Diverse Branch Block: Building a Convolution as an Inception-like Unit", section 3.2, transform III; for
    kernels of any two sizes Guo et al. 2020, "ExpandNets: Linear Over-parameterization to Train Compact Convolutional Networks", section 3.
    """

    name: ClassVar[str] = "merge-convolutions"
    effect: ClassVar[Effect] = Effect.EXACT
    removes: ClassVar[frozenset[str]] = frozenset({"Conv"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Merges in the main graph until no two convolutions are left that can be; returns how many convolutions went."""
        if not any(_before(node) for node in model.graph):
            return 0
        editor = GraphEditor(model)
        merged, refused = 0, len(context.refusals)
        while found := sum(_merge_backwards(node, editor, context) for node in list(model.graph) if node.graph is not None):
            merged += found
            del context.refusals[refused:]  # they told of a graph that has changed since
        return merged


def _before(second: ir.Node) -> ir.Node | None:
    """Returns the convolution or padding whose output the Conv `second` reads."""
    x = second.inputs[0] if second.op_type == "Conv" and second.domain == "" else None
    first = x.producer() if x is not None else None
    if first is None or first.op_type not in ("Conv", "ConvTranspose", "Pad") or first.domain != "" or first.graph is not second.graph:
        return None
    return first


def _merge_backwards(second: ir.Node, editor: GraphEditor, context: Context) -> int:
    """Merges `second` with the convolution before it, what they became with the one before that, and so on."""
    merged = 0
    while (first := _before(second)) is not None:
        where = second.name or second.op_type
        if context.skips(where):
            break
        result = _merge_transposed(first, second, editor) if first.op_type == "ConvTranspose" else _merge(first, second, editor)
        if isinstance(result, str):
            context.refuse(where, f"it is not merged with {first.op_type} '{first.name}': {result}")
            break
        context.applied(where)
        second, merged = result, merged + 1
    return merged


def _merge(first: ir.Node, second: ir.Node, editor: GraphEditor) -> ir.Node | str:
    """Puts one Conv (and a bias map) in the place of two; returns the Conv, or the condition that failed."""
    pair = _read_pair(first, second)
    if isinstance(pair, str):
        return pair
    inner, outer = pair
    form = compose(outer, inner)
    if isinstance(form, str):
        if not inner.geometry.has_bias or not is_zero_outside(outer.geometry, inner.geometry):
            return form
        return _merge_with_map(inner, outer, editor)
    dtype = form.source.dtype or ir.DataType.FLOAT
    why = why_not_replaced(form.geometry, form.macs, form.nodes, dtype)
    if why is not None:
        return why
    weights = narrowed(form.weights(), dtype)
    if weights is None:
        return f"the merged weights would not be finite in {dtype.numpy().name}"
    return _replace(inner, outer, form.geometry, weights, None, editor)


def _merge_with_map(inner: LinearForm, outer: LinearForm, editor: GraphEditor) -> ir.Node | str:
    """Merges where only the bias of the first keeps the two from being one form: padding has no bias, so places differ in theirs."""
    geometry = replace(composed_geometry(outer.geometry, inner.geometry), has_bias=False)
    nodes, dtype = (*inner.nodes, *outer.nodes), outer.source.dtype or ir.DataType.FLOAT
    why = why_not_replaced(geometry, inner.macs + outer.macs, nodes, dtype)
    if why is not None:
        return why
    weight_bytes, map_bytes = (math.prod(shape) * dtype.itemsize for shape in (geometry.weight_shape, geometry.out_shape[1:]))
    if weight_bytes + map_bytes > freed_bytes(nodes):
        return f"the first has a bias and the second pads it with zeros: a constant map for it would take {math.ceil(map_bytes)} bytes"
    first, second = inner.weights(), outer.weights()
    shift = composed_bias_map(second, outer.geometry, first[1], inner.geometry.out_shape[2:])
    weight, _ = composed_weights(second, outer.geometry, first, inner.geometry, geometry)
    weights = narrowed((weight, shift), dtype)
    if weights is None:
        return f"the merged weights would not be finite in {dtype.numpy().name}"
    return _replace(inner, outer, geometry, (weights[0], np.zeros(geometry.out_shape[1], dtype.numpy())), weights[1][None], editor)


def _read_pair(first: ir.Node, second: ir.Node) -> tuple[LinearForm, LinearForm] | str:
    if not is_used_once(first.outputs[0]):
        return f"the output of {first.op_type} '{first.name}' is read elsewhere"
    inner, outer = read_operator(first), read_operator(second)
    if isinstance(inner, LinearForm) and isinstance(outer, LinearForm):
        return inner, outer
    return next((why for why in (inner, outer) if isinstance(why, str)), f"{first.op_type} '{first.name}' is not read as a convolution")


def _replace(
    inner: LinearForm, outer: LinearForm, geometry: Geometry, weights: Weights, shift: np.ndarray | None, editor: GraphEditor
) -> ir.Node:
    nodes, (last,) = [*inner.nodes, *outer.nodes], outer.nodes
    made = insert_convolution(inner.source, geometry, weights, nodes, last, editor)
    conv = made.producer()
    assert conv is not None
    if shift is not None:
        module = common_module(nodes)
        prefix = module or last.name or "merged"
        constant = editor.add_initializer(f"{prefix}.bias_map", shift, made_from=[value for node in nodes for value in node.inputs])
        add = ir.node("Add", [made, constant], name=editor.unique_name(f"{prefix}/Add"))
        made = insert_like(add, last, editor, module)
    editor.replace_value(last.outputs[0], made)
    editor.remove(nodes)
    return conv


def _merge_transposed(first: ir.Node, second: ir.Node, editor: GraphEditor) -> ir.Node | str:
    """Merges a ConvTranspose, weight `[I, M/g, *kernel]`, with the 1x1 Conv after it: each place of the result is mixed on its own."""
    x, between, outer = first.inputs[0], first.outputs[0], read_operator(second)
    weight, bias = constant_array(first.inputs[1]), constant_array(first.inputs[2]) if len(first.inputs) > 2 else None
    if not is_used_once(between):
        return f"the output of {first.op_type} '{first.name}' is read elsewhere"
    if weight is None or (bias is None and len(first.inputs) > 2 and first.inputs[2] is not None):
        return f"the weight or bias of ConvTranspose '{first.name}' is not a constant"
    shape = static_shape(x)
    if not isinstance(outer, LinearForm) or shape is None or x is None or x.dtype is None:
        return outer if isinstance(outer, str) else f"the shapes around ConvTranspose '{first.name}' are not known"
    same_places = outer.geometry.in_shape[2:] == outer.geometry.out_shape[2:]
    if not same_places or any((tap.start, tap.count) != (0, 1) for tap in outer.geometry.taps) or max(outer.geometry.stride) > 1:
        return "after a ConvTranspose only a 1x1 convolution of stride 1 without pads is merged"
    parts = first.attributes.get_int("group", 1)
    groups = math.gcd(parts, outer.geometry.groups)
    outputs = outer.geometry.out_shape[1] // groups
    old, new = (math.prod(shape) * width * math.prod(weight.shape[2:]) for width in (weight.shape[1], outputs))
    if new > old + outer.macs:
        return f"one ConvTranspose would cost more: {new} multiply-accumulates instead of {old + outer.macs}"
    needed, freed = math.ceil(shape[1] * outputs * math.prod(weight.shape[2:]) * x.dtype.itemsize), freed_bytes((first, second))
    if needed > freed:
        return f"one ConvTranspose would cost more: its weight takes {needed} bytes, and {freed} that nothing else reads go"
    mix, shift = outer.weights()
    spread = np.swapaxes(weight.astype(np.float64).reshape(parts, shape[1] // parts, *weight.shape[1:]), 1, 2)  # [g₁, M/g₁, I/g₁, *kernel]
    wide = lift(spread.reshape(-1, *spread.shape[2:]), parts, groups)  # [M, I/g, *kernel]
    left = lift(mix, outer.geometry.groups, groups).reshape(groups, outputs, -1)
    product = (left @ wide.reshape(groups, left.shape[2], -1)).reshape(groups, outputs, shape[1] // groups, *weight.shape[2:])
    merged = np.swapaxes(product, 1, 2).reshape(shape[1], outputs, *weight.shape[2:])
    if bias is not None:
        shift = shift + (left @ bias.astype(np.float64).reshape(groups, -1, 1)).reshape(-1)
    weights = narrowed((merged, shift), x.dtype)
    if weights is None:
        return f"the merged weights would not be finite in {x.dtype.numpy().name}"
    return _replace_transposed(first, second, groups, weights, editor)


def _replace_transposed(first: ir.Node, second: ir.Node, groups: int, weights: Weights, editor: GraphEditor) -> ir.Node:
    made_from = [*first.inputs, *second.inputs]
    module = common_module([first, second])
    prefix = module or second.name or "merged"
    inputs = [first.inputs[0], editor.add_initializer(f"{prefix}.weight", np.ascontiguousarray(weights[0]), made_from=made_from)]
    if weights[1].any():
        inputs.append(editor.add_initializer(f"{prefix}.bias", weights[1], made_from=made_from))
    node = ir.Node(
        "", "ConvTranspose", inputs, [*(a for a in first.attributes.values() if a.name != "group"), ir.AttrInt64("group", groups)],
        name=editor.unique_name(f"{prefix}/ConvTranspose"),
    )  # fmt: skip
    editor.replace_value(second.outputs[0], insert_like(node, second, editor, module))
    editor.remove([first, second])
    return node
