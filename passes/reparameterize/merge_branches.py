"""The pass `merge-branches`: parallel linear branches that are summed become one convolution."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor
from edgekit.passes.reparameterize.affine_sums import AffineSum, AffineTerm, add_terms, read_term
from edgekit.passes.reparameterize.composition import Weights
from edgekit.passes.reparameterize.convolutions import insert_convolution, insert_like, narrowed, why_not_replaced
from edgekit.passes.reparameterize.geometry import Geometry, merged_geometry
from edgekit.passes.reparameterize.linear_form import LinearForm, Obstacle, interpret, merged_weights
from edgekit.passes.reparameterize.sums import SumTree, sum_trees


@dataclass(frozen=True)
class MergeBranches(Pass):
    """Merge parallel convolutions, batch norms, scaled and pooled copies and skips that are added up into one convolution.

    Before:  x ─┬─ Conv 3x3 ──────────┐
                ├─ Conv 1x1 ───────── Add ─ Add ─ Sub ─► y
                ├─ BatchNormalization ───────┘     │
                └─ AveragePool 3x3 ─ Mul(λ) ───────┘
    After:   x ─── Conv 3x3 ─► y

    Every addend of a tree of Add, Sum and Sub is read as a linear form of its source: a chain of convolutions, average pools and constant
    scales and shifts of channels, or the identity (a kernel that is one at its only tap). Forms are added exactly, tap by tap, when

    1. they read one source value with one stride and give one shape;
    2. their weights and statistics are constants, and an average pool divides by the size of its window everywhere;
    3. nothing but the sum reads them (the same addend may occur several times, or be subtracted);
    4. a convolution is among them, and one convolution costs neither more multiply-accumulates nor more bytes of weights than what it
       replaces; weights that are read elsewhere stay, so a merged copy of them would cost bytes.

    Without a convolution, scaled and shifted copies of one source become one Mul and one Add where that takes fewer nodes or bytes.

    Before:  x ─┬─ BatchNormalization ─ Add ─► y        After:  x ─ Mul(a) ─ Add(c) ─► y
                └─ Mul(α) ───────────────┘

    Other addends stay: the sum is regrouped around them. A constant zero (`sum()` in Python starts with one) is dropped.

    Source: Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again", section 3.3; for asymmetric kernels Ding et al. 2019,
    "ACNet", section 3.2; for pooling and chains in a branch Ding et al. 2021, "Diverse Branch Block", section 3.2; for several branches of
    one size Vasu et al. 2023, "MobileOne", section 3.2; for differences Vasu et al. 2023, "FastViT", section 3.2.1.
    """

    name: ClassVar[str] = "merge-branches"
    effect: ClassVar[Effect] = Effect.EXACT
    default_order: ClassVar[int | None] = None
    removes: ClassVar[frozenset[str]] = frozenset({"BatchNormalization", "Conv"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Merges in every sum of the main graph until none is left that can be.

        Returns:
            How many convolutions or scales took the place of branches, plus zeros dropped elsewhere.
        """
        trees = sum_trees(model.graph)
        editor = GraphEditor(model) if trees else None
        merged, refused = 0, len(context.refusals)
        while trees:
            assert editor is not None
            found = sum(_merge_in_sum(tree, editor, context) for tree in trees)
            if not found:
                break
            merged += found
            del context.refusals[refused:]  # they told of a graph that has changed since
            trees = sum_trees(model.graph)
        return merged


class _Merged(Protocol):
    """Addends that become one value."""

    @property
    def values(self) -> list[ir.Value]: ...
    @property
    def nodes(self) -> list[ir.Node]: ...
    @property
    def new_nodes(self) -> int: ...
    def insert(self, root: ir.Node, editor: GraphEditor) -> ir.Value: ...


@dataclass(frozen=True)
class _MergedConvolution:
    """Addends of one source as one convolution, with its weights in the dtype of the source."""

    values: list[ir.Value]
    forms: list[LinearForm]
    geometry: Geometry
    weights: Weights
    new_nodes: int = 1

    @property
    def nodes(self) -> list[ir.Node]:
        return _nodes(self.forms)

    def insert(self, root: ir.Node, editor: GraphEditor) -> ir.Value:
        return insert_convolution(self.forms[0].source, self.geometry, self.weights, self.nodes, root, editor)


def _merge_in_sum(tree: SumTree, editor: GraphEditor, context: Context) -> int:
    where = tree.root.name or tree.root.op_type
    if context.skips(where):
        return 0
    addends = tree.addends()
    convolutions = _merge_convolutions(tree, addends, context)
    gone = {value for item in convolutions for value in item.values}
    affine = _merge_affine(tree, [value for value in addends if value not in gone and addends[value]], addends, context)
    merged: list[_Merged] = [*convolutions, *affine]
    count = len(merged) if merged and _is_smaller(tree, addends, merged) else 0
    if count:
        _rebuild(tree, addends, merged, editor)
    else:
        count = _drop_zeros(tree, addends, editor)
    if count:
        context.applied(where)
    return count


def _is_smaller(tree: SumTree, addends: Counter[ir.Value], merged: list[_Merged]) -> bool:
    """Whether the sum takes fewer nodes when it is written out anew, or as many and something else is saved.

    A value that is added to itself again and again is many addends and few additions. Addends that cancel out stay.
    """
    gone = {value for item in merged for value in item.values}
    left = [times for value, times in addends.items() if value not in gone]
    if 0 in left:
        return False
    old = len(tree.inner) + sum(len(item.nodes) for item in merged)
    new = sum(item.new_nodes for item in merged) + len(merged) - 1 + sum(map(abs, left))
    return new < old or (new == old and all(isinstance(item, AffineSum) and item.saved_bytes > 0 for item in merged))


def _drop_zeros(tree: SumTree, addends: Counter[ir.Value], editor: GraphEditor) -> int:
    """Replaces a sum of one value and zeros by the value; returns 1 when it was one."""
    result = tree.root.outputs[0]
    if list(addends.values()) != [1] or result.is_graph_output():
        return 0
    (value,) = addends
    editor.replace_value(result, value)
    editor.remove(tree.inner)
    return 1


def _merge_convolutions(tree: SumTree, addends: Counter[ir.Value], context: Context) -> list[_MergedConvolution]:
    forms: dict[ir.Value, LinearForm] = {}
    obstacles: list[Obstacle] = []
    for value in addends:
        form, obstacle = interpret(value, free=tree.reads_alone(value))
        if form is not None:
            forms[value] = form
        if obstacle is not None:
            obstacles.append(obstacle)
    by_source: dict[ir.Value, list[ir.Value]] = defaultdict(list)
    for value, form in forms.items():
        by_source[form.source].append(value)
    _explain_obstacles(obstacles, by_source, context)
    clusters = [
        cluster
        for values in by_source.values()
        if any(forms[value].has_convolution for value in values)
        for cluster in _clusters(values, forms, tree.root, context)
        if _is_gain(cluster, forms, addends)
    ]
    merged = [_convolution(cluster, forms, addends, tree.root, context) for cluster in clusters]
    return [item for item in merged if item is not None]


def _merge_affine(tree: SumTree, values: list[ir.Value], addends: Counter[ir.Value], context: Context) -> list[AffineSum]:
    by_source: dict[ir.Value, list[AffineTerm]] = defaultdict(list)
    for value in values:
        term = read_term(value, free=tree.reads_alone(value))
        if term is not None:
            by_source[term.source].append(term)
    merged = []
    for terms in by_source.values():
        found = add_terms([(term, addends[term.value]) for term in terms])
        if isinstance(found, AffineSum):
            merged.append(found)
        elif found is not None:
            context.refuse(tree.root.name or tree.root.op_type, found)
    return merged


def _explain_obstacles(obstacles: list[Obstacle], by_source: dict[ir.Value, list[ir.Value]], context: Context) -> None:
    """Notes what could not be read where another addend has the same source: there it nearly matched."""
    sources = Counter(obstacle.source for obstacle in obstacles if obstacle.source is not None)
    for obstacle in obstacles:
        if obstacle.source is not None and (obstacle.source in by_source or sources[obstacle.source] > 1):
            context.refuse(obstacle.node.name or obstacle.node.op_type, f"the branch is not merged: {obstacle.why}")


def _clusters(values: list[ir.Value], forms: dict[ir.Value, LinearForm], root: ir.Node, context: Context) -> list[list[ir.Value]]:
    """Groups addends of one source so that each group is cheapest as one convolution.

    All of one stride are tried first; where that costs too much, the pair that saves most is joined until none saves.
    """
    by_stride: dict[tuple[int, ...], list[ir.Value]] = defaultdict(list)
    for value in values:
        by_stride[forms[value].geometry.stride].append(value)
    if len(by_stride) > 1:
        context.refuse(root.name or root.op_type, f"its branches have different strides: {', '.join(map(str, by_stride))}")
    clusters: list[list[ir.Value]] = []
    for same in by_stride.values():
        items = [_Item([value], [forms[value]], forms[value].geometry, forms[value].macs) for value in same]
        whole = _join(items)
        if isinstance(whole, _Item):
            clusters.append(whole.values)
            continue
        while pairs := [(joined.saving, a, b, joined) for a, b in itertools.combinations(range(len(items)), 2)
                        if isinstance(joined := _join([items[a], items[b]]), _Item)]:  # fmt: skip
            _, a, b, best = max(pairs, key=lambda pair: pair[0])
            items = [item for index, item in enumerate(items) if index not in (a, b)] + [best]
        why = _join(items)
        if isinstance(why, str) and len(items) > 1 and any(forms[value].has_convolution for value in same):
            context.refuse(root.name or root.op_type, why)
        clusters += [item.values for item in items]
    return clusters


@dataclass(frozen=True)
class _Item:
    """Addends that are joined already, with what they cost now."""

    values: list[ir.Value]
    forms: list[LinearForm]
    geometry: Geometry
    macs: int
    saving: int = 0


def _join(items: list[_Item]) -> _Item | str:
    """Returns the items as one convolution, or why that costs more."""
    geometry = merged_geometry([item.geometry for item in items])
    macs, forms = sum(item.macs for item in items), [form for item in items for form in item.forms]
    why = why_not_replaced(geometry, macs, _nodes(forms), forms[0].source.dtype or ir.DataType.FLOAT)
    if why is not None:
        return why
    values = [value for item in items for value in item.values]
    return _Item(values, forms, geometry, geometry.macs, macs - geometry.macs)


def _is_gain(cluster: list[ir.Value], forms: dict[ir.Value, LinearForm], addends: Counter[ir.Value]) -> bool:
    several = len(cluster) > 1 or abs(addends[cluster[0]]) > 1
    return several and any(forms[value].has_convolution for value in cluster)


def _convolution(
    cluster: list[ir.Value], forms: dict[ir.Value, LinearForm], addends: Counter[ir.Value], root: ir.Node, context: Context
) -> _MergedConvolution | None:
    """Returns the merged convolution, or None when its weights are not finite in the dtype of the source."""
    branches = [forms[value] for value in cluster]
    geometry = merged_geometry([form.geometry for form in branches])
    dtype = branches[0].source.dtype
    assert dtype is not None
    weights = narrowed(merged_weights([(forms[value], addends[value]) for value in cluster], geometry), dtype)
    if weights is None:
        context.refuse(root.name or root.op_type, f"the merged weights would not be finite in {dtype.numpy().name}")
        return None
    return _MergedConvolution(cluster, branches, geometry, weights)


def _rebuild(tree: SumTree, addends: Counter[ir.Value], merged: list[_Merged], editor: GraphEditor) -> None:
    """Replaces the tree by a sum of what was merged and the addends that stay."""
    gone = {value for item in merged for value in item.values}
    total, *plus = [item.insert(tree.root, editor) for item in merged]
    terms = [("Add", value) for value in plus]
    for value, times in addends.items():
        if value not in gone:
            terms += [("Add" if times > 0 else "Sub", value)] * abs(times)
    for op_type, term in terms:
        node = ir.node(op_type, [total, term], name=editor.unique_name(f"{tree.root.name}.merged"))
        total = insert_like(node, tree.root, editor)
    editor.replace_value(tree.root.outputs[0], total)
    editor.remove([*tree.inner, *dict.fromkeys(node for item in merged for node in item.nodes)])


def _nodes(forms: Sequence[LinearForm]) -> list[ir.Node]:
    return list(dict.fromkeys(node for form in forms for node in form.nodes))
