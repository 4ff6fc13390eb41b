"""Runs MIL operators as the evaluator does, alone or in a small program, and has coremltools infer their values."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types
from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

from edgekit.targets.coreml.reference.constants import Weights
from edgekit.targets.coreml.reference.executor import SPECIAL, Executor
from edgekit.targets.coreml.reference.package import open_package
from edgekit.targets.coreml.reference.steps import Compiler
from edgekit.targets.coreml.reference.types import computed

TARGETS = {name: getattr(ct.target, name) for name in ("iOS15", "iOS16", "iOS17", "iOS18")}


def argument(value: Any) -> Any:
    """An argument as the executor gives it: a tensor in the type that operators compute in; strings and None as they are."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list):
        return [argument(item) for item in value]
    return computed(
        torch.from_numpy(np.array(value, dtype=np.int32 if type(value) is int else np.float32 if type(value) is float else None))
    )


def call(function: Callable[..., Any], **arguments: Any) -> Any:
    """Calls an operator; its tensors come back as arrays."""
    result = function(**{name: argument(value) for name, value in arguments.items()})
    if isinstance(result, tuple):
        return tuple(item.numpy() if isinstance(item, torch.Tensor) else item for item in result)
    return result.numpy() if isinstance(result, torch.Tensor) else result


def inferred(operator: str, target: str = "iOS15", **arguments: Any) -> Any:
    """The value that coremltools infers for an operator of constant arguments; None where it infers none."""
    with Function({}, opset_version=TARGETS[target]):
        result = getattr(mb, operator)(**arguments)
        if isinstance(result, (list, tuple)):
            return tuple(_value(item) for item in result)
        return _value(result)


def _value(var: Any) -> Any:
    if var.val is None and hasattr(var.op, "materialized_val_inference"):
        found = var.op.materialized_val_inference()
        return found[var.op.outputs.index(var)] if isinstance(found, tuple) else found
    return var.val


def inferred_shape(operator: str, target: str = "iOS15", **arguments: Any) -> tuple[int, ...]:
    """The shape that coremltools infers for the one result of an operator of constant arguments."""
    with Function({}, opset_version=TARGETS[target]):
        return tuple(int(size) for size in getattr(mb, operator)(**arguments).shape)


def check_signatures(table: Mapping[str, Callable[..., Any]]) -> None:
    """Checks that each operator takes the parameters of every version of it that coremltools defines, the optional ones optionally."""
    for name, function in table.items():
        taken = inspect.signature(function).parameters
        for version, definition in SSAOpRegistry.core_ops[name].items():
            for parameter, kind in definition.input_spec.input_types.items():
                assert parameter in taken, f"{name} of {version} has '{parameter}'"
                assert not kind.optional or taken[parameter].default is not inspect.Parameter.empty, f"'{parameter}' of {name} is optional"


def run(
    build: Callable[..., Any],
    inputs: dict[str, np.ndarray],
    target: str,
    table: Mapping[str, Callable[..., Any]],
    labels: list[Any] | None = None,
) -> list[Any]:
    """Builds a program on inputs of these shapes, saves it as a package, reads that again and runs it with the operators of `table`.

    With `labels` it is a classifier.
    """
    specs = {name: mb.placeholder(array.shape, types.numpy_type_to_builtin_type(array.dtype.type)) for name, array in inputs.items()}
    program = Program()
    with Function(specs, opset_version=TARGETS[target]) as function:
        results = build(**function.inputs)
        function.set_outputs(list(results) if isinstance(results, (list, tuple)) else [results])
    program.add_function("main", function)
    model = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=TARGETS[target],
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
        classifier_config=None if labels is None else ct.ClassifierConfig(labels),
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save(f"{folder}/model.mlpackage")
        package = open_package(f"{folder}/model.mlpackage")
        compiler = Compiler(table, SPECIAL, Weights(package.weights), "the test's program")
        slots = {value.name: compiler.slot() for value in package.spec.mlProgram.functions["main"].inputs}
        saved = package.spec.mlProgram.functions["main"]
        block = compiler.block(saved.block_specializations[saved.opset], slots)
    executor = Executor(compiler.slots, {})
    for name, slot in slots.items():
        executor.set(slot, torch.from_numpy(inputs[name]))
    return [value.numpy() if isinstance(value, torch.Tensor) else value for value in executor.run(block)]
