"""The operations of a saved ML Program as rules look at them: names, types, shapes, constants, and what made each argument."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from edgekit.errors import SourceError
from edgekit.targets.coreml.reference.constants import Weights, constant
from edgekit.targets.coreml.reference.package import Package
from edgekit.targets.coreml.reference.types import ValueType, value_type

FLOATS = frozenset({"fp16", "fp32"})


@dataclass(frozen=True)
class Extent:
    """What a constant of floats holds.

    Attributes:
        elements: Number of its elements.
        largest: Largest finite |x|.
        smallest: Smallest |x| that is not zero; 0 when all are zero.
        infinite: Whether an element is infinite.
    """

    elements: int
    largest: float
    smallest: float
    infinite: bool


class Constant:
    """A constant, read from the package when it is asked for."""

    def __init__(self, spec: Any, weights: Weights) -> None:
        self._spec = spec
        self._weights = weights

    def read(self) -> Any:
        """The decoded value: a tensor, a string or a list."""
        return constant(self._spec, self._weights)

    @cached_property
    def extent(self) -> Extent:
        """How large and small its elements are; only of constants of floats."""
        size = self.read().float().abs().flatten()
        finite = size[torch.isfinite(size)]
        nonzero = finite[finite > 0]
        return Extent(
            size.numel(),
            float(finite.max()) if finite.numel() else 0.0,
            float(nonzero.min()) if nonzero.numel() else 0.0,
            bool(torch.isinf(size).any()),
        )


@dataclass(frozen=True)
class Value:
    """An argument of an operation.

    Attributes:
        type: Its declared type.
        maker: The operation that computes it; None for a constant and for an input of the program or block.
        constant: Its value, where the program holds it.
    """

    type: ValueType
    maker: Operation | None = None
    constant: Constant | None = None

    @property
    def varies(self) -> bool:
        """Whether it is computed while the program runs; compressed weights are not."""
        return self.constant is None and not (self.maker and self.maker.operator.startswith("constexpr_"))


@dataclass(frozen=True)
class Operation:
    """One operation of the program.

    Attributes:
        name: Its own name, with the function's before it in a package of several functions.
        operator: MIL's name of the operator.
        inputs: Its arguments by parameter, those with several values as they are.
        outputs: Types of its results.
        result: Name of its first result, by which Core ML's compute plan knows it.
    """

    name: str
    operator: str
    inputs: dict[str, tuple[Value, ...]] = field(repr=False)
    outputs: tuple[ValueType, ...]
    result: str

    @property
    def varying(self) -> list[Value]:
        """Arguments that are computed while the program runs."""
        return [value for values in self.inputs.values() for value in values if value.varies]

    @property
    def computes_in(self) -> set[str]:
        """Element types of its results and of its computed arguments."""
        return {kind.dtype for kind in self.outputs} | {value.type.dtype for value in self.varying}

    @property
    def half(self) -> bool:
        """Whether its first result is float16."""
        return bool(self.outputs) and self.outputs[0].dtype == "fp16"

    def maker(self, parameter: str) -> Operation | None:
        """The operation that computes an argument, if one does."""
        values = self.inputs.get(parameter, ())
        return values[0].maker if values else None

    def shape(self, parameter: str) -> tuple[int | None, ...]:
        """The declared shape of an argument; empty when it is not given."""
        values = self.inputs.get(parameter, ())
        return values[0].type.shape if values else ()

    def known(self, parameter: str) -> Any:
        """A constant argument: a string, or numbers as a list; None when it is not given or is computed."""
        values = self.inputs.get(parameter, ())
        if len(values) != 1 or values[0].constant is None:
            return None
        found = values[0].constant.read()
        return found.flatten().tolist() if isinstance(found, torch.Tensor) else found


def operations(package: Package) -> Iterator[Operation]:
    """All operations but constants, in order, those of nested blocks after the operation that holds them.

    Raises:
        SourceError, UnsupportedOpError: The program's types cannot be read.
    """
    weights = Weights(package.weights)
    functions = package.spec.mlProgram.functions
    for name in sorted(functions):
        function = functions[name]
        scope = {item.name: Value(value_type(item.type)) for item in function.inputs}
        prefix = f"{name}/" if len(functions) > 1 else ""
        yield from _block(function.block_specializations[function.opset], scope, weights, prefix)


def _block(spec: Any, outer: Mapping[str, Value], weights: Weights, prefix: str) -> Iterator[Operation]:
    scope = dict(outer)
    scope.update({item.name: Value(value_type(item.type)) for item in spec.inputs})
    for operation in spec.operations:
        if operation.type == "const":
            output = operation.outputs[0]
            scope[output.name] = Value(value_type(output.type), None, Constant(operation.attributes["val"], weights))
            continue
        made = _operation(operation, scope, weights, prefix)
        yield made
        for block in operation.blocks:
            yield from _block(block, scope, weights, prefix)
        scope.update({output.name: Value(kind, made) for output, kind in zip(operation.outputs, made.outputs, strict=True)})


def _operation(spec: Any, scope: Mapping[str, Value], weights: Weights, prefix: str) -> Operation:
    inputs: dict[str, tuple[Value, ...]] = {}
    for parameter, argument in spec.inputs.items():
        inputs[parameter] = tuple(
            _looked_up(binding.name, scope, spec.type)
            if binding.WhichOneof("binding") == "name"
            else Value(value_type(binding.value.type), None, Constant(binding.value, weights))
            for binding in argument.arguments
        )
    result = next((output.name for output in spec.outputs), spec.type)
    return Operation(f"{prefix}{result}", spec.type, inputs, tuple(value_type(output.type) for output in spec.outputs), result)


def _looked_up(name: str, scope: Mapping[str, Value], reader: str) -> Value:
    if name not in scope:
        raise SourceError(f"a {reader} reads '{name}', which nothing before it defines", fix="the package is damaged: write it again")
    return scope[name]
