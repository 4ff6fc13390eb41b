"""How much memory the activations of a graph need at once, for the order in which its nodes are to run.

Static: lifetimes follow from the order of the nodes and sizes from shapes. Weights are not counted (they are `Cost.bytes`), nor is scratch
memory inside an operator or what an allocator loses between blocks. Operators that could write over their input are not assumed to.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.errors import UsageError
from edgekit.graph.check import subgraphs
from edgekit.graph.shapes import static_shape

VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
"""Operators whose result is their first input under another shape."""


@dataclass(frozen=True)
class Memory:
    """Activation memory of a graph.

    Attributes:
        peak_bytes: The most that is alive at once.
        peak_node: Name of the first node at which it is; "" for a graph without nodes.
        nodes: The names of the nodes in the order in which they run.
        live_bytes: Per node, the bytes alive while it runs: its inputs, its outputs, and all that a later node or the caller reads.
        unknown: Names of values of unknown size, which count as 0.
    """

    peak_bytes: int
    peak_node: str
    nodes: tuple[str, ...]
    live_bytes: tuple[int, ...]
    unknown: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether the size of every value is known."""
        return not self.unknown


def activation_memory(graph: ir.Graph, schedule: Sequence[ir.Node] | None = None, *, free_views: bool = True) -> Memory:
    """Returns what is alive at each node of `graph`, whose shapes have been inferred.

    A graph input lives from the start to its last reader, a graph output from its producer to the end, and a result that nothing reads only
    while its node runs. While a node with bodies runs (If, Loop, Scan), the peak of its most demanding body for one iteration comes on
    top. A call of a function counts as one operator, without what is alive inside it.

    Args:
        graph: The graph.
        schedule: Its nodes in the order in which they run; None: the order of the graph.
        free_views: Whether the result of an operator of `VIEWS` shares the memory of its input, as in most runtimes; False: it is a copy.

    Raises:
        UsageError: The schedule is not an order of the graph's nodes in which every value is made before it is read.
    """
    nodes = list(graph if schedule is None else schedule)
    position = _positions(graph, nodes)
    count = len(nodes)
    born: dict[ir.Value, int] = {}
    dies: dict[ir.Value, int] = {}
    for value in graph.inputs:
        born[value], dies[value] = 0, -1
    for index, node in enumerate(nodes):
        for value in _made(node):
            storage = _storage(value, free_views)
            if storage.producer() in position:
                born.setdefault(storage, position[storage.producer()])
                dies[storage] = max(index, dies.get(storage, -1))
        for value in _read(node):
            _extend(dies, _storage(value, free_views), index)
    for value in graph.outputs:
        _extend(dies, _storage(value, free_views), count)

    sizes = {value: _bytes(value) for value in born}
    change = [0] * (count + 2)
    for value, start in born.items():
        if dies[value] >= start:
            change[start] += sizes[value] or 0
            change[dies[value] + 1] -= sizes[value] or 0
    live = list(itertools.accumulate(change))[:count]
    unknown = [value.name or "" for value, size in sizes.items() if size is None]
    for index, node in enumerate(nodes):
        bodies = [activation_memory(body, free_views=free_views) for body in subgraphs(node)]
        live[index] += max((body.peak_bytes for body in bodies), default=0)
        unknown += [name for body in bodies for name in body.unknown]
    peak = max(live, default=0)
    names = tuple(node.name or node.op_type for node in nodes)
    return Memory(peak, names[live.index(peak)] if names else "", names, tuple(live), tuple(unknown))


def _positions(graph: ir.Graph, nodes: Sequence[ir.Node]) -> dict[ir.Node | None, int]:
    """Numbers the nodes; raises UsageError where they are no valid order of the graph's nodes."""
    position: dict[ir.Node | None, int] = {node: index for index, node in enumerate(nodes)}
    own = set(graph)
    if len(position) != len(nodes) or own != position.keys():
        strange = next((node for node in nodes if node not in own), None)
        missing = next((node for node in graph if node not in position), None)
        what = (
            f"holds node '{strange.name}', which is not in the graph"
            if strange is not None
            else f"lacks node '{missing.name}'"
            if missing is not None
            else "holds a node twice"
        )
        raise UsageError(f"the schedule {what}", where=f"graph '{graph.name}'", fix="give each node of the graph once")
    for index, node in enumerate(nodes):
        for value in _read(node):
            producer = value.producer()
            if producer in position and position[producer] >= index:
                assert producer is not None
                raise UsageError(
                    f"the schedule runs node '{node.name}' before '{producer.name}', which makes its input '{value.name}'",
                    where=f"graph '{graph.name}'",
                    fix="put every node after those that it reads from (graph.sort() does)",
                )
    return position


def _made(node: ir.Node) -> list[ir.Value]:
    """The outputs of a node that exist: an optional one without a name is not computed."""
    return [value for value in node.outputs if value.name or value.uses()]


def _read(node: ir.Node) -> Iterator[ir.Value]:
    """Everything that a node reads, values that its bodies capture included."""
    yield from (value for value in node.inputs if value is not None)
    for body in subgraphs(node):
        for inner in body.all_nodes():
            yield from (value for value in inner.inputs if value is not None)
            for deeper in subgraphs(inner):
                yield from deeper.outputs
        yield from body.outputs


def _storage(value: ir.Value, free_views: bool) -> ir.Value:
    """The value in whose memory `value` lies."""
    while free_views:
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in VIEWS or node.inputs[0] is None:
            break
        value = node.inputs[0]
    return value


def _extend(dies: dict[ir.Value, int], value: ir.Value, index: int) -> None:
    if value in dies:  # not so for weights and for values of an enclosing graph
        dies[value] = max(index, dies[value])


def _bytes(value: ir.Value) -> int | None:
    shape = static_shape(value)
    if shape is None or not isinstance(value.type, ir.TensorType) or value.dtype in (None, ir.DataType.UNDEFINED, ir.DataType.STRING):
        return None
    assert value.dtype is not None
    return math.ceil(math.prod(shape) * value.dtype.itemsize)
