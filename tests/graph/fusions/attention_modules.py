"""PyTorch modules that write softmax attention in the ways that published networks do."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812


class Sdpa(nn.Module):
    """F.scaled_dot_product_attention with its options."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.options = options

    def forward(self, q, k, v, mask=None):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)


class Product(nn.Module):
    """Scale after the product."""

    def forward(self, q, k, v):
        return (q @ k.transpose(-2, -1) * 0.3).softmax(-1) @ v


class MultiHead(nn.Module):
    """nn.MultiheadAttention; with `weights` it takes its path of three axes and a bmm."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.weights = weights

    def forward(self, x):
        return self.attention(x, x, x, need_weights=self.weights)[0]


class Timm(nn.Module):
    """The attention of timm's vision transformer: one qkv, five axes, scale on q."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.drop = nn.Linear(16, 48), nn.Linear(16, 16), nn.Dropout(0.1)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        attention = self.drop(((q * (c // 2) ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1))
        return self.proj((attention @ v).transpose(1, 2).reshape(b, n, c))


class Window(nn.Module):
    """Swin's: a learned relative-position bias, and with `windows` the mask of shifted windows over the batch of windows."""

    def __init__(self, windows: int = 0) -> None:
        super().__init__()
        self.qkv, self.windows = nn.Linear(16, 48), windows
        self.table = nn.Parameter(torch.randn(9, 2))
        y, x = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        y, x = y.flatten(), x.flatten()
        self.register_buffer("relative_position_index", (y[:, None] - y + 1) * 3 + x[:, None] - x + 1)
        self.register_buffer("mask", torch.where(torch.rand(max(windows, 1), 4, 4) > 0.5, 0.0, -100.0))

    def forward(self, x):  # [B windows, 4, 16]
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q * (c // 2) ** -0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.relative_position_index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.windows:
            scores = scores.view(b // self.windows, self.windows, 2, n, n) + self.mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, 2, n, n)
        return (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, c)


class Bert(nn.Module):
    """BERT's: q, k and v apart, Div by the root, an additive mask of -10000 made from ones and zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, mask):
        q, k, v = (f(x).view(*x.shape[:2], 2, 8).permute(0, 2, 1, 3) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / math.sqrt(8) + (1 - mask[:, None, None]) * -10000.0
        return (F.dropout(scores.softmax(-1), 0.1, self.training) @ v).permute(0, 2, 1, 3).reshape(x.shape)


class Grouped(nn.Module):
    """Llama's: key and value heads repeated, one by repeat_interleave, the other by expand; causal; Softmax in float32."""

    def forward(self, q, k, v):
        k = k.repeat_interleave(2, dim=1)
        v = v[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape[0], q.shape[1], v.shape[2], v.shape[3])
        mask = torch.full((q.shape[2], k.shape[2]), torch.finfo(q.dtype).min).triu(1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(8) + mask
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


class Filled(nn.Module):
    """GPT's and DistilBERT's: masked_fill with the scores where a mask is zero."""

    def __init__(self, fill: float) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, q, k, v, mask):
        return (q @ k.transpose(-2, -1) * 0.3).masked_fill(mask == 0, self.fill).softmax(-1) @ v


class Letters(nn.Module):
    """Two einsums."""

    def __init__(self, scores: str, result: str) -> None:
        super().__init__()
        self.scores, self.result = scores, result

    def forward(self, q, k, v):
        return torch.einsum(self.result, (torch.einsum(self.scores, q, k) * 0.3).softmax(-1), v)


class Channels(nn.Module):
    """EfficientViT's (Liu et al. 2023): tokens last, `v @ attention.T`."""

    def forward(self, q, k, v):  # [B, H, D, N]
        attention = (q.transpose(-2, -1) @ k * 0.3).softmax(-1)
        return v @ attention.transpose(-2, -1)


class SoftCap(nn.Module):
    """Gemma's: scores bounded by a tanh before the mask."""

    def forward(self, q, k, v, mask):
        scores = torch.tanh(q @ k.transpose(-2, -1) * 0.5 / 3.0) * 3.0 + mask
        return scores.softmax(-1) @ v
