"""`PackBits`: the signs of the last axis as bits, eight to a byte, by the convention of docs/packed-bits.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgekit.graph.operators.base import Attributes, Operator, Shape, parse_function, shape_error

if TYPE_CHECKING:
    import torch

# The last Reshape could be `keepdims = 0`, but ONNX Runtime 1.31 gives a ReduceSum over an axis of an empty tensor its input's shape.
_BODY = """
PackBits (x) => (y)
{
    zero = Constant <value_float = 0.0> ()
    zero_like_x = CastLike (zero, x)
    negative = Less (x, zero_like_x)
    bits = Cast <to = 6> (negative)

    eight = Constant <value_ints = [8]> ()
    seven = Constant <value_ints = [7]> ()
    none = Constant <value_ints = [0]> ()
    last = Constant <value_ints = [-1]> ()
    rows = Shape <end = -1> (x)
    columns = Shape <start = -1> (x)
    columns_up = Add (columns, seven)
    words = Div (columns_up, eight)
    padded_columns = Mul (words, eight)
    missing = Sub (padded_columns, columns)
    pads = Concat <axis = 0> (none, missing)
    no_bit = CastLike (none, bits)
    no_bit_scalar = Squeeze (no_bit)
    padded = Pad (bits, pads, no_bit_scalar, last)
    by_word_shape = Concat <axis = 0> (rows, words, eight)
    by_word = Reshape <allowzero = 1> (padded, by_word_shape)

    place_values = Constant <value = int32[8] {1, 2, 4, 8, 16, 32, 64, 128}> ()
    placed = Mul (by_word, place_values)
    sums = ReduceSum <keepdims = 1> (placed, last)
    packed = Cast <to = 2> (sums)
    packed_shape = Concat <axis = 0> (rows, words)
    y = Reshape <allowzero = 1> (packed, packed_shape)
}
"""


def pack(values: np.ndarray, word: type[np.unsignedinteger] = np.uint8) -> np.ndarray:
    """Packs constants as the operator packs values, into words of any size.

    Args:
        values: Real numbers `[..., K]`.
        word: The unsigned integer type of a word of w bits.

    Returns:
        Little-endian words `[..., ceil(K/w)]`: bit i of the row is bit i mod w of word i // w, so that the bytes of the words are the row
        of `uint8` words, followed by zeros.
    """
    size = np.dtype(word).itemsize
    octets = np.packbits(values < 0, axis=-1, bitorder="little")
    padding = [(0, 0)] * (octets.ndim - 1) + [(0, -octets.shape[-1] % size)]
    padded = np.ascontiguousarray(np.pad(octets, padding))
    return padded.view(np.dtype(word).newbyteorder("<"))


def _build() -> ir.Function:
    return parse_function(_BODY)


def _infer_shape(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    """`[..., K]` to `[..., ceil(K/8)]`."""
    if len(shapes) != 1 or not shapes[0]:
        raise shape_error("PackBits", "one tensor [..., K]", shapes)
    return ((*shapes[0][:-1], -(-shapes[0][-1] // 8)),)


def _evaluate(inputs: Sequence[torch.Tensor], attributes: Attributes) -> tuple[torch.Tensor, ...]:
    import torch

    (x,) = inputs
    padded = torch.nn.functional.pad((x < 0).to(torch.uint8), (0, -x.shape[-1] % 8))
    words = padded.reshape(*x.shape[:-1], -(-x.shape[-1] // 8), 8)
    places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=x.device)
    return ((words * places).sum(-1, dtype=torch.uint8),)


OPERATOR = Operator("PackBits", _build, _infer_shape, lambda dtypes: (ir.DataType.UINT8,), _evaluate)
"""`PackBits (x: float [..., K]) -> uint8 [..., ceil(K/8)]`: bit 1 for x < 0, least significant bit first, zeros after the last."""
