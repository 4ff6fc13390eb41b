"""LookupViT: many lookup tokens get a narrow layer, a few compressed tokens a whole block, and one attention matrix links the two.

Source: Koner et al. 2024, "LookupViT: Compressing visual information to a limited number of tokens" (section 3). There is no official code:
the attention matrix goes back transposed and not normalized again, and queries and keys are normalized after their projections.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgekit.models.layers import Attention, Mlp, PatchEmbed
from edgekit.models.vit import sincos_positions

_EPSILON = 1e-6


class Gather(nn.Module):
    """Compressed tokens look at lookup tokens; the attention matrix is kept for the way back."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.q_norm, self.k_norm = (nn.LayerNorm(dim, eps=_EPSILON) for _ in range(2))

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """Maps `[B, M, dim]` and `[B, N, dim]` to what is added to the first, and the weights `[B, H, M, N]`."""
        query = _split(self.q_norm(self.q(compressed)), self.heads)
        key, value = _split(self.k_norm(self.k(lookup)), self.heads), _split(self.v(lookup), self.heads)
        weights = torch.softmax(query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5), -1)
        added: Tensor = self.proj(_joined(weights @ value))
        return added, weights


class Write(nn.Module):
    """Lookup tokens take from the compressed tokens, by the same weights transposed."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)
        self.v, self.proj = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, compressed: Tensor, weights: Tensor) -> Tensor:
        """Maps `[B, M, dim]` and weights `[B, H, M, N]` to what is added to the lookup tokens, `[B, N, dim]`."""
        value = _split(self.v(self.norm(compressed)), weights.shape[1])
        added: Tensor = self.proj(_joined(weights.transpose(2, 3) @ value))
        return added


class Block(nn.Module):
    """Gather, refine, write back, and a narrow MLP for the lookup tokens. Names of the refining part are those of timm's ViT."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int = 4, narrow: int = 2) -> None:
        super().__init__()
        self.gather = Gather(dim, heads)
        self.norm1, self.attn = nn.LayerNorm(dim, eps=_EPSILON), Attention(dim, heads)
        self.norm2, self.mlp = nn.LayerNorm(dim, eps=_EPSILON), Mlp(dim, mlp_ratio * dim)
        self.write = Write(dim)
        self.norm_l, self.mlp_l = nn.LayerNorm(dim, eps=_EPSILON), Mlp(dim, dim // narrow)

    def forward(self, compressed: Tensor, lookup: Tensor) -> tuple[Tensor, Tensor]:
        """Maps compressed `[B, M, dim]` and lookup tokens `[B, N, dim]` to the same."""
        added, weights = self.gather(compressed, lookup)
        compressed = compressed + added
        compressed = compressed + self.attn(self.norm1(compressed))
        compressed = compressed + self.mlp(self.norm2(compressed))
        lookup = lookup + self.write(compressed, weights)
        return compressed, lookup + self.mlp_l(self.norm_l(lookup))


class LookupViT(nn.Module):
    """The classifier, on the mean of the compressed tokens. Their number is chosen when it is deployed: no weight depends on it.

    Args:
        side: Height and width of the image; a multiple of `patch`.
        patch: Height and width of a patch.
        channels: Channels of the image.
        dim: Width D of a token; a multiple of 4.
        depth: Number of blocks.
        heads: Heads of every attention.
        classes: Number of logits.
        compressed: Number M of compressed tokens, a square.
    """

    def __init__(
        self, *, side: int, patch: int, channels: int, dim: int, depth: int, heads: int, classes: int, compressed: int = 25
    ) -> None:
        super().__init__()
        if side % patch:
            raise ValueError(f"side {side} is not a multiple of patch {patch}")
        self.grid = side // patch
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.pos_embed = nn.Parameter(sincos_positions(self.grid, dim)[None])
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=_EPSILON)
        self.head = nn.Linear(dim, classes)
        self.register_buffer("resize", torch.zeros(0), persistent=False)
        self.compress_to(compressed)

    def compress_to(self, tokens: int) -> LookupViT:
        """Sets the number of compressed tokens.

        Raises:
            ValueError: It is no square, or more than there are patches.
        """
        side = math.isqrt(max(tokens, 0))
        if side < 1 or side * side != tokens or side > self.grid:
            raise ValueError(f"{tokens} compressed tokens are no square grid within {self.grid}x{self.grid} patches")
        axis = interpolation(self.grid, side).to(self.pos_embed)
        self.resize = torch.kron(axis, axis)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[B, channels, side, side]` to logits `[B, classes]`."""
        lookup = self.patch_embed(x) + self.pos_embed
        compressed = self.resize @ lookup
        for block in self.blocks:
            compressed, lookup = block(compressed, lookup)
        logits: Tensor = self.head(self.norm(compressed.mean(1)))
        return logits


def interpolation(source: int, target: int) -> Tensor:
    """The matrix `[target, source]` of linear interpolation between pixel centres, as PyTorch's `interpolate` does it by default."""
    places = ((torch.arange(target) + 0.5) * source / target - 0.5).clamp(0, source - 1)
    low = places.floor().long().clamp(max=max(source - 2, 0))
    share = places - low
    matrix = torch.zeros(target, source)
    rows = torch.arange(target)
    matrix[rows, low] = 1 - share
    matrix[rows, (low + 1).clamp(max=source - 1)] += share
    return matrix


def _split(x: Tensor, heads: int) -> Tensor:
    batch, tokens, dim = x.shape
    return x.reshape(batch, tokens, heads, dim // heads).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    batch, heads, tokens, depth = x.shape
    return x.transpose(1, 2).reshape(batch, tokens, heads * depth)
