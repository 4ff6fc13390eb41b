"""Rewrites, exactly, what OpenVINO's ONNX front end refuses or computes wrongly (measured on OpenVINO 2026.4.1).

Each operator has one function; what cannot be rewritten here is refused in `refusals`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from edgekit.graph.shapes import infer_shapes, static_shape


def legalize(model: ir.Model) -> None:
    """Inlines functions and rewrites operators, in place; shapes are inferred first, since the rewritings need them."""
    if model.functions:
        InlinePass()(model)
    infer_shapes(model)
    for node in list(model.graph.all_nodes()):
        expand = _EXPANSIONS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if expand is not None:
            expand(node)


def _causal_attention(node: ir.Node) -> None:
    """Writes the causal mask out as a constant where OpenVINO misplaces it.

    ONNX: query i sees key j iff j <= i + P, with P the length of past_key. OpenVINO aligns the mask to the last key instead.

    Before:  Q, K, V, mask? ─ Attention(is_causal=1)
    After:   Q, K, V, (mask + causal mask [L, P+S]) ─ Attention
    """
    if not causal_is_misplaced(node):
        return
    query, key = static_shape(node.inputs[0]), static_shape(node.inputs[1])
    past = static_shape(_input(node, 4))
    mask = _input(node, 3)
    if query is None or key is None or past is None:
        return
    length, total = query[-2], past[2] + key[-2]
    allowed = np.tri(length, total, past[2], dtype=np.bool_)
    tape = _Builder(node)
    if mask is None:
        combined = tape.constant("causal", allowed)
    elif mask.dtype == ir.DataType.BOOL:
        combined = tape.op("And", [mask, tape.constant("causal", allowed)], "mask")
    elif mask.dtype is not None:
        bias = np.where(allowed, 0.0, -np.inf).astype(mask.dtype.numpy())
        combined = tape.op("Add", [mask, tape.constant("causal", bias)], "mask")
    else:
        return
    tape.insert_before()
    node.resize_inputs(max(len(node.inputs), 4))
    node.replace_input_with(3, combined)
    node.attributes["is_causal"] = ir.AttrInt64("is_causal", 0)


def causal_is_misplaced(node: ir.Node) -> bool:
    """Whether OpenVINO would put the causal mask of this Attention in the wrong place: where it has a past but no nonpad_kv_seqlen."""
    return node.attributes.get_int("is_causal", 0) == 1 and _input(node, 4) is not None and _input(node, 6) is None


def _explicit_pool(node: ir.Node) -> None:
    """Replaces ceil_mode by end padding, which gives the same windows.

    OpenVINO counts a last window that starts beyond the input (ONNX and PyTorch drop it), and divides an average by the wrong size where
    a window reaches over the padding. Padding of an AveragePool that counts becomes a Pad node.
    """
    shape, output = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    kernel = node.attributes.get_ints("kernel_shape", ())
    if not node.attributes.get_int("ceil_mode", 0) or node.attributes.get_string("auto_pad", "NOTSET") != "NOTSET":
        return
    if shape is None or output is None:
        return
    axes = range(len(kernel))
    strides = node.attributes.get_ints("strides", (1,) * len(kernel))
    dilations = node.attributes.get_ints("dilations", (1,) * len(kernel))
    pads = list(node.attributes.get_ints("pads", (0,) * (2 * len(kernel))))
    sizes = list(shape[2:])
    if node.op_type == "AveragePool" and node.attributes.get_int("count_include_pad", 0) == 1:
        if any(pads):
            tape = _Builder(node)
            amounts = np.array([0, 0, *pads[: len(kernel)], 0, 0, *pads[len(kernel) :]], np.int64)
            node.replace_input_with(0, tape.op("Pad", [node.inputs[0], tape.constant("pads", amounts)], "padded"))
            tape.insert_before()
            sizes = [sizes[axis] + pads[axis] + pads[axis + len(kernel)] for axis in axes]
            pads = [0] * len(pads)
        node.attributes["count_include_pad"] = ir.AttrInt64("count_include_pad", 0)
    for axis in axes:
        reach = (output[2 + axis] - 1) * strides[axis] + (kernel[axis] - 1) * dilations[axis] + 1
        end = axis + len(kernel)
        pads[end] = max(pads[end], reach - sizes[axis] - pads[axis])
    node.attributes["pads"] = ir.AttrInt64s("pads", pads)
    node.attributes["ceil_mode"] = ir.AttrInt64("ceil_mode", 0)


def _explicit_transposed_convolution(node: ir.Node) -> None:
    """Turns `auto_pad=SAME_UPPER` into explicit pads: OpenVINO puts an odd padding element at the start, as for SAME_LOWER.

    ONNX: total = stride (in - 1) + output_padding + (kernel - 1) dilation + 1 - out, of which SAME_UPPER puts the larger half at the end.
    """
    shape, weight, output = static_shape(node.inputs[0]), static_shape(node.inputs[1]), static_shape(node.outputs[0])
    if node.attributes.get_string("auto_pad", "NOTSET") != "SAME_UPPER" or shape is None or weight is None or output is None:
        return
    rank = len(shape) - 2
    strides = node.attributes.get_ints("strides", (1,) * rank)
    dilations = node.attributes.get_ints("dilations", (1,) * rank)
    extra = node.attributes.get_ints("output_padding", (0,) * rank)
    totals = [
        strides[axis] * (shape[2 + axis] - 1) + extra[axis] + (weight[2 + axis] - 1) * dilations[axis] + 1 - output[2 + axis]
        for axis in range(rank)
    ]
    if any(total < 0 for total in totals):
        return
    node.attributes["pads"] = ir.AttrInt64s("pads", [total // 2 for total in totals] + [total - total // 2 for total in totals])
    node.attributes.pop("auto_pad")
    node.attributes.pop("output_shape", None)


def _plain_lp_normalization(node: ir.Node) -> None:
    """OpenVINO adds 1e-10 under the root (1e-9 for p=1), which is wrong for short vectors.

    Before:  x ─ LpNormalization(p)
    After:   x ─ Div(x, Max(ReduceL1 | ReduceL2(x), smallest normal number))
    """
    value = node.inputs[0]
    if value is None or value.dtype is None:
        return
    order = node.attributes.get_int("p", 2)
    tape = _Builder(node)
    axes = tape.constant("axes", np.array([node.attributes.get_int("axis", -1)], np.int64))
    norm = tape.op(f"ReduceL{order}", [value, axes], "norm", {"keepdims": 1})
    half = value.dtype == ir.DataType.FLOAT16
    tiny = tape.constant("tiny", np.array(np.finfo(np.float16 if half else np.float32).tiny, value.dtype.numpy()))
    result = tape.op("Div", [value, tape.op("Max", [norm, tiny], "bounded")], "quotient")
    tape.replace(result)


def _explicit_split(node: ir.Node) -> None:
    """Gives the sizes of the parts: OpenVINO refuses `num_outputs` that does not divide the axis (ONNX: the last part is smaller)."""
    shape = static_shape(node.inputs[0])
    if _input(node, 1) is not None or shape is None:
        return
    size = shape[node.attributes.get_int("axis", 0)]
    count = node.attributes.get_int("num_outputs", len(node.outputs))
    part = math.ceil(size / count)
    sizes = [max(0, min(part, size - index * part)) for index in range(count)]
    if len(set(sizes)) == 1:
        return
    tape = _Builder(node)
    node.resize_inputs(2)
    node.replace_input_with(1, tape.constant("sizes", np.array(sizes, np.int64)))
    tape.insert_before()
    node.attributes.pop("num_outputs", None)


_EXPANSIONS: dict[str, Callable[[ir.Node], None]] = {
    "Attention": _causal_attention,
    "AveragePool": _explicit_pool,
    "ConvTranspose": _explicit_transposed_convolution,
    "LpNormalization": _plain_lp_normalization,
    "MaxPool": _explicit_pool,
    "Split": _explicit_split,
}


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


class _Builder:
    """Collects nodes that go before a node or replace it; names derive from the node's first output."""

    def __init__(self, node: ir.Node) -> None:
        self._node = node
        self._nodes: list[ir.Node] = []

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        return self._add(ir.node("Constant", [], {"value": ir.tensor(array)}), name)

    def op(self, op_type: str, inputs: list[ir.Value | None], name: str, attributes: dict[str, int] | None = None) -> ir.Value:
        return self._add(ir.node(op_type, inputs, attributes or {}), name)

    def _add(self, node: ir.Node, name: str) -> ir.Value:
        node.name = f"{self._node.name or self._node.outputs[0].name}/{name}"
        node.outputs[0].name = f"{self._node.outputs[0].name}/{name}"
        node.metadata_props.update(self._node.metadata_props)
        self._nodes.append(node)
        return node.outputs[0]

    def _graph(self) -> ir.Graph:
        graph = self._node.graph
        assert isinstance(graph, ir.Graph), "functions were inlined before"
        return graph

    def insert_before(self) -> None:
        self._graph().insert_before(self._node, self._nodes)

    def replace(self, result: ir.Value) -> None:
        old = self._node.outputs[0]
        ir.convenience.replace_nodes_and_values(self._graph(), self._node, [self._node], self._nodes, [old], [result])
