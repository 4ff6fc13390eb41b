"""Executes a compiled MIL function, in the arithmetic that the program's types say.

Operators compute in float32 and int32; each result is then rounded to the type that the program declares for it. A float16 program is thus
computed with exact products and sums inside an operator and a float16 rounding after each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from edgekit.errors import EdgekitError, LoweringError
from edgekit.targets.coreml.reference.steps import CompiledBlock, Slot, Step
from edgekit.targets.coreml.reference.types import computed, rounded

SPECIAL = frozenset({"cond", "while_loop", "read_state", "write_state", "coreml_update_state"})
"""Operators that need the executor: nested blocks and states."""
Observer = Callable[[str, Any], None]
"""Is told each result, as it is after rounding, with the name of its operation."""


class Executor:
    """Runs blocks on one set of slots. `state` holds the states by name; they are replaced as the program writes them."""

    def __init__(self, slots: int, state: Mapping[str, torch.Tensor], observe: Observer | None = None) -> None:
        self._values: list[Any] = [None] * slots
        self.state = dict(state)
        self._observe = observe

    def set(self, slot: Slot, value: Any) -> None:
        """Puts an input in its place."""
        self._values[slot.index] = value

    def get(self, value: Any) -> Any:
        """The value in a slot, or a constant itself."""
        return self._values[value.index] if isinstance(value, Slot) else value

    def run(self, block: CompiledBlock) -> list[Any]:
        """Runs all steps and returns the block's outputs.

        Raises:
            LoweringError: An operator's arguments do not fit together; the message names the operation.
        """
        for step in block.steps:
            try:
                results = self._step(step)
            except EdgekitError:
                raise
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, NotImplementedError) as error:
                raise LoweringError(
                    f"'{step.operator}' cannot be computed: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}",
                    where=f"operation '{step.name}'",
                    fix="the program's shapes or parameters do not fit together: compile the model again",
                ) from error
            for (slot, kind), result in zip(step.outputs, results, strict=True):
                value = rounded(result, kind) if isinstance(result, torch.Tensor) else result
                self._values[slot.index] = value
                if self._observe is not None:
                    self._observe(step.name, value)
            for index in step.frees:
                self._values[index] = None
        return [self.get(value) for value in block.outputs]

    def _step(self, step: Step) -> tuple[Any, ...] | list[Any]:
        if step.function is None:
            return _SPECIAL[step.operator](self, step)
        result = step.function(**step.constants, **{name: self._argument(value) for name, value in step.variables.items()})
        return result if isinstance(result, tuple) else (result,)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        found = self.get(value)
        return computed(found) if isinstance(found, torch.Tensor) else found

    def argument(self, step: Step, name: str) -> Any:
        """One argument of a step, unchanged in type."""
        value = step.constants.get(name, step.variables.get(name))
        return [self.get(item) for item in value] if isinstance(value, list) else self.get(value)


def _cond(executor: Executor, step: Step) -> list[Any]:
    return executor.run(step.blocks[0 if bool(executor.argument(step, "pred")) else 1])


def _while_loop(executor: Executor, step: Step) -> list[Any]:
    condition, body = step.blocks
    values = executor.argument(step, "loop_vars")
    while True:
        for slot, value in zip(condition.inputs, values, strict=True):
            executor.set(slot, value)
        if not bool(executor.run(condition)[0]):
            return list(values)
        for slot, value in zip(body.inputs, values, strict=True):
            executor.set(slot, value)
        values = executor.run(body)


def _state_name(executor: Executor, step: Step, parameter: str) -> str:
    return str(executor.argument(step, parameter))


def _read_state(executor: Executor, step: Step) -> list[Any]:
    return [executor.state[_state_name(executor, step, "input")].clone()]


def _write_state(executor: Executor, step: Step) -> list[Any]:
    executor.state[_state_name(executor, step, "input")] = executor.argument(step, "data").clone()
    return []


def _update_state(executor: Executor, step: Step) -> list[Any]:
    value = executor.argument(step, "value")
    executor.state[_state_name(executor, step, "state")] = value.clone()
    return [value]


_SPECIAL: dict[str, Callable[[Executor, Step], list[Any]]] = {
    "cond": _cond,
    "while_loop": _while_loop,
    "read_state": _read_state,
    "write_state": _write_state,
    "coreml_update_state": _update_state,
}
