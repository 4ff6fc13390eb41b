"""The zoo's MobileOne on the digits. Light on purpose: torch is imported when the network is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgekit.models.checkpoint import zoo_model

if TYPE_CHECKING:
    from edgekit.models.mobileone import MobileOne


def network() -> MobileOne:
    """Returns the untrained network in its multi-branch form: `[B, 1, 32, 32]` to logits `[B, 10]`."""
    from edgekit.models.mobileone import MobileOne, Stage

    stages = (Stage(channels=64, units=2, stride=1), Stage(channels=96, units=2, stride=2), Stage(channels=128, units=2, stride=2))
    return MobileOne(channels=1, stem=32, stages=stages, branches=4, classes=10)


MODEL = zoo_model(
    "mobileone_digits",
    network,
    input_shape=(1, 1, 32, 32),
    dataset="digits",
    source="Vasu et al. 2023, MobileOne: An Improved One millisecond Mobile Backbone",
    parameters=231_882,
    macs=13_783_808,
)
