"""The zoo's entries: light to import, with weights that fit, are small and reach the promised accuracy; broken weights are reported."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from edgekit.contracts import models
from edgekit.errors import SourceError
from edgekit.models import checkpoint, digits

NAMES = ("vit_digits", "mobileone_digits")
BUDGET_BYTES = 1_500_000
REQUIRED_TOP1 = 0.975


@pytest.mark.parametrize("name", NAMES)
def test_trained_model_reaches_the_accuracy_that_it_states(name: str) -> None:
    model, data = models.get(name), digits.load()
    module = model.build()
    assert not module.training
    with torch.no_grad():
        logits = torch.cat([module(batch) for batch in torch.from_numpy(data.inputs["test"]).split(100)])
    assert logits.shape == (597, 10)
    top1 = float(np.mean(logits.argmax(1).numpy() == data.labels["test"]))
    assert top1 >= REQUIRED_TOP1
    assert model.accuracy == pytest.approx(top1, abs=1 / 597)  # one sample may lie on the border on another processor


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_small(name: str) -> None:
    assert checkpoint.weights_path(name).stat().st_size <= BUDGET_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_weights_state_how_they_were_made(name: str) -> None:
    facts = checkpoint.read_facts(checkpoint.weights_path(name))
    assert facts["dataset"] == models.get(name).dataset == "digits"
    assert {"accuracy", "recipe", "seed", "torch"} <= facts.keys()


@pytest.mark.parametrize("name", NAMES)
def test_build_leaves_the_random_state_alone(name: str) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    models.get(name).build()
    assert torch.equal(torch.rand(4), expected)


def test_listing_the_zoo_does_not_import_torch() -> None:
    code = (
        "import json, sys\n"
        "import edgekit.models.digits\n"
        "from edgekit.models.vit_digits import MODEL as vit\n"
        "from edgekit.models.mobileone_digits import MODEL as mobileone\n"
        "print(json.dumps([vit.accuracy, mobileone.accuracy, [name for name in ('torch', 'sklearn', 'onnx') if name in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    vit_accuracy, mobileone_accuracy, heavy = json.loads(done.stdout)
    assert heavy == []
    assert min(vit_accuracy, mobileone_accuracy) >= REQUIRED_TOP1


class Small(torch.nn.Linear):
    """A network with two parameters."""

    def __init__(self) -> None:
        super().__init__(3, 2)


def test_saved_weights_come_back_with_their_facts(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "small.safetensors"
    saved, loaded = Small(), Small()
    checkpoint.save(saved, path, {"accuracy": 0.5, "recipe": {"epochs": 2}})
    checkpoint.load(loaded, path)
    assert torch.equal(loaded.weight, saved.weight)
    assert torch.equal(loaded.bias, saved.bias)
    assert checkpoint.read_facts(path) == {"accuracy": 0.5, "recipe": {"epochs": 2}}
    assert [file.name for file in path.parent.iterdir()] == ["small.safetensors"]


def test_missing_weights_are_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="missing") as caught:
        checkpoint.load(Small(), tmp_path / "small.safetensors")
    assert str(tmp_path / "small.safetensors") in str(caught.value)
    assert "edgekit.models.train small" in str(caught.value)
    assert checkpoint.read_facts(tmp_path / "small.safetensors") == {}


def test_damaged_weights_are_a_source_error(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    checkpoint.save(Small(), path, {"accuracy": 0.5})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SourceError, match="cannot be read"):
        checkpoint.load(Small(), path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(SourceError, match="cannot be read"):
        checkpoint.load(Small(), path)
    assert checkpoint.read_facts(path) == {}


@pytest.mark.parametrize(
    "tensors",
    [{"weight": torch.zeros(2, 3)}, {"weight": torch.zeros(2, 3), "bias": torch.zeros(5)}, {"other": torch.zeros(1)}],
    ids=["lacking", "misshapen", "foreign"],
)
def test_weights_of_another_network_are_a_source_error(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "small.safetensors"
    save_file(tensors, path)
    with pytest.raises(SourceError, match="do not fit Small"):
        checkpoint.load(Small(), path)
