"""The MIL program that programs for different shapes have in common: sizes that differ are computed while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.errors import UnsupportedOpError
from edgekit.targets.coreml.reference.constants import Weights, constant
from edgekit.targets.coreml.size_expressions import Axis, Inputs, Size, Sizes, SizeWriter, find_size

FIX = "compile for one shape at a time; several packages can share their weights by `edgekit.targets.coreml.multifunction.combine`"


class MergedProgram:
    """Merges the blocks of several programs into the first one's."""

    def __init__(self, weights: Sequence[Weights], whole: bool, taken: set[str]) -> None:
        self._weights = weights
        self._whole = whole  # whether the first program was written for the largest sizes
        self._names: list[dict[str, str]] = [{} for _ in weights]  # of each program's values: the name in the first
        self.ranks: dict[str, int] = {}
        self._varying: dict[str, list[np.ndarray]] = {}  # constants that are computed where they are read
        self._copies: dict[str, tuple[np.ndarray, list[np.ndarray]]] = {}  # constants that repeat an array, which comes first
        self._cuts: dict[str, list[np.ndarray]] = {}  # constants of which the first begins with all others
        self._operations: list[Any] = []
        self._taken = taken
        self.flexible: list[Any] = []

    def declare(self, values: Sequence[Any], known: dict[Sizes, Axis]) -> None:
        """Takes in one value as the programs declare it; dimensions that differ become unknown, and known sizes from here on.

        Raises:
            UnsupportedOpError: The programs declare different types.
        """
        first = values[0]
        for names, value in zip(self._names, values, strict=True):
            names[value.name] = first.name
        if first.type.WhichOneof("type") != "tensorType":
            if any(value.type != first.type for value in values):
                raise UnsupportedOpError("a state or list depends on the shape of the inputs", where=first.name, fix=FIX)
            return
        tensors = [value.type.tensorType for value in values]
        if len({(tensor.dataType, tensor.rank) for tensor in tensors}) > 1:
            raise UnsupportedOpError("the type of a value depends on the shape of the inputs", where=first.name, fix=FIX)
        self.ranks[first.name] = tensors[0].rank
        varies = False
        for axis, dims in enumerate(zip(*(tensor.dimensions for tensor in tensors), strict=True)):
            sizes = tuple(int(dim.constant.size) for dim in dims)
            if len(set(sizes)) > 1:
                known.setdefault(sizes, Axis(first.name, axis))
                dims[0].unknown.variadic = False
                varies = True
        if varies:
            self.flexible.append(first)

    def merge_blocks(self, blocks: Sequence[Any], known: dict[Sizes, Axis], writer: SizeWriter) -> None:
        """Merges the operations of the blocks, in the first one.

        Raises:
            UnsupportedOpError: They differ in more than sizes.
        """
        first = blocks[0]
        if len({len(block.operations) for block in blocks}) > 1:
            raise UnsupportedOpError(
                f"the program has {' or '.join(str(len(block.operations)) for block in blocks)} operations, depending on the shape of the"
                " inputs",
                where=self._first_difference(blocks),
                fix=FIX,
            )
        outer, self._operations = self._operations, []
        for operations in zip(*(block.operations for block in blocks), strict=True):
            self._merge_operation(operations, known, writer)
        merged, self._operations = self._operations, outer
        del first.operations[:]
        first.operations.extend(merged)

    def _first_difference(self, blocks: Sequence[Any]) -> str:
        for operations in zip(*(block.operations for block in blocks), strict=False):
            if len({operation.type for operation in operations}) > 1:
                return _label(operations[0])
        return "its end"

    def _merge_operation(self, operations: Sequence[Any], known: dict[Sizes, Axis], writer: SizeWriter) -> None:
        first = operations[0]
        kinds = {
            (operation.type, tuple(sorted(operation.inputs)), len(operation.outputs), len(operation.blocks)) for operation in operations
        }
        if len(kinds) > 1:
            kind = " or ".join(sorted({operation.type for operation in operations}))
            raise UnsupportedOpError(f"the program has another operation ({kind}) at other shapes", where=_label(first), fix=FIX)
        if first.type == "const":
            self._merge_constant(operations)
            return
        for key in sorted(first.inputs):
            self._merge_argument(key, operations, known, writer)
        for blocks in zip(*(operation.blocks for operation in operations), strict=True):
            inside = dict(known)
            for values in zip(*(block.inputs for block in blocks), strict=True):
                self.declare(values, inside)
            self.merge_blocks(blocks, inside, writer.nested())
        for values in zip(*(operation.outputs for operation in operations), strict=True):
            self.declare(values, known)
        self._operations.append(first)

    def _merge_constant(self, operations: Sequence[Any]) -> None:
        """Keeps a constant that is the same everywhere; one that differs is left out, and computed where it is read."""
        first = operations[0]
        name = first.outputs[0].name
        for names, operation in zip(self._names, operations, strict=True):
            names[operation.outputs[0].name] = name
        values = [self._value(operation, weights) for operation, weights in zip(operations, self._weights, strict=True)]
        if all(_equal(values[0], value) for value in values[1:]):
            self._operations.append(first)
        elif not all(_alike(values[0], value) for value in values):
            raise UnsupportedOpError("a constant has another type at other shapes of the inputs", where=name, fix=FIX)
        elif values[0].dtype.kind == "i" and values[0].ndim < 2 and len({value.shape for value in values}) == 1:
            self._varying[name] = values
        elif (base := _repeated(values)) is not None:
            self._copies[name] = (base, values)
        elif self._whole and all(_equal(values[0][tuple(map(slice, value.shape))], value) for value in values):
            self._cuts[name] = values
            self._operations.append(first)
        else:
            raise UnsupportedOpError("a constant holds other numbers at other shapes of the inputs", where=name, fix=FIX)

    def _value(self, operation: Any, weights: Weights) -> Any:
        value = constant(operation.attributes["val"], weights)
        return value.numpy() if hasattr(value, "numpy") else value

    def _merge_argument(self, key: str, operations: Sequence[Any], known: Mapping[Sizes, Axis], writer: SizeWriter) -> None:
        first = operations[0]
        for bindings in zip(*(operation.inputs[key].arguments for operation in operations), strict=True):
            if bindings[0].WhichOneof("binding") == "value":
                if any(binding != bindings[0] for binding in bindings):
                    raise UnsupportedOpError(f"'{key}' depends on the shape of the inputs", where=_label(first), fix=FIX)
                continue
            names = {known_names[binding.name] for known_names, binding in zip(self._names, bindings, strict=True)}
            if len(names) > 1:
                raise UnsupportedOpError("an operation reads another value at other shapes", where=_label(first), fix=FIX)
            if (name := names.pop()) in self._varying:
                bindings[0].name = self._computed(name, key, first, known, writer)
            elif name in self._copies:
                bindings[0].name = self._copied(name, first, known, writer)
            elif name in self._cuts:
                sizes = zip(*(value.shape for value in self._cuts[name]), strict=True)
                bindings[0].name = writer.cut(name, self._sizes(name, list(sizes), first, known), self._cuts[name][0].dtype)

    def _computed(self, name: str, key: str, operation: Any, known: Mapping[Sizes, Axis], writer: SizeWriter) -> str:
        """Writes a constant that differs as operations; of a reshape with one size that differs, as -1."""
        values = self._varying[name]
        if len({value.shape for value in values}) > 1:
            raise UnsupportedOpError(f"'{key}' has another length at other shapes", where=_label(operation), fix=FIX)
        columns = [tuple(int(value) for value in column) for column in zip(*(np.ravel(value) for value in values), strict=True)]
        changing = [column for column in columns if len(set(column)) > 1]
        if operation.type == "reshape" and key == "shape" and len(changing) == 1 and -1 not in np.ravel(values):
            return writer.write([-1 if column in changing else column[0] for column in columns], False)
        if _only_constant(operation.type, key):
            raise UnsupportedOpError(
                f"'{key}' of Core ML's '{operation.type}' must be constant, and here it depends on the shape of the inputs",
                where=_label(operation),
                fix=FIX,
            )
        return writer.write(self._sizes(f"'{key}' of '{operation.type}'", columns, operation, known), values[0].ndim == 0)

    def _copied(self, name: str, operation: Any, known: Mapping[Sizes, Axis], writer: SizeWriter) -> str:
        """Writes a constant that is repeated along axes, once and the operation that repeats it."""
        base, values = self._copies[name]
        counts = [tuple(value.shape[axis] // length for value in values) for axis, length in enumerate(base.shape)]
        return writer.repeat(base, name, self._sizes(name, counts, operation, known))

    def _sizes(self, what: str, columns: Sequence[Sizes], operation: Any, known: Mapping[Sizes, Axis]) -> list[int | Size]:
        """Each size as a number where it is the same at all shapes, else as an expression of sizes of the program."""
        sizes: list[int | Size] = []
        for column in columns:
            size = find_size(column, known) if len(set(column)) > 1 else column[0]
            if size is None:
                raise UnsupportedOpError(
                    f"a size of {what} is {', '.join(map(str, column))} at the shapes that were tried: no simple expression of the sizes of"
                    " values gives that",
                    where=_label(operation),
                    fix=FIX,
                )
            sizes.append(size)
        return sizes

    def emit(self, kind: str, inputs: Inputs, name: str, shape: Sequence[int | None], dtype: Any) -> str:
        """Appends an operation, of which arrays become constants of their own; returns the name that its result got."""
        from coremltools.proto import MIL_pb2

        operation = MIL_pb2.Operation(type=kind)
        name = self.unique(name)
        for key, given in inputs.items():
            names = (
                given if isinstance(given, list) else [self.constant(given, f"{name}_{key}") if isinstance(given, np.ndarray) else given]
            )
            for each in names:
                operation.inputs[key].arguments.add(name=each)
        return self._append(operation, name, shape, dtype)

    def constant(self, array: np.ndarray, name: str) -> str:
        """Appends a constant; returns the name that it got."""
        from coremltools.converters.mil.backend.mil.helper import create_scalar_value, create_tensor_value
        from coremltools.proto import MIL_pb2

        operation = MIL_pb2.Operation(type="const")
        operation.attributes["val"].CopyFrom(create_tensor_value(array) if array.ndim else create_scalar_value(array.item()))
        return self._append(operation, self.unique(name), array.shape, array.dtype)

    def _append(self, operation: Any, name: str, shape: Sequence[int | None], dtype: Any) -> str:
        from coremltools.converters.mil.backend.mil.helper import create_scalar_value, types_to_proto_primitive
        from coremltools.converters.mil.mil import types

        operation.attributes["name"].CopyFrom(create_scalar_value(name))
        tensor = operation.outputs.add(name=name).type.tensorType
        tensor.dataType, tensor.rank = types_to_proto_primitive(types.numpy_type_to_builtin_type(np.dtype(dtype))), len(shape)
        for size in shape:
            dimension = tensor.dimensions.add()
            if size is None:
                dimension.unknown.variadic = False
            else:
                dimension.constant.size = size
        self.ranks[name] = len(shape)
        self._operations.append(operation)
        return name

    def unique(self, name: str) -> str:
        """A name that no value has yet."""
        number, found = 0, name
        while found in self._taken:
            number += 1
            found = f"{name}_{number}"
        self._taken.add(found)
        return found


def names_of(part: Any) -> set[str]:
    """Names of all values of a function or block, of `MIL.proto`."""
    names = {value.name for value in part.inputs}
    for block in part.block_specializations.values() if hasattr(part, "block_specializations") else [part]:
        for operation in block.operations:
            names |= {value.name for value in operation.outputs}
            names.update(*(names_of(inner) for inner in operation.blocks))
    return names


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
    return bool(first == second)


def _alike(first: Any, second: Any) -> bool:
    arrays = isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
    return arrays and first.dtype == second.dtype and first.ndim == second.ndim


def _repeated(values: Sequence[np.ndarray]) -> np.ndarray | None:
    """The array of length 1 along the axes where the lengths of `values` differ, of which all are repetitions; None: they are not."""
    varying = [len({value.shape[axis] for value in values}) > 1 for axis in range(values[0].ndim)]
    base: np.ndarray = values[0][tuple(slice(0, 1) if varies else slice(None) for varies in varying)]
    return base if any(varying) and all(_equal(np.broadcast_to(base, value.shape), value) for value in values) else None


def _label(operation: Any) -> str:
    return operation.outputs[0].name if operation.outputs else str(operation.type)


def _only_constant(kind: str, key: str) -> bool:
    """Whether Core ML takes nothing but a constant there, as coremltools declares the operation."""
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    declared = SSAOpRegistry.core_ops.get(kind, {})
    return any(key in cls.input_spec.input_types and cls.input_spec.input_types[key].const for cls in declared.values())
