"""LSTM, GRU and RNN against ONNX Runtime, as MIL's operators, written out, and as a loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import lower, run
from tests.targets.coreml.node_text import agrees_with_runtime, floats, model_of, text

INPUT, HIDDEN = 3, 4
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def case(
    operator: str, attributes: str, *, length: int = 5, batch: int = 2, states: bool = True, peepholes: bool = False
) -> tuple[str, dict[str, np.ndarray], dict[str, Any]]:
    """A text, its inputs and its constants."""
    directions = 2 if "bidirectional" in attributes else 1
    by_batch = "layout = 1" in attributes
    gates = GATES[operator]
    shapes = {"w": (gates * HIDDEN, INPUT), "r": (gates * HIDDEN, HIDDEN), "b": (2 * gates * HIDDEN,)} | (
        {"p": (3 * HIDDEN,)} if peepholes else {}
    )
    constants = {name: floats(directions, *shape, seed=seed, scale=0.5) for seed, (name, shape) in enumerate(shapes.items())}
    inputs = {"x": floats(*(batch, length) if by_batch else (length, batch), INPUT, seed=7)}
    names = ["h", "c"][: 2 if operator == "LSTM" else 1] if states else []
    shape = (batch, directions, HIDDEN) if by_batch else (directions, batch, HIDDEN)
    inputs |= {name: floats(*shape, seed=seed, scale=0.5) for seed, name in enumerate(names, 8)}
    declared = ", ".join(f"float[{','.join(map(str, array.shape))}] {name}" for name, array in inputs.items())
    slots = ["x", "w", "r", "b", "", *names, *(["p"] if peepholes else [])]
    results = ["y", "yh", "yc"][: 3 if operator == "LSTM" else 2]
    body = f"{', '.join(results)} = {operator}<hidden_size = {HIDDEN}{attributes}>({', '.join(slots)})"
    return text(body, declared, ", ".join(f"float[] {name}" for name in results)), inputs, constants


def activations(*names: str) -> str:
    """The attribute."""
    return ", activations = [" + ", ".join(f'"{name}"' for name in names) + "]"


PLAIN = ["", ', direction = "reverse"', ', direction = "bidirectional"']


@pytest.mark.parametrize("attributes", PLAIN)
@pytest.mark.parametrize("operator", GATES)
def test_directions(operator: str, attributes: str) -> None:
    source, inputs, constants = case(operator, attributes)
    agrees_with_runtime(source, inputs, **constants)


ATTRIBUTES = {
    "no states": ("LSTM", "", {"states": False}),
    "peepholes": ("LSTM", ', direction = "bidirectional"', {"peepholes": True}),
    "peepholes, written out": ("LSTM", activations("Sigmoid", "Elu", "Tanh"), {"peepholes": True}),
    "coupled": ("LSTM", ", input_forget = 1", {}),
    "relu": ("LSTM", activations("Sigmoid", "Relu", "Tanh"), {}),
    "hard sigmoid": ("LSTM", activations("HardSigmoid", "Tanh", "Softsign"), {}),
    "parameters": (
        "LSTM",
        activations("HardSigmoid", "LeakyRelu", "Affine") + ", activation_alpha = [0.3, 0.1, 0.5], activation_beta = [0.4, 0.2]",
        {},
    ),
    "batch of 1": ("GRU", "", {"batch": 1}),
    "reset after": ("GRU", ", linear_before_reset = 1", {}),
    "reset after, batch of 1": ("GRU", ", linear_before_reset = 1", {"batch": 1}),
    "reset after, both": ("GRU", ', linear_before_reset = 1, direction = "bidirectional"', {"length": 1}),
    "GRU clip": ("GRU", ", clip = 0.2", {"batch": 1}),
    "elu": ("GRU", activations("Sigmoid", "Elu"), {}),
    "long": ("GRU", ', direction = "bidirectional"', {"length": 40}),
    "long LSTM": ("LSTM", ", input_forget = 1", {"length": 40, "peepholes": True}),
    "long RNN": ("RNN", activations("Softplus"), {"length": 40, "states": False}),
    "RNN relu": ("RNN", activations("Relu"), {}),
    "scaled tanh": ("RNN", activations("ScaledTanh") + ", activation_alpha = [0.7], activation_beta = [0.6]", {}),
    "thresholded": ("RNN", activations("ThresholdedRelu") + ", activation_alpha = [0.1]", {}),
    "RNN clip": ("RNN", ", clip = 0.2", {}),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_attributes(name: str) -> None:
    operator, attributes, more = ATTRIBUTES[name]
    source, inputs, constants = case(operator, attributes, **more)
    agrees_with_runtime(source, inputs, **constants)


@pytest.mark.parametrize("name", ["", "reset after, batch of 1", "peepholes"])
def test_half_from_ios17_on(name: str) -> None:
    operator, attributes, more = ATTRIBUTES[name] if name else ("LSTM", "", {})
    source, inputs, constants = case(operator, attributes, **more)
    for version in ("", "iOS18"):
        agrees_with_runtime(source, inputs, half=True, version=version, tolerance=1e-2, **constants)


@pytest.mark.parametrize("operator", GATES)
def test_by_batch(operator: str) -> None:
    """ONNX Runtime lacks the layout: its result in the other one is turned."""
    source, inputs, constants = case(operator, ', direction = "bidirectional"')
    plain = run(lower(model_of(source, **constants)), inputs)
    turned, _, _ = case(operator, ', direction = "bidirectional", layout = 1')
    got = run(lower(model_of(turned, **constants)), {name: array.swapaxes(0, 1) for name, array in inputs.items()})
    for name, array in plain.items():
        np.testing.assert_allclose(got[name], array.transpose(2, 0, 1, 3) if name == "y" else array.swapaxes(0, 1), atol=1e-6)


def test_full_sequences_are_taken_and_others_refused() -> None:
    source, inputs, constants = case("RNN", "")
    source = source.replace("b, , h", "b, n, h")
    agrees_with_runtime(source, inputs, n=np.array([5, 5], np.int32), **constants)
    with pytest.raises(UnsupportedOpError, match="different lengths"):
        lower(model_of(source, n=np.array([5, 3], np.int32), **constants))


def test_clip_of_lstm_is_refused() -> None:
    source, _, constants = case("LSTM", ", clip = 0.2")
    with pytest.raises(UnsupportedOpError, match="clip"):
        lower(model_of(source, **constants))


REFUSED = {
    "activations": activations("Gauss"),
    "activation_alpha": activations("Affine"),
    "values": activations("Relu") + ", activation_alpha = [0.1]",
}


@pytest.mark.parametrize("name", REFUSED)
def test_unclear_activations_are_refused(name: str) -> None:
    source, _, constants = case("RNN", REFUSED[name])
    with pytest.raises(UnsupportedOpError, match=name):
        lower(model_of(source, **constants))


def test_computed_weights_are_refused() -> None:
    declared = "float[5,2,3] x, float[1,4,3] w, float[1,4,4] r"
    with pytest.raises(UnsupportedOpError, match="computed 'W'"):
        lower(model_of(text("y = RNN<hidden_size = 4>(x, w, r)", declared)))
