"""The zoo's LookupViT, size S. Light on purpose: torch is imported when a network is made.

There are no published weights: they are random, from a fixed seed. What can be checked is the cost: 2.18 GMACs with 25 compressed tokens
where ViT-S has 4.57.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.contracts import ZooModel

if TYPE_CHECKING:
    from edgekit.models.lookupvit import LookupViT

_SOURCE = (
    "Koner et al. 2024, LookupViT: Compressing visual information to a limited number of tokens (no official code or weights exist; "
    "random weights)"
)


def build(tokens: int = 25) -> LookupViT:
    """Returns size S at 224 pixels in evaluation mode: `[B, 3, 224, 224]` to `[B, 1000]`, with 9, 25, 49, 100 … compressed tokens."""
    return _seeded(tokens, side=224, patch=16, channels=3, dim=384, depth=12, heads=6, classes=1000)


def build_tiny(tokens: int = 9) -> LookupViT:
    """Returns a narrow and shallow one for tests: `[B, 3, 64, 64]` to `[B, 10]`."""
    return _seeded(tokens, side=64, patch=8, channels=3, dim=32, depth=3, heads=4, classes=10)


def _seeded(tokens: int, **sizes: int) -> LookupViT:
    import torch

    from edgekit.models.lookupvit import LookupViT

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LookupViT(**sizes, compressed=tokens).eval()


MODEL = ZooModel(name="lookupvit", build=build, input_shape=(1, 3, 224, 224), source=_SOURCE, parameters=34_507_624, macs=2_121_013_248)
TINY = ZooModel(
    name="lookupvit_tiny",
    build=build_tiny,
    input_shape=(1, 3, 64, 64),
    source=f"{_SOURCE}; narrow and shallow, for tests",
    parameters=69_722,
    macs=1_635_840,
)
