"""Tiny PyTorch modules that write one idea each in the ways published networks do, with the whole operators that they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

Shape = tuple[int, ...]
DIM, HEADS = 16, 2
SIZE = DIM // HEADS
TOKENS, IMAGE = (2, 6, DIM), (1, 8, 4, 6)
QKV = ((2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 8))


class Function(nn.Module):
    """A function of the inputs and, perhaps, of modules and parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], *parts: nn.Module) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.parts)


@dataclass(frozen=True)
class Case:
    """A module, the shapes of its inputs (`bool` ones are made by comparison), and what its canonical graph holds.

    Attributes:
        build: Makes the module.
        shapes: Of the inputs.
        whole: Whole operators and how many of each; no other operator of `WHOLE` may occur.
        plain: Operators that may stay although they are the parts of something.
        newest: True where only the exporters of torch 2 can write it.
        boolean: Positions of inputs that are boolean masks.
    """

    build: Callable[[], nn.Module]
    shapes: tuple[Shape, ...]
    whole: dict[str, int]
    plain: tuple[str, ...] = ()
    newest: bool = False
    boolean: tuple[int, ...] = field(default=())


# --- attention --------------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A pre-norm block of a vision transformer with nn.MultiheadAttention."""

    def __init__(self, weights: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(DIM, 2 * DIM), nn.GELU(), nn.Linear(2 * DIM, DIM))
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=self.weights)[0]
        return x + self.mlp(self.norm2(x))


class TimmAttention(nn.Module):
    """The attention of timm: one Linear for queries, keys and values; `fused` or written out, q and k normalized or not."""

    def __init__(self, fused: bool, split: str = "unbind", normalized: bool = False) -> None:
        super().__init__()
        self.qkv, self.proj, self.fused, self.split = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM), fused, split
        self.q_norm = nn.LayerNorm(SIZE) if normalized else nn.Identity()
        self.k_norm = nn.LayerNorm(SIZE) if normalized else nn.Identity()

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b, n, c = x.shape
        h = self.qkv(x)
        if self.split == "unbind":
            q, k, v = h.reshape(b, n, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        elif self.split == "index":
            h = h.reshape(b, n, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
            q, k, v = h[0], h[1], h[2]
        elif self.split == "chunk":
            q, k, v = (t.view(b, n, HEADS, SIZE).transpose(1, 2) for t in h.chunk(3, dim=-1))
        elif self.split == "slice":
            q, k, v = (h[:, :, i * c : (i + 1) * c].reshape(b, n, HEADS, SIZE).transpose(1, 2) for i in range(3))
        else:  # heads outermost, as in LeViT
            q, k, v = (t.permute(0, 2, 1, 3) for t in h.view(b, n, HEADS, -1).split([SIZE, SIZE, SIZE], dim=3))
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._operands(x)
        q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q * SIZE ** (-0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class Window(nn.Module):
    """Swin's: a relative-position bias from a table, and with `shifted` the mask of shifted windows, fused or written out."""

    def __init__(self, shifted: bool, fused: bool) -> None:
        super().__init__()
        self.qkv, self.shifted, self.fused = nn.Linear(DIM, 3 * DIM), shifted, fused
        self.table = nn.Parameter(torch.randn(9, HEADS))
        y, x = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
        y, x = y.flatten(), x.flatten()
        self.register_buffer("index", (y[:, None] - y + 1) * 3 + x[:, None] - x + 1)
        windows = torch.arange(4).view(4, 1, 1).expand(4, 4, 4)
        self.register_buffer("mask", torch.where((torch.arange(16).view(1, 4, 4) + windows) % 3 == 0, -100.0, 0.0))

    def forward(self, image: Tensor) -> Tensor:  # [B, 4, 4, C]
        b = image.shape[0]
        x = torch.roll(image, (-1, -1), (1, 2)) if self.shifted else image
        x = x.view(b, 2, 2, 2, 2, DIM).permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, 4, DIM)
        q, k, v = self.qkv(x).reshape(-1, 4, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
        if self.fused:
            mask = bias
            if self.shifted:
                mask = self.mask.view(1, 4, 1, 4, 4).expand(b, -1, HEADS, -1, -1).reshape(-1, HEADS, 4, 4) + bias
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        else:
            scores = (q * SIZE**-0.5) @ k.transpose(-2, -1) + bias
            if self.shifted:
                scores = (scores.view(b, 4, HEADS, 4, 4) + self.mask.unsqueeze(1).unsqueeze(0)).view(-1, HEADS, 4, 4)
            y = scores.softmax(-1) @ v
        x = y.transpose(1, 2).reshape(-1, 4, DIM).view(b, 2, 2, 2, 2, DIM).permute(0, 1, 3, 2, 4, 5).contiguous().view(image.shape)
        return torch.roll(x, (1, 1), (1, 2)) if self.shifted else x


def _product(scores: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Function(lambda q, k, v: scores(q, k).softmax(-1) @ v)


def _sdpa(**options: object) -> Callable[[], nn.Module]:
    return lambda: Function(
        lambda q, k, v, *mask: F.scaled_dot_product_attention(q, k, v, *mask, **options)  # type: ignore[arg-type]
    )


class Cross(nn.Module):
    """Queries from one sequence, keys and values from another, in three axes with heads merged into the batch (bmm)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, n, _ = x.shape

        def heads(t: Tensor) -> Tensor:
            return t.view(b, -1, HEADS, SIZE).transpose(1, 2).contiguous().view(b * HEADS, -1, SIZE)

        q, k, v = heads(self.q(x) * SIZE**-0.5), heads(self.k(context)), heads(self.v(context))
        y = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)
        return y.view(b, HEADS, n, SIZE).transpose(1, 2).reshape(b, n, DIM)


class Causal(nn.Module):
    """GPT-2's: one Linear, split, a triangular buffer of ones that masked_fill reads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.register_buffer("bias", torch.tril(torch.ones(8, 8)).view(1, 1, 8, 8))

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = (t.view(b, n, HEADS, SIZE).transpose(1, 2) for t in self.qkv(x).split(c, dim=2))
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        scores = scores.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf"))
        return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).contiguous().view(b, n, c)


ONE = {"Attention": 1}
GROUPED = ((2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8))
ATTENTION = {
    "vit block": Case(Block, (TOKENS,), {"Attention": 1, "LayerNormalization": 2, "Gelu": 1}),
    "vit block, bmm": Case(lambda: Block(True), (TOKENS,), {"Attention": 1, "LayerNormalization": 2, "Gelu": 1}),
    "sdpa": Case(_sdpa(), QKV, ONE),
    "sdpa, scale": Case(_sdpa(scale=0.3), QKV, ONE),
    "sdpa, mask": Case(_sdpa(), (*QKV, (2, 1, 5, 6)), ONE),
    # Below opset 23 dynamo hides by a finite number, whose rows without any key are means: an added mask.
    "sdpa, boolean mask": Case(_sdpa(), (*QKV, (2, 1, 5, 6)), ONE, plain=("Where",), boolean=(3,)),
    "sdpa, causal": Case(_sdpa(is_causal=True), QKV, ONE),
    "sdpa, three axes": Case(_sdpa(), ((3, 5, 8), (3, 6, 8), (3, 6, 8)), ONE),
    "sdpa, groups": Case(_sdpa(enable_gqa=True), GROUPED, ONE),
    "sdpa, groups by repeat": Case(
        lambda: Function(lambda q, k, v: F.scaled_dot_product_attention(q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1))),
        GROUPED,
        ONE,
    ),
    "timm, fused": Case(lambda: TimmAttention(True), (TOKENS,), ONE),
    "timm, written out": Case(lambda: TimmAttention(False), (TOKENS,), ONE),
    "timm, q and k normalized": Case(lambda: TimmAttention(True, normalized=True), (TOKENS,), {"Attention": 1, "LayerNormalization": 2}),
    **{
        f"timm, {split}": Case(lambda split=split: TimmAttention(False, split), (TOKENS,), ONE)
        for split in ("index", "chunk", "slice", "heads")
    },
    **{
        f"swin, {'fused' if fused else 'written out'}{', shifted' if shifted else ''}": Case(
            lambda shifted=shifted, fused=fused: Window(shifted, fused), ((2, 4, 4, DIM),), ONE
        )
        for fused in (True, False)
        for shifted in (True, False)
    },
    "scale on q": Case(_product(lambda q, k: (q * 0.3) @ k.transpose(-2, -1)), QKV, ONE),
    "scale on k": Case(_product(lambda q, k: q @ (k * 0.3).transpose(-2, -1)), QKV, ONE),
    "scale on k transposed": Case(_product(lambda q, k: q @ (k.transpose(-2, -1) * 0.3)), QKV, ONE),
    "scale on both": Case(_product(lambda q, k: (q * 8**-0.25) @ (k * 8**-0.25).transpose(-2, -1)), QKV, ONE),
    "scale by division": Case(_product(lambda q, k: q @ k.transpose(-2, -1) / math.sqrt(8)), QKV, ONE),
    "scale by division of q": Case(_product(lambda q, k: (q / math.sqrt(8)) @ k.transpose(-2, -1)), QKV, ONE),
    "scale after the product": Case(_product(lambda q, k: q @ k.transpose(-2, -1) * 0.3), QKV, ONE),
    "scale by a tensor": Case(_product(lambda q, k: q @ k.transpose(-2, -1) / torch.sqrt(torch.tensor(8.0))), QKV, ONE),
    "no scale": Case(_product(lambda q, k: q @ k.transpose(-2, -1)), QKV, ONE),
    "einsum": Case(_product(lambda q, k: torch.einsum("bhid,bhjd->bhij", q, k) * 0.3), QKV, ONE),
    "cross, three axes": Case(Cross, (TOKENS, (2, 5, DIM)), ONE),
    "gpt": Case(Causal, (TOKENS,), ONE),
}


# --- normalization ----------------------------------------------------------------------------------------------------------------------


class HandNorm(nn.Module):
    """A layer norm written by hand: `square` makes the variance, `join` divides by the deviation; without `mean`, an RMS norm."""

    def __init__(self, square: Callable[[Tensor], Tensor], join: Callable[[Tensor, Tensor], Tensor], mean: bool = True) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(DIM) + 0.5), nn.Parameter(torch.randn(DIM))
        self.square, self.join, self.mean = square, join, mean

    def forward(self, x: Tensor) -> Tensor:
        if self.mean:
            x = x - x.mean(-1, keepdim=True)
        y = self.join(x, self.square(x).mean(-1, keepdim=True) + 1e-5) * self.weight
        return y + self.bias if self.mean else y


class LlamaNorm(nn.Module):
    """Llama's RMS norm: weight first, the reciprocal root after."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(DIM) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float32)
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class ChannelNorm(nn.Module):
    """ConvNeXt's layer norm over the channels of an image: permute, layer_norm, permute."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class HandBatchNorm(nn.Module):
    """Batch norm in inference, by hand, per channel of an image."""

    def __init__(self, frozen: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("variance", torch.rand(8) + 0.5)
        self.conv, self.frozen = nn.Conv2d(8, 8, 1, bias=False), frozen

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        weight, bias, mean, variance = (t.reshape(1, -1, 1, 1) for t in (self.weight, self.bias, self.mean, self.variance))
        if self.frozen:  # as in torchvision's FrozenBatchNorm2d
            scale = weight * (variance + 1e-5).rsqrt()
            return x * scale + (bias - mean * scale)
        return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


LAYER, RMS = {"LayerNormalization": 1}, {"RMSNormalization": 1}
_SQUARES: dict[str, Callable[[Tensor], Tensor]] = {"pow": lambda d: d.pow(2), "mul": lambda d: d * d, "square": torch.square}
_JOINS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sqrt": lambda d, v: d / torch.sqrt(v),
    "rsqrt": lambda d, v: d * torch.rsqrt(v),
    "power": lambda d, v: d * v**-0.5,
    "half power": lambda d, v: d / v**0.5,
}


def _hand(square: str, join: str, mean: bool = True) -> Callable[[], nn.Module]:
    return lambda: HandNorm(_SQUARES[square], _JOINS[join], mean)


def _scaled(module: nn.Module) -> nn.Module:
    """Gives weights, biases and statistics of a module values of their own."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.dtype.is_floating_point:
            tensor.data = torch.rand(tensor.shape) + 0.5 if name.endswith(("weight", "var")) else torch.randn(tensor.shape)
    return module


NORMALIZATION = {
    "layer norm": Case(lambda: _scaled(nn.LayerNorm(DIM)), (TOKENS,), LAYER),
    "layer norm, no affine": Case(lambda: nn.LayerNorm(DIM, elementwise_affine=False), (TOKENS,), LAYER),
    "layer norm, no bias": Case(lambda: _scaled(nn.LayerNorm(DIM, bias=False)), (TOKENS,), LAYER),
    "layer norm, two axes": Case(lambda: _scaled(nn.LayerNorm((6, DIM))), (TOKENS,), LAYER),
    "layer norm of channels": Case(lambda: _scaled(ChannelNorm()), (IMAGE,), LAYER),
    **{
        f"layer norm by hand, {square}, {join}": Case(_hand(square, join), (TOKENS,), LAYER)
        for square, join in (
            ("pow", "sqrt"),
            ("mul", "sqrt"),
            ("square", "rsqrt"),
            ("pow", "rsqrt"),
            ("mul", "power"),
            ("pow", "half power"),
        )
    },
    "layer norm by var": Case(
        lambda: Function(lambda x: (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-5)),
        (TOKENS,),
        LAYER,
    ),
    "layer norm by std": Case(  # of ε beside the deviation, hence no LayerNormalization
        lambda: Function(lambda x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)),
        (TOKENS,),
        {},
        plain=("ReduceMean", "Sqrt", "Pow"),
    ),
    "rms norm": Case(lambda: _scaled(nn.RMSNorm(DIM)), (TOKENS,), RMS, newest=True),
    "rms norm of llama": Case(LlamaNorm, (TOKENS,), RMS),
    **{
        f"rms norm by hand, {square}, {join}": Case(_hand(square, join, False), (TOKENS,), RMS)
        for square, join in (("pow", "rsqrt"), ("mul", "sqrt"), ("square", "power"))
    },
    "batch norm": Case(lambda: _scaled(nn.BatchNorm2d(8)), (IMAGE,), {"BatchNormalization": 1}),
    "batch norm by hand": Case(lambda: HandBatchNorm(False), (IMAGE,), {"BatchNormalization": 1, "Conv": 1}),
    "batch norm, frozen": Case(lambda: HandBatchNorm(True), (IMAGE,), {"BatchNormalization": 1, "Conv": 1}),
    "group norm": Case(lambda: _scaled(nn.GroupNorm(4, 8)), (IMAGE,), {"GroupNormalization": 1}),
    "group norm, one group": Case(lambda: _scaled(nn.GroupNorm(1, 8)), (IMAGE,), {"GroupNormalization": 1}),
    "group norm of tokens": Case(lambda: _scaled(nn.GroupNorm(2, 6)), (TOKENS,), {"GroupNormalization": 1}),
    "instance norm": Case(lambda: _scaled(nn.InstanceNorm2d(8, affine=True)), (IMAGE,), {"InstanceNormalization": 1}),
    "instance norm, no affine": Case(lambda: nn.InstanceNorm2d(8), (IMAGE,), {"InstanceNormalization": 1}),
}


# --- activations, layout, linear layers, shapes -------------------------------------------------------------------------------------------


def _activation(function: Callable[[Tensor], Tensor], **whole: int) -> Case:
    return Case(lambda: Function(function), (TOKENS,), whole)


ACTIVATION = {
    "gelu": _activation(F.gelu, Gelu=1),
    "gelu, tanh": _activation(lambda x: F.gelu(x, approximate="tanh"), Gelu=1),
    "gelu by hand": _activation(lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), Gelu=1),
    "gelu by hand, tanh": _activation(
        lambda x: 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))), Gelu=1
    ),
    "gelu by hand, cube": _activation(lambda x: 0.5 * x * (1 + torch.tanh(0.7978845608 * x * (1 + 0.044715 * x * x))), Gelu=1),
    "silu": _activation(F.silu, Sigmoid=1),
    "silu by hand": _activation(lambda x: torch.sigmoid(x) * x, Sigmoid=1),
    "quick gelu": _activation(lambda x: x * torch.sigmoid(1.702 * x), Sigmoid=1),
    "hardswish": _activation(F.hardswish, HardSwish=1),
    "hardswish by hand": _activation(lambda x: x * F.relu6(x + 3) / 6, HardSwish=1),
    "hardswish by clamp": _activation(lambda x: x * torch.clamp(x / 6 + 0.5, 0, 1), HardSwish=1),
    "hardsigmoid": _activation(F.hardsigmoid, HardSigmoid=1),
    "hardsigmoid by hand": _activation(lambda x: F.relu6(x + 3.0) / 6.0, HardSigmoid=1),
    "mish": _activation(F.mish, Mish=1),
    "mish by hand": _activation(lambda x: x * torch.tanh(F.softplus(x)), Mish=1),
    "mish by logarithm": _activation(lambda x: x * torch.tanh(torch.log(1 + torch.exp(x))), Mish=1),
    "leaky relu": _activation(lambda x: F.leaky_relu(x, 0.1), LeakyRelu=1),
    "prelu": Case(lambda: nn.PReLU(8), (IMAGE,), {"PRelu": 1}),
}


class AddedChannels(nn.Module):
    """A convolution without bias, and one constant per channel after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bias = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Parameter(torch.randn(1, 8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.bias


class AddedFeatures(nn.Module):
    """A Linear without bias, and a parameter that is added before it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.bias = nn.Linear(DIM, 8, bias=False), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.bias + self.linear(x)


class TokenConv(nn.Module):
    """A 1×1 convolution over tokens, by transposing to channels first; of one or two spatial axes."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(DIM, 8, 1) if axes == 1 else nn.Conv2d(DIM, 8, 1)
        self.axes = axes

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(1, 2)
        y = self.conv(y if self.axes == 1 else y.unsqueeze(-1))
        return (y if self.axes == 1 else y.squeeze(-1)).transpose(1, 2)


def _shuffle(x: Tensor, r: int = 2) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c // r**2, r, r, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // r**2, h * r, w * r)


def _unshuffle(x: Tensor, r: int = 2) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c, h // r, r, w // r, r).permute(0, 1, 3, 5, 2, 4).reshape(b, c * r**2, h // r, w // r)


LINEAR = {"MatMul": 1, "Add": 1}
OTHERS = {
    "pixel shuffle": Case(lambda: nn.PixelShuffle(2), (IMAGE,), {"DepthToSpace": 1}),
    "pixel shuffle by hand": Case(lambda: Function(_shuffle), (IMAGE,), {"DepthToSpace": 1}),
    "pixel unshuffle": Case(lambda: nn.PixelUnshuffle(2), (IMAGE,), {"SpaceToDepth": 1}),
    "pixel unshuffle by hand": Case(lambda: Function(_unshuffle), (IMAGE,), {"SpaceToDepth": 1}),
    "linear": Case(lambda: nn.Linear(DIM, 8), (TOKENS,), LINEAR),
    "linear of two axes": Case(lambda: nn.Linear(DIM, 8), ((3, DIM),), LINEAR),
    "linear of four axes": Case(lambda: nn.Linear(6, 8), (IMAGE,), LINEAR),
    "linear without bias": Case(lambda: nn.Linear(DIM, 8, bias=False), (TOKENS,), {"MatMul": 1}),
    "linear and a bias": Case(AddedFeatures, (TOKENS,), LINEAR),
    "linear by addmm": Case(lambda: Function(lambda x, m: torch.addmm(m.bias, x, m.weight.t()), nn.Linear(DIM, 8)), ((3, DIM),), LINEAR),
    "1x1 conv1d on tokens": Case(lambda: TokenConv(1), (TOKENS,), LINEAR),
    "1x1 conv2d on tokens": Case(lambda: TokenConv(2), (TOKENS,), LINEAR),
    "conv and a bias": Case(AddedChannels, (IMAGE,), {"Conv": 1}),
    "view by size": Case(lambda: Function(lambda x: x.view(x.size(0), -1) * 2), (IMAGE,), {}),
    "flatten": Case(lambda: Function(lambda x: torch.flatten(x.relu(), 1)), (IMAGE,), {}),
    "chunk": Case(lambda: Function(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)), (IMAGE,), {}),
    "unflatten": Case(lambda: Function(lambda x: x.unflatten(1, (2, -1)).sum(2)), (IMAGE,), {}),
    "shape arithmetic": Case(
        lambda: Function(
            lambda x: F.interpolate(x, size=(x.shape[2] * 2, x.shape[3] + 1)).reshape(x.shape[0], x.shape[1], -1).transpose(1, 2)
        ),
        (IMAGE,),
        {},
    ),
    "grid of positions": Case(
        lambda: Function(
            lambda x: x + torch.stack(torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")).float().sum(0)
        ),
        (IMAGE,),
        {},
    ),
}

CASES = {**ATTENTION, **NORMALIZATION, **ACTIVATION, **OTHERS}
