"""FMViT's reference configuration: its cost, its folding on the torch level, and that the zoo lists it without building it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgekit import contracts
from edgekit.cli import listing
from edgekit.cli.inspect import inspect_model
from edgekit.contracts import Context
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import run
from edgekit.models import fmvit_reference
from edgekit.models.fmvit import Branch, Rep, affine, conv
from edgekit.passes.reparameterize.reparameterize import Reparameterize
from edgekit.progress import Reporter

NEXT_VIT_S = (31.7e6, 5.8e9)
"""Published parameters and multiply-accumulates of the neighbour whose widths the reference configuration has."""


def counted(module: nn.Module, size: int) -> tuple[int, int]:
    """Parameters and multiply-accumulates by PyTorch's own counter; the module is on the meta device."""
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 3, size, size, device="meta"))
    return sum(parameter.numel() for parameter in module.parameters()), counter.get_total_flops() // 2


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make().eval()


def test_deployed_cost_is_that_of_the_reference_configuration():
    parameters, macs = counted(on_meta(fmvit_reference.network).deploy(), 224)
    assert parameters == 31_731_720
    assert round(macs / 1e9, 3) == 5.794
    assert parameters == pytest.approx(NEXT_VIT_S[0], rel=0.002)
    assert macs == pytest.approx(NEXT_VIT_S[1], rel=0.002)


def test_figures_that_the_zoo_states_are_true(monkeypatch):
    for model, make in ((fmvit_reference.MODEL, fmvit_reference.network), (fmvit_reference.TINY, fmvit_reference.tiny_network)):
        assert (model.parameters, model.macs) == counted(on_meta(make), model.input_shape[-1])
    monkeypatch.setitem(contracts.models._local, "fmvit_tiny", fmvit_reference.TINY)
    inspected = inspect_model("fmvit_tiny", [], None, top=0)  # what listing would show if the model did not state it
    assert (inspected["parameters"], inspected["macs"]) == (fmvit_reference.TINY.parameters, fmvit_reference.TINY.macs)


def test_listing_does_not_build_a_model_that_states_its_cost(monkeypatch):
    def build():
        raise AssertionError("built")

    known = contracts.ZooModel("known", build, (1, 3, 8, 8), parameters=5, macs=7)
    monkeypatch.setattr(contracts.models, "load_all", lambda: ({"known": known}, []))
    (found,) = listing.list_models(Reporter()).found
    assert (found["parameters"], found["macs"], found["input"]) == (5, 7, "1×3×8×8")


def test_listing_does_not_import_torch():
    code = "import sys; from edgekit.models.fmvit_reference import MODEL; print('torch' in sys.modules, MODEL.parameters)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "51124360"]


def test_it_says_that_it_is_no_official_model():
    for model in (fmvit_reference.MODEL, fmvit_reference.TINY):
        assert "no official code or weights exist; random weights" in model.source
        assert model.accuracy is None


@pytest.fixture(scope="module")
def full():
    return fmvit_reference.build()


def images(batch: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(batch, 3, size // 8, size // 8, generator=generator)
    return nn.functional.interpolate(coarse, scale_factor=8) + 0.3 * torch.randn(batch, 3, size, size, generator=generator)


def relative(result: torch.Tensor, reference: torch.Tensor) -> float:
    return float((result - reference).abs().max() / reference.abs().max())


@pytest.mark.slow
@torch.no_grad()
def test_full_model_deploys_to_the_same_function(full):
    x = images(2, 32)
    reference = full(x)
    assert reference.isfinite().all()
    assert (reference[0] - reference[1]).std() > 0.03 * reference.std()  # the answer depends on the image
    assert relative(full.deploy()(x), reference) <= 1e-4
    kinds = Counter(type(layer).__name__ for layer in full.modules())
    assert kinds["BatchNorm2d"] == kinds["Branch"] == 0
    assert sum(parameter.numel() for parameter in full.parameters()) == 31_731_720


@torch.no_grad()
@pytest.mark.parametrize("size", [64, 96, pytest.param(224, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)])
def test_training_form_equals_deployed_form(size):
    module, x = fmvit_reference.build_tiny(), images(2, size)
    reference = module(x)
    assert relative(module.deploy().deploy()(x), reference) <= 1e-4  # the second time it changes nothing


@torch.no_grad()
def test_training_form_equals_deployed_form_in_float64():
    module, x = fmvit_reference.build_tiny().double(), images(1, 64).double()
    reference = module(x)
    assert relative(module.deploy()(x), reference) <= 1e-11


def test_compiler_reaches_the_form_that_the_module_folds_itself_into():
    module, x = fmvit_reference.build_tiny(), images(1, 64)

    def exported() -> ir.Model:
        program = torch.onnx.export(module, (x,), dynamo=True, opset_version=23, optimize=False, verbose=False)
        return canonicalize(program.model)

    model, reference = exported(), module(x).detach().numpy()
    module.deploy()
    deployed = exported()
    assert Reparameterize().apply(model, Context()) > 0
    found, wanted = (Counter(node.op_type for node in graph.graph) for graph in (model, deployed))
    assert found["BatchNormalization"] == 0
    assert found["Conv"] == wanted["Conv"]
    assert cost(model).macs <= cost(deployed).macs
    assert cost(model).bytes <= cost(deployed).bytes
    (result,) = run(model, {model.graph.inputs[0].name: x.numpy()}).values()
    assert np.abs(result - reference).max() <= 1e-4 * np.abs(reference).max()


def test_weights_are_the_same_every_time_and_the_random_state_stays():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = fmvit_reference.build_tiny().state_dict(), fmvit_reference.build_tiny().state_dict()
    assert torch.equal(torch.rand(4), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    variances = torch.cat([tensor for name, tensor in first.items() if name.endswith("running_var")])
    assert 0.5 <= variances.min() < variances.max() <= 1.5


@torch.no_grad()
def test_branches_of_different_groups_are_one_convolution_by_the_defining_sum():
    torch.manual_seed(0)
    layers = [conv(8, 12, 1, groups=g) for g in (1, 2, 4)]
    norms = [nn.BatchNorm2d(12).eval() for _ in layers]
    for norm in norms:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.normal_()
        norm.bias.normal_()
    rep = Rep([Branch(layer, norm) for layer, norm in zip(layers, norms, strict=True)], 1, 1, 8, 12)
    x = torch.randn(2, 8, 5, 3)
    expected = np.zeros((2, 12, 5, 3))
    for layer, norm, groups in zip(layers, norms, (1, 2, 4), strict=True):
        weight, (scale, shift) = layer.weight.double().numpy(), (part.numpy() for part in affine(norm))
        for out in range(12):
            first = out // (12 // groups) * (8 // groups)
            total = sum(weight[out, i, 0, 0] * x[:, first + i].double().numpy() for i in range(8 // groups))
            expected[:, out] += scale[out] * total + shift[out]
    for _ in range(2):
        np.testing.assert_allclose(rep(x).numpy(), expected, rtol=0, atol=1e-5)
        rep.deploy()
    assert isinstance(rep.rep, nn.Conv2d)


def test_groups_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="2 groups are not a multiple of 4"):
        Branch(conv(8, 8, 1, groups=2), None).folded(1, 4, 8)
