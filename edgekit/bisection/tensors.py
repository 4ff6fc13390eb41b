"""Level 4: the operand of the node at fault, found by giving the node the right one in its place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.bisection.judge import Judge
from edgekit.bisection.nodes import NodeFound, Pair, between
from edgekit.bisection.particulars import Difference, difference
from edgekit.bisection.runner import Runner, rounded
from edgekit.contracts import Arrays
from edgekit.errors import LoweringError, SourceError, UnsupportedOpError
from edgekit.graph.parts import isolated, part

Operands = list[np.ndarray | None]


@dataclass(frozen=True)
class TensorFound:
    """What level 4 found.

    Attributes:
        name: Name of the value, or of the attribute.
        role: `operand 1`, `attribute`, `operands` (in the wrong order), `operator`, or `result`, where no operand is at fault.
        text: What is wrong with it.
        difference: Where it differs most; None of what is no tensor.
        tried: How many exchanges were run.
    """

    name: str
    role: str
    text: str
    difference: Difference | None
    tried: int


class _Trial:
    """Runs variants of one node against the right result."""

    def __init__(
        self, node: ir.Node, model: ir.Model, output: str, expected: np.ndarray, judge: Judge, precision: str, runner: Runner
    ) -> None:
        self.node, self.model, self.output, self.expected = node, model, output, expected
        self.judge, self.precision, self.runner = judge, precision, runner
        self.tried = 0

    def good(self, node: ir.Node, operands: Operands) -> bool:
        """Whether `node` on `operands` gives the right result; a variant that cannot run does not."""
        self.tried += 1
        try:
            model = isolated(node, self.model, len(operands))
            for value in model.graph.inputs:
                array = operands[int((value.name or "").rpartition("_")[2])]
                if array is not None:
                    value.type = ir.TensorType(ir.DataType.from_numpy(array.dtype))
            feed = {f"operand_{index}": array for index, array in enumerate(operands) if array is not None}
            for output in model.graph.outputs:
                output.type = None
            found = self.runner.run(model, feed)
        except (UnsupportedOpError, SourceError, LoweringError):
            return False
        index = [output.name for output in self.node.outputs].index(self.output)
        result = found.get(node.outputs[index].name or "") if index < len(node.outputs) else None
        return result is not None and not self.judge.differs(self.expected, result, self.precision)


def find_tensor(found: NodeFound, pair: Pair, judge: Judge, precision: str, runner: Runner) -> TensorFound:
    """Finds what of the node is at fault, between two graphs.

    Its attributes and operands are exchanged one by one for those of its counterpart, until its result is right. Weights that have no
    counterpart, as those that a pass computed, are told apart by what the region gives for inputs of zero.
    """
    half = precision == "fp16"
    name = found.output.name or ""
    other = next((o for o in pair.names.get(name, ()) if o in pair.good_values), None)
    if other is None:
        return TensorFound(name, "result", "it has no counterpart", None, 0)
    expected, wrong = pair.good_values[other], pair.bad_values[name]
    counterpart = _producer(pair.good, other)
    node = found.node
    own = next((output.name or "" for output in node.outputs if output is found.output), None)
    if counterpart is not None and own is not None:
        trial = _Trial(node, pair.bad, own, expected, judge, precision, runner)
        exchanged = _exchange(node, counterpart, pair, trial, half)
        if exchanged is not None:
            return exchanged
        tried = trial.tried
    else:
        tried = 0
    if precision in ("fp16", "bf16"):
        operand = _rounding(found, pair, judge, precision, runner)
        if operand is not None:
            return operand
        final = difference(expected, wrong, half=half)
        return TensorFound(name, "result", final.particular or "it loses its digits inside the operator", final, tried)
    if own is not None:
        for donor in _donors(found, pair, other):
            trial = _Trial(node, pair.bad, own, expected, judge, precision, runner)
            attribute = _attribute(node, donor, _right_operands(node, pair), trial)
            if attribute is not None:
                return attribute
    affine = _affine(found, pair, judge, precision, runner, other)
    if affine is not None:
        return affine
    final = difference(expected, wrong)
    return TensorFound(name, "result", final.particular, final, tried)


def find_operand(
    found: NodeFound, values: Arrays, wrong: np.ndarray, precision: str, judge: Judge, model: ir.Model, runner: Runner
) -> TensorFound:
    """Finds which operand a target's precision spoils, by rounding one at a time; `result` where the operator itself is at fault."""
    expected = values[found.output.name or ""]
    operand = _round_operands(found.node, model, expected, found.output.name or "", values, judge, precision, runner)
    if operand is not None:
        return operand
    final = difference(expected, wrong, half=precision == "fp16")
    return TensorFound(found.output.name or "", "result", final.particular or "the target computes this operator otherwise", final, 0)


def _producer(model: ir.Model, name: str) -> ir.Node | None:
    return next((node for node in model.graph for output in node.outputs if output.name == name), None)


def _donors(found: NodeFound, pair: Pair, other: str) -> list[ir.Node]:
    """Nodes of the same operator that the reference has in place of the region, whose attributes a merged node should have."""
    values = {output.name: output for node in pair.good.graph for output in node.outputs}
    stops = [values[name] for name in found.inputs.values() if name in values]
    return [node for node in between(pair.good, values[other], stops) if node.op_type == found.node.op_type] if other in values else []


def _operands(node: ir.Node, values: Arrays) -> Operands:
    return [None if value is None else values.get(value.name or "") for value in node.inputs]


def _right_operands(node: ir.Node, pair: Pair) -> Operands:
    """The operands of a node of the bad graph: weights as they are, other values as the reference has them."""
    operands: Operands = []
    for value in node.inputs:
        if value is None:
            operands.append(None)
            continue
        name = value.name or ""
        own = pair.bad_values.get(name)
        others = [pair.good_values[o] for o in pair.names.get(name, ()) if o in pair.good_values]
        fitting = [o for o in others if own is not None and o.shape == own.shape]
        if value.is_initializer() or not fitting or own is None:
            operands.append(own)
        else:
            nearest = min(
                fitting, key=lambda array: float(np.nan_to_num(np.abs(array.astype(np.float64) - own.astype(np.float64)), nan=0).sum())
            )
            operands.append(nearest.astype(own.dtype))
    return operands


def _exchange(node: ir.Node, other: ir.Node, pair: Pair, trial: _Trial, half: bool) -> TensorFound | None:
    mine, theirs = _right_operands(node, pair), _operands(other, pair.good_values)
    if not half and (node.domain, node.op_type) != (other.domain, other.op_type):
        if trial.good(other, theirs) and len(theirs) == len(mine):
            return TensorFound(node.op_type, "operator", f"it is {node.op_type} where {other.op_type} was", None, trial.tried)
        return None
    wrong_attribute = _attribute(node, other, mine, trial)
    if wrong_attribute is not None:
        return wrong_attribute
    if _is_permuted(node, other, pair) and trial.good(node, theirs):
        names = [value.name if value is not None else "–" for value in node.inputs]
        wrong = [name for name, value in zip(names, other.inputs, strict=True) if value is None or name != value.name]
        return TensorFound(", ".join(map(str, wrong)), "operands", "they stand in the wrong order", None, trial.tried)
    for index, right in enumerate(theirs):
        own = mine[index] if index < len(mine) else None
        if right is None or (own is not None and own.shape == right.shape and np.array_equal(own, right)):
            continue
        variant = [*mine, *[None] * (index + 1 - len(mine))]
        variant[index] = right if own is None or own.dtype == right.dtype else right.astype(own.dtype)
        if not trial.good(node, variant):
            continue
        value = node.inputs[index] if index < len(node.inputs) else None
        if own is None or value is None:
            missing = other.inputs[index]
            assert missing is not None
            return TensorFound(missing.name or "", f"operand {index}", "it is missing", None, trial.tried)
        detail = difference(right, own, weight=value.is_initializer(), half=half)
        return TensorFound(value.name or "", f"operand {index}", detail.particular, detail, trial.tried)
    for index in range(len(theirs), len(mine)):
        value = node.inputs[index]
        if value is not None and trial.good(node, mine[:index]):
            return TensorFound(value.name or "", f"operand {index}", "it does not belong here", None, trial.tried)
    return None


def _attribute(node: ir.Node, other: ir.Node, operands: Operands, trial: _Trial) -> TensorFound | None:
    """The attribute of `node` that is to be as `other` has it, or all that differ where one alone does not help."""
    names = [
        name
        for name in sorted({*node.attributes, *other.attributes})
        if _shown(node.attributes.get(name)) != _shown(other.attributes.get(name))
    ]
    for group in [[name] for name in names] + ([names] if len(names) > 1 else []):
        variant = node
        for name in group:
            variant = _with_attribute(variant, name, other.attributes.get(name))
        if trial.good(variant, operands):
            texts = [f"{_shown(node.attributes.get(name))} instead of {_shown(other.attributes.get(name))}" for name in group]
            return TensorFound(", ".join(group), "attribute", ", ".join(texts), None, trial.tried)
    return None


def _with_attribute(node: ir.Node, name: str, attribute: ir.Attr | None) -> ir.Node:
    kept = [item for key, item in node.attributes.items() if key != name]
    copy = ir.Node(
        node.domain, node.op_type, [None if value is None else ir.Value(name=value.name) for value in node.inputs],
        [*kept, *([] if attribute is None else [attribute])], num_outputs=len(node.outputs), name=node.name, version=node.version,
    )  # fmt: skip
    for new, old in zip(copy.outputs, node.outputs, strict=True):
        new.name = old.name
    return copy


def _shown(attribute: ir.Attr | None) -> str:
    if attribute is None:
        return "the default"
    if attribute.type == ir.AttributeType.FLOAT:
        return f"{attribute.value:g}"
    return str(list(attribute.value)) if isinstance(attribute.value, tuple | list) else str(attribute.value)


def _is_permuted(node: ir.Node, other: ir.Node, pair: Pair) -> bool:
    mine = [value.name if value is not None else "" for value in node.inputs]
    theirs = [value.name if value is not None else "" for value in other.inputs]
    return mine != theirs and sorted(map(str, mine)) == sorted(map(str, theirs))


def _rounding(found: NodeFound, pair: Pair, judge: Judge, precision: str, runner: Runner) -> TensorFound | None:
    """Which operand of the reference's node is spoiled by the precision alone."""
    for other in pair.names.get(found.node.outputs[0].name or "", ()):
        node = _producer(pair.good, other)
        if node is not None and node.op_type == found.node.op_type:
            return _round_operands(node, pair.good, pair.good_values[other], other, pair.good_values, judge, precision, runner)
    named = next((node for node in pair.good.graph if node.name == found.node.name), None)
    if named is None:
        return None
    output = named.outputs[0].name or ""
    return _round_operands(named, pair.good, pair.good_values[output], output, pair.good_values, judge, precision, runner)


def _round_operands(
    node: ir.Node, model: ir.Model, expected: np.ndarray, output: str, values: Arrays, judge: Judge, precision: str, runner: Runner
) -> TensorFound | None:
    trial = _Trial(node, model, output, expected, judge, precision, runner)
    operands = _operands(node, values)
    for index, (value, array) in enumerate(zip(node.inputs, operands, strict=True)):
        if value is None or array is None or (narrow := rounded(array, precision)) is array:
            continue
        variant = list(operands)
        variant[index] = narrow
        if not trial.good(node, variant):
            detail = difference(array, narrow, weight=value.is_initializer(), half=precision == "fp16")
            return TensorFound(value.name or "", f"operand {index}", detail.particular or f"rounded to {precision}", detail, trial.tried)
    return None


def _affine(found: NodeFound, pair: Pair, judge: Judge, precision: str, runner: Runner, other: str) -> TensorFound | None:
    """Of a linear node on weights that a pass computed: whether the linear part is wrong, the constant part, or both.

    The region and its counterpart run on inputs of zero too: what they differ by there is the bias, and the rest the weight.
    """
    if found.node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Add") or not found.inputs:
        return None
    weights = [value for value in found.node.inputs if value is not None and value.is_initializer()]
    if not weights:
        return None
    first = {value.name: value for node in pair.good.graph for value in (*node.inputs, *node.outputs) if value is not None}
    second = {value.name: value for node in pair.bad.graph for value in (*node.inputs, *node.outputs) if value is not None}
    try:
        bad = part(pair.bad, [found.output], {second[name] for name in found.inputs})
        good = part(pair.good, [first[other]], {first[name] for name in found.inputs.values()})
        zero = [{str(v.name): np.zeros_like(pair.bad_values[str(v.name)]) for v in bad.graph.inputs},
                {str(v.name): np.zeros_like(pair.good_values[str(v.name)]) for v in good.graph.inputs}]  # fmt: skip
        wrong = runner.run(bad, zero[0])[found.output.name or ""]
        right = runner.run(good, zero[1])[other]
    except (UnsupportedOpError, SourceError, LoweringError, ValueError, KeyError):
        return None
    linear_right = pair.good_values[other].astype(np.float64) - right
    linear_wrong = pair.bad_values[found.output.name or ""].astype(np.float64) - wrong
    parts: list[tuple[ir.Value, str, Difference]] = []
    bias = weights[1] if len(weights) > 1 else weights[0] if found.node.op_type == "Add" else None
    weight = None if found.node.op_type == "Add" else weights[0]
    scale = float(np.abs(linear_right).max()) + float(np.abs(right).max())
    if weight is not None and _relative(linear_right, linear_wrong, scale) > _limit(judge, precision):
        parts.append((weight, "what it gives of its inputs", difference(linear_right, linear_wrong)))
    if bias is not None and _relative(right, wrong, scale) > _limit(judge, precision):
        parts.append((bias, "what it gives without them", difference(right, wrong)))
    if not parts:
        return None
    operands = list(found.node.inputs)
    names = ", ".join(value.name or "" for value, _, _ in parts)
    role = " and ".join(f"operand {operands.index(value)}" for value, _, _ in parts)
    text = "; ".join(f"{what}: {detail.particular or 'wrong'}" for _, what, detail in parts)
    return TensorFound(names, role, text, parts[0][2], 2)


def _relative(right: np.ndarray, wrong: np.ndarray, scale: float) -> float:
    return float(np.abs(right - wrong).max()) / scale if scale else 0.0


def _limit(judge: Judge, precision: str) -> float:
    from edgekit.verify import tolerance

    return float(10.0 ** (-judge.min_sqnr / 20.0)) if judge.min_sqnr is not None else tolerance(precision).relative * 0.1
