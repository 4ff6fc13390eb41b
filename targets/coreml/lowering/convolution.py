"""Convolutions: ONNX's paddings, named by rules, become the numbers that MIL takes; what a transposed result lacks at its end is added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering


@dataclass(frozen=True)
class Window:
    """How a kernel moves over the spatial axes; all fields have one number per axis.

    Attributes:
        kernel: Its elements.
        strides: Its steps.
        dilations: The distance of its elements.
        begin: Padding before.
        end: Padding after; negative where a transposed convolution extends beyond what its input reaches.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def extent(self) -> tuple[int, ...]:
        """The elements from the kernel's first to its last."""
        return tuple((size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True))

    @property
    def pad(self) -> list[int]:
        """The padding in MIL's order: before and after, axis by axis."""
        return [size for pair in zip(self.begin, self.end, strict=True) for size in pair]


def ints(node: ir.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    """An attribute of integers."""
    return tuple(int(value) for value in node.attributes.get_ints(name, list(default)))


def window(b: Lowering, node: ir.Node, kernel: Sequence[int], sizes: Sequence[int]) -> Window:
    """The window of a convolution or pooling over input of spatial `sizes`, with its padding in numbers.

    Raises:
        UnsupportedOpError: The attributes do not fit each other.
    """
    ones, count = [1] * len(kernel), len(kernel)
    strides, dilations = ints(node, "strides", ones), ints(node, "dilations", ones)
    plain = Window(tuple(kernel), strides, dilations, (0,) * count, (0,) * count)
    rule = node.attributes.get_string("auto_pad", "NOTSET")
    if rule == "VALID":
        return plain
    if rule in ("SAME_UPPER", "SAME_LOWER"):
        totals = [
            max((math.ceil(size / stride) - 1) * stride + extent - size, 0)
            for size, stride, extent in zip(sizes, strides, plain.extent, strict=True)
        ]
        return padded(plain, totals, more_before=rule == "SAME_LOWER")
    pads = ints(node, "pads", [0] * 2 * count)
    if rule != "NOTSET" or len(pads) != 2 * count or min(pads) < 0 or len(strides) != count or len(dilations) != count:
        raise b.refuse(f"{node.op_type} with auto_pad {rule} and pads {list(pads)}", "pad the input with Pad first")
    return Window(plain.kernel, strides, dilations, pads[:count], pads[count:])


def padded(plain: Window, totals: Sequence[int], more_before: bool) -> Window:
    """The window with a total padding per axis, the odd one before or after the input; what is negative goes after it whole."""
    less = [max(total, 0) // 2 for total in totals]
    more = [total - half for total, half in zip(totals, less, strict=True)]
    begin, end = (more, less) if more_before else (less, more)
    moved = [(min(first, 0), max(first, 0)) for first in begin]
    return Window(
        plain.kernel,
        plain.strides,
        plain.dilations,
        tuple(first for _, first in moved),
        tuple(last + negative for last, (negative, _) in zip(end, moved, strict=True)),
    )


def add_bias(b: Lowering, node: ir.Node, y: Any, index: int) -> Any:
    """Adds a vector of one number per channel, where the node has it at input `index`."""
    if not b.has(node, index):
        return y
    shape = [1, -1] + [1] * (len(y.shape) - 2)
    array = b.known(node, index)
    bias = array.reshape(shape) if array is not None else b.op("reshape", x=b.x(node, index), shape=shape)
    return b.op("add", x=y, y=bias)


def _kernel(b: Lowering, node: ir.Node) -> tuple[int, ...]:
    """The kernel's shape, from the weight."""
    rank = b.rank(node)
    if not 3 <= rank <= 5:
        raise b.refuse(f"{node.op_type} over {rank - 2} spatial axes", "use 1 to 3 of them")
    kernel = b.shape(node, 1)[2:]
    if ints(node, "kernel_shape", kernel) != kernel:
        raise b.refuse(f"{node.op_type} whose kernel_shape differs from its weight's, {list(kernel)}", "remove the attribute")
    return kernel


def _conv(b: Lowering, node: ir.Node) -> Any:
    moved = window(b, node, _kernel(b, node), b.shape(node)[2:])
    constant_bias = b.has(node, 2) and b.known(node, 2) is not None
    y = b.op(
        "conv",
        x=b.x(node),
        weight=b.x(node, 1),
        bias=b.x(node, 2) if constant_bias else None,
        strides=list(moved.strides),
        pad_type="custom",
        pad=moved.pad,
        dilations=list(moved.dilations),
        groups=node.attributes.get_int("group", 1),
    )
    return y if constant_bias else add_bias(b, node, y, 2)


def _conv_transpose(b: Lowering, node: ir.Node) -> Any:
    if b.known(node, 1) is None:
        b.require("iOS17", "ConvTranspose with a computed weight")
    moved = _transposed_window(b, node, _kernel(b, node), b.shape(node)[2:])
    bias = b.x(node, 2) if b.has(node, 2) and b.known(node, 2) is not None and min(moved.end) >= 0 else None
    y = transposed(b, b.x(node), b.x(node, 1), moved, node.attributes.get_int("group", 1), bias)
    return y if bias is not None else add_bias(b, node, y, 2)


def transposed(b: Lowering, x: Any, weight: Any, moved: Window, groups: int, bias: Any = None) -> Any:
    """A transposed convolution; the part of its result that no input reaches is zero."""
    beyond = [max(-size, 0) for size in moved.end]
    cut = Window(moved.kernel, moved.strides, moved.dilations, moved.begin, tuple(max(size, 0) for size in moved.end))
    y = b.op(
        "conv_transpose",
        x=x,
        weight=weight,
        bias=bias,
        strides=list(cut.strides),
        pad_type="custom",
        pad=cut.pad,
        dilations=list(cut.dilations),
        groups=groups,
    )
    if not any(beyond):
        return y
    return b.op("pad", x=y, pad=[0, 0, 0, 0] + [size for last in beyond for size in (0, last)], mode="constant", constant_val=0.0)


def _transposed_window(b: Lowering, node: ir.Node, kernel: Sequence[int], sizes: Sequence[int]) -> Window:
    """The padding that ONNX defines: given, or what remains of the full result for the output's shape."""
    ones, count = [1] * len(kernel), len(kernel)
    plain = Window(tuple(kernel), ints(node, "strides", ones), ints(node, "dilations", ones), (0,) * count, (0,) * count)
    extra = ints(node, "output_padding", [0] * count)
    rule = node.attributes.get_string("auto_pad", "NOTSET")
    wanted: tuple[int, ...] = ints(node, "output_shape", ())[-count:]
    if not wanted and rule in ("SAME_UPPER", "SAME_LOWER"):
        wanted = tuple(size * stride for size, stride in zip(sizes, plain.strides, strict=True))
    if wanted:
        full = [
            (size - 1) * stride + more + extent
            for size, stride, more, extent in zip(sizes, plain.strides, extra, plain.extent, strict=True)
        ]
        found = padded(plain, [whole - size for whole, size in zip(full, wanted, strict=True)], more_before=rule != "SAME_UPPER")
        begin, end = found.begin, found.end
    else:
        pads = ints(node, "pads", [0] * 2 * count) if rule == "NOTSET" else (0,) * 2 * count
        if rule not in ("NOTSET", "VALID") or len(pads) != 2 * count or min(pads) < 0:
            raise b.refuse(f"ConvTranspose with auto_pad {rule} and pads {list(pads)}", "crop the result with Slice")
        begin, end = pads[:count], pads[count:]
    return Window(plain.kernel, plain.strides, plain.dilations, begin, tuple(size - more for size, more in zip(end, extra, strict=True)))


def _col2im(b: Lowering, node: ir.Node) -> Any:
    """Columns are added where their windows lie: a transposed convolution with weights of one."""
    image = [int(size) for size in b.need_known(node, 1, "image_shape")]
    block = [int(size) for size in b.need_known(node, 2, "block_shape")]
    if not b.is_float(node) or len(image) > 3:
        raise b.refuse(f"Col2Im of {b.dtype(node).name} over {len(image)} axes", "use floats and 1 to 3 axes")
    moved = window(b, node, block, image)
    sizes = [
        (size + first + last - extent) // stride + 1
        for size, first, last, extent, stride in zip(image, moved.begin, moved.end, moved.extent, moved.strides, strict=True)
    ]
    left = [
        size - ((count - 1) * stride + extent - first - last)
        for size, count, stride, extent, first, last in zip(image, sizes, moved.strides, moved.extent, moved.begin, moved.end, strict=True)
    ]
    batch, rows, _ = b.shape(node)
    elements = math.prod(block)
    channels = rows // elements
    weight = np.tile(np.eye(elements, dtype=np.float32).reshape(elements, 1, *block), (channels, 1, *[1] * len(block)))
    columns = b.op("reshape", x=b.x(node), shape=[batch, rows, *sizes])
    end = tuple(last - more for last, more in zip(moved.end, left, strict=True))
    placed = Window(moved.kernel, moved.strides, moved.dilations, moved.begin, end)
    return transposed(b, columns, b.var(weight), placed, channels)


def _deform_conv(b: Lowering, node: ir.Node) -> Any:
    raise b.refuse("DeformConv: it samples at computed places", "use Conv, or GridSample followed by Conv")


TABLE = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Col2Im": _col2im, "DeformConv": _deform_conv}
