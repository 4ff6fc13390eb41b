"""Brings models of any ONNX opset to the one that passes and targets are written for.

Two converters share the way: ONNX's own (C++) up to opset 18, onnxscript's from there. Both can skip an operator without a word, so the
result is held against the operator schemas of the new opset before it is believed, and known losses are repaired (`opset_repairs`).
"""

from __future__ import annotations

import re

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.version_converter import convert_version

from edgekit.errors import EdgekitError, SourceError, UnsupportedOpError
from edgekit.graph import opset_repairs
from edgekit.graph.check import check_node, describe_node
from edgekit.graph.names import unique_names
from edgekit.graph.shapes import infer_shapes, static_shape, without_weights

OPSET = 23
_FIRST_OPSET_OF_ONNXSCRIPT = 18
_IR_VERSION = 11
"""The first IR version of opset 23."""
_IR_VERSION_FOR_CONVERTER = 8
"""From IR version 4 on an initializer need not be a graph input too; 8 is the one of opset 18."""


def to_opset(model: ir.Model, version: int = OPSET) -> ir.Model:
    """Converts `model` in place to ONNX opset `version` and returns it; a model of a higher opset stays as it is.

    Initializers that are graph inputs too (as IR version 3 demanded) stop being inputs. Functions are inlined when a conversion is needed.
    Expects a model that `check_model` accepted: the C++ converter assumes a well-formed graph.

    Args:
        model: The model.
        version: The opset of domain `ai.onnx` to reach.

    Raises:
        SourceError: The model is newer than the installed onnx.
        UnsupportedOpError: An operator cannot be converted; the message names it and the opset.
    """
    try:
        return _to_opset(model, version)
    except EdgekitError:
        raise
    except Exception as error:
        raise SourceError(
            f"the model cannot be converted to opset {version}: {type(error).__name__}: {error}",
            where=f"graph '{model.graph.name}'",
            fix=_fix(version),
        ) from error


def _to_opset(model: ir.Model, version: int) -> ir.Model:
    common.RemoveInitializersFromInputsPass()(model)
    unique_names(model)  # from here on values are known by name
    if "ai.onnx" in model.opset_imports:
        model.opset_imports.setdefault("", model.opset_imports.pop("ai.onnx"))
    current = model.opset_imports.setdefault("", version)
    newest = onnx.defs.onnx_opset_version()
    if current > newest:
        raise SourceError(
            f"the model is of opset {current}; the installed onnx {onnx.__version__} knows opsets up to {newest}",
            where=f"graph '{model.graph.name}'",
            fix="pip install -U onnx onnxruntime, or export at a lower opset",
        )
    if current < version:
        _inline_functions(model)
        infer_shapes(model)  # several conversions depend on ranks
        if current < _FIRST_OPSET_OF_ONNXSCRIPT:
            opset_repairs.prepare(model, current)
            _convert_with_onnx(model, current, min(version, _FIRST_OPSET_OF_ONNXSCRIPT))
            opset_repairs.finish(model, current)
        if version > _FIRST_OPSET_OF_ONNXSCRIPT:
            try:
                convert_version(model, version)
            except Exception as error:
                raise _refusal(model, current, version, error) from error
        _verify(model, current, version)
    model.ir_version = max(model.ir_version, _IR_VERSION)
    return model


def _inline_functions(model: ir.Model) -> None:
    if not model.functions:
        return
    try:
        common.InlinePass()(model)
    except Exception as error:
        raise SourceError(f"the functions of the model cannot be inlined: {error.__cause__ or error}", where=f"graph '{model.graph.name}'",
                          fix="export the model again with functions of the model's own opset") from error  # fmt: skip


def _convert_with_onnx(model: ir.Model, current: int, version: int) -> None:
    metadata = {node.name: dict(node.metadata_props) for node in model.graph if node.name and node.metadata_props}
    model.ir_version = _IR_VERSION_FOR_CONVERTER
    with without_weights(model) as weights:
        proto = ir.to_proto(model)
        try:
            converted = ir.from_proto(onnx.version_converter.convert_version(proto, version))
        except Exception as error:
            raise _refusal(model, current, version, error, _culprit(proto, version)) from error
        _restore_weights(converted, weights)
    if [value.name for value in converted.graph.inputs] != [value.name for value in model.graph.inputs]:
        raise SourceError("the version converter changed the inputs of the graph", where=f"graph '{model.graph.name}'", fix=_fix(version))
    for node in converted.graph:
        node.metadata_props.update(metadata.get(node.name or "", {}))
    model.graph = converted.graph


def _restore_weights(model: ir.Model, weights: dict[str, ir.TensorProtocol]) -> None:
    """Puts the real tensors back where `without_weights` had left placeholders."""
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor) and value.const_value.location in weights:
                value.const_value = weights[str(value.const_value.location)]
        for node in graph:
            for attr in list(node.attributes.values()):
                if attr.type == ir.AttributeType.TENSOR and isinstance(attr.value, ir.ExternalTensor) and attr.value.location in weights:
                    node.attributes[attr.name] = ir.AttrTensor(attr.name, weights[str(attr.value.location)])


def _verify(model: ir.Model, current: int, version: int) -> None:
    """Holds every node against the schemas of the new opset: what a converter skipped has inputs or attributes of the old one."""
    if model.opset_imports.get("") != version:
        raise SourceError(
            f"the model stayed at opset {model.opset_imports.get('')}", where=f"graph '{model.graph.name}'", fix=_fix(version)
        )
    for node in model.graph.all_nodes():
        try:
            check_node(node, model.opset_imports, set(), f"opset {current} → {version}")
        except EdgekitError as error:
            raise UnsupportedOpError(
                f"operator '{node.op_type}' of opset {current} cannot be converted to opset {version}: {error.what}",
                where=describe_node(node),
                fix=_fix(version),
            ) from error
        if node.op_type == "GroupNormalization" and node.domain == "" and current < 21:
            _verify_group_normalization(node, current, version)


def _verify_group_normalization(node: ir.Node, current: int, version: int) -> None:
    """Opset 21 moved scale and bias from one per group to one per channel; the converter leaves them where it does not know the sizes."""
    data, scale = static_shape(node.inputs[0]), static_shape(node.inputs[1])
    if (
        scale is None
        and node.inputs[1] is not None
        and (producer := node.inputs[1].producer()) is not None
        and producer.op_type == "Reshape"
    ):
        return  # the converter's own expansion
    if data is None or scale is None or data[1] != scale[0]:
        raise UnsupportedOpError(
            f"operator 'GroupNormalization' of opset {current} needs its number of channels known to reach opset {version}",
            where=describe_node(node),
            fix="give the model static input shapes, or export it at opset 21 or newer",
        )


def _culprit(proto: onnx.ModelProto, version: int) -> int | None:
    """Returns the index of the first node that fails to convert when it stands alone in a graph."""
    types = {info.name: info for info in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output)}
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    for index, node in enumerate(proto.graph.node):
        alone = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import)
        alone.graph.name = "alone"
        alone.graph.node.append(node)
        alone.graph.initializer.extend(tensors[name] for name in dict.fromkeys(node.input) if name in tensors)
        alone.graph.input.extend(types[name] for name in dict.fromkeys(node.input) if name in types and name not in tensors)
        alone.graph.output.extend(types.get(name, onnx.ValueInfoProto(name=name)) for name in node.output if name)
        try:
            onnx.version_converter.convert_version(alone, version)
        except Exception:  # ConvertError and RuntimeError alike mean that this is the node
            return index
    return None


def _refusal(model: ir.Model, current: int, version: int, error: Exception, culprit: int | None = None) -> UnsupportedOpError:
    """Builds the error for a failed conversion; without `culprit`, the operator is one that the converter's message names."""
    words = set(re.findall(r"\w+", str(error)))
    named = [node for node in model.graph.all_nodes() if node.op_type in words]
    node = model.graph[culprit] if culprit is not None else named[0] if named else None
    what = f"operator '{node.op_type}'" if node is not None else "the model"
    reason = re.sub(r"^.*Assertion `.*` failed: ", "", str(error)).strip()
    return UnsupportedOpError(
        f"{what} of opset {current} cannot be converted: {reason}",
        where=describe_node(node) if node is not None else f"graph '{model.graph.name}'",
        fix=_fix(version),
    )


def _fix(version: int) -> str:
    return f"export the model again at opset {max(version, _FIRST_OPSET_OF_ONNXSCRIPT)}"
