"""Fusion of the attention that exporters write, against the same graph before in ONNX Runtime."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx_ir as ir
import pytest
import torch


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


modules, support = _beside("attention_modules"), _beside("attention_support")
fused, unchanged = support.fused, support.unchanged
DYNAMO, SCRIPT = support.DYNAMO, support.SCRIPT
MINUS_INFINITY = support.MINUS_INFINITY
LOWEST = support.LOWEST
tensor = support.tensor
export = support.export
count = support.count
the_attention = support.the_attention
attributes = support.attributes

Q, K, V = tensor(2, 4, 5, 8, seed=1), tensor(2, 4, 6, 8, seed=2), tensor(2, 4, 6, 3, seed=3)
SHORT_K, SHORT_V = K[:, :2].contiguous(), V[:, :2].contiguous()
X = tensor(2, 5, 16)
KEEP = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 0, 0], [1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
MODERN = [(DYNAMO, 18), (DYNAMO, 20), (SCRIPT, 14), (SCRIPT, 17)]
ALL = [(DYNAMO, 18), (DYNAMO, 20), (DYNAMO, 23), (SCRIPT, 11), (SCRIPT, 13), (SCRIPT, 17)]
FEW = [(DYNAMO, 18), (SCRIPT, 11), (SCRIPT, 17)]


@pytest.mark.parametrize(("exporter", "opset"), MODERN)
@pytest.mark.parametrize("mask", ["none", "boolean", "float", "causal"])
def test_sdpa(fused, exporter, opset, mask):
    arguments = (Q, K, V, *{"boolean": (KEEP.bool(),), "float": (tensor(5, 6),)}.get(mask, ()))
    model = fused(export(modules.Sdpa(is_causal=mask == "causal"), arguments, exporter, opset), arguments)
    assert attributes(model) == ({"is_causal": 1} if mask == "causal" else {})  # the scale is the default
    assert len(the_attention(model).inputs) == (4 if len(arguments) == 4 else 3)
    assert count(model, "Transpose") == count(model, "Mul") == count(model, "Reshape") == 0


@pytest.mark.parametrize(("exporter", "opset"), [(DYNAMO, 18), (SCRIPT, 17)])
def test_sdpa_row_that_hides_every_key(fused, exporter, opset):
    """The exporters differ: dynamo fills with the lowest number, whose Softmax is a mean; TorchScript guards against NaN and gives 0."""
    keep = KEEP.bool().clone()
    keep[2] = False
    fused(export(modules.Sdpa(), (Q, K, V, keep), exporter, opset), (Q, K, V, keep))


def test_sdpa_at_opset_23_is_whole_already(unchanged):
    model = export(modules.Sdpa(), (Q, K, V), DYNAMO, 23)
    assert count(model, "Attention") == 1
    unchanged(model)


def test_sdpa_grouped(fused):
    arguments = (Q, SHORT_K, SHORT_V)
    model = fused(export(modules.Sdpa(enable_gqa=True), arguments, DYNAMO, 18), arguments)
    assert [value.name for value in the_attention(model).inputs] == [value.name for value in model.graph.inputs]
    assert len(model.graph) == 1


@pytest.mark.parametrize(("exporter", "opset"), ALL)
def test_scale_after_the_product(fused, exporter, opset):
    model = fused(export(modules.Product(), (Q, K, V), exporter, opset), (Q, K, V))
    assert attributes(model) == {"scale": pytest.approx(0.3)}
    assert len(model.graph) == 1


@pytest.mark.parametrize(("exporter", "opset"), [(DYNAMO, 18), (DYNAMO, 23), (SCRIPT, 13), (SCRIPT, 17)])
@pytest.mark.parametrize("shape", [(2, 5, 16), (1, 5, 16)])
def test_multi_head_attention_with_weights(fused, exporter, opset, shape):
    model = fused(export(modules.MultiHead(weights=True), (tensor(*shape),), exporter, opset), (tensor(*shape),))
    assert the_attention(model).inputs[0].shape == ir.Shape([shape[0], 2, 5, 8])
    assert attributes(model) == {}
    assert count(model, "Mul") == 0


@pytest.mark.parametrize(("exporter", "opset"), [(DYNAMO, 20), (SCRIPT, 14)])
def test_multi_head_attention(fused, exporter, opset):
    fused(export(modules.MultiHead(weights=False), (X,), exporter, opset), (X,))


@pytest.mark.parametrize(("exporter", "opset"), ALL)
def test_vision_transformer(fused, exporter, opset):
    model = export(modules.Timm(), (X,), exporter, opset)
    transposes = count(model, "Transpose")
    fused(model, (X,))
    assert attributes(model) == {}
    assert count(model, "Transpose") == transposes - 1
    assert count(model, "Mul") == count(model, "Div") == 0


@pytest.mark.parametrize(("exporter", "opset"), FEW)
@pytest.mark.parametrize(("windows", "batch"), [(0, 2), (3, 1), (3, 2)])
def test_window_attention(fused, exporter, opset, windows, batch):
    x = tensor(batch * max(windows, 1), 4, 16)
    model = fused(export(modules.Window(windows), (x,), exporter, opset), (x,))
    mask = the_attention(model).inputs[3]
    assert mask.is_initializer()
    assert list(mask.shape) == [1 if not windows else x.shape[0], 2, 4, 4]


@pytest.mark.parametrize(("exporter", "opset"), FEW)
def test_bert(fused, exporter, opset):
    arguments = (X, torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]))
    model = fused(export(modules.Bert(), arguments, exporter, opset), arguments)
    assert list(the_attention(model).inputs[3].shape) == [2, 1, 5, 5]  # ONNX Runtime does not broadcast the queries


@pytest.mark.parametrize(("exporter", "opset"), [(DYNAMO, 18), (SCRIPT, 14), (SCRIPT, 17)])
def test_grouped_queries_and_causal_mask(fused, exporter, opset):
    model = fused(export(modules.Grouped(), (Q, SHORT_K, SHORT_V), exporter, opset), (Q, SHORT_K, SHORT_V))
    assert [value.name for value in the_attention(model).inputs] == [value.name for value in model.graph.inputs]
    assert attributes(model) == {"is_causal": 1}
    assert len(model.graph) == 1


@pytest.mark.parametrize(("exporter", "opset"), FEW)
@pytest.mark.parametrize("fill", [MINUS_INFINITY, LOWEST, -1e4])
def test_masked_fill(fused, exporter, opset, fill):
    keep = KEEP.clone()
    if fill != MINUS_INFINITY:
        keep[1] = 0  # a row that hides every key: the mean of the values
    model = fused(export(modules.Filled(fill), (Q, K, V, keep), exporter, opset), (Q, K, V, keep))
    assert the_attention(model).inputs[3].dtype == (ir.DataType.BOOL if fill == MINUS_INFINITY else ir.DataType.FLOAT)


@pytest.mark.parametrize(("exporter", "opset"), [(DYNAMO, 18), (SCRIPT, 17)])
@pytest.mark.parametrize(
    ("scores", "result", "axes"),
    [
        ("bhid,bhjd->bhij", "bhij,bhjd->bhid", (0, 1, 2, 3)),
        ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", (0, 2, 1, 3)),
        ("bqhd,bkhd->bhqk", "bhqk,bkhd->bhdq", (0, 2, 1, 3)),
    ],
)
def test_einsum(fused, exporter, opset, scores, result, axes):
    arguments = tuple(x.permute(axes).contiguous() for x in (Q, K, V))
    fused(export(modules.Letters(scores, result), arguments, exporter, opset), arguments)


@pytest.mark.parametrize(("exporter", "opset"), [(DYNAMO, 20), (SCRIPT, 11)])
def test_tokens_last(fused, exporter, opset):
    arguments = tuple(x.transpose(2, 3).contiguous() for x in (Q, K, V))
    fused(export(modules.Channels(), arguments, exporter, opset), arguments)


@pytest.mark.parametrize(("exporter", "opset"), [(DYNAMO, 18), (SCRIPT, 13)])
def test_softcap(fused, exporter, opset):
    arguments = (Q, K, V, tensor(5, 6))
    model = fused(export(modules.SoftCap(), arguments, exporter, opset), arguments)
    assert attributes(model) == {"scale": pytest.approx(0.5), "softcap": pytest.approx(3.0)}
