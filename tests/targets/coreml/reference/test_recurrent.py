"""Recurrent layers of the evaluator against PyTorch's, and against loops in float64 written as in coremltools' tests of the operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edgekit.targets.coreml.reference.operators.recurrent import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, run

Array = np.ndarray[Any, Any]
STEPS, BATCH, INPUT, HIDDEN = 5, 2, 3, 4
ACTIVATIONS = {
    "tanh": np.tanh,
    "scaled_tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "relu": lambda x: np.maximum(x, 0),
    "linear": lambda x: x,
}


def _random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _arguments(gates: int) -> dict[str, Array]:
    return {
        "x": _random(1, STEPS, BATCH, INPUT), "initial_h": _random(2, BATCH, HIDDEN),
        "weight_ih": _random(3, gates * HIDDEN, INPUT), "weight_hh": _random(4, gates * HIDDEN, HIDDEN),
    }  # fmt: skip


def _check(results: tuple[Array, ...], sequence: Array, *last: Array, whole: bool) -> None:
    np.testing.assert_allclose(results[0], sequence if whole else sequence[-1:], rtol=1e-4, atol=1e-5)
    for result, expected in zip(results[1:], last, strict=True):
        np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_signatures() -> None:
    check_signatures(TABLE)


def _ordered(x: Array, direction: str) -> Array:
    """coremltools' tests have the outputs of direction "reverse" in the order of the steps: those of the flipped input."""
    return x[::-1] if direction == "reverse" else x


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "sigmoid_hard"])
@pytest.mark.parametrize(("direction", "whole", "biased"), [("forward", True, True), ("reverse", True, False), ("reverse", False, True)])
def test_rnn(direction: str, whole: bool, biased: bool, activation: str) -> None:
    given = _arguments(1)
    bias = _random(5, HIDDEN) if biased else np.zeros(HIDDEN)
    extra = {"bias": bias} if biased else {}
    results = call(TABLE["rnn"], **given, **extra, direction=direction, output_sequence=whole, activation=activation)
    h, sequence = given["initial_h"].astype(np.float64), []
    for x in _ordered(given["x"], direction):
        h = ACTIVATIONS.get(activation, ACTIVATIONS["hard_sigmoid"])(x @ given["weight_ih"].T + h @ given["weight_hh"].T + bias)
        sequence.append(h)
    _check(results, np.stack(sequence), h, whole=whole)


@pytest.mark.parametrize(("inner", "outer"), [("sigmoid", "tanh"), ("tanh", "sigmoid"), ("hard_sigmoid", "relu")])
@pytest.mark.parametrize("after", [None, False, True])
@pytest.mark.parametrize(("direction", "whole", "biased"), [("forward", True, True), ("reverse", True, False), ("reverse", False, True)])
def test_gru(direction: str, whole: bool, biased: bool, after: bool | None, inner: str, outer: str) -> None:
    given = _arguments(3)
    bias, input_bias = (_random(5, 3 * HIDDEN), _random(6, 3 * HIDDEN)) if biased else (np.zeros(3 * HIDDEN), np.zeros(3 * HIDDEN))
    extra: dict[str, Any] = {"bias": bias} if biased else {}
    if after is not None:
        extra |= {"reset_after": after} | ({"input_bias": input_bias} if biased else {})
    else:
        input_bias = np.zeros(3 * HIDDEN)
    results = call(TABLE["gru"], **given, **extra, direction=direction, output_sequence=whole, recurrent_activation=inner, activation=outer)
    (w_r, w_o, w_z), (r_r, r_o, r_z) = np.split(given["weight_ih"], 3), np.split(given["weight_hh"], 3)
    (b_r, b_o, b_z), (i_r, i_o, i_z) = np.split(bias, 3), np.split(input_bias, 3)
    gate, function = ACTIVATIONS[inner], ACTIVATIONS[outer]
    h, sequence = given["initial_h"].astype(np.float64), []
    for x in _ordered(given["x"], direction):
        z = gate(x @ w_z.T + h @ r_z.T + b_z + i_z)
        r = gate(x @ w_r.T + h @ r_r.T + b_r + i_r)
        recurrent = r * (h @ r_o.T + b_o) if after else (h * r) @ r_o.T + b_o
        h = (1 - z) * function(x @ w_o.T + i_o + recurrent) + z * h
        sequence.append(h)
    _check(results, np.stack(sequence), h, whole=whole)


def test_gru_that_resets_after_is_that_of_pytorch() -> None:
    module = torch.nn.GRU(INPUT, HIDDEN)
    x, initial = torch.from_numpy(_random(1, STEPS, BATCH, INPUT)), torch.from_numpy(_random(2, 1, BATCH, HIDDEN))
    with torch.no_grad():
        sequence, last = module(x, initial)

    def reordered(parameter: torch.Tensor) -> Array:
        reset, update, new = parameter.detach().chunk(3)
        return torch.cat((reset, new, update)).numpy()

    results = call(
        TABLE["gru"], x=x.numpy(), initial_h=initial[0].numpy(), weight_ih=reordered(module.weight_ih_l0),
        weight_hh=reordered(module.weight_hh_l0), input_bias=reordered(module.bias_ih_l0), bias=reordered(module.bias_hh_l0),
        reset_after=True, output_sequence=True,
    )  # fmt: skip
    _check(results, sequence.numpy(), last[0].numpy(), whole=True)


@pytest.mark.parametrize("clip", [None, 50.0, 0.2])
@pytest.mark.parametrize(
    ("functions", "peephole", "biased"),
    [
        (("sigmoid", "tanh", "tanh"), False, True), (("sigmoid", "tanh", "relu"), True, False),
        (("hard_sigmoid", "relu", "linear"), True, True),
        (("sigmoid", "scaled_tanh", "hard_sigmoid"), False, False), (("Sigmoid", "Linear", "Tanh"), True, True),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("direction", "whole"), [("forward", True), ("reverse", True), ("forward", False)])
def test_lstm(direction: str, whole: bool, functions: tuple[str, str, str], peephole: bool, biased: bool, clip: float | None) -> None:
    given = _arguments(4)
    initial_c = _random(7, BATCH, HIDDEN)
    bias = _random(5, 4 * HIDDEN) if biased else np.zeros(4 * HIDDEN)
    peep = _random(6, 3 * HIDDEN) if peephole else np.zeros(3 * HIDDEN)
    extra: dict[str, Any] = {"bias": bias} if biased else {}
    extra |= {"peephole": peep} if peephole else {}
    extra |= {} if clip is None else {"clip": clip}
    names = dict(zip(("recurrent_activation", "cell_activation", "activation"), functions, strict=True))
    results = call(TABLE["lstm"], **given, initial_c=initial_c, **extra, **names, direction=direction, output_sequence=whole)
    gate, cell, output = (ACTIVATIONS[name.lower()] for name in functions)
    p_i, p_f, p_o = np.split(peep, 3)
    h, c, sequence = given["initial_h"].astype(np.float64), initial_c.astype(np.float64), []
    for x in _ordered(given["x"], direction):
        i, f, o, z = np.split(x @ given["weight_ih"].T + h @ given["weight_hh"].T + bias, 4, -1)
        c = gate(f + c * p_f) * c + gate(i + c * p_i) * cell(z)
        c = c if clip is None else np.clip(c, -clip, clip)
        h = gate(o + c * p_o) * output(c)
        sequence.append(h)
    _check(results, np.stack(sequence), h, c, whole=whole)


def _ifoz(parameter: torch.Tensor) -> Array:
    i, f, z, o = parameter.detach().chunk(4)
    return torch.cat((i, f, o, z)).numpy()


@pytest.mark.parametrize("whole", [False, True])
def test_bidirectional_lstm_is_that_of_pytorch(whole: bool) -> None:
    module = torch.nn.LSTM(INPUT, HIDDEN, bidirectional=True)
    x, h, c = (torch.from_numpy(_random(seed, *shape)) for seed, shape in enumerate([(STEPS, BATCH, INPUT), *[(2, BATCH, HIDDEN)] * 2]))
    with torch.no_grad():
        sequence, (last_h, last_c) = module(x, (h, c))

    def joined(state: torch.Tensor) -> Array:
        return torch.cat((state[0], state[1]), -1).numpy()

    given = {
        "weight_ih": module.weight_ih_l0, "weight_hh": module.weight_hh_l0, "bias": module.bias_ih_l0 + module.bias_hh_l0,
        "weight_ih_back": module.weight_ih_l0_reverse, "weight_hh_back": module.weight_hh_l0_reverse,
        "bias_back": module.bias_ih_l0_reverse + module.bias_hh_l0_reverse,
    }  # fmt: skip
    results = call(
        TABLE["lstm"], x=x.numpy(), initial_h=joined(h), initial_c=joined(c), **{name: _ifoz(value) for name, value in given.items()},
        direction="bidirectional", output_sequence=whole,
    )  # fmt: skip
    expected = sequence.numpy() if whole else joined(last_h)[None]
    _check(results, expected, joined(last_h), joined(last_c), whole=True)


def test_bidirectional_peepholes_are_of_their_direction() -> None:
    """The halves of a bidirectional layer are a forward and a reverse one."""
    given, back = _arguments(4), _arguments(4)
    forward = {**given, "initial_c": _random(7, BATCH, HIDDEN), "peephole": _random(8, 3 * HIDDEN)}
    reverse = {**forward, "weight_ih": back["weight_ih"] + 1, "weight_hh": -back["weight_hh"], "peephole": _random(9, 3 * HIDDEN)}
    both = call(
        TABLE["lstm"], x=given["x"], initial_h=np.tile(given["initial_h"], 2), initial_c=np.tile(forward["initial_c"], 2),
        weight_ih=forward["weight_ih"], weight_hh=forward["weight_hh"], peephole=forward["peephole"],
        weight_ih_back=reverse["weight_ih"], weight_hh_back=reverse["weight_hh"], peephole_back=reverse["peephole"],
        direction="bidirectional", output_sequence=True,
    )  # fmt: skip
    first = call(TABLE["lstm"], **forward, output_sequence=True)
    second = call(TABLE["lstm"], **reverse, direction="reverse", output_sequence=True)
    _check(both, np.concatenate((first[0], second[0][::-1]), -1), *np.concatenate((first[1:], second[1:]), -1), whole=True)


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("rnn", {"activation": "dummy"}, "activation 'dummy'"), ("gru", {"direction": "bidirectional"}, "direction"),
        ("lstm", {"direction": "bidirectional"}, "weight_ih_back"), ("lstm", {"direction": "backward"}, "direction"),
    ],
)  # fmt: skip
def test_refusals(operator: str, change: dict[str, str], message: str) -> None:
    given = _arguments({"rnn": 1, "gru": 3, "lstm": 4}[operator])
    given |= {"initial_c": given["initial_h"]} if operator == "lstm" else {}
    with pytest.raises(ValueError, match=message):
        call(TABLE[operator], **given, **change)


def test_in_a_program() -> None:
    from coremltools.converters.mil.mil import Builder as mb

    given = _arguments(4)
    x = given.pop("x")
    results = run(lambda x: mb.lstm(x=x, initial_c=given["initial_h"], **given), {"x": x}, "iOS17", TABLE)
    expected = call(TABLE["lstm"], x=x, initial_c=given["initial_h"], **given)
    for result, wanted in zip(results, expected, strict=True):
        np.testing.assert_array_equal(result, wanted)
