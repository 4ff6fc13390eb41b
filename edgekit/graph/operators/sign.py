"""`Sign`: +1 or -1, never 0, since one bit has no third value (ONNX's own Sign gives 0 for 0)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir

from edgekit.graph.operators.base import Attributes, Operator, Shape, parse_function, shape_error

if TYPE_CHECKING:
    import torch

_BODY = """
Sign (x) => (y)
{
    zero = Constant <value_float = 0.0> ()
    one = Constant <value_float = 1.0> ()
    minus_one = Constant <value_float = -1.0> ()
    zero_like_x = CastLike (zero, x)
    one_like_x = CastLike (one, x)
    minus_one_like_x = CastLike (minus_one, x)
    negative = Less (x, zero_like_x)
    y = Where (negative, minus_one_like_x, one_like_x)
}
"""


def _build() -> ir.Function:
    return parse_function(_BODY)


def _infer_shape(shapes: Sequence[Shape], attributes: Attributes) -> tuple[Shape, ...]:
    if len(shapes) != 1:
        raise shape_error("Sign", "one tensor", shapes)
    return (shapes[0],)


def _evaluate(inputs: Sequence[torch.Tensor], attributes: Attributes) -> tuple[torch.Tensor, ...]:
    """The gradient is that of the identity where |x| <= 1, else zero (Hubara et al. 2016, "Binarized Neural Networks", equation 4)."""
    import torch

    (x,) = inputs
    one = torch.ones((), dtype=x.dtype, device=x.device)
    signs = torch.where(x < 0, -one, one)
    inside = torch.where(x.abs() <= 1, x, torch.zeros_like(x))
    return (signs + (inside - inside.detach()),)  # the bracket is exactly 0 and carries the gradient


OPERATOR = Operator("Sign", _build, _infer_shape, lambda dtypes: (dtypes[0],), _evaluate)
"""`Sign (x: T [...]) -> T [...]` of a float type T: -1 for x < 0, else +1, so also for 0, -0 and NaN."""
