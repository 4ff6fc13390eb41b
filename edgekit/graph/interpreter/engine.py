"""Runs plans: looks up inputs, calls functions, rounds, calls hooks, frees what is no longer used, and names the node in errors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir
from torch import Tensor

from edgekit.errors import EdgekitError, SourceError, UnsupportedOpError
from edgekit.graph.interpreter.carried import compute_carried
from edgekit.graph.interpreter.plan import Plan, Step, place
from edgekit.graph.interpreter.straight_through import round_to_float16
from edgekit.graph.interpreter.values import ONNX_TYPE, Carried, NotSupportedError, Precision, Value, onnx_type

Hook = Callable[[str, Tensor], Tensor | None]
"""Called with the name of a value and its tensor; what it returns, if anything, replaces the tensor."""


class Engine:
    """One run of a model.

    Args:
        precision: In what type floating-point values are held.
        hook: Called on every tensor as it is made.
    """

    def __init__(self, precision: Precision, hook: Hook | None = None) -> None:
        self._rounds = precision.rounds
        self._hook = hook

    def run(self, plan: Plan, arguments: Sequence[Value], outer: Mapping[ir.Value, Value]) -> list[Value]:
        """Runs a plan on the values of its inputs and gives those of its outputs.

        Args:
            plan: What to run.
            arguments: One value per formal input.
            outer: Values of the enclosing graph, of which it takes what it captures.
        """
        values: dict[ir.Value, Value] = dict(plan.constants)
        for captured in plan.captures:
            values[captured] = outer[captured]
        if self._rounds:  # other constants are rounded already
            for parameter in plan.parameters:
                values[parameter] = round_to_float16(values[parameter])
        if self._hook is not None:
            for constant, name in plan.constant_names.items():
                values[constant] = self._show(name, values[constant])
        for formal, name, argument in zip(plan.inputs, plan.names, arguments, strict=True):
            values[formal] = self._finish(name, argument)
        for step in plan.steps:
            arguments = [None if value is None else values[value] for value in step.inputs]
            results = self._compute(step, arguments, values)
            for value, name, result in zip(step.outputs, step.names, results, strict=False):
                if value is not None:
                    values[value] = self._finish(name, result)
            for value in step.release:
                values.pop(value, None)
        return [values[value] for value in plan.outputs]

    def _compute(self, step: Step, arguments: list[Value], values: Mapping[ir.Value, Value]) -> Sequence[Value]:
        attributes = step.attributes
        if step.bodies:
            bodies = {name: functools.partial(self._body, body, values) for name, body in step.bodies.items()}
            attributes = {**attributes, **bodies}
        try:
            if not step.raw and any(type(argument) is Carried for argument in arguments):
                result = compute_carried(step, arguments)
            else:
                result = step.function(*arguments, **attributes)
        except EdgekitError:
            raise
        except (NotSupportedError, NotImplementedError) as error:
            raise _refusal(step, str(error)) from error
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, ArithmeticError, AssertionError) as error:
            if "not implemented for" in str(error):
                raise _refusal(step, str(error)) from error
            raise SourceError(
                f"{step.describe()} failed on inputs {_shapes(arguments)}: {error}",
                where=place(step.node),
                fix="check the shapes and types of the inputs against the operator's specification",
            ) from error
        results = result if type(result) is tuple else (result,)
        if len(results) < step.wanted:
            raise _refusal(step, f"output {step.wanted - 1}")
        return results

    def _body(self, plan: Plan, outer: Mapping[ir.Value, Value], *arguments: Value) -> list[Value]:
        return self.run(plan, arguments, outer)

    def _finish(self, name: str, value: Value) -> Value:
        """Rounds a new value and shows it to the hook."""
        if self._rounds and isinstance(value, Tensor) and value.is_floating_point():
            value = round_to_float16(value)
        return value if self._hook is None or not name else self._show(name, value)

    def _show(self, name: str, value: Value) -> Value:
        assert self._hook is not None
        if type(value) is Carried:
            if isinstance(value.tensor, Tensor):
                replacement = self._hook(name, value.tensor)
                return value if replacement is None else Carried(replacement, value.dtype, value.gate)
        elif isinstance(value, Tensor):
            replacement = self._hook(name, value)
            return value if replacement is None else replacement
        return value


def _refusal(step: Step, reason: str) -> UnsupportedOpError:
    return UnsupportedOpError(
        f"the interpreter refuses {step.describe()}: {reason}", where=place(step.node), fix="cast the inputs to a type that it computes in"
    )


def _shapes(arguments: Sequence[Value]) -> str:
    def name(value: Value) -> str:
        known = type(value) is Carried or value.dtype in ONNX_TYPE  # a hook may have put in another type
        return onnx_type(value).name.lower() if known else str(value.dtype)

    def one(value: Value) -> str:
        if value is None or isinstance(value, list):
            return "none" if value is None else f"sequence of {len(value)}"
        tensor = value.tensor if type(value) is Carried else value
        return f"{name(value)}{list(tensor.shape)}"

    return ", ".join(one(value) for value in arguments) or "none"
