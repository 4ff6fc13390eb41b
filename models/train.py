"""Trains a network of the zoo on the digits again: `python -m edgekit.models.train NAME`.

One loop for every network; what differs between them is a row of `RECIPES`. The calibrate part is what progress is judged on;
the test part is read once, at the end, for the accuracy that is written into the weights file.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgekit.contracts import Dataset
from edgekit.errors import EdgekitError, UsageError, nearest
from edgekit.models import checkpoint, digits, mobileone_digits, vit_digits

THREADS = 2


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one training.

    Attributes:
        epochs: Passes over the train part.
        batch_size: Samples in a step.
        learning_rate: Peak of AdamW's learning rate: linear warm-up, then a half cosine down to zero.
        warmup: Share of the steps that warm up.
        weight_decay: AdamW's, on matrices and kernels only.
        label_smoothing: Probability mass that is spread over all classes.
        rotation: Largest angle of a random rotation or shear, in degrees.
        shift: Largest random shift along each axis, in pixels.
        scale: Largest relative change of size along each axis.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.1
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    rotation: float = 12.0
    shift: float = 3.0
    scale: float = 0.12


NETWORKS: dict[str, Callable[[], nn.Module]] = {"vit_digits": vit_digits.network, "mobileone_digits": mobileone_digits.network}

RECIPES = {
    "vit_digits": Recipe(epochs=70, batch_size=50, learning_rate=1e-3),
    "mobileone_digits": Recipe(epochs=30, batch_size=50, learning_rate=4e-3),
}


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Returns the images `[B, 1, H, W]`, each under its own small random affine map; what comes in from outside is background."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, shear = uniform(math.radians(recipe.rotation)), uniform(math.radians(recipe.rotation)).tan()
    height, width = 1 + uniform(recipe.scale), 1 + uniform(recipe.scale)
    shift = 2 * recipe.shift / images.shape[-1]  # grid coordinates run from -1 to 1
    cos, sin = angle.cos(), angle.sin()
    rows = torch.stack((width * cos, -height * sin + shear, uniform(shift), width * sin, height * cos, uniform(shift)), dim=1)
    grid = functional.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    ink = images - digits.BACKGROUND  # grid_sample pads with zeros
    return functional.grid_sample(ink, grid, align_corners=False) + digits.BACKGROUND


def fit(network: nn.Module, data: Dataset, recipe: Recipe, seed: int, report: Callable[[str], None]) -> None:
    """Trains `network` in place on the train part and leaves it in evaluation mode.

    Args:
        network: The module to train, from images `[B, 1, H, W]` to logits `[B, classes]`.
        data: With the parts `train` and `calibrate`; the test part is not read.
        recipe: The hyperparameters.
        seed: Of the order of the samples and their augmentation.
        report: Gets one line an epoch.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.from_numpy(data.inputs["train"]), torch.from_numpy(data.labels["train"])
    steps = len(images) // recipe.batch_size
    optimizer = _optimizer(network, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _warmup_cosine(recipe.epochs * steps, recipe.warmup))
    started = time.perf_counter()
    for epoch in range(1, recipe.epochs + 1):
        network.train()
        total = 0.0
        for batch in torch.randperm(len(images), generator=generator)[: steps * recipe.batch_size].view(steps, recipe.batch_size):
            logits = network(augment(images[batch], recipe, generator))
            loss = functional.cross_entropy(logits, labels[batch], label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        right, count = score(network, data, "calibrate")
        elapsed = time.perf_counter() - started
        left = elapsed / epoch * (recipe.epochs - epoch)
        report(
            f"epoch {epoch:3d}/{recipe.epochs}  loss {total / steps:.4f}  calibrate {right}/{count}  {elapsed:4.0f} s, {left:.0f} s left"
        )
    network.eval()


def score(network: nn.Module, data: Dataset, part: str) -> tuple[int, int]:
    """Returns how many samples of `part` the network classifies rightly in evaluation mode, and how many there are."""
    network.eval()
    with torch.inference_mode():
        batches = torch.split(torch.from_numpy(data.inputs[part]), 200)
        predicted = torch.cat([network(batch).argmax(1) for batch in batches])
    return int(np.sum(predicted.numpy() == data.labels[part])), len(predicted)


def train(name: str, out: Path, seed: int, report: Callable[[str], None]) -> float:
    """Trains the zoo model `name` from scratch, writes its weights and facts to `out` and returns its top-1 on the test part.

    Raises:
        UsageError: There is no such model.
    """
    if name not in RECIPES:
        raise UsageError(f"unknown model '{name}'", fix=nearest(name, RECIPES))
    recipe, data = RECIPES[name], digits.load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = NETWORKS[name]()
    fit(network, data, recipe, seed, report)
    calibrated, calibrate_count = score(network, data, "calibrate")
    right, count = score(network, data, "test")
    facts = {
        "accuracy": right / count,
        "calibrate_accuracy": calibrated / calibrate_count,
        "dataset": "digits",
        "recipe": dataclasses.asdict(recipe),
        "seed": seed,
        "torch": torch.__version__,
    }
    checkpoint.save(network, out, facts)
    report(f"test {right}/{count} = {right / count:.4f}; wrote {out} ({out.stat().st_size:,} bytes)")
    return right / count


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    decayed = [parameter for parameter in network.parameters() if parameter.ndim in (2, 4)]
    plain = [parameter for parameter in network.parameters() if parameter.ndim not in (2, 4)]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def _warmup_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))

    return factor


def _print_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0, or that of the error (2 for an unknown name)."""
    parser = argparse.ArgumentParser(prog="python -m edgekit.models.train", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("name", metavar="NAME", help=f"model to train: {', '.join(sorted(RECIPES))}")
    parser.add_argument("--out", type=Path, help="weights file to write (default: the one in the zoo)")
    parser.add_argument("--seed", type=int, default=0, help="seed of initialization, sample order and augmentation (default 0)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    started = time.perf_counter(), time.process_time()
    try:
        train(options.name, options.out or checkpoint.weights_path(options.name), options.seed, _print_line)
    except EdgekitError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    _print_line(f"{time.perf_counter() - started[0]:.0f} s, {time.process_time() - started[1]:.0f} CPU-seconds on {THREADS} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
