"""Fourier transforms as products with constant matrices, windows and mel filters as constants."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.reference.ops
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.layout import piece, reshape, transpose


def _dft(b: Lowering, node: ir.Node) -> Any:
    """`DFT`: the last axis holds the real part, or the real and the imaginary part."""
    shape = b.shape(node)
    axis = node.attributes.get_int("axis", 1) if "axis" in node.attributes else -2
    axis = (int(b.need_known(node, 2, "axis").reshape(-1)[0]) if b.has(node, 2) else axis) % len(shape)
    inverse, onesided = bool(node.attributes.get_int("inverse", 0)), bool(node.attributes.get_int("onesided", 0))
    length = 2 * (shape[axis] - 1) if inverse and onesided else shape[axis]
    if b.has(node, 1):
        length = int(b.need_known(node, 1, "dft_length").reshape(-1)[0])
    if onesided and shape[-1] != (2 if inverse else 1):
        raise b.refuse("a one-sided DFT of this input, which ONNX does not define", "set onesided to 0")
    parts = [_last(b, piece(b, b.x(node), len(shape) - 1, at, at + 1), axis) for at in range(shape[-1])]
    cosine, sine = _matrices(shape[axis], length, inverse, onesided)
    results = _transformed(b, parts, cosine, sine, real_only=inverse and onesided)
    order = list(range(len(shape) - 1))
    order.insert(axis, order.pop())
    moved = [transpose(b, result, order) for result in results]
    return reshape(b, moved[0], b.out_shape(node)) if len(moved) == 1 else b.op("stack", values=moved, axis=len(shape) - 1)


def _last(b: Lowering, part: Any, axis: int) -> Any:
    """One part of a complex tensor, without the axis of parts and with the transformed axis at the end."""
    shape = list(part.shape[:-1])
    order = [at for at in range(len(shape)) if at != axis] + [axis]
    return transpose(b, reshape(b, part, shape), order)


def _matrices(size: int, length: int, inverse: bool, onesided: bool) -> tuple[np.ndarray, np.ndarray]:
    """The real and the imaginary part of the transform, `[size, result]`; a longer input is cut, a shorter one extended with zeros."""
    bins = length // 2 + 1
    used = min(size, bins if inverse and onesided else length)
    result = bins if onesided and not inverse else length
    steps = np.outer(np.arange(size), np.arange(result)) % length
    angles = (2 if inverse else -2) * np.pi * steps / length
    factors = np.where(np.arange(size) < used, 1 / length if inverse else 1.0, 0.0)
    if inverse and onesided:  # the bins left out mirror those between the first and the middle
        factors = factors * np.where((np.arange(size) == 0) | (2 * np.arange(size) == length), 1, 2)
    return np.cos(angles) * factors[:, None], np.sin(angles) * factors[:, None]


def _transformed(b: Lowering, parts: list[Any], cosine: np.ndarray, sine: np.ndarray, real_only: bool = False) -> list[Any]:
    """The real and the imaginary part of a product with `cosine + i sine` over the last axis."""
    by_cosine = [b.op("matmul", x=part, y=cosine) for part in parts]
    by_sine = [b.op("matmul", x=part, y=sine) for part in parts]
    if len(parts) == 1:
        return [by_cosine[0], by_sine[0]]
    real = b.op("sub", x=by_cosine[0], y=by_sine[1])
    return [real] if real_only else [real, b.op("add", x=by_sine[0], y=by_cosine[1])]


def _stft(b: Lowering, node: ir.Node) -> Any:
    shape = b.shape(node)
    step = int(b.need_known(node, 1, "frame_step").reshape(-1)[0])
    window = b.known(node, 2)
    width = b.shape(node, 2)[0] if b.has(node, 2) else shape[1]
    length = int(b.need_known(node, 3, "frame_length").reshape(-1)[0]) if b.has(node, 3) else width
    if b.has(node, 2) and length != width:
        raise b.refuse("STFT with a window of another length than the frames", "make them equal")
    parts = shape[2] if len(shape) == 3 else 1
    onesided = bool(node.attributes.get_int("onesided", 1))
    if onesided and parts == 2:
        raise b.refuse("a one-sided STFT of a complex signal, which ONNX does not define", "set onesided to 0")
    cosine, sine = _matrices(length, length, inverse=False, onesided=onesided)
    if window is not None:
        cosine, sine = cosine * window[:, None], sine * window[:, None]
    signal = reshape(b, b.x(node), [*shape[:2], parts])
    frames = []
    for at in range(parts):
        part = reshape(b, piece(b, signal, 2, at, at + 1), shape[:2])
        cut = b.op("sliding_windows", x=part, axis=1, size=length, stride=step)
        frames.append(b.op("mul", x=cut, y=b.x(node, 2)) if b.has(node, 2) and window is None else cut)
    return b.op("stack", values=_transformed(b, frames, cosine, sine), axis=3)


def _from_constants(b: Lowering, node: ir.Node) -> Any:
    """What follows from constants alone, by onnx's reference implementation."""
    name = {"MelWeightMatrix": "num_mel_bins"}.get(node.op_type, "size")
    inputs = [b.need_known(node, index, name if index == 0 else f"input {index}") for index in range(len(node.inputs))]
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    operator: Any = onnx.reference.ops.load_op("", node.op_type, 23)
    return operator.eval(*inputs, **attributes)


TABLE = {
    "BlackmanWindow": _from_constants,
    "DFT": _dft,
    "HammingWindow": _from_constants,
    "HannWindow": _from_constants,
    "MelWeightMatrix": _from_constants,
    "STFT": _stft,
}
"""By ONNX operator."""
