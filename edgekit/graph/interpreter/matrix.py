"""Products of matrices, and what linear algebra adds to them."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekit.graph.interpreter.registry import operator

operator("MatMul")(torch.matmul)


@operator("Gemm", since=7)
def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, /, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0
) -> Tensor:
    """alpha A B + beta C, `[M, N]`."""
    a = a.t() if transA else a
    b = b.t() if transB else b
    if not a.is_floating_point():
        product = a @ b if alpha == 1.0 else (alpha * (a @ b)).to(a.dtype)
        return product if c is None else product + (c if beta == 1.0 else (beta * c).to(c.dtype))
    if c is None:
        return a @ b if alpha == 1.0 else alpha * (a @ b)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


@operator("Einsum")
def einsum(*inputs: Tensor, equation: str) -> Tensor:
    """Sum of products by Einstein's convention."""
    return torch.einsum(equation.replace(" ", ""), *inputs)


@operator("Det")
def det(x: Tensor, /) -> Tensor:
    """Determinant of the last two axes, `[*, M, M]` to `[*]`."""
    determinant: Tensor = torch.linalg.det(x)
    return determinant
