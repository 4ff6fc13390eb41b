"""One Core ML model for inputs of several shapes, from the models that were written for a few of them.

The lowering knows static shapes only. The programs that it writes for different shapes of the inputs differ in two things: the declared
shapes of values, and constants that are computed from shapes, such as the target of a reshape. Declared dimensions that differ become
unknown ones, as RangeDim and EnumeratedShapes of coremltools leave them; constants that differ are computed from the shapes of values
while the model runs. Anything else that differs cannot be one program, and is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgekit.contracts import Shapes
from edgekit.errors import UnsupportedOpError
from edgekit.graph.shapes import static_shape
from edgekit.targets.coreml.convert import Converted, Options, convert
from edgekit.targets.coreml.flexible_program import MergedProgram, names_of
from edgekit.targets.coreml.interface import Interface, Port
from edgekit.targets.coreml.reference.constants import Weights
from edgekit.targets.coreml.size_expressions import Axis, Sizes, SizeWriter
from edgekit.targets.coreml.versions import VERSIONS


def convert_sizes(models: Sequence[ir.Model], options: Options, shapes: Shapes) -> Converted:
    """Writes one graph, given at several shapes of its inputs, as one ML Program.

    Args:
        models: The graph at each of the shapes (opset 23, inlined).
        options: How it is written.
        shapes: The shapes that the result takes, by the inputs' ONNX names.

    Raises:
        UnsupportedOpError: As of `convert`, or the programs differ in more than sizes.
        LoweringError: As of `convert`.
    """
    import coremltools as ct

    varying = [name for name in {**shapes.ranges, **(shapes.listed[0] if shapes.listed else {})} if _varies(name, shapes)]
    listed = shapes.listed and len(varying) > 1
    if listed and not options.version:
        options = replace(options, version=VERSIONS[-1])
    elif listed and options.version != VERSIONS[-1]:
        raise UnsupportedOpError(
            f"several inputs with listed shapes need {VERSIONS[-1]}", where=", ".join(varying), fix="give ranges, or a newer target"
        )
    models = sorted(models, key=_elements, reverse=True)  # constants that are cut to the shape must come from the largest
    converted = [convert(model, options) for model in models]
    newest = max((one.version for one in converted), key=VERSIONS.index)
    if any(one.version != newest for one in converted):
        converted = [convert(model, replace(options, version=newest)) for model in models]
    first = converted[0]
    if listed:
        first.needs.setdefault(VERSIONS[-1], []).append("several inputs with listed shapes")
    folders = [Path(one.model.weights_dir or ".").parent for one in converted]  # `@model_path` is the folder around it
    spec = merge([one.model.get_spec() for one in converted], folders, first.interface, shapes)
    first.model = ct.models.MLModel(spec, weights_dir=first.model.weights_dir, skip_model_load=True)
    first.interface = _widened(first.interface, shapes)
    return first


def _elements(model: ir.Model) -> int:
    return sum(math.prod(static_shape(value) or ()) for value in model.graph.inputs)


def _varies(name: str, shapes: Shapes) -> bool:
    if shapes.listed:
        return len({shape[name] for shape in shapes.listed}) > 1
    return any(low < high for low, high in shapes.ranges[name])


def _widened(interface: Interface, shapes: Shapes) -> Interface:
    """The interface with the axes that vary."""
    ports = []
    for port in interface.inputs:
        listed = [shape[port.onnx] for shape in shapes.listed]
        sizes = zip(*listed, strict=True) if listed else shapes.ranges[port.onnx]
        ports.append(replace(port, flexible=tuple(axis for axis, size in enumerate(sizes) if len(set(size)) > 1)))
    return replace(interface, inputs=tuple(ports))


def merge(specs: Sequence[Any], weights: Sequence[Path], interface: Interface, shapes: Shapes) -> Any:
    """Makes one model of the same model at several shapes.

    Args:
        specs: `Model.proto` messages; the first is changed in place.
        weights: The folder of each one's weights.
        interface: The inputs and outputs.
        shapes: The shapes that the result takes, by the inputs' ONNX names.

    Returns:
        The first message.

    Raises:
        UnsupportedOpError: The programs differ in more than sizes.
    """
    functions = [spec.mlProgram.functions["main"] for spec in specs]
    blocks = [function.block_specializations[function.opset] for function in functions]
    whole = _covers(specs[0], interface, shapes)
    program = MergedProgram([Weights(folder) for folder in weights], whole, names_of(functions[0]))
    known: dict[Sizes, Axis] = {}
    for values in zip(*(function.inputs for function in functions), strict=True):
        program.declare(values, known)
    program.merge_blocks(blocks, known, SizeWriter(program))
    ports = {port.name: port for port in interface.inputs if not port.state}
    for feature in specs[0].description.input:
        if feature.name in ports:
            _declare_input(feature, ports[feature.name], shapes)
    unknown = {value.name for value in program.flexible}
    for feature in specs[0].description.output:
        if feature.name in unknown:
            feature.type.multiArrayType.ClearField("shape")
    return specs[0]


def _covers(spec: Any, interface: Interface, shapes: Shapes) -> bool:
    """Whether the model was written for the largest size of every dimension."""
    written = {value.name: value.type.tensorType.dimensions for value in spec.mlProgram.functions["main"].inputs}
    for port in interface.inputs:
        listed = [shape[port.onnx] for shape in shapes.listed]
        largest = [max(sizes) for sizes in zip(*listed, strict=True)] if listed else [high for _, high in shapes.ranges[port.onnx]]
        if any(int(dim.constant.size) < size for dim, size in zip(written[port.name], largest, strict=False)):  # a scalar has no size
            return False
    return True


def _declare_input(feature: Any, port: Port, shapes: Shapes) -> None:
    """Says in the model's description which shapes an input takes."""
    if port.scalar:
        return
    ranges = shapes.ranges.get(port.onnx, ())
    listed = [shape[port.onnx] for shape in shapes.listed]
    if all(low == high for low, high in ranges) and len(set(listed)) < 2:
        return
    if port.colour:
        _declare_image(feature.type.imageType, ranges, listed)
    elif listed:
        feature.type.multiArrayType.shape[:] = listed[0]
        for shape in listed:
            feature.type.multiArrayType.enumeratedShapes.shapes.add(shape=shape)
    else:
        feature.type.multiArrayType.shape[:] = [low for low, _ in ranges]
        for low, high in ranges:
            feature.type.multiArrayType.shapeRange.sizeRanges.add(lowerBound=low, upperBound=high)
    text = " or ".join(map(str, map(list, listed))) if listed else f"[{', '.join(f'{a}' if a == b else f'{a}..{b}' for a, b in ranges)}]"
    feature.shortDescription = f"ONNX '{port.onnx}', {port.onnx_dtype} {text}"


def _declare_image(image: Any, ranges: Sequence[tuple[int, int]], listed: Sequence[tuple[int, ...]]) -> None:
    if listed:
        image.height, image.width = listed[0][2:]
        for shape in listed:
            image.enumeratedSizes.sizes.add(height=shape[2], width=shape[3])
        return
    image.height, image.width = ranges[2][0], ranges[3][0]
    for span, (low, high) in zip((image.imageSizeRange.heightRange, image.imageSizeRange.widthRange), ranges[2:], strict=True):
        span.lowerBound, span.upperBound = low, high
