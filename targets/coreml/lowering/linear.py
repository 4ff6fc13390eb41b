"""Products of matrices. A constant weight makes MIL's `linear`, in the layout that it wants; Einsum becomes transposes and products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.graph.ranges import FLOAT16_MAX
from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.quantized_constants import transposed

_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})
"""Integers that MIL multiplies as ONNX does; the others would have to wrap around."""


def widen(b: Lowering, *arrays: np.ndarray) -> None:
    """Keeps the node in float32 where a constant that is computed for it exceeds float16."""
    if any(np.abs(array[np.isfinite(array)]).max(initial=0) > FLOAT16_MAX for array in arrays):
        b.half = False


def _need_numbers(b: Lowering, node: ir.Node) -> None:
    if not b.is_float(node) and b.dtype(node) not in _INTEGERS:
        raise b.refuse(f"{node.op_type} of {b.dtype(node).name}", "use floats or int32")


def _matmul(b: Lowering, node: ir.Node) -> Any:
    _need_numbers(b, node)
    x, weight = b.x(node), b.known(node, 1)
    if weight is not None and weight.ndim == 2 and 1 <= len(x.shape) <= 3 and b.is_float(node):
        return b.op("linear", x=x, weight=b.var(transposed(b, weight), node.inputs[1].name or ""))  # type: ignore[union-attr]
    y = b.x(node, 1)
    row, column = len(x.shape) == 1, len(y.shape) == 1
    if row:
        x = b.op("expand_dims", x=x, axes=[0])
    if column:
        y = b.op("expand_dims", x=y, axes=[1])
    product = b.op("matmul", x=x, y=y)
    added = [axis for axis, there in ((-2, row), (-1, column)) if there]
    return b.op("squeeze", x=product, axes=[axis + len(product.shape) for axis in added]) if added else product


def _linear(b: Lowering, node: ir.Node) -> Any:
    """The product and bias that `biases.fuse_biases` put together."""
    weight, bias = b.need_known(node, 1, "weight"), b.need_known(node, 2, "bias")
    return b.op("linear", x=b.x(node), weight=b.var(transposed(b, weight), node.inputs[1].name or ""), bias=bias)  # type: ignore[union-attr]


def _gemm(b: Lowering, node: ir.Node) -> Any:
    _need_numbers(b, node)
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    flip_x, flip_y = bool(node.attributes.get_int("transA", 0)), bool(node.attributes.get_int("transB", 0))
    weight = b.known(node, 1)
    if not b.is_float(node):
        if alpha != 1 or (beta != 1 and b.has(node, 2)):
            raise b.refuse("Gemm of integers with alpha or beta", "use floats")
    elif weight is not None:
        weight = weight if flip_y else transposed(b, weight)
        return _gemm_by_linear(b, node, weight if alpha == 1 else weight * np.float32(alpha), flip_x)
    y = _scaled(b, b.op("matmul", x=b.x(node), y=b.x(node, 1), transpose_x=flip_x, transpose_y=flip_y), alpha)
    return b.op("add", x=y, y=_scaled(b, b.x(node, 2), beta)) if b.has(node, 2) else y


def _gemm_by_linear(b: Lowering, node: ir.Node, weight: np.ndarray, flip_x: bool) -> Any:
    assert node.inputs[1] is not None
    beta, added, bias = node.attributes.get_float("beta", 1.0), b.known(node, 2), None
    if added is not None and added.size == math.prod(added.shape[-1:]):  # one number per column, or one for all
        bias = np.broadcast_to(added.reshape(-1) * np.float32(beta), weight.shape[:1]).copy()
    widen(b, weight, *([] if bias is None else [bias]))
    x = b.op("transpose", x=b.x(node), perm=[1, 0]) if flip_x else b.x(node)
    y = b.op("linear", x=x, weight=b.var(np.ascontiguousarray(weight), node.inputs[1].name or ""), bias=bias)
    return y if bias is not None or not b.has(node, 2) else b.op("add", x=y, y=_scaled(b, b.x(node, 2), beta))


def _scaled(b: Lowering, x: Any, factor: float) -> Any:
    return x if factor == 1 else b.op("mul", x=x, y=float(factor))


@dataclass
class _Term:
    """An operand of Einsum with the labels of its axes."""

    x: Any
    labels: list[str]

    def size(self, label: str) -> int:
        return int(self.x.shape[self.labels.index(label)]) if label in self.labels else 1


def _einsum(b: Lowering, node: ir.Node) -> Any:
    _need_numbers(b, node)
    terms, out = _parse(b, node)
    sizes = {label: max(term.size(label) for term in terms) for term in terms for label in term.labels}
    terms = [_without_broadcast(b, _diagonal(b, term), sizes) for term in terms]
    first = _summed(b, terms[0], {*out, *(label for term in terms[1:] for label in term.labels)})
    for position, second in enumerate(terms[1:], 1):
        kept = {*out, *(label for term in terms[position + 1 :] for label in term.labels)}
        first = _product(b, _summed(b, first, kept | set(second.labels)), _summed(b, second, kept | set(first.labels)), kept)
    return _arranged(b, _summed(b, first, set(out)), out)


def _parse(b: Lowering, node: ir.Node) -> tuple[list[_Term], list[str]]:
    """The operands and the labels of the result; the axes of an ellipsis are labelled by their place from the last: "...1", "...0"."""
    equation = node.attributes.get_string("equation", "").replace(" ", "")
    left, arrow, right = equation.partition("->")
    operands = left.split(",")
    ranks = [b.rank(node, index) for index in range(len(node.inputs))]
    if len(operands) != len(ranks):
        raise b.refuse(f"the equation '{equation}' with {len(ranks)} inputs", "give one term for each input")
    spare = [rank - len(term.replace("...", "")) for term, rank in zip(operands, ranks, strict=True)]
    wide = max((count for term, count in zip(operands, spare, strict=True) if "..." in term), default=0)
    terms = [_Term(b.x(node, index), _labels(term, count)) for index, (term, count) in enumerate(zip(operands, spare, strict=True))]
    letters = left.replace("...", "").replace(",", "")
    implied = "..." + "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    out = _labels(right if arrow else implied, wide)
    if any(len(term.labels) != rank for term, rank in zip(terms, ranks, strict=True)) or not _is_result(out, terms):
        raise b.refuse(f"the equation '{equation}' for inputs of rank {ranks}", "correct the equation")
    return terms, out


def _is_result(out: list[str], terms: list[_Term]) -> bool:
    return len(set(out)) == len(out) and set(out) <= {label for term in terms for label in term.labels}


def _labels(term: str, ellipsis: int) -> list[str]:
    before, dots, after = term.partition("...")
    return [*before, *(f"...{place}" for place in range(ellipsis - 1, -1, -1) if dots), *after]


def _diagonal(b: Lowering, term: _Term) -> _Term:
    """A label that a term repeats reads the diagonal of its axes."""
    for label in dict.fromkeys(term.labels):
        while term.labels.count(label) > 1:
            one = term.labels.index(label)
            two = term.labels.index(label, one + 1)
            rest = [axis for axis in range(len(term.labels)) if axis not in (one, two)]
            shape = [int(term.x.shape[axis]) for axis in rest]
            size = int(term.x.shape[one])
            flat = b.op("reshape", x=_permuted(b, term.x, [*rest, one, two]), shape=[*shape, size * size])
            x = b.op("gather", x=flat, indices=np.arange(size, dtype=np.int32) * (size + 1), axis=len(shape))
            term = _Term(x, [*(term.labels[axis] for axis in rest), label])
    return term


def _without_broadcast(b: Lowering, term: _Term, sizes: dict[str, int]) -> _Term:
    """Axes of one element that other terms have longer are dropped: the term does not depend on them."""
    axes = [axis for axis, label in enumerate(term.labels) if int(term.x.shape[axis]) == 1 < sizes[label]]
    if not axes:
        return term
    return _Term(b.op("squeeze", x=term.x, axes=axes), [label for axis, label in enumerate(term.labels) if axis not in axes])


def _summed(b: Lowering, term: _Term, kept: set[str]) -> _Term:
    """Without the axes that nothing else reads."""
    axes = [axis for axis, label in enumerate(term.labels) if label not in kept]
    if not axes:
        return term
    return _Term(b.op("reduce_sum", x=term.x, axes=axes, keep_dims=False), [label for label in term.labels if label in kept])


def _product(b: Lowering, one: _Term, two: _Term, kept: set[str]) -> _Term:
    both = [label for label in one.labels if label in two.labels]
    batch, inner = [label for label in both if label in kept], [label for label in both if label not in kept]
    rows, columns = ([label for label in term.labels if label not in both] for term in (one, two))
    labels = [*batch, *rows, *columns]
    if len(labels) > 5:
        raise b.refuse(f"Einsum with an intermediate result of rank {len(labels)}", "split it into Einsums of two inputs")
    if not inner:  # products of numbers, without a sum
        x, y = (_arranged(b, term, [label for label in labels if label in term.labels], labels) for term in (one, two))
        return _Term(b.op("mul", x=x, y=y), labels)
    sizes = {label: max(one.size(label), two.size(label)) for label in (*labels, *inner)}
    plain = len(batch) <= 3 and len(rows) == len(columns) == len(inner) == 1
    batched = [sizes[label] for label in batch] if plain else [math.prod(sizes[label] for label in batch)]
    x, flip_x = _matrix(b, one, (batch, rows, inner), batched, sizes)
    y, flip_y = _matrix(b, two, (batch, inner, columns), batched, sizes)
    product = b.op("matmul", x=x, y=y, transpose_x=flip_x, transpose_y=flip_y)
    return _Term(_reshaped(b, product, [sizes[label] for label in labels]), labels)


def _matrix(
    b: Lowering, term: _Term, groups: tuple[list[str], list[str], list[str]], batched: list[int], sizes: dict[str, int]
) -> tuple[Any, bool]:
    """The term as matrices with each group of labels in one axis, and whether they are transposed, which saves moving data."""
    batch, first, second = groups
    flipped = term.labels == [*batch, *second, *first] and term.labels != [*batch, *first, *second]
    order = [second, first] if flipped else [first, second]
    x = _arranged(b, term, [*batch, *order[0], *order[1]])
    return _reshaped(b, x, [*batched, *(math.prod(sizes[label] for label in group) for group in order)]), flipped


def _reshaped(b: Lowering, x: Any, shape: Sequence[int]) -> Any:
    if tuple(shape) == tuple(x.shape) or not x.shape:  # a number needs no axes: it is broadcast
        return x
    if not shape:
        return b.op("squeeze", x=x, axes=list(range(len(x.shape))))
    return b.op("reshape", x=x, shape=list(shape))


def _permuted(b: Lowering, x: Any, perm: list[int]) -> Any:
    return x if perm == list(range(len(perm))) else b.op("transpose", x=x, perm=perm)


def _arranged(b: Lowering, term: _Term, order: list[str], among: list[str] | None = None) -> Any:
    """The term's value with its axes in `order`, and with an axis of one element for each other label of `among`."""
    x = _permuted(b, term.x, [term.labels.index(label) for label in order])
    return x if among is None else _reshaped(b, x, [term.size(label) for label in among])


TABLE = {"Einsum": _einsum, "Gemm": _gemm, "Linear": _linear, "MatMul": _matmul}
"""Linear is of the domain `edgekit.coreml`, see `biases`."""
