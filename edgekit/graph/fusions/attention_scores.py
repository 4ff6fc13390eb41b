"""Reads the scores of a decomposed attention: everything between the queries and keys and the Softmax.

Each reader takes one node, asks for the scores of the node's input, and adds what the node does to them. What no reader knows, or what
`Attention` cannot express in that order, gives None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.fusions.attention_build import Dims, UnfitError, dims
from edgekit.graph.fusions.attention_operands import Operand, lettered, plain, scaled, transposed

HIDES = -1e4
"""A score at or below this leaves no probability beside one that is not hidden: exp(-1e4) is zero in every precision."""
_MAX_DEPTH = 24
_WIDER = {
    ir.DataType.FLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.BFLOAT16: (ir.DataType.FLOAT, ir.DataType.DOUBLE),
    ir.DataType.FLOAT: (ir.DataType.DOUBLE,),
}


@dataclass(frozen=True)
class Term:
    """A mask or bias.

    Attributes:
        value: What is added, or the condition that chooses.
        view: The shape of the scores where it joins them.
        fill: None when `value` is added; otherwise the score of what the condition hides.
        attends: Which value of the condition lets a query attend.
        replaces: Whether `fill` takes the place of the score, rather than being added to it.
        added: The value that adds `fill`, when it is added.
        negative: Whether `value` is subtracted.
    """

    value: ir.Value
    view: Dims
    fill: float | None = None
    attends: bool = True
    replaces: bool = False
    added: ir.Value | None = None
    negative: bool = False


@dataclass(frozen=True)
class Scores:
    """Softcap and scale of `query @ key.T`, and the masks that follow.

    Attributes:
        product: The MatMul or Einsum.
        query: `[..., N, D]`.
        key: `[..., S, D]`.
        base: The shape of the product `[..., N, S]`.
        views: The shapes that the scores pass through.
        scale: What the product is multiplied by, the factors of the operands left out.
        softcap: The bound of a softcap, 0 for none.
        bounded: Whether a tanh was met whose bound is still to come.
        terms: Masks and biases.
        precision: The wider type that the scores are cast to for the Softmax.
        head_scales: Constants of one number per head that the product is multiplied by, or divided where the flag is set.
    """

    product: ir.Node
    query: Operand
    key: Operand
    base: Dims
    views: tuple[Dims, ...]
    scale: float = 1.0
    softcap: float = 0.0
    bounded: bool = False
    terms: tuple[Term, ...] = ()
    precision: ir.DataType | None = None
    head_scales: tuple[tuple[ir.Value, bool], ...] = ()


def read_scores(value: ir.Value, depth: int = 0) -> Scores | None:
    """Returns what `value` is as scores of attention; None when it is not, or when something else reads a part of it."""
    node, shape = value.producer(), dims(value)
    if node is None or node.domain != "" or shape is None or not is_used_once(value) or depth > _MAX_DEPTH:
        return None
    reader = _READERS.get(node.op_type)
    if reader is None:
        return None
    try:
        scores = reader(node, depth + 1)
    except UnfitError:
        return None
    if scores is None or scores.views[-1] == shape:
        return scores
    return replace(scores, views=(*scores.views, shape)) if node.op_type in _VIEWS else None  # a mask must not enlarge the scores


def _matmul(node: ir.Node, depth: int) -> Scores | None:
    query, key = node.inputs
    shape = dims(node.outputs[0])
    if query is None or key is None or shape is None or constant_array(key) is not None:
        return None
    return Scores(node, plain(query), transposed(key), shape, (shape,))


def _einsum(node: ir.Node, depth: int) -> Scores | None:
    letters = einsum_letters(node)
    shape = dims(node.outputs[0])
    if letters is None or shape is None or len(letters[2]) < 2:
        return None
    out = letters[2]
    row, column = out[-2], out[-1]
    operands = list(zip(node.inputs, letters[:2], strict=True))
    if row not in letters[0]:
        operands.reverse()
    (query, ours), (key, theirs) = operands
    if query is None or key is None or row not in ours or row in theirs or column not in theirs or column in ours:
        return None
    contracted = set(ours + theirs) - set(out)
    if len(contracted) != 1 or not contracted <= set(ours) & set(theirs) or constant_array(key) is not None:
        return None
    (feature,) = contracted
    return Scores(node, lettered(query, ours, out[:-1] + feature), lettered(key, theirs, out[:-2] + column + feature), shape, (shape,))


def einsum_letters(node: ir.Node) -> tuple[str, str, str] | None:
    """Returns the letters of both operands and the result of an Einsum, None when they are not explicit or one occurs twice."""
    equation = str(node.attributes.get_string("equation", "")).replace(" ", "")
    left, arrow, out = equation.partition("->")
    parts = left.split(",")
    if not arrow or len(parts) != 2 or "." in equation or any(len(set(part)) != len(part) for part in (*parts, out)):
        return None
    return parts[0], parts[1], out


def _scale(node: ir.Node, depth: int) -> Scores | None:
    found = scaled(node)
    if found is None:
        return _scale_heads(node, depth)
    scores = read_scores(found[0], depth)
    if scores is None or scores.terms or scores.softcap or scores.precision is not None:
        return None
    if scores.bounded:
        return replace(scores, bounded=False, softcap=found[1], scale=scores.scale * found[1]) if found[1] > 0 else None
    return replace(scores, scale=scores.scale * found[1])


def _scale_heads(node: ir.Node, depth: int) -> Scores | None:
    """A temperature for each head of `[B, H, N, S]`, as in Swin V2 (Liu et al. 2022) and XCiT (El-Nouby et al. 2021)."""
    for data, other in (node.inputs, reversed(node.inputs)) if node.op_type == "Mul" else (node.inputs,):
        array = constant_array(other)
        if data is None or other is None or array is None or array.ndim not in (3, 4) or array.shape[-2:] != (1, 1):
            continue
        scores = read_scores(data, depth)
        if scores is None or scores.views != (scores.base,) or len(scores.base) != 4 or dims(data) != dims(node.outputs[0]):
            return None
        if (
            scores.terms
            or scores.softcap
            or scores.bounded
            or scores.precision is not None
            or not (np.isfinite(array) & (array != 0)).all()
        ):
            return None
        return replace(scores, head_scales=(*scores.head_scales, (other, node.op_type == "Div")))
    return None


def _tanh(node: ir.Node, depth: int) -> Scores | None:
    scores = _inner(node, depth)
    if scores is None or scores.terms or scores.softcap or scores.bounded or scores.precision is not None:
        return None
    return replace(scores, bounded=True)


def _add(node: ir.Node, depth: int) -> Scores | None:
    for data, other in (node.inputs, reversed(node.inputs)):
        scores = read_scores(data, depth) if data is not None else None
        if scores is not None and other is not None:
            return _with_term(scores, _hiding(other, scores.views[-1]) or Term(other, scores.views[-1]))
    return None


def _subtract(node: ir.Node, depth: int) -> Scores | None:
    data, other = node.inputs
    scores = read_scores(data, depth) if data is not None else None
    return _with_term(scores, Term(other, scores.views[-1], negative=True)) if scores is not None and other is not None else None


def _hiding(value: ir.Value, view: Dims) -> Term | None:
    """Reads `Where(condition, 0, very low)`, or the other way round, that is added to the scores."""
    node = value.producer()
    if node is None or node.op_type != "Where" or node.domain != "" or node.inputs[0] is None:
        return None
    fills = [_uniform(branch) for branch in node.inputs[1:]]
    for attends, (kept, hidden) in ((True, fills), (False, reversed(fills))):
        if kept == 0 and hidden is not None and hidden <= HIDES:
            condition, attends = _positive(node.inputs[0], attends)
            return Term(condition, view, hidden, attends, added=value)
    return None


def _where(node: ir.Node, depth: int) -> Scores | None:
    """Reads `Where(condition, scores, very low)` and `Where(condition, very low, scores)`."""
    condition, *branches = node.inputs
    if condition is None:
        return None
    for attends, (data, other) in ((True, branches), (False, reversed(branches))):
        fill = _uniform(other)
        scores = read_scores(data, depth) if data is not None and fill is not None and fill <= HIDES else None
        if scores is not None:
            condition, attends = _positive(condition, attends)
            return _with_term(scores, Term(condition, scores.views[-1], fill, attends, replaces=True))
    return None


def _positive(condition: ir.Value, attends: bool) -> tuple[ir.Value, bool]:
    node = condition.producer()
    while node is not None and node.op_type == "Not" and node.domain == "" and node.inputs[0] is not None:
        condition, attends = node.inputs[0], not attends
        node = condition.producer()
    return condition, attends


def _uniform(value: ir.Value | None) -> float | None:
    """The number that all elements of a constant have."""
    array = constant_array(value)
    if array is None or array.size == 0 or not np.all(array == array.reshape(-1)[0]):
        return None
    return float(array.reshape(-1)[0])


def _with_term(scores: Scores, term: Term) -> Scores | None:
    if scores.bounded or scores.precision is not None:
        return None
    return replace(scores, terms=(*scores.terms, term))


def _cast(node: ir.Node, depth: int) -> Scores | None:
    scores = _inner(node, depth)
    if scores is None or scores.precision is not None or scores.bounded or node.inputs[0] is None or node.inputs[0].dtype is None:
        return None
    target, source = ir.DataType(node.attributes["to"].as_int()), node.inputs[0].dtype
    if target == source:
        return scores
    return replace(scores, precision=target) if target in _WIDER.get(source, ()) else None


def _inner(node: ir.Node, depth: int) -> Scores | None:
    return read_scores(node.inputs[0], depth) if node.inputs and node.inputs[0] is not None else None


_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_READERS: dict[str, Callable[[ir.Node, int], Scores | None]] = {
    "MatMul": _matmul,
    "Einsum": _einsum,
    "Mul": _scale,
    "Div": _scale,
    "Tanh": _tanh,
    "Add": _add,
    "Sub": _subtract,
    "Where": _where,
    "Cast": _cast,
    "Identity": _inner,
    **dict.fromkeys(_VIEWS, _inner),
}
