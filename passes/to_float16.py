"""The pass `to-float16`: half the bytes of weights and activations, at ten bits of mantissa and a range of 65504."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.errors import UnsupportedOpError, UsageError, nearest
from edgekit.graph.constants import GraphEditor
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.ranges import risks, value_ranges
from edgekit.graph.shapes import infer_shapes

_Use = tuple[ir.Node, int]
"""A node and the position of the input at which it reads a value."""

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16

_STAY_FLOAT32 = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}  # a rounded scale would move every quantized value
    | {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial", "EyeLike"}
)
"""Operators that stay in float32 although ONNX would let them be float16; runtimes lack kernels for the second group."""

_ON_OVERFLOW = ("keep", "refuse", "ignore")

_READ_ANY_TYPE = frozenset({"Cast", "Shape", "Size"})
"""Operators that read float32 or float16 as it comes: a Cast before them would only lose digits."""


@dataclass(frozen=True)
class ToFloat16(Pass):
    """Store float32 weights as float16 and compute in float16.

    Before:  x (float32) ─ Conv(W float32) ─ Relu ─► y (float32)
    After:   x (float32) ─ Cast ─ Conv(W float16) ─ Relu ─ Cast ─► y (float32)

    What becomes float16 is decided by the type constraints of ONNX's operator schemas: every float32 input and output whose type parameter
    admits float16, and Cast and ConstantOfShape that make such values. The rest stays in float32 between Casts: operators and inputs that
    do not admit float16 (the scales of Resize, Range), quantization and random operators, nodes with subgraphs, and calls of functions. So
    does a node that reads a constant beyond float16's range, or a single number that would become zero (the ε of a division).

    With calibration data, the range of every value is measured first, the steps inside whole operators included, and those that would
    overflow, or vanish where it matters (`edgekit.graph.ranges.risks`), are named. `stabilize-float16` before this pass removes many.

    Attributes:
        keep_io: Leave inputs and outputs of the graph in float32, with a Cast after and before. Otherwise inputs are float16, and
            an output has the type that its node computes in.
        keep: What stays in float32: operator types, names of nodes, paths of modules with everything below them, or shell patterns of
            the first two, such as `Softmax`, `blocks.3.norm1/Pow`, `blocks.3.norm1` or `blocks.1?.*`.
        overflow: `keep`: a node that makes or reads such a value stays in float32. `refuse`: nothing is converted while there is one.
            `ignore`: ranges are not measured.

    Source: IEEE 754-2019, binary16; Micikevicius et al. 2018, "Mixed Precision Training", section 3 (what must stay in float32).
    """

    name: ClassVar[str] = "to-float16"
    effect: ClassVar[Effect] = Effect.APPROXIMATE
    default_order: ClassVar[int | None] = None

    keep_io: bool = True
    keep: tuple[str, ...] = ()
    overflow: str = "keep"

    def __post_init__(self) -> None:
        if self.overflow not in _ON_OVERFLOW:
            raise UsageError(f"to-float16 knows no overflow='{self.overflow}'", fix=nearest(self.overflow, _ON_OVERFLOW))

    def apply(self, model: ir.Model, context: Context) -> int:
        """Converts the main graph; returns how many initializers and constants of nodes became float16."""
        if any(_unknown(value) for node in model.graph for value in node.outputs):
            infer_shapes(model)
        half = self._choose_nodes(model, context)
        if half and context.calibration and self.overflow != "ignore" and not self._stay_in_range(half, model, context):
            return 0
        halves = _halve_weights(half, context)
        constants = [node for node in half if _constant_attribute(node) is not None]
        if not halves and not constants:
            context.refuse("graph", "no float32 weights are used by operators that can compute in float16")
            return 0
        _Converter(model, half, halves, self.keep_io).convert()
        for node in half:
            context.applied(node.name or node.op_type)
        return len(halves) + len(constants)

    def _choose_nodes(self, model: ir.Model, context: Context) -> dict[ir.Node, Signature]:
        """Returns the nodes that will compute in float16 and what of them changes."""
        half: dict[ir.Node, Signature] = {}
        for name in self.keep:
            if not any(_is_meant(node, name) for node in model.graph):
                context.refuse("keep", f"no operator type, no node and no module is called '{name}'")
        for node in model.graph:
            signature = _signature_of(node, model)
            if isinstance(signature, str):
                context.refuse(node.name or node.op_type, signature)
            elif signature is not None and not context.skips(node.name or "") and not self._keeps(node):
                half[node] = signature
        return half

    def _stay_in_range(self, half: dict[ir.Node, Signature], model: ir.Model, context: Context) -> bool:
        """Names what float16 does not hold and takes its nodes out of `half`; False when nothing is to be converted."""
        try:
            found = risks(value_ranges(model, context.calibration))
        except UnsupportedOpError as error:
            context.refuse("graph", f"whether values overflow is not known: {error.what}")
            return True
        values = {value.name: value for node in model.graph for value in node.outputs} | {value.name: value for value in model.graph.inputs}
        nodes = {node.name: node for node in half}
        refused, named = False, set[str]()
        for risk in found:
            item, value = risk.range, values.get(risk.range.name)  # initializers are not among them: they are looked at when converted
            inside = [nodes.get(item.node)] if item.internal is not None or not item.constant else []
            around = [value.producer(), *(use.node for use in value.uses())] if value is not None else inside
            touched = [node for node in around if node is not None and node in half]
            where, refused = item.node or item.name, refused or bool(touched)
            stays = self.overflow == "keep" and (risk.kind == "overflow" or item.internal is None)
            if touched and where not in named:
                named.add(where)
                what = f"{item.operator or 'input'} {'stays in float32' if stays else 'is at risk'}"
                context.refuse(where, f"{what}: in '{item.name}' {risk.why}")
            if stays:
                for node in touched:
                    half.pop(node, None)
        return not (refused and self.overflow == "refuse")

    def _keeps(self, node: ir.Node) -> bool:
        """True when an option says that `node` stays in float32."""
        return any(_is_meant(node, name) for name in self.keep)


def _is_meant(node: ir.Node, name: str) -> bool:
    """True when `name` is the operator, the name or a pattern of `node`, or the path of a module that it is in."""
    if f"{node.metadata_props.get(MODULE_KEY, '')}.".startswith(f"{name}."):
        return True
    return any(text == name or fnmatch.fnmatchcase(text, name) for text in (node.op_type, node.name or ""))


@dataclass(frozen=True)
class Signature:
    """Which inputs and outputs of a node, by position, turn from float32 to float16."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def _signature_of(node: ir.Node, model: ir.Model) -> Signature | str | None:
    """Returns what changes in a node, None when nothing does, or why it stays although it handles float32."""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    if not any(value.dtype == _FLOAT for value in values) or node.op_type in _STAY_FLOAT32:
        return None
    if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
        return f"{node.op_type} stays in float32: it holds a subgraph"
    if any(_unknown(value) for value in values):
        return f"{node.op_type} stays in float32: the type of a value is not known"
    if any(value.type is not None and not isinstance(value.type, ir.TensorType) for value in values):
        return f"{node.op_type} stays in float32: it handles sequences"
    if any(value.is_graph_output() and value not in model.graph.outputs for value in node.outputs):
        return f"{node.op_type} stays in float32: a subgraph gives its result out"
    types = _schema_types(node.op_type, node.domain, model.opset_imports.get(node.domain, 0))
    if types is None:
        return f"{node.domain}::{node.op_type} stays in float32: ONNX does not define which types it takes"
    inputs = tuple(
        i
        for i, value in enumerate(node.inputs)
        if value is not None and value.dtype == _FLOAT and types.input(i) is not None and not _reads_any_type(node)
    )
    bound = {types.input(index) for index in inputs}
    outputs = tuple(
        i
        for i, value in enumerate(node.outputs)
        if value.dtype == _FLOAT and types.output(i) is not None and (types.output(i) in bound or _chooses_type(node, value))
    )
    return Signature(inputs, outputs) if inputs or outputs else None


@dataclass(frozen=True)
class _SchemaTypes:
    """Per formal input and output, the type parameter when it admits float16, else None; the last of a variadic list repeats."""

    inputs: tuple[str | None, ...]
    outputs: tuple[str | None, ...]

    def input(self, index: int) -> str | None:
        return self.inputs[min(index, len(self.inputs) - 1)] if self.inputs else None

    def output(self, index: int) -> str | None:
        return self.outputs[min(index, len(self.outputs) - 1)] if self.outputs else None


@functools.lru_cache(maxsize=4096)
def _schema_types(op_type: str, domain: str, opset: int) -> _SchemaTypes | None:
    try:
        schema = onnx.defs.get_schema(op_type, opset, domain)
    except Exception:  # onnx.defs.SchemaError is not exported
        return None
    wide = {constraint.type_param_str for constraint in schema.type_constraints if "tensor(float16)" in constraint.allowed_type_strs}

    def parameter(formal: onnx.defs.OpSchema.FormalParameter) -> str | None:
        return formal.type_str if formal.type_str in wide else None

    return _SchemaTypes(tuple(map(parameter, schema.inputs)), tuple(map(parameter, schema.outputs)))


def _unknown(value: ir.Value) -> bool:
    """True when a value that somebody reads has no known type; optional outputs that nobody reads have none."""
    unused = value.producer() is not None and not value.uses() and not value.is_graph_output()
    return value.dtype in (None, ir.DataType.UNDEFINED) and not unused


def _reads_any_type(node: ir.Node) -> bool:
    return node.op_type in _READ_ANY_TYPE and node.domain == ""


def _chooses_type(node: ir.Node, output: ir.Value) -> bool:
    """True when an attribute says that `output` is float32, so that it can say float16."""
    return node.domain == "" and (node.op_type == "Cast" or _constant_attribute(node) is not None)


def _constant_attribute(node: ir.Node) -> ir.TensorProtocol | None:
    """Returns the float32 tensor in the attribute of a Constant or ConstantOfShape."""
    if node.op_type not in ("Constant", "ConstantOfShape") or node.domain != "" or "value" not in node.attributes:
        return None
    tensor = node.attributes["value"].as_tensor()
    return tensor if tensor.dtype == _FLOAT and _why_not_half("", _to_half(tensor)) is None else None


@dataclass(frozen=True)
class _Half:
    """A tensor in float16.

    Attributes:
        array: Its values.
        overflow: The finite value of largest magnitude that became infinite, or None.
        underflows: How many values became zero.
    """

    array: np.ndarray
    overflow: float | None
    underflows: int


def _to_half(tensor: ir.TensorProtocol) -> _Half:
    array = tensor.numpy()
    with np.errstate(over="ignore", under="ignore"):
        half = array.astype(np.float16)
    infinite = np.isinf(half)
    overflow = None
    if infinite.any():
        lost = array[infinite & np.isfinite(array)]
        overflow = float(lost[np.argmax(np.abs(lost))]) if lost.size else None
    return _Half(half, overflow, int(np.count_nonzero(array) - np.count_nonzero(half)))


def _halve_weights(half: dict[ir.Node, Signature], context: Context) -> dict[ir.Value, np.ndarray]:
    """Returns the float16 arrays of the initializers that nodes of `half` read; takes out of `half` the nodes that must not read them."""
    found: dict[ir.Value, _Half] = {}
    for node in list(half):
        for index in half[node].inputs:
            value = node.inputs[index]
            if value is None or value.const_value is None or not value.is_initializer() or value.is_graph_input():
                continue
            if value not in found:
                found[value] = _to_half(value.const_value)
            why = _why_not_half(value.name or "", found[value])
            if why is not None:
                context.refuse(node.name or node.op_type, f"{node.op_type} stays in float32: {why}")
                del half[node]
                break
    used = {node.inputs[index] for node, signature in half.items() for index in signature.inputs}
    halves = {value: item for value, item in found.items() if value in used}
    underflows = {value: item.underflows for value, item in halves.items() if item.underflows}
    if underflows:
        worst = max(underflows, key=lambda value: underflows[value])
        context.refuse(
            worst.name or "weights",
            f"{sum(underflows.values())} weights of {len(underflows)} initializers are zero in float16, {underflows[worst]} of them here",
        )
    return {value: item.array for value, item in halves.items()}


def _why_not_half(name: str, half: _Half) -> str | None:
    if half.overflow is not None:
        return f"initializer '{name}' holds {half.overflow:g}, and float16 ends at 65504"
    if half.array.size == 1 and half.underflows:
        return f"initializer '{name}' is a single number that would become zero in float16"
    return None


class _Converter:
    """Writes the choice into the graph: converts weights and types, and puts a Cast wherever float32 and float16 meet."""

    def __init__(self, model: ir.Model, half: dict[ir.Node, Signature], halves: dict[ir.Value, np.ndarray], keep_io: bool) -> None:
        self.graph = model.graph
        self.editor = GraphEditor(model)
        self.half = half
        self.halves = halves
        self.keep_io = keep_io

    def convert(self) -> None:
        self._convert_initializers()
        self._convert_results()
        made = {node.outputs[index] for node, signature in self.half.items() for index in signature.outputs}
        if not self.keep_io:
            made |= self._convert_inputs()
        for value in self._float32_sources(made):
            readers = [use for use in value.uses() if self._reads_half(use)]
            if readers:
                self._cast(value, _HALF, readers)
        for value in made:
            readers = [use for use in value.uses() if not self._reads_half(use) and not _reads_any_type(use.node)]
            given_out = value.is_graph_output() and self.keep_io
            if readers or given_out:
                self._cast(value, _FLOAT, readers, as_output=given_out)

    def _reads_half(self, use: _Use) -> bool:
        node, index = use
        signature = self.half.get(node)
        return signature is not None and index in signature.inputs

    def _convert_initializers(self) -> None:
        for value, array in self.halves.items():
            others = [use for use in value.uses() if not self._reads_half(use)]
            if not others and not value.is_graph_output():
                name = value.name
                new = self.editor.add_initializer(name or "weight", array, made_from=[value])
                value.replace_all_uses_with(new)
                self.editor.drop_unused([value])
                new.name = name
                continue
            new = self.editor.add_initializer(f"{value.name}.float16", array, made_from=[value])
            for node, index in value.uses():
                if self._reads_half((node, index)):
                    node.replace_input_with(index, new)

    def _convert_results(self) -> None:
        for node, signature in self.half.items():
            for index in signature.outputs:
                node.outputs[index].type = ir.TensorType(_HALF)
            if not signature.outputs:
                continue
            tensor = _constant_attribute(node)
            if tensor is not None:
                node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(_to_half(tensor).array, name=tensor.name))
            elif node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", _HALF.value)

    def _convert_inputs(self) -> set[ir.Value]:
        """Turns the float32 inputs of the graph to float16, with their default values if they have any that fit."""
        converted = set()
        for value in self.graph.inputs:
            if value.dtype != _FLOAT or not isinstance(value.type, ir.TensorType):
                continue
            if value.const_value is not None:
                half = _to_half(value.const_value)
                if half.overflow is not None:
                    continue
                value.const_value = ir.Tensor(half.array, name=value.name)
            value.type = ir.TensorType(_HALF)
            converted.add(value)
        return converted

    def _float32_sources(self, made: set[ir.Value]) -> Iterator[ir.Value]:
        """Yields the values that are float32 now and that nodes of the graph may read."""
        yield from [value for value in self.graph.inputs if value.dtype == _FLOAT]
        yield from [value for node in self.graph for value in node.outputs if value.dtype == _FLOAT and value not in made]

    def _cast(self, value: ir.Value, to: ir.DataType, readers: Sequence[_Use], as_output: bool = False) -> None:
        """Puts one Cast of `value` before `readers`; `as_output`: and gives it out in place of `value`, under the same name."""
        node = ir.node("Cast", [value], {"to": to.value}, name=self.editor.unique_name(f"{value.name}/Cast"))
        result = node.outputs[0]
        result.type, result.shape = ir.TensorType(to), value.shape.copy() if value.shape is not None else None
        result.name = self.editor.unique_name(f"{value.name}.{'float16' if to == _HALF else 'float32'}")
        producer = value.producer()
        if producer is not None:
            if MODULE_KEY in producer.metadata_props:
                node.metadata_props[MODULE_KEY] = producer.metadata_props[MODULE_KEY]
            self.graph.insert_after(producer, node)
        elif len(self.graph):
            self.graph.insert_before(self.graph[0], node)
        for reader, index in readers:
            reader.replace_input_with(index, result)
        if as_output:
            name, spare = value.name, result.name
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = result
            value.name, result.name = spare, name
