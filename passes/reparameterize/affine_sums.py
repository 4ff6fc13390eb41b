"""Adds values that are scaled and shifted copies of one source, such as BN(x) + α·x: together they are one scale and one shift.

Source: Guo et al. 2024, "SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch
Normalization", equation 4 (RepBN).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor, common_module, constant_array, is_used_once
from edgekit.graph.shapes import static_shape
from edgekit.passes.reparameterize.affine import compose, read_affine
from edgekit.passes.reparameterize.batch_norm import Affine
from edgekit.passes.reparameterize.convolutions import freed_bytes, insert_like

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class AffineTerm:
    """A value as scale · source + shift.

    Attributes:
        value: The value.
        source: What is scaled and shifted.
        axis: The axis along which scale and shift vary, None where they are one number.
        map: Scale and shift, float64, `[C]` along `axis` or `[1]`.
        nodes: The nodes that compute the value from the source, none where it is the source.
    """

    value: ir.Value
    source: ir.Value
    axis: int | None
    map: Affine
    nodes: tuple[ir.Node, ...]


def read_term(value: ir.Value, *, free: bool) -> AffineTerm | None:
    """Reads a value of floats of known shape as a scaled and shifted copy of the farthest source that it is one of.

    Args:
        value: The value to read.
        free: Whether its maker may be absorbed: nothing reads the value but the sum that asks.
    """
    shape = static_shape(value)
    if shape is None or value.dtype not in _FLOATS or constant_array(value) is not None:
        return None
    source, axis, total, nodes = value, None, Affine(np.ones(1), np.zeros(1)), list[ir.Node]()
    while free and (found := read_affine(source.producer())) is not None:
        sizes = (1,) if found.axis is None else (1, shape[found.axis])
        if (axis is not None and found.axis not in (axis, None)) or found.map.scale.size not in sizes:
            break
        source, total = found.x, compose(total, found.map)
        axis = found.axis if axis is None else axis
        nodes.insert(0, found.node)
        free = is_used_once(source)
    return AffineTerm(value, source, axis, total, tuple(nodes))


@dataclass(frozen=True)
class AffineSum:
    """Terms of one source as one Mul and one Add, each only where it does something.

    Attributes:
        terms: The terms.
        scale: The constant of the Mul in the dtype of the source, shaped to broadcast against it; None where it is 1.
        shift: The constant of the Add; None where it is 0.
    """

    terms: tuple[AffineTerm, ...]
    scale: np.ndarray | None
    shift: np.ndarray | None

    @property
    def values(self) -> list[ir.Value]:
        """The addends that it stands for."""
        return [term.value for term in self.terms]

    @property
    def nodes(self) -> list[ir.Node]:
        """The nodes that disappear."""
        return list(dict.fromkeys(node for term in self.terms for node in term.nodes))

    @property
    def new_nodes(self) -> int:
        """How many nodes it takes."""
        return (self.scale is not None) + (self.shift is not None)

    @property
    def saved_bytes(self) -> int:
        """How many bytes of constants go, less those that are new."""
        return freed_bytes(self.nodes) - sum(array.nbytes for array in (self.scale, self.shift) if array is not None)

    def insert(self, root: ir.Node, editor: GraphEditor) -> ir.Value:
        """Inserts the nodes before `root` and returns their result."""
        module = common_module([root, *self.nodes])
        prefix = module or root.name or "merged"
        made_from = [value for node in self.nodes for value in node.inputs]
        value = self.terms[0].source
        for op_type, what, array in (("Mul", "scale", self.scale), ("Add", "shift", self.shift)):
            if array is not None:
                constant = editor.add_initializer(f"{prefix}.{what}", array, made_from=made_from)
                node = ir.node(op_type, [value, constant], name=editor.unique_name(f"{prefix}/{op_type}"))
                value = insert_like(node, root, editor, module)
        return value


def add_terms(terms: Sequence[tuple[AffineTerm, int]]) -> AffineSum | str | None:
    """Adds terms of one source, each so many times (subtracts where negative).

    None where that saves nothing: it must take fewer nodes, or as many with fewer bytes of constants. A reason where it is impossible.
    """
    count = sum(abs(times) for _, times in terms)
    axes = sorted({term.axis for term, _ in terms if term.axis is not None})
    if count < 2:
        return None
    if len(axes) > 1:
        return f"its addends are scaled along different axes: {', '.join(map(str, axes))}"
    source = terms[0][0].source
    shape, dtype = static_shape(terms[0][0].value) or (), (source.dtype or ir.DataType.FLOAT).numpy()
    scale = sum((times * term.map.scale for term, times in terms), np.zeros(1))
    shift = sum((times * term.map.shift for term, times in terms), np.zeros(1))
    spread = [-1, *[1] * (len(shape) - axes[0] - 1)] if axes else []
    with np.errstate(over="ignore", invalid="ignore"):
        arrays = [array.astype(dtype).reshape(spread) for array in (scale, shift)]
    if not all(np.isfinite(array).all() for array in arrays):
        return f"the merged scale and shift would not be finite in {dtype.name}"
    found = AffineSum(tuple(term for term, _ in terms), arrays[0] if (scale != 1).any() else None, arrays[1] if shift.any() else None)
    old_nodes = len(found.nodes) + count - 1
    gain = (old_nodes - found.new_nodes, found.saved_bytes)
    return found if found.new_nodes and gain > (0, 0) else None
