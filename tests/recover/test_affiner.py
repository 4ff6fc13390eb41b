"""Affiners against their formula, their parameter counts, and what the compiler leaves of them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgekit.contracts import Context
from edgekit.errors import DataError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.interpreter import run
from edgekit.passes.reparameterize.fold_scale import FoldScale
from edgekit.passes.reparameterize.merge_linears import MergeLinears
from edgekit.recover.affiner import Affiner, attach, fit_scale_shift, pack, unpack


def trained(affiner):
    """Gives an Affiner's parameters random values."""
    with torch.no_grad():
        for parameter in affiner.parameters(recurse=False):
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return affiner


def test_formula():
    torch.manual_seed(0)
    affiner = trained(Affiner(nn.Linear(5, 7), rank=3)).double()
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    a, b, down, up, gain, w, bias = (
        tensor.detach().numpy()
        for tensor in (affiner.scale, affiner.shift, affiner.down, affiner.up, affiner.gain, affiner.layer.weight, affiner.layer.bias)
    )
    for sample, result in zip(x.reshape(-1, 5).numpy(), affiner(x).detach().reshape(-1, 7).numpy(), strict=True):
        expected = (1 + a) * (w @ sample) + bias + b + gain * (up @ np.maximum(down @ sample, 0))
        np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12)
    affiner.linear = True
    sample = x[0, 0].numpy()
    expected = (1 + a) * (w @ sample) + bias + b + gain * (up @ (down @ sample))
    np.testing.assert_allclose(affiner(x)[0, 0].detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_it_starts_as_the_layer_bit_for_bit(bias):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 9, bias=bias), torch.randn(4, 6)
    product = functional.linear(x, layer.weight)
    assert torch.equal(Affiner(layer)(x), product + layer.bias if bias else product)
    torch.testing.assert_close(Affiner(layer)(x), layer(x))


@pytest.mark.parametrize("linear", [True, False])
def test_folded_layer(linear):
    torch.manual_seed(0)
    affiner = trained(Affiner(nn.Linear(6, 9, bias=linear), rank=2, linear=linear))
    x = torch.randn(4, 6)
    folded = affiner.folded()
    branch = 0 if linear else affiner.gain * functional.linear(functional.relu(functional.linear(x, affiner.down)), affiner.up)
    torch.testing.assert_close(folded(x) + branch, affiner(x), rtol=0, atol=1e-6)


class DitBlock(nn.Module):
    """The linear layers of a block of a diffusion transformer of width d (Peebles & Xie 2023), without its modulation."""

    def __init__(self, d):
        super().__init__()
        self.qkv, self.proj, self.fc1, self.fc2 = nn.Linear(d, 3 * d), nn.Linear(d, d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)


@pytest.mark.parametrize(("width", "depth", "alone", "per_rank"), [(384, 12, 82_944, 73_728), (1152, 28, 580_608, 516_096)])
def test_parameters_of_a_diffusion_transformer(width, depth, alone, per_rank):
    """18·d + 16·r·d a block, and one factor a layer: 580,608 and 516,096 per unit of rank for DiT-XL/2."""
    for rank in (1, 8):
        with torch.device("meta"):
            blocks = nn.Sequential(*(DitBlock(width) for _ in range(depth)))
            made = attach(blocks, rank)
        assert len(made) == 4 * depth
        trainable = sum(p.numel() for p in blocks.parameters() if p.requires_grad)
        assert trainable == alone + rank * per_rank + len(made)
        assert trainable == depth * (18 * width + 16 * rank * width) + len(made)


def test_only_a_tasks_parameters_are_trained_and_two_tasks_share_one_network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    frozen = [p.detach().clone() for p in net.parameters()]
    x = torch.randn(16, 6)
    base = net(x)
    affiners = attach(net, rank=2)
    empty = pack(net)
    assert set(empty) == {f"{layer}.{name}" for layer in (0, 2) for name in ("scale", "shift", "down", "up", "gain")}
    packs, results = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        unpack(net, empty)
        wanted = torch.randn(16, 3)
        optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=3e-2)
        first = functional.mse_loss(net(x), wanted).item()
        for _ in range(60):
            loss = functional.mse_loss(net(x), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.5 * first
        packs.append(pack(net))
        results.append(net(x))
    for task, result in zip(packs, results, strict=True):
        unpack(net, task)
        assert torch.equal(net(x), result)
    unpack(net, empty)
    torch.testing.assert_close(net(x), base)
    for affiner, weight in zip([a.layer.weight for a in affiners], frozen[::2], strict=True):
        assert torch.equal(affiner, weight)
    with pytest.raises(DataError, match=r"'0\.down'"):
        unpack(net, empty | {"0.down": torch.zeros(3, 6)})
    with pytest.raises(DataError, match="'more'"):
        unpack(net, empty | {"more": torch.zeros(1)})


def compiled(module, shape):
    program = torch.onnx.export(module.eval(), (torch.zeros(shape),), dynamo=True, opset_version=23, optimize=False, verbose=False)
    model = canonicalize(program.model)
    while sum(step.apply(model, Context()) for step in (FoldScale(), MergeLinears())):
        pass
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_nothing_but_the_branch_remains_when_it_runs(bias):
    torch.manual_seed(0)
    module = nn.Sequential(trained(Affiner(nn.Linear(16, 12, bias=bias), rank=3)), nn.Tanh())
    model = compiled(module, (2, 5, 16))
    assert Counter(node.op_type for node in model.graph) == {"MatMul": 3, "Relu": 1, "Add": 2, "Tanh": 1}
    x = torch.randn(2, 5, 16)
    (result,) = run(model, {model.graph.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=0, atol=1e-6)
    scaled = module[0].folded().weight.T.detach().numpy()
    weights = [node.inputs[1].const_value.numpy() for node in model.graph if node.op_type == "MatMul"]
    assert any(weight.shape == scaled.shape and np.allclose(weight, scaled, rtol=1e-6, atol=0) for weight in weights)


def test_linear_affiner_becomes_its_layer():
    torch.manual_seed(0)
    module = nn.Sequential(trained(Affiner(nn.Linear(16, 12), rank=3, linear=True)), nn.Tanh())
    model = compiled(module, (2, 5, 16))
    assert Counter(node.op_type for node in model.graph) == {"MatMul": 1, "Add": 1, "Tanh": 1}
    x = torch.randn(2, 5, 16)
    (result,) = run(model, {model.graph.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(result, module(x).detach().numpy(), rtol=0, atol=1e-6)


def test_scale_and_shift_by_least_squares():
    rng = np.random.default_rng(0)
    product, noise = rng.normal(1, 2, (200, 5)), rng.normal(0, 0.1, (200, 5))
    product[:, 4] = 3.0  # a channel that does not vary
    wanted = np.array([0.5, 1, 2, -1, 1]) * product + np.arange(5) + noise
    scale, shift = (tensor.numpy() for tensor in fit_scale_shift(torch.from_numpy(product), torch.from_numpy(wanted)))
    for channel in range(4):
        slope, offset = np.linalg.lstsq(np.stack([product[:, channel], np.ones(200)], 1), wanted[:, channel], rcond=None)[0]
        assert 1 + scale[channel] == pytest.approx(slope, rel=1e-9)
        assert shift[channel] == pytest.approx(offset, rel=1e-9, abs=1e-12)
    assert scale[4] == 0
    assert shift[4] == pytest.approx(wanted[:, 4].mean() - 3)
    with pytest.raises(DataError, match="one shape"):
        fit_scale_shift(torch.zeros(3, 2), torch.zeros(3, 3))


def test_fitted_scale_and_shift_mend_a_rounded_layer():
    torch.manual_seed(0)
    layer, rounded = nn.Linear(32, 24), nn.Linear(32, 24)
    step = layer.weight.abs().amax(1, keepdim=True) / 7
    rounded.weight.data = (layer.weight / step).round().clamp(-8, 7) * step  # four bits
    rounded.bias.data = layer.bias.detach().clone()
    mix = torch.randn(32, 32) * 0.5
    train, held_out = (torch.relu(torch.randn(1000, 32) @ mix + 0.5) for _ in range(2))
    affiner = Affiner(rounded, rank=1)
    with torch.no_grad():
        before = functional.mse_loss(affiner(held_out), layer(held_out)).item()
        scale, bias = fit_scale_shift(functional.linear(train, rounded.weight), layer(train))
        affiner.scale.copy_(scale)
        affiner.shift.copy_(bias - rounded.bias)
        after = functional.mse_loss(affiner(held_out), layer(held_out)).item()
    assert after < 0.95 * before


def test_bad_rank_is_named():
    with pytest.raises(ValueError, match="rank 0"):
        Affiner(nn.Linear(2, 2), rank=0)
