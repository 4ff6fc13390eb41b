"""The pass `center-norm`: where everything that a layer norm reads is centred by its writers, the norm need not centre it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import in_range, opset, replace
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.channel_axis import inputs_at, outputs_at

_FIRST_OPSET = 23
"""RMSNormalization is an operator from here on."""


@dataclass(frozen=True)
class CenterNorm(Pass):
    """Fold the centring of layer norms into what writes their input, so that RMS norms remain.

    Before:  h ─ MatMul(W) ─ Add(b) ─ Add(stream) ─┬─ LayerNormalization(γ) ─► …
    After:   h ─ MatMul(W·C) ─ Add(C·b) ─ Add(stream) ─┬─ RMSNormalization(γ) ─► …        C = I - 1·1ᵀ/D

    From the input of each layer norm the pass collects all values that are joined to it by Add, Concat, Slice, Gather, Split, Reshape,
    Transpose, Expand, ReduceMean and scaling by one number, with the axis of the D channels followed through them: for a pre-norm
    transformer the whole residual stream, from the patch embedding to the final norm. Centring each writer centres all of them:
    the columns of a MatMul's weight, the output channels of a Conv, constants (biases, position embeddings, class token). It is done when

    1. everything that writes is one of these, with constants that nothing outside of the collection reads, and at least one layer norm
       of the collection has no β, or one of zeros (RMSNormalization has none; fold γ and β into the following linear layers first);
    2. nothing reads any of the values but layer norms over exactly the channels, whose Mean is not read; no value is given out;
    3. the target runs RMSNormalization faster (`targets`), or `force` is given.

    ε stays as it is. Layer norms with β stay too: they find a mean of zero.

    Source: Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers", section 3;
    Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", section 3.2.
    """

    name: ClassVar[str] = "center-norm"
    effect: ClassVar[Effect] = Effect.EXACT
    removes: ClassVar[frozenset[str]] = frozenset({"LayerNormalization"})

    targets: tuple[str, ...] = ()
    """Targets where RMSNormalization is one kernel and faster than LayerNormalization (`benchmarks/center_norm.py` measures it)."""
    force: bool = False
    """Rewrite for any target."""

    def apply(self, model: ir.Model, context: Context) -> int:
        """Centres every collection that can be; returns how many layer norms became RMS norms."""
        norms = [node for node in model.graph if node.op_type == "LayerNormalization" and node.domain == ""]
        why = self._why_not_at_all(model, context)
        stopped: dict[ir.Value, str] = {}
        done: set[ir.Node] = set()
        editor = GraphEditor(model) if norms and why is None else None
        converted = 0
        for norm in norms:
            if norm in done or context.skips(_where(norm)):
                continue
            if editor is None:
                context.refuse(_where(norm), why or "")
                continue
            x = norm.inputs[0]
            assert x is not None
            stream = stopped.get(x) or _collect(norm, stopped)
            plan = stream if isinstance(stream, str) else _plan(stream, context)
            if isinstance(plan, str):
                context.refuse(_where(norm), plan)
                done.update(() if isinstance(stream, str) else stream.norms)
                continue
            _rewrite(plan, editor)
            done.update(plan.stream.norms)
            for changed in plan.norms:
                context.applied(_where(changed))
            for kept in set(plan.stream.norms) - set(plan.norms):
                if not context.skips(_where(kept)):
                    context.refuse(_where(kept), "its input is centred now, but it has a β, which RMSNormalization has not")
            converted += len(plan.norms)
        return converted

    def _why_not_at_all(self, model: ir.Model, context: Context) -> str | None:
        if opset(model) < _FIRST_OPSET:
            return f"the graph is of opset {opset(model)}; RMSNormalization exists from {_FIRST_OPSET} on"
        if not self.force and context.target not in self.targets:
            return f"target '{context.target}' is not known to run RMSNormalization faster than LayerNormalization; force=true does it"
        return None


def _where(norm: ir.Node) -> str:
    return norm.name or "LayerNormalization"


@dataclass
class _Stream:
    """Values that are centred together.

    Attributes:
        members: Each value with the axis of its channels.
        writers: The MatMul and Conv nodes that make some of them.
        constants: Those that are constants.
        norms: The layer norms that read some of them.
    """

    members: dict[ir.Value, int] = field(default_factory=dict)
    writers: list[ir.Node] = field(default_factory=list)
    constants: list[ir.Value] = field(default_factory=list)
    norms: list[ir.Node] = field(default_factory=list)


def _collect(norm: ir.Node, stopped: dict[ir.Value, str]) -> _Stream | str:
    """Collects what is centred together with the input of `norm`; returns why it cannot be, and notes that for the values it met."""
    x, shape = norm.inputs[0], static_shape(norm.inputs[0])
    if x is None or shape is None or shape[-1] < 2:
        return "the shape of its input is not known or has no channels"
    stream = _Stream()
    waiting = [(x, len(shape) - 1)]
    while waiting:
        value, axis = waiting.pop()
        if value in stream.members:
            if stream.members[value] != axis:
                return _stop(stream, stopped, f"'{value.name}' has the channels on two axes")
            continue
        stream.members[value] = axis
        before, after = _before(value, axis, stream), _after(value, axis, stream)
        if isinstance(before, str):
            return _stop(stream, stopped, before)
        if isinstance(after, str):
            return _stop(stream, stopped, after)
        waiting += [*before, *after]
    return stream


def _stop(stream: _Stream, stopped: dict[ir.Value, str], why: str) -> str:
    stopped.update(dict.fromkeys(stream.members, why))
    return why


def _before(value: ir.Value, axis: int, stream: _Stream) -> list[tuple[ir.Value, int]] | str:
    """Returns what must be centred so that `value` is, with the axis of the channels; writers go into the stream."""
    if constant_array(value) is not None:
        stream.constants.append(value)
        return []
    node, shape = value.producer(), static_shape(value)
    if node is None or shape is None:
        return f"the graph input '{value.name}' writes what it reads"
    if node.domain == "" and node.op_type in _CENTRED and _CENTRED[node.op_type](node, axis, len(shape)):
        stream.writers.append(node)
        return []
    inputs = inputs_at(node, value, axis)
    return inputs if inputs is not None else f"{node.op_type} '{node.name}' writes what it reads: it cannot be centred"


def _is_centred_matmul(node: ir.Node, axis: int, rank: int) -> bool:
    weight = constant_array(node.inputs[1])
    return weight is not None and weight.ndim == 2 and axis == rank - 1 and _is_own(node, 1)


def _is_centred_conv(node: ir.Node, axis: int, rank: int) -> bool:
    """Centring mixes all output channels, so they must read the same inputs: one group."""
    if axis != 1 or node.attributes.get_int("group", 1) != 1 or constant_array(node.inputs[1]) is None or not _is_own(node, 1):
        return False
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    return bias is None or (constant_array(bias) is not None and _is_own(node, 2))


_CENTRED: dict[str, Callable[[ir.Node, int, int], bool]] = {"Conv": _is_centred_conv, "MatMul": _is_centred_matmul}


def _is_own(node: ir.Node, index: int) -> bool:
    """Whether nothing else reads that constant: others would need the old one, which costs its bytes."""
    value = node.inputs[index]
    return value is not None and is_used_once(value)


def _after(value: ir.Value, axis: int, stream: _Stream) -> list[tuple[ir.Value, int]] | str:
    """Returns the values that are centred when `value` is; layer norms go into the stream."""
    if value.is_graph_output():
        return f"'{value.name}' is given out by the graph"
    shape = static_shape(value) or ()
    found: list[tuple[ir.Value, int]] = []
    for node, index in value.uses():
        if _is_norm_over(node, index, axis, len(shape)):
            stream.norms.append(node)
            continue
        outputs = outputs_at(node, index, axis)
        if outputs is None:
            return f"{node.op_type} '{node.name}' reads '{value.name}', which would be centred"
        found += outputs
    return found


def _is_norm_over(node: ir.Node, index: int, axis: int, rank: int) -> bool:
    if node.op_type != "LayerNormalization" or node.domain != "" or index != 0 or axis != rank - 1:
        return False
    mean = node.outputs[1] if len(node.outputs) > 1 else None
    is_read = mean is not None and (bool(mean.uses()) or mean.is_graph_output())
    return node.attributes.get_int("axis", -1) % rank == axis and not is_read


@dataclass(frozen=True)
class _Plan:
    """What is to be changed: new arrays by node and input, and by constant; the norms that become RMS norms."""

    stream: _Stream
    weights: list[tuple[ir.Node, int, np.ndarray]]
    constants: list[tuple[ir.Value, np.ndarray]]
    norms: list[ir.Node]


def _plan(stream: _Stream, context: Context) -> _Plan | str:
    norms = [norm for norm in stream.norms if _has_no_beta(norm) and not context.skips(_where(norm))]
    if not norms:
        return "it has a β, which RMSNormalization has not"
    weights: list[tuple[ir.Node, int, np.ndarray]] = []
    for node in stream.writers:
        for index in (1,) if node.op_type == "MatMul" else (1, 2):
            old = constant_array(node.inputs[index]) if index < len(node.inputs) else None
            if old is None:
                continue
            new = _centred(old, 1 if node.op_type == "MatMul" else 0)
            if new is None:
                return f"the centred weights of {node.op_type} '{node.name}' would not be finite in {old.dtype.name}"
            weights.append((node, index, new))
    constants: list[tuple[ir.Value, np.ndarray]] = []
    for value in stream.constants:
        array = constant_array(value)
        assert array is not None
        centred = _centred(array, stream.members[value])
        if centred is None:
            return f"the centred constant '{value.name}' would not be finite in {array.dtype.name}"
        constants.append((value, centred))
    return _Plan(stream, weights, constants, norms)


def _has_no_beta(norm: ir.Node) -> bool:
    beta = norm.inputs[2] if len(norm.inputs) > 2 else None
    array = constant_array(beta)
    given = any(output.uses() or output.is_graph_output() for output in norm.outputs[1:])
    return (beta is None or (array is not None and not array.any())) and not given


def _centred(array: np.ndarray, axis: int) -> np.ndarray | None:
    wide = array.astype(np.float64)
    return in_range(wide - wide.mean(axis, keepdims=True), array.dtype)


def _rewrite(plan: _Plan, editor: GraphEditor) -> None:
    for node, index, array in plan.weights:
        editor.set_constant(node, index, array)
    for value, array in plan.constants:
        name = value.name or "constant"
        new = editor.add_initializer(name, array, made_from=[value])
        value.replace_all_uses_with(new)
        editor.drop_unused([value])
        if name not in editor.graph.initializers:
            new.name = name
    for norm in plan.norms:
        x, scale = norm.inputs[:2]
        assert x is not None
        assert scale is not None
        attributes = {
            "axis": -1,
            "epsilon": norm.attributes.get_float("epsilon", 1e-5),
            "stash_type": norm.attributes.get_int("stash_type", 1),
        }
        replace(editor, norm, [norm], "RMSNormalization", [x, scale], attributes)
