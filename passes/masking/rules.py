"""What each operator does to a map with unknown places, as data: which keep zeros, which need masking again, how the mask itself follows.

A masked map is a value `[B, C, H, W]` that is zero wherever its mask `[B, 1, H, W]` is zero.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence

import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.fusions.matching import scalar
from edgekit.graph.shapes import static_shape


class Rule(enum.Enum):
    """How a node with masked inputs is rewritten."""

    KEEP = "zero stays zero: the mask stays, nothing is added"
    MASK = "zero does not stay zero: the result is multiplied by the mask"
    CONV = "unknown neighbours are filled, the result is multiplied by the pooled mask"
    POOL = "the result is multiplied by the pooled mask"
    MEAN = "the mean over known places; there is no mask after it"
    MEET = "known where all operands are"
    JOIN = "channels side by side"
    PAD = "the mask is padded as well"
    END = "places and channels become one axis; there is no mask after it"


_ZERO_STAYS = frozenset(
    {
        "Abs", "Celu", "Dropout", "Elu", "Erf", "Gelu", "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "PRelu", "Relu", "Selu",
        "Softsign", "Split", "Swish", "Tanh",
    }
)  # fmt: skip
_ZERO_MOVES = frozenset({"BatchNormalization", "HardSigmoid", "Sigmoid", "Softplus"})
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div"})
_POOLS = frozenset({"AveragePool", "MaxPool"})


def rule(node: ir.Node, masked: Collection[ir.Value]) -> Rule | str:
    """Returns the rule for `node`, some of whose inputs are in `masked`, or why there is none."""
    if node.domain != "":
        return _no_rule(node)
    first = node.inputs[0]
    shape, out = static_shape(first), static_shape(node.outputs[0])
    if shape is None or out is None:
        return "the shapes around it are not known"
    if node.op_type in _ARITHMETIC:
        return _arithmetic(node, masked, out)
    if node.op_type in ("Concat", "Sum", "Max", "Min"):
        return _of_many(node, masked, len(shape))
    if first not in masked or any(x in masked for x in node.inputs[1:]):
        return f"the map is an operand other than the first of {node.op_type}"
    if node.op_type in _ZERO_STAYS:
        return Rule.KEEP if node.op_type != "Split" or node.attributes.get_int("axis", 0) in (1, -3) else _no_rule(node)
    if node.op_type in _ZERO_MOVES:
        return "the batch norm is in training mode" if node.attributes.get_int("training_mode", 0) else Rule.MASK
    if node.op_type == "Clip":
        return Rule.KEEP if _holds_zero(node.inputs[1:]) else Rule.MASK
    if node.op_type == "Conv":
        return Rule.CONV if constant_array(node.inputs[1]) is not None else "the weight is not a constant"
    if node.op_type in _POOLS:
        return Rule.POOL if len(node.outputs) == 1 else "the places of the maxima are asked for"
    if node.op_type == "GlobalAveragePool":
        return Rule.MEAN
    if node.op_type == "ReduceMean":
        axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
        spatial = axes is not None and sorted(int(axis) % 4 for axis in axes.reshape(-1)) == [2, 3]
        return Rule.MEAN if spatial else "it averages over other axes than the two of the image"
    if node.op_type == "Pad":
        return _pad(node)
    if node.op_type == "Flatten" or (node.op_type == "Reshape" and len(out) == 2):
        return Rule.END
    return _no_rule(node)


def _no_rule(node: ir.Node) -> str:
    return f"layer masking has no rule for {node.op_type}"


def _arithmetic(node: ir.Node, masked: Collection[ir.Value], out: tuple[int, ...]) -> Rule | str:
    maps = [x for x in node.inputs if x in masked]
    if any(static_shape(x) != out for x in maps):
        return "the map is repeated along an axis"
    if node.op_type == "Div":
        return Rule.KEEP if node.inputs[1] not in masked else "it divides by a map that has zeros"
    if len(maps) == 2:
        return Rule.MEET
    return Rule.KEEP if node.op_type == "Mul" else Rule.MASK


def _of_many(node: ir.Node, masked: Collection[ir.Value], rank: int) -> Rule | str:
    if any(x not in masked for x in node.inputs):
        return f"{node.op_type} of maps with something that has no mask"
    if node.op_type != "Concat":
        shapes = {static_shape(x) for x in node.inputs}
        return Rule.MEET if len(shapes) == 1 else "the map is repeated along an axis"
    return Rule.JOIN if node.attributes.get_int("axis", 0) in (1, 1 - rank) else "it joins maps along another axis than the channels"


def _holds_zero(limits: Sequence[ir.Value | None]) -> bool:
    """True where zero lies between the limits of a Clip."""
    low, high = ([*limits, None, None])[:2]
    floor, roof = (0.0 if limit is None else scalar(limit) for limit in (low, high))
    return floor is not None and roof is not None and floor <= 0 <= roof


def _pad(node: ir.Node) -> Rule | str:
    pads = constant_array(node.inputs[1])
    zero = len(node.inputs) < 3 or node.inputs[2] is None or scalar(node.inputs[2]) == 0
    if node.attributes.get_string("mode", "constant") != "constant" or not zero or len(node.inputs) > 3:
        return "it pads with other values than zero"
    if pads is None or pads.size != 8 or pads.reshape(2, 4)[:, :2].any():
        return "it pads other axes than the two of the image"
    return Rule.PAD
