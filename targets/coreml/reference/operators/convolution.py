"""Convolutions of MIL, and how much they and the pools pad."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from edgekit.errors import UnsupportedOpError
from edgekit.targets.coreml.reference.operators.arguments import ints, number

_CONV: dict[int, Callable[..., torch.Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED: dict[int, Callable[..., torch.Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


def pads(
    pad_type: str, pad: torch.Tensor | None, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int]
) -> list[tuple[int, int]]:
    """Elements to pad before and after each spatial dimension; `kernel` is dilated already.

    "same" makes the output `ceil(size / stride)` long with the fewest elements, the odd one at the end; "same_lower" has it at the front.
    The documentation also gives an equivalent of "same" without strides: it agrees where the stride is 1 and the kernel odd, and elsewhere
    contradicts the documented output shape or the documented difference to "same_lower".
    """
    kind = pad_type.lower()
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        flat = [0] * (2 * len(sizes)) if pad is None else ints(pad)
        return list(zip(flat[::2], flat[1::2], strict=True))
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type '{pad_type}' is none of valid, same, same_lower and custom")
    totals = [max(0, (-(-size // stride) - 1) * stride + width - size) for size, width, stride in zip(sizes, kernel, strides, strict=True)]
    return [_split(total, kind) for total in totals]


def _split(total: int, kind: str) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (small, large) if kind == "same" else (large, small)


def padded(x: torch.Tensor, amounts: Sequence[tuple[int, int]], value: float = 0.0) -> torch.Tensor:
    """`x` with its last dimensions padded; negative amounts cut."""
    if not any(before or after for before, after in amounts):
        return x
    return functional.pad(x, [amount for pair in reversed(amounts) for amount in pair], value=value)


def optional_ints(values: torch.Tensor | None, count: int) -> list[int]:
    """The integers of an optional parameter, by default `count` ones."""
    return [1] * count if values is None else ints(values)


def _dilated(weight: torch.Tensor, dilations: Sequence[int]) -> list[int]:
    return [(size - 1) * dilation + 1 for size, dilation in zip(weight.shape[2:], dilations, strict=True)]


def conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    strides: torch.Tensor | None = None,
    pad_type: str = "valid",
    pad: torch.Tensor | None = None,
    dilations: torch.Tensor | None = None,
    groups: torch.Tensor | int = 1,
) -> torch.Tensor:
    """Convolution over 1 to 3 spatial dimensions."""
    rank = x.dim() - 2
    steps, spread = optional_ints(strides, rank), optional_ints(dilations, rank)
    amounts = pads(pad_type, pad, x.shape[2:], _dilated(weight, spread), steps)
    inside = [before for before, _ in amounts]
    if any(before != after for before, after in amounts):
        x, inside = padded(x, amounts), [0] * rank
    return _CONV[rank](x, weight, bias, steps, inside, spread, int(number(groups)))


def conv_quantized(
    x: torch.Tensor,
    weight: torch.Tensor,
    quantization_type: str,
    quant_scale: torch.Tensor,
    quant_bias: torch.Tensor,
    bias: torch.Tensor | None = None,
    nbits: torch.Tensor | int = 8,
    strides: torch.Tensor | None = None,
    pad_type: str = "valid",
    pad: torch.Tensor | None = None,
    dilations: torch.Tensor | None = None,
    groups: torch.Tensor | int = 1,
) -> torch.Tensor:
    """Convolution with weight `weight * quant_scale + quant_bias`: both are scalars, vectors over output channels, or broadcast."""
    if quantization_type != "linear":
        raise UnsupportedOpError(
            f"'conv_quantized' of quantization_type '{quantization_type}' cannot be evaluated: no parameter for its table is documented",
            fix="use a 'conv' whose weight is a constexpr_lut_to_dense",
        )
    floats = weight * _per_channel(quant_scale, weight) + _per_channel(quant_bias, weight)
    return conv(x, floats, None if bias is None else bias.to(floats.dtype), strides, pad_type, pad, dilations, groups)


def _per_channel(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return values.reshape(-1, *[1] * (weight.dim() - 1)) if values.dim() == 1 else values


def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    pad: torch.Tensor | None = None,
    output_shape: torch.Tensor | None = None,
    pad_type: str = "valid",
    strides: torch.Tensor | None = None,
    dilations: torch.Tensor | None = None,
    groups: torch.Tensor | int = 1,
) -> torch.Tensor:
    """Transposed convolution: the gradient of `conv` with respect to its input, of which `output_shape` is the shape where it is given."""
    rank = x.dim() - 2
    steps, spread = optional_ints(strides, rank), optional_ints(dilations, rank)
    full = _TRANSPOSED[rank](x, weight, None, steps, 0, 0, int(number(groups)), spread)
    sizes = _transposed_sizes(x, full, steps, pad_type, pad) if output_shape is None else ints(output_shape)[2:]
    amounts = pads(pad_type, pad, sizes, _dilated(weight, spread), steps)
    cuts = [(-before, before + size - length) for (before, _), size, length in zip(amounts, sizes, full.shape[2:], strict=True)]
    result = padded(full, cuts)  # positions that no window of the convolution reads have gradient 0
    return result if bias is None else result + bias.reshape(-1, *[1] * rank)


def _transposed_sizes(x: torch.Tensor, full: torch.Tensor, strides: list[int], pad_type: str, pad: torch.Tensor | None) -> list[int]:
    if pad_type.lower() in ("same", "same_lower"):
        return [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    amounts = pads(pad_type, pad, full.shape[2:], strides, strides)
    return [size - before - after for size, (before, after) in zip(full.shape[2:], amounts, strict=True)]


TABLE: dict[str, Callable[..., Any]] = {"conv": conv, "conv_quantized": conv_quantized, "conv_transpose": conv_transpose}
