"""Reads matrix products, sums, scalings, concatenations and slices of the last axis as one thing, a linear form of several values.

A form says t[…, c] = bias[c] + Σ_s Σ_i s[…, i] · K_s[i, c] over its sources s. Every operator here maps the last axis and leaves the others
alone, so forms compose by the algebra of matrices: a product multiplies K and bias from the right, a concatenation puts columns side by
side, a slice picks columns. A form is read twice: first with K as the pattern of entries that may be non-zero (bool), which costs no
arithmetic and says what the form would cost as one product, and, once that pays, with the numbers (float64).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine import read_affine
from edgekit.passes.reparameterize.batch_norm import Affine

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MOST_NODES = 64
_MOST_PRODUCTS = 7
"""A region is cut off at this size; what lies beyond is a source, and a later round meets it again."""


@dataclass(frozen=True)
class Form:
    """A value as a linear form.

    Attributes:
        terms: Per source its matrix K `[in, C]`: float64, or bool where an entry may be other than zero.
        bias: `[C]` of the same dtype.
        selected: The sources whose places are only moved: K has a one per column that is not zero, and nothing was scaled or summed.
        nodes: The nodes that were read, each once.
    """

    terms: dict[ir.Value, np.ndarray]
    bias: np.ndarray
    selected: frozenset[ir.Value]
    nodes: tuple[ir.Node, ...]

    def rows(self, source: ir.Value) -> tuple[int, int]:
        """First and last place + 1 of `source` that matter; (0, 0) where none does."""
        used = np.flatnonzero(self.terms[source].any(axis=1))
        return (int(used[0]), int(used[-1]) + 1) if used.size else (0, 0)

    def plain(self) -> list[ir.Value]:
        """The sources that are added as they are: K is the identity matrix."""
        return [s for s, k in self.terms.items() if s in self.selected and k.shape[0] == k.shape[1] == np.count_nonzero(k.diagonal())]

    def dense(self) -> list[ir.Value]:
        """The sources that need a product: all that matter and are not plain."""
        plain = self.plain()
        return [source for source in self.terms if source not in plain and self.rows(source) != (0, 0)]


@dataclass(frozen=True)
class _Step:
    """How a value follows from others: `combine` makes its form from theirs."""

    inputs: tuple[ir.Value, ...]
    combine: Callable[[Sequence[Form]], Form]


def _read(value: ir.Value) -> _Step | None:
    """Reads the operator that makes `value`; None where it is no constant linear map of the last axis."""
    node, shape = value.producer(), static_shape(value)
    if node is None or node.domain != "" or shape is None or len(shape) < 2 or 0 in shape or value.dtype not in _FLOATS:
        return None
    reader = _READERS.get(node.op_type)
    step = reader(value, node, shape) if reader is not None else None
    if step is None and (found := read_affine(node)) is not None:
        last = found.along(len(shape) - 1)
        if last is not None:
            shifts = node.op_type not in ("Mul", "Div", "Neg")
            step = _Step((found.x,), lambda forms: _scaled(forms[0], last, shifts))
    if step is None or any(static_shape(x) is None or x.dtype != value.dtype for x in step.inputs):
        return None
    return step


def is_product(node: ir.Node | None) -> bool:
    """True for MatMul of a computed value `[…, in]` and a constant matrix `[in, out]`."""
    if node is None or node.op_type != "MatMul" or node.domain != "" or constant_array(node.inputs[0]) is not None:
        return False
    weight = constant_array(node.inputs[1])
    return weight is not None and weight.ndim == 2


def _product(value: ir.Value, node: ir.Node, shape: tuple[int, ...]) -> _Step | None:
    x, weight = node.inputs[0], constant_array(node.inputs[1])
    if x is None or weight is None or not is_product(node):
        return None
    return _Step((x,), lambda forms: _times(forms[0], weight))


def _total(value: ir.Value, node: ir.Node, shape: tuple[int, ...]) -> _Step | None:
    """Add, Sub or Sum of computed values of one shape."""
    values = tuple(x for x in node.inputs if x is not None and constant_array(x) is None and static_shape(x) == shape)
    if len(values) != len(node.inputs):
        return None
    signs = (1.0, -1.0) if node.op_type == "Sub" else (1.0,) * len(values)
    return _Step(values, lambda forms: _added(forms, signs))


def _joined(value: ir.Value, node: ir.Node, shape: tuple[int, ...]) -> _Step | None:
    values = tuple(x for x in node.inputs if x is not None and constant_array(x) is None)
    if len(values) != len(node.inputs) or not _is_last(node.attributes.get_int("axis", 0), shape):
        return None
    return _Step(values, _side_by_side)


def _picked(value: ir.Value, node: ir.Node, shape: tuple[int, ...]) -> _Step | None:
    """Slice, Split or Gather of the last axis at places that are known."""
    x, columns = node.inputs[0], None
    size = (static_shape(x) or (0,))[-1]
    if node.op_type == "Split" and _is_last(node.attributes.get_int("axis", 0), shape):
        widths = [(static_shape(output) or (0,))[-1] for output in node.outputs]
        start = sum(widths[: node.outputs.index(value)])
        columns = np.arange(start, start + shape[-1]) if sum(widths) == size else None
    elif node.op_type == "Gather" and _is_last(node.attributes.get_int("axis", 0), shape):
        indices = constant_array(node.inputs[1])
        columns = indices if indices is not None and indices.ndim == 1 else None
    elif node.op_type == "Slice":
        columns = _slice(node, static_shape(x) or ())
    if x is None or columns is None or constant_array(x) is not None or columns.size != shape[-1]:
        return None
    places = np.arange(size)[columns]
    return _Step((x,), lambda forms: _columns(forms[0], places))


def _slice(node: ir.Node, shape: tuple[int, ...]) -> np.ndarray | None:
    """The places that a Slice of the last axis alone reads."""
    arrays = [constant_array(value) for value in node.inputs[1:]]
    if any(array is None or array.size != 1 for array in arrays) or len(arrays) < 2:
        return None
    numbers = [int(array.reshape(-1)[0]) for array in arrays if array is not None]
    axis, step = numbers[2] if len(numbers) > 2 else 0, numbers[3] if len(numbers) > 3 else 1
    if not _is_last(axis, shape) or step < 1:
        return None
    return np.arange(shape[-1])[slice(numbers[0], numbers[1], step)]


def _is_last(axis: int, shape: tuple[int, ...]) -> bool:
    return axis in (-1, len(shape) - 1)


_READERS: dict[str, Callable[[ir.Value, ir.Node, tuple[int, ...]], _Step | None]] = {
    "MatMul": _product,
    "Add": _total,
    "Sub": _total,
    "Sum": _total,
    "Concat": _joined,
    "Slice": _picked,
    "Split": _picked,
    "Gather": _picked,
}


@dataclass(frozen=True)
class Region:
    """The nodes that compute some values, the roots, and whose inner values nothing else reads.

    Attributes:
        roots: The values.
        nodes: Consumers before producers.
        inner: The computed values that products of the region read and the region makes: where it may be cut.
    """

    roots: tuple[ir.Value, ...]
    nodes: tuple[ir.Node, ...]
    inner: tuple[ir.Value, ...]

    @property
    def products(self) -> list[ir.Node]:
        """The matrix products in it."""
        return [node for node in self.nodes if node.op_type == "MatMul"]

    @property
    def idle(self) -> list[ir.Value]:
        """The values that it makes without a product, and sums or joins with others: scaled, moved or selected sources."""
        makes: dict[ir.Value, bool] = {}
        for node in reversed(self.nodes):
            product = node.op_type == "MatMul" or any(makes.get(x, False) for x in node.inputs if x is not None)
            makes.update((output, product) for output in node.outputs)
        joins = [node for node in self.nodes if sum(x in makes for x in node.inputs) > 0 and len(operands(node.outputs[0])) > 1]
        return list(dict.fromkeys(x for node in joins for x in node.inputs if x is not None and not makes.get(x, True)))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(math.prod(static_shape(n.outputs[0]) or ()) * (static_shape(n.inputs[0]) or (0,))[-1] for n in self.products)

    @property
    def moved(self) -> int:
        """Elements that its nodes write."""
        return sum(math.prod(static_shape(output) or ()) for node in self.nodes for output in node.outputs)

    @property
    def elements(self) -> int:
        """Elements of the matrices that would go with it; one that other nodes read as well would stay."""
        weights = {node.inputs[1] for node in self.products}
        return sum(math.prod(static_shape(w) or ()) for w in weights if w is not None and self._owns(w))

    def _owns(self, value: ir.Value) -> bool:
        return not value.is_graph_output() and all(use.node in self.nodes for use in value.uses())


def operands(value: ir.Value) -> tuple[ir.Value, ...]:
    """The computed values that `value` is a linear map of; none where it is read as no such map."""
    step = _read(value)
    return () if step is None else step.inputs


def region_of(roots: Sequence[ir.Value], ends: Collection[ir.Value] = ()) -> Region | None:
    """Collects what computes `roots` linearly, as far back as nothing else reads; None where a root is no linear map of anything.

    Args:
        roots: The values that are wanted.
        ends: Values that are not read any further.
    """
    found: dict[ir.Node, None] = {}
    products = 0
    waiting = deque(roots)
    while waiting:
        value = waiting.popleft()
        node = value.producer()
        if node is None or node in found or value in ends or (value not in roots and not _read_only_by(node, found)):
            continue
        step = _read(value)
        if step is None or (value in roots and len(node.outputs) != 1):
            if value in roots:
                return None
            continue
        if value not in roots and (len(found) >= _MOST_NODES or (is_product(node) and products >= _MOST_PRODUCTS)):
            continue
        found[node] = None
        products += is_product(node)
        waiting.extend(step.inputs)
    inner = [node.inputs[0] for node in found if is_product(node)]
    cuts = tuple(dict.fromkeys(x for x in inner if x is not None and x.producer() in found and x not in roots))
    return Region(tuple(roots), tuple(found), cuts)


def _read_only_by(node: ir.Node, nodes: Collection[ir.Node]) -> bool:
    return all(not output.is_graph_output() and all(use.node in nodes for use in output.uses()) for output in node.outputs)


def form_of(value: ir.Value, region: Region, cuts: Collection[ir.Value], dtype: type) -> Form:
    """Reads `value`, which the region makes, as a linear form of the region's sources, its other roots and `cuts`.

    Args:
        value: The value.
        region: Where it is made.
        cuts: Values of the region that are sources too.
        dtype: `np.float64`, or `np.bool_` for the pattern alone.
    """
    known: dict[ir.Value, Form] = {}

    def read(current: ir.Value) -> Form:
        if current not in known:
            node = current.producer()
            ends = current is not value and (current in cuts or current in region.roots)
            step = _read(current) if node in region.nodes and not ends else None
            if step is None or node is None:
                known[current] = _fresh(current, dtype)
            else:
                form = step.combine([read(x) for x in step.inputs])
                known[current] = Form(form.terms, form.bias, form.selected, tuple(dict.fromkeys((*form.nodes, node))))
        return known[current]

    return read(value)


def _fresh(value: ir.Value, dtype: type) -> Form:
    channels = (static_shape(value) or (0,))[-1]
    return Form({value: np.eye(channels, dtype=dtype)}, np.zeros(channels, dtype), frozenset({value}), ())


def _times(form: Form, weight: np.ndarray) -> Form:
    """K·W and bias·W; of a pattern, each row that is not empty becomes full."""
    out = weight.shape[1]
    if form.bias.dtype == np.bool_:
        terms: dict[ir.Value, np.ndarray] = {s: np.broadcast_to(k.any(axis=1, keepdims=True), (len(k), out)) for s, k in form.terms.items()}
        return Form(terms, np.full(out, form.bias.any()), frozenset(), form.nodes)
    wide = weight.astype(np.float64)
    plain = form.plain()
    terms = {s: wide if s in plain else k @ wide for s, k in form.terms.items()}
    return Form(terms, form.bias @ wide, frozenset(), form.nodes)


def _scaled(form: Form, a: Affine, shifts: bool) -> Form:
    """Scale and shift of columns; a bias that is there counts as one whatever its numbers are."""
    selected = form.selected if (a.scale == 1).all() else frozenset[ir.Value]()
    if form.bias.dtype == np.bool_:
        return Form(form.terms, form.bias | shifts, selected, form.nodes)
    return Form({s: k * a.scale for s, k in form.terms.items()}, form.bias * a.scale + a.shift, selected, form.nodes)


def _added(forms: Sequence[Form], signs: Sequence[float]) -> Form:
    terms: dict[ir.Value, np.ndarray] = {}
    bias: np.ndarray = np.zeros_like(forms[0].bias)
    selected: set[ir.Value] = set()
    for form, sign in zip(forms, signs, strict=True):
        is_pattern = form.bias.dtype == np.bool_
        for source, k in form.terms.items():
            signed = k if is_pattern or sign == 1 else -k
            if source in terms:
                selected.discard(source)
            elif source in form.selected and sign == 1:
                selected.add(source)
            terms[source] = terms[source] + signed if source in terms else signed
        bias = np.asarray(bias + (form.bias if is_pattern else sign * form.bias))
    return Form(terms, bias, frozenset(selected), _nodes(forms))


def _side_by_side(forms: Sequence[Form]) -> Form:
    widths = [form.bias.size for form in forms]
    ends = np.cumsum(widths)
    terms: dict[ir.Value, np.ndarray] = {}
    for form, width, end in zip(forms, widths, ends, strict=True):
        for source, k in form.terms.items():
            if source not in terms:
                terms[source] = np.zeros((k.shape[0], int(ends[-1])), k.dtype)
            terms[source][:, end - width : end] = k
    scaled = {source for form in forms for source in form.terms if source not in form.selected}
    return Form(terms, np.concatenate([form.bias for form in forms]), frozenset(terms) - scaled, _nodes(forms))


def _columns(form: Form, places: np.ndarray) -> Form:
    """The columns at `places`; a source of which nothing is left disappears from the pattern."""
    terms = {source: k[:, places] for source, k in form.terms.items()}
    if form.bias.dtype == np.bool_:
        terms = {source: k for source, k in terms.items() if k.any()}
    return Form(terms, form.bias[places], form.selected, form.nodes)


def _nodes(forms: Sequence[Form]) -> tuple[ir.Node, ...]:
    return tuple(dict.fromkeys(node for form in forms for node in form.nodes))
