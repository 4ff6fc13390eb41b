"""Sequences, which are Python lists here, and optionals: None, or the element itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edgekit.graph.interpreter.registry import operator
from edgekit.graph.interpreter.shape import parts
from edgekit.graph.interpreter.values import Carried, NotSupportedError, Value, integers, onnx_type, scalar, unwrap


@operator("SequenceConstruct", raw=True)
def sequence_construct(*inputs: Value) -> list[Value]:
    """A sequence of the inputs."""
    return list(inputs)


@operator("SequenceEmpty", raw=True)
def sequence_empty(*, dtype: int = 1) -> list[Value]:
    """A sequence of nothing."""
    return []


def _position(sequence: list[Value], position: Value, extra: int = 0) -> int:
    index = int(scalar(unwrap(position)))
    if not -len(sequence) <= index < len(sequence) + extra:
        raise IndexError(f"position {index} of a sequence of {len(sequence)}")
    return index


@operator("SequenceAt", raw=True)
def sequence_at(sequence: list[Value], position: Value, /) -> Value:
    """The element at a position, which may count from the end."""
    return sequence[_position(sequence, position)]


@operator("SequenceInsert", raw=True)
def sequence_insert(sequence: list[Value], element: Value, position: Value = None, /) -> list[Value]:
    """The sequence with one more element, at the end by default."""
    index = len(sequence) if position is None else _position(sequence, position, 1)
    result = list(sequence)
    result.insert(index, element)
    return result


@operator("SequenceErase", raw=True)
def sequence_erase(sequence: list[Value], position: Value = None, /) -> list[Value]:
    """The sequence without one element, the last by default."""
    result = list(sequence)
    del result[-1 if position is None else _position(sequence, position)]
    return result


@operator("SequenceLength", raw=True)
def sequence_length(sequence: list[Value], /) -> Tensor:
    """The number of elements."""
    return torch.tensor(len(sequence))


@operator("SplitToSequence", raw=True)
def split_to_sequence(data: Value, split: Value = None, /, *, axis: int = 0, keepdims: int = 1) -> list[Value]:
    """A sequence of parts: of one element each, of equal size (the last may be smaller), or of the sizes given."""
    tensor = unwrap(data)
    if not isinstance(tensor, Tensor):
        raise NotSupportedError("tensors of type STRING")
    size = tensor.shape[axis]
    if split is None:
        pieces = torch.split(tensor, 1, axis)
        pieces = pieces if keepdims else tuple(piece.squeeze(axis) for piece in pieces)
    else:
        lengths = unwrap(split)
        count = int(scalar(lengths)) if lengths.dim() == 0 else 0
        pieces = torch.split(
            tensor, integers(lengths) if lengths.dim() else parts(size, -(-size // count)) if size % count == 0 else count, axis
        )
    return [Carried(piece, data.dtype) if type(data) is Carried else piece for piece in pieces]


@operator("ConcatFromSequence", raw=True)
def concat_from_sequence(sequence: list[Value], /, *, axis: int, new_axis: int = 0) -> Value:
    """The elements joined along an axis, a new one if asked for."""
    tensors = [unwrap(element) for element in sequence]
    result = torch.stack(tensors, axis) if new_axis else torch.cat(tensors, axis)
    return Carried(result, onnx_type(sequence[0])) if type(sequence[0]) is Carried else result


@operator("SequenceMap", raw=True)
def sequence_map(sequence: list[Value], /, *others: Value, body: Callable[..., list[Value]]) -> tuple[list[Value], ...]:
    """The body on each element; further sequences go along, tensors are given to each."""
    rows = [
        body(element, *(other[index] if isinstance(other, list) else other for other in others)) for index, element in enumerate(sequence)
    ]
    return tuple(list(column) for column in zip(*rows, strict=True))


@operator("Optional", raw=True)
def optional(value: Value = None, /, *, type: Any = None) -> Value:
    """An optional with an element, or without one."""
    return value


@operator("OptionalHasElement", raw=True)
def optional_has_element(value: Value = None, /) -> Tensor:
    """Whether there is an element."""
    return torch.tensor(value is not None)


@operator("OptionalGetElement", raw=True)
def optional_get_element(value: Value, /) -> Value:
    """The element."""
    if value is None:
        raise ValueError("the optional is empty")
    return value
