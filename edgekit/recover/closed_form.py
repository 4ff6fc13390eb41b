"""The last product of each block by least squares: no steps, and seconds for a whole network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.recover.blockwise import Unit
from edgekit.recover.network import Network, Samples

_SHRINK = 1e-2
"""How much a refit is drawn to the old weights, as a share of the mean square of its inputs."""
_ROWS_A_WEIGHT = 10
_ROWS_A_SCALE = 32


@dataclass(frozen=True)
class Rows:
    """What a product sees and what it should give, token by token, in float64.

    Attributes:
        x: Its inputs, `[R, d]`.
        y: What it should give, `[R, C]`.
    """

    x: Tensor
    y: Tensor


def ridge(rows: Rows, weight: Tensor, bias: Tensor | None, shrink: float = _SHRINK) -> tuple[Tensor, Tensor | None]:
    """Weight `[d, C]` and bias `[C]` of least squares, shrunk to those that there are: to the same for an infinite `shrink`.

    With centred x and y: ΔW = (xᵀx + λ·I)⁻¹ · xᵀ(y − x·W), λ being `shrink` times the mean of the diagonal of xᵀx.
    """
    x, y = (rows.x, rows.y) if bias is None else (rows.x - rows.x.mean(0), rows.y - rows.y.mean(0))
    gram = x.T @ x
    penalty = shrink * gram.diagonal().mean().clamp(min=1e-12)
    change = torch.linalg.solve(gram + penalty * torch.eye(len(gram), dtype=gram.dtype), x.T @ (y - x @ weight))
    refit = weight + change
    return refit, None if bias is None else rows.y.mean(0) - rows.x.mean(0) @ refit


def scale_and_shift(rows: Rows, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias that give, in each channel, the best multiple of what they gave, plus a constant."""
    now = rows.x @ weight
    centred, wanted = now - now.mean(0), rows.y - rows.y.mean(0)
    scale = (centred * wanted).sum(0) / centred.square().sum(0).clamp(min=1e-12)
    scaled = weight * scale.clamp(0.5, 2.0)
    return scaled, None if bias is None else rows.y.mean(0) - rows.x.mean(0) @ scaled


def shift(rows: Rows, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The bias that gives every channel the right mean."""
    return weight, None if bias is None else rows.y.mean(0) - rows.x.mean(0) @ weight


def refit(unit: Unit) -> dict[str, Tensor]:
    """New weights of the product at the end of a block; empty where there is none that may change."""
    linear = unit.segment.linear
    if linear is None or linear.weight not in unit.segment.trainable:
        return {}
    network = unit.network
    weight = network.parameters[linear.weight].detach().double()
    bias = network.parameters[linear.bias].detach().double() if linear.bias in network.parameters else None
    rows = _rows(network, unit, linear.x, linear.stream)
    method = ridge if len(rows.x) >= _ROWS_A_WEIGHT * len(weight) else scale_and_shift if len(rows.x) >= _ROWS_A_SCALE else shift
    changed, moved = method(rows, weight, bias)
    found = {linear.weight: changed.float()}
    if moved is not None and linear.bias is not None:
        found[linear.bias] = moved.float()
    return found


def _rows(network: Network, unit: Unit, x: str, stream: str) -> Rows:
    names = [*dict.fromkeys([x, stream, *(name for name, _ in unit.segment.marks)])]
    _, seen = network.run(unit.train.inputs, names)
    target, counts = unit.train.aligned(seen)
    wanted = target - seen[stream]
    rows, given = seen[x].double().flatten(0, -2), wanted.double().flatten(0, -2)
    if counts is not None:
        alive = counts.flatten()
        rows, given = rows[alive], given[alive]
    return Rows(rows, given)


__all__ = ["Rows", "Samples", "refit", "ridge", "scale_and_shift", "shift"]
