"""Puts a shorter stream in the place of a longer one, in everything that follows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array
from edgekit.graph.cost import MODULE_KEY
from edgekit.passes.prune_tokens.builder import Builder, shape_of
from edgekit.passes.prune_tokens.token_axis import Region, StandsInTheWayError

Take = Callable[[Builder, ir.Value, int], ir.Value]
"""Reduces a value that has an entry for each token along an axis."""


def check(region: Region, can_take: bool) -> None:
    """Holds what follows a stream against what `shrink` can do.

    Args:
        region: What follows.
        can_take: Whether what has an entry for each token can be reduced along.

    Raises:
        StandsInTheWayError: It cannot be done.
    """
    for constant in region.sizes:
        if constant_array(constant.node.inputs[constant.index]) is None:
            raise StandsInTheWayError(constant.node.name or "", "its shape is computed while the model runs")
    if region.operands and not can_take:
        node = region.operands[0].node
        raise StandsInTheWayError(node.name or "", "it reads a table or mask with an entry for each token, which cannot be merged")


def shrink(editor: GraphEditor, region: Region, stream: ir.Value, shorter: ir.Value, count: int, keep: set[ir.Node], take: Take) -> None:
    """Lets everything after `stream` compute with `shorter`.

    Args:
        editor: The graph.
        region: What follows `stream`.
        stream: The tokens `[B, N, C]`.
        shorter: Those that take their place, `[B, count, C]`.
        count: How many they are.
        keep: Nodes that go on reading `stream`: those that choose.
        take: Reduces what else has an entry for each token.
    """
    for node, index in list(stream.uses()):
        if node not in keep:
            node.replace_input_with(index, shorter)
    taken: dict[tuple[ir.Value, int, int], ir.Value] = {}
    for operand in region.operands:
        value = operand.node.inputs[operand.index]
        assert value is not None
        lacking = operand.rank - len(shape_of(value)) if region.batch > 1 else 0  # each sample takes entries of its own
        key = value, operand.axis, lacking
        if key not in taken:
            module = operand.node.metadata_props.get(MODULE_KEY, "")
            build = Builder(editor, operand.node, operand.node.name or "tokens", module)
            taken[key] = take(build, build.reshape(value, (1,) * lacking + shape_of(value)), operand.axis + lacking)
        operand.node.replace_input_with(operand.index, taken[key])
    if region.operands:
        editor.graph.sort()  # the number of tokens that a mean is divided by may be counted before the tokens are made
    for constant in region.sizes:
        array = constant_array(constant.node.inputs[constant.index])
        assert array is not None
        if array[constant.position] > 0:
            changed = np.array(array)
            changed[constant.position] = count - constant.start
            editor.set_constant(constant.node, constant.index, changed, f"{constant.node.name}.shape")
    for value, axes in region.axes.items():
        if value is not stream and value.shape is not None:
            shape = list(value.shape)
            for along in axes:
                shape[along.axis] = count - along.start
            value.shape = ir.Shape(shape)
