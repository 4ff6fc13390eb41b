"""Steps of training that can be stopped and taken up again to the same bits."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed import all_reduce, get_rank, get_world_size, is_available, is_initialized


@dataclass(frozen=True)
class Schedule:
    """How weights are stepped.

    Attributes:
        rate: The highest learning rate; it falls to 0 along a cosine.
        warm_up: Steps in which it rises.
        clip: The largest norm of the gradient; 0: any.
    """

    rate: float
    warm_up: int = 0
    clip: float = 0.0

    def at(self, step: int, steps: int) -> float:
        """The rate of a step."""
        if step < self.warm_up:
            return self.rate * (step + 1) / self.warm_up
        part = (step - self.warm_up) / max(steps - self.warm_up, 1)
        return self.rate * 0.5 * (1 + math.cos(math.pi * part))


class Trainer:
    """Minimizes a loss.

    Args:
        parameters: The weights by name.
        loss: The loss of the samples with these indices.
        count: Number of samples.
        batch: Samples a step.
        steps: Number of steps.
        schedule: How they are stepped.
        seed: What the order of samples depends on.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], loss: Callable[[np.ndarray], Tensor], count: int, batch: int, steps: int,
        schedule: Schedule, seed: tuple[int, ...],
    ) -> None:  # fmt: skip
        self._parameters, self._loss, self._count, self._batch = dict(parameters), loss, count, min(batch, count)
        self.steps, self._schedule, self._seed = steps, schedule, seed
        self._optimizer = torch.optim.Adam(list(self._parameters.values()), lr=schedule.rate)
        self.step = 0

    def advance(self) -> float:
        """Takes one step; returns the loss before it."""
        indices = np.random.default_rng([*self._seed, self.step]).choice(self._count, self._batch, replace=False)
        if _distributed():
            indices = indices[get_rank() :: get_world_size()]
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.at(self.step, self.steps)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(indices)
        loss.backward()  # type: ignore[no-untyped-call]
        _average(self._parameters)
        if self._schedule.clip:
            torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), self._schedule.clip)
        self._optimizer.step()
        self.step += 1
        return float(loss.detach())

    def state(self) -> dict[str, Any]:
        """All that the next step depends on."""
        weights = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        return {"step": self.step, "weights": weights, "optimizer": self._optimizer.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state."""
        self.step = int(state["step"])
        with torch.no_grad():
            for name, tensor in state["weights"].items():
                self._parameters[name].copy_(tensor)
        self._optimizer.load_state_dict(state["optimizer"])

    def seconds_a_step(self, tries: int = 2) -> float:
        """Time of a step, after one that warms up; the weights are as before it."""
        kept = self.state()
        kept["optimizer"] = {"state": {}, "param_groups": kept["optimizer"]["param_groups"]} if self.step == 0 else kept["optimizer"]
        self.advance()
        begun = time.perf_counter()
        for _ in range(tries):
            self.advance()
        spent = (time.perf_counter() - begun) / tries
        self.restore(kept)
        return spent


def _distributed() -> bool:
    return is_available() and is_initialized() and get_world_size() > 1


def _average(parameters: Mapping[str, torch.nn.Parameter]) -> None:
    """The mean of the gradients of all processes, which each took a part of the batch."""
    if not _distributed():
        return
    for parameter in parameters.values():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        all_reduce(parameter.grad)
        parameter.grad /= get_world_size()
