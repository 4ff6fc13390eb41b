"""Networks of timm with random weights, also where torchvision was built for another torch."""

from __future__ import annotations

from typing import Any

import torch

_SCHEMAS: list[torch.library.Library] = []
"""Declarations hold as long as the object that made them lives."""


def create_timm(name: str, seed: int = 0, **options: Any) -> tuple[torch.nn.Module, torch.Tensor]:
    """Returns the network `name` in evaluation mode and an example input `[1, 3, H, W]` of the size that it was published for.

    `options` are timm's, to build another size of the network.
    """
    _import_torchvision()
    import timm

    torch.manual_seed(seed)
    module = timm.create_model(name, **options).eval()
    return module, torch.zeros(1, *module.default_cfg["input_size"])


def _import_torchvision() -> None:
    """Imports torchvision, which timm needs for image transforms only.

    Without its compiled operators it fails as it describes two of them to torch; declaring their signatures is enough for the import.
    """
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _SCHEMAS.append(library)
