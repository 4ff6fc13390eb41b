"""Operators with graphs inside. A body is a function of values; what it captures from outside is bound already."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edgekit.graph.interpreter.registry import Call, operator
from edgekit.graph.interpreter.values import Carried, NotSupportedError, Value, unwrap

Body = Callable[..., list[Value]]


@operator("If", raw=True)
def branch(condition: Tensor, /, *, then_branch: Body, else_branch: Body) -> tuple[Value, ...]:
    """One of two graphs."""
    return tuple(then_branch() if bool(condition) else else_branch())


@operator("Loop", raw=True)
def loop(trip_count: Tensor | None, condition: Tensor | None, /, *carried: Value, body: Body, call: Call) -> tuple[Value, ...]:
    """Runs the body while the condition holds, at most `trip_count` times; then stacks what each iteration gave besides."""
    limit = None if trip_count is None else int(trip_count)
    going = True if condition is None else bool(condition)
    state: Sequence[Value] = carried
    collected: list[list[Value]] = []
    iteration = 0
    while going and (limit is None or iteration < limit):
        following, *results = body(torch.tensor(iteration), torch.tensor(going), *state)
        state = results[: len(carried)]
        collected.append(results[len(carried) :])
        going = bool(following) if condition is not None else True
        iteration += 1
    _require_iterations(collected, len(call.outputs) - len(carried))
    return (*state, *(_stack(column) for column in zip(*collected, strict=True)))


def _require_iterations(collected: Sequence[object], outputs: int) -> None:
    if outputs and not collected:
        raise NotSupportedError("no iteration, so that what each one gives has no known shape")


@operator("Scan", since=9, raw=True)
def scan(
    *inputs: Value,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    call: Call,
) -> tuple[Value, ...]:
    """Runs the body on each slice of the scanned inputs, from either end, and stacks what it gives besides the states."""
    states: Sequence[Value] = inputs[: len(inputs) - num_scan_inputs]
    count = len(states)
    scanned = inputs[count:]
    axes = scan_input_axes or [0] * num_scan_inputs
    backwards = scan_input_directions or [0] * num_scan_inputs
    slices = [_slices(value, axis, bool(back)) for value, axis, back in zip(scanned, axes, backwards, strict=True)]
    collected = []
    for elements in zip(*slices, strict=True):
        results = body(*states, *elements)
        states = results[:count]
        collected.append(results[count:])
    _require_iterations(collected, len(call.outputs) - count)
    outputs = []
    for index, column in enumerate(zip(*collected, strict=True)):
        axis = scan_output_axes[index] if scan_output_axes else 0
        ordered = column[::-1] if scan_output_directions and scan_output_directions[index] else column
        outputs.append(_stack(ordered, axis))
    return (*states, *outputs)


def _slices(value: Value, axis: int, backwards: bool) -> list[Value]:
    pieces = list(unwrap(value).unbind(axis))
    pieces = pieces[::-1] if backwards else pieces
    return [Carried(piece, value.dtype) for piece in pieces] if type(value) is Carried else pieces


def _stack(column: Sequence[Value], axis: int = 0) -> Value:
    stacked = torch.stack([unwrap(value) for value in column], axis)
    return Carried(stacked, column[0].dtype) if type(column[0]) is Carried else stacked
