"""Activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.targets.coreml.lowering.builder import Lowering
from edgekit.targets.coreml.lowering.reduction import first_index

_INT32 = np.iinfo(np.int32)


def _unary(name: str) -> Callable[[Lowering, ir.Node], Any]:
    return lambda b, node: b.op(name, x=b.x(node))


def _alpha(node: ir.Node, default: float) -> float:
    return float(node.attributes.get_float("alpha", default))


def _relu(b: Lowering, node: ir.Node) -> Any:
    return b.op("relu", x=b.x(node)) if b.is_float(node) else b.op("maximum", x=b.x(node), y=0)


def _leaky_relu(b: Lowering, node: ir.Node) -> Any:
    return b.op("leaky_relu", x=b.x(node), alpha=_alpha(node, 0.01))


def _prelu(b: Lowering, node: ir.Node) -> Any:
    """PRelu: MIL's takes one constant slope per channel, and different ones at rank 4 only; any other slope is written out."""
    x, slope = b.x(node), b.known(node, 1)
    if slope is not None and len(x.shape) == 4 and b.is_float(node):
        full = slope.reshape((1,) * (4 - slope.ndim) + slope.shape)
        if (full.shape[0], *full.shape[2:]) == (1, 1, 1):
            return b.op("prelu", x=x, alpha=np.broadcast_to(full[0, :, 0, 0], (x.shape[1],)).astype(np.float32))
    zero = 0.0 if b.is_float(node) else 0
    return b.op("select", cond=b.op("less", x=x, y=zero), a=b.op("mul", x=x, y=b.x(node, 1)), b=x)


def _elu(b: Lowering, node: ir.Node) -> Any:
    return b.op("elu", x=b.x(node), alpha=_alpha(node, 1.0))


def _selu(b: Lowering, node: ir.Node) -> Any:
    gamma = float(node.attributes.get_float("gamma", 1.05070102214813232421875))
    return b.op("mul", x=b.op("elu", x=b.x(node), alpha=_alpha(node, 1.67326319217681884765625)), y=gamma)


def _celu(b: Lowering, node: ir.Node) -> Any:
    """Celu: max(0, x) + min(0, alpha (e^(x / alpha) - 1)); for alpha = 1 it is Elu."""
    x, alpha = b.x(node), _alpha(node, 1.0)
    if alpha == 1.0:
        return b.op("elu", x=x, alpha=1.0)
    if alpha == 0.0:
        raise b.refuse("Celu with alpha = 0, which divides by it", "use Relu")
    below = b.op("mul", x=b.op("sub", x=b.op("exp", x=b.op("real_div", x=x, y=alpha)), y=1.0), y=alpha)
    return b.op("add", x=b.op("relu", x=x), y=b.op("minimum", x=below, y=0.0))


def _thresholded_relu(b: Lowering, node: ir.Node) -> Any:
    """ThresholdedRelu: MIL's keeps a value that equals alpha, ONNX's does not."""
    x = b.x(node)
    return b.op("select", cond=b.op("greater", x=x, y=_alpha(node, 1.0)), a=x, b=0.0)


def _hard_sigmoid(b: Lowering, node: ir.Node) -> Any:
    return b.op("sigmoid_hard", x=b.x(node), alpha=_alpha(node, 0.2), beta=float(node.attributes.get_float("beta", 0.5)))


def _hard_swish(b: Lowering, node: ir.Node) -> Any:
    x = b.x(node)
    return b.op("mul", x=x, y=b.op("sigmoid_hard", x=x, alpha=1.0 / 6.0, beta=0.5))


def _swish(b: Lowering, node: ir.Node) -> Any:
    x, alpha = b.x(node), _alpha(node, 1.0)
    if alpha == 1.0:
        return b.op("silu", x=x)
    return b.op("mul", x=x, y=b.op("sigmoid", x=b.op("mul", x=x, y=alpha)))


def _mish(b: Lowering, node: ir.Node) -> Any:
    x = b.x(node)
    return b.op("mul", x=x, y=b.op("tanh", x=b.op("softplus", x=x)))


def _gelu(b: Lowering, node: ir.Node) -> Any:
    kind = node.attributes.get_string("approximate", "none")
    mode = {"none": "EXACT", "tanh": "TANH_APPROXIMATION"}.get(kind)
    if mode is None:
        raise b.refuse(f"Gelu with approximate='{kind}'", "use 'none' or 'tanh'")
    return b.op("gelu", x=b.x(node), mode=mode)


def _axis(b: Lowering, node: ir.Node) -> int:
    return int(node.attributes.get_int("axis", -1)) % b.rank(node)


def _softmax(b: Lowering, node: ir.Node) -> Any:
    return b.op("softmax", x=b.x(node), axis=_axis(b, node))


def _log_softmax(b: Lowering, node: ir.Node) -> Any:
    """LogSoftmax, from the distance to the maximum: the log of MIL's softmax would be -inf where that underflows."""
    x, axis = b.x(node), _axis(b, node)
    below = b.op("sub", x=x, y=b.op("reduce_max", x=x, axes=[axis], keep_dims=True))
    return b.op("sub", x=below, y=b.op("log", x=b.op("reduce_sum", x=b.op("exp", x=below), axes=[axis], keep_dims=True), epsilon=0.0))


def _hardmax(b: Lowering, node: ir.Node) -> Any:
    """Hardmax: 1 at the first of the largest elements."""
    x, axis = b.x(node), _axis(b, node)
    places, first = first_index(b, x, axis, "reduce_max")
    return b.op("cast", x=b.op("equal", x=b.var(places), y=first), dtype=b.float_name)


def _shrink(b: Lowering, node: ir.Node) -> Any:
    if not b.is_float(node):
        raise b.refuse(f"Shrink of {b.dtype(node).name}", "cast to float first")
    x = b.x(node)
    limit, bias = float(node.attributes.get_float("lambd", 0.5)), float(node.attributes.get_float("bias", 0.0))
    above = b.op("select", cond=b.op("greater", x=x, y=limit), a=b.op("sub", x=x, y=bias), b=0.0)
    return b.op("select", cond=b.op("less", x=x, y=-limit), a=b.op("add", x=x, y=bias), b=above)


def _clip(b: Lowering, node: ir.Node) -> Any:
    """Clip: the upper bound wins where the bounds cross; MIL's clip wants constants in order, from iOS17 on."""
    x = b.x(node)
    bounds = [b.known(node, index) for index in (1, 2)]
    if b.is_float(node) and all(bound is not None for bound in bounds):
        low, high = (float(bound.reshape(())) for bound in bounds if bound is not None)
        if (low, high) == (0.0, 6.0):
            return b.op("relu6", x=x)
        if b.array(low) < b.array(high):
            return b.op("clip", x=x, alpha=low, beta=high)
    for index, name in ((1, "maximum"), (2, "minimum")):
        if b.has(node, index):
            x = b.op(name, x=x, y=_bound(b, node, index))
    return x


def _bound(b: Lowering, node: ir.Node, index: int) -> Any:
    """A bound; an integer beyond 32 bits bounds nothing that is carried in 32 bits, and so does the end of their range."""
    known = b.known(node, index)
    if known is not None and known.dtype.kind in "iu":
        return b.var(np.asarray(min(max(int(known.reshape(())), _INT32.min), _INT32.max), dtype=np.int32))
    return b.x(node, index)


TABLE: dict[str, Callable[[Lowering, ir.Node], Any]] = {
    "Relu": _relu,
    "LeakyRelu": _leaky_relu,
    "PRelu": _prelu,
    "Elu": _elu,
    "Selu": _selu,
    "Celu": _celu,
    "ThresholdedRelu": _thresholded_relu,
    "Sigmoid": _unary("sigmoid"),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _hard_swish,
    "Swish": _swish,
    "Mish": _mish,
    "Softplus": _unary("softplus"),
    "Softsign": _unary("softsign"),
    "Tanh": _unary("tanh"),
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "Hardmax": _hardmax,
    "Shrink": _shrink,
    "Clip": _clip,
}
