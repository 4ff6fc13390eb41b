"""BT²'s head: the facts of its algebra in float64, and what the compiler makes of it."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from edgekit.contracts import Context
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.cost import cost
from edgekit.graph.interpreter import run
from edgekit.models.bt2 import Bt2Head
from edgekit.models.layers import global_average
from edgekit.passes.reparameterize.drop_repeated import DropRepeated
from edgekit.passes.reparameterize.merge_linears import MergeLinears

SIZES = [(128, 128, 32, 2.0), (10, 12, 4, 3.0), (8, 8, 8, 0.5), (12, 6, 2, 2.0)]


@pytest.fixture(params=SIZES, ids=str)
def head(request):
    torch.manual_seed(0)
    new, old, extra, scale = request.param
    torch.set_default_dtype(torch.float64)  # a matrix that is made orthogonal in float32 stays so only to 1e-7
    try:
        return Bt2Head(new, old, extra, scale=scale, classes=3)
    finally:
        torch.set_default_dtype(torch.float32)


def features_of(head, batch=6):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, head.new + head.old, generator=generator, dtype=torch.float64)


def test_steps_equal_their_formulas(head):
    f = features_of(head).numpy()
    weight, bias = head.fc3.weight.detach().numpy(), head.fc3.bias.detach().numpy()
    p, q = head.ortholinear_p.weight.detach().numpy(), head.ortholinear_old2.weight.detach().numpy()
    parts = head.parts(torch.from_numpy(f))
    for row, new, compatible, embedding in zip(f, *(part.detach().numpy() for part in parts), strict=True):
        n = row[: head.new] / np.sqrt((row[: head.new] ** 2).sum())
        o = (weight @ np.maximum(row, 0) + bias)[: head.extra]
        z = np.concatenate([o / np.sqrt((o**2).sum()), p @ (head.scale * n)])
        np.testing.assert_allclose(new, n, rtol=1e-12)
        np.testing.assert_allclose(compatible, q @ z[: head.old], rtol=0, atol=1e-12)
        np.testing.assert_allclose(embedding, np.concatenate([q @ z[: head.old], z[head.old :]]), rtol=0, atol=1e-12)
    np.testing.assert_allclose(head.logits(parts.new).detach().numpy(), parts.new.detach().numpy() @ head.fc_out.weight.detach().numpy().T)


def test_length_of_the_embedding_is_constant(head):
    lengths = head(features_of(head)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.full_like(lengths, math.sqrt(1 + head.scale**2)), rtol=1e-12, atol=0)


def added_of(head, features):
    old = head.fc3(torch.relu(features))[:, : head.extra]
    return old / old.norm(dim=1, keepdim=True)


def test_inner_products_are_those_of_the_new_model_and_of_the_added_part(head):
    features = features_of(head)
    embedding, new, added = head(features), head.parts(features).new, added_of(head, features)
    torch.testing.assert_close(embedding @ embedding.T, added @ added.T + head.scale**2 * new @ new.T, rtol=0, atol=1e-12)


def test_new_embedding_can_be_recovered(head):
    features = features_of(head)
    parts, basis = head.parts(features), head.basis()
    both = torch.cat([added_of(head, features), parts.new], dim=1)
    torch.testing.assert_close(parts.embedding, both @ basis.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.solve(basis, parts.embedding.T).T[:, head.extra :], parts.new, rtol=0, atol=1e-10)


def test_matrices_stay_orthogonal_while_they_are_trained_and_when_they_are_plain(head):
    loss = head(features_of(head))[:, 0].sum()
    loss.backward()
    torch.optim.SGD(head.parameters(), lr=0.5).step()
    before = head(features_of(head))
    head.materialize().materialize()
    torch.testing.assert_close(head(features_of(head)), before, rtol=0, atol=1e-12)
    for matrix in (head.ortholinear_p.weight, head.ortholinear_old2.weight):
        torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), rtol=0, atol=1e-10)


def test_bad_sizes_and_a_missing_classifier_are_named():
    with pytest.raises(ValueError, match="extra = 9 dimensions"):
        Bt2Head(new=8, old=8, extra=9)
    with pytest.raises(ValueError, match="at least old"):
        Bt2Head(new=2, old=8, extra=4)
    with pytest.raises(ValueError, match="without classes"):
        Bt2Head(4, 4, 2).logits(torch.ones(1, 4))


class Embedder(nn.Module):
    """A backbone whose last operation before the average is a ReLU, and the head."""

    def __init__(self, head):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, head.new + head.old, 3), head

    def forward(self, image):
        return self.head(global_average(torch.relu(self.backbone(image))))


def compiled(module, shape):
    program = torch.onnx.export(module.eval(), (torch.zeros(shape),), dynamo=True, opset_version=23, optimize=False, verbose=False)
    model = canonicalize(program.model)
    before = cost(model).macs
    assert DropRepeated().apply(model, Context()) == 2  # the ReLU and the first normalization of the old embedding
    MergeLinears().apply(model, Context())
    return model, before


def test_compiled_head_is_the_branch_and_one_product():
    torch.manual_seed(0)
    module = Embedder(Bt2Head(classes=7).materialize())
    model, before = compiled(module, (2, 3, 6, 6))
    backbone = 2 * 256 * 27 * 16
    assert before - backbone == 2 * (256 * 128 + 128 * 128 + 128 * 128)
    assert cost(model).macs - backbone == 2 * 33_792 == 2 * (256 * 32 + 160**2)
    once = ("Conv", "Relu", "ReduceMean", "Reshape", "Add", "Concat", "Slice")
    twice = ("MatMul", "ReduceL2", "Clip", "Expand", "Div")
    assert Counter(node.op_type for node in model.graph) == dict.fromkeys(once, 1) | dict.fromkeys(twice, 2)
    image = torch.randn(2, 3, 6, 6)
    expected = module(image).detach().numpy()
    (result,) = run(model, {model.graph.inputs[0].name: image.numpy()}).values()
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES[1:], ids=str)
def test_compiled_heads_of_other_sizes_compute_the_same(sizes):
    torch.manual_seed(1)
    module = Embedder(Bt2Head(*sizes[:3], scale=sizes[3]).materialize())
    model, before = compiled(module, (1, 3, 5, 5))
    assert cost(model).macs <= before  # equal where every dimension is added: then one product would cost more than two
    image = torch.randn(1, 3, 5, 5)
    (result,) = run(model, {model.graph.inputs[0].name: image.numpy()}).values()
    np.testing.assert_allclose(result, module(image).detach().numpy(), rtol=0, atol=1e-6)
