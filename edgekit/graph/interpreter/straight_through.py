"""Gradients of what has none: rounding, signs and selection, after Bengio et al. 2013 ("Estimating or Propagating Gradients")."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, result: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(ctx.dtype), None


class _Sign(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return torch.sign(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (tensor,) = ctx.saved_tensors
        inside: Tensor = tensor.abs() <= 1
        return gradients[0] * inside


class _Gate(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(selected: Tensor, scores: Tensor) -> Tensor:
        return selected.view_as(selected)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        selected, scores = inputs
        ctx.save_for_backward(selected)
        ctx.shape, ctx.dtype = scores.shape, scores.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (selected,) = ctx.saved_tensors
        gradient = gradients[0]
        return gradient, (gradient * selected).sum_to_size(ctx.shape).to(ctx.dtype)


def through(tensor: Tensor, result: Tensor) -> Tensor:
    """Gives `result`, and its gradient to `tensor` unchanged."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Through.apply(tensor, result)  # type: ignore[no-any-return, no-untyped-call]
    return result


def round_half_even(tensor: Tensor) -> Tensor:
    """Round to the nearest integer, halves to the even one; the gradient is that of the identity."""
    return through(tensor, torch.round(tensor.detach()))


def sign(tensor: Tensor) -> Tensor:
    """Sign with the gradient of the identity where |x| <= 1, else zero (Hubara et al. 2016, "Binarized Neural Networks", equation 4)."""
    if tensor.requires_grad and torch.is_grad_enabled():
        return _Sign.apply(tensor)  # type: ignore[no-any-return, no-untyped-call]
    return torch.sign(tensor)


def gate(selected: Tensor, scores: Tensor) -> Tensor:
    """Gives `selected` unchanged; `scores` get the gradient of `selected * m` at the selection mask m = 1, as if m were the scores.

    Args:
        selected: What was selected, `[..., K, ...]`.
        scores: The scores that selected it, of a shape that broadcasts to that of `selected`.
    """
    return _Gate.apply(selected, scores)  # type: ignore[no-any-return, no-untyped-call]


def round_to_float16(tensor: Tensor) -> Tensor:
    """Rounds float32 values to the nearest float16 (infinite beyond 65504) and back; the gradient passes through unrounded."""
    return through(tensor, tensor.detach().to(torch.float16).to(tensor.dtype))
