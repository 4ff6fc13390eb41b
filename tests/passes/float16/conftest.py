"""A vision transformer whose residual stream is of the size that large ones have, and a check of one rewriting."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from edgekit.contracts import Context
from edgekit.graph.float16_proof import Proof, prove_float16
from edgekit.graph.interpreter import run as interpret
from edgekit.graph.shapes import infer_shapes
from edgekit.models.vit import VisionTransformer
from edgekit.passes.float16.stabilize import StabilizeFloat16

BATCH, SIDE = 50, 16


class WrittenOutNorm(nn.Module):
    """A layer norm in its seven steps."""

    def __init__(self, like: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = like.weight, like.bias, like.eps

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return centred / (variance + self.eps).sqrt() * self.weight + self.bias


@pytest.fixture(scope="session")
def large_vit() -> nn.Module:
    """Four blocks with random weights; tokens are about 3000, the squares of which float16 does not hold."""
    torch.manual_seed(0)
    module = VisionTransformer(side=SIDE, patch=4, channels=3, dim=32, depth=4, heads=2, mlp_ratio=2, classes=10)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith(("patch_embed", "pos_embed", "cls_token")) or name.endswith(("proj.weight", "fc2.weight")):
                parameter.mul_(3000)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(parent, name, WrittenOutNorm(child))
    return module.eval()


@pytest.fixture
def decomposed(large_vit) -> ir.Model:
    """Its graph as it is traced: no layer norm is fused."""
    program = torch.onnx.export(large_vit, (torch.zeros(BATCH, 3, SIDE, SIDE),), dynamo=True, opset_version=23, verbose=False)
    infer_shapes(program.model)
    return program.model


@pytest.fixture(scope="session")
def images() -> list[dict[str, np.ndarray]]:
    """Five batches of 50 random images; the first is for calibration."""
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(BATCH, 3, SIDE, SIDE)).astype(np.float32)} for _ in range(5)]


@pytest.fixture
def stabilize(build, run) -> Callable[..., tuple[ir.Model, Context, Proof, Proof]]:
    """Returns `stabilize(text, feeds, arrays)`.

    It applies the pass to a graph in ONNX's text form and checks that ONNX Runtime then gives, to 1e-6 of the largest magnitude, what the
    graph gave before in float32 and in float64, and that a second application finds nothing; where nothing is to be rewritten, that the
    graph stays as it was. It returns the graph, the context, and the proofs before and after.
    """

    def check(text: str, feeds: Mapping[str, np.ndarray], arrays: Mapping[str, np.ndarray] | None = None, rewrites: int = 1):
        model = build(text, arrays)
        exact, untouched = interpret(model, feeds, dtype="float64"), ir.to_proto(model).SerializeToString()
        single = run(model, feeds)
        before = prove_float16(model, [feeds])
        context = Context(calibration=[feeds])
        assert StabilizeFloat16().apply(model, context) == rewrites
        assert len(context.rewrites) == rewrites
        if not rewrites:
            assert ir.to_proto(model).SerializeToString() == untouched
            return model, context, before, before
        for output, found, earlier in zip(model.graph.outputs, run(model, feeds), single, strict=True):
            assert found.dtype == earlier.dtype == np.float32
            for reference in (earlier, exact[output.name]):
                np.testing.assert_allclose(found, reference, rtol=2e-6, atol=1e-6 * np.abs(reference).max())
        assert StabilizeFloat16().apply(model, second := Context(calibration=[feeds])) == 0, second.rewrites
        return model, context, before, prove_float16(model, [feeds])

    return check
