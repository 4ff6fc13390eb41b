"""What a graph costs: parameters, multiply-accumulates (MACs), bytes of weights and memory of activations, in all and per node.

The counts follow from static shapes alone. One MAC is one multiplication with its addition (half of what FLOP counters report); only
operators that contract an axis count, all others are 0. Attention counts both of its products, Q·Kᵀ and P·V: so do the published figures
of DeiT, Swin and CrossViT (without the two, DeiT-S would be 4.24 instead of 4.60 GMACs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.graph.check import subgraphs
from edgekit.graph.memory import Memory, activation_memory
from edgekit.graph.parameters import FOLDED_FROM, count_marked, is_marked
from edgekit.graph.shapes import static_shape

Shape = tuple[int, ...]
Shapes = list[Shape]

MODULE_KEY = "edgekit.module"
"""Key of `node.metadata_props` under which the path of the PyTorch module stands."""


@dataclass(frozen=True)
class NodeCost:
    """The cost of one node.

    Attributes:
        name: Name of the node.
        op_type: Its operator.
        module: Path of the PyTorch module that it came from, or "".
        macs: Multiply-accumulates of one inference.
        parameters: Parameters that it is the first to use.
        bytes: Bytes of the initializers that it is the first to use.
        output_shape: Shape of its first output, None when unknown.
        live_bytes: Bytes of activations alive while it runs; None for a node of a subgraph, which runs within its node.
    """

    name: str
    op_type: str
    module: str
    macs: int
    parameters: int
    bytes: int
    output_shape: tuple[int, ...] | None
    live_bytes: int | None


@dataclass(frozen=True)
class Cost:
    """The cost of a graph.

    Attributes:
        parameters: Of a graph that was traced: the parameters of the source module, as passes have rewritten them. Of another graph:
            elements of float (or quantized) initializers used as weights, without running statistics and single numbers.
        macs: Multiply-accumulates of one inference.
        bytes: Bytes of all initializers.
        folded_bytes: The part of `bytes` in constants that were computed from parameters when the graph was simplified, such as a position
            bias spread out from its table: `parameters` counts what was trained, here is what it takes in the file.
        memory: What activations are alive at each node.
        per_node: The nodes in graph order, those of subgraphs after the node that holds them.
        complete: False when the MACs of some node could not be counted.
        unknown: The names of those nodes.
    """

    parameters: int
    macs: int
    bytes: int
    folded_bytes: int
    memory: Memory
    per_node: tuple[NodeCost, ...]
    complete: bool
    unknown: tuple[str, ...]


def cost(model: ir.Model, schedule: Sequence[ir.Node] | None = None, *, free_views: bool = True) -> Cost:
    """Counts parameters, MACs, bytes and activation memory of `model`, whose shapes have been inferred.

    Nodes in bodies of Loop and Scan, and those in calls of functions, count once or not at all and are listed in `unknown`.

    Args:
        model: The model.
        schedule: The order in which its nodes run, for the memory of activations (see `activation_memory`); None: that of the graph.
        free_views: Whether reshaped activations share memory (see `activation_memory`).

    Raises:
        UsageError: The schedule, or the order of the graph, reads a value before it is made.
    """
    nodes = list(model.graph.all_nodes())
    memory = activation_memory(model.graph, schedule, free_views=free_views)
    live = dict(zip(model.graph if schedule is None else schedule, memory.live_bytes, strict=True))
    first_use = _first_uses(nodes)
    parameters = _count_parameters(first_use)
    own: dict[ir.Node, list[ir.Value]] = {}
    for value, (user, _) in first_use.items():
        own.setdefault(user, []).append(value)
    rows: list[NodeCost] = []
    unknown: list[str] = []
    for node in nodes:
        name = node.name or node.op_type
        macs = _node_macs(node)
        if macs is None or _hides_macs(model, node):
            unknown.append(name)
        weights = own.get(node, ())
        rows.append(
            NodeCost(
                name,
                node.op_type,
                node.metadata_props.get(MODULE_KEY, ""),
                macs or 0,
                sum(parameters.get(value, 0) for value in weights),
                sum(_bytes(value) for value in weights),
                static_shape(node.outputs[0]) if node.outputs else None,
                live.get(node),
            )
        )
    initializers = [value for graph in model.graphs() for value in graph.initializers.values()]
    return Cost(
        parameters=sum(row.parameters for row in rows),
        macs=sum(row.macs for row in rows),
        bytes=sum(map(_bytes, initializers)),
        folded_bytes=sum(_bytes(value) for value in initializers if FOLDED_FROM in value.metadata_props),
        memory=memory,
        per_node=tuple(rows),
        complete=not unknown,
        unknown=tuple(unknown),
    )


def _first_uses(nodes: Sequence[ir.Node]) -> dict[ir.Value, tuple[ir.Node, int]]:
    """Per initializer the node and the input that read it first."""
    first: dict[ir.Value, tuple[ir.Node, int]] = {}
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.const_value is not None:
                first.setdefault(value, (node, index))
    return first


def _count_parameters(first_use: dict[ir.Value, tuple[ir.Node, int]]) -> dict[ir.Value, int]:
    """Parameters per initializer: those that tracing marked, or in a graph without any mark what looks like a weight."""
    if any(map(is_marked, first_use)):
        return count_marked(first_use)
    return {
        value: value.const_value.size
        for value, (node, index) in first_use.items()
        if value.const_value is not None and _is_weight(node, index, value.const_value)
    }


def _bytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


_NOT_WEIGHTS: dict[str, frozenset[int]] = {
    "BatchNormalization": frozenset({3, 4}),  # running mean and variance
    "Attention": frozenset({3}),  # the mask
    "Resize": frozenset({1, 2}),  # region of interest and scales
    "QuantizeLinear": frozenset({1, 2}),
    "DequantizeLinear": frozenset({1, 2}),  # scale and zero point say how the weight is stored
    "QLinearConv": frozenset({1, 2, 4, 5, 6, 7, 8}),
    "QLinearMatMul": frozenset({1, 2, 4, 5, 6, 7}),
    "ConvInteger": frozenset({2, 3}),
    "MatMulInteger": frozenset({2, 3}),
}
_QUANTIZED_WEIGHTS = frozenset({"DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"})


def _is_weight(node: ir.Node, index: int, tensor: ir.TensorProtocol) -> bool:
    if tensor.size <= 1 or index in _NOT_WEIGHTS.get(node.op_type, ()):
        return False
    return tensor.dtype.is_floating_point() or node.op_type in _QUANTIZED_WEIGHTS


def _hides_macs(model: ir.Model, node: ir.Node) -> bool:
    """True for calls of functions and for loops that contain a counted operator: how often it runs is not in the shapes."""
    function = model.functions.get(node.op_identifier())
    if function is not None:
        return any(inner.op_type in _MACS and inner.domain == "" for inner in function.all_nodes())
    if node.op_type not in ("Loop", "Scan", "If"):
        return False
    return any(inner.op_type in _MACS and inner.domain == "" for body in subgraphs(node) for inner in body.all_nodes())


def _node_macs(node: ir.Node) -> int | None:
    """Returns the MACs of `node`, or None when it should have some and its shapes are not known."""
    count = _MACS.get(node.op_type) if node.domain == "" else None
    if count is None:
        return 0
    inputs = [static_shape(value) if value is not None else () for value in node.inputs]
    output = static_shape(node.outputs[0]) if node.outputs else None
    if output is None and node.op_type not in _NEEDS_NO_OUTPUT:
        return None
    if any(shape is None for shape in inputs):
        return None
    try:
        return count(node, [shape for shape in inputs if shape is not None], output or ())
    except (IndexError, ValueError, TypeError, KeyError, ZeroDivisionError):  # shapes or attributes that contradict the operator
        return None


def _conv(node: ir.Node, inputs: Shapes, output: Shape) -> int:
    """Conv: every output element sums C_in/group · kernel products; weight `[C_out, C_in/group, *kernel]`."""
    weight = inputs[3] if node.op_type == "QLinearConv" else inputs[1]
    return math.prod(output) * math.prod(weight[1:])


def _conv_transpose(node: ir.Node, inputs: Shapes, output: Shape) -> int:
    """ConvTranspose: every input element is spread over C_out/group · kernel places; weight `[C_in, C_out/group, *kernel]`."""
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _matmul(node: ir.Node, inputs: Shapes, output: Shape) -> int:
    """MatMul: every output element sums K products; a 1-D left operand is `[K]`."""
    return math.prod(output) * inputs[0][-1]


def _gemm(node: ir.Node, inputs: Shapes, output: Shape) -> int:
    """Gemm: `[M, K] · [K, N]`, either transposed."""
    return math.prod(output) * inputs[0][0 if node.attributes.get_int("transA", 0) else 1]


def _attention(node: ir.Node, inputs: Shapes, output: Shape) -> int:
    """Attention (opset 23): Q·Kᵀ and P·V for every query head; nothing is subtracted for masks.

    Inputs are `[B, H, S, D]`, or `[B, S, H·D]` with the numbers of heads as attributes; fewer key than query heads (GQA) cost the same.
    """
    query, key, value = inputs[:3]
    if len(query) == 4:
        batch, heads, queries, width = query
        keys, value_width = key[2], value[3]
    else:
        batch, queries = query[:2]
        heads, kv_heads = node.attributes.get_int("q_num_heads"), node.attributes.get_int("kv_num_heads")
        width, keys, value_width = query[2] // heads, key[1], value[2] // kv_heads
    if len(inputs) > 4 and inputs[4]:
        keys += inputs[4][2]
    return batch * heads * queries * keys * (width + value_width)


def _einsum(node: ir.Node, inputs: Shapes, output: Shape) -> int:
    """Einsum: the product of all index sizes, once for every operand beyond the first."""
    left = node.attributes.get_string("equation").replace(" ", "").split("->")[0]
    sizes: dict[str, int] = {}
    for term, shape in zip(left.split(","), inputs, strict=True):
        if "..." in term:
            before, after = term.split("...")
            spare = shape[len(before) : len(shape) - len(after)]
            for place, size in enumerate(reversed(spare)):
                sizes[f"...{place}"] = max(size, sizes.get(f"...{place}", 1))
            shape = shape[: len(before)] + shape[len(shape) - len(after) :]
            term = before + after
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values()) * (len(inputs) - 1)


def _recurrent(gates: int) -> Callable[[ir.Node, Shapes, Shape], int]:
    """LSTM, GRU, RNN: per step and direction, `gates · hidden` rows over the input and the state; W `[D, gates·hidden, input]`."""

    def count(node: ir.Node, inputs: Shapes, output: Shape) -> int:
        sequence, weight, recurrence = inputs[:3]
        if weight[1] != gates * recurrence[2]:
            raise ValueError("weights do not fit the operator")
        steps = sequence[0] * sequence[1]  # time and batch, in either layout
        return steps * (math.prod(weight) + math.prod(recurrence))

    return count


_MACS: dict[str, Callable[[ir.Node, Shapes, Shape], int]] = {
    "Attention": _attention,
    "Conv": _conv,
    "ConvInteger": _conv,
    "ConvTranspose": _conv_transpose,
    "DeformConv": _conv,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GRU": _recurrent(3),
    "LSTM": _recurrent(4),
    "MatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "RNN": _recurrent(1),
}
_NEEDS_NO_OUTPUT = frozenset({"Attention", "ConvTranspose", "Einsum", "GRU", "LSTM", "RNN"})
