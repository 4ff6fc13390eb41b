"""A MIL function made ready to run: names resolved to slots, constants decoded, operators looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from edgekit.errors import SourceError, UnsupportedOpError
from edgekit.targets.coreml.reference.constants import Weights, constant
from edgekit.targets.coreml.reference.types import ValueType, computed, rounded, value_type

VARIADIC = frozenset({"values", "loop_vars", "elem_shape", "_existing_blocks"})
"""Parameters that take any number of values and are given to the operator as a list, however many there are."""


@dataclass(frozen=True)
class Slot:
    """Where a value lies while the program runs."""

    index: int


@dataclass
class Step:
    """One operation, ready to run.

    Attributes:
        operator: MIL's name of the operator.
        name: The operation's own name, for messages.
        function: What computes it; None for control flow and states, which the executor does itself.
        constants: Arguments that are known, by parameter.
        variables: Arguments that are computed, by parameter: a slot, or a list of slots and constants.
        outputs: Where the results go, with their declared types.
        blocks: Nested blocks, of control flow.
        frees: Slots that nothing reads after this step.
    """

    operator: str
    name: str
    function: Callable[..., Any] | None
    constants: dict[str, Any]
    variables: dict[str, Any]
    outputs: list[tuple[Slot, ValueType]]
    blocks: list[CompiledBlock] = field(default_factory=list)
    frees: list[int] = field(default_factory=list)


@dataclass
class CompiledBlock:
    """A sequence of steps. `inputs` are set by whoever runs it; `outputs` are slots or constants."""

    inputs: list[Slot]
    steps: list[Step]
    outputs: list[Any]


class Compiler:
    """Turns the blocks of one function into steps. Names are looked up in the innermost block first."""

    def __init__(self, table: Mapping[str, Callable[..., Any]], special: frozenset[str], weights: Weights, where: str) -> None:
        """`table` computes operators; those in `special` are left to the executor."""
        self._table = table
        self._special = special
        self._weights = weights
        self._where = where
        self.slots = 0

    def slot(self) -> Slot:
        """A place that no other value has."""
        self.slots += 1
        return Slot(self.slots - 1)

    def block(self, spec: Any, outer: Mapping[str, Any]) -> CompiledBlock:
        """Compiles a `MIL.proto` Block whose surroundings define `outer`.

        Raises:
            UnsupportedOpError: An operator is unknown.
            SourceError: The program is inconsistent or its weights cannot be read.
        """
        scope = dict(outer)
        inputs = []
        for value in spec.inputs:
            scope[value.name] = self.slot()
            inputs.append(scope[value.name])
        steps = []
        for operation in spec.operations:
            step = self._operation(operation, scope)
            if step is not None:
                steps.append(step)
        return CompiledBlock(inputs, steps, [self._lookup(name, scope, "the block's outputs") for name in spec.outputs])

    def _operation(self, spec: Any, scope: dict[str, Any]) -> Step | None:
        name = next((output.name for output in spec.outputs), spec.type)
        if spec.type == "const":
            scope[name] = self._constant(spec, name)
            return None
        function = self._table.get(spec.type)
        if function is None and spec.type not in self._special:
            raise UnsupportedOpError(
                f"the evaluator does not know the operator '{spec.type}'",
                where=f"operation '{name}' of {self._where}",
                fix="run the model on a Mac"
                if spec.type != "custom_layer"
                else "custom layers have no definition to run: replace it in the model",
            )
        constants, variables = self._arguments(spec, scope, name)
        blocks = [self.block(block, scope) for block in spec.blocks]
        outputs = [(self.slot(), value_type(output.type)) for output in spec.outputs]
        step = Step(spec.type, name, function, constants, variables, outputs, blocks)
        if spec.type.startswith("constexpr_") and not variables and function is not None:
            for output, (_, kind), value in zip(spec.outputs, outputs, self._expanded(step), strict=True):
                scope[output.name] = computed(rounded(value, kind))
            return None
        scope.update({output.name: slot for output, (slot, _) in zip(spec.outputs, outputs, strict=True)})
        return step

    def _expanded(self, step: Step) -> tuple[torch.Tensor, ...]:
        """Compressed weights, as the system expands them when it loads the model."""
        assert step.function is not None
        try:
            result = step.function(**step.constants)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise SourceError(
                f"the compressed weights '{step.name}' ({step.operator}) cannot be expanded: {str(error).strip().splitlines()[0]}",
                where=self._where,
                fix="the package is damaged: write it again",
            ) from error
        return result if isinstance(result, tuple) else (result,)

    def _constant(self, spec: Any, name: str) -> Any:
        if "val" not in spec.attributes:
            raise SourceError(f"the constant '{name}' has no value", where=self._where, fix="the package is damaged: write it again")
        return known(constant(spec.attributes["val"], self._weights))

    def _arguments(self, spec: Any, scope: Mapping[str, Any], name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        constants: dict[str, Any] = {}
        variables: dict[str, Any] = {}
        for parameter, argument in spec.inputs.items():
            found = [
                self._lookup(binding.name, scope, f"operation '{name}'")
                if binding.WhichOneof("binding") == "name"
                else known(constant(binding.value, self._weights))
                for binding in argument.arguments
            ]
            single = len(found) == 1 and parameter not in VARIADIC
            varies = any(isinstance(value, Slot) for value in found)
            (variables if varies else constants)[parameter] = found[0] if single else found
        for parameter, value in spec.attributes.items():  # constexpr operators of iOS16 keep their parameters here
            if parameter != "name":
                constants.setdefault(parameter, known(constant(value, self._weights)))
        return constants, variables

    def _lookup(self, name: str, scope: Mapping[str, Any], reader: str) -> Any:
        if name not in scope:
            raise SourceError(
                f"{reader} reads '{name}', which nothing before it defines", where=self._where, fix="the package is damaged: write it again"
            )
        return scope[name]


def known(value: Any) -> Any:
    """A decoded constant in the type that operators compute in."""
    return computed(value) if isinstance(value, torch.Tensor) else value


def free_early(block: CompiledBlock) -> None:
    """Notes at each step of a function's outermost block which values nothing reads after it."""
    kept = {value.index for value in block.outputs if isinstance(value, Slot)}
    last: dict[int, Step] = {}
    for step in block.steps:
        for index in _touched(step):
            last[index] = step
    for index, step in last.items():
        if index not in kept:
            step.frees.append(index)


def _touched(step: Step) -> set[int]:
    """Slots that a step, or a block within it, reads or writes."""
    found = {slot.index for slot, _ in step.outputs}
    for value in step.variables.values():
        found |= {item.index for item in (value if isinstance(value, list) else [value]) if isinstance(item, Slot)}
    for block in step.blocks:
        found |= {value.index for value in (*block.inputs, *block.outputs) if isinstance(value, Slot)}
        for inner in block.steps:
            found |= _touched(inner)
    return found
