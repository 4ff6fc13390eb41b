"""Fourier transforms, windows and mel filters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.graph.interpreter.conversion import typed
from edgekit.graph.interpreter.registry import Call, operator
from edgekit.graph.interpreter.values import NotSupportedError, scalar


@operator("DFT", since=17)
def dft_by_attribute(x: Tensor, length: Tensor | None = None, /, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Tensor:
    """As up to opset 19."""
    return _dft(x, scalar(length), axis, bool(inverse), bool(onesided))


@operator("DFT", since=20)
def dft(x: Tensor, length: Tensor | None = None, axis: Tensor | None = None, /, *, inverse: int = 0, onesided: int = 0) -> Tensor:
    """Discrete Fourier transform along an axis; the last axis holds the real part, or real and imaginary parts."""
    return _dft(x, scalar(length), int(scalar(axis, -2)), bool(inverse), bool(onesided))


def _dft(x: Tensor, length: int | None, axis: int, inverse: bool, onesided: bool) -> Tensor:
    axis %= x.dim()
    if axis == x.dim() - 1:
        raise ValueError("the last axis holds real and imaginary parts")
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    signal = torch.view_as_complex(wide) if x.shape[-1] == 2 else wide.squeeze(-1)
    name = ("irfft" if onesided else "ifft") if inverse else ("rfft" if onesided else "fft")
    if signal.requires_grad:
        spectrum: Tensor = getattr(torch.fft, name)(signal, length, axis)
    else:
        # numpy's transform, whose float32 rounding is that of the values that ONNX publishes; torch's depends on how it was built.
        spectrum = torch.from_numpy(getattr(np.fft, name)(signal.numpy(), length, axis))
    return (torch.view_as_real(spectrum) if spectrum.is_complex() else spectrum.unsqueeze(-1)).to(x.dtype)


@operator("STFT")
def stft(
    signal: Tensor, frame_step: Tensor, window: Tensor | None = None, frame_length: Tensor | None = None, /, *, onesided: int = 1
) -> Tensor:
    """Short-time Fourier transform, `[B, L, 1 or 2]` to `[B, frames, bins, 2]`."""
    size = int(scalar(frame_length, signal.shape[1] if window is None else window.shape[0]))
    frames = signal.unfold(1, size, int(scalar(frame_step))).movedim(-1, 2)  # [B, frames, size, 1 or 2]
    if window is not None:
        frames = frames * window[:, None]
    return _dft(frames, None, 2, False, bool(onesided) and signal.shape[-1] == 1)


def _window(size: Tensor, output_datatype: int, periodic: int, coefficients: Sequence[float], call: Call) -> Any:
    """A sum of cosines, computed in float64."""
    count = int(scalar(size))
    steps = count if periodic else count - 1
    phase = 2 * math.pi * torch.arange(count, dtype=torch.float64) / max(steps, 1)
    result = torch.zeros(count, dtype=torch.float64)
    for order, coefficient in enumerate(coefficients):
        result = result + (-1) ** order * coefficient * torch.cos(order * phase)
    return typed(result, output_datatype, call.precision)


@operator("HannWindow")
def hann_window(size: Tensor, /, *, output_datatype: int = 1, periodic: int = 1, call: Call) -> Any:
    """0.5 - 0.5 cos."""
    return _window(size, output_datatype, periodic, (0.5, 0.5), call)


@operator("HammingWindow")
def hamming_window(size: Tensor, /, *, output_datatype: int = 1, periodic: int = 1, call: Call) -> Any:
    """25/46 - 21/46 cos."""
    return _window(size, output_datatype, periodic, (25 / 46, 21 / 46), call)


@operator("BlackmanWindow")
def blackman_window(size: Tensor, /, *, output_datatype: int = 1, periodic: int = 1, call: Call) -> Any:
    """0.42 - 0.5 cos + 0.08 cos of twice the phase."""
    return _window(size, output_datatype, periodic, (0.42, 0.5, 0.08), call)


@operator("MelWeightMatrix")
def mel_weight_matrix(
    bins: Tensor, dft_length: Tensor, sample_rate: Tensor, low: Tensor, high: Tensor, /, *, output_datatype: int = 1, call: Call
) -> Any:
    """Triangles that are evenly spaced on the mel scale, `[dft_length / 2 + 1, bins]`, on whole bins of the spectrum."""
    count, length = int(scalar(bins)), int(scalar(dft_length))
    spectrum = length // 2 + 1
    mel = [2595 * math.log10(1 + float(scalar(edge)) / 700) for edge in (low, high)]
    step = (mel[1] - mel[0]) / (count + 2)
    edges = [mel[0] + step * index for index in range(count + 2)]
    places = [int((length + 1) * (700 * (10 ** (edge / 2595) - 1)) // int(scalar(sample_rate))) for edge in edges]
    weights = torch.zeros(spectrum, count, dtype=torch.float64)
    for index in range(count):
        first, center, last = places[index : index + 3]
        if center == first:
            weights[center, index] = 1
        for position in range(first, center + 1 if center > first else first):
            weights[position, index] = (position - first) / (center - first)
        for position in range(center, last):
            weights[position, index] = (last - position) / (last - center)
    if count < 1:
        raise NotSupportedError("no mel bins")
    return typed(weights, output_datatype, call.precision)
