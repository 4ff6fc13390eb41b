"""What the trained models of the zoo state of themselves is what `edgekit inspect` counts."""

from __future__ import annotations

import pytest

from edgekit import contracts
from edgekit.cli.inspect import inspect_model


@pytest.mark.parametrize("name", ["mobileone_digits", "vit_digits"])
def test_parameters_and_macs(name: str) -> None:
    model, counted = contracts.models.get(name), inspect_model(name, [], None, top=0)
    assert (model.parameters, model.macs) == (counted["parameters"], counted["macs"])
