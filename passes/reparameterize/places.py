"""Reads products over channels (1x1 convolution, MatMul) and maps over places (interpolation, averaging, layout), which commute.

A product treats all places alike, a map over places treats all channels alike. What a product multiplies says which axes a map must leave
alone to change places with it: `[N, C]` before the places of a convolution, C after those of a MatMul.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from edgekit.graph.constants import constant_array, is_used_once
from edgekit.graph.shapes import static_shape

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Keep:
    """The axes that a map over places leaves alone: the first `first`, or the last one where that is 0."""

    first: int

    def swap(self, shape: Shape, kept: Shape) -> Shape:
        """The shape with `kept` on the axes that are left alone."""
        return (*kept, *shape[self.first :]) if self.first else (*shape[:-1], *kept)

    def kept(self, shape: Shape) -> Shape:
        """The sizes of the axes that are left alone."""
        return shape[: self.first] if self.first else shape[-1:]

    def places(self, shape: Shape) -> int:
        """The number of places."""
        return math.prod(shape[self.first :] if self.first else shape[:-1])

    def has(self, axis: int, rank: int) -> bool:
        """Whether axis `axis`, not negative, of `rank` is left alone."""
        return axis < self.first if self.first else axis == rank - 1


@dataclass(frozen=True)
class Product:
    """A node that multiplies the channels of input `index` by a matrix, alike at all places.

    Attributes:
        node: The Conv or MatMul.
        index: The input.
        keep: The axes that a map over places must leave alone to change places with it.
        add: The Add of one bias per channel that follows a MatMul and alone reads it, or None.
        has_bias: Whether it adds something that is not zero.
    """

    node: ir.Node
    index: int
    keep: Keep
    add: ir.Node | None
    has_bias: bool

    @property
    def x(self) -> ir.Value:
        """What is multiplied."""
        value = self.node.inputs[self.index]
        assert value is not None
        return value

    @property
    def result(self) -> ir.Value:
        """The product with its bias."""
        return (self.add or self.node).outputs[0]

    def readable(self, shape: Shape) -> Shape:
        """The shape in which the node can read a value of `shape`: a convolution has its places on as many axes as its kernel."""
        kept, places = self.keep.kept(shape), self.keep.places(shape)
        if not self.keep.first:
            return shape if len(shape) > 1 else (1, *shape)
        wanted = len(static_shape(self.node.inputs[1 - self.index]) or ()) if self.node.op_type == "Conv" else self.keep.first + 1
        return shape if len(shape) == wanted else (*kept, places, *(1,) * (wanted - self.keep.first - 1))


def products_of(node: ir.Node) -> list[Product]:
    """Reads a node as a product over channels, in each way that is possible."""
    if node.domain != "" or static_shape(node.outputs[0]) is None:
        return []
    if node.op_type == "Conv" and _is_pointwise(node):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        array = constant_array(bias)
        return [Product(node, 0, Keep(2), None, bias is not None and (array is None or bool(array.any())))]
    if node.op_type != "MatMul":
        return []
    left, right, result = (static_shape(value) for value in (*node.inputs, node.outputs[0]))
    found = []
    if left is None or right is None or result is None or min(len(left), len(right)) < 2:
        return []
    if len(right) == 2 and constant_array(node.inputs[0]) is None:
        add, has_bias = _bias_after(node)
        found.append(Product(node, 0, Keep(0), add, has_bias))
    if len(right) == len(result) > 2 and constant_array(node.inputs[1]) is None:
        found.append(Product(node, 1, Keep(len(right) - 1), None, False))
    return found


def _is_pointwise(conv: ir.Node) -> bool:
    """True for a kernel of one tap, stride 1 and no padding."""
    weight, x = static_shape(conv.inputs[1]), static_shape(conv.inputs[0])
    if weight is None or x is None or set(weight[2:]) != {1}:
        return False
    strides, pads = conv.attributes.get_ints("strides", ()), conv.attributes.get_ints("pads", ())
    return all(stride == 1 for stride in strides) and not any(pads)  # auto_pad pads nothing at stride 1


def _bias_after(matmul: ir.Node) -> tuple[ir.Node | None, bool]:
    """Returns the Add of a constant `[C]` after a MatMul, and whether it adds anything but zero."""
    product = matmul.outputs[0]
    if not is_used_once(product):
        return None, False
    node, index = next(iter(product.uses()))
    if node.op_type != "Add" or node.domain != "":
        return None, False
    bias, shape = constant_array(node.inputs[1 - index]), static_shape(product)
    if bias is None or shape is None or bias.size not in (1, shape[-1]) or bias.ndim > len(shape):
        return None, False
    if bias.size > 1 and bias.shape[-1] != bias.size:
        return None, False
    return node, bool(bias.any())


@dataclass(frozen=True)
class PlaceMap:
    """A node that mixes places; `obstacle` says why it may not change places with a product, "" when it may."""

    node: ir.Node
    sums_to_one: bool = True
    obstacle: str = ""


def map_of(node: ir.Node | None, keep: Keep) -> PlaceMap | None:
    """Reads a node as a map over places that leaves the axes of `keep` alone; None when it is something else."""
    if node is None or node.domain != "" or node.op_type not in _MAPS:
        return None
    source, result = static_shape(node.inputs[0]), static_shape(node.outputs[0])
    if source is None or result is None or 0 in source or len(node.outputs) != 1 or constant_array(node.inputs[0]) is not None:
        return None
    if keep.kept(source) != keep.kept(result):
        return None
    return _MAPS[node.op_type](node, source, keep)


def _resize(node: ir.Node, source: Shape, keep: Keep) -> PlaceMap | None:
    attributes = node.attributes
    axes = [axis % len(source) for axis in attributes.get_ints("axes", range(len(source)))]
    touched = [position for position, axis in enumerate(axes) if keep.has(axis, len(source))]
    scales = node.inputs[2] if len(node.inputs) > 2 else None
    by_scale = scales is not None and static_shape(scales) != (0,)
    array = constant_array(scales)
    if by_scale and touched and (array is None or any(array[position] != 1 for position in touched)):
        return None
    if not by_scale and touched and attributes.get_string("keep_aspect_ratio_policy", "stretch") != "stretch":
        return PlaceMap(node, obstacle="it keeps the aspect ratio, which scales the channels too")
    if any(value is not None and constant_array(value) is None for value in node.inputs[2:]):
        return PlaceMap(node, obstacle="its size is not a constant")
    mode = attributes.get_string("mode", "nearest")
    if attributes.get_int("antialias", 0):
        return PlaceMap(node, obstacle="it has antialias")
    if mode == "cubic" and attributes.get_int("exclude_outside", 0) != 0:
        return PlaceMap(node, obstacle="it is cubic with exclude_outside")
    if attributes.get_string("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return PlaceMap(node, obstacle="tf_crop_and_resize fills places outside of the map with a number")
    return PlaceMap(node)


def _average_pool(node: ir.Node, source: Shape, keep: Keep) -> PlaceMap | None:
    if keep.first != 2:
        return None
    pads = node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(node.attributes.get_ints("pads", ()))
    counts_padding, ceil = (node.attributes.get_int(name, 0) != 0 for name in ("count_include_pad", "ceil_mode"))
    return PlaceMap(node, sums_to_one=not (counts_padding and pads) and not ceil)


def _global_average_pool(node: ir.Node, source: Shape, keep: Keep) -> PlaceMap | None:
    return PlaceMap(node) if keep.first == 2 else None


def _reduce_mean(node: ir.Node, source: Shape, keep: Keep) -> PlaceMap | None:
    axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.size == 0 or any(keep.has(int(axis) % len(source), len(source)) for axis in axes.reshape(-1)):
        return None
    return PlaceMap(node)


def _reshape(node: ir.Node, source: Shape, keep: Keep) -> PlaceMap | None:
    return (
        None if constant_array(node.inputs[1]) is None else PlaceMap(node)
    )  # the kept axes have their sizes, so the elements of the others stay in their order


def _transpose(node: ir.Node, source: Shape, keep: Keep) -> PlaceMap | None:
    rank = len(source)
    perm = list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
    return PlaceMap(node) if all(perm[axis] == axis for axis in range(rank) if keep.has(axis, rank)) else None


def _squeeze(node: ir.Node, source: Shape, keep: Keep) -> PlaceMap | None:
    """Squeeze and Unsqueeze: which axes they name must be known, and kept axes must not move among them."""
    result = static_shape(node.outputs[0])
    axes = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or result is None:
        return None
    long = source if node.op_type == "Squeeze" else result
    named = [int(axis) % len(long) for axis in axes.reshape(-1)]
    return None if any(keep.has(axis, len(long)) for axis in named) else PlaceMap(node)


def _expand(node: ir.Node, source: Shape, keep: Keep) -> PlaceMap | None:
    result = static_shape(node.outputs[0])
    is_known = node.op_type == "Tile" or constant_array(node.inputs[1]) is not None
    return PlaceMap(node) if is_known and result is not None and len(result) == len(source) else None


_MAPS: dict[str, Callable[[ir.Node, Shape, Keep], PlaceMap | None]] = {
    "AveragePool": _average_pool,
    "Expand": _expand,
    "GlobalAveragePool": _global_average_pool,
    "ReduceMean": _reduce_mean,
    "Reshape": _reshape,
    "Resize": _resize,
    "Squeeze": _squeeze,
    "Tile": _expand,
    "Transpose": _transpose,
    "Unsqueeze": _squeeze,
}
AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean", "Resize")
