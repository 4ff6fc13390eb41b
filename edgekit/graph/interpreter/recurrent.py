"""Recurrent layers: RNN, GRU and LSTM in one or both directions, step by step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.values import NotSupportedError

Activation = Callable[[Tensor], Tensor]
State = tuple[Tensor, ...]

_PLAIN: dict[str, Activation] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softsign": functional.softsign,
    "softplus": functools.partial(functional.softplus, threshold=40.0),
}
_WITH_ALPHA: dict[str, tuple[float, Callable[[Tensor, float], Tensor]]] = {
    "leakyrelu": (0.01, functional.leaky_relu),
    "thresholdedrelu": (1.0, lambda x, alpha: torch.where(x >= alpha, x, 0.0)),
    "elu": (1.0, functional.elu),
}
_WITH_ALPHA_AND_BETA: dict[str, tuple[float, float, Callable[[Tensor, float, float], Tensor]]] = {
    "affine": (1.0, 0.0, lambda x, alpha, beta: alpha * x + beta),
    "scaledtanh": (1.0, 1.0, lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
    "hardsigmoid": (0.2, 0.5, lambda x, alpha, beta: torch.clamp(alpha * x + beta, 0, 1)),
}


def _activations(
    names: Sequence[str], alphas: Sequence[float] | None, betas: Sequence[float] | None, clip: float | None
) -> list[Activation]:
    """The functions; alphas and betas are taken in turn by those that have one."""
    alpha, beta = iter(alphas or ()), iter(betas or ())
    functions: list[Activation] = []
    for name in (name.lower() for name in names):
        if name in _PLAIN:
            function = _PLAIN[name]
        elif name in _WITH_ALPHA:
            default, one = _WITH_ALPHA[name]
            function = functools.partial(_apply, one, next(alpha, default))
        elif name in _WITH_ALPHA_AND_BETA:
            first, second, two = _WITH_ALPHA_AND_BETA[name]
            function = functools.partial(_apply, two, next(alpha, first), next(beta, second))
        else:
            raise NotSupportedError(f"activation '{name}'")
        functions.append(function if clip is None else functools.partial(_clipped, function, clip))
    return functions


def _apply(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    *parameters, x = arguments
    return function(x, *parameters)


def _clipped(function: Activation, clip: float, x: Tensor) -> Tensor:
    return function(x.clamp(-clip, clip))


def _unroll(
    step: Callable[[int, Tensor, State], State],
    x: Tensor,
    lengths: Tensor | None,
    states: State,
    direction: str,
    layout: int,
) -> tuple[Tensor, ...]:
    """Runs the cell over time in each direction.

    Args:
        step: Takes the direction's number, the input `[B, I]` and the states `[B, H]`; gives the next states, the output first.
        x: `[T, B, I]`, or `[B, T, I]` with layout 1.
        lengths: Steps of each sample, `[B]`: beyond them the state stays and the output is zero.
        states: First states, each `[D, B, H]`.
        direction: `forward`, `reverse` or `bidirectional`.
        layout: 1 for batch first.

    Returns:
        Outputs `[T, D, B, H]` and last states `[D, B, H]`, batch first with layout 1.
    """
    steps = x.shape[0]
    outputs, finals = [], []
    for number in range(states[0].shape[0]):
        backwards = direction == "reverse" or number == 1
        current: State = tuple(state[number] for state in states)
        produced: list[Tensor] = [x] * steps
        for time in reversed(range(steps)) if backwards else range(steps):
            following = step(number, x[time], current)
            output = following[0]
            if lengths is not None:
                alive = (time < lengths)[:, None]
                following = tuple(torch.where(alive, new, old) for new, old in zip(following, current, strict=True))
                output = torch.where(alive, output, 0.0)
            produced[time], current = output, following
        outputs.append(torch.stack(produced))
        finals.append(current)
    everything = torch.stack(outputs, 1)
    last = [torch.stack(parts) for parts in zip(*finals, strict=True)]
    if layout:
        return everything.permute(2, 0, 1, 3), *(state.transpose(0, 1) for state in last)
    return everything, *last


class _Layer:
    """What the three layers share: shapes, first states and activations."""

    def __init__(
        self,
        x: Tensor,
        recurrence: Tensor,
        direction: str,
        layout: int,
        activations: Sequence[str],
        alphas: Sequence[float] | None,
        betas: Sequence[float] | None,
        clip: float | None,
    ) -> None:
        self.x = x.transpose(0, 1) if layout else x
        self.layout = layout
        self.directions, _, self.hidden = recurrence.shape
        names = list(activations)
        self.functions = _activations(names * (self.directions if len(names) * self.directions <= 6 else 1), alphas, betas, clip)
        if direction not in ("forward", "reverse", "bidirectional") or (direction == "bidirectional") != (self.directions == 2):
            raise NotSupportedError(f"direction '{direction}' with weights of {self.directions} directions")

    def first(self, state: Tensor | None) -> Tensor:
        if state is None:
            return self.x.new_zeros(self.directions, self.x.shape[1], self.hidden)
        return state.transpose(0, 1) if self.layout else state

    def activation(self, number: int, index: int, count: int) -> Activation:
        return self.functions[(number * count + index) % len(self.functions)]


def _biases(bias: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Input and recurrence biases, `[D, G H]` each."""
    if bias is None:
        zeros = like.new_zeros(like.shape[:2])
        return zeros, zeros
    first, second = bias.chunk(2, -1)
    return first, second


@operator("RNN")
def rnn(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    /,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] = ("Tanh",),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """H = f(X Wᵀ + H Rᵀ + biases)."""
    layer = _Layer(x, recurrence, direction, layout, activations, activation_alpha, activation_beta, clip)
    inner, outer = _biases(bias, weight)

    def step(number: int, x: Tensor, state: State) -> State:
        gate = x @ weight[number].t() + state[0] @ recurrence[number].t() + inner[number] + outer[number]
        return (layer.activation(number, 0, 1)(gate),)

    return _unroll(step, layer.x, lengths, (layer.first(initial_h),), direction, layout)


@operator("GRU")
def gru(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    /,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] = ("Sigmoid", "Tanh"),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Tensor, ...]:
    """Gated recurrent unit (Cho et al. 2014), gates in the order z, r, h."""
    layer = _Layer(x, recurrence, direction, layout, activations, activation_alpha, activation_beta, clip)
    inner, outer = _biases(bias, weight)

    def step(number: int, x: Tensor, state: State) -> State:
        f, g = layer.activation(number, 0, 2), layer.activation(number, 1, 2)
        (h,) = state
        rz, rr, rh = recurrence[number].chunk(3)
        oz, orr, oh = outer[number].chunk(3)
        xz, xr, xh = (x @ weight[number].t() + inner[number]).chunk(3, -1)
        update, reset = f(xz + h @ rz.t() + oz), f(xr + h @ rr.t() + orr)
        candidate = g(xh + (reset * (h @ rh.t() + oh) if linear_before_reset else (reset * h) @ rh.t() + oh))
        return ((1 - update) * candidate + update * h,)

    return _unroll(step, layer.x, lengths, (layer.first(initial_h),), direction, layout)


@operator("LSTM")
def lstm(
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peepholes: Tensor | None = None,
    /,
    *,
    activation_alpha: Sequence[float] | None = None,
    activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] = ("Sigmoid", "Tanh", "Tanh"),
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
    layout: int = 0,
) -> tuple[Tensor, ...]:
    """Long short-term memory (Hochreiter and Schmidhuber 1997), gates in the order i, o, f, c."""
    layer = _Layer(x, recurrence, direction, layout, activations, activation_alpha, activation_beta, clip)
    inner, outer = _biases(bias, weight)
    holes = weight.new_zeros(layer.directions, 3 * layer.hidden) if peepholes is None else peepholes

    def step(number: int, x: Tensor, state: State) -> State:
        f, g, out = (layer.activation(number, index, 3) for index in range(3))
        h, cell = state
        pi, po, pf = holes[number].chunk(3)
        gates = x @ weight[number].t() + h @ recurrence[number].t() + inner[number] + outer[number]
        i, o, forget, c = gates.chunk(4, -1)
        opened = f(i + pi * cell)
        kept = 1 - opened if input_forget else f(forget + pf * cell)
        cell = kept * cell + opened * g(c)
        return f(o + po * cell) * out(cell), cell

    return _unroll(step, layer.x, lengths, (layer.first(initial_h), layer.first(initial_c)), direction, layout)
