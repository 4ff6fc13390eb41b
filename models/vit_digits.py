"""The zoo's ViT on the digits. Light on purpose: torch is imported when the network is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.models.checkpoint import zoo_model

if TYPE_CHECKING:
    from edgekit.models.vit import VisionTransformer


def network() -> VisionTransformer:
    """Returns the untrained network: `[B, 1, 32, 32]` to logits `[B, 10]`, 64 patches of 4x4 pixels and a class token."""
    from edgekit.models.vit import VisionTransformer

    return VisionTransformer(side=32, patch=4, channels=1, dim=64, depth=6, heads=4, mlp_ratio=4, classes=10)


MODEL = zoo_model(
    "vit_digits",
    network,
    input_shape=(1, 1, 32, 32),
    dataset="digits",
    source="Dosovitskiy et al. 2021, An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale",
    parameters=305_994,
    macs=22_480_256,
)
