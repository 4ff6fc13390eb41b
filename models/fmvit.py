"""FMViT (Tan, Geng & Xie 2023, "FMViT: A multiple-frequency mixing Vision Transformer", arXiv 2311.05707): a reference configuration.

No official code and no weights have been published. What the paper's abstract names is here: multi-group reparameterization (`gMLP`),
lightweight reparameterized self-attention (`RLMHSA`), the convolutional fusion block (`CFB`) and a block that mixes frequencies; widths,
depths and everything else are ours, on the skeleton of Next-ViT-S (Li et al. 2022), so that its cost has a published neighbour. It is here
to be compiled, not to be accurate: weights and batch-norm statistics are random, from a fixed seed.

Every expensive layer is a sum of branches of different groups while it trains and one convolution when it runs. `deploy` does that folding
on the module itself, by its own arithmetic, as a reference for the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.models.layers import global_average

HEAD_DIM = 32
GROUPS = (1, 2, 4)


@dataclass(frozen=True)
class Stage:
    """A stage: its blocks in order as widths, and the pooling of keys and values in its mixing blocks.

    Attributes:
        fusion: Width C of the convolutional fusion blocks.
        mixing: Width C of the mixing blocks; 0 where the stage has none.
        pattern: One letter a block: `c` for a fusion block, `m` for a mixing block.
        pool: The factor s by which keys and values are pooled.
    """

    fusion: int
    mixing: int
    pattern: str
    pool: int


class Branch(nn.Module):
    """One branch of a sum: a convolution (or none) and a batch norm (or none)."""

    def __init__(self, conv: nn.Conv2d | None, bn: nn.BatchNorm2d | None) -> None:
        super().__init__()
        self.conv, self.bn = conv, bn

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, I, H, W]` to `[B, O, H, W]`."""
        out: Tensor = x if self.conv is None else self.conv(x)
        return out if self.bn is None else self.bn(out)

    def folded(self, kernel: int, groups: int, channels: int) -> tuple[Tensor, Tensor]:
        """The branch as a weight `[O, I/groups, kernel, kernel]` and a bias `[O]`, in float64.

        Raises:
            ValueError: The groups of the branch are not a multiple of `groups`.
        """
        if self.conv is None:
            assert self.bn is not None
            weight = self.bn.weight.new_ones(channels, 1, 1, 1, dtype=torch.float64)
            own, bias = channels, None
        else:
            weight, own, bias = self.conv.weight.double(), self.conv.groups, self.conv.bias
        if own % groups:
            raise ValueError(f"{own} groups are not a multiple of {groups}")
        out, narrow, *taps = weight.shape
        inner = own // groups  # so many of the branch's groups lie in one of the sum
        rows = torch.arange(out)
        wide = weight.new_zeros(out, inner, narrow, *taps)
        wide[rows, rows // (out // own) % inner] = weight
        wide = wide.flatten(1, 2)
        margin = (kernel - wide.shape[2]) // 2
        wide = functional.pad(wide, (margin,) * 4)
        shift = wide.new_zeros(out) if bias is None else bias.double()
        if self.bn is None:
            return wide, shift
        scale, offset = affine(self.bn)
        return wide * scale[:, None, None, None], shift * scale + offset


def affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch norm in evaluation, `[C]` each, in float64."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight.double() / torch.sqrt(bn.running_var.double() + bn.eps)
    return scale, bn.bias.double() - bn.running_mean.double() * scale


class Rep(nn.Module):
    """A sum of branches over one input; `rep` is a list of branches, or after `deploy` one convolution.

    Args:
        branches: The branches.
        kernel: Kernel size of the convolution that they become.
        groups: Its groups.
        in_channels: I.
        out_channels: O.
        stride: Of all convolutions.
    """

    def __init__(
        self, branches: Sequence[Branch], kernel: int, groups: int, in_channels: int, out_channels: int, *, stride: int = 1
    ) -> None:
        super().__init__()
        self.kernel, self.groups, self.in_channels, self.out_channels = kernel, groups, in_channels, out_channels
        self.stride = stride
        self.rep: nn.Module = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, I, H, W]` to `[B, O, ceil(H/stride), ceil(W/stride)]`."""
        if not isinstance(self.rep, nn.ModuleList):
            return self.rep(x)  # type: ignore[no-any-return]
        first, *rest = self.rep
        out: Tensor = first(x)
        for branch in rest:
            out = out + branch(x)
        return out

    def deploy(self, before: nn.BatchNorm2d | None = None) -> None:
        """Becomes one convolution, with the batch norm `before` it folded in; that asks for kernel 1, which has no border."""
        if not isinstance(self.rep, nn.ModuleList):
            return
        parts = [branch.folded(self.kernel, self.groups, self.in_channels) for branch in self.rep if isinstance(branch, Branch)]
        weight, bias = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        if before is not None:
            assert self.kernel == self.groups == 1
            scale, shift = affine(before)
            bias = bias + weight[:, :, 0, 0] @ shift
            weight = weight * scale[None, :, None, None]
        dtype = next(self.parameters()).dtype
        self.rep = conv(self.in_channels, self.out_channels, self.kernel, stride=self.stride, groups=self.groups, bias=True)
        fill(self.rep, weight.to(dtype), bias.to(dtype))


def conv(in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size at stride 1."""
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, groups=groups, bias=bias)


@torch.no_grad()
def fill(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Gives a layer with a bias its values, in their type and on their device."""
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)


def multi_group(in_channels: int, out_channels: int, *, norm: bool = True) -> Rep:
    """Σ over g of GROUPS of a 1×1 convolution of g groups, each with a batch norm, or with a bias instead (equation of gMLP)."""
    branches = [
        Branch(conv(in_channels, out_channels, 1, groups=g, bias=not norm), nn.BatchNorm2d(out_channels) if norm else None) for g in GROUPS
    ]
    return Rep(branches, 1, 1, in_channels, out_channels)


def high_pass(channels: int) -> Rep:
    """G: 3×3 and 1×1 convolutions in groups of 32 channels, a depthwise 3×3 and the identity, each with a batch norm."""
    groups = channels // HEAD_DIM
    layers = [conv(channels, channels, 3, groups=groups), conv(channels, channels, 3, groups=channels),
              conv(channels, channels, 1, groups=groups), None]  # fmt: skip
    return Rep([Branch(layer, nn.BatchNorm2d(channels)) for layer in layers], 3, groups, channels, channels)


class Mixer(nn.Module):
    """The convolutional token mixer of a fusion block: x + PW(ReLU(G(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.high = high_pass(channels)
        self.point = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to the same shape."""
        out: Tensor = x + self.point(functional.relu(self.high(x)))
        return out

    def deploy(self) -> None:
        """Folds the branches of G."""
        self.high.deploy()


class Mlp(nn.Module):
    """gMLP with the batch norm before it: x + fc2(ReLU(fc1(BN(x)))), both layers multi-group, `ratio` times as wide inside."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.fc1 = multi_group(channels, ratio * channels)
        self.fc2 = multi_group(ratio * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to the same shape."""
        out: Tensor = x + self.fc2(functional.relu(self.fc1(self.norm(x))))
        return out

    def deploy(self) -> None:
        """Folds both layers, and the norm into the first."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.fc1.deploy(self.norm)
            self.fc2.deploy()
            self.norm = nn.Identity()


class Attention(nn.Module):
    """RLMHSA: queries from x, keys and values from x pooled by `pool`; heads of 32 channels, projections multi-group with bias."""

    def __init__(self, channels: int, pool: int) -> None:
        super().__init__()
        self.pool = pool
        self.norm: nn.Module = nn.BatchNorm2d(channels)
        self.pool_norm: nn.Module = nn.BatchNorm2d(channels) if pool > 1 else nn.Identity()
        self.q, self.k, self.v, self.out = (multi_group(channels, channels, norm=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, C, H, W]` to x plus what attention adds; H and W at least `pool`."""
        batch, channels, height, width = x.shape
        y = self.norm(x)
        pooled = self.pool_norm(functional.avg_pool2d(y, self.pool, self.pool)) if self.pool > 1 else y
        heads = channels // HEAD_DIM
        q, k, v = (
            layer(tokens).reshape(batch, heads, HEAD_DIM, -1).transpose(2, 3)
            for layer, tokens in ((self.q, y), (self.k, pooled), (self.v, pooled))
        )
        mixed = functional.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(mixed.transpose(2, 3).reshape(batch, channels, height, width))
        return out

    def deploy(self) -> None:
        """Folds the projections; the norm goes into q, and through the pooling, with the norm after it, into k and v."""
        if not isinstance(self.norm, nn.BatchNorm2d):
            return
        both = self.norm
        if isinstance(self.pool_norm, nn.BatchNorm2d):
            both = composed(self.norm, self.pool_norm)
        self.q.deploy(self.norm)
        self.k.deploy(both)
        self.v.deploy(both)
        self.out.deploy()
        self.norm, self.pool_norm = nn.Identity(), nn.Identity()


@torch.no_grad()
def composed(first: nn.BatchNorm2d, second: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """One batch norm, of double precision, that does what the two do in turn (an average of real elements lies between)."""
    (a, b), (c, d) = affine(first), affine(second)
    norm = nn.BatchNorm2d(len(a), eps=0.0, dtype=torch.float64).eval().to(a.device)
    norm.weight.copy_(a * c)
    norm.bias.copy_(b * c + d)
    return norm


class Project(nn.Module):
    """DS: pools by 2 at stride 2, then a 1×1 convolution with batch norm; only the latter where the width changes, else nothing."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        branches = [Branch(conv(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels))]
        self.point = Rep(branches, 1, 1, in_channels, out_channels) if stride > 1 or in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, I, H, W]` to `[B, O, ceil(H/stride), ceil(W/stride)]`."""
        if self.stride > 1:
            x = functional.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        return x if self.point is None else self.point(x)

    def deploy(self) -> None:
        """Folds the norm."""
        if self.point is not None:
            self.point.deploy()


class FusionBlock(nn.Module):
    """CFB: DS, the convolutional mixer, gMLP of ratio 3."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.ds = Project(in_channels, channels, stride)
        self.mixer = Mixer(channels)
        self.mlp = Mlp(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, in_channels, H, W]` to `[B, channels, ceil(H/stride), ceil(W/stride)]`."""
        out: Tensor = self.mlp(self.mixer(self.ds(x)))
        return out


class MixingBlock(nn.Module):
    """FMB: low frequencies by attention on three quarters of the channels, high ones by a mixer on the rest, gMLP over all."""

    def __init__(self, in_channels: int, channels: int, stride: int, pool: int) -> None:
        super().__init__()
        low = (channels * 3 // 4 + HEAD_DIM // 2) // HEAD_DIM * HEAD_DIM
        self.ds = Project(in_channels, low, stride)
        self.attn = Attention(low, pool)
        self.proj = Project(low, channels - low, 1)
        self.mixer = Mixer(channels - low)
        self.mlp = Mlp(channels, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, in_channels, H, W]` to `[B, channels, ceil(H/stride), ceil(W/stride)]`."""
        low = self.attn(self.ds(x))
        out: Tensor = self.mlp(torch.cat([low, self.mixer(self.proj(low))], dim=1))
        return out


class FMViT(nn.Module):
    """A convolutional stem of stride 4, stages of fusion and mixing blocks, each but the first at half the size, and a linear head.

    Args:
        stem: Widths of the four 3×3 convolutions of the stem; the first and the last have stride 2.
        stages: The stages.
        classes: Number of logits.
    """

    def __init__(self, *, stem: Sequence[int], stages: Sequence[Stage], classes: int) -> None:
        super().__init__()
        layers, width = [], 3
        for index, channels in enumerate(stem):
            stride = 2 if index in (0, len(stem) - 1) else 1
            branch = Branch(conv(width, channels, 3, stride=stride), nn.BatchNorm2d(channels))
            layers.append(Rep([branch], 3, 1, width, channels, stride=stride))
            width = channels
        self.stem = nn.ModuleList(layers)
        built = []
        for index, stage in enumerate(stages):
            blocks: list[nn.Module] = []
            for place, letter in enumerate(stage.pattern):
                stride = 2 if index and place == 0 else 1
                channels = stage.mixing if letter == "m" else stage.fusion
                mixing = letter == "m"
                blocks.append(MixingBlock(width, channels, stride, stage.pool) if mixing else FusionBlock(width, channels, stride))
                width = channels
            built.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*built)
        self.norm: nn.Module = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[B, 3, H, W]` to logits `[B, classes]`; H and W multiples of 32."""
        for layer in self.stem:
            x = functional.relu(layer(x))
        logits: Tensor = self.head(global_average(self.norm(self.stages(x))))
        return logits

    @torch.no_grad()
    def deploy(self) -> FMViT:
        """Folds all branches and batch norms in place; the module must be in evaluation mode. Returns it."""
        for module in self.modules():
            if isinstance(module, Mixer | Mlp | Attention | Project):
                module.deploy()
        for layer in self.stem:
            assert isinstance(layer, Rep)
            layer.deploy()
        if isinstance(self.norm, nn.BatchNorm2d):
            scale, shift = affine(self.norm)
            weight = self.head.weight.double()
            dtype = self.head.weight.dtype
            fill(self.head, (weight * scale).to(dtype), (self.head.bias.double() + weight @ shift).to(dtype))
            self.norm = nn.Identity()
        return self
