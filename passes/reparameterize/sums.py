"""Trees of additions and subtractions as what they are: a set of addends, each so many times."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape


@dataclass(frozen=True)
class SumTree:
    """A tree of Add, Sum and Sub without broadcasting, except of zero.

    Attributes:
        root: The last addition.
        inner: The additions whose results only the tree reads, the root first.
    """

    root: ir.Node
    inner: tuple[ir.Node, ...]

    def addends(self) -> Counter[ir.Value]:
        """How often each value other than zero is added, in the order in which they are first met; negative where it is subtracted."""
        times: Counter[ir.Value] = Counter({self.root.outputs[0]: 1})
        for node in self.inner:  # consumers before producers: a result's count is complete when it is split up
            count = times.pop(node.outputs[0])
            for index, value in enumerate(node.inputs):
                if value is not None and not is_zero(value):
                    times[value] += -count if node.op_type == "Sub" and index == 1 else count
        return times

    def reads_alone(self, value: ir.Value) -> bool:
        """True when nothing outside the tree reads `value`."""
        return not value.is_graph_output() and all(use.node in self.inner for use in value.uses())


def sum_trees(graph: ir.Graph) -> list[SumTree]:
    """Returns the largest trees of additions, producers before consumers."""
    root_of: dict[ir.Node, ir.Node] = {}
    trees: dict[ir.Node, list[ir.Node]] = {}
    for node in reversed(graph):
        if not _is_plain_sum(node):
            continue
        value = node.outputs[0]
        roots = {root_of.get(use.node) for use in value.uses()}
        root = roots.pop() if len(roots) == 1 and not value.is_graph_output() else None
        root_of[node] = root if root is not None else node
        trees.setdefault(root_of[node], []).append(node)
    return [SumTree(root, tuple(inner)) for root, inner in reversed(trees.items())]


def is_zero(value: ir.Value | None) -> bool:
    """True for a constant of one element that is zero."""
    if value is None or value.producer() is not None or value.const_value is None or value.const_value.size != 1:
        return False
    array = constant_array(value)
    return array is not None and not array.any()


def _is_plain_sum(node: ir.Node) -> bool:
    """An Add, Sum or Sub whose operands all have the shape of its result or are a constant zero."""
    if node.op_type not in ("Add", "Sum", "Sub") or node.domain != "":
        return False
    shape = static_shape(node.outputs[0])
    return shape is not None and all(static_shape(value) == shape or is_zero(value) for value in node.inputs)
