"""Merges what only moves elements about: chains of reshapes and transposes, and operators that change nothing.

    Before:  x ─ Transpose(0, 2, 3, 1) ─ Reshape(B, H·W, C) ─ Transpose(0, 2, 1) ─► y
    After:   x ─ Reshape(B, C, H·W) ─► y

1. Cast to the dtype that a value has, Expand to the shape that it has: removed.
2. Squeeze, Unsqueeze and Flatten of float tensors of static shape: Reshape. (Of integers they stay: shape inference computes through them.)
3. A chain of Reshape and Transpose: the fewest nodes that compute the same, at most Reshape, Transpose, Reshape; perhaps none.
4. A chain that is depth-to-space or its inverse: DepthToSpace or SpaceToDepth. PyTorch's pixel-unshuffle orders its channels (C, r, r) and
   ONNX's SpaceToDepth (r, r, C), so that for C > 1 a Gather of channels follows.

A chain is rewritten only when that leaves fewer nodes, those that stay because others read them counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.layout_state import Layout, Rearrangement, Step, follow, rearrangement, shortest
from edgekit.graph.fusions.matching import FLOATS, insert, made_by, opset, take_over
from edgekit.graph.shapes import static_shape

_VIEWS = ("Squeeze", "Unsqueeze", "Flatten")
_LONGEST_CHAIN = 16
_FIRST_OPSET = 13
"""From here on the axes of Squeeze and Unsqueeze are inputs."""


def merge_layout(model: ir.Model) -> int:
    """Merges layout operators of the main graph in place; returns how many rewrites that took.

    Expects shapes to be inferred and constants to be folded; what has no static shape stays.
    """
    if opset(model) < _FIRST_OPSET:
        return 0
    editor = GraphEditor(model)
    count = sum(_remove_idle(node, editor) for node in list(model.graph))
    count += sum(_as_reshape(node, editor) for node in list(model.graph))
    changed = True
    while changed:  # what one chain leaves may continue another
        changed = False
        for node in reversed(list(model.graph)):
            if node.graph is not None and _is_layout(node) and _is_end(node) and _merge(node, editor):
                count += 1
                changed = True
    return count


def _remove_idle(node: ir.Node, editor: GraphEditor) -> bool:
    """Removes a Cast to the same dtype or an Expand to the same shape."""
    if node.domain != "" or node.op_type not in ("Cast", "CastLike", "Expand"):
        return False
    source, result = node.inputs[0], node.outputs[0]
    if source is None or source.dtype is None or source.dtype != result.dtype:
        return False
    if node.op_type == "Expand" and (static_shape(source) is None or static_shape(source) != static_shape(result)):
        return False
    return _bypass(node, source, editor, [node])


def _bypass(end: ir.Node, source: ir.Value, editor: GraphEditor, nodes: Sequence[ir.Node]) -> bool:
    """Lets the readers of `end` read `source`; False where a graph output would lose its name by that."""
    result = end.outputs[0]
    if not result.is_graph_output():
        result.replace_all_uses_with(source)
    elif source.producer() is None or source.is_graph_output() or source.graph is not result.graph:
        return False
    else:
        editor.replace_value(result, source)
    editor.remove(nodes)
    return True


def _as_reshape(node: ir.Node, editor: GraphEditor) -> bool:
    """Squeeze, Unsqueeze or Flatten of static shapes ─► Reshape."""
    result = node.outputs[0] if node.outputs else None
    if node.domain != "" or node.op_type not in _VIEWS or result is None or result.dtype not in FLOATS:
        return False
    source, shape = node.inputs[0], static_shape(result)
    if source is None or static_shape(source) is None or shape is None or 0 in shape:
        return False
    new = _insert(editor, node, [node], source, [Step(shape)])
    take_over(editor, result, new)
    editor.remove([node])
    return True


def _insert(editor: GraphEditor, before: ir.Node, nodes: Sequence[ir.Node], source: ir.Value, steps: Sequence[Step]) -> ir.Value:
    """Inserts the nodes of `steps`; returns the last value."""
    for step in steps:
        if step.perm is not None:
            source = insert(editor, before, nodes, "Transpose", [source], step.shape, {"perm": step.perm}).outputs[0]
        else:
            target = editor.add_initializer(f"{nodes[0].name}.shape", np.array(step.shape, dtype=np.int64))
            source = insert(editor, before, nodes, "Reshape", [source, target], step.shape).outputs[0]
    return source


def _is_layout(node: ir.Node) -> bool:
    if node.domain != "" or node.op_type not in ("Reshape", "Transpose") or any(value is None for value in node.inputs):
        return False
    return static_shape(node.inputs[0]) is not None and static_shape(node.outputs[0]) is not None


def _is_end(node: ir.Node) -> bool:
    """True unless the only reader of `node` is a layout operator, which continues the chain."""
    result = node.outputs[0]
    if not is_used_once(result):
        return True
    reader, index = next(iter(result.uses()))
    return not (index == 0 and _is_layout(reader) and reader.graph is node.graph)


@dataclass(frozen=True)
class _Candidate:
    """The chain of `nodes`, last first, from `source`, and what may stand for it."""

    gain: int
    nodes: tuple[ir.Node, ...]
    dying: int
    source: ir.Value
    steps: list[Step]
    whole: Rearrangement | None


def _merge(end: ir.Node, editor: GraphEditor) -> bool:
    """Rewrites the chain that ends in `end` from where most nodes are saved; False when none are."""
    nodes: list[ir.Node] = []
    best: _Candidate | None = None
    dying, alive = 0, True
    node: ir.Node | None = end
    while node is not None and _is_layout(node) and node.graph is end.graph and len(nodes) < _LONGEST_CHAIN:
        alive = alive and (node is end or is_used_once(node.outputs[0]))
        nodes.append(node)
        dying += alive
        candidate = _candidate(nodes, dying)
        if candidate is not None and candidate.gain > 0 and (best is None or candidate.gain >= best.gain):
            best = candidate
        source = node.inputs[0]
        node = made_by(source, "Reshape", "Transpose")
    return best is not None and _rewrite(best, editor)


def _candidate(nodes: Sequence[ir.Node], dying: int) -> _Candidate | None:
    source = nodes[-1].inputs[0]
    layout = _layout(nodes)
    if source is None or layout is None:
        return None
    steps = shortest(layout)
    whole = rearrangement(layout) if len(steps) > 1 else None
    length = len(steps) if whole is None else 1 if whole.channels is None else 2
    if whole is not None and length >= len(steps):
        whole, length = None, len(steps)
    return _Candidate(dying - length, tuple(nodes), dying, source, steps, whole)


def _layout(nodes: Sequence[ir.Node]) -> Layout | None:
    """Returns what a chain, last node first, makes of its input."""
    source = static_shape(nodes[-1].inputs[0])
    steps = []
    for node in reversed(nodes):
        shape = static_shape(node.outputs[0])
        if shape is None:
            return None
        perm = None
        if node.op_type == "Transpose":
            perm = tuple(node.attributes.get_ints("perm", ())) or tuple(reversed(range(len(shape))))
            if sorted(perm) != list(range(len(shape))):
                return None
        elif constant_array(node.inputs[1]) is None:
            return None
        steps.append(Step(shape, perm))
    return follow(source, steps) if source is not None else None


def _rewrite(chosen: _Candidate, editor: GraphEditor) -> bool:
    end, dead = chosen.nodes[0], chosen.nodes[: chosen.dying]
    if not chosen.steps:
        return _bypass(end, chosen.source, editor, dead)
    if chosen.whole is None:
        new = _insert(editor, end, dead, chosen.source, chosen.steps)
    else:
        new = _insert_whole(editor, end, dead, chosen.source, chosen.whole)
    take_over(editor, end.outputs[0], new)
    editor.remove(dead)
    return True


def _insert_whole(editor: GraphEditor, end: ir.Node, nodes: Sequence[ir.Node], source: ir.Value, whole: Rearrangement) -> ir.Value:
    attributes: dict[str, int | str] = {"blocksize": whole.blocksize}
    if whole.mode:
        attributes["mode"] = whole.mode
    shape = static_shape(end.outputs[0])
    value = insert(editor, end, nodes, whole.op_type, [source], shape, attributes).outputs[0]
    if whole.channels is None:
        return value
    order = editor.add_initializer(f"{nodes[0].name}.channels", np.array(whole.channels, dtype=np.int64))
    return insert(editor, end, nodes, "Gather", [value, order], shape, {"axis": 1}).outputs[0]
