"""Layers that several networks of the zoo share. Parameter names follow timm, so that published weights and tools fit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PatchEmbed(nn.Module):
    """Cuts an image into square patches and projects each one to a token (Dosovitskiy et al. 2021, equation 1)."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, channels, H, W]` to `[B, H/patch * W/patch, dim]`, row by row."""
        tokens: Tensor = self.proj(x)
        return tokens.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values (Vaswani et al. 2017, section 3.2)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of {heads} heads")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens `[B, N, dim]` to `[B, N, dim]`."""
        batch, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))
        return projected


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens `[B, N, dim]` to `[B, N, dim]`."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep the size at stride 1, and its batch normalization."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, in_channels, H, W]` to `[B, out_channels, ceil(H/stride), ceil(W/stride)]`; `kernel` is odd."""
        out: Tensor = self.bn(self.conv(x))
        return out


def global_average(x: Tensor) -> Tensor:
    """Averages feature maps `[B, C, H, W]` over their pixels: `[B, C]`."""
    return torch.flatten(functional.adaptive_avg_pool2d(x, 1), 1)
