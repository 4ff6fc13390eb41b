"""What one convolution costs against the nodes that it replaces, and how it is put into the graph."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, common_module
from edgekit.graph.cost import MODULE_KEY
from edgekit.passes.reparameterize.composition import Weights, without_zeros
from edgekit.passes.reparameterize.geometry import Geometry


def freed_bytes(nodes: Collection[ir.Node]) -> int:
    """Returns the bytes of the initializers that disappear together with `nodes`: nothing else reads them."""
    gone = set(nodes)
    values = {value for node in gone for value in node.inputs if value is not None and value.is_initializer()}
    return sum(
        value.const_value.nbytes
        for value in values
        if value.const_value is not None
        and not value.is_graph_input()
        and not value.is_graph_output()
        and all(use.node in gone for use in value.uses())
    )


def why_not_replaced(geometry: Geometry, macs: int, nodes: Collection[ir.Node], dtype: ir.DataType) -> str | None:
    """Returns why no convolution of `geometry` replaces `nodes`, which take `macs` multiply-accumulates; None when one does and is cheaper.

    The weight is compared with all constants of the nodes; a bias, which is small beside an activation, is not.
    """
    if geometry.is_cropped:
        return "one convolution would need negative pads"
    if geometry.macs > macs:
        return f"one {geometry.kernel} convolution would cost more: {geometry.macs} multiply-accumulates instead of {macs}"
    needed, freed = math.ceil(math.prod(geometry.weight_shape) * dtype.itemsize), freed_bytes(nodes)
    if needed > freed:
        return f"one {geometry.kernel} convolution would cost more: its weight takes {needed} bytes, and {freed} that nothing else reads go"
    return None


def narrowed(weights: Weights, dtype: ir.DataType) -> Weights | None:
    """Returns the arrays in `dtype`, None when a number is not finite there."""
    with np.errstate(over="ignore", invalid="ignore"):
        weight, bias = (array.astype(dtype.numpy()) for array in weights)
    return (weight, bias) if np.isfinite(weight).all() and np.isfinite(bias).all() else None


def insert_convolution(
    source: ir.Value, geometry: Geometry, weights: Weights, nodes: Iterable[ir.Node], root: ir.Node, editor: GraphEditor
) -> ir.Value:
    """Inserts a Conv of `geometry` before `root` and returns its output, which has the type and shape of that of `root`.

    It is named after the PyTorch module that holds `nodes`, the ones that it replaces, and `root`. Zeros of `weights` are left out.
    """
    nodes = list(nodes)
    geometry, (weight, bias) = without_zeros(geometry, weights)
    module = common_module([root, *nodes])
    prefix = module or root.name or "merged"
    made_from = [value for node in nodes for value in node.inputs]
    inputs = [source, editor.add_initializer(f"{prefix}.weight", np.ascontiguousarray(weight), made_from=made_from)]
    if geometry.has_bias:
        inputs.append(editor.add_initializer(f"{prefix}.bias", bias, made_from=made_from))
    attributes = {
        "kernel_shape": [tap.count for tap in geometry.taps],
        "pads": geometry.pads(),
        "strides": list(geometry.stride),
        "dilations": [tap.step for tap in geometry.taps],
        "group": geometry.groups,
    }
    conv = ir.node("Conv", inputs, attributes, name=editor.unique_name(f"{prefix}/Conv"))
    return insert_like(conv, root, editor, module)


def insert_like(node: ir.Node, root: ir.Node, editor: GraphEditor, module: str = "") -> ir.Value:
    """Inserts `node` before `root`, with the metadata of `root`, and returns its output, of the type and shape of that of `root`."""
    node.metadata_props.update(root.metadata_props)
    if module:
        node.metadata_props[MODULE_KEY] = module
    output, like = node.outputs[0], root.outputs[0]
    output.name = editor.unique_name(f"{node.name}:0")
    output.shape = like.shape.copy() if like.shape is not None else None
    output.type = ir.TensorType(like.dtype) if like.dtype is not None else None
    editor.graph.insert_before(root, node)
    return output
