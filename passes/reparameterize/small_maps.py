"""The pass `crop-kernels`: taps of a convolution that never read anything but padding, or that are zero, are cut off."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.shapes import static_shape


@dataclass(frozen=True)
class CropKernels(Pass):
    """Cut a convolution's kernel down to the taps that read something.

    Before:  x [N, C, 1, 1] ─ Conv 3x3, pads 1 ─► y
    After:   x [N, C, 1, 1] ─ Conv 1x1 ─► y

    On a small map outer taps see only padding, at every place of the result: on a map of 1x1 with same padding all but the centre tap. A
    tap whose weights are all zero reads nothing either (a merged kernel may have a border of such taps). For any group, stride, dilation,
    padding and number of axes, the kernel is cut along each axis to the range from the first to the last tap that reads something, and
    the padding shrinks with it. A dead tap stays where padding would become negative without it. A convolution stays as it is when

    1. its weight is not a constant, or other nodes read it as well: a second copy would cost bytes;
    2. no tap reads anything: the result is the bias, which is not a convolution's work.

    Source: the definition of Conv in the ONNX operator specification. Elhassan et al. 2024, "P2AT: Pyramid Pooling Axial Transformer for
    Real-time Semantic Segmentation", has 3x3 and 7x7 convolutions on maps of 1x1.
    """

    name: ClassVar[str] = "crop-kernels"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> int:
        """Crops every kernel of the main graph that can be; returns how many."""
        editor: GraphEditor | None = None
        cropped = 0
        for conv in model.graph:
            if conv.op_type != "Conv" or conv.domain != "":
                continue
            where = conv.name or "Conv"
            axes = _axes(conv)
            if axes is None or context.skips(where):
                continue
            weight, value = constant_array(conv.inputs[1]), conv.inputs[1]
            crops = [axis.crop(_taps_of(weight, number)) for number, axis in enumerate(axes)]
            if None not in crops and all(crop == axis for crop, axis in zip(crops, axes, strict=True)):
                continue
            if None in crops:
                context.refuse(where, "no tap of its kernel reads anything")
            elif weight is None:
                context.refuse(where, "taps of its kernel read only padding, but its weight is not a constant")
            elif value is None or not is_used_once(value):
                context.refuse(where, "taps of its kernel read nothing, but other nodes read its weight as well")
            else:
                editor = editor or GraphEditor(model)
                _crop(conv, weight, axes, [crop for crop in crops if crop is not None], editor)
                context.applied(where)
                cropped += 1
        return cropped


@dataclass(frozen=True)
class _Axis:
    """A convolution along one axis: tap u at place o of the result reads place stride·o + dilation·(first + u) - begin of the map.

    Attributes:
        size: Places of the map.
        stride: Step of the result on the map.
        dilation: Distance of two taps.
        begin: Padding before the map.
        end: Padding after it.
        first: The first tap, counted in the whole kernel.
        taps: The number of taps.
    """

    size: int
    stride: int
    dilation: int
    begin: int
    end: int
    first: int
    taps: int

    def reads(self) -> np.ndarray:
        """Which taps of the whole kernel read the map at some place of the result, bool `[taps]`."""
        places = (self.size + self.begin + self.end - self.dilation * (self.taps - 1) - 1) // self.stride + 1
        read = self.stride * np.arange(places)[:, None] + self.dilation * np.arange(self.taps) - self.begin
        return np.asarray(((read >= 0) & (read < self.size)).any(0))

    def crop(self, used: np.ndarray | None) -> _Axis | None:
        """The axis without taps at its ends that read nothing or are not `used`; None when no tap is left."""
        alive = np.flatnonzero(self.reads() if used is None else self.reads() & used)
        if not alive.size:
            return None
        first = min(int(alive[0]), self.begin // self.dilation)  # padding does not become negative
        after = min(self.taps - 1 - int(alive[-1]), self.end // self.dilation)
        taps = self.taps - first - after
        begin, end = self.begin - self.dilation * first, self.end - self.dilation * after
        return _Axis(self.size, self.stride, self.dilation if taps > 1 else 1, begin, end, first, taps)


def _axes(conv: ir.Node) -> list[_Axis] | None:
    """Reads the geometry of a Conv; None when shapes are not known or contradict it."""
    x, weight, result = (static_shape(value) for value in (*conv.inputs[:2], conv.outputs[0]))
    if x is None or weight is None or result is None or 0 in (*x, *weight, *result) or not 2 < len(x) == len(weight) == len(result):
        return None
    kernel = weight[2:]
    ones = (1,) * len(kernel)
    strides = tuple(conv.attributes.get_ints("strides", ones))
    dilations = tuple(conv.attributes.get_ints("dilations", ones))
    pads = _pads(conv, x[2:], kernel, strides, dilations)
    half = len(kernel)
    if min(pads) < 0:
        return None
    return [
        _Axis(size, stride, dilation if taps > 1 else 1, begin, end, 0, taps)
        for size, stride, dilation, begin, end, taps in zip(x[2:], strides, dilations, pads[:half], pads[half:], kernel, strict=True)
    ]


def _pads(
    conv: ir.Node, sizes: tuple[int, ...], kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]
) -> tuple[int, ...]:
    """The padding before each axis and after each axis, that of `auto_pad` as numbers."""
    mode = conv.attributes.get_string("auto_pad", "NOTSET")
    if mode in ("NOTSET", "VALID"):
        zeros = (0,) * (2 * len(sizes))
        return zeros if mode == "VALID" else tuple(conv.attributes.get_ints("pads", zeros))
    total = [
        max(0, (math.ceil(size / stride) - 1) * stride + dilation * (taps - 1) + 1 - size)
        for size, stride, dilation, taps in zip(sizes, strides, dilations, kernel, strict=True)
    ]
    less, more = [pad // 2 for pad in total], [pad - pad // 2 for pad in total]
    return tuple(less + more if mode == "SAME_UPPER" else more + less)


def _taps_of(weight: np.ndarray | None, axis: int) -> np.ndarray | None:
    """Which taps along a kernel axis have a weight that is not zero, bool `[taps]`; None when the weight is not known."""
    return None if weight is None else np.asarray(weight.any(axis=tuple(other for other in range(weight.ndim) if other != axis + 2)))


def _crop(conv: ir.Node, weight: np.ndarray, axes: list[_Axis], crops: list[_Axis], editor: GraphEditor) -> None:
    ranges = tuple(slice(crop.first, crop.first + crop.taps) for crop in crops)
    editor.set_constant(conv, 1, np.ascontiguousarray(weight[(slice(None), slice(None), *ranges)]))
    conv.attributes.pop("auto_pad", None)
    attributes = {
        "kernel_shape": [crop.taps for crop in crops],
        "pads": [crop.begin for crop in crops] + [crop.end for crop in crops],
        "dilations": [crop.dilation for crop in crops],
    }
    for name, numbers in attributes.items():
        conv.attributes[name] = ir.AttrInt64s(name, numbers)
