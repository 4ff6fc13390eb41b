"""The training command: it learns, it repeats itself, it never looks at the test part while it trains, and it refuses unknown names."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from edgekit.contracts import Dataset
from edgekit.models import checkpoint, digits, train
from edgekit.models.mobileone import MobileOne, Stage

TINY = train.Recipe(epochs=3, batch_size=10, learning_rate=3e-3)


@pytest.fixture(scope="module")
def few() -> Dataset:
    """40 digits to train and 20 to judge; there is no test part, so that reading it would fail."""
    data, sizes = digits.load(), {"train": 40, "calibrate": 20}
    return Dataset(
        inputs={part: data.inputs[part][:size] for part, size in sizes.items()},
        labels={part: data.labels[part][:size] for part, size in sizes.items()},
    )


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 8, 4, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(512, 10))


def mean_loss(module: torch.nn.Module, data: Dataset) -> float:
    with torch.no_grad():
        logits = module.eval()(torch.from_numpy(data.inputs["train"]))
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.labels["train"])))


def test_a_few_steps_lower_the_loss_of_the_vit(few: Dataset) -> None:
    torch.manual_seed(0)
    check_that_fitting_helps(train.NETWORKS["vit_digits"](), few, TINY)


def test_a_few_steps_lower_the_loss_of_a_small_mobileone(few: Dataset) -> None:
    torch.manual_seed(0)
    small = MobileOne(channels=1, stem=8, stages=[Stage(channels=12, units=1, stride=2)], branches=2, classes=10)
    check_that_fitting_helps(small, few, dataclasses.replace(TINY, epochs=8))  # batch norm's statistics need some steps


def check_that_fitting_helps(module: torch.nn.Module, few: Dataset, recipe: train.Recipe) -> None:
    before, lines = mean_loss(module, few), []
    train.fit(module, few, recipe, 0, lines.append)
    assert mean_loss(module, few) < before
    assert not module.training
    assert len(lines) == recipe.epochs
    assert all(np.isfinite(tensor.numpy()).all() for tensor in module.state_dict().values())


def test_same_seed_gives_the_same_network(few: Dataset) -> None:
    trained = []
    for seed in (1, 1, 2):
        module = network()
        train.fit(module, few, TINY, seed, lambda line: None)
        trained.append(module[0].weight)
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


def test_augmentation_without_limits_changes_nothing(few: Dataset) -> None:
    images = torch.from_numpy(few.inputs["train"])
    still = dataclasses.replace(TINY, rotation=0.0, shift=0.0, scale=0.0)
    torch.testing.assert_close(train.augment(images, still, torch.Generator().manual_seed(0)), images, rtol=0, atol=1e-5)


def test_augmentation_moves_the_ink_within_its_limits() -> None:
    dot = torch.full((400, 1, 32, 32), digits.BACKGROUND)
    dot[:, :, 15:17, 15:17] = 1.0
    recipe = dataclasses.replace(TINY, rotation=0.0, shift=3.0, scale=0.0)
    moved = (train.augment(dot, recipe, torch.Generator().manual_seed(0)) - digits.BACKGROUND)[:, 0]
    position = torch.arange(32) - 15.5
    mass = moved.sum((1, 2))
    for axis in (1, 2):
        centre = (moved.sum(axis) * position).sum(1) / mass
        assert centre.abs().max() <= 3.01
        assert centre.min() < -2.7
        assert centre.max() > 2.7
    assert moved.min() >= -1e-5  # nothing darker than paper comes in from outside


def test_learning_rate_rises_then_falls_to_zero() -> None:
    factor = train._warmup_cosine(100, 0.1)
    values = [factor(step) for step in range(101)]
    assert max(values) == values[9] == 1.0
    assert values[:10] == sorted(values[:10])
    assert values[10:] == sorted(values[10:], reverse=True)
    assert values[55] == pytest.approx(0.5)
    assert values[100] == pytest.approx(0.0, abs=1e-12)


def test_score_counts_right_answers(few: Dataset) -> None:
    class Constant(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.eye(10)[3].expand(len(x), 10)

    assert train.score(Constant(), few, "calibrate") == (int((few.labels["calibrate"] == 3).sum()), 20)


def test_command_writes_weights_and_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = dataclasses.replace(TINY, epochs=1, batch_size=500)
    monkeypatch.setitem(train.RECIPES, "vit_digits", recipe)
    threads, out = torch.get_num_threads(), tmp_path / "vit_digits.safetensors"
    try:
        assert train.main(["vit_digits", "--out", str(out), "--seed", "7"]) == 0
    finally:
        torch.set_num_threads(threads)
    facts = checkpoint.read_facts(out)
    assert facts["seed"] == 7
    assert facts["recipe"] == dataclasses.asdict(recipe)
    module = train.NETWORKS["vit_digits"]()
    checkpoint.load(module, out)
    right, count = train.score(module, digits.load(), "test")
    assert count == 597
    assert math.isclose(facts["accuracy"], right / count)
    assert f"test {right}/{count}" in capsys.readouterr().out


def test_unknown_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert train.main(["vit_digit"]) == 2
    finally:
        torch.set_num_threads(threads)
    errors = capsys.readouterr().err
    assert "unknown model 'vit_digit'" in errors
    assert "did you mean 'vit_digits'?" in errors
