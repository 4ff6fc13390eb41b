"""MACs of a transformer as a function of the tokens in each of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.cost import cost
from edgekit.passes.prune_tokens.blocks import Block
from edgekit.passes.prune_tokens.schedule import Sizes, Step
from edgekit.passes.prune_tokens.token_axis import Region


@dataclass(frozen=True)
class TokenCost:
    """What is computed between the residual sum of one block and that of the next, by how it grows with the tokens.

    Attributes:
        fixed: MACs that do not depend on the tokens.
        linear: MACs in proportion to them, `[blocks + 1]`: before the first sum, between the sums, after the last.
        quadratic: MACs in proportion to their square, `[blocks + 1]`.
        tokens: The number of tokens that these hold for.
    """

    fixed: float
    linear: np.ndarray
    quadratic: np.ndarray
    tokens: int

    def macs(self, counts: Sequence[int]) -> float:
        """MACs with so many tokens in each part, `[blocks + 1]`."""
        share = np.array(counts) / self.tokens
        return float(self.fixed + self.linear @ share + self.quadratic @ share**2)


def token_cost(model: ir.Model, blocks: Sequence[Block], region: Region) -> TokenCost:
    """Counts MACs by part and growth; `region` follows the stream of the first block."""
    rows = {row.name: row.macs for row in cost(model).per_node}
    sums = {block.add: number + 1 for number, block in enumerate(blocks)}
    linear, quadratic, fixed, part = np.zeros(len(region.attentions) + 1), np.zeros(len(region.attentions) + 1), 0.0, 0
    for node in model.graph:
        macs = rows.get(node.name or node.op_type, 0)
        grows = len(region.axes.get(node.outputs[0], ())) + _contracts(node, region)
        if grows == 0:
            fixed += macs
        elif grows == 1:
            linear[part] += macs
        else:
            quadratic[part] += macs
        part = sums.get(node, part)
    return TokenCost(fixed, linear, quadratic, region.count)


def _contracts(node: ir.Node, region: Region) -> bool:
    """Whether the node sums over the tokens."""
    if node.op_type == "Attention":
        return node in region.attentions
    second = node.inputs[1] if node.op_type == "MatMul" else None
    rank = len(second.shape or ()) if second is not None else 0
    return second is not None and any(along.axis == rank - 2 for along in region.axes.get(second, ()))


def counts_of(steps: Sequence[Step], sizes: Sizes, fuse: bool) -> list[int]:
    """The tokens in each part, `[blocks + 1]`, after these steps."""
    counts, left = [], sizes.tokens
    for block in range(sizes.blocks + 1):
        counts.append(left)
        for step in steps:
            # A step in front of a block falls between the sums of the one before it and its own: the part is counted as if it came first.
            if step.block == (block if not step.before else block + 1):
                left = sizes.prefix + step.targets + fuse
        if any(step.before and step.block == block for step in steps):
            counts[-1] = sizes.prefix + next(step.targets for step in steps if step.before and step.block == block)
    return counts
