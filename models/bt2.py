"""The head of BT² (Zhou et al. 2023, "BT²: Backward-compatible Training with Basis Transformation") as it is trained, step by step.

It turns a backbone's features into an embedding whose first coordinates are searchable among vectors of an older model, and whose whole
holds the new model's embedding, mixed in by orthogonal matrices. What of it is one matrix product when it runs is the compiler's work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize


class Bt2Parts(NamedTuple):
    """What the head computes of features `[B, new + old]`.

    Attributes:
        new: The free embedding n, of length 1, `[B, new]`.
        compatible: The part that is compared with vectors of the old model, `[B, old]`.
        embedding: The final embedding e: `compatible`, then the rest, `[B, extra + new]`; its length is √(1 + scale²).
    """

    new: Tensor
    compatible: Tensor
    embedding: Tensor


class Bt2Head(nn.Module):
    """The head; names of parameters follow the authors' code.

    Args:
        new: Dimension d of the new model's embedding.
        old: Dimension d_o of the old model's.
        extra: Dimensions a that are added, at most `old`.
        scale: The constant C, which weighs the new model's similarity by C² against 1.
        classes: Classes of the training task; 0 leaves the classifier out.
        rectify: Whether the features are rectified before the branch of the old embedding.
    """

    def __init__(
        self, new: int = 128, old: int = 128, extra: int = 32, *, scale: float = 2.0, classes: int = 0, rectify: bool = True
    ) -> None:
        super().__init__()
        if not 0 < extra <= old or old > extra + new:
            raise ValueError(
                f"extra = {extra} dimensions must be at least 1 and at most old = {old}, and extra + new = {extra + new} at least old"
            )
        self.new, self.old, self.extra, self.scale, self.rectify = new, old, extra, scale, rectify
        self.fc3 = nn.Linear(new + old, old)
        self.ortholinear_p = nn.utils.parametrizations.orthogonal(nn.Linear(new, new, bias=False))
        self.ortholinear_old2 = nn.utils.parametrizations.orthogonal(nn.Linear(old, old, bias=False))
        self.fc_out = nn.Linear(new, classes, bias=False) if classes else None

    def parts(self, features: Tensor) -> Bt2Parts:
        """Computes all of the head of features f `[B, new + old]`."""
        new = functional.normalize(features[:, : self.new], dim=1)
        old = functional.normalize(self.fc3(functional.relu(features) if self.rectify else features), dim=1)
        added = functional.normalize(old[:, : self.extra], dim=1)
        mixed = torch.cat([added, self.ortholinear_p(self.scale * new)], dim=1)
        compatible = self.ortholinear_old2(mixed[:, : self.old])
        return Bt2Parts(new, compatible, torch.cat([compatible, mixed[:, self.old :]], dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Maps features `[B, new + old]` to embeddings `[B, extra + new]`."""
        return self.parts(features).embedding

    def logits(self, new: Tensor) -> Tensor:
        """Maps embeddings n `[B, new]` to logits `[B, classes]`.

        Raises:
            ValueError: The head has no classifier.
        """
        if self.fc_out is None:
            raise ValueError("the head was made without classes")
        scores: Tensor = self.fc_out(new)
        return scores

    def basis(self) -> Tensor:
        """The matrix M `[extra + new, extra + new]` with e = M·[ô; n]: blockdiag(Q, I) · blockdiag(I, C·P). It is invertible."""
        p, q = self.ortholinear_p.weight, self.ortholinear_old2.weight
        assert isinstance(p, Tensor)
        assert isinstance(q, Tensor)
        size = self.extra + self.new
        inner, outer = torch.eye(size).to(p), torch.eye(size).to(q)
        inner[self.extra :, self.extra :] = self.scale * p
        outer[: self.old, : self.old] = q
        return outer @ inner

    def materialize(self) -> Bt2Head:
        """Makes the orthogonal matrices plain weights, in place, for export: how they are parametrized matters in training only."""
        for layer in (self.ortholinear_p, self.ortholinear_old2):
            if parametrize.is_parametrized(layer):
                parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
        return self
