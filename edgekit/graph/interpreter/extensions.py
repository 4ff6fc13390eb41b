"""The operators of the domain `edgekit` by their torch functions, faster than their bodies and with gradients of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.operators import DOMAIN, FAST, Evaluate


def _positional(evaluate: Evaluate) -> Callable[..., tuple[torch.Tensor, ...]]:
    def function(*inputs: torch.Tensor, **attributes: Any) -> tuple[torch.Tensor, ...]:
        return evaluate(inputs, attributes)

    return function


for _name, _evaluate in FAST.items():
    operator(_name, domain=DOMAIN)(_positional(_evaluate))
