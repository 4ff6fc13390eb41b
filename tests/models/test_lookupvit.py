"""LookupViT against its equations in float64, its published cost, and one set of weights for every number of tokens."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgekit.graph.cost import cost
from edgekit.graph.shapes import infer_shapes, static_shape
from edgekit.models import lookupvit_reference
from edgekit.models.lookupvit import Block, LookupViT, interpolation
from edgekit.models.vit import VisionTransformer
from edgekit.source import from_module
from edgekit.trace import EXPORTERS, trace

SMALL = {"side": 224, "patch": 16, "channels": 3, "dim": 384, "heads": 6, "classes": 1000}


def exported(module: nn.Module, side: int) -> ir.Model:
    model = trace(from_module(module.eval(), torch.zeros(1, 3, side, side)), EXPORTERS[0]).model
    infer_shapes(model)
    return model


@pytest.mark.parametrize(("source", "target"), [(14, 3), (14, 5), (14, 7), (14, 10), (14, 14), (8, 1)])
def test_the_grid_is_resized_as_pytorch_does(source: int, target: int) -> None:
    grid = torch.randn(2, 3, source, source, generator=torch.Generator().manual_seed(0))
    matrix = interpolation(source, target)
    expected = functional.interpolate(grid, size=(target, target), mode="bilinear")
    torch.testing.assert_close(matrix @ grid @ matrix.T, expected, atol=1e-5, rtol=0)


def test_a_block_is_its_equations() -> None:
    """In numpy, a head at a time: gather, refine, write back by the same weights transposed, narrow MLP."""
    torch.manual_seed(0)
    block = Block(16, 4).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.4)
    p, x = torch.randn(1, 4, 16, dtype=torch.float64), torch.randn(1, 9, 16, dtype=torch.float64)
    w = {name: tensor.detach().numpy() for name, tensor in block.named_parameters()}

    def linear(name: str, value: np.ndarray) -> np.ndarray:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name: str, value: np.ndarray) -> np.ndarray:
        centred = value - value.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def mlp(name: str, value: np.ndarray) -> np.ndarray:
        hidden = torch.from_numpy(linear(f"{name}.fc1", value))
        return linear(f"{name}.fc2", functional.gelu(hidden).numpy())

    def softmax(value: np.ndarray) -> np.ndarray:
        e = np.exp(value - value.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    few, many = p[0].numpy(), x[0].numpy()
    q, k, v = norm("gather.q_norm", linear("gather.q", few)), norm("gather.k_norm", linear("gather.k", many)), linear("gather.v", many)
    weights = [softmax(q[:, s] @ k[:, s].T / 2) for s in (slice(h, h + 4) for h in range(0, 16, 4))]
    few = few + linear("gather.proj", np.concatenate([a @ v[:, 4 * h : 4 * h + 4] for h, a in enumerate(weights)], 1))
    qkv = linear("attn.qkv", norm("norm1", few))
    heads = [softmax(qkv[:, s] @ qkv[:, 16:32][:, s].T / 2) @ qkv[:, 32:][:, s] for s in (slice(h, h + 4) for h in range(0, 16, 4))]
    few = few + linear("attn.proj", np.concatenate(heads, 1))
    few = few + mlp("mlp", norm("norm2", few))
    back = linear("write.v", norm("write.norm", few))
    many = many + linear("write.proj", np.concatenate([a.T @ back[:, 4 * h : 4 * h + 4] for h, a in enumerate(weights)], 1))
    many = many + mlp("mlp_l", norm("norm_l", many))
    found = block(p, x)
    np.testing.assert_allclose(found[0][0].detach().numpy(), few, atol=1e-12)
    np.testing.assert_allclose(found[1][0].detach().numpy(), many, atol=1e-12)


def test_weights_of_a_block() -> None:
    """19 D² and biases: 11,219,328 without norms for D = 768."""
    with torch.device("meta"):
        block = Block(768, 12)
    assert sum(parameter.numel() for name, parameter in block.named_parameters() if "norm" not in name) == 11_219_328


@pytest.mark.parametrize(("tokens", "published"), [(9, 1.71), (25, 2.18), (49, 2.90), (100, 4.46)])
def test_cost(tokens: int, published: float) -> None:
    """A block takes (3NM + 2M²)·D + (4N + 15M)·D²; twelve of them and the stem are the published GMACs of size S.

    What the last block would write back nobody reads, and the exporter leaves it out.
    """
    torch.manual_seed(0)
    n, m, d = 196, tokens, 384
    model = exported(LookupViT(**SMALL, depth=2, compressed=tokens), 224)
    block = (3 * n * m + 2 * m * m) * d + (4 * n + 15 * m) * d * d
    stem = n * 768 * d
    unread = n * m * d + m * d * d + 2 * n * d * d
    assert cost(model).macs == 2 * block - unread + stem + m * n * d + d * 1000
    assert (12 * block + stem) / 1e9 == pytest.approx(published, abs=0.006)
    assert Counter(node.op_type for node in model.graph)["Softmax"] == 2  # one a block: the way back has none of its own
    assert all(static_shape(value) is not None for node in model.graph for value in node.outputs)


@torch.no_grad()
def test_one_set_of_weights_for_every_number_of_tokens() -> None:
    module = lookupvit_reference.build_tiny()
    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = module.state_dict()
    results = [module.compress_to(tokens)(x) for tokens in (1, 9, 25, 64)]
    assert all(result.shape == (3, 10) for result in results)
    assert (results[1] - results[2]).abs().max() > 1e-4
    assert set(before) == set(lookupvit_reference.build_tiny(25).state_dict())
    torch.testing.assert_close(module.compress_to(9)(x[1:2]), results[1][1:2], atol=1e-5, rtol=0)  # samples do not mix
    for wrong in (0, 8, 81):
        with pytest.raises(ValueError, match="square"):
            module.compress_to(wrong)


def test_it_learns_from_a_vit() -> None:
    """A short distillation on synthetic images."""
    torch.manual_seed(0)
    teacher = VisionTransformer(side=32, patch=4, channels=3, dim=32, depth=2, heads=4, mlp_ratio=2, classes=6).eval()
    student = LookupViT(side=32, patch=4, channels=3, dim=32, depth=2, heads=4, classes=6, compressed=9)
    images = functional.interpolate(torch.randn(64, 3, 4, 4), size=(32, 32))
    with torch.no_grad():
        target = teacher(images)
        target = target / target.std()
    optimizer, losses = torch.optim.Adam(student.parameters(), 3e-3), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = functional.mse_loss(student(images), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_the_zoo_says_what_it_is() -> None:
    for model in (lookupvit_reference.MODEL, lookupvit_reference.TINY):
        assert "random weights" in model.source
        assert model.accuracy is None
