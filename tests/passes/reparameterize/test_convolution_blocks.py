"""Blocks of published networks in their trainable form become one convolution when the three passes run in turn to a fixed point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgekit.contracts import Context
from edgekit.graph.cost import cost
from edgekit.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from edgekit.passes.reparameterize.merge_branches import MergeBranches
from edgekit.passes.reparameterize.merge_sequential import MergeConvolutions

PASSES = (FoldBatchNorm(), MergeBranches(), MergeConvolutions())


def conv_norm(inputs, outputs, kernel, *, stride=1, groups=1, padding=None, dilation=1):
    padding = kernel // 2 if padding is None else padding
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Branches(nn.Module):
    """The sum of its branches; `nn.Identity` is a skip."""

    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return sum(branch(x) for branch in self.branches)


def repvgg(groups=1):
    """3x3, 1x1 and BN (Ding et al. 2021, "RepVGG", figure 2b)."""
    return Branches(conv_norm(8, 8, 3, groups=groups), conv_norm(8, 8, 1, groups=groups), nn.BatchNorm2d(8))


def mobileone():
    """Four depthwise 3x3, one 1x1 and BN (Vasu et al. 2023, "MobileOne", figure 3)."""
    return Branches(nn.BatchNorm2d(8), *(conv_norm(8, 8, 3, groups=8) for _ in range(4)), conv_norm(8, 8, 1, groups=8))


def acnet():
    """Square, horizontal and vertical kernels (Ding et al. 2019, "ACNet", figure 1)."""
    return Branches(conv_norm(6, 8, 3), conv_norm(6, 8, (1, 3), padding=(0, 1)), conv_norm(6, 8, (3, 1), padding=(1, 0)))


def acnet_cropped():
    """A square kernel of 5 with padding 1: the asymmetric branches have padding −1, a crop, across their kernel."""
    horizontal, vertical = conv_norm(6, 8, (1, 5), padding=(0, 1)), conv_norm(6, 8, (5, 1), padding=(1, 0))
    return Branches(conv_norm(6, 8, 5, padding=1), nn.Sequential(Crop(1, 0), horizontal), nn.Sequential(Crop(0, 1), vertical))


class Crop(nn.Module):
    """Takes rows and columns off all four sides, as negative padding does."""

    def __init__(self, rows, columns):
        super().__init__()
        self.pads = (-columns, -columns, -rows, -rows)

    def forward(self, x):
        return functional.pad(x, self.pads)


class PadFirst(nn.Sequential):
    """Pads before the 1x1: its batch norm then turns the zeros into its shift, which is what the next window must see at the rim."""

    def forward(self, x):
        return super().forward(functional.pad(x, (1, 1, 1, 1)))


def diverse_branch(channels=8):
    """1x1, 3x3, 1x1 then 3x3, and 1x1 then average pooling, each with BN (Ding et al. 2021, "Diverse Branch Block", figure 2)."""
    return Branches(
        conv_norm(channels, channels, 1),
        conv_norm(channels, channels, 3),
        PadFirst(conv_norm(channels, channels, 1), conv_norm(channels, channels, 3, padding=0)),
        PadFirst(conv_norm(channels, channels, 1), nn.AvgPool2d(3, 1), nn.BatchNorm2d(channels)),
    )


def replknet():
    """Depthwise 13x13 and 5x5 (Ding et al. 2022, "RepLKNet", guideline 3)."""
    return Branches(conv_norm(6, 6, 13, groups=6), conv_norm(6, 6, 5, groups=6))


def dilated():
    """A large kernel and dilated small ones (Ding et al. 2024, "UniRepLKNet", figure 2)."""
    return Branches(
        conv_norm(6, 6, 9, groups=6),
        conv_norm(6, 6, 3, groups=6, dilation=3, padding=3),
        conv_norm(6, 6, 3, groups=6, dilation=4, padding=4),
        conv_norm(6, 6, 5, groups=6, dilation=2, padding=4),
    )


def repvit():
    """BN(BN(3x3) + 1x1 + x) (Wang et al. 2024, "RepViT", figure 3b, the token mixer)."""
    return nn.Sequential(Branches(conv_norm(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1, groups=8), nn.Identity()), nn.BatchNorm2d(8))


def fmvit():
    """The sum over groups g of BN(1x1 with g groups), and of BN(3x3) (Tan et al. 2023, "FMViT", section 3.3)."""
    return Branches(*(conv_norm(8, 8, 1, groups=groups) for groups in (1, 2, 4, 8)), nn.BatchNorm2d(8))


def fmvit_wide():
    return Branches(*(conv_norm(8, 8, 3, groups=groups) for groups in (2, 4)), conv_norm(8, 8, 1, groups=8))


class RepMixer(nn.Module):
    """x + λ·(M(x) − BN(x)) with a MobileOne block M and λ per channel (Vasu et al. 2023, "FastViT", equation 2)."""

    def __init__(self):
        super().__init__()
        self.norm, self.mixer = nn.BatchNorm2d(8), mobileone()
        self.scale = nn.Parameter(torch.full((8, 1, 1), 0.3))

    def forward(self, x):
        return x + self.scale * (self.mixer(x) - self.norm(x))


def expanded():
    """1x1 up, 3x3, 1x1 down, without activations (Guo et al. 2020, "ExpandNets", figure 1)."""
    up, kernel, down = nn.Conv2d(6, 24, 1, padding=1), nn.Conv2d(24, 24, 3, bias=False), nn.Conv2d(24, 8, 1)
    return nn.Sequential(up, nn.BatchNorm2d(24), kernel, down, nn.BatchNorm2d(8))


def to_fixed_point(model):
    """Runs the passes in turn until none finds anything; returns how often they did."""
    rounds = 0
    while sum(item.apply(model, Context()) for item in PASSES):
        rounds += 1
        assert rounds < 10
    return rounds


@pytest.mark.parametrize(
    ("block", "channels", "kernel", "groups"),
    [
        (repvgg(), 8, (3, 3), 1),
        (repvgg(groups=2), 8, (3, 3), 2),
        (mobileone(), 8, (3, 3), 8),
        (acnet(), 6, (3, 3), 1),
        (acnet_cropped(), 6, (5, 5), 1),
        (diverse_branch(), 8, (3, 3), 1),
        (replknet(), 6, (13, 13), 6),
        (dilated(), 6, (9, 9), 6),
        (repvit(), 8, (3, 3), 8),
        (fmvit(), 8, (1, 1), 1),
        (fmvit_wide(), 8, (3, 3), 2),
        (RepMixer(), 8, (3, 3), 8),
        (expanded(), 6, (3, 3), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_block_becomes_one_convolution(trace, run, operators, block, channels, kernel, groups):
    model = trace(block, (1, channels, 9, 7))
    before = cost(model)
    assert to_fixed_point(model) >= 1
    assert operators(model) == {"Conv": 1}
    (conv,) = model.graph
    assert (conv.attributes["kernel_shape"].as_ints(), conv.attributes["group"].as_int()) == (kernel, groups)
    after = cost(model)
    assert after.macs <= before.macs
    assert after.bytes <= before.bytes
    x = torch.randn(1, channels, 9, 7) + 0.3
    expected = block.double()(x.double()).detach().numpy()
    (result,) = run(model, {model.graph.inputs[0].name: x.numpy()})
    assert np.abs(result - expected).max() <= 1e-5 * np.abs(expected).max()
