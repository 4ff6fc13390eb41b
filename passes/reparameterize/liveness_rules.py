"""For each operator: which parts of its inputs are needed for a part of its output. One small function each, in one table.

A rule gets the wanted places per output axis and answers with a `Narrowing`: the part that the operator, unchanged but for a few numbers,
then computes (at least what is wanted) from the given parts of its inputs. Two promises make the answer exact: run on those parts the
operator gives exactly that part of its result, in the same order; and it computes no more than before. Operators without a rule need
everything. Shapes are static; the operators are those of opset 23.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.passes.reparameterize.boxes import WHOLE, Box, Places, shape_of
from edgekit.passes.reparameterize.reshaping import reshaped

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Narrowing:
    """How a node computes a part of its output.

    Attributes:
        output: The part that it computes.
        inputs: Per input the part that it reads; None where it does not read the input at all and can do without it.
        attributes: Attributes that change.
        constants: Inputs that become another constant vector, int64 (a target shape).
    """

    output: Box
    inputs: tuple[Box | None, ...]
    attributes: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[int, Shape] = field(default_factory=dict)


@dataclass(frozen=True)
class Operands:
    """The node that a rule is asked about, with static shapes.

    Attributes:
        node: The node.
        shapes: Shape per input, `()` for one that is absent.
        output: Shape of the output asked about.
    """

    node: ir.Node
    shapes: tuple[Shape, ...]
    output: Shape

    def whole_inputs(self) -> list[Box | None]:
        """All of every input, to be narrowed by a rule."""
        return [WHOLE] * len(self.shapes)


Rule = Callable[[Operands, Box], Narrowing | None]
"""Called with the wanted places of every output axis; None: the operator cannot be narrowed as it stands here."""


def broadcast(box: Box, shape: Shape, output: Shape) -> Box:
    """Returns the part of an operand of `shape` that is read for `box` of the result, to which it is broadcast."""
    spare = len(output) - len(shape)
    return tuple(None if size != output[axis] else box[axis] for axis, size in enumerate(shape, spare))


def without(box: Box, axes: Sequence[int]) -> Box:
    """Returns the box with all places along `axes` (which may be negative)."""
    full = {axis % len(box) for axis in axes}
    return tuple(None if axis in full else places for axis, places in enumerate(box))


def _elementwise(at: Operands, box: Box) -> Narrowing | None:
    """Each result comes from the operands' elements at the same place."""
    return Narrowing(box, tuple(broadcast(box, shape, at.output) for shape in at.shapes))


def _expand(at: Operands, box: Box) -> Narrowing | None:
    inputs = (broadcast(box, at.shapes[0], at.output), WHOLE)
    return Narrowing(box, inputs, constants={1: shape_of(box, at.output)})


def _along_axis(default: int) -> Rule:
    """Softmax and norms along one axis: everything along it is needed."""

    def rule(at: Operands, box: Box) -> Narrowing | None:
        free = without(box, [at.node.attributes.get_int("axis", default)])
        return Narrowing(free, (free,))

    return rule


def _normalization(at: Operands, box: Box) -> Narrowing | None:
    """LayerNormalization, RMSNormalization: everything from `axis` on is needed; scale and bias are broadcast."""
    first = at.node.attributes.get_int("axis", -1) % len(box)
    return _elementwise(at, without(box, range(first, len(box))))


def _batch_norm(at: Operands, box: Box) -> Narrowing | None:
    """BatchNormalization in inference: channel c needs the four parameters of c."""
    if at.node.attributes.get_int("training_mode", 0):
        return None
    return Narrowing(box, (box, *[(box[1],)] * 4))


def _instance_norm(at: Operands, box: Box) -> Narrowing | None:
    free = without(box, range(2, len(box)))
    return Narrowing(free, (free, (free[1],), (free[1],)))


def _batch_only(at: Operands, box: Box) -> Narrowing | None:
    """GroupNormalization: samples are independent."""
    free = without(box, range(1, len(box)))
    return Narrowing(free, (free, *at.whole_inputs()[1:]))


def _pooling(at: Operands, box: Box) -> Narrowing | None:
    """Pooling over space: samples and channels are independent."""
    free = without(box, range(2, len(box)))
    return Narrowing(free, (free,))


def _matmul(at: Operands, box: Box) -> Narrowing | None:
    """MatMul `[…, M, K] · […, K, N]`: rows M belong to the left operand, columns N to the right one."""
    left, right = at.shapes
    if len(left) < 2 or len(right) < 2:
        return None
    batch, size = box[:-2], at.output[:-2]
    return Narrowing(
        box,
        (
            (*broadcast(batch, left[:-2], size), box[-2], None),
            (*broadcast(batch, right[:-2], size), None, box[-1]),
        ),
    )


def _gemm(at: Operands, box: Box) -> Narrowing | None:
    """Gemm: as MatMul, with either operand transposed, and an addend that is broadcast."""
    flags = at.node.attributes
    left = (None, box[0]) if flags.get_int("transA", 0) else (box[0], None)
    right = (box[1], None) if flags.get_int("transB", 0) else (None, box[1])
    return Narrowing(box, (left, right, *(broadcast(box, shape, at.output) for shape in at.shapes[2:])))


def _conv(at: Operands, box: Box) -> Narrowing | None:
    """Conv: samples are independent; output channels are rows of the weight `[O, I/g, *K]`, in whole groups."""
    groups = at.node.attributes.get_int("group", 1)
    channels, inputs = box[1], None
    attributes = {}
    if channels is not None and groups > 1:
        kept = sorted({channel * groups // at.output[1] for channel in channels})
        channels = _members(kept, at.output[1] // groups)
        inputs = _members(kept, at.shapes[0][1] // groups)
        attributes = {"group": len(kept)}
    free = without((box[0], channels, *box[2:]), range(2, len(box)))
    x = (box[0], inputs, *free[2:])
    weight = (channels, *[None] * (len(at.shapes[1]) - 1))
    return Narrowing(free, (x, weight, *[(channels,)] * (len(at.shapes) - 2)), attributes=attributes)


def _members(groups: Sequence[int], size: int) -> Places:
    return tuple(group * size + member for group in groups for member in range(size))


def _conv_transpose(at: Operands, box: Box) -> Narrowing | None:
    """ConvTranspose of one group: weight `[I, O, *K]`."""
    if at.node.attributes.get_int("group", 1) != 1:
        return None
    free = without(box, range(2, len(box)))
    x, weight = (box[0], None, *free[2:]), (None, box[1], *free[2:])
    return Narrowing(free, (x, weight, *[(box[1],)] * (len(at.shapes) - 2)))


def _attention(at: Operands, box: Box) -> Narrowing | None:
    """Attention: a row of the result needs the same row of Q and of the mask, and all rows of K and V of its sample and head.

    Q is `[B, H, S, D]`, the mask is broadcast to `[B, H, S, T]`; or Q, K and V are `[B, S, H·D]`, whose heads stay together. With
    `is_causal` or a window the number of a row matters, so all rows stay; with a cache everything stays.
    """
    if len(at.shapes) > 3 and any(value is not None for value in at.node.inputs[4:]):
        return None
    flags = at.node.attributes
    causal = flags.get_int("is_causal", 0) or flags.get_int("left_window_size", -1) >= 0 or flags.get_int("right_window_size", -1) >= 0
    if len(at.output) == 3:
        batch, rows = box[0], None if causal else box[1]
        output: Box = (batch, rows, None)
        others: Box = (batch, None, None)
        scores: Box = (batch, None, rows, None)
    else:
        same_heads = at.shapes[0][1] == at.shapes[1][1]
        batch, heads, rows = box[0], box[1] if same_heads else None, None if causal else box[2]
        output = (batch, heads, rows, None)
        others = (batch, heads, None, None)
        scores = (batch, heads, rows, None)
    inputs: list[Box | None] = [output, others, others, *[WHOLE] * (len(at.shapes) - 3)]
    if len(at.shapes) > 3 and at.node.inputs[3] is not None:
        inputs[3] = _mask(at, scores)
    return Narrowing(output, tuple(inputs))


def _mask(at: Operands, scores: Box) -> Box:
    """The part of a mask, which is broadcast to the scores `[B, H, S, T]`; an axis of length 1 serves all."""
    mask = at.shapes[3]
    return tuple(None if size == 1 else scores[axis] for axis, size in enumerate(mask, 4 - len(mask)))


def _rotary(at: Operands, box: Box) -> Narrowing | None:
    """RotaryEmbedding: rows are independent; each needs its own position, or its own rows `[B, S, D/2]` of the tables."""
    batch, rows = box[0], box[-2]
    output = without(box, [-1])
    if len(at.shapes) > 3 and at.node.inputs[3] is not None:
        return Narrowing(output, (output, WHOLE, WHOLE, (batch, rows)))
    return Narrowing(output, (output, (batch, rows, None), (batch, rows, None), *at.whole_inputs()[3:]))


def _concat(at: Operands, box: Box) -> Narrowing | None:
    """Concat: an operand none of whose places are wanted is left out."""
    axis = at.node.attributes.get_int("axis") % len(box)
    inputs: list[Box | None] = []
    start = 0
    for shape in at.shapes:
        end = start + shape[axis]
        wanted = box[axis]
        own = tuple(range(shape[axis])) if wanted is None else tuple(place - start for place in wanted if start <= place < end)
        inputs.append((*box[:axis], own, *box[axis + 1 :]) if own else None)
        start = end
    return Narrowing(box, tuple(inputs))


def _transpose(at: Operands, box: Box) -> Narrowing | None:
    permutation = at.node.attributes.get_ints("perm", tuple(reversed(range(len(box)))))
    wanted: list[Places | None] = [None] * len(box)
    for axis, source in enumerate(permutation):
        wanted[source] = box[axis]
    return Narrowing(box, (tuple(wanted),))


def _layout(at: Operands, box: Box) -> Narrowing | None:
    """Squeeze, Unsqueeze, Flatten: elements keep their order, and the node's axes stay right for the smaller tensor."""
    if at.node.op_type == "Squeeze" and (len(at.node.inputs) < 2 or at.node.inputs[1] is None):
        return None  # it drops whatever axes have length 1, and narrowing makes some
    found = reshaped(box, at.output, at.shapes[0])
    return None if found is None else Narrowing(found[0], (found[1], *at.whole_inputs()[1:]))


def _reshape(at: Operands, box: Box) -> Narrowing | None:
    found = reshaped(box, at.output, at.shapes[0])
    if found is None or constant_array(at.node.inputs[1]) is None:
        return None
    output, wanted = found
    return Narrowing(output, (wanted, WHOLE), constants={1: shape_of(output, at.output)})


def _reduction(at: Operands, box: Box) -> Narrowing | None:
    """ReduceMean and its like: everything along the reduced axes is needed."""
    rank = len(at.shapes[0])
    axes = constant_array(at.node.inputs[1]) if len(at.node.inputs) > 1 else None
    if axes is None and len(at.node.inputs) > 1 and at.node.inputs[1] is not None:
        return None
    if axes is None or axes.size == 0:
        return _elementwise(at, box) if at.node.attributes.get_int("noop_with_empty_axes", 0) else None
    return _reduced(at, box, {int(axis) % rank for axis in axes.reshape(-1)})


def _arg_reduction(at: Operands, box: Box) -> Narrowing | None:
    return _reduced(at, box, {at.node.attributes.get_int("axis", 0) % len(at.shapes[0])})


def _reduced(at: Operands, box: Box, axes: set[int]) -> Narrowing | None:
    kept = bool(at.node.attributes.get_int("keepdims", 1))
    places = iter(box)
    wanted: list[Places | None] = []
    for axis in range(len(at.shapes[0])):
        along = next(places) if kept or axis not in axes else None
        wanted.append(None if axis in axes else along)
    return Narrowing(box, (tuple(wanted), *at.whole_inputs()[1:]))


def _pad(at: Operands, box: Box) -> Narrowing | None:
    """Pad: axes that are not padded are free."""
    pads = constant_array(at.node.inputs[1])
    axes_value = at.node.inputs[3] if len(at.node.inputs) > 3 else None
    axes = constant_array(axes_value) if axes_value is not None else np.arange(len(box))
    if pads is None or axes is None:
        return None
    padded = [int(axis) for axis, pad in zip(axes, pads.reshape(2, -1).T, strict=True) if pad.any()]
    free = without(box, padded)
    return Narrowing(free, (free, *at.whole_inputs()[1:]))


def _resize(at: Operands, box: Box) -> Narrowing | None:
    """Resize: axes that keep their length are free; a target size is shortened with them."""
    if (
        at.node.attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
        or "axes" in at.node.attributes
    ):
        return None
    free = without(box, [axis for axis, size in enumerate(at.output) if size != at.shapes[0][axis]])
    narrowing = Narrowing(free, (free, *at.whole_inputs()[1:]))
    if len(at.node.inputs) > 3 and at.node.inputs[3] is not None:
        return dataclasses.replace(narrowing, constants={3: shape_of(free, at.output)})
    scales = constant_array(at.node.inputs[2]) if len(at.node.inputs) > 2 else None
    if scales is None or any(places is not None and scale != 1 for places, scale in zip(free, scales, strict=True)):
        return None
    return narrowing


def _gather_at_run_time(at: Operands, box: Box) -> Narrowing | None:
    """Gather with indices that are computed: all places along its axis may be read."""
    axis = at.node.attributes.get_int("axis", 0) % len(at.shapes[0])
    end = axis + len(at.shapes[1])
    return Narrowing(box, ((*box[:axis], None, *box[end:]), box[axis:end]))


_ELEMENTWISE = (
    "Abs Acos Acosh Add And Asin Asinh Atan Atanh BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast Ceil Celu Clip Cos Cosh Div Elu Equal "
    "Erf Exp Floor Gelu Greater GreaterOrEqual HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Less LessOrEqual Log Max Mean Min "
    "Mish Mod Mul Neg Not Or PRelu Pow Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Sub Sum Swish Tan "
    "Tanh ThresholdedRelu Where Xor"
)
_REDUCTIONS = "ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare"
_POOLINGS = "AveragePool GlobalAveragePool GlobalLpPool GlobalMaxPool LpPool MaxPool"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_POOLINGS.split(), _pooling),
    "ArgMax": _arg_reduction,
    "ArgMin": _arg_reduction,
    "Attention": _attention,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Expand": _expand,
    "Flatten": _layout,
    "Gather": _gather_at_run_time,
    "Gemm": _gemm,
    "GroupNormalization": _batch_only,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _normalization,
    "LogSoftmax": _along_axis(-1),
    "LpNormalization": _along_axis(-1),
    "MatMul": _matmul,
    "Pad": _pad,
    "RMSNormalization": _normalization,
    "Reshape": _reshape,
    "Resize": _resize,
    "RotaryEmbedding": _rotary,
    "Softmax": _along_axis(-1),
    "Squeeze": _layout,
    "Transpose": _transpose,
    "Unsqueeze": _layout,
}
"""The backward rule of each standard operator. Slices, gathers of constant places and splits are read by `views.py` instead."""

MULTIPLYING = frozenset({"Attention", "Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Those whose multiply-accumulates fall in proportion to the part of the output that they compute."""
