"""The pass `commute-linear`: products over channels are done where the map is smallest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.places import AVERAGES, Keep, PlaceMap, Product, map_of, products_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class CommuteLinear(Pass):
    """Do a 1x1 convolution or matrix product where the map is smallest: before it is enlarged, after it is averaged.

    Before:  x ─ Resize(2x) ─ Conv 1x1 ─► y          h ─ MatMul(W) ─ Add(b) ─ Add(x) ─ ReduceMean(tokens) ─► y
    After:   x ─ Conv 1x1 ─ Resize(2x) ─► y          h ─ ReduceMean ─ MatMul(W) ─ Add(b) ─ Add ─► y,   x ─ ReduceMean ─┘

    A 1x1 convolution, or a MatMul, mixes channels and treats all places alike; interpolation and averaging mix places and treat all
    channels alike. Products: Conv 1x1 (any groups), MatMul by a matrix from the right, and from the left (mask embeddings times pixel
    features). Maps over places: Resize, AveragePool, GlobalAveragePool, ReduceMean, and Reshape, Transpose, Unsqueeze, Squeeze, Expand
    and Tile beside the channels (nearest upsampling). Before an average the product may be one addend of a residual sum: the other
    addends are averaged on their own. It is done when

    1. multiply-accumulates fall: the product is computed at fewer places;
    2. the map leaves channels (and what stands before them) alone: a Resize whose scale is 1 there and that does not keep aspect ratio;
    3. it is linear with weights that no implementation disputes: Resize without antialias, without `exclude_outside` in cubic mode and
       without `tf_crop_and_resize`, which fills places outside with a number;
    4. its weights sum to one at every place, or the product has no bias: an AveragePool that counts its padding, or in ceil mode, has not;
    5. nothing else reads what is between the two.

    Source: the weights of interpolation sum to one (Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing");
    Cavagnero et al. 2024, "PEM: Prototype-based Efficient MaskFormer", multiplies masks at full size that are then resized.
    """

    name: ClassVar[str] = "commute-linear"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> int:
        """Moves every product that can be computed at fewer places; returns how many maps or products were moved."""
        total, refusals = 0, dict[str, str]()
        while found := _round(model, context, refusals):  # every rewriting lowers the number of products, so it ends
            total += found
            refusals.clear()
        for where, why in refusals.items():
            context.refuse(where, why)
        return total


def _round(model: ir.Model, context: Context, refusals: dict[str, str]) -> int:
    editor: GraphEditor | None = None
    count = 0
    for node in list(model.graph):
        where = node.name or node.op_type
        if node.graph is None or context.skips(where):  # an earlier rewriting removed it, or somebody asked for it
            continue
        plan = _product_after_map(node) or _average_after_product(node)
        if isinstance(plan, str):
            refusals[where] = plan
        elif plan is not None:
            editor = editor or GraphEditor(model)
            plan(editor)
            context.applied(where)
            count += 1
    return count


_Rewrite = Callable[[GraphEditor], None]


def _product_after_map(node: ir.Node) -> _Rewrite | str | None:
    """Plans to compute a product before the maps that enlarge what it reads; a string is the condition that failed."""
    for product in products_of(node):
        chain, source = _maps_before(product)
        if isinstance(chain, str):
            return chain
        if chain:
            return _why_not(chain, [product]) or partial(_move_before, product, chain, source)
    return None


def _maps_before(product: Product) -> tuple[list[PlaceMap] | str, ir.Value]:
    """Returns the maps, in order, between what a product reads and the value before it that has the fewest places."""
    keep, current = product.keep, product.x
    found: list[PlaceMap] = []
    best, source = 0, current
    while (step := map_of(current.producer(), keep)) is not None:
        inner = step.node.inputs[0]
        assert inner is not None
        is_smaller = _places(inner, keep) < _places(source, keep)
        if not is_used_once(current):
            return (
                f"what it reads of {step.node.op_type} '{step.node.name}' is read elsewhere"
                if is_smaller and not best
                else found[:best][::-1]
            ), source
        found.append(step)
        current = inner
        if is_smaller:
            best, source = len(found), current
    return found[:best][::-1], source


def _average_after_product(node: ir.Node) -> _Rewrite | str | None:
    """Plans to average before the products whose sum `node` averages; a string is the condition that failed."""
    if node.op_type not in AVERAGES:
        return None
    for keep in (Keep(0), Keep(2), Keep(3)):
        last = map_of(node, keep)
        if last is None or last.node.inputs[0] is None:
            continue
        chain, value = [last], last.node.inputs[0]
        while is_used_once(value) and (step := map_of(value.producer(), keep)) is not None and step.node.inputs[0] is not None:
            chain.insert(0, step)
            value = step.node.inputs[0]
        if _places(node.outputs[0], keep) >= _places(value, keep):
            continue
        if not is_used_once(value):
            if any(found.keep == keep for found in _made_by_product(value)):
                return f"the product that it averages, '{value.name}', is read elsewhere"
            continue
        total = _total(value, keep)
        if total.products:
            return _why_not(chain, total.products) or partial(_average_first, chain, value, total, keep)
    return None


@dataclass(frozen=True)
class _Total:
    """A value as a sum.

    Attributes:
        products: The addends that are products.
        others: The other addends, as inputs of its Add nodes.
        adds: Its Add nodes, consumers before producers.
    """

    products: list[Product]
    others: list[tuple[ir.Node, int]]
    adds: list[ir.Node]


def _made_by_product(value: ir.Value) -> list[Product]:
    """The ways in which `value` is a product with its bias."""
    node = value.producer()
    if node is None or node.domain != "":
        return []
    makers = [node] if node.op_type != "Add" else [maker for x in node.inputs if x is not None and (maker := x.producer()) is not None]
    return [product for maker in makers for product in products_of(maker) if product.result is value]


def _total(value: ir.Value, keep: Keep) -> _Total:
    """Reads `value`, which one node reads, as a sum of values of its shape, as far as nothing else reads what is between."""
    total = _Total([], [], [])
    waiting: list[tuple[ir.Value, tuple[ir.Node, int] | None]] = [(value, None)]
    while waiting:
        current, place = waiting.pop()
        node = current.producer()
        products = [product for product in _made_by_product(current) if product.keep == keep] if is_used_once(current) else []
        if products:
            total.products.append(products[0])
        elif is_used_once(current) and node is not None and _is_plain_sum(node):
            total.adds.append(node)
            waiting += [(x, (node, index)) for index, x in enumerate(node.inputs) if x is not None]
        elif place is not None:
            total.others.append(place)
    return total


def _is_plain_sum(node: ir.Node) -> bool:
    """An Add of two computed values of one shape."""
    if node.op_type != "Add" or node.domain != "" or any(constant_array(value) is not None for value in node.inputs):
        return False
    shape = static_shape(node.outputs[0])
    return shape is not None and all(static_shape(value) == shape for value in node.inputs)


def _why_not(chain: Sequence[PlaceMap], products: Sequence[Product]) -> str | None:
    for step in chain:
        name = f"{step.node.op_type} '{step.node.name}'"
        if step.obstacle:
            return f"{name} does not commute with {products[0].node.op_type} '{products[0].node.name}': {step.obstacle}"
        for product in products:
            if not step.sums_to_one and product.has_bias:
                return f"the weights of {name} do not sum to one everywhere, and {product.node.op_type} '{product.node.name}' has a bias"
    return None


def _move_before(product: Product, chain: Sequence[PlaceMap], source: ir.Value, editor: GraphEditor) -> None:
    old, keep = product.result, product.keep
    copies = _copy(chain, source, keep, keep.kept(_shape(old)), editor)
    editor.graph.insert_after(product.add or product.node, copies)
    editor.replace_value(old, copies[-1].outputs[0])
    copies[0].replace_input_with(0, _reread(product, source, editor))
    _remove(chain, copies, editor)


def _average_first(chain: Sequence[PlaceMap], value: ir.Value, total: _Total, keep: Keep, editor: GraphEditor) -> None:
    first: list[ir.Node] = []
    for product in total.products:
        copies = _copy(chain, product.x, keep, keep.kept(_shape(product.x)), editor)
        editor.graph.insert_before(product.node, copies)
        readers = [use for use in product.result.uses() if use.node is not chain[0].node]
        result = _reread(product, copies[-1].outputs[0], editor)
        for use in readers:
            use.node.replace_input_with(use.idx, result)
        value = result if product.result is value else value
        first = first or copies
    for add, index in total.others:
        addend = add.inputs[index]
        assert addend is not None
        copies = _copy(chain, addend, keep, keep.kept(_shape(addend)), editor)
        editor.graph.insert_before(add, copies)
        add.replace_input_with(index, copies[-1].outputs[0])
    averaged = chain[-1].node.outputs[0]
    for add in total.adds:
        add.outputs[0].shape = ir.Shape(_shape(averaged))
    editor.replace_value(averaged, value)
    _remove(chain, first, editor)


def _copy(chain: Sequence[PlaceMap], source: ir.Value, keep: Keep, kept: Shape, editor: GraphEditor) -> list[ir.Node]:
    """Makes the maps of `chain` anew so that they read `source` and have `kept` on the axes that they leave alone."""
    copies: list[ir.Node] = []
    for step in chain:
        old, shape = step.node, keep.swap(_shape(step.node.outputs[0]), kept)
        inputs = [copies[-1].outputs[0] if copies else source, *old.inputs[1:]]
        name = editor.unique_name(old.name or old.op_type)
        node = ir.Node("", old.op_type, inputs, list(old.attributes.values()), name=name)
        node.metadata_props.update(old.metadata_props)
        _declare(node, shape, source.dtype, editor)
        if keep.kept(_shape(old.outputs[0])) != kept:
            _set_size(node, old, shape, editor)
        copies.append(node)
    return copies


def _set_size(node: ir.Node, old: ir.Node, shape: Shape, editor: GraphEditor) -> None:
    """Gives a copied Reshape, Expand or Resize the size of its result, where its input names it."""
    index = {"Reshape": 1, "Expand": 1, "Resize": 3}.get(node.op_type)
    sizes = constant_array(old.inputs[index]) if index is not None and index < len(old.inputs) else None
    if index is None or sizes is None:
        return
    axes = node.attributes.get_ints("axes", range(len(shape))) if node.op_type == "Resize" else range(len(shape))
    node.replace_input_with(index, editor.add_initializer(f"{node.name}.shape", np.array([shape[axis] for axis in axes], np.int64)))
    node.attributes.pop("allowzero", None)


def _reread(product: Product, x: ir.Value, editor: GraphEditor) -> ir.Value:
    """Lets a product read `x`, which has other places; returns the result, with the places of `x` as they are."""
    node, keep, graph = product.node, product.keep, editor.graph
    kept = keep.kept(_shape(product.result))
    shape = keep.swap(_shape(x), kept)
    flat_shape = product.readable(_shape(x))
    if flat_shape != _shape(x):
        flat = _reshaped(x, flat_shape, node, editor)
        graph.insert_before(node, flat)
        x = flat.outputs[0]
    node.replace_input_with(product.index, x)
    node.outputs[0].shape = ir.Shape(keep.swap(flat_shape, kept))
    if product.add is not None:
        product.add.outputs[0].shape = node.outputs[0].shape.copy()
        bias = 1 if product.add.inputs[0] is node.outputs[0] else 0
        array = constant_array(product.add.inputs[bias])
        if array is not None and array.ndim > 1:  # it may have more axes than the averaged product
            editor.set_constant(product.add, bias, array.reshape(-1))
    if _shape(product.result) == shape:
        return product.result
    spread = _reshaped(product.result, shape, node, editor)
    graph.insert_after(product.add or node, spread)
    return spread.outputs[0]


def _reshaped(x: ir.Value, shape: Shape, like: ir.Node, editor: GraphEditor) -> ir.Node:
    name = editor.unique_name(f"{like.name}/Reshape")
    node = ir.node("Reshape", [x, editor.add_initializer(f"{name}.shape", np.array(shape, np.int64))], name=name)
    node.metadata_props.update(like.metadata_props)
    _declare(node, shape, x.dtype, editor)
    return node


def _declare(node: ir.Node, shape: Shape, dtype: ir.DataType | None, editor: GraphEditor) -> None:
    output = node.outputs[0]
    output.name, output.shape = editor.unique_name(f"{node.name}:0"), ir.Shape(shape)
    output.type = None if dtype is None else ir.TensorType(dtype)


def _remove(chain: Sequence[PlaceMap], heirs: Sequence[ir.Node], editor: GraphEditor) -> None:
    """Removes the maps; their first copies take over their names."""
    names = [step.node.name for step in chain]
    editor.remove([step.node for step in chain])
    for heir, name in zip(heirs, names, strict=True):
        heir.name = name


def _shape(value: ir.Value | None) -> Shape:
    shape = static_shape(value)
    assert shape is not None
    return shape


def _places(value: ir.Value, keep: Keep) -> int:
    return keep.places(_shape(value))
