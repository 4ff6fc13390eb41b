"""The two faces of the interpreter: `run` on numpy arrays, and `Interpreter` on torch tensors with gradients and hooks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from edgekit.errors import DataError, SourceError, UnsupportedOpError, UsageError, nearest
from edgekit.graph.interpreter.engine import Engine, Hook
from edgekit.graph.interpreter.plan import Planner, initial
from edgekit.graph.interpreter.values import Carried, DataType, NotSupportedError, Precision, Value, from_array, onnx_type, to_array

Hooks: TypeAlias = Mapping[str, Callable[[Tensor], Tensor | None]] | Hook
"""A function per name of a value, or one function of (name, tensor) for all; what it returns, if anything, replaces the tensor."""
Source: TypeAlias = ir.Model | str | Path

PRECISIONS = ("float32", "float64", "float16")


def run(model: Source, inputs: Mapping[str, Any], *, dtype: str = "float32", hooks: Hooks | None = None) -> dict[str, Any]:
    """Runs a model once.

    Args:
        model: The model, or the path of an .onnx file.
        inputs: Array per graph input. bfloat16, float8 and the 4- and 2-bit types are those of ml_dtypes; a sequence is a list of arrays.
        dtype: See `Interpreter`.
        hooks: See `Interpreter.__call__`.

    Returns:
        Array per graph output, in the type of the graph (in float64 where `dtype` is `float64`).

    Raises:
        UnsupportedOpError: The model has an operator, or a type in an operator, that the interpreter does not compute.
        DataError: The inputs do not fit the model.
        SourceError: The model cannot be read, or a node fails on its inputs.
    """
    interpreter = Interpreter(model, dtype=dtype)
    with torch.no_grad():
        outputs = interpreter(inputs, hooks)
    return {name: to_array(value) for name, value in outputs.items()}


class Interpreter:
    """A model made ready to run many times.

    Model-local functions are run as they are. Values inside a function are known to hooks as `NODE/VALUE`.

    Args:
        model: The model, or the path of an .onnx file. Later changes of the model are not seen.
        dtype: `float32`: each value in its declared type. `float64`: every floating-point value in float64, whatever the model says.
            `float16`: every floating-point value, inputs and weights too, computed in float32 and rounded to float16, which is what
            hardware of that type with float32 accumulation gives; values beyond 65504 become infinite.
        parameters: Whether the floating-point initializers of the main graph become parameters with gradients, or the names of those
            that do. Under `float16` a parameter itself stays float32 and is rounded where it is used, with a straight-through gradient.

    Attributes:
        parameters: Parameter per name of its initializer. Changing one in place (an optimizer's step) changes the next run.
        input_names: Graph inputs that must be given.
        output_names: Graph outputs.

    Raises:
        UnsupportedOpError: The model has an operator that the interpreter does not know.
        UsageError: `dtype` or a parameter's name is unknown.
        SourceError: The file cannot be read, or the graph uses a value that it does not define.
    """

    def __init__(self, model: Source, *, dtype: str = "float32", parameters: bool | Collection[str] = False) -> None:
        if dtype not in PRECISIONS:
            raise UsageError(f"the interpreter does not run in '{dtype}'", fix=nearest(dtype, PRECISIONS))
        self._precision = Precision(dtype)
        model = _load(model)
        self._plan = Planner(model, self._precision).graph(model.graph, model.graph.opset_imports)
        if self._plan.captures:
            name = self._plan.captures[0].name
            raise SourceError(f"value '{name}' is used before it is defined", where=f"graph '{model.graph.name}'", fix="sort the graph")
        self._inputs = {value.name or "": value for value in model.graph.inputs}
        self._names: frozenset[str] | None = None
        self.input_names = [name for name, value in self._inputs.items() if value not in self._plan.constants]
        self.output_names = [value.name or "" for value in model.graph.outputs]
        self.parameters = self._make_parameters(parameters)

    def _make_parameters(self, chosen: bool | Collection[str]) -> dict[str, torch.nn.Parameter]:
        constants = self._plan.constants
        floats = {
            value.name or "": value
            for value, constant in constants.items()
            if value.is_initializer() and isinstance(constant, Tensor) and constant.is_floating_point()
        }
        if isinstance(chosen, bool):
            names: Collection[str] = floats if chosen else ()
        else:
            names = chosen
            for name in names:
                if name not in floats:
                    raise UsageError(f"the model has no floating-point initializer '{name}'", fix=nearest(name, floats))
        parameters = {}
        for name in names:
            value = floats[name]
            exact = initial(value, Precision())  # not rounded, as the constant may be
            parameters[name] = constants[value] = torch.nn.Parameter(exact.to(constants[value].dtype, copy=True))
        self._plan.parameters = tuple(floats[name] for name in names)
        return parameters

    def __call__(self, inputs: Mapping[str, Any], hooks: Hooks | None = None) -> dict[str, Any]:
        """Runs the model once, with gradients if torch's gradient mode is on.

        Args:
            inputs: Tensor or array per graph input; those that have an initializer may be left out.
            hooks: `{name: function(tensor)}` or `function(name, tensor)`, called on each input, initializer and result in the order in
                which they are made. What it returns replaces the tensor; None leaves it.

        Returns:
            Tensor per graph output; a list for a sequence; None for an empty optional; `values.Carried` for types that torch lacks.

        Raises:
            DataError: An input is missing, unknown, or not of the declared type and shape.
            UnsupportedOpError: An operator does not compute in the type of its inputs.
            SourceError: A node fails on its inputs.
            UsageError: A hook is for a value that the model does not have.
        """
        for name in inputs:
            if name not in self._inputs:
                raise DataError(f"the model has no input '{name}'", fix=nearest(name, self._inputs))
        arguments = []
        for name, value in self._inputs.items():
            if name in inputs:
                arguments.append(_admit(inputs[name], value, self._precision))
            elif value in self._plan.constants:
                arguments.append(self._plan.constants[value])
            else:
                raise DataError(f"input '{name}' is missing", fix=f"give arrays for: {', '.join(self.input_names)}")
        results = Engine(self._precision, self._resolve(hooks)).run(self._plan, arguments, {})
        return dict(zip(self.output_names, results, strict=True))

    def _resolve(self, hooks: Hooks | None) -> Hook | None:
        if not isinstance(hooks, Mapping):
            return hooks
        by_name = hooks
        if self._names is None:
            self._names = frozenset(self._plan.value_names())
        for name in by_name:
            if name not in self._names:
                raise UsageError(f"a hook is for value '{name}', which the model does not have", fix=nearest(name, self._names))

        def hook(name: str, tensor: Tensor) -> Tensor | None:
            function = by_name.get(name)
            return None if function is None else function(tensor)

        return hook


def _load(model: Source) -> ir.Model:
    if isinstance(model, ir.Model):
        return model
    try:
        return ir.load(model)
    except Exception as error:  # whatever the parser of a broken file raises
        raise SourceError(f"the file cannot be read as an ONNX model: {error}", where=str(model), fix="export the model again") from error


def _admit(given: Any, formal: ir.Value, precision: Precision) -> Value:
    """The value of an input as the graph declares it."""
    if given is None:
        return None
    if isinstance(given, (list, tuple)) and not isinstance(formal.type, ir.TensorType):
        return [_admit(item, ir.Value(name=formal.name), precision) for item in given]
    name = formal.name
    try:
        value = given if isinstance(given, Tensor | Carried) else from_array(np.asarray(given), precision)
        dtype = onnx_type(value)
    except (NotSupportedError, KeyError, TypeError) as error:
        raise UnsupportedOpError(f"the interpreter refuses {error}", where=f"input '{name}'", fix="cast the input") from error
    if isinstance(value, Tensor) and value.is_floating_point():
        declared = formal.dtype if isinstance(formal.type, ir.TensorType) and formal.dtype is not None else dtype
        if not declared.is_floating_point() or declared not in _FLOATING:
            raise _wrong_type(name, declared, dtype)
        value = value.to(precision.held(declared))
    elif isinstance(formal.type, ir.TensorType) and formal.dtype not in (None, DataType.UNDEFINED, dtype):
        raise _wrong_type(name, formal.dtype, dtype)
    _check_shape(value, formal)
    return value


_FLOATING = frozenset({DataType.FLOAT, DataType.DOUBLE, DataType.FLOAT16, DataType.BFLOAT16})


def _wrong_type(name: str | None, declared: DataType | None, given: DataType) -> DataError:
    assert declared is not None
    return DataError(f"input '{name}' is declared {declared.name} and was given {given.name}", fix=f"cast the array to {declared.name}")


def _check_shape(value: Value, formal: ir.Value) -> None:
    if formal.shape is None or isinstance(value, list):
        return
    shape = tuple((value.tensor if isinstance(value, Carried) else value).shape)
    declared = tuple(formal.shape)
    fits = len(shape) == len(declared) and all(
        not isinstance(want, int) or want == have for have, want in zip(shape, declared, strict=True)
    )
    if not fits:
        wanted = [want if isinstance(want, int) else str(want) for want in declared]
        raise DataError(
            f"input '{formal.name}' is declared with shape {wanted} and was given {list(shape)}", fix="reshape or crop the array"
        )
