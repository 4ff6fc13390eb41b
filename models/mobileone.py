"""MobileOne (Vasu et al. 2023, "MobileOne: An Improved One millisecond Mobile Backbone") in its multi-branch training form.

A block trains as a sum of many linear branches and runs as one convolution. The branches are kept here on purpose:
merging them is the compiler's work, where it is checked and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from edgekit.models.layers import ConvNorm, global_average


@dataclass(frozen=True)
class Stage:
    """A run of depthwise-separable units: `channels` wide, `units` long, the first with `stride`."""

    channels: int
    units: int
    stride: int


class MobileOneBlock(nn.Module):
    """`ReLU(sum of branches)`, figure 3 of the paper.

    The branches are `branches` KxK convolutions with batch norm (`conv_kxk`), a 1x1 convolution with batch norm when K > 1
    (`conv_scale`), and a batch norm alone when input and output have one shape (`identity`). Names follow timm.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Odd kernel size K.
        stride: Of every convolution.
        groups: `in_channels` for a depthwise block, 1 for a pointwise or dense one.
        branches: Over-parameterization factor k: number of KxK branches.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, groups: int = 1, branches: int = 1) -> None:
        super().__init__()
        self.conv_kxk = nn.ModuleList(ConvNorm(in_channels, out_channels, kernel, stride, groups) for _ in range(branches))
        self.conv_scale = ConvNorm(in_channels, out_channels, 1, stride, groups) if kernel > 1 else None
        self.identity = nn.BatchNorm2d(in_channels) if stride == 1 and in_channels == out_channels else None
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[B, in_channels, H, W]` to `[B, out_channels, ceil(H/stride), ceil(W/stride)]`."""
        out: Tensor = self.conv_kxk[0](x)
        for branch in self.conv_kxk[1:]:
            out = out + branch(x)
        if self.conv_scale is not None:
            out = out + self.conv_scale(x)
        if self.identity is not None:
            out = out + self.identity(x)
        activated: Tensor = self.act(out)
        return activated


class MobileOne(nn.Module):
    """A dense 3x3 stem at stride 2, stages of depthwise and pointwise blocks, global average pooling and a linear head.

    Args:
        channels: Channels of the image.
        stem: Channels of the stem.
        stages: The stages, in order.
        branches: Over-parameterization factor of every block.
        classes: Number of logits.
    """

    def __init__(self, *, channels: int, stem: int, stages: Sequence[Stage], branches: int, classes: int) -> None:
        super().__init__()
        self.stem = MobileOneBlock(channels, stem, 3, stride=2, branches=branches)
        width = stem
        built = []
        for stage in stages:
            blocks: list[nn.Module] = []
            for unit in range(stage.units):
                stride = stage.stride if unit == 0 else 1
                blocks.append(MobileOneBlock(width, width, 3, stride=stride, groups=width, branches=branches))
                blocks.append(MobileOneBlock(width, stage.channels, 1, branches=branches))
                width = stage.channels
            built.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*built)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images `[B, channels, H, W]` to logits `[B, classes]`."""
        logits: Tensor = self.head(global_average(self.stages(self.stem(x))))
        return logits
