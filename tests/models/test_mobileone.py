"""MobileOne against a NumPy reference in float64, its branches, and what the exporter makes of it."""

import numpy as np
import pytest
import torch

from edgekit.models import mobileone_digits
from edgekit.models.mobileone import MobileOneBlock


def reference_conv(x: np.ndarray, kernels: np.ndarray, stride: int, groups: int) -> np.ndarray:
    """Convolution of `[C, H, W]` with `[O, C/groups, K, K]`, zero padding K // 2, written as the defining sum."""
    size, padding = kernels.shape[-1], kernels.shape[-1] // 2
    padded = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    height, width = (-(-side // stride) for side in x.shape[1:])
    out = np.zeros((len(kernels), height, width))
    inputs, outputs = len(x) // groups, len(kernels) // groups
    for o in range(len(kernels)):
        first = o // outputs * inputs
        for row in range(height):
            for column in range(width):
                top, left = row * stride, column * stride
                out[o, row, column] = (padded[first : first + inputs, top : top + size, left : left + size] * kernels[o]).sum()
    return out


def reference_norm(x: np.ndarray, weights: dict[str, np.ndarray], name: str) -> np.ndarray:
    mean, variance, scale, shift = (weights[f"{name}.{kind}"][:, None, None] for kind in ("running_mean", "running_var", "weight", "bias"))
    return (x - mean) / np.sqrt(variance + 1e-5) * scale + shift


def reference_block(x: np.ndarray, weights: dict[str, np.ndarray], stride: int, groups: int) -> np.ndarray:
    total = 0.0
    for name in sorted({key.rsplit(".", 2)[0] for key in weights if key.endswith(".conv.weight")}):
        total = total + reference_norm(reference_conv(x, weights[f"{name}.conv.weight"], stride, groups), weights, f"{name}.bn")
    if "identity.weight" in weights:
        total = total + reference_norm(x, weights, "identity")
    return np.maximum(total, 0.0)


def randomized(block: MobileOneBlock) -> MobileOneBlock:
    """Gives every weight and statistic a seeded value; variances are positive."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in block.state_dict().items():
        if tensor.is_floating_point():
            values = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return block.eval()


@pytest.mark.parametrize(
    ("block", "branches"),
    [
        (MobileOneBlock(3, 5, 3, stride=2, branches=2), {"conv_kxk.0", "conv_kxk.1", "conv_scale"}),
        (MobileOneBlock(4, 4, 3, groups=4, branches=3), {"conv_kxk.0", "conv_kxk.1", "conv_kxk.2", "conv_scale", "identity"}),
        (MobileOneBlock(4, 4, 3, stride=2, groups=4, branches=1), {"conv_kxk.0", "conv_scale"}),
        (MobileOneBlock(4, 6, 1, branches=2), {"conv_kxk.0", "conv_kxk.1"}),
        (MobileOneBlock(4, 4, 1, branches=2), {"conv_kxk.0", "conv_kxk.1", "identity"}),
    ],
    ids=["stem", "depthwise", "depthwise-strided", "pointwise", "pointwise-identity"],
)
def test_block_has_its_branches_and_equals_the_float64_reference(block: MobileOneBlock, branches: set[str]) -> None:
    weights = {name: tensor.numpy() for name, tensor in randomized(block).double().state_dict().items()}
    found = {name.removesuffix(".weight").removesuffix(".conv") for name in weights if name.endswith((".conv.weight", "identity.weight"))}
    assert found == branches
    convolution = block.conv_kxk[0].conv
    x = np.random.default_rng(0).normal(size=(2, convolution.in_channels, 7, 6))
    with torch.no_grad():
        actual = block(torch.from_numpy(x)).numpy()
    for sample, given in zip(actual, x, strict=True):
        expected = reference_block(given, weights, convolution.stride[0], convolution.groups)
        np.testing.assert_allclose(sample, expected, rtol=1e-9, atol=1e-9)


def test_trained_network_keeps_every_branch() -> None:
    module = mobileone_digits.MODEL.build()
    blocks = [block for block in module.modules() if isinstance(block, MobileOneBlock)]
    assert len(blocks) == 13  # the stem, then three stages of two depthwise and pointwise pairs
    for block in blocks:
        convolution = block.conv_kxk[0].conv
        assert len(block.conv_kxk) == 4
        assert (block.conv_scale is not None) == (convolution.kernel_size == (3, 3))
        keeps_shape = convolution.stride == (1, 1) and convolution.in_channels == convolution.out_channels
        assert (block.identity is not None) == keeps_shape
        kernels = torch.stack([branch.conv.weight for branch in block.conv_kxk]).flatten(1)
        assert torch.pdist(kernels).min() > 1e-2  # trained apart, not copies of one another
    assert sum(block.identity is not None for block in blocks) == 7


def test_export_keeps_every_batch_norm() -> None:
    module = mobileone_digits.MODEL.build()
    norms = sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in module.modules())
    convolutions = sum(isinstance(layer, torch.nn.Conv2d) for layer in module.modules())
    program = torch.onnx.export(module, (torch.zeros(1, 1, 32, 32),), dynamo=True, opset_version=23, optimize=False, verbose=False)
    assert program is not None
    operators = [node.op_type for node in program.model.graph]
    assert operators.count("BatchNormalization") == norms == 13 * 4 + 7 + 7
    assert operators.count("Conv") == convolutions == 13 * 4 + 7
