"""Linear interpolation at arbitrary places, which region pooling and deformable convolution share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def linear_samples(x: Tensor, places: Sequence[Tensor]) -> Tensor:
    """Reads `x` between its elements, with zeros outside.

    Args:
        x: `[B, C, D1 … Dr]`.
        places: Per spatial axis the coordinate in elements, `[B, *out]`.

    Returns:
        `[B, C, *out]`.
    """
    batch, channels, *sizes = x.shape
    flat = x.reshape(batch, channels, -1)
    floors = [torch.floor(place) for place in places]
    out = places[0].shape[1:]
    result = x.new_zeros(batch, channels, *out)
    for corner in itertools.product((0, 1), repeat=len(sizes)):
        weight = torch.ones_like(places[0])
        index = torch.zeros(places[0].shape, dtype=torch.int64)
        inside = torch.ones(places[0].shape, dtype=torch.bool)
        for side, place, floor, size in zip(corner, places, floors, sizes, strict=True):
            position = floor.long() + side
            weight = weight * (place - floor if side else 1 - (place - floor))
            inside &= (position >= 0) & (position < size)
            index = index * size + position.clamp(0, size - 1)
        gathered = torch.gather(flat, 2, index.reshape(batch, 1, -1).expand(-1, channels, -1)).reshape(batch, channels, *out)
        result = result + gathered * (weight * inside).unsqueeze(1)
    return result
