"""Normalizations in the dialects of exporters become whole operators with the same values."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from edgekit.graph.fusions.layout import merge_layout
from edgekit.graph.fusions.normalization import fuse_normalizations


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support, exporting = _beside("fusion_support"), _beside("attention_support")
random = support.random
NUMBERS = {"eps": 1e-5, "two": 2.0, "three": 3.0, "half": 0.5, "minus_half": -0.5, "one": 1.0}


def graph(body: str, x: str = "2, 5, 8", axes=(-1,), outputs: str = "", opset: int = 23, **arrays) -> ir.Model:
    words = set(body.replace("(", " ").replace(")", " ").replace(",", " ").split())
    initializers = {name: np.float32(value) for name, value in NUMBERS.items() if name in words}
    initializers |= {"axes": np.array(axes, np.int64)} if "axes" in words else {}
    outputs = outputs or f"float[{x}] y"
    return support.graph(f"(float[{x}] x) => ({outputs}) {{ {body} }}", opset, **initializers, **arrays)


MEAN = "m = ReduceMean(x, axes) d = Sub(x, m) "
VARIANCE = MEAN + "p = Pow(d, two) v = ReduceMean(p, axes) "
DEVIATION = VARIANCE + "e = Add(v, eps) s = Sqrt(e) "
LAYER_NORMS = {
    "nine nodes": DEVIATION + "n = Div(d, s) g = Mul(n, w) y = Add(g, b)",
    "square by Mul": MEAN + "p = Mul(d, d) v = ReduceMean(p, axes) e = Add(eps, v) s = Sqrt(e) n = Div(d, s) g = Mul(w, n) y = Add(b, g)",
    "reciprocal": DEVIATION + "r = Reciprocal(s) n = Mul(d, r) g = Mul(n, w) y = Add(g, b)",
    "one by the root": DEVIATION + "r = Div(one, s) n = Mul(r, d) g = Mul(n, w) y = Add(g, b)",
    "negative power": VARIANCE + "e = Add(v, eps) r = Pow(e, minus_half) n = Mul(d, r) g = Mul(n, w) y = Add(g, b)",
    "positive power": VARIANCE + "e = Add(v, eps) r = Pow(e, half) n = Div(d, r) g = Mul(n, w) y = Add(g, b)",
    "scale before the division": DEVIATION + "g = Mul(w, d) n = Div(g, s) y = Add(n, b)",
    "scale on the deviation": DEVIATION + "r = Reciprocal(s) k = Mul(r, w) n = Mul(d, k) y = Add(n, b)",
    "two differences": "m = ReduceMean(x, axes) d = Sub(x, m) f = Sub(x, m) p = Pow(d, two) v = ReduceMean(p, axes) e = Add(v, eps) "
                       "s = Sqrt(e) n = Div(f, s) g = Mul(n, w) y = Add(g, b)",
    "TensorFlow": DEVIATION + "r = Reciprocal(s) k = Mul(r, w) a = Mul(x, k) c = Mul(m, k) f = Sub(b, c) y = Add(a, f)",
    "no bias": DEVIATION + "n = Div(d, s) y = Mul(n, w)",
    "no scale": DEVIATION + "n = Div(d, s) y = Add(n, b)",
    "neither": DEVIATION + "y = Div(d, s)",
    "TensorFlow, neither": DEVIATION + "r = Reciprocal(s) a = Mul(x, r) c = Mul(m, r) y = Sub(a, c)",
}  # fmt: skip


@pytest.mark.parametrize("name", LAYER_NORMS)
@pytest.mark.parametrize(("axes", "shape"), [((-1,), (8,)), ((2, 1), (5, 8)), ((-1,), (1, 1, 8))])
def test_layer_norms(name, axes, shape):
    body = LAYER_NORMS[name]
    arrays = {key: random(*shape, seed=index) for index, key in enumerate("wb") if f"{key})" in body or f"({key}," in body}
    model = support.check(fuse_normalizations, graph(body, axes=axes, **arrays), {"LayerNormalization": 1}, 1)
    node = support.one(model, "LayerNormalization")
    assert node.attributes["axis"].value == (-2 if len(axes) == 2 else -1)
    assert node.attributes["epsilon"].value == pytest.approx(1e-5)
    kept = {key for key, value in zip("wb", node.inputs[1:], strict=False) if value.name == key}
    assert kept == set(arrays)  # weights keep their names
    assert all(value.shape == ([5, 8] if len(axes) == 2 else [8]) for value in node.inputs[1:])


RMS = "p = Pow(x, two) v = ReduceMean(p, axes) e = Add(v, eps) s = Sqrt(e) "
RMS_NORMS = {
    "six nodes": RMS + "n = Div(x, s) y = Mul(n, w)",
    "square by Mul": "p = Mul(x, x) v = ReduceMean(p, axes) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s) n = Mul(x, r) y = Mul(w, n)",
    "negative power": "p = Pow(x, two) v = ReduceMean(p, axes) e = Add(v, eps) r = Pow(e, minus_half) n = Mul(r, x) y = Mul(w, n)",
    "no scale": RMS + "y = Div(x, s)",
}


@pytest.mark.parametrize("name", RMS_NORMS)
def test_rms_norms(name):
    body = RMS_NORMS[name]
    arrays = {"w": random(8)} if "w" in body else {}
    support.check(fuse_normalizations, graph(body, **arrays), {"RMSNormalization": 1}, 1)


def test_a_bias_after_an_rms_norm_stays():
    model = graph(RMS + "n = Div(x, s) g = Mul(n, w) y = Add(g, b)", w=random(8), b=random(8, seed=1))
    support.check(fuse_normalizations, model, {"RMSNormalization": 1, "Add": 1}, 1)


NEAR_MISSES = {
    "cube": (MEAN + "p = Pow(d, three) v = ReduceMean(p, axes) e = Add(v, eps) s = Sqrt(e) y = Div(d, s)", {}),
    "epsilon after the root": (VARIANCE + "r = Sqrt(v) s = Add(r, eps) y = Div(d, s)", {}),
    "negative epsilon": (VARIANCE + "e = Sub(v, eps) s = Sqrt(e) y = Div(d, s)", {}),
    "epsilon per channel": (VARIANCE + "e = Add(v, w) s = Sqrt(e) y = Div(d, s)", {"w": np.full(8, 0.1)}),
    "square of another value": (MEAN + "p = Mul(d, x) v = ReduceMean(p, axes) a = Abs(v) e = Add(a, eps) s = Sqrt(e) y = Div(d, s)", {}),
    "sum instead of mean": (MEAN + "p = Mul(d, d) v = ReduceSum(p, axes) e = Add(v, eps) s = Sqrt(e) y = Div(d, s)", {}),
    "first axis": (DEVIATION.replace("axes", "first") + "y = Div(d, s)", {"first": np.array([0])}),
    "middle axis": (DEVIATION.replace("axes", "first") + "y = Div(d, s)", {"first": np.array([1])}),
    "middle axis, RMS": (RMS.replace("axes", "first") + "y = Div(x, s)", {"first": np.array([1])}),
    "divided the other way": (DEVIATION + "y = Div(s, d)", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_stay(name):
    body, arrays = NEAR_MISSES[name]
    support.unchanged(fuse_normalizations, graph(body, **arrays))


def test_other_axes_for_mean_and_variance_are_an_rms_norm_of_the_difference():
    body = "m = ReduceMean(x, first) d = Sub(x, m) p = Pow(d, two) v = ReduceMean(p, axes) e = Add(v, eps) s = Sqrt(e) y = Div(d, s)"
    expected = {"ReduceMean": 1, "Sub": 1, "RMSNormalization": 1}
    support.check(fuse_normalizations, graph(body, first=np.array([1])), expected, 1)


@pytest.mark.parametrize("inner", ["m", "d", "p", "v", "s", "n"])
@pytest.mark.parametrize("given_out", [True, False])
def test_what_is_read_elsewhere_stays(inner, given_out):
    body = DEVIATION + "n = Div(d, s) y = Mul(n, w)"
    body = body if given_out else f"{body} z = Cos({inner})"
    size = 1 if inner in "mvs" else 8
    model = graph(body, outputs=f"float[2, 5, 8] y, float[2, 5, {size}] {inner if given_out else 'z'}", w=random(8))
    if inner == "n":  # the norm itself may be read: only its scale stays apart
        assert fuse_normalizations(model) == 1
        assert support.operators(model) == {"LayerNormalization": 1, "Mul": 1} | ({} if given_out else {"Cos": 1})
    else:
        support.unchanged(fuse_normalizations, model)


def test_a_scale_that_is_no_constant_stays_outside():
    body = DEVIATION + "n = Div(d, s) y = Mul(n, w)"
    arrays = {name: np.float32(NUMBERS[name]) for name in ("two", "eps")} | {"axes": np.array([-1])}
    model = support.graph(f"(float[2, 5, 8] x, float[8] w) => (float[2, 5, 8] y) {{ {body} }}", **arrays)
    support.check(fuse_normalizations, model, {"LayerNormalization": 1, "Mul": 1}, 1)


def test_a_scale_per_sample_stays_outside():
    model = graph(DEVIATION + "n = Div(d, s) y = Mul(n, w)", w=random(2, 1, 1))
    support.check(fuse_normalizations, model, {"LayerNormalization": 1, "Mul": 1}, 1)


def test_an_axis_attribute_is_read_too():
    model = graph(DEVIATION + "y = Div(d, s)")
    for node in model.graph:
        if node.op_type == "ReduceMean":
            node.resize_inputs(1)
            node.attributes["axes"] = ir.AttrInt64s("axes", [2])
    model.graph.initializers.pop("axes", None)
    assert fuse_normalizations(model) == 1
    assert support.operators(model) == {"LayerNormalization": 1}


def test_axes_of_length_one_do_not_count():
    model = graph(DEVIATION + "n = Div(d, s) y = Mul(n, w)", "2, 8, 1, 1", axes=(1,), w=random(8, 1, 1))
    (node,) = support.check(fuse_normalizations, model, {"GroupNormalization": 1}, 1).graph
    assert node.attributes["num_groups"].value == 1


def test_channels_first_layer_norm_stays_between_its_transposes():
    body = (
        "t = Transpose<perm = [0, 2, 3, 1]>(x) " + DEVIATION.replace("(x, ", "(t, ") + "n = Div(d, s) y = Transpose<perm = [0, 3, 1, 2]>(n)"
    )
    support.check(fuse_normalizations, graph(body, "2, 8, 3, 4"), {"Transpose": 2, "LayerNormalization": 1}, 1)
    support.unchanged(fuse_normalizations, graph(DEVIATION + "y = Div(d, s)", "2, 8, 3, 4", axes=(1,)))


def test_layer_norm_of_half_precision_computed_in_float32():
    body = (
        "f = Cast<to = 1>(x) m = ReduceMean(f, axes) d = Sub(f, m) p = Pow(d, two) v = ReduceMean(p, axes) e = Add(v, eps) s = Sqrt(e) "
        "n = Div(d, s) h = Cast<to = 10>(n) g = Mul(h, w) y = Add(g, b)"
    )
    arrays = {name: np.float32(NUMBERS[name]) for name in ("two", "eps")} | {"axes": np.array([-1])}
    arrays |= {"w": random(8).astype(np.float16), "b": random(8, seed=1).astype(np.float16)}
    model = support.graph(f"(float16[2, 5, 8] x) => (float16[2, 5, 8] y) {{ {body} }}", **arrays)
    feeds = {"x": random(2, 5, 8).astype(np.float16)}
    support.check(fuse_normalizations, model, {"LayerNormalization": 1}, 1, tolerance=2e-3, feeds=feeds)


def test_rms_norm_of_half_precision_as_llama_and_t5_write_it():
    for body in (
        "f = Cast<to = 1>(x) p = Pow(f, two) v = ReduceMean(p, axes) e = Add(v, eps) s = Sqrt(e) n = Div(f, s) "
        "h = Cast<to = 10>(n) y = Mul(w, h)",
        "f = Cast<to = 1>(x) p = Pow(f, two) v = ReduceMean(p, axes) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s) "
        "k = Cast<to = 1>(x) n = Mul(k, r) h = Cast<to = 10>(n) y = Mul(w, h)",
    ):
        arrays = {name: np.float32(NUMBERS[name]) for name in ("two", "eps")} | {"axes": np.array([-1]), "w": random(8).astype(np.float16)}
        model = support.graph(f"(float16[2, 5, 8] x) => (float16[2, 5, 8] y) {{ {body} }}", **arrays)
        feeds = {"x": random(2, 5, 8).astype(np.float16)}
        support.check(fuse_normalizations, model, {"RMSNormalization": 1}, 1, tolerance=2e-3, feeds=feeds)


AFFINE = DEVIATION + "n = Div(d, s) g = Mul(n, w) y = Add(g, b)"


@pytest.mark.parametrize(("shape", "axes"), [("2, 4, 3, 5", (2, 3)), ("2, 4, 6", (2,)), ("2, 4, 2, 3, 2", (-3, -2, -1))])
def test_instance_norms(shape, axes):
    ones = (1,) * len(axes)
    model = graph(AFFINE, shape, axes, w=random(4, *ones), b=random(1, 4, *ones, seed=1))
    node = support.one(support.check(fuse_normalizations, model, {"InstanceNormalization": 1}, 1), "InstanceNormalization")
    assert [value.name for value in node.inputs] == ["x", "w", "b"]


def test_instance_norm_without_scale_and_bias():
    support.check(fuse_normalizations, graph(DEVIATION + "y = Div(d, s)", "2, 4, 3, 5", (2, 3)), {"InstanceNormalization": 1}, 1)


def test_layer_norm_over_the_last_two_of_four_axes():
    model = graph(AFFINE, "2, 4, 3, 5", (2, 3), w=random(3, 5), b=random(5, seed=1))
    support.check(fuse_normalizations, model, {"LayerNormalization": 1}, 1)


GROUPS = "r = Reshape(x, into) {} h = Reshape(n, out) "
INSTANCE = "n = InstanceNormalization<epsilon = 0.001>(r, s, z)"
LAYER = "n = LayerNormalization<epsilon = 0.001, axis = {axis}>(r, {scale})"


def groups(middle: str, tail: str, into=(0, 3, -1), out=(2, 6, 4, 5), **arrays) -> ir.Model:
    return graph(GROUPS.format(middle) + tail, "2, 6, 4, 5", into=np.array(into), out=np.array(out), **arrays,
                 outputs="float[2, 6, 4, 5] y" if tuple(out) == (2, 6, 4, 5) else "float y")  # fmt: skip


def test_group_norms():
    per_channel = {"w": random(6, 1, 1), "b": random(1, 6, 1, 1, seed=1)}
    ones = {"s": np.ones(3), "z": np.zeros(3)}
    model = support.check(
        fuse_normalizations, groups(INSTANCE, "g = Mul(h, w) y = Add(g, b)", **ones, **per_channel), {"GroupNormalization": 1}, 1
    )
    node = support.one(model, "GroupNormalization")
    assert node.attributes["num_groups"].value == 3
    assert node.attributes["epsilon"].value == pytest.approx(1e-3)
    assert [value.name for value in node.inputs] == ["x", "w", "b"]
    layer = LAYER.format(axis=-1, scale="s")
    model = groups(layer, "g = Mul(w, h) y = Add(b, g)", s=np.ones(40), **per_channel)
    support.check(fuse_normalizations, model, {"GroupNormalization": 1}, 1)
    support.check(fuse_normalizations, groups(INSTANCE, "y = Identity(h)", **ones), {"GroupNormalization": 1}, 1)


def test_group_norm_from_means_and_variances():
    body = "r = Reshape(x, into) " + DEVIATION.replace("(x, ", "(r, ") + "n = Div(d, s) h = Reshape(n, out) g = Mul(h, w) y = Add(g, b)"
    for into, axes in (((2, 3, 40), (-1,)), ((2, 3, 2, 4, 5), (2, 3, 4))):
        model = graph(
            body, "2, 6, 4, 5", axes, into=np.array(into), out=np.array((2, 6, 4, 5)), w=random(6, 1, 1), b=random(6, 1, 1, seed=1)
        )
        support.check(fuse_normalizations, model, {"GroupNormalization": 1}, 2)


def test_what_is_no_group_norm_stays():
    ones = {"s": np.ones(3), "z": np.zeros(3)}
    for model in (
        groups(INSTANCE, "y = Mul(h, w)", s=random(3), z=np.zeros(3), w=random(6, 1, 1)),  # a scale per group
        groups(INSTANCE, "y = Mul(h, w)", s=np.ones(3), z=random(3), w=random(6, 1, 1)),
        groups(INSTANCE, "y = Cos(h)", out=(6, 2, 4, 5), **ones),  # another shape after it
        groups(INSTANCE, "y = Cos(h)", into=(1, 3, 80), **ones),  # statistics over the batch
    ):
        support.unchanged(fuse_normalizations, model)


BATCH_NORMS = {
    "divided": "d = Sub(x, m) n = Div(d, s) g = Mul(n, w) y = Add(g, b)",
    "times the reciprocal": "d = Sub(x, m) n = Mul(d, s) g = Mul(w, n) y = Add(b, g)",
    "folded scale": "d = Sub(x, m) n = Mul(s, d) y = Add(n, b)",
    "no scale": "d = Sub(x, m) n = Div(d, s) y = Add(n, b)",
}


@pytest.mark.parametrize("name", BATCH_NORMS)
@pytest.mark.parametrize("shape", ["2, 4, 3, 3", "2, 4, 7", "3, 4"])
def test_batch_norms(name, shape):
    ones = (1,) * (len(shape.split(",")) - 2)
    arrays = {
        key: random(1, 4, *ones, seed=index)
        for index, key in enumerate("mswb")
        if f"{key})" in BATCH_NORMS[name] or f"({key}," in BATCH_NORMS[name]
    }
    arrays["s"] = np.abs(arrays["s"]) + 0.3
    model = support.check(fuse_normalizations, graph(BATCH_NORMS[name], shape, **arrays), {"BatchNormalization": 1}, 1)
    assert all(value.shape == [4] for value in support.one(model, "BatchNormalization").inputs[1:])


def test_batch_norm_with_the_deviation_still_to_be_computed():
    body = "d = Sub(x, m) e = Add(v, eps) s = Sqrt(e) n = Div(d, s) g = Mul(n, w) y = Add(g, b)"
    arrays = {key: np.abs(random(1, 4, 1, 1, seed=index)) for index, key in enumerate("mvwb")}
    support.check(fuse_normalizations, graph(body, "2, 4, 3, 3", **arrays), {"BatchNormalization": 1}, 1)


def test_frozen_batch_norm():
    body = "c = Conv(x, k) g = Mul(c, w) y = Add(g, b)"
    arrays = {"k": random(4, 3, 1, 1), "w": random(1, 4, 1, 1), "b": random(1, 4, 1, 1, seed=1)}
    for text in (body, body.replace("Mul(c, w)", "Mul(w, c)")):
        model = graph(text, "2, 3, 5, 5", outputs="float[2, 4, 5, 5] y", **arrays)
        support.check(fuse_normalizations, model, {"Conv": 1, "BatchNormalization": 1}, 1)


def test_what_is_no_batch_norm_stays():
    vector, number = random(1, 4, 1, 1), np.float32(2.0)
    for body, arrays in (
        ("d = Sub(x, m) y = Div(d, s)", {"m": vector, "s": vector}),  # an image that is normalized
        ("d = Sub(x, m) n = Div(d, s) y = Add(n, b)", {"m": number, "s": number, "b": vector}),
        ("g = Mul(x, w) y = Add(g, b)", {"w": vector, "b": vector}),
        ("d = Sub(x, m) n = Div(d, s) y = Add(n, b)", {"m": vector, "s": random(4, 3, 3), "b": vector}),
        ("d = Sub(x, m) n = Div(d, s) y = Add(n, b)", {"m": vector, "s": vector * np.array([1, 0, 1, 1]).reshape(1, 4, 1, 1), "b": vector}),
        ("d = Sub(x, m) n = Div(s, d) y = Add(n, b)", {"m": vector, "s": vector, "b": vector}),
        ("d = Sub(x, m) n = Div(d, s) y = Add(n, x)", {"m": vector, "s": vector}),
    ):
        support.unchanged(fuse_normalizations, graph(body, "2, 4, 3, 3", **arrays))
    tokens = "d = Sub(x, m) n = Div(d, s) y = Add(n, b)"
    support.unchanged(fuse_normalizations, graph(tokens, m=random(8), s=random(8), b=random(8)))  # the channels are the last axis


class HandLayerNorm(nn.Module):
    """As BERT's first implementation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.bias


class HandRmsNorm(nn.Module):
    """As Llama and T5 have it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.float32)
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)).to(torch.float32)


class TokenBatchNorm(nn.Module):
    """Batch norm over the features of tokens, as LeViT and others have it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


MODULES = {
    "layer norm": (lambda: nn.LayerNorm(8), (2, 5, 8), "LayerNormalization"),
    "layer norm of two axes": (lambda: nn.LayerNorm((5, 8)), (2, 5, 8), "LayerNormalization"),
    "layer norm without weights": (lambda: nn.LayerNorm(8, elementwise_affine=False), (2, 5, 8), "LayerNormalization"),
    "layer norm by hand": (HandLayerNorm, (2, 5, 8), "LayerNormalization"),
    "RMS norm by hand": (HandRmsNorm, (2, 5, 8), "RMSNormalization"),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3, 3), "GroupNormalization"),
    "group norm without weights": (lambda: nn.GroupNorm(2, 4, affine=False), (2, 4, 3, 3), "GroupNormalization"),
    "instance norm": (lambda: nn.InstanceNorm2d(4, affine=True), (2, 4, 3, 3), "InstanceNormalization"),
    "batch norm": (lambda: nn.BatchNorm1d(4), (2, 4, 5), "BatchNormalization"),
    "batch norm of tokens": (TokenBatchNorm, (2, 5, 8), "BatchNormalization"),
}


@pytest.mark.parametrize(("exporter", "opset"), support.EXPORTS)
def test_exported_modules(exporter, opset):
    for name, (build, shape, expected) in MODULES.items():
        module, x = build(), torch.from_numpy(random(*shape, seed=5, mean=3.0))
        torch.manual_seed(1)
        for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.data = torch.rand_like(tensor) + 0.5 if "var" in key else torch.randn_like(tensor)
        model = exporting.export(module, (x,), exporter, opset)
        merge_layout(model)  # takes the casts to float32 off
        fuse_normalizations(model)
        found = support.operators(model)
        found.pop("Transpose", None)
        assert found == {expected: 1}, name
        (actual,) = support.run(model, {model.graph.inputs[0].name: x.numpy()})
        reference = module.double()(x.double()).detach().numpy()
        np.testing.assert_allclose(actual, reference, rtol=1e-5, atol=1e-5 * np.abs(reference).max(), err_msg=name)
        support.unchanged(fuse_normalizations, model)
        weights = [value for value in support.one(model, expected).inputs[1:] if value is not None]
        assert all(value.is_initializer() for value in weights)


def test_rms_norm_of_pytorch():
    for opset in support.DYNAMO_OPSETS:
        x = torch.from_numpy(random(2, 5, 8, seed=5))
        model = exporting.export(nn.RMSNorm(8), (x,), "dynamo", opset)
        merge_layout(model)
        fuse_normalizations(model)
        assert support.operators(model) == {"RMSNormalization": 1}


def test_weights_stay_parameters_of_the_module():
    from edgekit.graph.parameters import PARAMETER, is_marked

    body = DEVIATION + "n = Div(d, s) g = Mul(n, w) y = Add(g, b)"
    model = graph(body, w=random(1, 1, 8), b=random(8, seed=1))
    for name in "wb":
        model.graph.initializers[name].metadata_props[PARAMETER] = "1"
    fuse_normalizations(model)
    assert all(is_marked(value) for value in support.one(model, "LayerNormalization").inputs[1:])
