"""Runs an operator on values of types that torch does not compute in, and carries the straight-through gradient of selected indices.

The operator's schema says which outputs have the type of which input (its type variables); such an output stands for the same type and is
brought back into its range. Operators that choose a type by themselves (Cast, QuantizeLinear …) are `raw` and do not come here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import onnx
import torch
from torch import Tensor

from edgekit.graph.interpreter.plan import Step
from edgekit.graph.interpreter.straight_through import gate
from edgekit.graph.interpreter.values import CARRIERS, Carried, DataType, NotSupportedError, Value, integral, unwrap, with_gradient, wrap

_BITS_SUFFICE = frozenset(
    {
        *("Add", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "Compress", "Concat", "DepthToSpace", "Equal", "Expand", "Flatten"),
        *("Gather", "GatherElements", "GatherND", "Mul", "Pad", "Reshape", "ReverseSequence", "Shape", "Size", "Slice", "SpaceToDepth"),
        *("Split", "Squeeze", "Sub", "Sum", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where"),
    }
)
"""Operators whose uint64 result follows from the bits taken as int64: those that move values, and sums and products modulo 2^64."""
_MOVES = frozenset({"Concat", "Expand", "Flatten", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"})
"""Operators that move selected indices: their gates move alike."""
_OFFSETS = frozenset({"Add", "Sub"})
_KEEP_GRADIENT = _MOVES | {"DepthToSpace", "Gather", "GatherElements", "GatherND", "SpaceToDepth", "Split"}
"""Operators that pass integers carried as floats on, gradient and all; others get real integers."""


def compute_carried(step: Step, arguments: Sequence[Value]) -> tuple[Value, ...]:
    """Computes a step of which at least one argument is `Carried`.

    Raises:
        NotSupportedError: Strings; uint64 values of 2^63 and more where their order or size matters.
    """
    name = step.node.op_type
    for argument in arguments:
        if type(argument) is Carried:
            if argument.dtype is DataType.STRING:
                raise NotSupportedError("tensors of type STRING")
            if argument.dtype is DataType.UINT64 and name not in _BITS_SUFFICE and bool((argument.tensor < 0).any()):
                raise NotSupportedError("uint64 values of 2^63 and more")
    if name not in _KEEP_GRADIENT:
        arguments = [integral(argument) for argument in arguments]
    tensors = [unwrap(argument) for argument in arguments]
    result = step.function(*tensors, **step.attributes)
    results = result if type(result) is tuple else (result,)
    sources = _sources(step.node.domain, name, step.version, len(arguments), len(results))
    wrapped = tuple(_wrap(result, None if source is None else arguments[source]) for result, source in zip(results, sources, strict=True))
    if any(type(argument) is Carried and argument.gate is not None for argument in arguments):
        return _with_gates(step, arguments, wrapped)
    return wrapped


def _wrap(result: Any, source: Value) -> Value:
    if type(source) is not Carried or not isinstance(result, Tensor):
        return result
    if with_gradient(source):
        return Carried(result, source.dtype)
    return Carried(wrap(result, source.dtype), source.dtype) if source.dtype in CARRIERS else result


@functools.lru_cache(maxsize=4096)
def _sources(domain: str, name: str, version: int, inputs: int, outputs: int) -> tuple[int | None, ...]:
    """For each output, the first input of the same type variable."""
    schema = onnx.defs.get_schema(name, version, domain)

    def variable(formals: Any, index: int) -> str:
        return str(formals[min(index, len(formals) - 1)].type_str)

    formal_inputs = [variable(schema.inputs, index) for index in range(inputs)]
    formal_outputs = [variable(schema.outputs, index) for index in range(outputs)]
    return tuple(formal_inputs.index(kind) if kind in formal_inputs and "(" not in kind else None for kind in formal_outputs)


def _with_gates(step: Step, arguments: Sequence[Value], results: tuple[Value, ...]) -> tuple[Value, ...]:
    name = step.node.op_type
    gates = [argument.gate if type(argument) is Carried else None for argument in arguments]
    if name in _MOVES and (gates[0] is not None or name == "Concat"):
        moved = [_gate_of(argument) if index == 0 or name == "Concat" else unwrap(argument) for index, argument in enumerate(arguments)]
        return (Carried(results[0], DataType.INT64, step.function(*moved, **step.attributes)),)
    if name in _OFFSETS:
        scores = next(score for score in gates if score is not None)
        return (Carried(results[0], DataType.INT64, scores),) if scores.shape == results[0].shape else results
    if name == "TopK" and gates[0] is not None:  # indices sorted by a second TopK
        values, order = (unwrap(result) for result in results)
        return Carried(values, DataType.INT64, gates[0].gather(step.attributes.get("axis", -1), order)), order
    selected = results[0]
    if len(gates) > 1 and gates[1] is not None and isinstance(selected, Tensor) and selected.is_floating_point():
        scores = gates[1]
        if name == "GatherElements":
            return (gate(selected, scores),)
        if name == "Gather":
            axis = step.attributes.get("axis", 0) % unwrap(arguments[0]).dim()
            trailing = selected.dim() - axis - scores.dim()
            return (gate(selected, scores.reshape(*([1] * axis), *scores.shape, *([1] * trailing))),)
        if name == "GatherND":
            scores = scores.sum(-1)
            return (gate(selected, scores.reshape(*scores.shape, *([1] * (selected.dim() - scores.dim())))),)
    return results


def _gate_of(argument: Value) -> Tensor:
    """The gate of indices; zeros for indices that nothing selected."""
    if type(argument) is Carried and argument.gate is not None:
        return argument.gate
    tensor: Tensor = unwrap(argument)
    return torch.zeros(tensor.shape)
