"""Affiners: a few parameters a task beside a frozen layer, which scale, shift and slightly extend what it computes.

Scale and shift are part of the layer's weights, or of its dequantization scales, once it runs (the passes `fold-scale` and
`fold-quantized-scale`); what stays is the low-rank branch, and without its ReLU (`linear`) not even that (`merge-linears`).

Source: Nair, Valanarasu & Patel 2024, "Diffscaler: Enhancing the Generative Prowess of Diffusion Transformers". The split of the branch's
factor between s and W_up, and the default rank, are ours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.errors import DataError


class Affiner(nn.Module):
    """y = (1 + a) ⊙ (W·x) + b̂ + b + s · W_up · ReLU(W_down · x) around a frozen linear layer (W, b̂).

    It starts as the layer itself: a = b = 0, W_up = 0, s = 1. Only its own parameters are trained: 2·out + rank·(in + out) + 1.

    Args:
        layer: The layer; its parameters are frozen.
        rank: Width of the branch.
        linear: Leaves out the ReLU: then everything folds into one layer.
    """

    def __init__(self, layer: nn.Linear, rank: int = 8, *, linear: bool = False) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank} must be at least 1")
        self.layer, self.linear = layer.requires_grad_(False), linear
        weight = layer.weight.detach()
        self.scale = nn.Parameter(weight.new_zeros(layer.out_features))
        self.shift = nn.Parameter(weight.new_zeros(layer.out_features))
        self.down = nn.Parameter(weight.new_empty(rank, layer.in_features))
        self.up = nn.Parameter(weight.new_zeros(layer.out_features, rank))
        self.gain = nn.Parameter(weight.new_ones(()))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., in]` to `[..., out]`."""
        y = (1 + self.scale) * functional.linear(x, self.layer.weight)
        if self.layer.bias is not None:
            y = y + self.layer.bias
        inner = functional.linear(x, self.down)
        return y + self.shift + self.gain * functional.linear(inner if self.linear else functional.relu(inner), self.up)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The layer with scale and shift in its weights, W' = diag(1 + a)·W and b' = b̂ + b; with `linear` the branch too.

        Without `linear` it lacks the branch.
        """
        layer = nn.Linear(self.layer.in_features, self.layer.out_features, dtype=self.layer.weight.dtype, device=self.layer.weight.device)
        weight = (1 + self.scale.double())[:, None] * self.layer.weight.double()
        if self.linear:
            weight = weight + self.gain.double() * self.up.double() @ self.down.double()
        bias = self.shift.double() if self.layer.bias is None else self.layer.bias.double() + self.shift.double()
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
        return layer


def attach(module: nn.Module, rank: int = 8, *, linear: bool = False) -> list[Affiner]:
    """Freezes `module` and puts an Affiner around every linear layer in it, in place; returns them in the order of the module."""
    module.requires_grad_(False)
    made = []
    for parent in list(module.modules()):
        if isinstance(parent, Affiner):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                affiner = Affiner(child, rank, linear=linear)
                setattr(parent, name, affiner)
                made.append(affiner)
    return made


def pack(module: nn.Module) -> dict[str, Tensor]:
    """The task's parameters: those of all Affiners in `module` by name, without the frozen layers."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, Affiner)}
    own = {f"{name}.{key}" if name else key: tensor for name, part in found.items() for key, tensor in part.named_parameters(recurse=False)}
    return {name: tensor.detach().clone() for name, tensor in own.items()}


@torch.no_grad()
def unpack(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Puts a task's parameters into the Affiners of `module`.

    Raises:
        DataError: Names or shapes are not those of the module's Affiners.
    """
    current = pack(module)
    if current.keys() != tensors.keys() or any(current[name].shape != tensors[name].shape for name in current):
        wrong = sorted(current.keys() ^ tensors.keys()) or [name for name in current if current[name].shape != tensors[name].shape]
        raise DataError(f"the task's parameters do not fit the module's Affiners: '{wrong[0]}'", fix="attach Affiners of the same rank")
    parameters = dict(module.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def fit_scale_shift(product: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares per channel: 1 + a = cov(y*, Wx)/var(Wx) and b' = mean(y*) − (1 + a)·mean(Wx), without a gradient step.

    Args:
        product: What the layer computes without its bias, W·x, `[S, C]` over samples.
        wanted: What it should give, y*, `[S, C]`.

    Returns:
        a `[C]` and b' `[C]`, the whole bias (b̂ + b). A channel that does not vary keeps a = 0.

    Raises:
        DataError: The two differ in shape, or there is no sample.
    """
    if product.shape != wanted.shape or product.ndim != 2 or len(product) == 0:
        raise DataError(
            f"scale and shift are fitted to samples of one shape [S, C], not {tuple(product.shape)} and {tuple(wanted.shape)}",
            fix="flatten batch and positions of both into one axis",
        )
    x, y = product.double(), wanted.double()
    centred = x - x.mean(0)
    variance = centred.square().mean(0)
    covariance = (centred * (y - y.mean(0))).mean(0)
    scale = torch.where(variance > 0, covariance / variance.clamp_min(torch.finfo(torch.float64).tiny), 1.0)
    return (scale - 1).to(product.dtype), (y.mean(0) - scale * x.mean(0)).to(product.dtype)
