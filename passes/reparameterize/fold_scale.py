"""The pass `fold-scale`: constant scales and shifts disappear into the linear operators, norms and other scales around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass, Refusal
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.layout import merge_layout
from edgekit.graph.fusions.matching import FLOATS, in_range
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine import compose, read_affine
from edgekit.passes.reparameterize.affine_paths import along, compact, is_identity, on_value
from edgekit.passes.reparameterize.batch_norm import Affine, is_batch_norm, why_not_affine
from edgekit.passes.reparameterize.linear_producers import Terms, fold_back, is_bias

_TERMS = Terms("scale or shift")
_MOST_ROUNDS = 8


@dataclass(frozen=True)
class FoldScale(Pass):
    """Fold scales and shifts by constants into what makes the value, and chains and sums of them into one.

    Before:  x ─ MatMul(W) ─ Add(b) ─ Mul(λ) ─► y        (LayerScale, residual scaling, temperature, Div, Sub, Neg)
    After:   x ─ MatMul(W·diag(λ)) ─ Add(λ·b) ─► y

    Before:  x ─ BatchNormalization(γ, β) ─ Mul(λ) ─► y        (also LayerNormalization, RMSNormalization and those by group or instance)
    After:   x ─ BatchNormalization(λ·γ, λ·β) ─► y

    Before:  x ─ Mul ─ Mul ─ Add ─ Sub ─► y,  or ending in BatchNormalization
    After:   x ─ Mul ─ Add ─► y,              or one BatchNormalization

    Before:  x ─┬─ BatchNormalization ─ Add ─► y               (RepBN; as well x + λ·x, a·x − b·x)
                └─ Mul(α) ─────────────┘
    After:   x ─── BatchNormalization ─► y

    A scale folds into Conv, ConvTranspose, Gemm, MatMul or MatMul ─ Add, also back through layout operators, averages and interpolation,
    which it commutes with, and through Relu and MaxPool where it is positive. It stays when

    1. its constant varies along another axis than the output channels of the operator, or along two;
    2. the operator's output, or a value between, is read elsewhere or is a graph output;
    3. the operator's weight is no constant, or is read elsewhere (a copy would take its bytes);
    4. a shift would become the bias of a MatMul that has none: one Add for another;
    5. the folded constants would not be finite in their dtype.

    A chain or sum becomes one batch norm where it has a batch norm, else Mul ─ Add, where that has fewer nodes.

    Source: Touvron et al. 2021, "Going deeper with Image Transformers", section 2.1 (LayerScale); Guo et al. 2024, "SLAB: Efficient
    Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch Normalization", section 3.2 (RepBN).
    """

    name: ClassVar[str] = "fold-scale"
    effect: ClassVar[Effect] = Effect.EXACT
    default_order: ClassVar[int | None] = None
    removes: ClassVar[frozenset[str]] = frozenset({"BatchNormalization"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Folds in the main graph until nothing more folds; returns at how many places."""
        if not any(_is_candidate(node) for node in model.graph):
            return 0
        folder = _Folder(GraphEditor(model), context)
        for _ in range(_MOST_ROUNDS):
            folder.refusals.clear()
            if not sum(folder.fold(node) for node in list(model.graph) if _is_candidate(node)):
                break
        context.refusals += folder.refusals
        if folder.moved:
            merge_layout(model)  # what stood around a scale may cancel out
        return folder.folded


def _is_candidate(node: ir.Node) -> bool:
    if node.domain != "" or node.graph is None or node.outputs[0].dtype not in FLOATS:
        return False
    return node.op_type in ("Add", "Sub", "Mul", "Div", "Neg", "BatchNormalization")


class _Folder:
    """Tries the rules on nodes one by one and keeps what to report.

    Args:
        editor: Edits the graph.
        context: Asked for places to skip, told of those rewritten.
    """

    def __init__(self, editor: GraphEditor, context: Context) -> None:
        self.editor = editor
        self.context = context
        self.folded = 0
        self.moved = False
        self.refusals: list[Refusal] = []

    def fold(self, node: ir.Node) -> bool:
        """Applies the first rule that fits the place of `node`; True when one did."""
        where = node.name or node.op_type
        if node.graph is None or self.context.skips(where) or not self._fold(node, where):
            return False
        self.folded += 1
        self.context.applied(where)
        return True

    def _fold(self, node: ir.Node, where: str) -> bool:
        chain = _Chain.ending_with(node.outputs[0], whole=True)
        if not chain.nodes or chain.nodes[-1] is not node:
            return self._fold_sum(node, where)
        if not is_batch_norm(node) and (self._fold_into_norm(node, where) or self._fold_into_linear(node, where)):
            return True
        return self._replace(chain, [*chain.nodes], node, where)

    def _fold_into_linear(self, node: ir.Node, where: str) -> bool:
        found = read_affine(node)
        if found is None or is_bias(node):
            return False
        outcome = fold_back(node, found.x, compact(on_value(found)), _TERMS, self.editor)
        if outcome.why is None:
            self.moved |= outcome.moved
            return True
        if outcome.near:
            self.refusals.append(Refusal(where, outcome.why))
        return False

    def _fold_into_norm(self, node: ir.Node, where: str) -> bool:
        """y = γ ⊙ norm(x) + β, scaled: γ and β are scaled."""
        found = read_affine(node)
        norm = found.x.producer() if found is not None else None
        if found is None or norm is None or norm.domain != "" or norm.op_type not in _NORMS or norm.graph is not node.graph:
            return False
        if not is_used_once(found.x):
            self.refusals.append(Refusal(where, f"the output of {norm.op_type} '{norm.name}' is read elsewhere"))
            return False
        why = self._scale_norm(norm, compact(on_value(found)))
        if why is not None:
            self.refusals.append(Refusal(where, why))
            return False
        self.editor.replace_value(node.outputs[0], norm.outputs[0])
        self.editor.remove([node])
        return True

    def _scale_norm(self, norm: ir.Node, a: Affine) -> str | None:
        axis, called = _NORMS[norm.op_type], f"{norm.op_type} '{norm.name}'"
        gamma = constant_array(norm.inputs[1])
        bias_value = norm.inputs[2] if len(norm.inputs) > 2 else None
        beta = constant_array(bias_value)
        if gamma is None or (bias_value is not None and beta is None):
            return f"scale and bias of {called} are not constants"
        if is_batch_norm(norm) and (why := why_not_affine(norm)) is not None:
            return why
        per_channel = along(a, axis, gamma.size)
        if gamma.ndim != 1 or per_channel is None or not _normalizes(norm, axis, gamma.size):
            return f"the scale or shift varies along another axis than the channels of {called}"
        shifts = bool(per_channel.shift.any())
        if shifts and norm.op_type == "RMSNormalization":
            return f"{called} has no bias that could take a shift"
        new_gamma = in_range(gamma.astype(np.float64) * per_channel.scale, gamma.dtype)
        old = np.zeros(gamma.size) if beta is None else beta.astype(np.float64)
        new_beta = in_range(old * per_channel.scale + per_channel.shift, gamma.dtype)
        if new_gamma is None or new_beta is None:
            return f"the folded scale of {called} would not be finite in {gamma.dtype.name}"
        self.editor.set_constant(norm, 1, new_gamma)
        if beta is not None or shifts:
            self.editor.set_constant(norm, 2, new_beta, name="" if beta is not None else f"{norm.name}.bias")
        return None

    def _fold_sum(self, node: ir.Node, where: str) -> bool:
        """a₁·x + c₁ ± (a₂·x + c₂) ─► (a₁ ± a₂)·x + (c₁ ± c₂)."""
        if node.op_type not in ("Add", "Sub") or len(node.inputs) != 2:
            return False
        left, right = node.inputs
        made = static_shape(node.outputs[0])
        if left is None or right is None or made is None or static_shape(left) != made or static_shape(right) != made:
            return False
        pair = _common_source(left, right)
        if pair is None:
            return False
        sign = 1.0 if node.op_type == "Add" else -1.0
        first, second = pair
        total = Affine(first.map.scale + sign * second.map.scale, first.map.shift + sign * second.map.shift)
        chain = _Chain(first.source, total, (*first.nodes, *second.nodes))
        return self._replace(chain, [*chain.nodes, node], node, where)

    def _replace(self, chain: _Chain, gone: list[ir.Node], end: ir.Node, where: str) -> bool:
        """Puts the shortest form of the chain's map in the place of the nodes `gone`, of which `end` is the last."""
        norms = [node for node in chain.nodes if is_batch_norm(node)]
        total = compact(chain.map)
        target = _shortest(total) if not norms else 1
        if target >= len(gone):
            return False
        why = self._as_batch_norm(chain, norms[-1], gone, end) if norms else self._as_arithmetic(chain.source, total, gone, end)
        if why is not None:
            self.refusals.append(Refusal(where, why))
        return why is None

    def _as_batch_norm(self, chain: _Chain, norm: ir.Node, gone: list[ir.Node], end: ir.Node) -> str | None:
        size = constant_array(norm.inputs[1])
        per_channel = along(compact(chain.map), 1, size.size) if size is not None else None
        if size is None or per_channel is None:
            return f"the scale or shift varies along another axis than the channels of BatchNormalization '{norm.name}'"
        mean, deviation = _mean_and_deviation(norm)
        gamma = in_range(per_channel.scale * deviation, size.dtype)
        beta = in_range(per_channel.shift + mean * per_channel.scale, size.dtype)
        if gamma is None or beta is None:
            return f"the folded scale of BatchNormalization '{norm.name}' would not be finite in {size.dtype.name}"
        self.editor.set_constant(norm, 1, gamma)
        self.editor.set_constant(norm, 2, beta)
        norm.replace_input_with(0, chain.source)
        result = norm.outputs[0]
        if end is not norm:
            end_value = end.outputs[0]
            others = [node for node in gone if node is not norm]
            result.replace_all_uses_with(chain.source)  # only nodes that go read it
            self.editor.replace_value(end_value, result)
            self.editor.remove(others)
        else:
            self.editor.remove([node for node in gone if node is not norm])
        return None

    def _as_arithmetic(self, source: ir.Value, total: Affine, gone: list[ir.Node], end: ir.Node) -> str | None:
        old = end.outputs[0]
        if is_identity(total) and old.is_graph_output() and (source.producer() is None or source.is_graph_output()):
            return "what remains is the identity of a value that is given out already"
        dtype = old.dtype
        assert dtype is not None
        scale, shift = (in_range(array, dtype.numpy()) for array in (total.scale, total.shift))
        if scale is None or shift is None:
            return f"the folded constants would not be finite in {dtype.numpy().name}"
        made_from = [value for node in gone for value in node.inputs]
        value = source
        for op_type, array, idle in (("Mul", scale, 1), ("Add", shift, 0)):
            if (array == idle).all():
                continue
            prefix = next((node.name for node in gone if node.op_type == op_type), end.name)
            constant = self.editor.add_initializer(f"{prefix}.constant", _trimmed(array), made_from=made_from)
            node = ir.node(op_type, [value, constant], name=self.editor.unique_name(f"{prefix}/{op_type}"))
            node.metadata_props.update(end.metadata_props)
            value = node.outputs[0]
            value.name, value.type = self.editor.unique_name(f"{node.name}:0"), ir.TensorType(dtype)
            value.shape = old.shape.copy() if old.shape is not None else None
            self.editor.graph.insert_before(end, node)
        self.editor.replace_value(old, value)
        self.editor.remove(gone)
        return None


@dataclass(frozen=True)
class _Chain:
    """Affine nodes one after another, each read by the next alone.

    Attributes:
        source: What the first reads.
        map: What they do together; the arrays have the rank of the source.
        nodes: The nodes, the first first.
    """

    source: ir.Value
    map: Affine
    nodes: tuple[ir.Node, ...]

    @staticmethod
    def ending_with(value: ir.Value, *, whole: bool) -> _Chain:
        """Reads the chain that makes `value`, as long as possible; it has no nodes where no affine node makes it.

        Args:
            value: What the chain makes.
            whole: Whether `value` itself may be read by several.
        """
        rank = len(value.shape) if value.shape is not None else 0
        chain = _Chain(value, Affine(np.ones((1,) * rank), np.zeros((1,) * rank)), ())
        while (whole and chain.source is value) or is_used_once(chain.source):
            found = read_affine(chain.source.producer())
            graph = chain.nodes[0].graph if chain.nodes else None
            if found is None or found.x.shape is None or is_bias(found.node) or (graph is not None and found.node.graph is not graph):
                break
            chain = _Chain(found.x, compose(chain.map, on_value(found)), (found.node, *chain.nodes))
        return chain


def _common_source(left: ir.Value, right: ir.Value) -> tuple[_Chain, _Chain] | None:
    """Reads both operands of a sum as maps of one value, which is read by nothing else on the way; None when they are not."""
    if left is right:
        identity = _Chain.ending_with(left, whole=False)
        same = _Chain(left, Affine(np.ones_like(identity.map.scale), np.zeros_like(identity.map.shift)), ())
        return same, same
    first, second = _Chain.ending_with(left, whole=False), _Chain.ending_with(right, whole=False)
    if first.source is not second.source:
        return None
    return first, second


def _mean_and_deviation(norm: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Returns μ and √(σ²+ε) of a batch norm whose statistics are constants, in float64."""
    mean, variance = (constant_array(value) for value in norm.inputs[3:5])
    assert mean is not None
    assert variance is not None
    epsilon = float(np.float32(norm.attributes.get_float("epsilon", 1e-5)))  # attributes are float32, the default too
    return mean.astype(np.float64), np.sqrt(variance.astype(np.float64) + epsilon)


def _shortest(total: Affine) -> int:
    return int(not (total.scale == 1).all()) + int(bool(total.shift.any()))


def _trimmed(array: np.ndarray) -> np.ndarray:
    """Without leading axes of length 1, which broadcasting adds again; one number is `[]`."""
    shape = list(array.shape)
    while shape and shape[0] == 1:
        shape.pop(0)
    return np.ascontiguousarray(array.reshape(shape))


def _normalizes(norm: ir.Node, axis: int, channels: int) -> bool:
    """True where the norm's scale `[channels]` belongs to `axis` (for layer norms: only the last axis is normalized)."""
    shape = static_shape(norm.inputs[0])
    if shape is None or shape[axis] != channels:
        return False
    return axis != -1 or norm.attributes.get_int("axis", -1) in (-1, len(shape) - 1)


_NORMS = {
    "BatchNormalization": 1,
    "GroupNormalization": 1,
    "InstanceNormalization": 1,
    "LayerNormalization": -1,
    "RMSNormalization": -1,
}
"""Norms that scale and shift by constants at last, and the axis along which these vary."""
