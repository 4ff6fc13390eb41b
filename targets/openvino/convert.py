"""From a legalized ONNX graph to an OpenVINO model that has the same interface: reads, mends and checks the front end's work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgekit.errors import EdgekitError, LoweringError, UnsupportedOpError
from edgekit.graph.shapes import static_shape

if TYPE_CHECKING:
    import openvino as ov

_ELEMENT_TYPES = {
    ir.DataType.FLOAT: "f32", ir.DataType.FLOAT16: "f16", ir.DataType.BFLOAT16: "bf16", ir.DataType.DOUBLE: "f64",
    ir.DataType.BOOL: "boolean",
    ir.DataType.INT8: "i8", ir.DataType.INT16: "i16", ir.DataType.INT32: "i32", ir.DataType.INT64: "i64",
    ir.DataType.UINT8: "u8", ir.DataType.UINT16: "u16", ir.DataType.UINT32: "u32", ir.DataType.UINT64: "u64",
}  # fmt: skip
INTERFACE = ["edgekit", "interface"]
"""Where the model keeps the ONNX names of its inputs and outputs, as JSON."""

_NOISE = re.compile(r"^(Exception from |Check '|FrontEnd API failed|Model wasn't fully converted|Summary:|To facilitate|$)")


def convert(path: Path, model: ir.Model) -> ov.Model:
    """Reads the ONNX file `path`, whose graph is `model`, into an OpenVINO model with the same inputs and outputs by name.

    `Core.read_model` maps external data instead of reading it, and, unlike `openvino.convert_model`, sends no telemetry.

    Raises:
        UnsupportedOpError: OpenVINO has no conversion for an operator, or converts one to another shape or dtype than ONNX defines.
        LoweringError: The front end failed for another reason.
    """
    import openvino as ov

    try:
        converted = ov.Core().read_model(path)
    except Exception as error:  # the binding raises RuntimeError for everything
        raise explain(str(error), model) from error
    _sort_stably(converted)
    _restore_interface(converted, model.graph)
    _compare_values(converted, model)
    return converted


def explain(message: str, model: ir.Model) -> EdgekitError:
    """Makes an error of edgekit from a message of OpenVINO: which operators, in which nodes, and the lines that say why."""
    missing = [name.strip() for line in re.findall(r"No conversion rule found for operations: (.*)", message) for name in line.split(",")]
    failed = [name.strip() for line in re.findall(r"Conversion is failed for: (.*)", message) for name in line.split(",")]
    essence = " ".join(line.strip() for line in message.splitlines() if not _NOISE.match(line.strip()) and not line.startswith("-- "))
    essence = re.sub(r"Exception from \S+:\s*", "", essence).strip()[:400] or message.strip()[:400]
    if not missing and not failed:
        return LoweringError(
            f"OpenVINO cannot read the graph: {essence}", fix="compile for --target onnxruntime to see whether the graph is at fault"
        )
    what = f"OpenVINO does not know: {', '.join(missing)}" if missing else ""
    if failed:
        what += f"{'. ' if what else ''}OpenVINO cannot convert: {', '.join(failed)} ({essence})"
    op_types = {re.sub(r"-\d+$", "", name).rpartition(".")[2] for name in (*missing, *failed)}
    places = [
        f"node '{node.name or node.outputs[0].name}' ({node.op_type})" for node in model.graph.all_nodes() if node.op_type in op_types
    ]
    return UnsupportedOpError(
        what, where="; ".join(places[:5]) or None, fix="express it with other operators, or compile for --target onnxruntime"
    )


def _sort_stably(converted: ov.Model) -> None:
    """Makes every TopK stable: ONNX gives the lower index first among equal values, the front end leaves the order open."""
    from openvino import opset11

    for op in converted.get_ordered_ops():
        if op.get_type_name() != "TopK":
            continue
        old = op.get_attributes()
        if old["sort"] == "none" or old.get("stable", False):
            continue
        stable = opset11.topk(
            op.input_value(0), op.input_value(1), old["axis"], old["mode"], old["sort"], old["index_element_type"], stable=True
        )
        stable.set_friendly_name(op.get_friendly_name())
        for index in range(2):
            names = op.output(index).get_names()
            for consumer in list(op.output(index).get_target_inputs()):
                consumer.replace_source_output(stable.output(index))
            stable.output(index).set_names(names)
    converted.validate_nodes_and_infer_types()


def _restore_interface(converted: ov.Model, graph: ir.Graph) -> None:
    """Gives inputs and outputs the names of the ONNX graph; an input that is passed through to an output would have only one of the two."""
    from openvino import opset16

    parameters, results = converted.get_parameters(), converted.get_results()
    if len(parameters) != len(graph.inputs) or len(results) != len(graph.outputs):
        raise LoweringError(
            f"OpenVINO changed the model's interface: {len(parameters)} inputs and {len(results)} outputs remain",
            where=f"graph '{graph.name}': {len(graph.inputs)} inputs, {len(graph.outputs)} outputs",
            fix="remove inputs and outputs of size 0",
        )
    # A parameter keeps its ONNX name, except one that is passed through; those are taken in order.
    by_name = {parameter.get_friendly_name(): parameter for parameter in parameters}
    known = {value.name for value in graph.inputs} & by_name.keys()
    renamed = iter([parameter for parameter in parameters if parameter.get_friendly_name() not in known])
    ordered = [by_name[value.name] if value.name in known else next(renamed) for value in graph.inputs]
    for result, value in zip(results, graph.outputs, strict=True):
        source = result.input_value(0)
        if source.get_node().get_type_name() == "Parameter":
            copy = opset16.identity(source)
            result.input(0).replace_source_output(copy.output(0))
            copy.output(0).set_names({value.name})
        else:
            source.get_tensor().add_names({value.name})
    for parameter, value in zip(ordered, graph.inputs, strict=True):
        parameter.output(0).set_names({value.name})
        parameter.set_friendly_name(value.name)
    converted.validate_nodes_and_infer_types()
    # A port collects the names of operators that were optimized away, so the right ones are kept apart, in the order of the ports.
    names = {parameter.get_friendly_name(): index for index, parameter in enumerate(converted.get_parameters())}
    interface = {"inputs": sorted(names, key=names.__getitem__), "outputs": [value.name for value in graph.outputs]}
    converted.set_rt_info(json.dumps(interface), INTERFACE)


def _compare_values(converted: ov.Model, model: ir.Model) -> None:
    """Refuses a conversion that gives any value another shape or dtype than ONNX defines: an attribute was ignored."""
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    values.update({output.name: output for node in model.graph for output in node.outputs if output.name})
    for op in converted.get_ordered_ops():
        for port in op.outputs():
            for name in port.get_names():
                value = values.get(name)
                if value is None or port.get_element_type().is_dynamic():
                    continue
                producer = value.producer()
                where = f"node '{producer.name or name}' ({producer.op_type})" if producer else f"input '{name}'"
                shape, partial = static_shape(value), port.get_partial_shape()
                got = tuple(partial.to_shape()) if partial.is_static else None
                element_type = port.get_element_type().get_type_name()
                if shape is not None and got is not None and shape != got:
                    problem = f"shape {list(got)} where ONNX defines {list(shape)}"
                elif value.dtype in _ELEMENT_TYPES and element_type != _ELEMENT_TYPES[value.dtype]:
                    problem = f"dtype {element_type} where ONNX defines {_ELEMENT_TYPES[value.dtype]}"
                else:
                    continue
                raise UnsupportedOpError(
                    f"OpenVINO converts {producer.op_type if producer else 'an input'} wrongly: value '{name}' has {problem}",
                    where=where,
                    fix="express it with other operators, or compile for --target onnxruntime",
                )
