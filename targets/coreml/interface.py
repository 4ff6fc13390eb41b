"""How the inputs and outputs of a Core ML model stand for those of the ONNX graph.

Core ML's inputs and outputs are tensors of rank 1 to 5 of float32, float16 or int32, and their names are identifiers. So an ONNX scalar
becomes a vector of one element, bool and the other integers become int32, and names are cleaned. Some inputs become images or states, one
output may become a class label. The package keeps the correspondence in its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from edgekit.errors import UnsupportedOpError, UsageError, nearest
from edgekit.graph.shapes import static_shape
from edgekit.targets.coreml.images import COLOURS, ImageInput
from edgekit.targets.coreml.lowering.builder import FLOATS, Lowering

METADATA = "edgekit.interface"
"""Key of the package's user-defined metadata that holds the interface as JSON."""
NEEDS = "edgekit.deployment_target"
"""Key of the metadata that says, as JSON, for which deployment target the package is written and which operators asked for it."""

RECIPE = "edgekit.recipe"
"""Key of the metadata that holds the recipe that repeats the compile."""


@dataclass(frozen=True)
class Port:
    """One input or output.

    Attributes:
        name: Its name in Core ML; of an output that is a state, the state's name.
        onnx: Its name in the ONNX graph.
        dtype: Its type in Core ML: "fp32", "fp16" or "int32".
        onnx_dtype: Its numpy type in ONNX.
        shape: Its shape in Core ML.
        scalar: Whether it has rank 0 in ONNX.
        state: Whether it is kept in a state between calls instead of being handed over.
        colour: Layout of the channels of an image, else empty.
        scale: What an image's pixels are multiplied by.
        bias: What is added to each channel of an image after that.
        labels: Of an output that became a class label: the classes in order.
        flexible: Of an input that takes several shapes: the axes whose size varies; `shape` is one that it takes.
    """

    name: str
    onnx: str
    dtype: str
    onnx_dtype: str
    shape: tuple[int, ...]
    scalar: bool = False
    state: bool = False
    colour: str = ""
    scale: float = 1.0
    bias: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    flexible: tuple[int, ...] = ()

    @property
    def description(self) -> str:
        """For the people who see the model in Xcode."""
        if self.colour:
            return f"ONNX '{self.onnx}', {self.colour} pixels of 0–255, scaled by {self.scale:g} and shifted by {list(self.bias)}"
        return f"ONNX '{self.onnx}', {self.onnx_dtype} {[] if self.scalar else list(self.shape)}"


@dataclass(frozen=True)
class Wishes:
    """What a user asks of the interface.

    Attributes:
        images: Inputs that become images.
        states: Pairs of an input and the output that is its next value: kept in a state between calls.
        labels: Names of the classes of the one output, empty for none.
    """

    images: tuple[ImageInput, ...] = ()
    states: tuple[tuple[str, str], ...] = ()
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Interface:
    """All inputs and outputs, in the order of the ONNX graph."""

    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = field(default=())

    def to_json(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Interface:
        """Reads what `to_json` wrote."""
        found: dict[str, list[dict[str, Any]]] = json.loads(text)
        return cls(
            *(tuple(Port(**{key: _frozen(value) for key, value in port.items()}) for port in found[part]) for part in ("inputs", "outputs"))
        )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def parse_states(texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Reads `INPUT=OUTPUT`, the output being the input's next value.

    Raises:
        UsageError: One is not of that form.
    """
    pairs = [tuple(text.split("=")) for text in texts]
    for text, pair in zip(texts, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise UsageError(
                f"'{text}' names no state", where="option 'states' of target 'coreml'", fix="write INPUT=OUTPUT, such as past_k=present_k"
            )
    return tuple((pair[0], pair[1]) for pair in pairs)


def read_labels(path: str) -> tuple[str, ...]:
    """Reads class names, one a line.

    Raises:
        UsageError: The file cannot be read, or names a class twice.
    """
    if not path:
        return ()
    try:
        lines = tuple(line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError("the class labels cannot be read", where=path, fix="give a text file with one class a line") from error
    twice = sorted({line for line in lines if lines.count(line) > 1})
    if twice or not lines:
        raise UsageError(
            f"the class '{twice[0]}' is named twice" if twice else "there is no class", where=path, fix="name each class once, one a line"
        )
    return lines


def describe(graph: ir.Graph, lowering: Lowering, wishes: Wishes) -> Interface:
    """The interface of a graph of static shapes.

    Raises:
        UnsupportedOpError: An input or output has a shape or type that Core ML's interfaces lack.
        UsageError: An input or output that is to become an image, a state or a class label is not there or cannot be one.
    """
    inputs = [_port(value, lowering, "input") for value in graph.inputs]
    outputs = [_port(value, lowering, "output") for value in graph.outputs]
    for image in wishes.images:
        index = _place(image.name, inputs, "input")
        inputs[index] = _as_image(inputs[index], image)
    for source, result in wishes.states:
        first, second = _place(source, inputs, "input"), _place(result, outputs, "output")
        inputs[first], outputs[second] = _as_state(inputs[first], outputs[second], lowering)
    if wishes.labels:
        outputs[0] = _as_classes(outputs, wishes.labels)
    return Interface(tuple(inputs), tuple(outputs))


def _place(name: str, ports: list[Port], kind: str) -> int:
    known = [port.onnx for port in ports]
    if name not in known:
        raise UsageError(f"the graph has no {kind} '{name}'", where=f"{kind} '{name}'", fix=nearest(name, known))
    return known.index(name)


def _as_image(port: Port, image: ImageInput) -> Port:
    channels = COLOURS[image.colour]
    if port.dtype == "int32" or len(port.shape) != 4 or port.shape[0] != 1 or port.shape[1] != channels:
        raise UsageError(
            f"input '{port.onnx}' of {port.onnx_dtype} {list(port.shape)} cannot be a {image.colour} image",
            where="--image-input",
            fix=f"its shape must be [1, {channels}, H, W] of floats",
        )
    return replace(port, dtype="fp32", colour=image.colour, scale=image.scale, bias=image.bias)


def _as_state(source: Port, result: Port, lowering: Lowering) -> tuple[Port, Port]:
    if source.shape != result.shape or source.scalar or "float" not in source.onnx_dtype or "float" not in result.onnx_dtype:
        raise UsageError(
            f"'{source.onnx}' {list(source.shape)} and '{result.onnx}' {list(result.shape)} are no state",
            where="option 'states' of target 'coreml'",
            fix="an input and an output of the same shape, of floats",
        )
    lowering.require("iOS18", "a state")
    return replace(source, dtype="fp16", state=True), replace(result, name=source.name, dtype="fp16", state=True)


def _as_classes(outputs: list[Port], labels: tuple[str, ...]) -> Port:
    first = outputs[0]
    count = first.shape[-1]
    if len(outputs) != 1 or "float" not in first.onnx_dtype or first.shape not in ((count,), (1, count)) or count != len(labels):
        shapes = ", ".join(f"'{port.onnx}' {list(port.shape)}" for port in outputs)
        raise UsageError(
            f"{len(labels)} class labels do not fit the outputs {shapes}",
            where="option 'class_labels' of target 'coreml'",
            fix="the model must have one output [1, K], with a label for each of the K",
        )
    return replace(first, labels=labels)


def _port(value: ir.Value, lowering: Lowering, kind: str) -> Port:
    shape, dtype, name = static_shape(value), value.dtype, value.name or ""
    where = f"{kind} '{name}'"
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        raise UnsupportedOpError(
            f"Core ML has no {kind}s that are sequences, optional or sparse", where=where, fix=f"make each tensor an {kind} of its own"
        )
    if shape is None or dtype is None:
        raise UnsupportedOpError(f"Core ML needs the shape and type of every {kind}", where=where, fix="pin the input shapes")
    if len(shape) > 5:
        raise UnsupportedOpError(
            f"Core ML's tensors have rank 5 at most; this {kind} has rank {len(shape)}", where=where, fix="reshape it inside the model"
        )
    if 0 in shape:
        raise UnsupportedOpError(
            f"Core ML has no empty tensors; this {kind} has shape {list(shape)}", where=where, fix=f"remove the {kind}"
        )
    if dtype in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        raise UnsupportedOpError(f"Core ML has no {kind}s of type {dtype.name}", where=where, fix="compile for --target onnxruntime")
    half = dtype == ir.DataType.FLOAT16 and lowering.at_least("iOS16")
    ported = "fp16" if half else "fp32" if dtype in FLOATS else "int32"
    return Port(lowering.unique(name), name, ported, dtype.numpy().name, shape or (1,), shape == ())
