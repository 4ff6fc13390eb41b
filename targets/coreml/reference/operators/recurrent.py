"""Recurrent layers of MIL: GRU, LSTM and the simple one.

Where the documentation of an operator is ambiguous, coremltools' own tests of it decide; each such place says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.arguments import number

Activation = Callable[[torch.Tensor], torch.Tensor]
_State = tuple[torch.Tensor, ...]
_Step = Callable[[torch.Tensor, _State], _State]


def _hard_sigmoid(x: torch.Tensor) -> torch.Tensor:
    return (0.2 * x + 0.5).clamp(0, 1)


ACTIVATIONS: dict[str, Activation] = {
    "tanh": torch.tanh,
    "scaled_tanh": torch.tanh,  # both scales are 1 here, as coremltools' tests have it: a recurrent layer takes none
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": _hard_sigmoid,
    "sigmoid_hard": _hard_sigmoid,
    "relu": torch.relu,
    "linear": lambda x: x,
}


def _activation(name: str) -> Activation:
    if name.lower() not in ACTIVATIONS:
        raise ValueError(f"activation '{name}' is none of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name.lower()]


def _run(inputs: torch.Tensor, state: _State, step: _Step) -> tuple[torch.Tensor, _State]:
    """Hidden states after every step, in the order of the steps, and the last state."""
    hidden = []
    for gates in inputs:
        state = step(gates, state)
        hidden.append(state[0])
    return torch.stack(hidden), state


def _projected(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Contribution of the input to all gates, of all steps at once."""
    return functional.linear(x, weight, bias)


def _ordered(x: torch.Tensor, direction: str) -> torch.Tensor:
    """The input in the order of the steps. coremltools' tests have the outputs of direction "reverse" stay in that order too."""
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction '{direction}' is none of forward and reverse")
    return x.flip(0) if direction == "reverse" else x


def rnn(
    x: torch.Tensor,
    initial_h: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor | None = None,
    direction: str = "forward",
    output_sequence: torch.Tensor | bool = False,
    activation: str = "tanh",
) -> tuple[torch.Tensor, torch.Tensor]:
    """`h = activation(W x + R h + b)`."""
    function = _activation(activation)

    def step(gates: torch.Tensor, state: _State) -> _State:
        return (function(gates + state[0] @ weight_hh.T),)

    sequence, (last,) = _run(_projected(_ordered(x, direction), weight_ih, bias), (initial_h,), step)
    return (sequence if number(output_sequence) else sequence[-1:]), last


def gru(
    x: torch.Tensor,
    initial_h: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor | None = None,
    direction: str = "forward",
    output_sequence: torch.Tensor | bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: torch.Tensor | bool = False,
    input_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates lie in the order reset, output, update.

    The documented `r * W_ho h` leaves open whether the reset gate scales the state or the product. By coremltools' tests it scales the
    state (`W_ho (r * h)`); with `reset_after` of iOS18 the product and its bias (`r * (W_ho h + b_ho)`), as in PyTorch.
    """
    gate, function = _activation(recurrent_activation), _activation(activation)
    size = weight_hh.shape[1]
    reset_h, output_h, update_h = weight_hh.chunk(3)
    zero = weight_hh.new_zeros(3 * size)
    reset_b, output_b, update_b = (zero if bias is None else bias).chunk(3)
    after = bool(number(reset_after))

    def step(gates: torch.Tensor, state: _State) -> _State:
        h = state[0]
        reset_x, output_x, update_x = gates.chunk(3, -1)
        reset = gate(reset_x + h @ reset_h.T + reset_b)
        update = gate(update_x + h @ update_h.T + update_b)
        recurrent = reset * (h @ output_h.T + output_b) if after else (reset * h) @ output_h.T + output_b
        return ((1 - update) * function(output_x + recurrent) + update * h,)

    sequence, (last,) = _run(_projected(_ordered(x, direction), weight_ih, input_bias), (initial_h,), step)
    return (sequence if number(output_sequence) else sequence[-1:]), last


def _lstm_step(
    weight: torch.Tensor, peephole: torch.Tensor | None, gate: Activation, cell: Activation, output: Activation, clip: float | None
) -> _Step:
    """Gates lie in the order input, forget, output, cell.

    The documentation clips the "cell gate". coremltools' tests clip the cell state, before the output gate and the activation read it.
    """
    size = weight.shape[1]
    input_p, forget_p, output_p = (weight.new_zeros(3 * size) if peephole is None else peephole).reshape(-1).chunk(3)

    def step(gates: torch.Tensor, state: _State) -> _State:
        h, c = state
        input_g, forget_g, output_g, cell_g = (gates + h @ weight.T).chunk(4, -1)
        c_next = gate(forget_g + forget_p * c) * c + gate(input_g + input_p * c) * cell(cell_g)
        if clip is not None:
            c_next = c_next.clamp(-clip, clip)
        return gate(output_g + output_p * c_next) * output(c_next), c_next

    return step


def lstm(
    x: torch.Tensor,
    initial_h: torch.Tensor,
    initial_c: torch.Tensor,
    weight_ih: torch.Tensor,
    weight_hh: torch.Tensor,
    bias: torch.Tensor | None = None,
    peephole: torch.Tensor | None = None,
    weight_ih_back: torch.Tensor | None = None,
    weight_hh_back: torch.Tensor | None = None,
    bias_back: torch.Tensor | None = None,
    peephole_back: torch.Tensor | None = None,
    direction: str = "forward",
    output_sequence: torch.Tensor | bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Long short-term memory. Of a bidirectional one the backward half of the sequence is in the order of the input."""
    functions = (_activation(recurrent_activation), _activation(cell_activation), _activation(activation))
    limit = None if clip is None else float(number(clip))
    size = weight_hh.shape[1]
    whole = bool(number(output_sequence))
    first = _lstm_step(weight_hh, peephole, *functions, limit)
    if direction != "bidirectional":
        sequence, (h, c) = _run(_projected(_ordered(x, direction), weight_ih, bias), (initial_h, initial_c), first)
        return (sequence if whole else sequence[-1:]), h, c
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional lstm needs weight_ih_back and weight_hh_back")
    second = _lstm_step(weight_hh_back, peephole_back, *functions, limit)
    forward, (h, c) = _run(_projected(x, weight_ih, bias), (initial_h[:, :size], initial_c[:, :size]), first)
    backward, (h_back, c_back) = _run(_projected(x.flip(0), weight_ih_back, bias_back), (initial_h[:, size:], initial_c[:, size:]), second)
    h, c = torch.cat((h, h_back), -1), torch.cat((c, c_back), -1)
    return (torch.cat((forward, backward.flip(0)), -1) if whole else h[None]), h, c


TABLE: dict[str, Callable[..., Any]] = {"gru": gru, "lstm": lstm, "rnn": rnn}
