"""Brings every value to rank 5 at most, which is what Core ML takes, without a change of the numbers.

Windows (Liu et al. 2021, "Swin Transformer"), grids, groups of heads and sub-pixel shuffles are written with tensors of 6 to 8 axes. They
need not be: such a tensor is held as another with the same elements in the same order, and an operator reads it with those axes joined that
it does not tell apart. `rank_groups` joins axes, `rank_rewriter` holds values, `rank_rules` has one rule for each kind of operator.

    Before:  [B, H, W, C] ─ Reshape [B, H/w, w, W/w, w, C] ─ Transpose (0, 1, 3, 2, 4, 5) ─ Reshape [B·HW/w², w², C]
    After:   [B, H, W, C] ─ Reshape [B·H/w, w, W/w, w·C] ─ Transpose (0, 2, 1, 3) ─ Reshape [B·HW/w², w², C]
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from edgekit.errors import UnsupportedOpError
from edgekit.targets.coreml.rank_groups import MAX_RANK
from edgekit.targets.coreml.rank_rewriter import Rewriter, node_rank, rank
from edgekit.targets.coreml.rank_rules import NEAREST, RULES


def lower_ranks(model: ir.Model) -> int:
    """Rewrites the nodes of `model` (opset 23, sorted, static shapes) that read or write more than 5 axes, in place.

    Returns:
        How many nodes were rewritten.

    Raises:
        UnsupportedOpError: A graph input or output has more than 5 axes, or an operator tells more than 5 groups of axes apart.
    """
    _check_interface(model.graph.inputs, "input")
    _check_interface(model.graph.outputs, "output")
    nodes = [node for node in model.graph.all_nodes() if node_rank(node) > MAX_RANK]
    rewriter = Rewriter(model)
    for node in nodes:
        _rewrite(node, rewriter)
    rewriter.editor.remove(nodes)
    _drop_unread(rewriter, nodes)
    return len(nodes)


def _check_interface(values: Iterable[ir.Value], kind: str) -> None:
    for value in values:
        if rank(value) > MAX_RANK:
            raise UnsupportedOpError(
                f"Core ML takes tensors of rank {MAX_RANK} at most, and {kind} '{value.name}' has rank {rank(value)}",
                where=f"{kind} '{value.name}': {value.shape}",
                fix=f"reshape it inside the model, so that the {kind} has {MAX_RANK} axes at most, or compile for --target onnxruntime",
            )


def _rewrite(node: ir.Node, rewriter: Rewriter) -> None:
    rewriter.begin(node)
    rule = RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if node.graph is not rewriter.editor.graph:
        raise rewriter.refuse("inside a subgraph", "take it out of the If, Loop or Scan")
    if rule is None:
        raise rewriter.refuse("", NEAREST.get(node.op_type, "reshape its operands to 5 axes at most before it"))
    results = rule(rewriter)
    main = next((new for new in reversed(rewriter.emitted) if new.op_type != "Reshape"), None)
    if main is not None:
        _pass_name(node, main, rewriter)
    for old, new in zip(node.outputs, results, strict=True):
        if rank(old) > MAX_RANK:
            rewriter.held[old] = new
            if main is not None and new.producer() is main:
                _pass_name(old, new, rewriter)
        elif old.uses() or old.is_graph_output():
            _give_out(old, new, rewriter)


def _give_out(old: ir.Value, new: ir.Value, rewriter: Rewriter) -> None:
    """Lets the readers of `old`, of rank 5 or less, read the elements of `new` in its shape."""
    shape = rewriter.shape(old)
    new = rewriter.regroup(new, shape)
    if old.is_graph_output() and new.producer() not in rewriter.emitted:
        new = rewriter.reshape(new, shape)  # an output has its own name, and so its own value
    rewriter.editor.replace_value(old, new)
    if new.producer() in rewriter.emitted and not new.is_graph_output():
        _pass_name(old, new, rewriter)


def _pass_name(old: ir.Node | ir.Value, new: ir.Node | ir.Value, rewriter: Rewriter) -> None:
    """Calls `new` what people know `old` as."""
    if old.name:
        name = old.name
        old.name = rewriter.editor.unique_name(f"{name}_replaced")
        new.name = name


def _drop_unread(rewriter: Rewriter, replaced: list[ir.Node]) -> None:
    """Removes the reshapes that nobody reads in the end, and constants that still have a high rank."""
    graph, editor = rewriter.editor.graph, rewriter.editor
    for node in reversed(list(graph)):
        if node in rewriter.written and not any(output.uses() or output.is_graph_output() for output in node.outputs):
            editor.remove([node])
    editor.drop_unused([value for value in list(graph.initializers.values()) if rank(value) > MAX_RANK])
    for name, value in rewriter.weights.items():
        if name not in graph.initializers and value.name in graph.initializers:
            value.name = name  # a weight leads back to its parameter by its name
