"""The census of whole operators: which operators a graph says in one word, counted before and after every pass.

A whole operator is one that a target has a kernel for and that could be written in several simpler ones. A pass that breaks one into parts
loses that kernel, and no later stage finds it again: the numbers still agree, the model is slower. So an exact pass may lower a count only
where it declares in `Pass.removes` that it removes the computation itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import onnx_ir as ir

WHOLE = frozenset(
    {
        # attention and position
        "Attention",
        "RotaryEmbedding",
        # normalization
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LRN",
        "LpNormalization",
        "MeanVarianceNormalization",
        "RMSNormalization",
        # activations of more than one step
        "Celu",
        "Elu",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "LogSoftmax",
        "Mish",
        "PRelu",
        "Selu",
        "Softmax",
        "Softplus",
        "Softsign",
        "Swish",
        # linear maps with their bias, and recurrent layers
        "Conv",
        "ConvTranspose",
        "DeformConv",
        "Gemm",
        "GRU",
        "LSTM",
        "RNN",
        # rearrangements that are chains of Reshape and Transpose otherwise
        "DepthToSpace",
        "SpaceToDepth",
    }
)
"""Operators of ONNX that count as whole. Those of the domain `edgekit` count too: each has a body of standard operators.

MatMul, Add, Relu, Sigmoid and the like are not here: they are the parts. Nor are quantized operators:
passes that insert them are not exact.
"""

_OWN_DOMAIN = "edgekit"


@dataclass(frozen=True)
class WholeNode:
    """A node that is a whole operator."""

    operator: str
    name: str


def whole_nodes(model: ir.Model) -> list[WholeNode]:
    """The whole operators of the main graph and its subgraphs, in graph order.

    Bodies of functions are not looked into: a call of a function of domain `edgekit` is one whole operator, `edgekit.NAME`.
    """
    return list(_whole(model))


def _whole(model: ir.Model) -> Iterator[WholeNode]:
    for node in model.graph.all_nodes():
        if node.domain == _OWN_DOMAIN:
            yield WholeNode(f"{_OWN_DOMAIN}.{node.op_type}", node.name or "")
        elif node.domain in ("", "ai.onnx") and node.op_type in WHOLE:
            yield WholeNode(node.op_type, node.name or "")


def census(nodes: Collection[WholeNode]) -> dict[str, int]:
    """Counts whole operators by name, sorted; operators that do not occur are left out."""
    return dict(sorted(Counter(node.operator for node in nodes).items()))


@dataclass(frozen=True)
class Loss:
    """Whole operators of one kind that a pass lost.

    Attributes:
        operator: The operator.
        before: How many there were.
        after: How many there are.
        gone: Names of nodes of that kind that are no longer there; empty where they have no names.
    """

    operator: str
    before: int
    after: int
    gone: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operator} {self.before} → {self.after}"


def losses(before: Collection[WholeNode], after: Collection[WholeNode], removes: Collection[str] = ()) -> list[Loss]:
    """The operators whose count fell, except those in `removes`."""
    old, new = census(before), census(after)
    left = {(node.operator, node.name) for node in after}
    return [
        Loss(
            operator,
            count,
            new.get(operator, 0),
            tuple(node.name for node in before if node.operator == operator and node.name and (operator, node.name) not in left),
        )
        for operator, count in old.items()
        if new.get(operator, 0) < count and operator not in removes
    ]
