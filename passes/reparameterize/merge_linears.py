"""The pass `merge-linears`: matrix products that feed one another, or are summed, become one product."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass, Refusal
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import in_range, insert, take_over
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine import read_affine
from edgekit.passes.reparameterize.linear_plan import Plan, Savings, best_plan, cost_now, plan_with
from edgekit.passes.reparameterize.token_form import Form, form_of, is_product


@dataclass(frozen=True)
class MergeLinears(Pass):
    """Merge matrix products that follow one another, are summed, or meet in a concatenation into one.

    Before:  x ─┬─ MatMul(W) ──────────────── Add ─ Add(b) ─► y            a low-rank adapter (LoRA)
                └─ MatMul(A) ─ MatMul(B) ─────┘
    After:   x ─── MatMul(W + A·B) ─ Add(b) ─► y

    Before:  x ─ MatMul(P) ─ Concat(z) ─ MatMul(Q) ─ Slice ─► y            a change of basis in blocks
    After:   x ─ Concat(z) ─ MatMul(M) ─► y

    A value is read back through MatMul, Add, Sub, Sum, scalings by constants, Concat, Slice, Split and Gather of the last axis as one
    linear form of the values where that ends: y = b + Σ s·K_s. Every value between may stay as it is (a cut): of all ways to cut, the one
    that saves most is taken. So a low-rank pair stays a pair, and a third factor joins its cheaper side. Nodes are replaced when

    1. the matrices are constants, and every operator between maps the last axis alone;
    2. nothing else reads the values that disappear;
    3. a product is among the nodes, and with it another product, a sum or a selection of columns (scalings alone are other passes' work);
    4. multiply-accumulates and elements of matrices do not rise and one of them falls, or with equal numbers fewer elements are moved
       (at most half as many where a concatenation must be made for it);
    5. the new matrix is finite in its dtype.

    A product that several products read, and nothing else, is multiplied into each of them under the same conditions. The numbers are
    computed in float64 and cast once.

    Source: Hu et al. 2022, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1; Zhou et al. 2023, "BT²: Backward-compatible
    Training with Basis Transformation", section 3 (orthogonal changes of basis); Ding et al. 2021, "Diverse Branch Block", transforms
    II to IV, with 1×1 kernels.
    """

    name: ClassVar[str] = "merge-linears"
    effect: ClassVar[Effect] = Effect.EXACT
    removes: ClassVar[frozenset[str]] = frozenset({"BatchNormalization"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Merges in the main graph until nothing more is found; returns how many places were rewritten."""
        if not any(is_product(node) for node in model.graph):
            return 0
        editor = GraphEditor(model)
        total = 0
        while True:
            refusals: list[Refusal] = []
            found = _sweep(editor, context, refusals)
            total += found
            if not found:
                context.refusals += refusals
                return total


def _sweep(editor: GraphEditor, context: Context, refusals: list[Refusal]) -> int:
    """Tries every value once, consumers before producers; returns how many rewrites that gave."""
    found = 0
    told: list[frozenset[ir.Node]] = []
    nodes = list(editor.graph)
    savings = Savings(nodes)
    for node in reversed(nodes):
        where = node.name or node.op_type
        for roots in _candidates(node, editor):
            plan = savings.plans.get(roots[0]) if len(roots) == 1 and not found else best_plan(roots)  # a rewriting may have made it old
            if plan is None or context.skips(where):
                continue
            if not plan.is_gain:
                why: str | None = _why_no_gain(plan)
            elif len(roots) == 1 and savings.of_operands(roots[0], plan) < plan.change:
                continue  # its operands come next, each on its own
            else:
                why = _rewrite(plan, editor)
            if why is None:
                found += 1
                context.applied(where)
                break
            products = frozenset(plan.region.products)
            if len(products) > 1 and not any(products <= others for others in told):
                told.append(products)
                refusals.append(Refusal(where, why))
        if node.graph is editor.graph and (why := _why_not_read(node)) is not None:
            refusals.append(Refusal(where, why))
    return found


def _candidates(node: ir.Node, editor: GraphEditor) -> Iterator[tuple[ir.Value, ...]]:
    """The sets of values to try for `node`: what it makes, and what the products make that alone read it."""
    if node.graph is not editor.graph or len(node.outputs) != 1:
        return
    yield (node.outputs[0],)
    uses = node.outputs[0].uses()
    if len(uses) > 1 and not node.outputs[0].is_graph_output() and all(use.idx == 0 and is_product(use.node) for use in uses):
        yield tuple(dict.fromkeys(_after_scalings(use.node.outputs[0]) for use in uses))


def _after_scalings(value: ir.Value) -> ir.Value:
    """Follows `value` through biases and scalings by constants as far as nothing else reads it."""
    while is_used_once(value):
        (use,) = value.uses()
        found = read_affine(use.node)
        shape = static_shape(value)
        if found is None or found.x is not value or shape is None or found.along(len(shape) - 1) is None:
            break
        value = use.node.outputs[0]
    return value


def _why_no_gain(plan: Plan) -> str:
    now, whole = cost_now(plan.region), plan_with(plan.region, ()) or plan
    return (
        f"{len(plan.region.products)} products are not merged: as one they would take {whole.cost.macs} multiply-accumulates and "
        f"{whole.cost.elements} elements of weights instead of {now.macs} and {now.elements}"
    )


def _why_not_read(node: ir.Node) -> str | None:
    """Returns what keeps a product and the product whose result it reads apart, where nothing but scalings is between them."""
    if node.op_type != "MatMul" or node.domain != "":
        return None
    value = node.inputs[0]
    between: list[ir.Value] = []
    while value is not None and (found := read_affine(value.producer())) is not None:
        between.append(value)
        value = found.x
    first = value.producer() if value is not None else None
    if value is None or first is None or first.op_type != "MatMul" or first.domain != "":
        return None
    for product in (node, first):
        weight = product.inputs[1]
        if weight is not None and weight.shape is not None and len(weight.shape) == 2 and constant_array(weight) is None:
            return f"not merged with MatMul '{first.name}': the weight of MatMul '{product.name}' is not a constant"
    if not (is_product(node) and is_product(first)):
        return None
    shared = next((v for v in (value, *between) if v.is_graph_output() or not all(_is_inner_read(node, i) for node, i in v.uses())), None)
    return None if shared is None else f"not merged with MatMul '{first.name}': its result is read elsewhere"


def _is_inner_read(reader: ir.Node, index: int) -> bool:
    return (index == 0 and is_product(reader)) or read_affine(reader) is not None


def _rewrite(plan: Plan, editor: GraphEditor) -> str | None:
    """Puts the plan's products in the place of its region; returns why not when a matrix is not finite."""
    weights: dict[ir.Value, _Weights] = {}
    for value, pattern in plan.patterns.items():
        assert value.dtype is not None
        dtype = value.dtype.numpy()
        form = form_of(value, plan.region, plan.cuts, np.float64)
        blocks = [form.terms[source][slice(*pattern.rows(source))] for source in pattern.dense()]
        matrix = in_range(np.concatenate(blocks), dtype) if blocks else None
        bias = in_range(form.bias, dtype) if pattern.bias.any() else None
        if (blocks and matrix is None) or (pattern.bias.any() and bias is None):
            return f"the merged weights would not be finite in {dtype.name}"
        weights[value] = _Weights(matrix, bias)
    writer = _Writer(editor)
    for value in sorted(plan.patterns, key=lambda v: v in plan.region.roots or -plan.region.nodes.index(_maker(v))):  # cuts, then roots
        writer.write(value, plan.patterns[value], weights[value])
    for root in plan.region.roots:
        new = writer.made[root]
        if new in plan.patterns[root].terms:
            root.replace_all_uses_with(new)
        else:
            take_over(editor, root, new)
    editor.remove(plan.region.nodes)
    for constant, name in writer.names.items():
        if name not in editor.graph.initializers:
            constant.name = name
    return None


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


@dataclass(frozen=True)
class _Weights:
    """The matrix `[in, C]` over all dense sources of a form, and its bias `[C]`; None for what it lacks."""

    matrix: np.ndarray | None
    bias: np.ndarray | None


class _Writer:
    """Adds the nodes that compute forms.

    Attributes:
        made: What was added, by the value that it replaces.
        names: The names that new constants shall have once those that bear them are gone: a matrix that of the largest among the old
            ones, so that it leads back to the same module.
    """

    def __init__(self, editor: GraphEditor) -> None:
        self.made: dict[ir.Value, ir.Value] = {}
        self.names: dict[ir.Value, str] = {}
        self._editor = editor

    def write(self, value: ir.Value, form: Form, weights: _Weights) -> None:
        """Adds what computes `form` before the node that makes `value` now."""
        shape = static_shape(value) or ()
        products = [node for node in form.nodes if is_product(node)]
        constants = [x for node in form.nodes for x in node.inputs if constant_array(x) is not None]
        matrices = [w for node in products if (w := node.inputs[1]) is not None]
        largest = max(matrices, key=lambda w: math.prod(static_shape(w) or ()), default=None)
        prefix = (largest.name if largest is not None else None) or f"{value.name}.weight"
        place = (_maker(value), products or [_maker(value)])
        addends = [self.made.get(source, source) for source in form.plain()]
        if weights.matrix is not None:
            x = self._joined([self._sliced(source, form.rows(source), *place) for source in form.dense()], *place)
            matrix = self._constant(prefix, weights.matrix, constants)
            addends.insert(0, insert(self._editor, *place, "MatMul", [x, matrix], shape).outputs[0])
        if weights.bias is not None:
            addends.insert(1, self._constant(f"{prefix.removesuffix('.weight')}.bias", weights.bias, constants))
        total = addends[0]
        for addend in addends[1:]:
            total = insert(self._editor, *place, "Add", [total, addend], shape).outputs[0]
        self.made[value] = total

    def _constant(self, name: str, array: np.ndarray, made_from: Sequence[ir.Value | None]) -> ir.Value:
        value = self._editor.add_initializer(name, array, made_from=made_from)
        self.names[value] = name
        return value

    def _joined(self, parts: Sequence[ir.Value], before: ir.Node, nodes: Sequence[ir.Node]) -> ir.Value:
        if len(parts) == 1:
            return parts[0]
        shapes = [static_shape(part) or (0,) for part in parts]
        shape = (*shapes[0][:-1], sum(part[-1] for part in shapes))
        return insert(self._editor, before, nodes, "Concat", parts, shape, {"axis": len(shape) - 1}).outputs[0]

    def _sliced(self, source: ir.Value, rows: tuple[int, int], before: ir.Node, nodes: Sequence[ir.Node]) -> ir.Value:
        """The part of the last axis of `source` that matters."""
        value, shape = self.made.get(source, source), static_shape(source) or ()
        if rows == (0, shape[-1]):
            return value
        numbers = {"starts": rows[0], "ends": rows[1], "axes": len(shape) - 1}
        limits = [self._editor.add_initializer(f"{before.name}.{name}", np.array([number])) for name, number in numbers.items()]
        return insert(self._editor, before, nodes, "Slice", [value, *limits], (*shape[:-1], rows[1] - rows[0])).outputs[0]
