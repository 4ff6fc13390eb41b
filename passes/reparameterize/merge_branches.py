"""The pass `merge-branches`: parallel linear branches that are summed become one convolution."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, common_module, constant_array
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.linear_form import (
    Geometry,
    LinearForm,
    Obstacle,
    interpret,
    merged_geometry,
    merged_weights,
)


@dataclass(frozen=True)
class MergeBranches(Pass):
    """Merge parallel convolutions, batch norms and skips that are added up into one convolution.

    Before:  x ─┬─ Conv 3x3 ──────────┐
                ├─ Conv 1x1 ───────── Add ─ Add ─► y
                └─ BatchNormalization ───────┘
    After:   x ─── Conv 3x3 ─► y

    Every addend of a tree of Add (or Sum) is read as a linear form of its source: a convolution, the identity (a kernel that is one at its
    only tap), either of them followed by batch norms. Forms are added exactly, tap by tap, when

    1. they read one source value with one stride and give one shape;
    2. their weights and statistics are constants;
    3. nothing but the sum reads them (the same addend may occur several times);
    4. a convolution is among them, and one convolution costs neither more multiply-accumulates nor more weights than what it replaces.

    Other addends stay: the sum is regrouped around them. A constant zero (`sum()` in Python starts with one) is dropped.

    Source: Ding et al. 2021, "RepVGG: Making VGG-style ConvNets Great Again", section 3.3; for several branches of one size,
    Vasu et al. 2023, "MobileOne: An Improved One millisecond Mobile Backbone", section 3.2.
    """

    name: ClassVar[str] = "merge-branches"
    effect: ClassVar[Effect] = Effect.EXACT
    default_order: ClassVar[int | None] = 20
    removes: ClassVar[frozenset[str]] = frozenset({"BatchNormalization", "Conv"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Merges in every sum of the main graph; returns how many convolutions took the place of branches, plus zeros dropped elsewhere."""
        trees = _sums(model.graph)
        editor = GraphEditor(model) if trees else None
        merged = 0
        for tree in trees:
            assert editor is not None
            where = tree.root.name or tree.root.op_type
            if context.skips(where):
                continue
            in_sum = _merge_in_sum(tree, editor, context)
            if in_sum:
                context.applied(where)
            merged += in_sum
        return merged


@dataclass(frozen=True)
class _Sum:
    """A tree of additions without broadcasting, except of zero.

    Attributes:
        root: The last addition.
        inner: The additions whose results only the tree reads, the root first.
    """

    root: ir.Node
    inner: tuple[ir.Node, ...]

    def addends(self) -> Counter[ir.Value]:
        """How often each value other than zero is added, in the order in which they are first met."""
        times: Counter[ir.Value] = Counter({self.root.outputs[0]: 1})
        for node in self.inner:  # consumers before producers: a result's count is complete when it is split up
            count = times.pop(node.outputs[0])
            for value in node.inputs:
                if value is not None and not _is_zero(value):
                    times[value] += count
        return times

    def reads_alone(self, value: ir.Value) -> bool:
        """True when nothing outside the tree reads `value`."""
        return not value.is_graph_output() and all(use.node in self.inner for use in value.uses())


def _sums(graph: ir.Graph) -> list[_Sum]:
    """Returns the largest trees of additions, producers before consumers."""
    root_of: dict[ir.Node, ir.Node] = {}
    trees: dict[ir.Node, list[ir.Node]] = {}
    for node in reversed(graph):
        if not _is_plain_sum(node):
            continue
        value = node.outputs[0]
        roots = {root_of.get(use.node) for use in value.uses()}
        root = roots.pop() if len(roots) == 1 and not value.is_graph_output() else None
        root_of[node] = root if root is not None else node
        trees.setdefault(root_of[node], []).append(node)
    return [_Sum(root, tuple(inner)) for root, inner in reversed(trees.items())]


def _is_plain_sum(node: ir.Node) -> bool:
    """An Add or Sum whose operands all have the shape of its result or are a constant zero."""
    if node.op_type not in ("Add", "Sum") or node.domain != "":
        return False
    shape = static_shape(node.outputs[0])
    return shape is not None and all(static_shape(value) == shape or _is_zero(value) for value in node.inputs)


def _is_zero(value: ir.Value | None) -> bool:
    """True for a constant of one element that is zero."""
    if value is None or value.producer() is not None or value.const_value is None or value.const_value.size != 1:
        return False
    array = constant_array(value)
    return array is not None and not array.any()


def _merge_in_sum(tree: _Sum, editor: GraphEditor, context: Context) -> int:
    addends = tree.addends()
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
    clusters = []
    for values in by_source.values():
        clusters += _clusters(values, forms, tree.root, context)
    branches = [[(forms[value], addends[value]) for value in cluster] for cluster in clusters]
    merged = [
        (cluster, weights)
        for cluster, branch in zip(clusters, branches, strict=True)
        if _is_gain(branch) and (weights := _weights(branch, tree.root, context)) is not None
    ]
    if merged:
        _rebuild(tree, addends, forms, merged, editor)
        return len(merged)
    return _drop_zeros(tree, addends, editor)


def _drop_zeros(tree: _Sum, addends: Counter[ir.Value], editor: GraphEditor) -> int:
    """Replaces a sum of one value and zeros by the value; returns 1 when it was one."""
    result = tree.root.outputs[0]
    if addends.total() != 1 or result.is_graph_output():
        return 0
    (value,) = addends
    editor.replace_value(result, value)
    editor.remove(tree.inner)
    return 1


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
        items = [_Item([value], forms[value].geometry, forms[value].macs, forms[value].parameters) for value in same]
        whole = _join(items)
        if whole is not None:
            clusters.append(whole.values)
            continue
        while pairs := [(joined.saving, a, b, joined) for a, b in itertools.combinations(range(len(items)), 2)
                        if (joined := _join([items[a], items[b]])) is not None]:  # fmt: skip
            _, a, b, best = max(pairs, key=lambda pair: pair[0])
            items = [item for index, item in enumerate(items) if index not in (a, b)] + [best]
        if sum(forms[value].conv is not None for value in same) > 1 and len(items) > 1:
            kernel = "x".join(str(tap.count) for tap in merged_geometry([item.geometry for item in items]).taps)
            context.refuse(root.name or root.op_type, f"one {kernel} convolution would cost more than the branches that remain")
        clusters += [item.values for item in items]
    return clusters


@dataclass(frozen=True)
class _Item:
    """Addends that are joined already, with what they cost now."""

    values: list[ir.Value]
    geometry: Geometry
    macs: int
    parameters: int
    saving: int = 0


def _join(items: list[_Item]) -> _Item | None:
    """Returns the items as one convolution, or None when that costs more multiply-accumulates or more weights."""
    geometry = merged_geometry([item.geometry for item in items])
    macs, parameters = sum(item.macs for item in items), sum(item.parameters for item in items)
    if geometry.macs > macs or geometry.parameters > parameters:
        return None
    values = [value for item in items for value in item.values]
    return _Item(values, geometry, geometry.macs, geometry.parameters, macs - geometry.macs)


def _is_gain(branches: list[tuple[LinearForm, int]]) -> bool:
    return sum(times for _, times in branches) > 1 and any(form.conv is not None for form, _ in branches)


def _weights(branches: list[tuple[LinearForm, int]], root: ir.Node, context: Context) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns weight and bias of the merged convolution in the dtype of the source, or None when they are not finite in it."""
    geometry = merged_geometry([form.geometry for form, _ in branches])
    dtype = branches[0][0].source.dtype
    assert dtype is not None
    with np.errstate(over="ignore", invalid="ignore"):
        weight, bias = (array.astype(dtype.numpy()) for array in merged_weights(branches, geometry))
    if np.isfinite(weight).all() and np.isfinite(bias).all():
        return weight, bias
    context.refuse(root.name or root.op_type, f"the merged weights would not be finite in {dtype.numpy().name}")
    return None


def _rebuild(
    tree: _Sum,
    addends: Counter[ir.Value],
    forms: dict[ir.Value, LinearForm],
    merged: list[tuple[list[ir.Value], tuple[np.ndarray, np.ndarray]]],
    editor: GraphEditor,
) -> None:
    """Replaces the tree by a sum of the merged convolutions and the addends that stay."""
    gone = {value for cluster, _ in merged for value in cluster}
    terms: list[ir.Value] = []
    for cluster, (weight, bias) in merged:
        conv = _new_conv([forms[value] for value in cluster], weight, bias, tree.root, editor)
        editor.graph.insert_before(tree.root, conv)
        terms.append(conv.outputs[0])
    terms += itertools.chain.from_iterable([value] * times for value, times in addends.items() if value not in gone)
    total = terms[0]
    for term in terms[1:]:
        add = ir.node("Add", [total, term], name=editor.unique_name(f"{tree.root.name}.merged"))
        add.metadata_props.update(tree.root.metadata_props)
        total = _like(add, tree.root.outputs[0], editor)
        editor.graph.insert_before(tree.root, add)
    editor.replace_value(tree.root.outputs[0], total)
    editor.remove([*tree.inner, *_unique(node for value in gone for node in forms[value].nodes)])


def _new_conv(forms: list[LinearForm], weight: np.ndarray, bias: np.ndarray, root: ir.Node, editor: GraphEditor) -> ir.Node:
    """Makes the Conv of the added forms, named after the PyTorch module that holds all branches."""
    geometry = merged_geometry([form.geometry for form in forms])
    source = forms[0].source
    in_shape = static_shape(source)
    assert in_shape is not None
    module = common_module([root, *(node for form in forms for node in form.nodes)])
    prefix = module or root.name or "merged"
    made_from = [value for form in forms for node in form.nodes for value in node.inputs]
    inputs = [source, editor.add_initializer(f"{prefix}.weight", weight, made_from=made_from)]
    if geometry.has_bias:
        inputs.append(editor.add_initializer(f"{prefix}.bias", bias, made_from=made_from))
    attributes = {
        "kernel_shape": [tap.count for tap in geometry.taps],
        "pads": geometry.pads(in_shape[2:]),
        "strides": list(geometry.stride),
        "dilations": [tap.step for tap in geometry.taps],
        "group": geometry.groups,
    }
    conv = ir.node("Conv", inputs, attributes, name=editor.unique_name(f"{prefix}/Conv"))
    conv.metadata_props.update(root.metadata_props)
    if module:
        conv.metadata_props[MODULE_KEY] = module
    _like(conv, root.outputs[0], editor)
    return conv


def _like(node: ir.Node, value: ir.Value, editor: GraphEditor) -> ir.Value:
    """Names the output of `node` after it and gives it the type and shape of `value`."""
    output = node.outputs[0]
    output.name = editor.unique_name(f"{node.name}:0")
    output.shape = value.shape.copy() if value.shape is not None else None
    output.type = ir.TensorType(value.dtype) if value.dtype is not None else None
    return output


def _unique(nodes: Iterable[ir.Node]) -> list[ir.Node]:
    return list(dict.fromkeys(nodes))
