"""What the lowering of one operator works with: the values of the graph so far, and how to add operators of MIL to the program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.errors import EdgekitError, UnsupportedOpError
from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape
from edgekit.targets.coreml.compression import SMALLEST, Storage, stored
from edgekit.targets.coreml.versions import VERSIONS

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE, ir.DataType.BFLOAT16})
_INT32 = np.iinfo(np.int32)
_HALF_MAX = 65504.0
_WEIGHTS = {"linear": ("weight", 0), "conv": ("weight", 0), "conv_transpose": ("weight", 1), "matmul": ("y", -1), "gather": ("x", 0)}
"""Of operators that read weights: their parameter, and the axis of its output channels."""


class NewerTargetError(EdgekitError):
    """An operator needs a newer deployment target than the one that the program is being written for."""

    exit_code = 4

    def __init__(self, version: str, what: str, where: str) -> None:
        super().__init__(f"{what} needs {version}", where=where, fix=f"set the deployment target to {version} or newer")
        self.version = version


def _no_graphs(b: Lowering, graph: ir.Graph) -> None:
    raise b.refuse("a graph inside a node", "compile the whole model")


@dataclass
class Lowering:
    """The MIL program while it is being written, in the function that is open in coremltools' builder.

    Attributes:
        version: The minimum deployment target that the program is written for, one of VERSIONS.
        values: What each value of the ONNX graph has become: a MIL variable, or a numpy array where it is known.
        half: Whether float values are float16 in the node that is being lowered.
        node: The node that is being lowered.
        storage: How weights are stored; None: in the precision that they are computed in.
        needs: For each version above the oldest, which operators asked for it.
        stored: By the id of an array of weights and the axis of its outputs, the array and what holds it as the user asked (None: itself).
        turned: By the id of a matrix, the matrix and its transpose: what reads one weight reads one constant.
        quantized: By the id of an array, the array and what adds it to the program in a compressed form (None where there is none).
        write: Writes the nodes of a graph inside a node into the block that is open.
    """

    version: str
    values: dict[ir.Value, Any] = field(default_factory=dict)
    half: bool = False
    node: ir.Node | None = None
    storage: Storage | None = None
    needs: dict[str, list[str]] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    quantized: dict[int, tuple[np.ndarray, Callable[[Lowering, str], Any]]] = field(default_factory=dict)
    stored: dict[tuple[int, int], tuple[np.ndarray, Any]] = field(default_factory=dict)
    turned: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    write: Callable[[Lowering, ir.Graph], None] = _no_graphs
    _arrays: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    _constants: dict[tuple[int, str], Any] = field(default_factory=dict)
    _casts: dict[tuple[int, str], Any] = field(default_factory=dict)

    def nested(self) -> Lowering:
        """For a block inside the open one: what is known so far can be read there, and what is made there is not seen outside."""
        return replace(self, values=dict(self.values), stored=dict(self.stored), _constants=dict(self._constants), _casts=dict(self._casts))

    # What the node reads

    def has(self, node: ir.Node, index: int) -> bool:
        """Whether the node has an input at `index` that is not left out."""
        return index < len(node.inputs) and node.inputs[index] is not None

    def known(self, node: ir.Node, index: int) -> np.ndarray | None:
        """The array of an input that is constant, in its ONNX dtype; None where it is computed or left out."""
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return None
        found = self.values.get(value)
        if found is None and value not in self._arrays:
            array = constant_array(value)
            if array is None:
                return None
            self._arrays[value] = array
        return found if isinstance(found, np.ndarray) else self._arrays.get(value)

    def need_known(self, node: ir.Node, index: int, name: str) -> np.ndarray:
        """The array of an input that Core ML takes only as a constant.

        Raises:
            UnsupportedOpError: It is computed, or left out.
        """
        array = self.known(node, index)
        if array is None:
            raise self.refuse(f"{node.op_type} with a computed '{name}'", "make it a constant of the graph")
        return array

    def x(self, node: ir.Node, index: int = 0) -> Any:
        """An input as a MIL variable: floats in the precision of this node, integers in int32, bool."""
        value = node.inputs[index]
        assert value is not None
        array = self.known(node, index)
        if array is None and value not in self.values:
            raise self.refuse(f"value '{value.name}', which nothing before it computes", "sort the graph")
        return self.var(self.values[value] if array is None else array, value.name or "")

    def xs(self, node: ir.Node) -> list[Any]:
        """All inputs as MIL variables."""
        return [self.x(node, index) for index in range(len(node.inputs))]

    def shape(self, node: ir.Node, index: int = 0) -> tuple[int, ...]:
        """The shape of an input.

        Raises:
            UnsupportedOpError: It is not known before the model runs.
        """
        return self._shape(node.inputs[index])

    def out_shape(self, node: ir.Node, index: int = 0) -> tuple[int, ...]:
        """The shape of a result, as `shape`."""
        return self._shape(node.outputs[index])

    def _shape(self, value: ir.Value | None) -> tuple[int, ...]:
        shape = static_shape(value)
        if shape is None:
            raise self.refuse(
                f"a shape that is only known when the model runs (value '{value.name if value else ''}')", "pin the input shapes"
            )
        return shape

    def rank(self, node: ir.Node, index: int = 0) -> int:
        """The rank of an input."""
        return len(self.shape(node, index))

    def dtype(self, node: ir.Node, index: int = 0) -> ir.DataType:
        """The ONNX dtype of an input."""
        value = node.inputs[index]
        return (value.dtype if value is not None else None) or ir.DataType.FLOAT

    def is_float(self, node: ir.Node, index: int = 0) -> bool:
        """Whether an input holds floating-point numbers."""
        return self.dtype(node, index) in FLOATS

    # What the program gets

    @property
    def float_name(self) -> str:
        """MIL's name of the float type of this node."""
        return "fp16" if self.half else "fp32"

    def var(self, value: Any, name: str = "") -> Any:
        """A MIL variable of `value` (a variable, an array or a Python number), floats in the precision of this node."""
        if isinstance(value, (np.ndarray, np.generic, bool, int, float)):
            return self._constant(np.asarray(value), name)
        if isinstance(value, list):
            raise self.refuse("a sequence of tensors as a value", "use the tensors themselves")
        return self._in_precision(value)

    def _constant(self, array: np.ndarray, name: str) -> Any:
        from coremltools.converters.mil.mil import Builder as mb

        if array.size == 0:
            raise self.refuse("an operator that reads an empty tensor", "remove the node")
        key = (id(array), self.float_name)
        if key not in self._constants:
            _, compressed = self.quantized.get(id(array), (None, None))
            variable = compressed(self, name) if compressed is not None else None
            if variable is None:
                wanted = self.array(array)
                variable = mb.const(val=wanted[()] if wanted.ndim == 0 else wanted, **self._name(name))
            self._constants[key] = (array, variable)  # the array is kept: ids are reused
        return self._constants[key][1]

    def _in_precision(self, variable: Any) -> Any:
        from coremltools.converters.mil.mil import Builder as mb
        from coremltools.converters.mil.mil import types

        if variable.dtype not in (types.fp16, types.fp32) or (variable.dtype == types.fp16) == self.half:
            return variable
        key = (id(variable), self.float_name)
        if key not in self._casts:
            self._casts[key] = mb.cast(x=variable, dtype=self.float_name)
        return self._casts[key]

    def array(self, array: np.ndarray | np.generic | float | int | bool | Sequence[Any]) -> np.ndarray:
        """An array in the type that Core ML computes in: floats in this node's precision, integers in int32 with a check of their range.

        Raises:
            UnsupportedOpError: An integer does not fit 32 bits.
        """
        array = np.asarray(array)
        if array.dtype.kind in "iu":
            if array.size and (array.max() > _INT32.max or array.min() < _INT32.min):
                raise self.refuse(
                    f"the integer {int(array.max() if array.max() > _INT32.max else array.min())}, which does not fit 32 bits",
                    "use smaller integers",
                )
            return array.astype(np.int32)
        if array.dtype.kind == "b":
            return array
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise self.refuse(f"a constant of type {array.dtype}", "use floats, integers or booleans")
        wide = array.astype(np.float32)
        if not self.half:
            return wide
        return np.clip(wide, -_HALF_MAX, _HALF_MAX).astype(np.float16) if np.isfinite(wide).all() else wide.astype(np.float16)

    def op(self, name: str, **arguments: Any) -> Any:
        """Adds MIL's operator `name`; float numbers and arrays among its arguments are given in the precision of this node.

        An argument of None is left out. Python ints, strings, bools and lists of ints are parameters and stay as they are.

        Raises:
            UnsupportedOpError: coremltools refuses the arguments; its reason is told.
        """
        from coremltools.converters.mil.mil import Builder as mb

        given = {key: self._argument(value) for key, value in arguments.items() if value is not None}
        if self.storage is not None and name in _WEIGHTS:
            parameter, axis = _WEIGHTS[name]
            self._store(given, parameter, axis - 1 if name == "matmul" and given.get("transpose_y") else axis)
        try:
            return getattr(mb, name)(**given, **self._name(""))
        except EdgekitError:
            raise
        except (ValueError, TypeError, AssertionError, NotImplementedError, RuntimeError, KeyError, IndexError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise self.refuse(f"Core ML's operator '{name}' with these arguments: {reason}", "express it with other operators") from error

    def _store(self, given: dict[str, Any], parameter: str, axis: int) -> None:
        """Puts the weights among an operator's arguments into the storage that the user asked for."""
        array: Any = given.get(parameter)
        if not isinstance(array, np.ndarray) and hasattr(array, "op") and array.op is not None and array.op.op_type == "const":
            array = array.val
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.ndim < 2 or array.size < SMALLEST or self.storage is None:
            return
        self.require(self.storage.version, f"weights as {self.storage.kind}")
        axis %= array.ndim
        key = (id(array), axis)
        if key not in self.stored:
            name = self.unique(f"{self._name('')['name']}_weight")
            self.stored[key] = (array, stored(array, self.storage, axis, self.at_least("iOS18"), name))
        if self.stored[key][1] is not None:
            given[parameter] = self.stored[key][1]

    def _argument(self, value: Any) -> Any:
        if isinstance(value, (float, np.floating)) or (isinstance(value, np.ndarray) and value.dtype.kind == "f"):
            array = self.array(value)
            return array[()] if array.ndim == 0 else array
        if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
            return self.array(value)
        return value

    def _name(self, wanted: str) -> dict[str, str]:
        """A name for an operation that no other has, from that of the ONNX value or node, so that people find it again."""
        return {"name": self.unique(wanted or (self.node.name or self.node.outputs[0].name or "" if self.node is not None else "value"))}

    def unique(self, wanted: str) -> str:
        """`wanted` as an identifier that no other value of the program has: programs refer to values by name."""
        name = base = identifier(wanted)
        number = 0
        while name in self.names:
            number += 1
            name = f"{base}_{number}"
        self.names.add(name)
        return name

    # Requirements and refusals

    def require(self, version: str, what: str) -> None:
        """Says that `what` (an operator and, where it matters, its form) needs a deployment target of at least `version`.

        Raises:
            NewerTargetError: The program is being written for an older one.
        """
        label = what + (f" (node '{self.node.name or self.node.outputs[0].name}')" if self.node is not None else "")
        if VERSIONS.index(version) > VERSIONS.index(self.version):
            raise NewerTargetError(version, what, self.where)
        if label not in self.needs.setdefault(version, []):
            self.needs[version].append(label)

    def at_least(self, version: str) -> bool:
        """Whether the program is written for `version` or a newer one."""
        return VERSIONS.index(self.version) >= VERSIONS.index(version)

    @property
    def where(self) -> str:
        """The node that is being lowered, for messages."""
        if self.node is None:
            return "the graph"
        return f"node '{self.node.name or self.node.outputs[0].name}' ({self.node.op_type})"

    def refuse(self, what: str, fix: str) -> UnsupportedOpError:
        """The error that says that Core ML cannot express `what`, at this node."""
        return UnsupportedOpError(f"Core ML cannot express {what}", where=self.where, fix=f"{fix}, or compile for --target onnxruntime")


def identifier(name: str) -> str:
    """`name` with everything but letters, digits and `_` replaced, as Core ML's names must be."""
    cleaned = "".join(char if char.isascii() and (char.isalnum() or char == "_") else "_" for char in name)
    return cleaned if cleaned and not cleaned[0].isdigit() else f"_{cleaned}"
