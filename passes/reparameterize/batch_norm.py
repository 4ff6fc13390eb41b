"""Batch normalization in inference as what it is: one scale and one shift per channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array


@dataclass(frozen=True)
class Affine:
    """The map y = scale · x + shift per channel; both arrays are float64 `[C]`."""

    scale: np.ndarray
    shift: np.ndarray


def is_batch_norm(node: ir.Node | None) -> bool:
    """True for ONNX's BatchNormalization."""
    return node is not None and node.op_type == "BatchNormalization" and node.domain == ""


def why_not_affine(norm: ir.Node) -> str | None:
    """Returns which condition keeps a BatchNormalization from being a constant affine map, or None when it is one."""
    if norm.attributes.get_int("training_mode", 0):
        return "the batch norm is in training mode: it uses the statistics of the batch"
    if any(output.uses() or output.is_graph_output() for output in norm.outputs[1:]):
        return "the batch norm's running statistics are read"
    if len(norm.inputs) != 5:
        return f"the batch norm has {len(norm.inputs)} inputs instead of 5"
    parameters = [constant_array(value) for value in norm.inputs[1:]]
    for name, array in zip(("scale", "bias", "mean", "variance"), parameters, strict=True):
        if array is None:
            return f"the batch norm's {name} is not a constant"
        if array.ndim != 1 or parameters[0] is None or array.shape != parameters[0].shape:
            return f"the batch norm's {name} is not one number per channel"
    assert parameters[3] is not None
    variance = parameters[3].astype(np.float64) + _epsilon(norm)
    if not (variance > 0).all():
        channel = int(np.argmin(variance > 0))
        return f"the batch norm's variance + epsilon is {variance[channel]:g} in channel {channel}: it has no square root to divide by"
    return None


def affine(norm: ir.Node) -> Affine:
    """Returns scale = γ/√(σ²+ε) and shift = β − μ·scale (Ioffe & Szegedy 2015, section 3.1) of a norm without `why_not_affine`.

    Both are computed in float64: σ² of a float16 model may be below what float16 can hold the square root of.
    """
    arrays = [constant_array(value) for value in norm.inputs[1:]]
    gamma, beta, mean, variance = (array.astype(np.float64) for array in arrays if array is not None)
    scale = gamma / np.sqrt(variance + _epsilon(norm))
    return Affine(scale, beta - mean * scale)


def _epsilon(norm: ir.Node) -> float:
    return float(np.float32(norm.attributes.get_float("epsilon", 1e-5)))  # attributes are float32, the default too
