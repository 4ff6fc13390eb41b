"""The pass `fold-input-affine`: scales and shifts before linear operators, and those of norms, disappear into the weights."""

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
from edgekit.passes.reparameterize.affine import AffineNode, compose, read_affine
from edgekit.passes.reparameterize.affine_paths import (
    compact,
    constant_pad,
    forward,
    is_constant_pad,
    is_identity,
    on_value,
    passes_through,
)
from edgekit.passes.reparameterize.batch_norm import Affine, is_batch_norm, why_not_affine
from edgekit.passes.reparameterize.linear_consumers import Absorption, elements, is_linear_reader, plan
from edgekit.passes.reparameterize.linear_producers import is_bias

_MOST_ROUNDS = 8


@dataclass(frozen=True)
class FoldInputAffine(Pass):
    """Fold scales and shifts per channel into all linear operators that read them.

    Before:  x ─ BatchNormalization (or Mul, Add, Sub, Div, Neg by constants) ─┬─ MatMul(W₁) ─ Add(b₁) ─►
                                                                               └─ AveragePool ─ Conv(W₂, b₂) ─►
    After:   x ─┬─ MatMul(diag(a)·W₁) ─ Add(b₁ + W₁ᵀ·c) ─►
                └─ AveragePool ─ Conv(W₂·a, b₂ + Σ W₂·c) ─►

    Before:  x ─ LayerNormalization(γ, β) ─ MatMul(W) ─ Add(b) ─►          (RMSNormalization and norms by group or instance as well)
    After:   x ─ LayerNormalization(1) ─ MatMul(diag(γ)·W) ─ Add(b + Wᵀ·β) ─►

    The map is followed through operators that it commutes with: layout operators, pooling, averages and interpolation over other axes.
    Biases are made where they are missing. A map stays when

    1. one of its readers, through these operators, is no linear operator with constant weight of its own, or it is given out;
    2. it varies along another axis than the one that the weight contracts;
    3. a convolution pads with zeros, which come after the shift (a pure scale folds all the same, and so do pads that repeat elements),
       and neither of two repairs is a gain: a table of biases over the positions in place of the node, or a Pad by the value that the map
       sends to zero, where that is one for all channels. Of Mul ─ Add or a longer chain the scale folds then and one Add remains;
    4. it would take more nodes or bytes: a node must go that a new Add does not replace, or bytes must fall; of a norm, parameters fall;
    5. the folded weights would not be finite in their dtype.

    Sub and Div by the mean and deviation of a data set before the first convolution are such a map: the graph then reads raw values there.

    Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", equation 14;
    Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", section 3.1 (norms of transformers).
    """

    name: ClassVar[str] = "fold-input-affine"
    effect: ClassVar[Effect] = Effect.EXACT
    default_order: ClassVar[int | None] = None
    removes: ClassVar[frozenset[str]] = frozenset({"BatchNormalization"})

    def apply(self, model: ir.Model, context: Context) -> int:
        """Folds in the main graph until nothing more folds; returns how many maps were folded."""
        if not any(_is_candidate(node) for node in model.graph):
            return 0
        folder = _Folder(GraphEditor(model), context)
        for _ in range(_MOST_ROUNDS):
            folder.refusals.clear()
            candidates = [node for node in model.graph if _is_candidate(node)]
            if not sum(folder.fold(node) for node in reversed(candidates)):  # a map folds once those after it have
                break
        context.refusals += folder.refusals
        if folder.folded:
            merge_layout(model)  # what stood around a map may cancel out
        return folder.folded


_NORMS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
"""Norms by statistics of the input, which scale and shift by constants at last."""


def _is_candidate(node: ir.Node) -> bool:
    if node.domain != "" or not node.inputs or not node.outputs:
        return False
    if node.op_type in _NORMS:
        return node.inputs[0] is not None and node.inputs[0].dtype in FLOATS
    return node.op_type in ("Add", "Sub", "Mul", "Div", "Neg", "BatchNormalization") and node.outputs[0].dtype in FLOATS


@dataclass(frozen=True)
class _Reach:
    """Where a map on a value must be taken in.

    Attributes:
        readers: Per linear operator the map on what it multiplies.
        pads: Per Pad by a constant the value that it must have instead.
        why: Why the map cannot be taken in everywhere, or None.
    """

    readers: dict[ir.Node, Affine]
    pads: dict[ir.Node, float]
    why: str | None


class _Folder:
    """Tries nodes one by one and keeps what to report.

    Args:
        editor: Edits the graph.
        context: Asked for places to skip, told of those rewritten.
    """

    def __init__(self, editor: GraphEditor, context: Context) -> None:
        self.editor = editor
        self.context = context
        self.folded = 0
        self.refusals: list[Refusal] = []
        self._filled: dict[tuple[float, tuple[int, ...], np.dtype], ir.Value] = {}

    def fold(self, node: ir.Node) -> bool:
        """Folds the map of `node`, with those before it, into what reads it; True when it did."""
        where = node.name or node.op_type
        if node.graph is None or self.context.skips(where):
            return False
        why = self._fold_norm(node) if node.op_type in _NORMS else self._fold_map(node)
        if why is None:
            self.folded += 1
            self.context.applied(where)
        elif why:
            self.refusals.append(Refusal(where, why))
        return why is None

    def _fold_map(self, node: ir.Node) -> str | None:
        """Folds an affine node: the longest chain of such nodes that ends with it first. "" where nothing nearly matched."""
        if is_batch_norm(node) and (why := why_not_affine(node)) is not None:
            return why
        chains = _chains(node)
        if not chains:
            return ""
        whys = []
        for chain in chains:
            why = self._fold_chain(chain)
            if why is None or not why:
                return why
            if len(chain) > 1 and not any(is_batch_norm(found.node) for found in chain) and self._leave_shift(chain):
                return None
            whys.append(why)
        return whys[0]

    def _fold_chain(self, chain: list[AffineNode]) -> str | None:
        end, total = chain[-1].output, compact(_total(chain))
        if is_identity(total):
            return ""
        reach = _follow(end, total)
        if not reach.readers:
            return ""
        if reach.why is not None:
            return "" if is_bias(chain[-1].node) else reach.why  # biases of linear layers are read by residual sums too
        plans = _plans(reach)
        if isinstance(plans, str):
            return plans
        gone = sum(elements(value) for found in chain for value in found.node.inputs)
        added, new = sum(item.new_nodes for item in plans), sum(item.new_elements for item in plans) - gone
        table = next((item.node for item in plans if item.new_nodes and item.node.op_type == "Conv"), None)
        gain = added < len(chain) and (new <= 0 or table is None)  # biases of channels may be made where a node goes, tables not
        if not gain and not (added == len(chain) and new < 0):
            if table is not None:
                return f"Conv '{table.name}' pads with zeros after the shift: what repairs that adds {added} nodes and {new} elements"
            return f"the shift would take {added} new nodes for biases in place of {len(chain)}, and {new} more elements"
        source = chain[0].x
        if end.is_graph_output():
            return f"'{end.name}' is an output of the graph"
        self._act(reach, plans)
        end.replace_all_uses_with(source)
        self.editor.remove([found.node for found in chain])
        return None

    def _leave_shift(self, chain: list[AffineNode]) -> bool:
        """a ⊙ x + c before padding ─► x + c/a, and the scale a in the weights."""
        end, total = chain[-1].output, compact(_total(chain))
        dtype = end.dtype
        if dtype is None or not total.scale.all() or (total.scale == 1).all():
            return False
        shift = in_range(total.shift / total.scale, dtype.numpy())
        reach = _follow(end, Affine(total.scale, np.zeros_like(total.shift)))
        plans = _plans(reach) if reach.why is None and reach.readers else ""
        if shift is None or isinstance(plans, str) or end.is_graph_output() or any(item.new_nodes for item in plans):
            return False
        self._act(reach, plans)
        constant = self.editor.add_initializer(f"{chain[-1].node.name}.shift", shift, made_from=[v for f in chain for v in f.node.inputs])
        add = ir.node("Add", [chain[0].x, constant], name=self.editor.unique_name(f"{chain[-1].node.name}/Add"))
        add.metadata_props.update(chain[-1].node.metadata_props)
        add.outputs[0].name = self.editor.unique_name(f"{add.name}:0")
        self.editor.graph.insert_before(chain[-1].node, add)
        self.editor.replace_value(end, add.outputs[0])
        self.editor.remove([found.node for found in chain])
        return True

    def _fold_norm(self, norm: ir.Node) -> str | None:
        """Folds γ and β of a norm, whose normalization stays."""
        found = _scale_and_bias(norm)
        if found is None or is_identity(found):
            return ""
        reach = _follow(norm.outputs[0], found)
        if not reach.readers:
            return ""
        if reach.why is not None:
            return reach.why
        plans = _plans(reach)
        if isinstance(plans, str):
            return plans
        scaled = not (found.scale == 1).all()
        gone = (elements(norm.inputs[1]) if scaled else 0) + sum(elements(value) for value in norm.inputs[2:3])
        if any(item.new_nodes for item in plans) or sum(item.new_elements for item in plans) > gone or not gone:
            return "its scale and bias stay: what reads it has no biases that could take the shift, or they are read elsewhere"
        self._act(reach, plans)
        if scaled:
            self._fill(norm, 1, 1.0)
        if len(norm.inputs) > 2 and norm.op_type == "LayerNormalization":
            bias = norm.inputs[2]
            norm.resize_inputs(2)
            self.editor.drop_unused([bias] if bias is not None else [])
        elif len(norm.inputs) > 2:
            self._fill(norm, 2, 0.0)
        return None

    def _fill(self, norm: ir.Node, index: int, number: float) -> None:
        """Makes a required input of a norm all `number`, in one constant that all norms of its size read."""
        old = norm.inputs[index]
        array = constant_array(old)
        assert old is not None
        assert array is not None
        key = (number, array.shape, array.dtype)
        if key not in self._filled:
            name = f"{'ones' if number else 'zeros'}_{'x'.join(map(str, array.shape))}"
            self._filled[key] = self.editor.add_initializer(name, np.full_like(array, number))
        norm.replace_input_with(index, self._filled[key])
        self.editor.drop_unused([old])

    def _act(self, reach: _Reach, plans: list[Absorption]) -> None:
        for item in plans:
            item.act(self.editor)
        for pad, value in reach.pads.items():
            dtype = pad.outputs[0].dtype
            assert dtype is not None
            absent = len(pad.inputs) < 3 or pad.inputs[2] is None
            self.editor.set_constant(pad, 2, np.array(value, dtype.numpy()), name=f"{pad.name}.value" if absent else "")


def _chains(node: ir.Node) -> list[list[AffineNode]]:
    """The chains of affine nodes that end with `node`, the longest first; all but the last node are read by the next alone."""
    chain: list[AffineNode] = []
    found = read_affine(node)
    while found is not None and found.x.shape is not None and found.node.graph is node.graph:
        chain.insert(0, found)
        if not is_used_once(found.x):
            break
        found = read_affine(found.x.producer())
    return [chain[start:] for start in range(len(chain))]


def _total(chain: list[AffineNode]) -> Affine:
    total = on_value(chain[0])
    for found in chain[1:]:
        total = compose(on_value(found), total)
    return total


def _follow(start: ir.Value, a: Affine) -> _Reach:
    """Follows the map `a` from `start`, where it is taken off, to all that read it."""
    linear: list[tuple[ir.Node, ir.Value]] = []
    path: set[ir.Node] = set()
    obstacles: list[str] = []
    stack = [start]
    while stack:
        value = stack.pop()
        if value.is_graph_output():
            obstacles.append(f"'{value.name}' is an output of the graph")
        for use in value.uses():
            reader = use.node
            called = f"{reader.op_type} '{reader.name}'"
            if reader.graph is not start.producer().graph:  # type: ignore[union-attr]
                obstacles.append(f"{called} in another graph reads it")
            elif is_linear_reader(reader, use.idx):
                linear.append((reader, value))
            elif not passes_through(reader) or (reader.op_type != "Concat" and use.idx != 0):
                obstacles.append(f"{called} reads it, which cannot take a scale and shift in")
            elif reader not in path:
                path.add(reader)
                stack.extend(output for output in reader.outputs if output.uses() or output.is_graph_output())
    if obstacles or not linear:
        return _Reach({reader: a for reader, _ in linear}, {}, obstacles[0] if obstacles else None)
    return _evaluate(start, a, linear, path)


def _evaluate(start: ir.Value, a: Affine, linear: list[tuple[ir.Node, ir.Value]], path: set[ir.Node]) -> _Reach:
    maps: dict[ir.Value, Affine] = {start: a}
    pads: dict[ir.Node, float] = {}
    why: str | None = None

    def map_of(value: ir.Value | None) -> Affine | None:
        nonlocal why
        if value is None or value in maps:
            return maps[value] if value is not None else None
        node = value.producer()
        if node is None or node not in path:
            return None
        inputs = [map_of(read) for read in node.inputs]
        if why is not None:
            return None
        if is_constant_pad(node) and inputs[0] is not None:
            fill = constant_pad(node, inputs[0])
            if fill is None or in_range(np.array(fill), np.dtype(node.outputs[0].dtype.numpy())) is None:  # type: ignore[union-attr]
                why = f"Pad '{node.name}' writes a value that is not one number before the map"
                return None
            pads[node] = fill
            results: list[Affine] | str = [inputs[0]]
        else:
            results = forward(node, inputs)
        if isinstance(results, str):
            why = results
            return None
        maps.update(zip(node.outputs, results, strict=False))
        return maps[value]

    readers = {reader: found for reader, value in linear if (found := map_of(value)) is not None}
    return _Reach(readers or {reader: a for reader, _ in linear}, pads, why)


def _plans(reach: _Reach) -> list[Absorption] | str:
    plans = []
    for reader, a in reach.readers.items():
        result = plan(reader, a)
        if isinstance(result, str):
            return result
        plans.append(result)
    return plans


def _scale_and_bias(norm: ir.Node) -> Affine | None:
    """γ and β of a norm with the rank of its output; None where they are not constants of the usual shape."""
    shape = static_shape(norm.inputs[0])
    arrays = [array for value in norm.inputs[1:3] if (array := constant_array(value)) is not None]
    if shape is None or not arrays or len(arrays) != sum(value is not None for value in norm.inputs[1:3]):
        return None
    if norm.op_type in ("GroupNormalization", "InstanceNormalization"):
        if any(array.shape != (shape[1],) for array in arrays):
            return None
        placed = [array.reshape(1, -1, *[1] * (len(shape) - 2)) for array in arrays]
    else:
        normalized = len(shape) - norm.attributes.get_int("axis", -1) % len(shape)
        if any(array.ndim > normalized for array in arrays):
            return None
        placed = [array.reshape((1,) * (len(shape) - array.ndim) + array.shape) for array in arrays]
    gamma, beta = placed[0].astype(np.float64), placed[1].astype(np.float64) if len(placed) > 1 else np.zeros((1,) * len(shape))
    return compact(Affine(gamma, beta)) if np.isfinite(gamma).all() and np.isfinite(beta).all() else None
