"""`GatherTokens`: picks tokens per sample of a batch, as token pruning does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgekit.graph.operators.base import Attributes, Operator, Shape, parse_function, shape_error

if TYPE_CHECKING:
    import torch

_BODY = """
GatherTokens (tokens, indices) => (picked)
{
    last = Constant <value_ints = [-1]> ()
    coordinates = Unsqueeze (indices, last)
    picked = GatherND <batch_dims = 1> (tokens, coordinates)
}
"""


def _build() -> ir.Function:
    return parse_function(_BODY)


def _infer_shape(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    """`[B, N, C]` and `[B, k]` to `[B, k, C]`."""
    if [len(shape) for shape in shapes] != [3, 2] or shapes[0][0] != shapes[1][0]:
        raise shape_error("GatherTokens", "tokens [B, N, C] and indices [B, k]", shapes)
    (batch, _, channels), (_, count) = shapes
    return ((batch, count, channels),)


def _evaluate(inputs: Sequence[torch.Tensor], attributes: Attributes) -> tuple[torch.Tensor, ...]:
    import torch

    tokens, indices = inputs
    samples = torch.arange(tokens.shape[0], device=tokens.device)
    return (tokens[samples[:, None], indices],)


OPERATOR = Operator("GatherTokens", _build, _infer_shape, lambda dtypes: (dtypes[0],), _evaluate)
"""`GatherTokens (tokens: T [B, N, C], indices: int64 [B, k]) -> T [B, k, C]`; a negative index counts from the last token."""
