"""Whole networks of timm in their training form, with random statistics: what remains is counted and held to published figures.

In float64 the network is traced in double precision, so that what is compared is the algebra and not the rounding of weights.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgekit.contracts import Context
from edgekit.graph import run
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.cost import cost
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.reparameterize import Reparameterize
from edgekit.source import Source
from edgekit.trace import trace
from tests.timm_support import create_timm

LINEAR = ("Conv", "MatMul", "Gemm")

# Parameters with all batch norms, branches and layer scales folded, computed from the published architectures.
DEPLOYED = {
    "mobileone_s0": 2_078_504,
    "mobileone_s1": 4_764_840,
    "mobileone_s4": 14_838_352,
    "repvgg_a0": 8_309_384,
    "fastvit_t8": 3_992_392,
    "fastvit_sa12": None,
    "repvit_m1": 5_067_056,
}


def training_form(name: str, dtype: torch.dtype, size: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """The network with statistics that hide nothing: scales of both signs, means that are not zero."""
    module, example = create_timm(name)
    torch.manual_seed(1)
    for part in module.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.normal_(part.running_mean, 0, 0.2)
            torch.nn.init.uniform_(part.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(part.weight, 0.5, 1.5)
            part.weight.data[::7] *= -1
            torch.nn.init.normal_(part.bias, 0, 0.2)
    size = min(size, example.shape[-1])
    return module.to(dtype), torch.randn(1, 3, size, size, dtype=dtype)


def canonical(module: torch.nn.Module, example: torch.Tensor) -> ir.Model:
    model = trace(Source("net", module=module, example_inputs=(example,)), "dynamo").model
    infer_shapes(model)
    model = canonicalize(to_opset(model))
    infer_shapes(model)
    return model


def operators(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def outputs(model: ir.Model, example: torch.Tensor, dtype: str) -> np.ndarray:
    (result,) = run(model, {str(model.graph.inputs[0].name): example.numpy()}, dtype=dtype).values()
    return np.asarray(result)


@pytest.mark.slow
@pytest.mark.parametrize("name", DEPLOYED)
def test_nothing_of_the_training_form_remains(name: str) -> None:
    module, example = training_form(name, torch.float32, 256 if name == "fastvit_t8" else 64)  # on small maps kernels are cropped
    from timm.utils import reparameterize_model  # once timm can be imported

    with torch.no_grad():
        expected = module(example).numpy()
    model = canonical(module, example)
    before = cost(model)
    assert Reparameterize().apply(model, Context()) > 0
    infer_shapes(model)
    after = cost(model)
    assert operators(model)["BatchNormalization"] == 0
    assert after.macs <= before.macs
    assert after.bytes <= before.bytes
    if DEPLOYED[name] is not None:
        assert after.parameters == DEPLOYED[name]
    theirs = operators(canonical(reparameterize_model(module), example))
    ours = operators(model)
    assert sum(ours[op] for op in LINEAR) <= sum(theirs[op] for op in LINEAR)
    np.testing.assert_allclose(outputs(model, example, "float32"), expected, atol=1e-4 * np.abs(expected).max())
    assert Reparameterize().apply(model, Context()) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobileone_s0", "repvgg_a0", "fastvit_t8", "repvit_m1", "deit_tiny_patch16_224"])
def test_the_algebra_in_double_precision(name: str) -> None:
    module, example = training_form(name, torch.float64, 64 if "deit" not in name else 224)
    with torch.no_grad():
        expected = module(example).numpy()
    model = canonical(module, example)
    assert Reparameterize().apply(model, Context()) > 0
    infer_shapes(model)
    np.testing.assert_allclose(outputs(model, example, "float64"), expected, atol=1e-10 * np.abs(expected).max())


# What one class-token row in the last block saves, (N - 1)(10 C² + 2 N C) multiply-accumulates for N tokens of C channels, and what is
# saved further where the last block's keys and values are absorbed.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "tokens", "channels"), [("deit_tiny_patch16_224", 197, 192), ("deit_small_patch16_224", 197, 384)])
def test_the_last_block_of_a_class_token_model(name: str, tokens: int, channels: int) -> None:
    module, example = create_timm(name)
    model = canonical(module, example)
    before = cost(model).macs
    Reparameterize().apply(model, Context())
    infer_shapes(model)
    saved = before - cost(model).macs
    assert saved >= (tokens - 1) * (10 * channels**2 + 2 * tokens * channels)
    assert 0.05 <= saved / before <= 0.09
