"""The activations of LSTM, GRU and RNN, which these operators name in attributes together with their parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering


@dataclass(frozen=True)
class _Definition:
    """One of the functions that ONNX names.

    Attributes:
        apply: Computes it, from alpha and beta.
        alpha: Default of alpha; None: it has none, or takes none where `takes` says so.
        beta: Default of beta.
        takes: How many of alpha and beta it takes.
        native: MIL's name of it in recurrent operators; empty: MIL has none, or does not say which parameters it has.
    """

    apply: Callable[[Lowering, Any, float, float], Any]
    takes: int = 0
    alpha: float | None = None
    beta: float | None = None
    native: str = ""


def _affine(b: Lowering, x: Any, alpha: float, beta: float) -> Any:
    return b.op("add", x=b.op("mul", x=x, y=alpha), y=beta)


def _scaled_tanh(b: Lowering, x: Any, alpha: float, beta: float) -> Any:
    return b.op("mul", x=b.op("tanh", x=b.op("mul", x=x, y=beta)), y=alpha)


def _thresholded(b: Lowering, x: Any, alpha: float, _: float) -> Any:
    return b.op("select", cond=b.op("greater", x=x, y=alpha), a=x, b=0.0)


_DEFINITIONS = {
    "relu": _Definition(lambda b, x, *_: b.op("relu", x=x), native="relu"),
    "tanh": _Definition(lambda b, x, *_: b.op("tanh", x=x), native="tanh"),
    "sigmoid": _Definition(lambda b, x, *_: b.op("sigmoid", x=x), native="sigmoid"),
    "softsign": _Definition(lambda b, x, *_: b.op("softsign", x=x)),
    "softplus": _Definition(lambda b, x, *_: b.op("softplus", x=x)),
    "leakyrelu": _Definition(lambda b, x, alpha, _: b.op("leaky_relu", x=x, alpha=alpha), 1, 0.01),
    "thresholdedrelu": _Definition(_thresholded, 1, 1.0),
    "elu": _Definition(lambda b, x, alpha, _: b.op("elu", x=x, alpha=alpha), 1, 1.0),
    "hardsigmoid": _Definition(lambda b, x, alpha, beta: b.op("sigmoid_hard", x=x, alpha=alpha, beta=beta), 2, 0.2, 0.5),
    "affine": _Definition(_affine, 2),
    "scaledtanh": _Definition(_scaled_tanh, 2),
}
"""By name in lower case: ONNX's specification does not tell capitals apart."""


@dataclass(frozen=True)
class Activation:
    """One activation with its parameters. `native` is MIL's name of it, or empty."""

    definition: _Definition
    alpha: float = 0.0
    beta: float = 0.0

    @property
    def native(self) -> str:
        """MIL's name of it in recurrent operators, or empty."""
        return self.definition.native

    def apply(self, b: Lowering, x: Any) -> Any:
        """Its value at `x`."""
        return self.definition.apply(b, x, self.alpha, self.beta)


def activations(b: Lowering, node: ir.Node, default: tuple[str, ...], directions: int) -> list[list[Activation]]:
    """The activations of each direction.

    Raises:
        UnsupportedOpError: One is unknown, or it is not clear which of them a parameter belongs to.
    """
    names = list(node.attributes.get_strings("activations", default * directions))
    if len(names) == 2 * len(default) and directions == 1:  # RNN's schema has a default for two directions
        names = names[: len(default)]
    found = [_DEFINITIONS.get(name.lower()) for name in names]
    if None in found or len(found) != len(default) * directions:
        raise b.refuse(f"{node.op_type} with the activations {names}", f"use {len(default) * directions} of {sorted(_DEFINITIONS)}")
    known = [definition for definition in found if definition is not None]
    alphas = _parameters(b, node, "activation_alpha", [(definition.takes >= 1, definition.alpha) for definition in known])
    betas = _parameters(b, node, "activation_beta", [(definition.takes == 2, definition.beta) for definition in known])
    every = [Activation(*three) for three in zip(known, alphas, betas, strict=True)]
    return [every[start : start + len(default)] for start in range(0, len(every), len(default))]


def _parameters(b: Lowering, node: ir.Node, name: str, wanted: list[tuple[bool, float | None]]) -> list[float]:
    """The values of an attribute, given to the functions that take one, in their order."""
    values = [float(value) for value in node.attributes.get_floats(name, [])]
    takers = sum(takes for takes, _ in wanted)
    missing = any(takes and default is None for takes, default in wanted)
    if len(values) not in ((takers,) if missing else (0, takers)):
        raise b.refuse(f"{node.op_type} with {len(values)} values of {name} for {takers} activations that take one", "give one for each")
    rest = iter(values)
    return [0.0 if not takes else next(rest) if values else float(default or 0.0) for takes, default in wanted]
