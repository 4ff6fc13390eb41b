"""The range of every value of a graph on calibration data, and which of them float16 cannot hold.

Float16 ends at 65504, and its smallest number is 2^-24. A network may pass both in places that its inputs and outputs do not show: squares
inside a layer norm, sums before they are divided, exponentials, masks of -1e9, the ε of a division. So the graph is run with a hook on
every value, the steps inside whole operators included (`internals`), in float64, where none of them is lost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import onnx_ir as ir

from edgekit.contracts import Arrays
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.internals import Internal, expose_internals

if TYPE_CHECKING:
    from torch import Tensor

FLOAT16_MAX = 65504.0
"""The largest float16 number."""
OVERFLOW = 65520.0
"""From here on float16 rounds to infinity."""
SMALLEST_NORMAL = 2.0**-14
"""Below this, float16 numbers have less than 11 bits."""
VANISH = 2.0**-25
"""Up to here float16 rounds to zero (half of its smallest number, the tie goes to the even one)."""
_NEGLIGIBLE = 2.0**-12
"""A term of this size beside the other is below half a unit in the last place of their float16 sum."""

_KEEPS_DIVISOR = frozenset({"Sqrt", "Abs", "Neg", "Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Transpose"})
"""Operators whose result is zero where their input is: who divides by the result divides by the input."""
_Kind = Literal["overflow", "vanish"]


@dataclass(frozen=True)
class ValueRange:
    """What a value holds on the calibration data.

    Attributes:
        name: Name of the value; inside a whole operator, that of its result and a label (`norm1/square`).
        node: Name of the node that makes it; for a constant, of the first that reads it; `""` for an input of the graph.
        operator: Operator of that node.
        module: Path of the PyTorch module that the node came from, `""` where it is not known.
        constant: Whether it is an initializer or the result of a Constant node.
        internal: What it is inside its operator, such as `square`, or None for a value of the graph.
        elements: Number of its elements in one batch.
        largest: Largest finite |x|; 0 when there is none.
        smallest: Smallest finite |x| that is not zero; 0 when there is none.
        overflow: Share of all elements that are finite and would be infinite in float16.
        vanish: Share of the nonzero elements that would be zero in float16.
        subnormal: Share of the nonzero elements that would keep less than 11 bits in float16.
        divides: Whether the graph divides by it, perhaps after a root or a change of shape, or takes its logarithm.
        absorbed: Whether it is only added to values beside which it is lost in float16 in any case.
    """

    name: str
    node: str
    operator: str
    module: str
    constant: bool
    internal: str | None
    elements: int
    largest: float
    smallest: float
    overflow: float
    vanish: float
    subnormal: float
    divides: bool
    absorbed: bool


@dataclass(frozen=True)
class Risk:
    """A value that float16 does not hold.

    Attributes:
        range: The value.
        kind: `overflow` or `vanish`.
        why: One sentence with the numbers.
    """

    range: ValueRange
    kind: _Kind
    why: str


def value_ranges(model: ir.Model, calibration: Sequence[Arrays], *, internals: bool = True, dtype: str = "float64") -> list[ValueRange]:
    """Runs `model` on calibration data and returns the range of each floating-point value, in the order in which they are made.

    Args:
        model: The graph; it is not changed.
        calibration: Batches of inputs, `{input name: array}`. Without any, only constants are measured.
        internals: Whether the steps inside whole operators are measured too.
        dtype: `float64`, or `float32` as the graph itself computes: what overflows even there is then not seen as finite.

    Raises:
        UnsupportedOpError: The interpreter does not know an operator.
        DataError: The data do not fit the model.
    """
    import torch

    from edgekit.graph.interpreter import Interpreter

    exposed, steps = expose_internals(model) if internals else (model, {})
    tallies: dict[str, _Tally] = {}
    constants = _constants(exposed)
    done: set[str] = set()

    def hook(name: str, tensor: Tensor) -> None:
        if tensor.is_floating_point() and name not in done:
            tallies.setdefault(name, _Tally()).add(tensor)

    if calibration:
        interpreter = Interpreter(exposed, dtype=dtype)
        with torch.no_grad():
            for batch in calibration:
                interpreter({name: batch[name] for name in interpreter.input_names if name in batch}, hook)
                done |= constants.keys() & tallies.keys()  # once is enough for what does not change
    else:
        for name, tensor in constants.items():
            if tensor.dtype.is_floating_point():
                tallies[name] = _Tally()
                tallies[name].add(torch.from_numpy(tensor.numpy().astype("float64")))
    return _describe(exposed, steps, tallies, constants)


def risks(ranges: Iterable[ValueRange]) -> list[Risk]:
    """The values that float16 does not hold, where it matters.

    - Every value with an element that would become infinite. Infinite elements, as masks have them, are not meant: they stay what they are.
    - A divisor (or what a divisor is the root or a new shape of) with a nonzero element that would become zero: the quotient
      would be infinite or NaN.
    - A constant of one element that would become zero, such as the ε of a norm: whatever it guards against can then happen.
    - Any other value of which all nonzero elements would become zero: what it says is lost as a whole. Not where it is only added to
      values that are 2^12 times as large: such a sum has no digit for it.

    A few small elements among larger ones may vanish without a word: rounding takes as much from their neighbours.
    """
    found = []
    for item in ranges:
        if item.overflow:
            share = f"{item.overflow:.2%}" if item.overflow >= 5e-5 else f"{item.overflow:.1e}"
            found.append(Risk(item, "overflow", f"it reaches {item.largest:.4g}, and float16 ends at 65504 ({share} of its elements)"))
        if not item.vanish:
            continue
        small = f"{item.smallest:.2g}"
        if item.divides:
            found.append(Risk(item, "vanish", f"it is a divisor as small as {small}, which is zero in float16"))
        elif item.constant and item.elements == 1:
            found.append(Risk(item, "vanish", f"it is {small}, which is zero in float16"))
        elif item.vanish == 1 and not item.absorbed:
            found.append(Risk(item, "vanish", f"all of it is at most {item.largest:.2g}, which is zero in float16"))
    return found


@dataclass
class _Tally:
    """Adds up one value over the batches."""

    elements: int = 0
    total: int = 0
    nonzero: int = 0
    largest: float = 0.0
    smallest: float = math.inf
    counts: dict[str, int] = field(default_factory=lambda: {"overflow": 0, "vanish": 0, "subnormal": 0})

    def add(self, tensor: Tensor) -> None:
        self.elements = tensor.numel()
        self.total += tensor.numel()
        sizes = tensor.detach().abs()
        sizes = sizes[sizes.isfinite() & (sizes > 0)]
        if not sizes.numel():
            return
        self.nonzero += sizes.numel()
        self.largest = max(self.largest, float(sizes.max()))
        self.smallest = min(self.smallest, float(sizes.min()))
        self.counts["overflow"] += int((sizes >= OVERFLOW).sum()) if self.largest >= OVERFLOW else 0
        if self.smallest < SMALLEST_NORMAL:
            vanish = int((sizes <= VANISH).sum())
            self.counts["vanish"] += vanish
            self.counts["subnormal"] += int((sizes < SMALLEST_NORMAL).sum()) - vanish


def _constants(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The constants of the main graph by name; an initializer that the caller may override is not one."""
    found = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and not value.is_graph_input()
    }
    for node in model.graph:
        tensor = ir.convenience.get_const_tensor(node.outputs[0]) if node.op_type == "Constant" and node.domain == "" else None
        if tensor is not None:
            found[node.outputs[0].name or ""] = tensor
    return found


def _describe(
    model: ir.Model, steps: Mapping[str, Internal], tallies: Mapping[str, _Tally], constants: Mapping[str, ir.TensorProtocol]
) -> list[ValueRange]:
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.initializers.values())}
    nodes: dict[str, ir.Node] = {}
    for node in model.graph.all_nodes():
        nodes.setdefault(node.name or "", node)
        values.update({output.name: output for output in node.outputs})
    dividers = _dividers(model)
    found = []
    for name, tally in tallies.items():
        value = values.get(name)
        constant, step = name in constants, steps.get(name)
        origin = _origin(name, value, constant, nodes)
        if constant and step is None and origin is not None and origin.outputs[0].name in steps:
            step = steps[origin.outputs[0].name or ""]  # a number inside a whole operator
            step = Internal(step.node, "number")
        if step is not None:
            origin = nodes.get(step.node, origin)
        found.append(
            ValueRange(
                name,
                (origin.name or "") if origin is not None else "",
                origin.op_type if origin is not None else "",
                origin.metadata_props.get(MODULE_KEY, "") if origin is not None else "",
                constant,
                step.label if step is not None else None,
                tally.elements,
                tally.largest,
                tally.smallest if tally.nonzero else 0.0,
                tally.counts["overflow"] / max(tally.total, 1),
                tally.counts["vanish"] / max(tally.nonzero, 1),
                tally.counts["subnormal"] / max(tally.nonzero, 1),
                value in dividers,
                value is not None and _absorbed(value, tally, tallies),
            )
        )
    return found


def _origin(name: str, value: ir.Value | None, constant: bool, nodes: Mapping[str, ir.Node]) -> ir.Node | None:
    """The node that a value belongs to; that of a value inside a function is the call, whose name stands before it."""
    if value is None:
        while "/" in name:
            name = name.rpartition("/")[0]
            if name in nodes:
                return nodes[name]
        return None
    uses = list(value.uses())
    return uses[0].node if constant and uses else value.producer()


def _dividers(model: ir.Model) -> set[ir.Value]:
    """The values of the main graph that it divides by."""
    found: set[ir.Value] = set()
    for node in reversed(model.graph):
        if node.domain != "":
            continue
        if node.op_type == "Div" and len(node.inputs) == 2 and node.inputs[1] is not None:
            found.add(node.inputs[1])
        elif node.op_type in ("Reciprocal", "Log") and node.inputs[0] is not None:
            found.add(node.inputs[0])
        elif node.op_type == "Pow" and len(node.inputs) == 2 and node.inputs[0] is not None:
            exponent = ir.convenience.get_const_tensor(node.inputs[1]) if node.inputs[1] is not None else None
            if (exponent is not None and (exponent.numpy() < 0).any()) or node.outputs[0] in found:
                found.add(node.inputs[0])
        elif node.op_type in _KEEPS_DIVISOR and node.inputs[0] is not None and node.outputs[0] in found:
            found.add(node.inputs[0])
    return found


def _absorbed(value: ir.Value, tally: _Tally, tallies: Mapping[str, _Tally]) -> bool:
    if value.is_graph_output() or not value.uses():
        return False
    for node, index in value.uses():
        other = node.inputs[1 - index] if node.op_type in ("Add", "Sub") and node.domain == "" and len(node.inputs) == 2 else None
        beside = tallies.get(other.name or "") if other is not None else None
        if beside is None or tally.largest > _NEGLIGIBLE * beside.largest:
            return False
    return True
