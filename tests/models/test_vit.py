"""The ViT against a NumPy reference in float64, its parameter names, and what the exporter makes of it."""

import numpy as np
import pytest
import torch
from scipy.special import erf

from edgekit.models import vit_digits
from edgekit.models.layers import Attention
from edgekit.models.vit import Block, VisionTransformer, sincos_positions


def layer_norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def reference_block(x: np.ndarray, weights: dict[str, np.ndarray], heads: int) -> np.ndarray:
    """One encoder block on `[N, C]`, head by head."""
    width = x.shape[1] // heads
    q, k, v = np.split(linear(layer_norm(x, weights, "norm1"), weights, "attn.qkv"), 3, axis=1)
    mixed = np.empty_like(x)
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / np.sqrt(width)
        shares = np.exp(scores - scores.max(1, keepdims=True))
        mixed[:, part] = shares / shares.sum(1, keepdims=True) @ v[:, part]
    x = x + linear(mixed, weights, "attn.proj")
    hidden = linear(layer_norm(x, weights, "norm2"), weights, "mlp.fc1")
    return x + linear(0.5 * hidden * (1 + erf(hidden / np.sqrt(2))), weights, "mlp.fc2")


def randomized(module: torch.nn.Module) -> torch.nn.Module:
    """Gives every parameter a seeded value, so that no bias or scale is trivially 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return module.eval()


def as_numpy(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def test_block_equals_the_float64_reference() -> None:
    block = randomized(Block(dim=12, heads=3, hidden=20)).double()
    x = np.random.default_rng(0).normal(size=(2, 7, 12))
    with torch.no_grad():
        actual = block(torch.from_numpy(x)).numpy()
    for sample, expected in zip(actual, x, strict=True):
        np.testing.assert_allclose(sample, reference_block(expected, as_numpy(block), heads=3), rtol=1e-9, atol=1e-9)


def test_whole_network_equals_the_float64_reference() -> None:
    network = randomized(VisionTransformer(side=8, patch=4, channels=1, dim=8, depth=2, heads=2, mlp_ratio=2, classes=3)).double()
    weights = as_numpy(network)
    image = np.random.default_rng(1).normal(size=(8, 8))
    kernels = weights["patch_embed.proj.weight"][:, 0]
    patches = [image[row : row + 4, column : column + 4] for row in (0, 4) for column in (0, 4)]
    tokens = [(kernels * patch).sum((1, 2)) + weights["patch_embed.proj.bias"] for patch in patches]
    x = np.stack([weights["cls_token"][0, 0], *tokens]) + weights["pos_embed"][0]
    for index in range(2):
        prefix = f"blocks.{index}."
        x = reference_block(x, {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}, heads=2)
    expected = linear(layer_norm(x, weights, "norm"), weights, "head")[0]
    with torch.no_grad():
        actual = network(torch.from_numpy(image)[None, None])[0].numpy()
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


def test_parameters_are_named_as_in_timm() -> None:
    names = set(vit_digits.network().state_dict())
    layers = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    per_block = {f"blocks.{index}.{layer}.{kind}" for index in range(6) for layer in layers for kind in ("weight", "bias")}
    others = {f"{layer}.{kind}" for layer in ("patch_embed.proj", "norm", "head") for kind in ("weight", "bias")}
    assert names == per_block | others | {"cls_token", "pos_embed"}


def test_input_becomes_64_patches_and_a_class_token() -> None:
    network = vit_digits.network()
    assert network.patch_embed(torch.zeros(2, 1, 32, 32)).shape == (2, 64, network.pos_embed.shape[2])
    assert network.pos_embed.shape[1] == 65


def test_position_embeddings_start_different_everywhere() -> None:
    positions = sincos_positions(8, 16)
    distances = torch.cdist(positions, positions) + torch.eye(64)
    assert positions.shape == (64, 16)
    assert distances.min() > 0.1
    torch.testing.assert_close(positions[8 * 2 + 5, :4], torch.sin(2 * 10000.0 ** -(torch.arange(4) / 4)))
    torch.testing.assert_close(positions[8 * 2 + 5, 12:], torch.cos(5 * 10000.0 ** -(torch.arange(4) / 4)))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Attention(10, 3), "multiple of 3 heads"),
        (lambda: VisionTransformer(side=30, patch=4, channels=1, dim=8, depth=1, heads=2, mlp_ratio=2, classes=3), "multiple of patch 4"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(build, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=message):
        build()


def test_export_keeps_attention_norm_and_gelu_whole() -> None:
    program = torch.onnx.export(
        vit_digits.MODEL.build(), (torch.zeros(1, 1, 32, 32),), dynamo=True, opset_version=23, optimize=False, verbose=False
    )
    assert program is not None
    operators = [node.op_type for node in program.model.graph]
    assert operators.count("Attention") == 6
    assert operators.count("LayerNormalization") == 13
    assert operators.count("Gelu") == 6
    assert "Softmax" not in operators
