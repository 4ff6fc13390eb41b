"""MIL's activations, by the formulas of its documentation, in forms that neither overflow nor cancel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.arguments import number


def _clamped_relu(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return torch.minimum(torch.where(x >= 0, x, alpha * x), beta)


def _elu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, alpha * torch.expm1(x))


def _sigmoid_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate="tanh")


_GELU: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "EXACT": functional.gelu,
    "TANH_APPROXIMATION": _tanh_gelu,
    "SIGMOID_APPROXIMATION": _sigmoid_gelu,
}


def _gelu(x: torch.Tensor, mode: str = "EXACT") -> torch.Tensor:
    if mode not in _GELU:
        raise ValueError(f"gelu has no mode '{mode}'")
    return _GELU[mode](x)


def _leaky_relu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu(x, float(number(alpha)))


def _linear_activation(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return x * alpha + beta


def _prelu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return functional.prelu(x, alpha)


def _relu(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x)


def _relu6(x: torch.Tensor) -> torch.Tensor:
    return torch.clamp(x, 0, 6)


def _scaled_tanh(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return alpha * torch.tanh(beta * x)


def _sigmoid(x: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(x)


def _sigmoid_hard(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return functional.silu(x)


def _softmax(x: torch.Tensor, axis: torch.Tensor | int = -1) -> torch.Tensor:
    return torch.softmax(x, int(number(axis)))


def _softplus(x: torch.Tensor) -> torch.Tensor:
    """`log(1 + e^x)`, which above 20 is `x` to more digits than float32 has."""
    return functional.softplus(x)


def _softplus_parametric(x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """`alpha_i * log(1 + e^(beta_i * x_i))` for the channels `i`, which lie along the second dimension."""
    channels = [-1] + [1] * (x.dim() - 2)
    return alpha.reshape(channels) * functional.softplus(beta.reshape(channels) * x)


def _softsign(x: torch.Tensor) -> torch.Tensor:
    return functional.softsign(x)


def _thresholded_relu(x: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= alpha, x, 0.0)


TABLE: dict[str, Callable[..., Any]] = {
    "clamped_relu": _clamped_relu,
    "elu": _elu,
    "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "linear_activation": _linear_activation,
    "prelu": _prelu,
    "relu": _relu,
    "relu6": _relu6,
    "scaled_tanh": _scaled_tanh,
    "sigmoid": _sigmoid,
    "sigmoid_hard": _sigmoid_hard,
    "silu": _silu,
    "softmax": _softmax,
    "softplus": _softplus,
    "softplus_parametric": _softplus_parametric,
    "softsign": _softsign,
    "thresholded_relu": _thresholded_relu,
}
