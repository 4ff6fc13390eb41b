"""The pass `drop-attention-bias`: biases of keys do nothing under the softmax, biases of values move behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.finite import is_finite
from edgekit.graph.fusions.matching import in_range
from edgekit.graph.shapes import static_shape

_ATTRIBUTES = frozenset({"is_causal", "kv_num_heads", "q_num_heads", "qk_matmul_output_mode", "scale", "softcap", "softmax_precision"})
_QUERY, _KEY, _VALUE = 0, 1, 2


@dataclass(frozen=True)
class DropAttentionBias(Pass):
    """Remove the bias of key projections, and move that of value projections into the output projection.

    Before:  x ─ MatMul(W) ─ Add(b_k, b_v) ─ Split ─┬─ Attention(Q, K, V) ─ MatMul(W_o) ─ Add(b_o) ─► y
    After:   x ─ MatMul(W) ─ Split ─┬─ Attention(Q, K, V) ─ MatMul(W_o) ─ Add(b_o + b_v·W_o) ─► y

    A bias b_k adds q_i·b_k to all scores of query i, which the softmax does not notice. The rows of the softmax sum to one, so b_v comes
    out of the attention as it went in. Numbers of the channels are sent through the layout operators (Reshape, Transpose, Split, Slice,
    Gather, Squeeze, Unsqueeze, Expand) between the bias and each Attention that reads it: merged and separate projections, grouped
    queries, inputs of three and of four axes are one case. A whole Add disappears when every element of its bias is zero, is read by
    nothing, or is one of the following; an Add of which elements would stay is left alone.

    Of keys, wherever they are read:
    1. every key position gets the same number in a head's channel, and nothing between the bias and the scores rotates or normalizes;
    2. there is no softcap, no cache of keys, and neither the keys nor the scores are given out.
    Of values, wherever they are read:
    3. every position gets the same number in a head's channel; there is no cache, and the values are not given out;
    4. no query is hidden from all keys: causal masks never do that, constant masks are looked into, computed ones may;
    5. the heads' outputs go, through layout operators alone, into one MatMul with a constant weight and an Add of a constant bias.

    Source: Namazifar, Hazarika & Hakkani-Tür 2023, "Role of Bias Terms in Dot-Product Attention", section 3; the definition of
    attention in Vaswani et al. 2017, "Attention Is All You Need", equation 1.
    """

    name: ClassVar[str] = "drop-attention-bias"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> int:
        """Removes every bias that can be removed whole; returns how many Adds disappeared."""
        editor: GraphEditor | None = None
        removed = 0
        for add in [node for node in model.graph if node.op_type == "Add" and node.domain == ""]:
            where = add.name or "Add"
            bias = _bias(add)
            readings = _readings(add, bias.array) if bias is not None else None
            if bias is None or not readings or context.skips(where):
                continue
            moves = _moves(bias.array, readings)
            if isinstance(moves, str):
                context.refuse(where, moves)
                continue
            editor = editor or GraphEditor(model)
            for projection, (index, array) in moves.items():
                editor.set_constant(projection, index, array)
            editor.replace_value(add.outputs[0], bias.product)
            editor.remove([add])
            context.applied(where)
            removed += 1
        return removed


@dataclass(frozen=True)
class _Bias:
    """A constant that an Add adds along the last axis of a product: `array` is `[C]`."""

    array: np.ndarray
    product: ir.Value


def _bias(add: ir.Node) -> _Bias | None:
    for index in (0, 1):
        array, product = constant_array(add.inputs[index]), add.inputs[1 - index]
        shape = static_shape(product)
        if array is None or product is None or shape is None or product.producer() is None or constant_array(product) is not None:
            continue
        if shape == static_shape(add.outputs[0]) and array.shape[-1:] in ((), (1,), shape[-1:]) and array.size in (1, shape[-1]):
            return _Bias(np.broadcast_to(array.reshape(-1), shape[-1:]), product)
    return None


@dataclass(frozen=True)
class _Reading:
    """Input `index` of `node` reads channels of the bias: `channels` has the input's shape; -1 where there is none."""

    node: ir.Node
    index: int
    channels: np.ndarray


def _readings(add: ir.Node, bias: np.ndarray) -> list[_Reading] | None:
    """Returns what reads the channels of a bias after layout operators; None when no Attention is among it."""
    value = add.outputs[0]
    if not _reaches_attention(value):
        return None
    shape = static_shape(value) or ()
    found: list[_Reading] = []
    waiting = [(value, np.broadcast_to(np.arange(bias.size, dtype=np.int32), shape))]
    while waiting:
        current, channels = waiting.pop()
        if current.is_graph_output():
            found.append(_Reading(add, -1, channels))
        for node, index in current.uses():
            moved = _send(node, channels) if index == 0 else None
            if moved is None:
                found.append(_Reading(node, index, channels))
            else:
                waiting += zip(node.outputs, moved, strict=True)
    return found


def _reaches_attention(value: ir.Value) -> bool:
    """Whether an Attention reads `value` after layout operators; cheap, where `_readings` carries arrays."""
    waiting = [value]
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type == "Attention" and node.domain == "":
                return True
            if node.op_type in _SENDERS and node.domain == "":
                waiting += node.outputs
    return False


def _send(node: ir.Node, array: np.ndarray) -> list[np.ndarray] | None:
    """Sends an array through a layout operator in place of its first input; None for other operators."""
    shapes = [static_shape(output) for output in node.outputs]
    if node.domain != "" or node.op_type not in _SENDERS or node.graph is None or any(shape is None for shape in shapes):
        return None
    return _SENDERS[node.op_type](node, array, [shape for shape in shapes if shape is not None])


def _reshape(node: ir.Node, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    return [array.reshape(shapes[0])]


def _expand(node: ir.Node, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    return [np.broadcast_to(array, shapes[0])]


def _transpose(node: ir.Node, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    return [array.transpose(node.attributes.get_ints("perm", tuple(reversed(range(array.ndim)))))]


def _split(node: ir.Node, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    axis = node.attributes.get_int("axis", 0)
    ends = np.cumsum([shape[axis] for shape in shapes])[:-1]
    return np.split(array, ends, axis)


def _slice(node: ir.Node, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray] | None:
    operands = [constant_array(value) for value in node.inputs[1:] if value is not None]
    if len(operands) != len(node.inputs) - 1 or any(operand is None for operand in operands):
        return None
    starts, ends, *rest = [[int(number) for number in operand.reshape(-1)] for operand in operands if operand is not None]
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    if any(step < 1 for step in steps):  # ends of negative steps mean something else in numpy
        return None
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        array = array[(slice(None),) * (axis % array.ndim) + (slice(start, end, step),)]
    return [array]


def _gather(node: ir.Node, array: np.ndarray, shapes: Sequence[tuple[int, ...]]) -> list[np.ndarray] | None:
    indices = constant_array(node.inputs[1])
    return None if indices is None else [np.take(array, indices, node.attributes.get_int("axis", 0))]


_SENDERS: dict[str, Callable[[ir.Node, np.ndarray, Sequence[tuple[int, ...]]], list[np.ndarray] | None]] = {
    "Expand": _expand,
    "Flatten": _reshape,
    "Gather": _gather,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _reshape,
    "Transpose": _transpose,
    "Unsqueeze": _reshape,
}


_Move = tuple[int, np.ndarray]
"""Input of the Add of an output projection, and what is added to that bias or what it becomes."""


def _moves(bias: np.ndarray, readings: Sequence[_Reading]) -> dict[ir.Node, _Move] | str:
    """Returns, by Add, what the biases of output projections become when a bias goes, or the condition that failed."""
    if not np.isfinite(bias).all():
        return "its bias is not finite"
    deltas: dict[ir.Node, _Move] = {}
    for reading in readings:
        if not (bias != 0)[reading.channels].any():
            continue
        node, part = reading.node, reading.index
        if node.op_type != "Attention" or node.domain != "" or part not in (_KEY, _VALUE):
            return _who_reads(reading)
        heads = _by_head(reading)
        why = _why_not_key(node, heads) if part == _KEY else _why_not_value(node, heads)
        if why is not None:
            return f"key bias of Attention '{node.name}': {why}" if part == _KEY else f"value bias of Attention '{node.name}': {why}"
        if part == _VALUE:
            found = _behind(node, heads, bias)
            if isinstance(found, str):
                return f"value bias of Attention '{node.name}': {found}"
            deltas[found[0]] = found[1]
    result: dict[ir.Node, _Move] = {}
    for add, (index, delta) in deltas.items():
        old = constant_array(add.inputs[index])
        assert old is not None
        new = in_range(old.astype(np.float64) + delta, old.dtype)
        if new is None:
            return f"the bias of Add '{add.name}' would not be finite in {old.dtype.name}"
        result[add] = index, new
    return result


def _who_reads(reading: _Reading) -> str:
    if reading.index == -1:
        return "it is given out by the graph"
    if reading.node.op_type == "Attention" and reading.index == _QUERY:
        return f"elements of it are biases of the queries of Attention '{reading.node.name}' and stay"
    return f"{reading.node.op_type} '{reading.node.name}' reads it"


def _by_head(reading: _Reading) -> np.ndarray:
    """The channels at a key or value input of an Attention as `[B, H, N, D]`."""
    channels = reading.channels
    if channels.ndim == 3:
        heads = reading.node.attributes.get_int("kv_num_heads", 1)
        channels = channels.reshape(*channels.shape[:2], heads, -1).transpose(0, 2, 1, 3)
    return channels


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _is_given(node: ir.Node, index: int) -> bool:
    """Whether output `index` of `node` is read or given out."""
    return index < len(node.outputs) and (bool(node.outputs[index].uses()) or node.outputs[index].is_graph_output())


def _why_not_both(attention: ir.Node, part: int) -> str | None:
    unknown = set(attention.attributes) - _ATTRIBUTES
    if unknown:
        return f"its attribute '{min(unknown)}' is not understood"
    if _input(attention, 4) is not None or _input(attention, 5) is not None:
        return "it has a cache: earlier positions did not get the bias"
    if _is_given(attention, part):
        return f"its present {'keys' if part == _KEY else 'values'} are read"
    return None


def _why_not_key(attention: ir.Node, channels: np.ndarray) -> str | None:
    if attention.attributes.get_float("softcap", 0.0) != 0:
        return "it has a softcap: a shift of the scores does not pass through tanh"
    if _is_given(attention, 3):
        return "its scores are read"
    if (channels != channels[:, :, :1]).any():
        return "the positions get different biases"
    return _why_not_both(attention, _KEY)


def _why_not_value(attention: ir.Node, channels: np.ndarray) -> str | None:
    if (channels != channels[:1, :, :1]).any():
        return "the positions get different biases"
    return _why_not_both(attention, _VALUE) or _why_rows_may_be_empty(attention)


def _why_rows_may_be_empty(attention: ir.Node) -> str | None:
    """Returns why the weights of some query may not sum to one, or None. Every query sees the first key under a causal mask alone."""
    if _input(attention, 6) is not None:
        return "the number of its keys is computed: it may be 0"
    mask = _input(attention, 3)
    if mask is None or is_finite(mask):
        return None
    array = constant_array(mask)
    if array is None:
        return "its mask is computed: it may hide all keys from a query"
    hidden = float(np.finfo(np.float16 if array.itemsize == 2 else np.float32).min) / 2  # scores may carry it to minus infinity
    seen = array if array.dtype == bool else array.astype(np.float64) > hidden
    if attention.attributes.get_int("is_causal", 0):
        queries = _positions(attention.inputs[_QUERY])
        shape = np.broadcast_shapes(seen.shape[-2:], (queries, seen.shape[-1]))
        seen = seen & np.tri(*shape, dtype=np.bool_)
    return None if seen.any(-1).all() else "its mask hides all keys from a query"


def _positions(value: ir.Value | None) -> int:
    return (static_shape(value) or (0, 0))[-2]  # second to last of [B, H, N, D]; [B, N, H·D] too


def _behind(attention: ir.Node, channels: np.ndarray, bias: np.ndarray) -> tuple[ir.Node, _Move] | str:
    """Returns the Add of the projection after an Attention and what the values' bias adds to it, `[O]`; or the condition that failed."""
    per_head = channels[0, :, 0]  # [H of keys and values, D]
    value, shape = attention.outputs[0], static_shape(attention.outputs[0])
    if shape is None:
        return "the shape of its output is not known"
    query = static_shape(attention.inputs[_QUERY]) or ()
    heads = query[1] if len(query) == 4 else attention.attributes.get_int("q_num_heads", 1)
    repeated = np.repeat(per_head, heads // per_head.shape[0], axis=0)  # [H, D]: each head of values serves a group of queries
    current = np.broadcast_to(repeated[:, None] if len(shape) == 4 else repeated.reshape(-1), shape)
    while is_used_once(value):
        node, index = next(iter(value.uses()))
        moved = _send(node, current) if index == 0 else None
        if moved is None:
            return _into(node, index, current, bias)
        if len(moved) != 1:
            return f"its output is split by {node.op_type} '{node.name}'"
        value, current = node.outputs[0], moved[0]
    return f"its output, '{value.name}', is not read by the output projection alone"


def _into(matmul: ir.Node, index: int, channels: np.ndarray, bias: np.ndarray) -> tuple[ir.Node, _Move] | str:
    weight = constant_array(matmul.inputs[1]) if matmul.op_type == "MatMul" and matmul.domain == "" and index == 0 else None
    if weight is None or weight.ndim != 2:
        return f"its output is read by {matmul.op_type} '{matmul.name}', which is no projection with constant weights"
    flat = channels.reshape(-1, channels.shape[-1])
    if (flat != flat[0]).any():
        return f"MatMul '{matmul.name}' gets different biases at different places"
    product = matmul.outputs[0]
    add, place = next(iter(product.uses())) if is_used_once(product) else (None, 0)
    if add is None or add.op_type != "Add" or add.domain != "" or constant_array(add.inputs[1 - place]) is None:
        return f"MatMul '{matmul.name}' has no bias that could take it"
    old = constant_array(add.inputs[1 - place])
    assert old is not None
    if np.broadcast_shapes(old.shape, weight.shape[1:]) not in (old.shape, weight.shape[1:]):
        return f"the bias of Add '{add.name}' is not one number per column"
    return add, (1 - place, bias[flat[0]].astype(np.float64) @ weight.astype(np.float64))
