"""What becomes of the tokens of a stream: which axis of each value that follows they lie along, and where they end.

A stream `[B, N, C]` is followed through everything that is computed from it. Each operator either keeps the tokens on an axis, or ends them
(the class token is picked, the tokens are averaged), or stands in the way: then no token can be left out before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape
from edgekit.passes.prune_tokens.masked_mean import mask_sum


class StandsInTheWayError(Exception):
    """An operator does not allow fewer tokens.

    Args:
        where: The node.
        why: What it does.
    """

    def __init__(self, where: str, why: str) -> None:
        super().__init__(why)
        self.where = where
        self.why = why


@dataclass(frozen=True)
class Along:
    """The tokens lie along `axis`, without the first `start` of them."""

    axis: int
    start: int = 0


@dataclass(frozen=True)
class Operand:
    """What an input of a node holds for each token: it comes from elsewhere and must lose the same tokens, along `axis`.

    With fewer than `rank` axes it is aligned with the node's other inputs from the right.
    """

    node: ir.Node
    index: int
    axis: int
    rank: int


@dataclass(frozen=True)
class SizeConstant:
    """A constant input of a node that holds the number of tokens at `position`, less `start`."""

    node: ir.Node
    index: int
    position: int
    start: int


@dataclass
class Region:
    """All that follows a stream.

    Attributes:
        count: The number of tokens.
        batch: The number of samples, along the first axis of the stream.
        axes: The axes that the tokens lie along, of each value that has some; of attention logits there are two.
        operands: What else has an entry for each token.
        sizes: Constants that hold the number of tokens.
        attentions: Attention whose keys and values are the tokens, in order.
        softmaxes: Softmax over tokens outside of such.
        pools: Means over the tokens, and the axis.
        picked: The largest index of a token that is picked by number, -1 for none.
        skipped: How many tokens at the front are left out of what is computed from the others.
    """

    count: int
    batch: int
    axes: dict[ir.Value, tuple[Along, ...]] = field(default_factory=dict)
    operands: list[Operand] = field(default_factory=list)
    sizes: list[SizeConstant] = field(default_factory=list)
    attentions: list[ir.Node] = field(default_factory=list)
    softmaxes: list[ir.Node] = field(default_factory=list)
    pools: list[tuple[ir.Node, Along]] = field(default_factory=list)
    picked: int = -1
    skipped: int = 0


def follow(graph: ir.Graph, stream: ir.Value, axis: int = 1) -> Region:
    """Follows the tokens of `stream` along `axis` through the graph.

    Raises:
        StandsInTheWayError: Something computes with them that is not understood, or that needs them all.
    """
    shape = static_shape(stream)
    assert shape is not None
    region = Region(shape[axis], shape[0], {stream: (Along(axis),)})
    for node in graph:
        if any(value in region.axes for value in node.inputs if value is not None):
            rule = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
            if rule is None:
                label = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
                raise StandsInTheWayError(node.name or "", f"{label} reads the tokens, and is no operator that works token by token")
            if any(static_shape(value) is None for value in (*node.inputs, *node.outputs) if value is not None and value.name):
                raise StandsInTheWayError(node.name or "", "its shapes are not static")
            rule(node, region)
    for output in graph.outputs:
        if output in region.axes:
            raise StandsInTheWayError(output.name or "", "the graph gives out the tokens themselves")
    return region


def _shape(value: ir.Value | None) -> tuple[int, ...]:
    return static_shape(value) or ()


def _axes(value: ir.Value | None, region: Region) -> tuple[Along, ...]:
    return region.axes.get(value, ()) if value is not None else ()


def _keep(value: ir.Value, axes: tuple[Along, ...], region: Region) -> None:
    if axes:
        region.axes[value] = axes


def _refuse(node: ir.Node, why: str) -> StandsInTheWayError:
    return StandsInTheWayError(node.name or node.op_type, why)


def _elementwise(node: ir.Node, region: Region) -> None:
    """Operands are aligned from the right."""
    output = node.outputs[0]
    rank = len(_shape(output))
    found: dict[int, Along] = {}
    for value in node.inputs:
        for along in _axes(value, region):
            place = along.axis + rank - len(_shape(value))
            if found.setdefault(place, Along(place, along.start)).start != along.start:
                raise _refuse(node, "it combines all tokens with a part of them")
    for index, value in enumerate(node.inputs):
        if value is not None:
            _align(node, index, value, found, rank, region)
    _keep(output, tuple(found.values()), region)


def _align(node: ir.Node, index: int, value: ir.Value, found: dict[int, Along], rank: int, region: Region) -> None:
    """Takes in an operand that may have an entry for each token without being computed from them."""
    own = {along.axis + rank - len(_shape(value)) for along in _axes(value, region)}
    for place, along in found.items():
        axis = place - rank + len(_shape(value))
        if place not in own and axis >= 0 and _shape(value)[axis] > 1:
            if along.start or _shape(value)[axis] != region.count:
                raise _refuse(node, "it combines a part of the tokens with something else of that length")
            _take_in(Operand(node, index, axis, rank), value, region)


def _take_in(operand: Operand, value: ir.Value, region: Region) -> None:
    """Takes in what has an entry for each token, which may differ from sample to sample: its first axis must be that of the samples."""
    shape = _shape(value)
    if len(shape) == operand.rank and region.batch > 1 and (operand.axis == 0 or shape[0] not in (1, region.batch)):
        raise _refuse(operand.node, "it reads a table with an entry for each token, whose first axis is not that of the samples")
    region.operands.append(operand)


def _unary(node: ir.Node, region: Region) -> None:
    _keep(node.outputs[0], _axes(node.inputs[0], region), region)


def _normalization(node: ir.Node, region: Region) -> None:
    rank = len(_shape(node.inputs[0]))
    first = node.attributes.get_int("axis", -1) % rank
    if any(along.axis >= first for along in _axes(node.inputs[0], region)) or any(_axes(value, region) for value in node.inputs[1:]):
        raise _refuse(node, "it normalizes over the tokens")
    _unary(node, region)


def _softmax(node: ir.Node, region: Region) -> None:
    axis = node.attributes.get_int("axis", -1) % len(_shape(node.inputs[0]))
    if any(along.axis == axis for along in _axes(node.inputs[0], region)):
        region.softmaxes.append(node)
    _unary(node, region)


def _matmul(node: ir.Node, region: Region) -> None:
    first, second = node.inputs
    a, b = len(_shape(first)), len(_shape(second))
    if min(a, b) < 2:
        raise _refuse(node, "it multiplies a vector")
    rank = max(a, b)
    left = {along.axis - a: along for along in _axes(first, region)}
    right = {along.axis - b: along for along in _axes(second, region)}
    if (-1 in left) != (-2 in right):
        weights = first if -2 in right else second
        known = "a weight for each of them" if constant_array(weights) is not None else "weights from elsewhere, which sum to one over all"
        raise _refuse(node, f"it mixes the tokens by {known}")
    if any(place < -2 for place in (*left, *right)):
        raise _refuse(node, "it has a product of its own for each token")
    kept = [Along(rank + place, along.start) for place, along in ((-2, left.get(-2)), (-1, right.get(-1))) if along is not None]
    _keep(node.outputs[0], tuple(kept), region)


def _transpose(node: ir.Node, region: Region) -> None:
    rank = len(_shape(node.inputs[0]))
    order = list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
    _keep(node.outputs[0], tuple(Along(order.index(along.axis), along.start) for along in _axes(node.inputs[0], region)), region)


def _reshape(node: ir.Node, region: Region) -> None:
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    kept = []
    for along in _axes(node.inputs[0], region):
        outer, length = math.prod(before[: along.axis]), before[along.axis]
        axis = next((k for k, size in enumerate(after) if size == length and math.prod(after[:k]) == outer), None)
        if axis is None:
            what = "splits the tokens into windows or rows" if length not in after else "merges the tokens with another axis"
            raise _refuse(node, f"the reshape {list(before)} to {list(after)} {what}")
        kept.append(Along(axis, along.start))
        if node.op_type == "Reshape":
            region.sizes.append(SizeConstant(node, 1, axis, along.start))
    _keep(node.outputs[0], tuple(kept), region)


def _expand(node: ir.Node, region: Region) -> None:
    before, after = _shape(node.inputs[0]), _shape(node.outputs[0])
    kept = tuple(Along(along.axis + len(after) - len(before), along.start) for along in _axes(node.inputs[0], region))
    target = _shape(node.inputs[1])[0]
    places = ((along, along.axis - len(after) + target) for along in kept)
    region.sizes += [SizeConstant(node, 1, place, along.start) for along, place in places if place >= 0]
    _keep(node.outputs[0], kept, region)


def _concat(node: ir.Node, region: Region) -> None:
    rank = len(_shape(node.outputs[0]))
    axis = node.attributes.get_int("axis", 0) % rank
    found: dict[int, Along] = {}
    for value in node.inputs:
        found.update({along.axis: along for along in _axes(value, region)})
    if axis in found:
        raise _refuse(node, "further tokens join there")
    for index, value in enumerate(node.inputs):
        assert value is not None
        _align(node, index, value, found, rank, region)
    _keep(node.outputs[0], tuple(found.values()), region)


def _split(node: ir.Node, region: Region) -> None:
    axis = node.attributes.get_int("axis", 0) % len(_shape(node.inputs[0]))
    axes = _axes(node.inputs[0], region)
    if any(along.axis == axis for along in axes):
        raise _refuse(node, "it splits the tokens into parts")
    for output in node.outputs:
        _keep(output, axes, region)


def _slice(node: ir.Node, region: Region) -> None:
    """Other axes are sliced freely. Of the tokens the first may be picked, or all but the first kept."""
    shape = _shape(node.inputs[0])
    starts, ends, axes, steps = (constant_array(node.inputs[k]) if k < len(node.inputs) else None for k in range(1, 5))
    if starts is None or ends is None:
        raise _refuse(node, "it slices by numbers that are computed")
    along_axes = [int(axis) % len(shape) for axis in (range(len(starts)) if axes is None else axes)]
    kept = []
    for along in _axes(node.inputs[0], region):
        if along.axis not in along_axes:
            kept.append(along)
            continue
        place = along_axes.index(along.axis)
        bounds = slice(int(starts[place]), int(ends[place]), 1 if steps is None else int(steps[place]))
        chosen = range(*bounds.indices(shape[along.axis]))
        to_end = chosen.step == 1 and chosen.stop == shape[along.axis]
        if to_end and chosen.start == 0:
            kept.append(along)
        elif ends[place] < 0 or starts[place] < 0:
            raise _refuse(node, "it picks tokens by their places from the end")
        elif to_end and (len(chosen) > 1 or ends[place] > shape[along.axis]):  # all but the first, if only one of those is left by now
            region.skipped = max(region.skipped, along.start + chosen.start)
            kept.append(Along(along.axis, along.start + chosen.start))
        elif len(chosen) == 1 or (chosen.step == 1 and chosen.start == 0):
            _pick(node, along.start + max(chosen), region)
        else:
            raise _refuse(node, "it slices the tokens in the middle")
    _keep(node.outputs[0], tuple(kept), region)


def _gather(node: ir.Node, region: Region) -> None:
    """Entries of other axes are gathered freely; of the tokens, the first."""
    shape, indices = _shape(node.inputs[0]), constant_array(node.inputs[1])
    if _axes(node.inputs[1], region):
        raise _refuse(node, "it looks tokens up by numbers that are computed from them")
    axis = node.attributes.get_int("axis", 0) % len(shape)
    kept = []
    for along in _axes(node.inputs[0], region):
        if along.axis != axis:
            kept.append(Along(along.axis + (len(_shape(node.inputs[1])) - 1 if along.axis > axis else 0), along.start))
        elif indices is None or indices.size == 0 or indices.min() < 0:
            raise _refuse(node, "it picks tokens by numbers that are computed, or from the end")
        else:
            _pick(node, along.start + int(indices.max()), region)
    _keep(node.outputs[0], tuple(kept), region)


def _pick(node: ir.Node, index: int, region: Region) -> None:
    if index == region.count - 1:
        raise _refuse(node, "it picks the last token, whose place depends on how many there are")
    region.picked = max(region.picked, index)


def _reduce(node: ir.Node, region: Region) -> None:
    rank = len(_shape(node.inputs[0]))
    given = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if given is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        raise _refuse(node, "it reduces along axes that are computed")
    axes = {int(axis) % rank for axis in given} if given is not None else set(range(rank))
    keepdims = node.attributes.get_int("keepdims", 1)
    kept = []
    for along in _axes(node.inputs[0], region):
        if along.axis not in axes:
            kept.append(along if keepdims else Along(along.axis - sum(axis < along.axis for axis in axes), along.start))
        elif node.op_type == "ReduceSum" and (divisor := mask_sum(node, region.axes, along.axis)) is not None:
            count, axis = divisor
            assert count.inputs[0] is not None
            _take_in(Operand(count, 0, axis, len(_shape(count.inputs[0]))), count.inputs[0], region)
            region.pools.append((node, along))
        elif node.op_type != "ReduceMean":
            raise _refuse(node, f"{node.op_type} over the tokens depends on how many there are")
        else:
            region.pools.append((node, along))
    _keep(node.outputs[0], tuple(kept), region)


def _attention(node: ir.Node, region: Region) -> None:
    if any(value is not None for value in node.inputs[4:]) or len(node.outputs) > 1:
        raise _refuse(node, "the attention keeps its keys and values between runs, or gives out its weights")
    if node.attributes.get_int("is_causal", 0):
        raise _refuse(node, "the attention is causal: later tokens depend on how many came before")
    query, key, value = node.inputs[:3]
    places = []
    for operand in (query, key, value):
        axes = _axes(operand, region)
        expected = len(_shape(operand)) - 2
        if any(along != Along(expected) for along in axes) or len(axes) > 1:
            raise _refuse(node, "the attention has the tokens on another axis than queries, keys and values are")
        places.append(bool(axes))
    if places[1] != places[2]:
        raise _refuse(node, "the attention takes keys and values from different tokens")
    if places[1]:
        region.attentions.append(node)
    if len(node.inputs) > 3 and node.inputs[3] is not None:  # the mask is aligned with the weights, [B, H, queries, keys]
        wanted = {axis: Along(axis) for axis, has_tokens in ((2, places[0]), (3, places[1])) if has_tokens}
        _align(node, 3, node.inputs[3], wanted, 4, region)
    if places[0]:
        _keep(node.outputs[0], (Along(len(_shape(node.outputs[0])) - 2),), region)


_Rule = Callable[[ir.Node, Region], None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(
        ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or",
         "Xor", "PRelu", "Mod"),
        _elementwise,
    ),
    **dict.fromkeys(
        ("Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Mish", "Neg",
         "Not", "Reciprocal", "Relu", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "Cos", "Sin", "Round",
         "Floor", "Ceil", "IsNaN", "DequantizeLinear", "QuantizeLinear"),
        _unary,
    ),
    "Attention": _attention, "Concat": _concat, "Expand": _expand, "Gather": _gather, "LayerNormalization": _normalization,
    "LogSoftmax": _softmax, "MatMul": _matmul, "RMSNormalization": _normalization, "ReduceL2": _reduce, "ReduceMax": _reduce,
    "ReduceMean": _reduce, "ReduceMin": _reduce, "ReduceSum": _reduce, "Reshape": _reshape, "Slice": _slice, "Softmax": _softmax,
    "Split": _split, "Squeeze": _reshape, "Transpose": _transpose, "Unsqueeze": _reshape,
}  # fmt: skip
