"""Fuses normalizations that exporters write in parts into whole operators.

    Before:  x ─ ReduceMean ─ Sub ─ Pow(2) ─ ReduceMean ─ Add(ε) ─ Sqrt ─ Div ─ Mul(γ) ─ Add(β) ─► y
    After:   x ─ LayerNormalization(γ, β) ─► y

Which operator it is follows from the axes over which mean and variance are taken, and from the shape of γ and β:

1. the last axes: LayerNormalization (Ba et al. 2016); without the mean RMSNormalization (Zhang & Sennrich 2019);
2. all axes after the channels, γ and β per channel: InstanceNormalization (Ulyanov et al. 2016); from rank 4 on without γ and β too;
3. all axes after the batch, γ and β per channel: GroupNormalization (Wu & He 2018) of one group;
4. Reshape to groups, normalization without γ and β, Reshape back, Mul(γ), Add(β): GroupNormalization of these groups;
5. Sub(μ), Div or Mul, Mul(γ), Add(β) with constants per channel, and Mul, Add after a convolution: BatchNormalization (Ioffe & Szegedy
   2015). Its ε is 0: constant folding took it into the deviation.

γ and β are constants. Axes of length 1 do not count. A layer norm over the channels of `[B, C, H, W]` is no whole operator and stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, constant_array, is_used_once
from edgekit.graph.fusions.matching import FIRST_OPSET, FLOATS, made_by, opset, per_channel, region, replace
from edgekit.graph.fusions.normalization_batch import fuse_batch_norm
from edgekit.graph.fusions.normalization_read import Affine, Normalized, affine_variants, read_normalized, trailing
from edgekit.graph.shapes import static_shape

_ROOTS = ("Mul", "Div", "Add", "Sub")


def fuse_normalizations(model: ir.Model) -> int:
    """Replaces decomposed normalizations of the main graph by whole operators, in place; returns how many were made.

    Expects shapes to be inferred, constants to be folded, and casts that change nothing to be gone (`merge_layout`). Nothing happens below
    opset 23.
    """
    if opset(model) < FIRST_OPSET:
        return 0
    editor = GraphEditor(model)
    steps = ((_ROOTS, _fuse_normalized), (("InstanceNormalization", "LayerNormalization"), _fuse_groups), (("Sub", "Mul"), fuse_batch_norm))
    count = 0
    for op_types, fuse in steps:
        for node in list(model.graph):
            if node.graph is not None and node.domain == "" and node.op_type in op_types and node.outputs[0].dtype in FLOATS:
                count += fuse(node, editor)
    return count


@dataclass(frozen=True)
class _Choice:
    """An operator, its attributes, and its scale and bias as the arrays to be; None for a bias that it lacks."""

    op_type: str
    attributes: dict[str, int | float | str]
    scale: np.ndarray
    bias: np.ndarray | None


def _fuse_normalized(root: ir.Node, editor: GraphEditor) -> bool:
    found = read_normalized(root)
    if found is None or found.source.dtype != found.root.outputs[0].dtype:
        return False
    for affine in affine_variants(found.root, found.scale, found.shift):
        choice = _choose(found, affine)
        nodes = region(affine.root, [found.source]) if choice is not None else None
        if choice is not None and nodes is not None and affine.root.outputs[0].dtype == found.source.dtype:
            _replace(editor, affine, nodes, found.source, choice)
            return True
    return False


def _choose(found: Normalized, affine: Affine) -> _Choice | None:
    """Returns the operator that the normalization with this scale and shift is, None for none."""
    shape = found.source.shape
    assert shape is not None
    rank = len(shape)
    sizes = tuple(dim if isinstance(dim, int) else None for dim in shape)
    axes = {axis for axis in range(found.axes[0], rank) if axis in found.axes or sizes[axis] == 1}
    if axes != set(range(found.axes[0], rank)) or affine.root.outputs[0].shape is None or len(affine.root.outputs[0].shape) != rank:
        return None
    first, channels = found.axes[0], sizes[1] if rank > 1 else None
    scale, shift = constant_array(affine.scale), constant_array(affine.shift)
    given = [array for array in (scale, shift) if array is not None]
    if any(array.dtype != _numpy(found.source) for array in given):
        return None
    if found.centred and first in (1, 2) and rank > 2 and channels is not None:
        vectors = [per_channel(value, rank, channels) for value in (affine.scale, affine.shift) if value is not None]
        varied = any(array.size > 1 for array in given)
        if all(vector is not None for vector in vectors) and (varied or (first == 2 and rank > 3)):
            return _by_channel(found, affine, rank, channels, first)
    tail = sizes[first:]
    if any(size is None for size in tail):
        return None
    last = tuple(size for size in tail if size is not None)
    new_scale = trailing(scale, rank, last) if scale is not None else np.ones(last, _numpy(found.source))
    new_bias = trailing(shift, rank, last) if shift is not None else None
    if new_scale is None or (shift is not None and (new_bias is None or not found.centred)):
        return None
    attributes: dict[str, int | float | str] = {"axis": first - rank, "epsilon": found.epsilon}
    if found.source.dtype == ir.DataType.DOUBLE:  # the default is to compute in float32
        attributes["stash_type"] = ir.DataType.DOUBLE.value
    return _Choice("LayerNormalization" if found.centred else "RMSNormalization", attributes, new_scale, new_bias)


def _by_channel(found: Normalized, affine: Affine, rank: int, channels: int, first: int) -> _Choice:
    """Instance norm where statistics are of each channel, group norm of one group where they are of all."""
    dtype = _numpy(found.source)
    scale = per_channel(affine.scale, rank, channels) if affine.scale is not None else np.ones(channels, dtype)
    bias = per_channel(affine.shift, rank, channels) if affine.shift is not None else np.zeros(channels, dtype)
    assert scale is not None
    if first == 2:
        return _Choice("InstanceNormalization", {"epsilon": found.epsilon}, scale, bias)
    return _Choice("GroupNormalization", {"epsilon": found.epsilon, "num_groups": 1}, scale, bias)


def _replace(editor: GraphEditor, affine: Affine, nodes: list[ir.Node], source: ir.Value, choice: _Choice) -> None:
    inputs = [source]
    for value, array, name in ((affine.scale, choice.scale, "weight"), (affine.shift, choice.bias, "bias")):
        if array is None:
            continue
        old = constant_array(value)
        same = value is not None and old is not None and value.is_initializer() and old.shape == array.shape
        if same and value is not None:
            inputs.append(value)
            continue
        new = editor.add_initializer(f"{affine.root.name}.{name}", array, made_from=[value])
        inputs.append(new)
    node = replace(editor, affine.root, nodes, choice.op_type, inputs, choice.attributes)
    _inherit_names(editor, node, (affine.scale, affine.shift))


def _inherit_names(editor: GraphEditor, node: ir.Node, olds: tuple[ir.Value | None, ...]) -> None:
    """Gives a reshaped weight the name of the old one when that is gone: it leads back to its PyTorch parameter."""
    for old, new in zip(olds, node.inputs[1:], strict=False):
        if old is not None and new is not None and old is not new and old.name not in editor.graph.initializers:
            new.name = old.name


def _fuse_groups(norm: ir.Node, editor: GraphEditor) -> bool:
    """Reshape [N, G, …] ─ norm without scale and bias ─ Reshape [N, C, …], perhaps Mul and Add per channel."""
    into = made_by(norm.inputs[0], "Reshape")
    source = into.inputs[0] if into is not None else None
    shape, grouped = static_shape(source), static_shape(norm.inputs[0])
    result = norm.outputs[0]
    if source is None or shape is None or grouped is None or len(shape) < 3 or len(grouped) < 3 or not is_used_once(result):
        return False
    back = next(iter(result.uses())).node
    if back.op_type != "Reshape" or back.domain != "" or static_shape(back.outputs[0]) != shape or back.inputs[0] is not result:
        return False
    groups, channels = grouped[1], shape[1]
    if grouped[0] != shape[0] or groups == 0 or channels % groups or math.prod(shape) == 0 or not _is_plain(norm, len(grouped)):
        return False
    for affine in affine_variants(back):
        vectors = [per_channel(value, len(shape), channels) if value is not None else None for value in (affine.scale, affine.shift)]
        if any(value is not None and vector is None for value, vector in zip((affine.scale, affine.shift), vectors, strict=True)):
            continue
        nodes = region(affine.root, [source])
        if nodes is None or static_shape(affine.root.outputs[0]) != shape:
            continue
        dtype = _numpy(source)
        scale = vectors[0] if vectors[0] is not None else np.ones(channels, dtype)
        bias = vectors[1] if vectors[1] is not None else np.zeros(channels, dtype)
        attributes: dict[str, int | float | str] = {"epsilon": norm.attributes.get_float("epsilon", 1e-5), "num_groups": groups}
        _replace(editor, affine, nodes, source, _Choice("GroupNormalization", attributes, scale, bias))
        return True
    return False


def _is_plain(norm: ir.Node, rank: int) -> bool:
    """True for a norm over all axes after the second whose scale is 1 and whose bias is 0."""
    if any(output.uses() or output.is_graph_output() for output in norm.outputs[1:]):
        return False
    scale, bias = constant_array(norm.inputs[1]), constant_array(norm.inputs[2]) if len(norm.inputs) > 2 else None
    if scale is None or not (scale == 1).all() or (len(norm.inputs) > 2 and norm.inputs[2] is not None and (bias is None or bias.any())):
        return False
    return norm.op_type == "InstanceNormalization" or norm.attributes.get_int("axis", -1) in (2, 2 - rank)


def _numpy(value: ir.Value) -> np.dtype:
    assert value.dtype is not None
    return value.dtype.numpy()
