"""From a legalized ONNX graph to a Core ML model: writes the MIL program node by node, for the lowest deployment target that it needs."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.collection import out_of_sight
from edgekit.errors import EdgekitError, LoweringError, UnsupportedOpError, nearest
from edgekit.graph.shapes import static_shape
from edgekit.targets.coreml.biases import DOMAIN
from edgekit.targets.coreml.compression import Storage
from edgekit.targets.coreml.interface import Interface, Port, Wishes, describe
from edgekit.targets.coreml.lowering import OPERATORS
from edgekit.targets.coreml.lowering.builder import FLOATS, Lowering, NewerTargetError
from edgekit.targets.coreml.precision import stays_float32
from edgekit.targets.coreml.versions import VERSIONS


@dataclass(frozen=True)
class Options:
    """How a graph is written.

    Attributes:
        half: Whether floats are computed in float16.
        version: The deployment target, one of VERSIONS; empty: the lowest that the graph needs.
        storage: How weights are stored; None: in the precision that they are computed in.
        wishes: What the user asks of the interface.
    """

    half: bool = True
    version: str = ""
    storage: Storage | None = None
    wishes: Wishes = field(default_factory=Wishes)


@dataclass
class Converted:
    """A Core ML model that is not saved yet.

    Attributes:
        model: coremltools' MLModel.
        version: The minimum deployment target that it is written for.
        needs: For each version above the oldest, which operators asked for it.
        interface: How its inputs and outputs stand for those of the ONNX graph.
    """

    model: Any
    version: str
    needs: dict[str, list[str]] = field(default_factory=dict)
    interface: Interface = field(default_factory=Interface)


def convert(model: ir.Model, options: Options) -> Converted:
    """Writes `model` (opset 23, static shapes, inlined) as an ML Program.

    Raises:
        UnsupportedOpError: Core ML cannot express an operator, or only on a newer deployment target than the one asked for.
        LoweringError: coremltools failed.
    """
    version = options.version or VERSIONS[0]
    while True:
        lowering = Lowering(version, storage=options.storage)
        try:
            with _quiet():
                program, interface = _write(model.graph, lowering, options)
                return Converted(_finish(program, interface, version), version, lowering.needs, interface)
        except NewerTargetError as error:
            if options.version:
                raise UnsupportedOpError(error.what, where=error.where, fix=error.fix) from error
            version = error.version


def _write(graph: ir.Graph, lowering: Lowering, options: Options) -> tuple[Any, Interface]:
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Program

    interface = describe(graph, lowering, options.wishes)
    lowering.write = lambda inner, inside: lower_nodes(inside, inner, options, stays_float32(inside))
    program = Program()
    placeholders = {port.name: _placeholder(port) for port in interface.inputs}
    with Function(placeholders, opset_version=getattr(ct.target, lowering.version)) as function:
        for value, port in zip(graph.inputs, interface.inputs, strict=True):
            lowering.values[value] = _from_port(function.inputs[port.name], value, port, lowering)
        lower_nodes(graph, lowering, options, stays_float32(graph))
        outputs = []
        for value, port in zip(graph.outputs, interface.outputs, strict=True):
            variable = _to_port(value, port, lowering)
            if port.state:
                mb.coreml_update_state(state=function.inputs[port.name], value=variable)
            else:
                outputs.append(variable)
        if not outputs:
            raise LoweringError(
                "every output became a state: a Core ML model needs one that it gives out", fix="keep one output out of the states"
            )
        function.set_outputs(outputs)
        _drop_unused(function)
    program.add_function("main", function)
    return program, interface


def _drop_unused(block: Any) -> None:
    """Removes constants that nothing reads, such as weights that are stored in fewer bits elsewhere: they would lie in the file."""
    unused = []
    for operation in block.operations:
        for inner in operation.blocks:
            _drop_unused(inner)
        if operation.op_type == "const" and not any(value.child_ops or value.consuming_blocks for value in operation.outputs):
            unused.append(operation)
    block.remove_ops(unused)


def lower_nodes(graph: ir.Graph, lowering: Lowering, options: Options, kept: set[ir.Node]) -> None:
    """Writes the nodes of a graph into the block that is open in coremltools' builder."""
    for node in graph:
        lowering.node = node
        lowering.half = _is_half(node, options, kept)
        function = OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx", DOMAIN) else None
        if function is None:
            label = node.op_type if not node.domain else f"{node.domain}.{node.op_type}"
            raise UnsupportedOpError(
                f"Core ML has no lowering for the operator '{label}'", where=lowering.where, fix=nearest(node.op_type, OPERATORS)
            )
        results = _all_empty(node) or function(lowering, node)
        results = results if isinstance(results, (tuple, list)) else (results,)
        for value, result in zip(node.outputs, results, strict=False):
            _check(value, result, lowering)
            lowering.values[value] = result
    lowering.node = None


def _all_empty(node: ir.Node) -> tuple[np.ndarray, ...]:
    """The results of a node whose results have no elements: there is nothing to compute."""
    shapes = [static_shape(output) for output in node.outputs]
    if not all(shape is not None and 0 in shape and output.dtype is not None for shape, output in zip(shapes, node.outputs, strict=True)):
        return ()
    return tuple(np.zeros(shape or (), output.dtype.numpy()) for shape, output in zip(shapes, node.outputs, strict=True) if output.dtype)


def _is_half(node: ir.Node, options: Options, kept: set[ir.Node]) -> bool:
    """Float16 where the option says so, or where the graph itself computes in it."""
    floats = [value.dtype for value in node.outputs if value.dtype in FLOATS] or [
        value.dtype for value in node.inputs if value is not None and value.dtype in FLOATS
    ]
    return (options.half and node not in kept) or bool(floats and all(dtype == ir.DataType.FLOAT16 for dtype in floats))


def _check(value: ir.Value, result: Any, lowering: Lowering) -> None:
    """Holds what was written against the shape and kind of dtype that ONNX defines: a lowering that misread an attribute is refused."""
    if isinstance(result, list):  # a sequence: its tensors were checked where they were made
        return
    expected = static_shape(value)
    shape = tuple(result.shape)
    if expected is not None and all(isinstance(size, (int, np.integer)) for size in shape) and shape != expected:
        raise lowering.refuse(
            f"{value.name} in the shape that ONNX defines, {list(expected)}: it would have {list(shape)}", "express it otherwise"
        )
    if 0 in shape and not isinstance(result, np.ndarray):
        raise lowering.refuse(f"the empty tensor '{value.name}'", "remove the node and what reads it")
    if not isinstance(result, np.ndarray) and value.dtype is not None:
        got, wanted = _kind(result.dtype.__name__), _onnx_kind(value.dtype)
        if got != wanted:
            raise lowering.refuse(
                f"{value.name} in the type that ONNX defines, {value.dtype.name}: it would be {result.dtype.__name__}", "add a Cast"
            )


def _kind(name: str) -> str:
    return "bool" if name == "bool" else "float" if name.startswith("fp") else "int"


def _onnx_kind(dtype: ir.DataType) -> str:
    return "bool" if dtype == ir.DataType.BOOL else "float" if dtype in FLOATS else "int"


def _placeholder(port: Port) -> Any:
    from coremltools.converters.mil.mil import Placeholder, types
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    dtype = {"fp32": types.fp32, "fp16": types.fp16, "int32": types.int32}[port.dtype]
    return StateTensorPlaceholder(port.shape, dtype=dtype) if port.state else Placeholder(port.shape, dtype=dtype)


def _from_port(variable: Any, value: ir.Value, port: Port, lowering: Lowering) -> Any:
    """The ONNX value of an input: its own rank and bool."""
    from coremltools.converters.mil.mil import Builder as mb

    if port.state:
        return mb.read_state(input=variable, name=lowering.unique(f"{port.name}_now"))
    if value.dtype == ir.DataType.BOOL:
        variable = mb.cast(x=variable, dtype="bool", name=lowering.unique(f"{port.name}_bool"))
    if not port.scalar:
        return variable
    return mb.squeeze(x=variable, name=lowering.unique(f"{port.name}_scalar"))


def _to_port(value: ir.Value, port: Port, lowering: Lowering) -> Any:
    """The output's variable, under its name and in the type of the interface."""
    from coremltools.converters.mil.mil import Builder as mb

    lowering.half = port.dtype == "fp16"
    name = lowering.unique(f"{port.name}_next") if port.state else port.name
    variable = lowering.var(lowering.values[value] if value in lowering.values else _constant_output(value, lowering), "")
    if port.scalar:
        variable = mb.expand_dims(x=variable, axes=[0], name=lowering.unique(f"{port.name}_vector"))
    if variable.dtype.__name__ != port.dtype:
        return mb.cast(x=variable, dtype=port.dtype, name=name)
    return mb.identity(x=variable, name=name)


def _constant_output(value: ir.Value, lowering: Lowering) -> np.ndarray:
    from edgekit.graph.constants import constant_array

    array = constant_array(value)
    if array is None:
        raise lowering.refuse(f"the output '{value.name}', which nothing computes", "remove it from the graph")
    return array


def _finish(program: Any, interface: Interface, version: str) -> Any:
    import coremltools as ct

    labels = next((port.labels for port in interface.outputs if port.labels), ())
    ports = [port for port in interface.inputs if not port.state]
    try:
        model = ct.convert(
            program,
            source="milinternal",
            convert_to="mlprogram",
            inputs=[_image(port) if port.colour else ct.TensorType(port.name, shape=port.shape) for port in ports]
            if any(port.colour for port in ports)
            else None,
            classifier_config=ct.ClassifierConfig(list(labels)) if labels else None,
            minimum_deployment_target=getattr(ct.target, version),
            compute_precision=ct.precision.FLOAT32,  # the program is written in its final types already
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
    except EdgekitError:
        raise
    except Exception as error:
        raise LoweringError(
            f"coremltools cannot write the program: {str(error).strip()[:400] or type(error).__name__}",
            fix="compile for --target onnxruntime to see whether the graph is at fault",
        ) from error
    for port in ports:
        model.input_description[port.name] = port.description
    for port in interface.outputs:
        if not port.state and not port.labels:
            model.output_description[port.name] = port.description
    return model


def _image(port: Port) -> Any:
    import coremltools as ct

    layout = {"RGB": ct.colorlayout.RGB, "BGR": ct.colorlayout.BGR, "GRAYSCALE": ct.colorlayout.GRAYSCALE}[port.colour]
    bias = list(port.bias) if len(port.bias) > 1 else port.bias[0]
    return ct.ImageType(port.name, shape=port.shape, scale=port.scale, bias=bias, color_layout=layout)


@contextmanager
def _quiet() -> Iterator[None]:
    """coremltools' warnings and progress bars are for those who work on coremltools."""
    logger = logging.getLogger("coremltools")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), out_of_sight():  # coremltools collects garbage after each conversion
            yield
    finally:
        logger.setLevel(level)
