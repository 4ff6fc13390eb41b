"""Runs the ML Program of a saved `.mlpackage` on PyTorch, on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekit.errors import EdgekitError, SourceError, UsageError, nearest
from edgekit.graph.feeds import check_feeds
from edgekit.targets.coreml.reference.constants import Weights
from edgekit.targets.coreml.reference.executor import SPECIAL, Executor, Observer
from edgekit.targets.coreml.reference.operators import OPERATORS
from edgekit.targets.coreml.reference.package import COPY_AGAIN, Package, open_package
from edgekit.targets.coreml.reference.steps import Compiler, free_early
from edgekit.targets.coreml.reference.types import ValueType, numpy_dtype, value_type

_ARRAY_TYPES = {65568: "fp32", 65600: "fp64", 65552: "fp16", 131104: "int32", 131080: "int8"}
"""Element types of multi-arrays by the numbers of FeatureTypes.proto."""


class Evaluator:
    """One function of a package, ready to run.

    Attributes:
        inputs: MIL types of the inputs by name.
        outputs: Names of the outputs, in order.
        states: MIL types of the states by name.
    """

    def __init__(self, package: Package | str | Path, function: str | None = None) -> None:
        """Prepares `function` (default: the package's default function) of a package.

        Raises:
            SourceError: The package cannot be read or its program is inconsistent.
            UnsupportedOpError: The program has an operator that the evaluator does not know.
            UsageError: The package has no such function.
        """
        package = package if isinstance(package, Package) else open_package(package)
        spec = package.spec
        if not package.functions:
            raise SourceError("the program has no function", where=str(package.path), fix=COPY_AGAIN)
        name = function or spec.description.defaultFunctionName or ("main" if "main" in package.functions else package.functions[0])
        if name not in spec.mlProgram.functions:
            raise UsageError(f"the package has no function '{name}'", where=str(package.path), fix=nearest(name, package.functions))
        program = spec.mlProgram.functions[name]
        description = next((item for item in spec.description.functions if item.name == name), spec.description)
        self.name = name
        kinds = {value.name: value_type(value.type) for value in program.inputs}
        self.inputs = {key: kind for key, kind in kinds.items() if kind.kind != "state"}
        self.states = {key: kind for key, kind in kinds.items() if kind.kind == "state"}
        self._allowed = {feature.name: _allowed_shapes(feature.type) for feature in description.input}
        compiler = Compiler(OPERATORS, SPECIAL, Weights(package.weights), f"function '{name}' of {package.path.name}")
        scope = {key: compiler.slot() for key in kinds}
        self._slots = dict(scope)
        if program.opset not in program.block_specializations:  # asking the message for it would make an empty one
            raise SourceError(
                f"function '{name}' has no operations for its opset '{program.opset}'", where=str(package.path), fix=COPY_AGAIN
            )
        block_spec = program.block_specializations[program.opset]
        try:
            self._block = compiler.block(block_spec, scope)
        except EdgekitError:
            raise
        except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, OSError, RuntimeError) as error:
            raise SourceError(
                f"the program is damaged: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}",
                where=str(package.path),
                fix=COPY_AGAIN,
            ) from error
        free_early(self._block)
        self._count = compiler.slots
        self.outputs = list(block_spec.outputs)
        self._output_types = _output_types(description, self.outputs)

    def run(self, inputs: Mapping[str, Any], state: dict[str, np.ndarray] | None = None, observe: Observer | None = None) -> dict[str, Any]:
        """Runs the function once.

        Args:
            inputs: An array for each input, in the dtype and rank that the package declares; an image is `[1, C, H, W]` in 0–255.
            state: The states, `{name: float16 array}`, changed in place; None starts each at zero and forgets it.
            observe: Is told each operation's result.

        Returns:
            An array for each output, in the dtype and rank that the package declares; of a classifier the label and a dictionary of
            probabilities.

        Raises:
            UsageError: An input or state is missing, unknown, or of another type or shape.
            LoweringError: The program's own shapes do not fit together.
        """
        check_feeds({name: (numpy_dtype(kind.dtype), kind.shape) for name, kind in self.inputs.items()}, inputs)
        for name, array in inputs.items():
            _check_flexible(name, array.shape, self._allowed.get(name))
        executor = Executor(self._count, self._initial(state), observe)
        for name, kind in self.inputs.items():
            executor.set(self._slots[name], _tensor(inputs[name], kind))
        for name in self.states:
            executor.set(self._slots[name], name)
        with torch.no_grad():
            results = executor.run(self._block)
        for name, array in (state or {}).items():
            array[...] = executor.state[name].numpy()
        return {name: _given(value, self._output_types.get(name)) for name, value in zip(self.outputs, results, strict=True)}

    def _initial(self, state: dict[str, np.ndarray] | None) -> dict[str, torch.Tensor]:
        if state is None:
            return {name: torch.zeros([size or 1 for size in kind.shape], dtype=kind.held) for name, kind in self.states.items()}
        check_feeds({name: (numpy_dtype(kind.dtype), kind.shape) for name, kind in self.states.items()}, state)
        return {name: torch.from_numpy(np.array(array)) for name, array in state.items()}

    def new_state(self) -> dict[str, np.ndarray]:
        """The states at their start: all zero."""
        return {name: np.zeros([size or 1 for size in kind.shape], numpy_dtype(kind.dtype)) for name, kind in self.states.items()}


def _tensor(array: np.ndarray, kind: ValueType) -> torch.Tensor:
    wide = array.astype(np.int64) if array.dtype in (np.uint16, np.uint32) else np.ascontiguousarray(array).reshape(array.shape)
    return torch.from_numpy(np.array(wide) if not wide.flags.writeable else wide).to(kind.held)


def _given(value: Any, dtype: str | None) -> Any:
    """A result as callers get it: in the type that the package's description declares, where that differs from the program's."""
    if isinstance(value, torch.Tensor):
        array = value.detach().numpy()
        return array.astype(numpy_dtype(dtype)) if dtype else np.array(array)
    if isinstance(value, dict):
        return {key: item.item() if isinstance(item, torch.Tensor) else item for key, item in value.items()}
    return value


def _output_types(description: Any, names: list[str]) -> dict[str, str]:
    declared = {feature.name: feature.type.multiArrayType.dataType for feature in description.output}
    return {name: _ARRAY_TYPES[declared[name]] for name in names if declared.get(name) in _ARRAY_TYPES}


Ranges = tuple[tuple[int, int], ...]


def _allowed_shapes(kind: Any) -> tuple[Ranges, ...] | None:
    """The shapes that an input of flexible size takes, each as `(smallest, largest)` per dimension (-1: any); None: no flexibility."""
    if kind.WhichOneof("Type") == "imageType":
        return _allowed_sizes(kind.imageType)
    array = kind.multiArrayType
    which = array.WhichOneof("ShapeFlexibility")
    if which == "enumeratedShapes":
        return tuple(tuple((int(size), int(size)) for size in shape.shape) for shape in array.enumeratedShapes.shapes)
    if which == "shapeRange":
        return (tuple((int(item.lowerBound), int(item.upperBound)) for item in array.shapeRange.sizeRanges),)
    return None


def _allowed_sizes(image: Any) -> tuple[Ranges, ...] | None:
    """The same of an image, `[1, C, H, W]`; C is that of its colours, which the program's own type says."""
    which = image.WhichOneof("SizeFlexibility")
    free = ((1, 1), (1, -1))
    if which == "enumeratedSizes":
        sizes = [(int(size.height), int(size.width)) for size in image.enumeratedSizes.sizes]
        return tuple((*free, (height, height), (width, width)) for height, width in sizes)
    if which == "imageSizeRange":
        spans = (image.imageSizeRange.heightRange, image.imageSizeRange.widthRange)
        return ((*free, *((int(span.lowerBound), int(span.upperBound)) for span in spans)),)
    return None


def _check_flexible(name: str, shape: tuple[int, ...], allowed: tuple[Ranges, ...] | None) -> None:
    if not allowed or any(_fits(shape, ranges) for ranges in allowed):
        return
    texts = ["[" + ", ".join(_range_text(low, high) for low, high in ranges) + "]" for ranges in allowed]
    raise UsageError(
        f"input '{name}' has shape {list(shape)}, which the package does not take",
        where=f"input '{name}'",
        fix=f"give one of: {', '.join(texts[:6])}",
    )


def _fits(shape: tuple[int, ...], ranges: Ranges) -> bool:
    return len(shape) == len(ranges) and all(
        low <= size and (high < 0 or size <= high) for size, (low, high) in zip(shape, ranges, strict=True)
    )


def _range_text(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}..{high if high >= 0 else 'any'}"


def predict(
    path: str | Path, inputs: Mapping[str, Any], state: dict[str, np.ndarray] | None = None, function: str | None = None
) -> dict[str, Any]:
    """Runs a saved `.mlpackage` once, as coremltools' `MLModel.predict` does on a Mac; see `Evaluator.run`.

    To run one package often, make an `Evaluator` once: reading the package takes longer than running it.
    """
    if not isinstance(inputs, Mapping):
        raise UsageError(
            f"the inputs are a {type(inputs).__name__}, not a mapping of names to arrays", where="predict", fix="give {name: array}"
        )
    return Evaluator(path, function).run(inputs, state)
