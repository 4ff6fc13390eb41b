"""Linear layers in the dialects of exporters get one form with the same values."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgekit.graph.fusions.linear import unify_linear
from edgekit.graph.parameters import PARAMETER, is_marked


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support, exporting = _beside("fusion_support"), _beside("attention_support")
random, graph = support.random, support.graph
LINEAR = {"MatMul": 1, "Add": 1}


def assert_linear(model: ir.Model, columns: int) -> None:
    matmul, add = support.one(model, "MatMul"), support.one(model, "Add")
    assert matmul.inputs[1].is_initializer()
    assert add.inputs[0].producer() is matmul
    assert add.inputs[1].shape == [columns]
    assert (matmul.inputs[1].name, add.inputs[1].name) == ("w", "b")


GEMMS = {
    "PyTorch": ("Gemm<transB = 1>(x, w, b)", (3, 4), (3,)),
    "plain": ("Gemm(x, w, b)", (4, 3), (3,)),
    "row": ("Gemm(x, w, b)", (4, 3), (1, 3)),
    "scaled": ("Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, b)", (3, 4), (3,)),
    "scaled weight": ("Gemm<alpha = 0.5>(x, w, b)", (4, 3), (3,)),
    "one number": ("Gemm(x, w, b)", (4, 3), ()),
}


@pytest.mark.parametrize("name", GEMMS)
def test_gemms(name):
    call, weight, bias = GEMMS[name]
    model = graph(f"(float[2, 4] x) => (float[2, 3] y) {{ y = {call} }}", w=random(*weight), b=random(*bias, seed=1))
    for key in "wb":
        model.graph.initializers[key].metadata_props[PARAMETER] = "1"
    assert_linear(support.check(unify_linear, model, LINEAR, 1), 3)
    assert is_marked(support.one(model, "MatMul").inputs[1])
    assert is_marked(support.one(model, "Add").inputs[1])


def test_gemm_without_bias():
    model = graph("(float[2, 4] x) => (float[2, 3] y) { y = Gemm<transB = 1>(x, w) }", w=random(3, 4))
    support.check(unify_linear, model, {"MatMul": 1}, 1)


def test_gemms_that_share_a_weight_share_it_afterwards():
    body = "a = Gemm<transB = 1>(x, w, b) r = Relu(a) y = Gemm<transB = 1>(r, w, c)"
    model = graph(f"(float[2, 4] x) => (float[2, 4] y) {{ {body} }}", w=random(4, 4), b=random(4, seed=1), c=random(4, seed=2))
    support.check(unify_linear, model, {"MatMul": 2, "Add": 2, "Relu": 1}, 2)
    assert set(model.graph.initializers) == {"w", "b", "c"}


GEMMS_THAT_STAY = {
    "transposed data": "(float[4, 2] x) => (float[2, 3] y) { y = Gemm<transA = 1>(x, w, b) }",
    "weight from outside": "(float[2, 4] x, float[4, 3] w) => (float[2, 3] y) { y = Gemm(x, w, b) }",
    "bias from outside": "(float[2, 4] x, float[3] b) => (float[2, 3] y) { y = Gemm(x, w, b) }",
    "bias per row": "(float[2, 4] x) => (float[2, 3] y) { y = Gemm(x, w, rows) }",
    "weight of an embedding": "(float[2, 4] x, int64[2] i) => (float[2, 3] y, float[2, 4] e) "
    "{ y = Gemm<transB = 1>(x, t, b) e = Gather(t, i) }",
}


@pytest.mark.parametrize("name", GEMMS_THAT_STAY)
def test_gemms_that_stay(name):
    text = GEMMS_THAT_STAY[name]
    arrays = {"w": random(4, 3), "b": random(3), "rows": random(2, 1), "t": random(3, 4)}
    inputs = text.split("=>")[0]
    model = graph(text, **{key: array for key, array in arrays.items() if f" {key})" not in inputs and f" {key}," not in inputs
                           and (f"{key})" in text or f"{key}," in text)})  # fmt: skip
    support.unchanged(unify_linear, model)


@pytest.mark.parametrize("bias", [(3,), (1, 3), (1, 1, 3)])
def test_the_bias_comes_second(bias):
    model = graph("(float[2, 5, 4] x) => (float[2, 5, 3] y) { m = MatMul(x, w) y = Add(b, m) }", w=random(4, 3), b=random(*bias))
    assert_linear(support.check(unify_linear, model, LINEAR, 1), 3)


def test_other_sums_and_products_stay():
    for body, arrays in (
        ("m = MatMul(w, x) y = Add(b, m)", {"w": random(5, 5), "b": random(4)}),
        ("m = MatMul(x, w) y = Add(b, m)", {"w": random(4, 4), "b": random(5, 4)}),
        ("m = MatMul(x, w) y = Add(b, m)", {"w": random(4, 4), "b": np.float32(2)}),
        ("m = MatMul(x, w) y = Add(x, m)", {"w": random(4, 4)}),
    ):
        support.unchanged(unify_linear, graph(f"(float[2, 5, 4] x) => (float[2, 5, 4] y) {{ {body} }}", **arrays))


def test_tokens_need_not_be_merged():
    body = "r = Reshape(x, two) g = Gemm<transB = 1>(r, w, b) y = Reshape(g, back)"
    model = graph(
        f"(float[2, 5, 4] x) => (float[2, 5, 3] y) {{ {body} }}",
        w=random(3, 4),
        b=random(3),
        two=np.array([-1, 4]),
        back=np.array([2, 5, 3]),
    )
    assert_linear(support.check(unify_linear, model, LINEAR, 2), 3)


def test_features_may_be_split_into_heads_after():
    body = "r = Reshape(x, two) g = MatMul(r, w) y = Reshape(g, back) z = Relu(r)"
    text = f"(float[2, 5, 4] x) => (float[2, 5, 3, 2] y, float[10, 4] z) {{ {body} }}"
    model = graph(text, w=random(4, 6), two=np.array([-1, 4]), back=np.array([2, -1, 3, 2]))
    support.check(unify_linear, model, {"Reshape": 2, "MatMul": 1, "Relu": 1}, 1)
    assert support.one(model, "MatMul").inputs[0].name == "x"


def test_other_reshapes_before_a_product_stay():
    for two, weight in (([-1, 2], (2, 3)), ([5, 8], (8, 3))):
        body = "r = Reshape(x, two) g = MatMul(r, w) y = Reshape(g, back)"
        arrays = {"two": np.array(two), "w": random(*weight), "back": np.array([-1])}
        support.unchanged(unify_linear, graph(f"(float[2, 5, 4] x) => (float y) {{ {body} }}", **arrays))
    body = "r = Reshape(x, two) g = MatMul(r, w) h = Relu(g) y = Reshape(h, back)"
    arrays = {"two": np.array([-1, 4]), "w": random(4, 4), "back": np.array([2, 5, 4])}
    support.unchanged(unify_linear, graph(f"(float[2, 5, 4] x) => (float[2, 5, 4] y) {{ {body} }}", **arrays))


POINTWISE = {
    "one axis": "t = Transpose<perm = [0, 2, 1]>(x) c = Conv(t, w, b) y = Transpose<perm = [0, 2, 1]>(c)",
    "an axis put in": "t = Transpose<perm = [0, 2, 1]>(x) u = Reshape(t, deep) c = Conv(u, k, b) "
    "v = Reshape(c, flat) y = Transpose<perm = [0, 2, 1]>(v)",
    "unsqueezed": "t = Transpose<perm = [0, 2, 1]>(x) u = Unsqueeze(t, last) c = Conv(u, k, b) "
    "v = Squeeze(c, last) y = Transpose<perm = [0, 2, 1]>(v)",
}  # fmt: skip
POINTWISE_ARRAYS = {
    "w": random(3, 4, 1),
    "k": random(3, 4, 1, 1),
    "b": random(3),
    "deep": np.array([2, 4, 5, 1]),
    "flat": np.array([2, 3, 5]),
    "last": np.array([3]),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_convolutions_of_tokens(name):
    body = POINTWISE[name]
    arrays = {key: array for key, array in POINTWISE_ARRAYS.items() if f"{key})" in body or f"{key}," in body}
    model = graph(f"(float[2, 5, 4] x) => (float[2, 5, 3] y) {{ {body} }}", **arrays)
    model.graph.initializers["w" if "w" in arrays else "k"].metadata_props[PARAMETER] = "1"
    support.check(unify_linear, model, LINEAR, 1)
    weight = support.one(model, "MatMul").inputs[1]
    assert weight.name == ("w" if "w" in arrays else "k")
    assert is_marked(weight)


def test_pointwise_convolution_of_channels_last_images():
    body = "t = Transpose<perm = [0, 3, 1, 2]>(x) c = Conv(t, k) y = Transpose<perm = [0, 2, 3, 1]>(c)"
    model = graph(f"(float[2, 5, 6, 4] x) => (float[2, 5, 6, 3] y) {{ {body} }}", k=random(3, 4, 1, 1))
    support.check(unify_linear, model, {"MatMul": 1}, 1)


CONVOLUTIONS_THAT_STAY = {
    "kernel 3": ("c = Conv<pads = [1, 1]>(t, w)", random(4, 4, 3)),
    "groups": ("c = Conv<group = 2>(t, w)", random(4, 2, 1)),
    "stride": ("s = Conv<strides = [2], pads = [2, 2]>(t, w) c = Identity(s)", random(4, 4, 1)),
    "read elsewhere": ("c = Conv(t, w) z = Relu(c)", random(4, 4, 1)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS_THAT_STAY)
def test_convolutions_that_stay(name):
    middle, weight = CONVOLUTIONS_THAT_STAY[name]
    outputs = "float[2, 5, 4] y" + (", float[2, 4, 5] z" if "z" in middle else "")
    body = f"t = Transpose<perm = [0, 2, 1]>(x) {middle} y = Transpose<perm = [0, 2, 1]>(c)"
    support.unchanged(unify_linear, graph(f"(float[2, 5, 4] x) => ({outputs}) {{ {body} }}", w=weight))


BIASES = {
    "none before": ("c = Conv(x, w) y = Add(c, a)", {"w": random(4, 3, 1, 1), "a": random(1, 4, 1, 1)}),
    "added first": ("c = Conv(x, w) y = Add(a, c)", {"w": random(4, 3, 1, 1), "a": random(4, 1, 1)}),
    "to a bias": ("c = Conv(x, w, b) y = Add(c, a)", {"w": random(4, 3, 1, 1), "b": random(4), "a": random(4, 1, 1, seed=1)}),
    "one number": ("c = Conv(x, w) y = Add(c, a)", {"w": random(4, 3, 1, 1), "a": np.float32(2)}),
    "transposed": ("c = ConvTranspose(x, w) y = Add(c, a)", {"w": random(3, 4, 1, 1), "a": random(4, 1, 1)}),
}


@pytest.mark.parametrize("name", BIASES)
def test_biases_of_convolutions(name):
    body, arrays = BIASES[name]
    model = graph(f"(float[2, 3, 5, 5] x) => (float[2, 4, 5, 5] y) {{ {body} }}", **arrays)
    operator = "ConvTranspose" if name == "transposed" else "Conv"
    node = support.one(support.check(unify_linear, model, {operator: 1}, 1), operator)
    assert node.inputs[2].shape == [4]
    assert node.inputs[2].name == ("b" if "b" in arrays else "a" if node.inputs[2].name == "a" else f"{node.name}.bias")


def test_other_sums_after_convolutions_stay():
    weight = random(4, 3, 1, 1)
    for body, arrays in (
        ("c = Conv(x, w) y = Add(c, a)", {"a": random(1, 4, 5, 5)}),
        ("c = Conv(x, w) y = Add(c, a)", {"a": random(2, 1, 1, 1)}),
        ("c = Conv(x, w) y = Add(c, c)", {}),
        ("c = Conv(x, w) z = Relu(c) y = Add(c, a)", {"a": random(4, 1, 1)}),
    ):
        outputs = "float[2, 4, 5, 5] y" + (", float[2, 4, 5, 5] z" if "z =" in body else "")
        support.unchanged(unify_linear, graph(f"(float[2, 3, 5, 5] x) => ({outputs}) {{ {body} }}", w=weight, **arrays))


def test_a_shared_bias_stays_for_others():
    body = "c = Conv(x, w) d = Add(c, a) y = Mul(d, a)"
    model = graph(f"(float[2, 3, 5, 5] x) => (float[2, 4, 5, 5] y) {{ {body} }}", w=random(4, 3, 1, 1), a=random(4, 1, 1))
    support.check(unify_linear, model, {"Conv": 1, "Mul": 1}, 1)


class PointwiseTokens(nn.Module):
    """A linear layer written as a convolution, as in SegFormer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2)).transpose(1, 2)


MODULES = {
    "rank 2": (lambda: nn.Linear(4, 3), (2, 4), LINEAR),
    "rank 3": (lambda: nn.Linear(4, 3), (2, 5, 4), LINEAR),
    "rank 4": (lambda: nn.Linear(4, 3), (2, 5, 6, 4), LINEAR),
    "no bias": (lambda: nn.Linear(4, 3, bias=False), (2, 4), {"MatMul": 1}),
    "pointwise": (PointwiseTokens, (2, 5, 4), LINEAR),
}


@pytest.mark.parametrize(("exporter", "opset"), support.EXPORTS)
def test_exported_modules(exporter, opset):
    for name, (build, shape, expected) in MODULES.items():
        module, x = build(), torch.from_numpy(random(*shape, seed=5))
        model = exporting.export(module, (x,), exporter, opset)
        unify_linear(model)
        assert support.operators(model) == expected, name
        (actual,) = support.run(model, {model.graph.inputs[0].name: x.numpy()})
        np.testing.assert_allclose(actual, module.double()(x.double()).detach().numpy(), rtol=1e-5, atol=1e-5, err_msg=name)
        assert support.one(model, "MatMul").inputs[1].name in ("weight", "conv.weight")
        support.unchanged(unify_linear, model)


def test_a_bias_per_row_is_none_per_column_though_there_are_as_many():
    model = graph("(float[3, 4] x) => (float[3, 3] y) { y = Gemm(x, w, b) }", w=random(4, 3), b=random(3, 1))
    support.unchanged(unify_linear, model)
    model = graph("(float[2, 5, 4] x) => (float[2, 5, 5] y) { m = MatMul(x, w) y = Add(m, b) }", w=random(4, 5), b=random(5, 1))
    support.unchanged(unify_linear, model)
