"""Slice, Split and Gather of constant places as what they are: a choice of places along some axes of one input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.boxes import Box, Places, per_axis


@dataclass(frozen=True)
class View:
    """An output that repeats elements of the node's first input.

    Attributes:
        source: Shape of the input.
        picks: Per axis of the input that is not taken as it is, the places that are taken, in the order of the output.
        gathered: The axis of the input whose places a Gather takes in an array of rank other than 1, else None.
        index: Shape of that array; the output has its axes in the place of the axis.
    """

    source: tuple[int, ...]
    picks: dict[int, Places]
    gathered: int | None = None
    index: tuple[int, ...] = ()

    def part(self, box: Box, rank: int) -> tuple[dict[int, Places], tuple[int, ...]]:
        """Returns what is taken along each axis for `box` of the output, whose rank is given, and the shape of a Gather's array for it."""
        wanted = per_axis(box, rank)
        picks, index = dict(self.picks), self.index
        if self.gathered is not None:
            end = self.gathered + len(self.index)
            array = np.reshape(self.picks[self.gathered], self.index)
            inner = wanted[self.gathered : end]
            if inner:
                array = array[np.ix_(*(range(size) if p is None else p for p, size in zip(inner, self.index, strict=True)))]
            picks[self.gathered], index = tuple(array.reshape(-1).tolist()), array.shape
            wanted = (*wanted[: self.gathered], None, *wanted[end:])
        for axis, places in enumerate(wanted):
            if places is not None:
                along = picks.get(axis)
                picks[axis] = places if along is None else tuple(along[place] for place in places)
        return picks, index

    def needs(self, box: Box, rank: int) -> Box:
        """Returns the part of the input that `box` of the output repeats."""
        picks, _ = self.part(box, rank)
        return tuple(tuple(sorted(set(picks[axis]))) if axis in picks else None for axis in range(len(self.source)))


def view(node: ir.Node, output: int) -> View | None:
    """Reads one output of a node as a view of its first input; None for other operators, or places that are not known."""
    if node.domain != "" or node.op_type not in _READERS or not node.inputs:
        return None
    source, result = static_shape(node.inputs[0]), static_shape(node.outputs[output])
    if source is None or result is None or 0 in source or 0 in result:
        return None
    found = _READERS[node.op_type](node, output, source)
    return None if found is None or _shape(found) != result else found


def _shape(found: View) -> tuple[int, ...]:
    sizes = [len(found.picks.get(axis, range(size))) for axis, size in enumerate(found.source)]
    if found.gathered is not None:
        sizes[found.gathered : found.gathered + 1] = found.index
    return tuple(sizes)


def _slice(node: ir.Node, output: int, source: tuple[int, ...]) -> View | None:
    arrays = [constant_array(value) for value in node.inputs[1:]]
    given = [value is not None for value in node.inputs[1:]]
    if len(arrays) < 2 or any(array is None for array, is_given in zip(arrays, given, strict=True) if is_given):
        return None
    starts, ends = arrays[0], arrays[1]
    if starts is None or ends is None:
        return None
    axes = arrays[2] if len(arrays) > 2 and arrays[2] is not None else np.arange(starts.size)
    steps = arrays[3] if len(arrays) > 3 and arrays[3] is not None else np.ones(starts.size, np.int64)
    picks: dict[int, Places] = {}
    for axis, start, end, step in zip(axes.tolist(), starts.tolist(), ends.tolist(), steps.tolist(), strict=True):
        axis %= len(source)
        if axis in picks or step == 0:
            return None
        places = tuple(range(source[axis])[start:end:step])
        if places != tuple(range(source[axis])):
            picks[axis] = places
    return View(source, picks)


def _split(node: ir.Node, output: int, source: tuple[int, ...]) -> View | None:
    axis = node.attributes.get_int("axis", 0) % len(source)
    sizes = [static_shape(value) for value in node.outputs[: output + 1]]
    if any(size is None for size in sizes):
        return None
    ends = np.cumsum([size[axis] for size in sizes if size is not None])
    end = int(ends[-1])
    start = int(ends[-2]) if output else 0
    return None if end > source[axis] else View(source, {axis: tuple(range(start, end))})


def _gather(node: ir.Node, output: int, source: tuple[int, ...]) -> View | None:
    indices = constant_array(node.inputs[1])
    axis = node.attributes.get_int("axis", 0) % len(source)
    if indices is None or indices.size == 0 or not ((indices >= -source[axis]) & (indices < source[axis])).all():
        return None
    picks = {axis: tuple((indices % source[axis]).reshape(-1).tolist())}
    return View(source, picks) if indices.ndim == 1 else View(source, picks, axis, indices.shape)


_READERS = {"Gather": _gather, "Slice": _slice, "Split": _split}
