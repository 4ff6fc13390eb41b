"""The plain vision transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"): the subject of token and attention passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgekit.models.layers import Attention, Mlp, PatchEmbed

_EPSILON = 1e-6
"""Of the layer normalizations, as in timm's ViT."""


class Block(nn.Module):
    """One pre-norm encoder block: `x + attn(norm1(x))`, then `x + mlp(norm2(x))` (equations 2 and 3)."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=_EPSILON)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPSILON)
        self.mlp = Mlp(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Maps tokens `[B, N, dim]` to `[B, N, dim]`."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """A ViT with a class token, learned position embeddings and a linear head on the normalized class token.

    Position embeddings start as 2-D sines and cosines: on little data they are learned much sooner than from noise.

    Args:
        side: Height and width of the image in pixels; a multiple of `patch`.
        patch: Height and width of a patch in pixels.
        channels: Channels of the image.
        dim: Width of a token; a multiple of 4.
        depth: Number of blocks.
        heads: Attention heads of a block; divides `dim`.
        mlp_ratio: Width of the hidden layer of a block's MLP, in multiples of `dim`.
        classes: Number of logits.
    """

    def __init__(self, *, side: int, patch: int, channels: int, dim: int, depth: int, heads: int, mlp_ratio: int, classes: int) -> None:
        super().__init__()
        if side % patch:
            raise ValueError(f"side {side} is not a multiple of patch {patch}")
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (side // patch) ** 2, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio * dim) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)
        self.head = nn.Linear(dim, classes)
        self._initialize()

    def _initialize(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        side = math.isqrt(self.pos_embed.shape[1] - 1)
        with torch.no_grad():
            self.pos_embed[0, 1:] = sincos_positions(side, self.pos_embed.shape[2])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[B, channels, side, side]` to logits `[B, classes]`."""
        tokens = self.patch_embed(x)
        cls = self.cls_token.expand(tokens.shape[0], -1, -1)
        tokens = torch.cat((cls, tokens), dim=1) + self.pos_embed
        tokens = self.norm(self.blocks(tokens))
        logits: Tensor = self.head(tokens[:, 0])
        return logits


def sincos_positions(side: int, dim: int) -> Tensor:
    """Returns sine-cosine embeddings of a square grid, `[side * side, dim]`: half of `dim` for the row, half for the column.

    The frequencies are those of Vaswani et al. 2017, section 3.5, per axis as in MoCo v3 (Chen et al. 2021, section 4).
    """
    frequencies = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(side)[:, None] * frequencies
    axis = torch.cat((angles.sin(), angles.cos()), dim=1)
    rows, columns = axis.repeat_interleave(side, 0), axis.repeat(side, 1)
    return torch.cat((rows, columns), dim=1)
