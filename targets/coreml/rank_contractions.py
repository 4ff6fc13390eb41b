"""Products of tensors of high rank: batch axes that are alike in both operands are joined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from string import ascii_letters

import onnx_ir as ir

from edgekit.targets.coreml.rank_groups import FREE, MAX_RANK, Role, Shape, align
from edgekit.targets.coreml.rank_rewriter import Rewriter

Term = tuple[str, ...]
"""The labels of the axes of an operand or the result of an Einsum."""


def matmul(rewriter: Rewriter) -> list[ir.Value]:
    """MatMul: the two axes of the matrices are alone; an operand whose batch axes are torn is expanded."""
    left, right = rewriter.need(0), rewriter.need(1)
    shape, other = rewriter.shape(left), rewriter.shape(right)
    result = rewriter.shape(rewriter.node.outputs[0])
    if len(shape) == 1:
        shape, result = (1, *shape), (*result[:-1], 1, result[-1])
    if len(other) == 1:
        other, result = (*other, 1), (*result, 1)
    rank = len(result)
    shapes = [align(shape, rank), align(other, rank)]
    batch = result[:-2]
    roles: list[Role] = [*[FREE] * (rank - 2), rank - 2, rank - 1]
    operands, grouping = rewriter.broadcast([left, right], shapes, [batch + shape[-2:], batch + other[-2:]], roles, least=2)
    return rewriter.again(operands, [grouping.shape(result)])


def einsum(rewriter: Rewriter) -> list[ir.Value]:
    """Einsum: labels that always stand together are one; if that is not enough, a MatMul between transposes."""
    inputs = [value for value in rewriter.node.inputs if value is not None]
    shapes = [rewriter.shape(value) for value in inputs]
    terms, result = read_equation(rewriter.node.attributes.get_string("equation", "") or "", [len(shape) for shape in shapes])
    if any(len(set(term)) < len(term) for term in (*terms, result)):
        raise rewriter.refuse("with a label twice in one term", "take the diagonal by a GatherElements before it")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, shapes, strict=True):
        sizes |= {label: size for label, size in zip(term, shape, strict=True) if size != 1}
        # An axis of length 1 is no axis: what it is broadcast against has it alone.
    terms = [tuple(label for label, size in zip(term, shape, strict=True) if size != 1) for term, shape in zip(terms, shapes, strict=True)]
    result = tuple(label for label in result if label in sizes)
    terms, result = _join(terms, result, sizes)
    if max(len(term) for term in (*terms, result)) <= MAX_RANK:
        return _merged(rewriter, inputs, terms, result, sizes)
    if len(inputs) > 2:
        raise rewriter.refuse(f"with {len(inputs)} operands", "contract two operands at a time")
    kept = [
        _summed(rewriter, value, term, _wanted(terms, result, index), sizes)
        for index, (value, term) in enumerate(zip(inputs, terms, strict=True))
    ]
    value, term = kept[0] if len(kept) == 1 else _product(rewriter, kept[0], kept[1], result, sizes)
    return [rewriter.transpose(value, _sizes(term, sizes), [term.index(label) for label in result])]


def read_equation(equation: str, ranks: Sequence[int]) -> tuple[list[Term], Term]:
    """The labels of each operand and of the result, those under an ellipsis spelled out; a result that is not given is as in numpy."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    operands = left.split(",")
    counts = [rank - len(operand.replace("...", "")) for operand, rank in zip(operands, ranks, strict=True)]
    hidden = max((count for operand, count in zip(operands, counts, strict=True) if "..." in operand), default=0)
    names = [f"...{index}" for index in range(hidden)]
    terms = [tuple(_labels(operand, names[hidden - count :])) for operand, count in zip(operands, counts, strict=True)]
    if arrow:
        return terms, tuple(_labels(right, names))
    letters = [label for label in itertools.chain.from_iterable(terms) if label not in names]
    return terms, (*names, *sorted(label for label in letters if letters.count(label) == 1))


def _labels(term: str, hidden: Sequence[str]) -> Iterator[str]:
    before, dots, after = term.partition("...")
    yield from before
    if dots:
        yield from hidden
    yield from after


def _join(terms: list[Term], result: Term, sizes: dict[str, int]) -> tuple[list[Term], Term]:
    """Joins labels that stand next to each other, in one order, in every term that has either; their sizes are added to `sizes`."""
    everything = [*terms, result]
    pairs = {pair for term in everything for pair in itertools.pairwise(term)}
    for first, second in sorted(pairs):
        if all((first, second) in itertools.pairwise(term) for term in everything if first in term or second in term):
            joined = f"{first}{second}"
            sizes[joined] = sizes[first] * sizes[second]
            return _join([_replaced(term, first, second) for term in terms], _replaced(result, first, second), sizes)
    return terms, result


def _replaced(term: Term, first: str, second: str) -> Term:
    return tuple(f"{first}{second}" if label == first else label for label in term if label != second)


def _sizes(term: Term, sizes: dict[str, int]) -> Shape:
    return tuple(sizes[label] for label in term)


def _merged(rewriter: Rewriter, inputs: Sequence[ir.Value], terms: Sequence[Term], result: Term, sizes: dict[str, int]) -> list[ir.Value]:
    letters: dict[str, str] = {}
    for label in itertools.chain(*terms):
        letters.setdefault(label, ascii_letters[len(letters)])
    sides = [",".join("".join(letters[label] for label in term) for term in side) for side in (terms, [result])]
    operands = [rewriter.regroup(value, _sizes(term, sizes)) for value, term in zip(inputs, terms, strict=True)]
    return rewriter.again(operands, [_sizes(result, sizes)], {"equation": "->".join(sides)})


def _wanted(terms: Sequence[Term], result: Term, index: int) -> set[str]:
    """The labels that an operand must keep: those of the result and of other operands."""
    return set(result).union(*(term for other, term in enumerate(terms) if other != index))


def _summed(rewriter: Rewriter, value: ir.Value, term: Term, wanted: set[str], sizes: dict[str, int]) -> tuple[ir.Value, Term]:
    """An operand without the labels that nothing else has."""
    kept, summed = tuple(label for label in term if label in wanted), tuple(label for label in term if label not in wanted)
    if not summed:
        return rewriter.carrier(value), term
    value = rewriter.transpose(value, _sizes(term, sizes), [term.index(label) for label in (*kept, *summed)])
    length = math.prod(_sizes(kept, sizes))
    matrix = rewriter.regroup(value, (length, math.prod(_sizes(summed, sizes))))
    return rewriter.add("ReduceSum", [matrix, rewriter.constant([1], "axes")], (length, 1), {"keepdims": 1}), kept


def _product(
    rewriter: Rewriter, left: tuple[ir.Value, Term], right: tuple[ir.Value, Term], result: Term, sizes: dict[str, int]
) -> tuple[ir.Value, Term]:
    """[batch, m, k] times [batch, k, n]; without a label to sum over, a Mul."""
    (first, term), (second, other) = left, right
    batch = tuple(label for label in result if label in term and label in other)
    inner = tuple(label for label in term if label in other and label not in batch)
    rows = tuple(label for label in result if label in term and label not in batch)
    columns = tuple(label for label in result if label in other and label not in batch)
    b, m, k, n = (math.prod(_sizes(part, sizes)) for part in (batch, rows, inner, columns))
    first = rewriter.transpose(first, _sizes(term, sizes), [term.index(label) for label in (*batch, *rows, *inner)])
    second = rewriter.transpose(second, _sizes(other, sizes), [other.index(label) for label in (*batch, *inner, *columns)])
    operands = [rewriter.regroup(first, (b, m, k)), rewriter.regroup(second, (b, k, n))]
    return rewriter.add("MatMul" if inner else "Mul", operands, (b, m, n)), (*batch, *rows, *columns)
