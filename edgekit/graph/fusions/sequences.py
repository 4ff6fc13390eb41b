"""Turns a list of parts, which exporters write for `split` and `chunk`, into one Split.

    Before:  x ─ SplitToSequence(sizes) ─► s;  s ─ SequenceAt(0) ─► a;  s ─ SequenceAt(1) ─► b
    After:   x ─ Split(sizes) ─► a, b

Few runtimes know sequences. Sizes and positions must be constant; a list that anything else reads stays.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.fusions.matching import scalar, take_over
from edgekit.graph.shapes import infer_shapes, static_shape


def split_sequences(model: ir.Model) -> int:
    """Replaces lists of parts of the main graph by Split, in place; returns how many.

    Expects shapes to be inferred and constants to be folded.
    """
    editor = GraphEditor(model)
    count = sum(_split(node, editor) for node in list(model.graph) if node.op_type == "SplitToSequence" and node.domain == "")
    if count:
        infer_shapes(model)  # what follows may have been unknown: the parts of a list can have any shape
    return count


def _split(node: ir.Node, editor: GraphEditor) -> bool:
    x, sequence = node.inputs[0], node.outputs[0]
    shape = static_shape(x)
    if x is None or x.dtype is None or not shape or sequence.is_graph_output() or not node.attributes.get_int("keepdims", 1):
        return False
    axis = node.attributes.get_int("axis", 0)
    sizes = _sizes(node, shape[axis]) if -len(shape) <= axis < len(shape) else None
    parts = _parts(sequence, len(sizes)) if sizes is not None else None
    if sizes is None or parts is None:
        return False
    length = editor.add_initializer(f"{node.name}.sizes", np.array(sizes, dtype=np.int64))
    split = ir.node("Split", [x, length], attributes={"axis": axis}, num_outputs=len(sizes))
    split.name = editor.unique_name(f"{node.metadata_props.get(MODULE_KEY) or node.name}/Split")
    split.metadata_props.update(node.metadata_props)
    for index, (size, output) in enumerate(zip(sizes, split.outputs, strict=True)):
        output.name = editor.unique_name(f"{split.name}:{index}")
        output.shape = ir.Shape((*shape[:axis], size, *shape[axis % len(shape) + 1 :]))
        output.type = ir.TensorType(x.dtype)
    editor.graph.insert_before(node, split)
    for reader, index in parts:
        old, new = reader.outputs[0], split.outputs[index]
        if not new.uses() and not new.is_graph_output():
            take_over(editor, old, new)
        elif not old.is_graph_output():
            old.replace_all_uses_with(new)
        else:  # one part that is given out under two names
            copy = ir.node("Identity", [new], name=editor.unique_name(f"{reader.name}/Identity"))
            copy.outputs[0].name = editor.unique_name(f"{reader.name}/Identity:0")
            editor.graph.insert_before(reader, copy)
            take_over(editor, old, copy.outputs[0])
    editor.remove([reader for reader, _ in parts])
    editor.remove([node])
    return True


def _sizes(node: ir.Node, length: int) -> list[int] | None:
    """Returns the lengths of the parts: as listed, or of one size, of which the last may be shorter."""
    if len(node.inputs) < 2 or node.inputs[1] is None:
        return [1] * length
    given = constant_array(node.inputs[1])
    if given is None:
        return None
    if given.ndim == 0:
        size = int(given)
        return [min(size, length - first) for first in range(0, length, size)] if size > 0 and math.ceil(length / size) <= 1024 else None
    sizes = [int(size) for size in given]
    return sizes if sum(sizes) == length and all(size >= 0 for size in sizes) else None


def _parts(sequence: ir.Value, count: int) -> list[tuple[ir.Node, int]] | None:
    """Returns the readers of a list and the part that each takes; None when one does something else."""
    found = []
    for reader, index in sequence.uses():
        position = scalar(reader.inputs[1]) if reader.op_type == "SequenceAt" and reader.domain == "" and index == 0 else None
        if position is None or not -count <= position < count or reader.graph is not sequence.producer().graph:  # type: ignore[union-attr]
            return None
        found.append((reader, int(position) % count))
    return found
