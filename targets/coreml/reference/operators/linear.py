"""Matrix products of MIL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.arguments import number


def _promoted(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors in one type: iOS17 lets the arguments of a product have different ones."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`."""
    if x.is_floating_point() and weight.dtype == x.dtype:
        return functional.linear(x, weight, bias)
    left, right = _promoted(x, weight)
    product = torch.matmul(left, right.T)
    return product if bias is None else product + bias


def matmul(
    x: torch.Tensor, y: torch.Tensor, transpose_x: torch.Tensor | bool = False, transpose_y: torch.Tensor | bool = False
) -> torch.Tensor:
    """Batched product with numpy's broadcasting; transposing a vector has no effect."""
    left, right = (x, y) if x.dtype == y.dtype else _promoted(x, y)
    if number(transpose_x) and x.dim() > 1:
        left = left.transpose(-1, -2)
    if number(transpose_y) and y.dim() > 1:
        right = right.transpose(-1, -2)
    return torch.matmul(left, right)


def einsum(values: list[torch.Tensor], equation: str) -> torch.Tensor:
    """Einstein summation; dimensions of size 1 broadcast."""
    return torch.einsum(equation, *_promoted(*values))


def scaled_dot_product_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """`softmax(query @ key.T / sqrt(E) + mask) @ value`; False in a mask of booleans stands for minus infinity.

    PyTorch's own operator gives 0 where a mask leaves a query nothing to attend to; the documented formula, taken for masks, gives NaN.
    """
    if attn_mask is None:
        return functional.scaled_dot_product_attention(query, key, value)
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


TABLE: dict[str, Callable[..., Any]] = {
    "linear": linear,
    "matmul": matmul,
    "einsum": einsum,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
