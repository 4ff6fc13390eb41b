"""Brings every graph to one form, so that passes and targets meet each idea in a single shape.

The form: functions of foreign domains are inlined, constants are initializers, what depends on constants alone is computed, operators that
an exporter wrote in parts are whole again (`fusions/`), nothing is unused, nodes stand in topological order, and every node and value has
a name of its own. Whole operators are not combined with one another: folding of batch norm into convolutions and the like is the work
of passes, where it is checked and counted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from edgekit.errors import EdgekitError, SourceError
from edgekit.graph.check import subgraphs
from edgekit.graph.fold import FILLED, Budget, fold_constants
from edgekit.graph.fusions.activation import fuse_activations
from edgekit.graph.fusions.attention import fuse_attention
from edgekit.graph.fusions.layout import merge_layout
from edgekit.graph.fusions.linear import unify_linear
from edgekit.graph.fusions.normalization import fuse_normalizations
from edgekit.graph.fusions.sequences import split_sequences
from edgekit.graph.names import unique_names
from edgekit.graph.shapes import infer_shapes, static_shape

OWN_DOMAIN = "edgekit"
"""Functions of this domain stay whole: targets may know them."""

_MAX_ROUNDS = 6
_SMALL_ELEMENTS = 64


def canonicalize(model: ir.Model) -> ir.Model:
    """Brings `model` to the canonical form, in place, and returns it.

    Names, dtypes and order of graph inputs and outputs stay, and so does `metadata_props` of nodes.

    Raises:
        SourceError: The functions of the model cannot be inlined, or the graph has a cycle.
    """
    try:
        for step in STEPS:
            step(model)
    except EdgekitError:
        raise
    except Exception as error:
        raise SourceError(
            f"the graph cannot be simplified: {type(error).__name__}: {error}",
            where=f"graph '{model.graph.name}'",
            fix="check the file with `python -m onnx.checker FILE`, or export the model again",
        ) from error
    return model


def inline_functions(model: ir.Model) -> None:
    """Replaces calls of functions by their bodies, except those of domain `edgekit`."""
    if not any(function.domain != OWN_DOMAIN for function in model.functions.values()):
        return
    try:
        common.InlinePass(lambda function: function.domain != OWN_DOMAIN)(model)
    except Exception as error:
        raise SourceError(
            f"the functions of the model cannot be inlined: {error.__cause__ or error}",
            where=f"graph '{model.graph.name}'",
            fix="export the model again with functions of the model's own opset",
        ) from error


def lift_constants(model: ir.Model) -> None:
    """Turns Constant nodes into initializers, in subgraphs too; one that is a graph output stays."""
    for node in list(model.graph.all_nodes()):
        if node.op_type != "Constant" or node.domain != "" or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        tensor = _constant_tensor(node)
        output, graph = node.outputs[0], node.graph
        if tensor is None or graph is None or not output.name or output.name in graph.initializers:
            continue
        shape = ir.Shape(tensor.shape.numpy())
        initializer = ir.Value(name=output.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        output.replace_all_uses_with(initializer)
        graph.remove(node, safe=True)
        graph.register_initializer(initializer)


def _constant_tensor(node: ir.Node) -> ir.TensorProtocol | None:
    if len(node.attributes) != 1:
        return None
    (attr,) = node.attributes.values()
    if attr.is_ref() or attr.value is None:
        return None
    name = node.outputs[0].name
    if attr.name == "value" and attr.type == ir.AttributeType.TENSOR:
        return attr.as_tensor()
    if attr.name in ("value_int", "value_ints"):
        return ir.Tensor(np.array(attr.value, dtype=np.int64), name=name)
    if attr.name in ("value_float", "value_floats"):
        return ir.Tensor(np.array(attr.value, dtype=np.float32), name=name)
    return None


def simplify(model: ir.Model) -> None:
    """Folds constants, chooses the branch of an If that a constant decides and drops identities, until nothing changes.

    Shapes are inferred again only while a Shape or an If waits for them.
    """
    budget = Budget()
    for _ in range(_MAX_ROUNDS):
        changed = fold_constants(model, budget)
        changed |= choose_branches(model)
        changed |= remove_identities(model)
        if any(node.op_type in ("Shape", "Size", "CastLike", "If") and node.domain == "" for node in model.graph):
            known = _known_shapes(model)
            infer_shapes(model)
            changed |= _known_shapes(model) > known
        if not changed:
            return
        lift_constants(model)  # from branches that were chosen


def _known_shapes(model: ir.Model) -> int:
    return sum(static_shape(output) is not None for node in model.graph for output in node.outputs)


def choose_branches(model: ir.Model) -> bool:
    """Replaces every If of the main graph whose condition is constant by the branch taken; True when there was one."""
    changed = False
    for node in list(model.graph):
        if node.op_type != "If" or node.domain != "" or not node.inputs or node.inputs[0] is None:
            continue
        condition = node.inputs[0].const_value
        if condition is None or node.inputs[0].is_graph_input() or condition.size != 1:
            continue
        branch = node.attributes.get("then_branch" if bool(condition.numpy().item()) else "else_branch")
        if branch is None or branch.type != ir.AttributeType.GRAPH or len(branch.as_graph().outputs) != len(node.outputs):
            continue
        _splice(model.graph, node, branch.as_graph())
        changed = True
    if changed:
        unique_names(model)
    return changed


def _splice(graph: ir.Graph, node: ir.Node, branch: ir.Graph) -> None:
    """Moves the nodes and initializers of `branch` before `node`, which they replace."""
    results = list(branch.outputs)
    branch.outputs.clear()
    nodes = list(branch)
    branch.remove(nodes)
    taken = {value.name for value in (*graph.inputs, *graph.initializers.values())}
    for initializer in list(branch.initializers.values()):
        assert initializer.name is not None
        del branch.initializers[initializer.name]
        base, number = f"{node.name or 'If'}.{initializer.name}", 0
        while (name := base if number == 0 else f"{base}_{number}") in taken:
            number += 1
        initializer.name = name
        taken.add(name)
        graph.register_initializer(initializer)
    graph.insert_before(node, nodes)
    for output, result in zip(node.outputs, results, strict=True):
        if output.is_graph_output():  # keeps its name through an Identity, which `remove_identities` may drop
            identity = ir.node("Identity", [result])
            identity.outputs[0].name, identity.outputs[0].type, identity.outputs[0].shape = output.name, output.type, output.shape
            graph.insert_before(node, identity)
            ir.convenience.replace_all_uses_with(output, identity.outputs[0], replace_graph_outputs=True)
        else:
            output.replace_all_uses_with(result)
    graph.remove(node, safe=True)


def remove_identities(model: ir.Model) -> bool:
    """Removes Identity and Dropout (in inference) nodes; True when there was one.

    Identity of a graph input, an initializer or another graph's value stays when its result is a graph output, whose name must stay.
    """
    changed = False
    for node in list(model.graph.all_nodes()):
        if not _is_identity(node):
            continue
        source, result, graph = node.inputs[0], node.outputs[0], node.graph
        if source is None or graph is None:
            continue
        if result.is_graph_output():
            producer = source.producer()
            if producer is None or producer.graph is not graph or source.is_graph_output():
                continue
            name = result.name
            _keep_knowledge(source, result)
            ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            source.name = name
        else:
            _keep_knowledge(source, result)
            result.replace_all_uses_with(source)
            graph.remove(node, safe=True)
        changed = True
    return changed


def _is_identity(node: ir.Node) -> bool:
    if node.domain != "" or not node.inputs or node.inputs[0] is None or not node.outputs:
        return False
    if node.op_type == "Identity":
        return len(node.inputs) == 1 and len(node.outputs) == 1
    if node.op_type != "Dropout" or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return True
    return training.const_value is not None and not training.is_graph_input() and not training.const_value.numpy().any()


def _keep_knowledge(source: ir.Value, result: ir.Value) -> None:
    if source.type is None:
        source.type = result.type
    if static_shape(source) is None and static_shape(result) is not None:
        source.shape = result.shape


def drop_absent_biases(model: ir.Model) -> None:
    """Removes the bias of zeros that the exporter writes (as an Expand of 0) for a convolution without bias; trained biases stay."""
    for node in model.graph.all_nodes():
        if node.op_type not in ("Conv", "ConvTranspose") or node.domain != "" or len(node.inputs) < 3:
            continue
        bias = node.inputs[2]
        if bias is not None and FILLED in bias.meta and bias.const_value is not None and not bias.const_value.numpy().any():
            node.resize_inputs(2)


def remove_unused(model: ir.Model) -> None:
    """Removes nodes, initializers, functions and opset imports that no graph output depends on."""
    common.RemoveUnusedNodesPass()(model)
    for node in model.graph.all_nodes():
        for body in subgraphs(node):
            for name, value in list(body.initializers.items()):
                if not value.uses() and not value.is_graph_output() and not value.is_graph_input():
                    del body.initializers[name]
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.RemoveUnusedOpsetsPass()(model)


def share_small_constants(model: ir.Model) -> None:
    """Merges equal small integer initializers of the main graph (axes, target shapes); passes rewrite weights singly."""
    first: dict[tuple[ir.DataType, tuple[int, ...], bytes], ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.size > _SMALL_ELEMENTS or not (tensor.dtype.is_integer() or tensor.dtype == ir.DataType.BOOL):
            continue
        if value.is_graph_input() or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
        keeper = first.setdefault(key, value)
        if keeper is not value:
            value.replace_all_uses_with(keeper)
            del model.graph.initializers[name]


def sort_nodes(model: ir.Model) -> None:
    """Puts producers before consumers, keeping the order where it is free."""
    position = {node: index for index, node in enumerate(model.graph)}
    for node, index in position.items():
        producers = (value.producer() for value in node.inputs if value is not None)
        if next(subgraphs(node), None) is not None or any(
            position.get(producer, -1) > index for producer in producers if producer is not None
        ):
            break
    else:
        return
    try:
        model.graph.sort()
    except ValueError as error:
        raise SourceError("the graph has a cycle", where=f"graph '{model.graph.name}'", fix="export the model again") from error


STEPS: tuple[Callable[[ir.Model], object], ...] = (
    unique_names,
    inline_functions,
    lift_constants,
    simplify,
    drop_absent_biases,
    infer_shapes,
    split_sequences,
    merge_layout,
    fuse_normalizations,
    fuse_activations,
    fuse_attention,
    unify_linear,
    merge_layout,
    remove_unused,
    share_small_constants,
    sort_nodes,
    unique_names,
)
"""The steps of `canonicalize`, in order; each works on the whole model in place."""
