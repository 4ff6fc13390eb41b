"""The self-attention blocks of a transformer, found by how they are wired: attention, a way back to the stream, a residual sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.shapes import static_shape
from edgekit.passes.prune_tokens.token_axis import StandsInTheWayError

_ON_THE_WAY = {"Add", "Cast", "Identity", "LayerNormalization", "MatMul", "Mul", "RMSNormalization", "Reshape", "Transpose"}
"""Between the attention and the residual sum: the output projection, a scale per channel, a norm."""


@dataclass(frozen=True)
class Block:
    """One self-attention with its residual sum.

    Attributes:
        attention: The Attention.
        add: The sum.
        stream: What the attention's result is added to, `[B, N, C]`.
    """

    attention: ir.Node
    add: ir.Node
    stream: ir.Value

    @property
    def residual(self) -> ir.Value:
        """The sum `[B, N, C]`."""
        return self.add.outputs[0]

    @property
    def name(self) -> str:
        """The module of the sum, or its node's name."""
        return self.add.metadata_props.get(MODULE_KEY, "") or self.add.name or "block"

    @property
    def tokens(self) -> int:
        """N."""
        shape = static_shape(self.stream)
        assert shape is not None
        return shape[1]


def find_blocks(graph: ir.Graph) -> list[Block]:
    """All self-attentions over a stream of tokens, in order. One whose queries are fewer than its keys is none: it ends the stream."""
    return [block for node in graph if node.op_type == "Attention" and node.domain == "" and (block := _block(node)) is not None]


def blocks_of(graph: ir.Graph, attentions: Sequence[ir.Node]) -> list[Block]:
    """The blocks of these attentions, of which the last may be none: after `reparameterize` it may serve the class token alone.

    Raises:
        StandsInTheWayError: Another one is none.
    """
    found = {block.attention: block for block in find_blocks(graph)}
    for attention in attentions[:-1]:
        if attention not in found:
            raise StandsInTheWayError(attention.name or "", "its result is not added to the stream of tokens")
    return [found[attention] for attention in attentions if attention in found]


def _block(attention: ir.Node) -> Block | None:
    value, node = attention.outputs[0], attention
    while len(value.uses()) == 1 and not value.is_graph_output():
        node, index = next(iter(value.uses()))
        other = node.inputs[1 - index] if node.op_type == "Add" and len(node.inputs) == 2 else None
        if other is not None and constant_array(other) is None and not other.is_initializer():
            shape, tokens = static_shape(other), static_shape(attention.inputs[1])
            fits = shape is not None and tokens is not None and len(shape) == 3 and shape[1] == tokens[-2]
            return Block(attention, node, other) if fits and static_shape(node.outputs[0]) == shape else None
        if node.op_type not in _ON_THE_WAY or node.domain != "":
            return None
        value = node.outputs[0]
    return None


def prefix_length(stream: ir.Value) -> int:
    """How many tokens at the front do not come from the input, as class tokens and registers: constants that are joined to the others."""
    node = stream.producer()
    while node is not None and node.op_type in ("Add", "LayerNormalization", "RMSNormalization", "Identity", "Cast", "Mul"):
        data = [value for value in node.inputs if value is not None and not _is_constant(value)]
        if len(data) != 1:
            return 0
        node = data[0].producer()
    if node is None or node.op_type != "Concat" or node.attributes.get_int("axis", 0) not in (1, -2):
        return 0
    length = 0
    for value in node.inputs:
        shape = static_shape(value)
        if value is None or shape is None or not (_is_constant(value) or _is_prefix(value)):
            break
        length += shape[1]
    return length


def _is_prefix(value: ir.Value) -> bool:
    """Whether it is the front of tokens that were joined before, as a class token that registers are put behind."""
    node = value.producer()
    if node is None or node.op_type != "Slice" or node.inputs[0] is None:
        return False
    bounds = [constant_array(bound) for bound in node.inputs[1:4]]
    if any(bound is None or bound.size != 1 for bound in bounds) or len(bounds) != 3:
        return False
    start, end, axis = (int(bound.item()) for bound in bounds if bound is not None)
    return axis in (1, -2) and start == 0 and 0 < end <= prefix_length(node.inputs[0])


def _is_constant(value: ir.Value) -> bool:
    """Whether nothing of the input is in it; repeating a constant for each sample keeps it one."""
    producer = value.producer()
    if producer is not None and producer.op_type in ("Expand", "Tile", "Reshape"):
        first = producer.inputs[0]
        return first is not None and _is_constant(first)
    return value.is_initializer() or constant_array(value) is not None
