"""The zoo's FMViT: edgekit's reference configuration, not an official one. Light on purpose: torch is imported when a network is made.

There are no published weights; weights and batch-norm statistics are random, from a fixed seed. The cost is what can be checked: folded,
31.7 million parameters and 5.8 GMACs at 224 pixels, those of Next-ViT-S.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from edgekit.contracts import ZooModel

if TYPE_CHECKING:
    from edgekit.models.fmvit import FMViT

_SOURCE = (
    "edgekit's reference configuration (no official code or weights exist; random weights) after Tan, Geng & Xie 2023, "
    "FMViT: A multiple-frequency mixing Vision Transformer"
)


_ADDED = 0.2


def network() -> FMViT:
    """Returns the untrained network in its multi-branch form: `[B, 3, H, W]` to logits `[B, 1000]`, H and W multiples of 32."""
    from edgekit.models.fmvit import FMViT, Stage

    stages = (
        Stage(fusion=96, mixing=0, pattern="ccc", pool=8),
        Stage(fusion=192, mixing=256, pattern="cccm", pool=4),
        Stage(fusion=384, mixing=512, pattern="ccccm" * 2, pool=2),
        Stage(fusion=768, mixing=1024, pattern="ccm", pool=1),
    )
    return FMViT(stem=(64, 32, 64, 64), stages=stages, classes=1000)


def tiny_network() -> FMViT:
    """Returns the same with one block of each kind a stage and narrow stages: `[B, 3, H, W]` to logits `[B, 10]`."""
    from edgekit.models.fmvit import FMViT, Stage

    stages = (
        Stage(fusion=32, mixing=0, pattern="c", pool=8),
        Stage(fusion=32, mixing=96, pattern="cm", pool=4),
        Stage(fusion=64, mixing=96, pattern="cm", pool=2),
        Stage(fusion=64, mixing=128, pattern="cm", pool=1),
    )
    return FMViT(stem=(16, 8, 16, 16), stages=stages, classes=10)


def build() -> FMViT:
    """Returns `network` with its random weights and statistics, in evaluation mode."""
    return _randomized(network)


def build_tiny() -> FMViT:
    """Returns `tiny_network` with its random weights and statistics, in evaluation mode."""
    return _randomized(tiny_network)


def _randomized(make: Callable[[], FMViT]) -> FMViT:
    """Makes a network without initial values, and fills it: weights keep variance, statistics are like trained ones."""
    import torch
    from torch import nn

    from edgekit.models.fmvit import Attention, Mixer, Mlp

    with torch.device("meta"):  # the usual initial values would cost more time than these
        module = make()
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                for tensor, low, high in ((layer.weight, 0.6, 1.2), (layer.bias, -0.1, 0.1), (layer.running_mean, -0.1, 0.1),
                                          (layer.running_var, 0.5, 1.5)):  # fmt: skip
                    assert tensor is not None
                    tensor.uniform_(low, high, generator=generator)
            elif isinstance(layer, nn.Conv2d | nn.Linear):
                bound = (3 / layer.weight[0].numel()) ** 0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                if layer.bias is not None:
                    layer.bias.uniform_(-0.1, 0.1, generator=generator)
        for block in module.modules():  # what a block adds is smaller than what it is added to, as in a trained network
            if isinstance(block, Mixer):
                block.point.weight.mul_(_ADDED)
            elif isinstance(block, Mlp | Attention):
                for layer in (block.fc2 if isinstance(block, Mlp) else block.out).modules():
                    if isinstance(layer, nn.Conv2d):
                        layer.weight.mul_(_ADDED)
        for layer in module.stem.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.mul_(2**0.5)  # rectified after every layer: He et al. 2015, equation 10
    return module.eval()


MODEL = ZooModel(
    name="fmvit", build=build, input_shape=(1, 3, 224, 224), source=_SOURCE, parameters=51_124_360, macs=8_820_973_824
)  # of the multi-branch form
TINY = ZooModel(
    name="fmvit_tiny",
    build=build_tiny,
    input_shape=(1, 3, 64, 64),
    source=f"{_SOURCE}; narrow and shallow, for tests",
    parameters=635_018,
    macs=20_698_240,
)
