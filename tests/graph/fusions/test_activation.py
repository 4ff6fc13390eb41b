"""Activations in the dialects of exporters become whole operators with the same values."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgekit.graph.fusions.activation import fuse_activations


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support, exporting = _beside("fusion_support"), _beside("attention_support")
NUMBERS = {
    "half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "six": 6.0, "zero": 0.0, "sixth": 1 / 6, "minus": -1.0,
    "root2": np.sqrt(2), "inv_root2": np.sqrt(0.5), "short": 0.7071, "cubic": 0.044715, "slope": np.sqrt(2 / np.pi), "quick": 1.702,
    "quick_inverse": 1 / 1.702, "tenth": 0.1, "fifth": 0.2, "big": 20.0, "k": np.sqrt(8 / np.pi), "off": 1.0001 * np.sqrt(0.5),
}  # fmt: skip


def graph(body: str, opset: int = 23, outputs: str = "float[2, 7] y", **arrays: np.ndarray) -> ir.Model:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    initializers = {name: np.float32(value) for name, value in NUMBERS.items() if name in words} | arrays
    return support.graph(f"(float[2, 7] x) => ({outputs}) {{ {body} }}", opset, **initializers)


ERF = "a = Div(x, root2) b = Erf(a) c = Add(b, one) "
TANH = "a = Mul(x, x) b = Mul(a, x) c = Mul(b, cubic) d = Add(x, c) e = Mul(d, slope) f = Tanh(e) g = Add(f, one) "
GATE = "a = Add(x, three) b = Clip(a, zero, six) "
FORMS = {
    "gelu x/√2, half last": (ERF + "d = Mul(x, c) y = Mul(d, half)", "Gelu"),
    "gelu half first": (ERF + "d = Mul(half, x) y = Mul(d, c)", "Gelu"),
    "gelu half on the gate": (ERF + "d = Mul(half, c) y = Mul(d, x)", "Gelu"),
    "gelu divided by two": (ERF + "d = Mul(c, x) y = Div(d, two)", "Gelu"),
    "gelu half inside": ("a = Mul(inv_root2, x) b = Erf(a) c = Mul(b, half) d = Add(half, c) y = Mul(d, x)", "Gelu"),
    "gelu of an odd argument": ("n = Neg(x) a = Mul(n, inv_root2) b = Erf(a) c = Sub(one, b) d = Mul(x, c) y = Mul(d, half)", "Gelu"),
    "gelu with four digits": ("a = Mul(x, short) b = Erf(a) c = Add(one, b) d = Mul(x, c) y = Mul(half, d)", "Gelu"),
    "gelu tanh by products": (TANH + "h = Mul(x, g) y = Mul(half, h)", "Gelu"),
    "gelu tanh by power": ("a = Pow(x, three) b = Mul(cubic, a) c = Add(b, x) d = Mul(slope, c) e = Tanh(d) f = Add(one, e) "
                           "g = Mul(half, x) y = Mul(g, f)", "Gelu"),
    "gelu tanh by Horner": ("a = Mul(x, x) b = Mul(a, cubic) c = Add(b, one) d = Mul(x, c) e = Mul(d, slope) f = Tanh(e) "
                            "g = Mul(f, half) h = Add(g, half) y = Mul(x, h)", "Gelu"),
    "gelu tanh by a sigmoid": ("a = Pow(x, three) b = Mul(cubic, a) c = Add(x, b) d = Mul(c, k) e = Sigmoid(d) y = Mul(x, e)", "Gelu"),
    "hard swish, clip": (GATE + "c = Mul(x, b) y = Div(c, six)", "HardSwish"),
    "hard swish, gate first": (GATE + "c = Div(b, six) y = Mul(c, x)", "HardSwish"),
    "hard swish, sixth": (GATE + "c = Mul(x, sixth) y = Mul(c, b)", "HardSwish"),
    "hard swish, relu6": ("a = Add(three, x) r = Relu(a) b = Min(r, six) c = Mul(b, x) y = Mul(c, sixth)", "HardSwish"),
    "hard swish, max min": ("a = Add(x, three) r = Max(a, zero) b = Min(six, r) c = Mul(b, x) y = Div(c, six)", "HardSwish"),
    "hard swish, unit clip": ("a = Mul(x, sixth) s = Add(a, half) b = Clip(s, zero, one) y = Mul(b, x)", "HardSwish"),
    "hard swish, operator": ("b = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(b, x)", "HardSwish"),
    "hard sigmoid": (GATE + "y = Div(b, six)", "HardSigmoid"),
    "hard sigmoid, Keras": ("a = Mul(x, fifth) s = Add(a, half) y = Clip(s, zero, one)", "HardSigmoid"),
    "hard sigmoid, relu6": ("a = Add(x, three) r = Relu(a) b = Min(r, six) y = Mul(b, sixth)", "HardSigmoid"),
    "mish": ("a = Softplus(x) b = Tanh(a) y = Mul(b, x)", "Mish"),
    "mish by exp": ("a = Exp(x) b = Add(one, a) c = Log(b) d = Tanh(c) y = Mul(x, d)", "Mish"),
    "softplus": ("a = Exp(x) b = Add(a, one) y = Log(b)", "Softplus"),
    "softplus, stable": ("p = Relu(x) a = Abs(x) n = Neg(a) e = Exp(n) b = Add(one, e) l = Log(b) y = Add(p, l)", "Softplus"),
    "softplus, threshold": ("s = Softplus(x) g = Greater(x, big) y = Where(g, x, s)", "Softplus"),
    "sigmoid": ("n = Neg(x) e = Exp(n) a = Add(e, one) y = Reciprocal(a)", "Sigmoid"),
    "sigmoid, divided": ("n = Mul(x, minus) e = Exp(n) a = Add(one, e) y = Div(one, a)", "Sigmoid"),
    "leaky relu": ("a = Mul(tenth, x) y = Max(a, x)", "LeakyRelu"),
    "leaky relu, chosen": ("c = Greater(x, zero) a = Mul(x, tenth) y = Where(c, x, a)", "LeakyRelu"),
    "leaky relu, Keras": ("p = Relu(x) n = Neg(x) m = Relu(n) a = Mul(tenth, m) y = Sub(p, a)", "LeakyRelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_forms_become_one_operator(name):
    body, expected = FORMS[name]
    model = support.check(fuse_activations, graph(body), {expected: 1})
    node = support.one(model, expected)
    if expected == "Gelu":
        assert node.attributes["approximate"].value == ("tanh" if "tanh" in name else "none")
    if expected == "LeakyRelu":
        assert node.attributes["alpha"].value == pytest.approx(0.1)


def test_a_threshold_of_a_scaled_softplus():
    body = "s = Mul(x, two) p = Softplus(s) q = Div(p, two) g = Greater(s, big) y = Where(g, x, q)"
    support.check(fuse_activations, graph(body), {"Mul": 1, "Softplus": 1, "Div": 1}, 1)


def test_prelu_with_a_slope_per_channel():
    slope = support.random(7, seed=3)
    body = "p = Relu(x) n = Neg(x) m = Relu(n) a = Mul(w, m) y = {}(p, a)"
    model = support.check(fuse_activations, graph(body.format("Sub"), w=slope), {"PRelu": 1}, 1)
    np.testing.assert_array_equal(support.one(model, "PRelu").inputs[1].const_value.numpy(), slope)
    assert support.one(model, "PRelu").inputs[1].name == "w"
    model = support.check(fuse_activations, graph(body.format("Add"), w=-slope), {"PRelu": 1}, 1)
    np.testing.assert_array_equal(support.one(model, "PRelu").inputs[1].const_value.numpy(), slope)


NEAR_MISSES = {
    "another power": "a = Pow(x, two) b = Mul(cubic, a) c = Add(b, x) d = Mul(slope, c) e = Tanh(d) f = Add(one, e) g = Mul(half, x) "
    "y = Mul(g, f)",
    "no half": ERF + "y = Mul(x, c)",
    "another shift": "a = Div(x, root2) b = Erf(a) c = Add(b, half) d = Mul(x, c) y = Mul(d, half)",
    "another scale": "a = Div(x, two) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)",
    "erf times another value": "z = Abs(x) a = Div(x, root2) b = Erf(a) c = Add(b, one) d = Mul(z, c) y = Mul(d, half)",
    "a constant off by 1e-4": "a = Mul(x, off) b = Erf(a) c = Add(one, b) d = Mul(x, c) y = Mul(half, d)",
    "clip to another number": "a = Add(x, three) b = Clip(a, zero, three) c = Mul(x, b) y = Div(c, six)",
    "clip of another shift": "a = Add(x, two) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)",
    "relu6": "y = Clip(x, zero, six)",
    "clip to one": "y = Clip(x, zero, one)",
    "mish of another value": "z = Abs(x) a = Softplus(z) b = Tanh(a) y = Mul(b, x)",
    "log of 2 + exp": "a = Exp(x) b = Add(a, two) y = Log(b)",
    "a low threshold": "s = Softplus(x) g = Greater(x, one) y = Where(g, x, s)",
    "a larger slope than one": "a = Mul(two, x) y = Max(a, x)",
    "chosen the wrong way": "c = Greater(x, zero) a = Abs(x) y = Where(c, a, x)",
    "silu in order": "s = Sigmoid(x) y = Mul(x, s)",
    "quick gelu in order": "a = Mul(x, quick) s = Sigmoid(a) y = Mul(x, s)",
    "a gate of another value": "z = Abs(x) s = Sigmoid(z) y = Mul(s, x)",
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name):
    support.unchanged(fuse_activations, graph(NEAR_MISSES[name]))


READ = {
    "erf": (ERF + "d = Mul(x, c) y = Mul(d, half)", "b"),
    "the gate": (GATE + "c = Mul(x, b) y = Div(c, six)", "c"),
    "softplus": ("a = Softplus(x) b = Tanh(a) y = Mul(b, x)", "a"),
    "tanh": ("a = Softplus(x) b = Tanh(a) y = Mul(b, x)", "b"),
    "exp": ("a = Exp(x) b = Add(a, one) y = Log(b)", "a"),
}


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("given_out", [True, False])
def test_what_is_read_elsewhere_stays(name, given_out):
    body, inner = READ[name]
    body = body if given_out else f"{body} z = Cos({inner})"
    model = graph(body, outputs=f"float[2, 7] y, float[2, 7] {inner if given_out else 'z'}")
    support.unchanged(fuse_activations, model)


SWISHES = {
    "swapped": ("s = Sigmoid(x) y = Mul(s, x)", {"Sigmoid": 1, "Mul": 1}, 1.0),
    "divided": ("n = Neg(x) e = Exp(n) a = Add(e, one) y = Div(x, a)", {"Sigmoid": 1, "Mul": 1}, 1.0),
    "times the reciprocal": ("n = Neg(x) e = Exp(n) a = Add(e, one) r = Reciprocal(a) y = Mul(r, x)", {"Sigmoid": 1, "Mul": 1}, 1.0),
    "quick, swapped": ("a = Mul(quick, x) s = Sigmoid(a) y = Mul(s, x)", {"Sigmoid": 1, "Mul": 2}, 1.702),
    "quick, by division": ("a = Div(x, quick_inverse) s = Sigmoid(a) y = Mul(x, s)", {"Sigmoid": 1, "Mul": 2}, 1.702),
}


@pytest.mark.parametrize("name", SWISHES)
def test_swish_has_one_order_below_opset_24(name):
    body, expected, alpha = SWISHES[name]
    model = support.check(fuse_activations, graph(body), expected)
    last = list(model.graph)[-1]
    assert last.inputs[0].name == "x"
    argument = last.inputs[1].producer().inputs[0]
    if alpha == 1:
        assert argument.name == "x"
    else:
        assert argument.producer().inputs[0].name == "x"
        assert argument.producer().inputs[1].const_value.numpy() == np.float32(alpha)


@pytest.mark.parametrize("name", [*SWISHES, "in order", "quick, in order"])
def test_swish_is_one_operator_from_opset_24(name):
    in_order = {"in order": ("silu in order", 1.0), "quick, in order": ("quick gelu in order", 1.702)}
    body, alpha = (NEAR_MISSES[in_order[name][0]], in_order[name][1]) if name in in_order else (SWISHES[name][0], SWISHES[name][2])
    model = support.check(fuse_activations, graph(body, opset=24), {"Swish": 1})
    assert support.one(model, "Swish").attributes["alpha"].value == pytest.approx(alpha)


def test_the_input_of_an_activation_may_be_read_and_be_a_product():
    body = f"z = Mul(v, half) {ERF.replace('(x', '(z')} d = Mul(z, c) y = Mul(d, half)"
    model = support.graph(
        f"(float[2, 7] v) => (float[2, 7] y, float[2, 7] z) {{ {body} }}", half=np.float32(0.5), root2=np.sqrt(2), one=np.float32(1)
    )
    support.check(fuse_activations, model, {"Mul": 1, "Gelu": 1}, 1)


def test_constants_that_add_axes_stay():
    model = support.graph(f"(float[2, 7] x) => (float[1, 2, 7] y) {{ {ERF} d = Mul(x, c) y = Mul(d, half) }}",
                          half=np.full((1, 1, 1), 0.5), root2=np.sqrt(2), one=np.float32(1))  # fmt: skip
    support.unchanged(fuse_activations, model)


def test_float16_constants_are_compared_as_float16():
    numbers = {name: np.float16(NUMBERS[name]) for name in ("half", "one", "root2")}
    model = support.graph(f"(float16[2, 7] x) => (float16[2, 7] y) {{ {ERF} d = Mul(x, c) y = Mul(d, half) }}", **numbers)
    assert fuse_activations(model) == 1
    assert support.operators(model) == {"Gelu": 1}


def test_old_opsets_stay():
    support.unchanged(fuse_activations, graph(ERF + "d = Mul(x, c) y = Mul(d, half)", opset=18))


class QuickGelu(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Relu6Swish(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * nn.functional.relu6(x + 3) / 6


class NewGelu(nn.Module):
    """As GPT-2 is written."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3.0))))


MODULES = {
    "gelu": (nn.GELU(), {"Gelu": 1}),
    "gelu tanh": (nn.GELU("tanh"), {"Gelu": 1}),
    "new gelu": (NewGelu(), {"Gelu": 1}),
    "silu": (nn.SiLU(), {"Sigmoid": 1, "Mul": 1}),
    "quick gelu": (QuickGelu(), {"Sigmoid": 1, "Mul": 2}),
    "hard swish": (nn.Hardswish(), {"HardSwish": 1}),
    "relu6 swish": (Relu6Swish(), {"HardSwish": 1}),
    "hard sigmoid": (nn.Hardsigmoid(), {"HardSigmoid": 1}),
    "mish": (nn.Mish(), {"Mish": 1}),
    "softplus": (nn.Softplus(), {"Softplus": 1}),
}


@pytest.mark.parametrize(("exporter", "opset"), support.EXPORTS)
def test_exported_modules(exporter, opset):
    for name, (module, expected) in MODULES.items():
        x = torch.from_numpy(support.random(2, 7, seed=5))
        model = exporting.export(module, (x,), exporter, opset)
        fuse_activations(model)
        assert support.operators(model) == expected, name
        (actual,) = support.run(model, {model.graph.inputs[0].name: x.numpy()})
        np.testing.assert_allclose(actual, module.double()(x.double()).numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
        support.unchanged(fuse_activations, model)
