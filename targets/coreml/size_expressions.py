"""Sizes that depend on the shapes of the inputs: found by their values at a few shapes, and written as operations of a MIL program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

Sizes = tuple[int, ...]
"""One size at each of the shapes that a graph was written at."""


@dataclass(frozen=True)
class Axis:
    """The length of an axis of a value of the program."""

    value: str
    axis: int


@dataclass(frozen=True)
class Size:
    """The size `product of axes · factor // divisor + offset`."""

    axes: tuple[Axis, ...]
    factor: int = 1
    divisor: int = 1
    offset: int = 0


def find_size(wanted: Sizes, known: Mapping[Sizes, Axis]) -> Size | None:
    """Expresses `wanted` by one axis of known length, or by the product of two; None where neither does it.

    The simplest expression that is right at every shape is taken: the length itself, a multiple or part of it, that and a constant, and
    last a product of two lengths with a factor.
    """
    if wanted in known:
        return Size((known[wanted],))
    for form in (_proportional, _affine):
        for sizes, axis in known.items():
            if (found := form(wanted, sizes)) is not None:
                return Size((axis,), *found)
    entries = list(known.items())
    for index, (first, one) in enumerate(entries):
        for second, other in entries[index:]:
            product = tuple(a * b for a, b in zip(first, second, strict=True))
            if (found := _proportional(wanted, product)) is not None:
                return Size((one, other), *found)
    return None


def _proportional(wanted: Sizes, sizes: Sizes) -> tuple[int, int] | None:
    """Factor and divisor with `wanted = sizes · factor // divisor`, one of the two being 1."""
    if not sizes[0] or not wanted[0]:
        return None
    factor, divisor = max(wanted[0] // sizes[0], 1), max(sizes[0] // wanted[0], 1)
    return (factor, divisor) if all(size * factor // divisor == want for size, want in zip(sizes, wanted, strict=True)) else None


def _affine(wanted: Sizes, sizes: Sizes) -> tuple[int, int, int] | None:
    """Factor, divisor 1 and offset with `wanted = sizes · factor + offset`."""
    other = next((k for k, size in enumerate(sizes) if size != sizes[0]), None)
    if other is None:
        return None
    factor, rest = divmod(wanted[other] - wanted[0], sizes[other] - sizes[0])
    offset = wanted[0] - factor * sizes[0]
    fits = not rest and all(size * factor + offset == want for size, want in zip(sizes, wanted, strict=True))
    return (factor, 1, offset) if fits else None


Inputs = Mapping[str, str | list[str] | np.ndarray]
"""Of an operation: names of values, or arrays, which become constants."""


class Program(Protocol):
    """What a program must be able to do for its sizes to be written."""

    ranks: dict[str, int]
    """Of the program's values, by name."""

    def emit(self, kind: str, inputs: Inputs, name: str, shape: Sequence[int | None], dtype: Any) -> str:
        """Appends an operation; returns the name that its result got, which is like `name`."""

    def constant(self, array: np.ndarray, name: str) -> str:
        """Appends a constant; returns the name that it got, which is like `name`."""


@dataclass
class SizeWriter:
    """Writes operations that compute sizes while a model runs.

    Attributes:
        program: The program.
        written: What is there already, by what it holds.
    """

    program: Program
    written: dict[Any, str] = field(default_factory=dict)

    def nested(self) -> SizeWriter:
        """A writer for a nested block, which sees what is written around it and not the other way round."""
        return replace(self, written=dict(self.written))

    def write(self, elements: Sequence[int | Size], scalar: bool = False) -> str:
        """Writes a vector of sizes, or a scalar. Returns the name of the result."""
        key = (tuple(elements), scalar)
        if key not in self.written:
            self.written[key] = self._squeezed(elements) if scalar else self._vector(elements)
        return self.written[key]

    def repeat(self, array: np.ndarray, name: str, counts: Sequence[int | Size]) -> str:
        """Writes `array`, repeated along its axes."""
        shape = [None if isinstance(count, Size) else length * count for length, count in zip(array.shape, counts, strict=True)]
        return self._once(name, lambda: self.program.emit("tile", {"x": array, "reps": self.write(counts)}, name, shape, array.dtype))

    def cut(self, name: str, sizes: Sequence[int | Size], dtype: Any) -> str:
        """Writes the beginning of the constant `name` along each axis."""
        shape = [None if isinstance(size, Size) else size for size in sizes]
        begin = np.zeros(len(sizes), np.int32)
        return self._once(
            name,
            lambda: self.program.emit("slice_by_size", {"x": name, "begin": begin, "size": self.write(sizes)}, f"{name}_cut", shape, dtype),
        )

    def _once(self, key: Any, write: Callable[[], str]) -> str:
        if key not in self.written:
            self.written[key] = write()
        return self.written[key]

    def _squeezed(self, elements: Sequence[int | Size]) -> str:
        name = self._vector(elements)
        return self.program.emit("squeeze", {"x": name, "axes": _ints([0])}, f"{name}_scalar", (), np.int32)

    def _vector(self, elements: Sequence[int | Size]) -> str:
        parts: list[Size | list[int]] = []
        for element in elements:
            if isinstance(element, Size):
                parts.append(element)
            elif parts and isinstance(parts[-1], list):
                parts[-1].append(element)
            else:
                parts.append([element])
        names = [self._size(part) if isinstance(part, Size) else self.program.constant(_ints(part), "sizes") for part in parts]
        if len(names) == 1:
            return names[0]
        inputs: Inputs = {"values": names, "axis": np.array(0, np.int32), "interleave": np.array(False)}
        return self.program.emit("concat", inputs, "sizes", (len(elements),), np.int32)

    def _size(self, size: Size) -> str:
        return self._once(size, lambda: self._computed(size))

    def _computed(self, size: Size) -> str:
        name = self._length(size.axes[0])
        for axis in size.axes[1:]:
            name = self._combined("mul", name, self._length(axis))
        for kind, number, neutral in (("mul", size.factor, 1), ("floor_div", size.divisor, 1), ("add", size.offset, 0)):
            if number != neutral:
                name = self._combined(kind, name, _ints([number]))
        return name

    def _combined(self, kind: str, first: str, second: str | np.ndarray) -> str:
        return self.program.emit(kind, {"x": first, "y": second}, f"{first}_{kind}", (1,), np.int32)

    def _length(self, axis: Axis) -> str:
        return self._once(axis, lambda: self._sliced(axis))

    def _sliced(self, axis: Axis) -> str:
        value, ranks = axis.value, self.program.ranks
        shape = self._once(("shape", value), lambda: self.program.emit("shape", {"x": value}, f"{value}_shape", (ranks[value],), np.int32))
        inputs: Inputs = {"x": shape, "begin": _ints([axis.axis]), "size": _ints([1])}
        return self.program.emit("slice_by_size", inputs, f"{value}_size", (1,), np.int32)


def _ints(numbers: Sequence[int]) -> np.ndarray:
    return np.array(numbers, np.int32)
