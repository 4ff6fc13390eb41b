"""Reads what happens to the probabilities of a decomposed attention: everything between the Softmax and the product with the values."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.fusions.attention_build import Dims, UnfitError, dims, permutation
from edgekit.graph.fusions.attention_operands import Operand, constant_scalar, lettered, plain, swap, transposed
from edgekit.graph.fusions.attention_scores import einsum_letters


@dataclass(frozen=True)
class Weighted:
    """The product of probabilities and values.

    Attributes:
        product: The MatMul or Einsum.
        value: `[..., S, Dv]`.
        view: The shape of the probabilities there, `[..., N, S]`.
        dtype: Of the probabilities there.
        perm: The permutation from `[..., N, Dv]` to the result; None for none.
        guarded: Whether NaN is replaced by 0.
    """

    product: ir.Node
    value: Operand
    view: Dims
    dtype: ir.DataType | None
    perm: tuple[int, ...] | None = None
    guarded: bool = False


def read_weighted(probabilities: ir.Value) -> Weighted | None:
    """Follows the probabilities to their product with values; None when they go elsewhere or something else reads them too."""
    guarded = False
    value = probabilities
    while not value.is_graph_output():
        uses = list(value.uses())
        after_guard = _guard(value)
        if after_guard is not None:
            value, guarded = after_guard, True
            continue
        view = dims(value)
        if len(uses) != 1 or view is None:
            return None
        ((node, index),) = uses
        if index == 0 and _keeps_elements(node):
            value = node.outputs[0]
            continue
        try:
            found = _product(node, index, view)
        except UnfitError:
            return None
        if found is None:
            return None
        product, operand, perm = found
        return Weighted(product, operand, view, value.dtype, perm, guarded)
    return None


def _guard(value: ir.Value) -> ir.Value | None:
    """The result of `Where(IsNaN(value), 0, value)`, which PyTorch writes since a row without keys gives NaN."""
    uses = list(value.uses())
    nodes = {use.node.op_type: use.node for use in uses}
    if len(uses) != 2 or set(nodes) != {"IsNaN", "Where"}:
        return None
    check, choice = nodes["IsNaN"].outputs[0], nodes["Where"]
    if list(choice.inputs[:1]) != [check] or choice.inputs[2] is not value or constant_scalar(choice.inputs[1]) != 0:
        return None
    return choice.outputs[0] if len(check.uses()) == 1 and not check.is_graph_output() else None


def _keeps_elements(node: ir.Node) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        array = constant_array(training)
        unused = all(not output.uses() and not output.is_graph_output() for output in node.outputs[1:])
        return unused and (training is None or (array is not None and not array.any()))
    return node.op_type in ("Identity", "Cast", "Reshape", "Flatten", "Squeeze", "Unsqueeze")


def _product(node: ir.Node, index: int, view: Dims) -> tuple[ir.Node, Operand, tuple[int, ...] | None] | None:
    """Reads the node that takes the probabilities: the product, its values, and the permutation that follows."""
    if node.domain != "" or len(view) < 2:
        return None
    rank = len(view)
    if node.op_type == "Transpose" and permutation(node) == swap(rank):  # values @ probabilities.T
        turned = node.outputs[0]
        uses = list(turned.uses())
        if len(uses) != 1 or turned.is_graph_output() or uses[0].node.op_type != "MatMul" or uses[0].idx != 1:
            return None
        product = uses[0].node
        values = product.inputs[0]
        shape = dims(product.outputs[0])
        if values is None or shape is None or (*shape[:-2], shape[-1]) != view[:-1]:
            return None
        return product, transposed(values, peel=False), swap(rank)
    values = node.inputs[1 - index] if len(node.inputs) == 2 else None
    if values is None:
        return None
    if node.op_type == "MatMul" and index == 0:
        shape = dims(node.outputs[0])
        return (node, plain(values, peel=False), None) if shape is not None and shape[:-1] == view[:-1] else None
    return _einsum(node, index, values) if node.op_type == "Einsum" else None


def _einsum(node: ir.Node, index: int, values: ir.Value) -> tuple[ir.Node, Operand, tuple[int, ...] | None] | None:
    letters = einsum_letters(node)
    if letters is None:
        return None
    ours, theirs, out = letters[index], letters[1 - index], letters[2]
    batch, row, column = ours[:-2], ours[-2], ours[-1]
    feature = "".join(set(theirs) - set(ours))
    if len(feature) != 1 or column not in theirs or row in theirs or set(out) != {*batch, row, feature}:
        return None
    natural = batch + row + feature
    perm = tuple(natural.index(letter) for letter in out)
    return node, lettered(values, theirs, batch + column + feature, peel=False), None if out == natural else perm
