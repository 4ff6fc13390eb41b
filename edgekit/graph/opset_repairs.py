"""What ONNX's version converter gets wrong without a word, put right or refused by name.

Found by comparing ONNX Runtime before and after on models of every old form; each function says which change of the standard it covers.
"""

from __future__ import annotations

import math
from typing import NoReturn

import numpy as np
import onnx_ir as ir

from edgekit.errors import UnsupportedOpError
from edgekit.graph.check import describe_node
from edgekit.graph.shapes import static_shape

_REEXPORT = "export the model again at opset 18 or newer"


def prepare(model: ir.Model, opset: int) -> None:
    """Rewrites or refuses, before the conversion from `opset`, the operators whose meaning the converter loses.

    Raises:
        UnsupportedOpError: An operator's old meaning cannot be written in the new opset.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain != "":
            continue
        if opset < 7:
            _align_broadcast(node, opset)
        if opset < 9 and node.op_type == "Scan":
            _refuse(node, opset, "its batch axis was dropped in opset 9")
        if opset < 12 and node.op_type == "Dropout" and any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
            _refuse(node, opset, "the mask that it returns has another meaning since opset 12")
        if opset < 13 and node.op_type == "Hardmax":
            _keep_hardmax_axis(node, opset)
        if opset < 13 and node.op_type == "Resize" and _text(node, "coordinate_transformation_mode") == "tf_half_pixel_for_nn":
            _refuse(node, opset, "coordinate_transformation_mode 'tf_half_pixel_for_nn' was dropped in opset 13")


def finish(model: ir.Model, opset: int) -> None:
    """Completes, after the conversion from `opset`, what the converter left at defaults of another meaning.

    Raises:
        UnsupportedOpError: The completion needs sizes that are not known.
    """
    for node in model.graph.all_nodes():
        if opset < 11 and node.op_type == "Resize" and node.domain == "":
            _keep_resize_mode(node, opset)


def _align_broadcast(node: ir.Node, opset: int) -> None:
    """Before opset 7 the second operand lay at `axis` of the first (PRelu: at the channels); now shapes are aligned at the end."""
    axis_attr = node.attributes.get("axis") if "broadcast" in node.attributes else None
    if axis_attr is None and node.op_type != "PRelu":
        return
    data, small = static_shape(node.inputs[0]), static_shape(node.inputs[1])
    if data is None or small is None:
        _refuse(node, opset, "how it broadcasts depends on ranks that are not known")
    if math.prod(small) == 1:
        node.attributes.pop("axis", None)
        return
    axis = axis_attr.as_int() if axis_attr is not None else 1
    axis += len(data) if axis < 0 else 0
    trailing = len(data) - axis - len(small)
    if trailing < 0 or (trailing == 0 and node.op_type != "PRelu"):
        node.attributes.pop("axis", None)
        return
    operand = node.inputs[1]
    tensor = operand.const_value if operand is not None else None
    if operand is None or tensor is None or len({use.node for use in operand.uses()}) != 1 or operand.is_graph_output():
        _refuse(node, opset, "its second operand is broadcast from the front and is not a constant of its own")
    shape = small + (1,) * trailing
    operand.const_value = ir.Tensor(tensor.numpy().reshape(shape), name=operand.name)
    operand.shape = ir.Shape(shape)
    node.attributes.pop("axis", None)


def _keep_hardmax_axis(node: ir.Node, opset: int) -> None:
    """Before opset 13 Hardmax took all axes from `axis` (default 1) on as one; now `axis` alone (default -1)."""
    shape = static_shape(node.inputs[0])
    axis = node.attributes.get_int("axis", 1)
    if shape is None or math.prod(shape[axis:][1:]) != 1:
        _refuse(node, opset, "it covers several axes at once, which Hardmax cannot since opset 13")
    node.attributes["axis"] = ir.AttrInt64("axis", axis)


def _keep_resize_mode(node: ir.Node, opset: int) -> None:
    """Up to opset 10 Upsample and Resize sampled at `x / scale`; the default of opset 11 is `half_pixel`.

    The nearest neighbour was the lower one when enlarging and the upper one when shrinking (as ONNX Runtime has it).
    """
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    if _text(node, "mode") not in ("", "nearest"):
        return
    scales = _constant(node.inputs[2] if len(node.inputs) > 2 else None)
    if scales is None:
        _refuse(node, opset, "its scales are not constant")
    if (scales < 1).any() and (scales > 1).any():
        _refuse(node, opset, "it enlarges one axis and shrinks another by the nearest neighbour")
    node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if (scales < 1).any() else "floor")


def _constant(value: ir.Value | None) -> np.ndarray | None:
    if value is None:
        return None
    if value.const_value is not None:
        return value.const_value.numpy()
    producer = value.producer()
    attr = producer.attributes.get("value") if producer is not None and producer.op_type == "Constant" else None
    return attr.as_tensor().numpy() if attr is not None else None


def _text(node: ir.Node, name: str) -> str:
    attr = node.attributes.get(name)
    return str(attr.value) if attr is not None else ""


def _refuse(node: ir.Node, opset: int, why: str) -> NoReturn:
    raise UnsupportedOpError(
        f"operator '{node.op_type}' of opset {opset} cannot be converted: {why}", where=describe_node(node), fix=_REEXPORT
    )
