"""A BERT-like sentence encoder, exported from PyTorch: tokens go with their mask, and the masked mean counts those that are left."""

from __future__ import annotations

import copy
import math

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional

from edgekit.contracts import Context
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.prune_tokens.prune_tokens import PruneTokens
from edgekit.source import Source
from edgekit.trace import trace
from tests.passes.prune_tokens.vit_graphs import Nodes, given

BATCH, LENGTH, WIDTH, HEADS, DEPTH = 3, 16, 24, 3, 4


class Layer(nn.Module):
    """Post-norm, as in BERT; `alive` takes further tokens from what attention sees."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, eps=1e-12), nn.LayerNorm(WIDTH, eps=1e-12)

    def forward(self, x, mask):
        q, k, v = (part(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)
        x = self.norm1(x + self.o(mixed))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))

    def weights(self, x, mask):
        q, k = (part(x).view(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in (self.q, self.k))
        return (q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS) + mask).softmax(-1)


class Encoder(nn.Module):
    """Word and position embeddings, layers, and the mean of the tokens that are no padding, of length 1."""

    def __init__(self, pooling="expanded"):
        super().__init__()
        self.words, self.places = nn.Embedding(50, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH, eps=1e-12)
        self.layers = nn.ModuleList(Layer() for _ in range(DEPTH))
        self.pooling = pooling

    def forward(self, ids, attention_mask):
        x = self.norm(self.words(ids) + self.places(torch.arange(LENGTH)))
        added = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        for layer in self.layers:
            x = layer(x, added.expand(-1, 1, LENGTH, LENGTH))
        return functional.normalize(self.pool(x, attention_mask), dim=1)

    def pool(self, x, attention_mask):
        if self.pooling == "expanded":
            mask = attention_mask.unsqueeze(-1).expand(x.size()).to(x.dtype)
            return torch.sum(x * mask, 1) / torch.clamp(mask.sum(1), min=1e-9)
        mask = attention_mask.to(x.dtype)
        return (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    def masked(self, ids, attention_mask, keep):
        """The same with −∞ on what is dropped: after each layer in `keep`, all but so many tokens of the most attention received."""
        x = self.norm(self.words(ids) + self.places(torch.arange(LENGTH)))
        added = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * -1e4
        alive = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        for number, layer in enumerate(self.layers):
            mask = added.expand(-1, 1, LENGTH, LENGTH).masked_fill(~alive[:, None, None, :], -torch.inf)
            if number in keep:
                rows = layer.weights(x, mask).mean(1) * alive[:, :, None]
                scores = rows.sum(1).masked_fill(~alive, -1)
                chosen = scores.sort(dim=1, descending=True, stable=True).indices[:, : keep[number]]
                alive = torch.zeros_like(alive).scatter(1, chosen, True)
            x = layer(x, mask)
        mask = (attention_mask * alive)[:, :, None].to(x.dtype)
        return functional.normalize((x * mask).sum(1) / mask.sum(1), dim=1)


def feeds_of(lengths, seed=0):
    rng = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < np.array(lengths)[:, None]).astype(np.int64)
    return {"ids": rng.integers(0, 50, (BATCH, LENGTH)), "attention_mask": mask}


@pytest.fixture(scope="module")
def encoder():
    """The module and its canonical graph."""
    torch.manual_seed(0)
    module = Encoder().eval()
    with torch.no_grad():
        for layer in module.layers:
            layer.q.weight.mul_(4)
    return module, exported(module)


def exported(module):
    example = tuple(torch.from_numpy(array) for array in feeds_of((16, 9, 12)).values())
    model = trace(Source("encoder", module=module, example_inputs=example), "dynamo").model
    infer_shapes(model)
    model = canonicalize(to_opset(model))
    infer_shapes(model)
    return model


def reference(module, feeds, keep):
    ids, mask = (torch.from_numpy(feeds[name]) for name in ("ids", "attention_mask"))
    with torch.no_grad():
        return copy.deepcopy(module).double().masked(ids, mask, keep).numpy()


@pytest.mark.parametrize("lengths", [(16, 9, 12), (16, 16, 16), (5, 10, 3)])
def test_a_sentence_encoder(encoder, lengths, prune, run):
    """Of 16 tokens 10 go on after the second layer and 6 after the third; where there are fewer, padding goes on and counts nowhere."""
    module, model = encoder
    feeds = feeds_of(lengths)
    pruned, context = prune(model, method="attention-received", layers=(1, 2), keep=0.6)
    assert len(context.rewrites) == 2
    (found,) = run(pruned, feeds)
    np.testing.assert_allclose(found, reference(module, feeds, {1: 10, 2: 6}), rtol=0, atol=1e-5)
    plain = reference(module, feeds, {})
    if min(lengths) > 10:
        assert np.abs(plain - found).max() > 1e-2
    short = np.array(lengths) <= 6  # nothing but padding went
    np.testing.assert_allclose(found[short], plain[short], rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["random", "attention-received"])
def test_what_is_averaged_are_the_tokens_that_are_left(encoder, method, prune, run):
    """Whatever the method, the mask of the mean has one entry for each of the six tokens that are left."""
    pruned, _ = prune(encoder[1], method=method, layers=(1, 2), keep=0.6)
    sums = [node for node in pruned.graph if node.op_type == "ReduceSum"]
    assert len(sums) == 2
    assert [tuple(node.inputs[0].shape)[1] for node in sums] == [6, 6]
    assert np.isfinite(run(pruned, feeds_of((16, 9, 12)))[0]).all()


def test_merging_is_refused(encoder, refusal):
    """A merged token would have to be padding in part."""
    assert "cannot be merged" in refusal(encoder[1], method="tome", r=2)[1]


@pytest.mark.slow
def test_another_way_to_write_the_mean(prune, run):
    torch.manual_seed(0)
    module = Encoder("column").eval()
    model = exported(module)
    feeds = feeds_of((16, 9, 12))
    pruned, context = prune(model, method="attention-received", layers=(1,), keep=0.5)
    assert context.refusals == []
    np.testing.assert_allclose(run(pruned, feeds)[0], reference(module, feeds, {1: 8}), rtol=0, atol=1e-5)


def pooled(tail):
    """A block's worth of tokens `[2, 6, 8]` and a mask, with `tail(add, tokens, mask)` behind: a graph and whether it is refused."""
    add = Nodes()
    x, mask = given("x", (2, 6, 8)), given("mask", (2, 6))
    weight = add.constant(np.eye(8, dtype=np.float32), "weight")
    attended = add("Attention", x, x, x, q_num_heads=2, kv_num_heads=2)
    stream = add("Add", x, add("MatMul", attended, weight), name="sum")
    return add.model([x, mask], [add("Identity", value) for value in tail(add, stream, mask)])


def by_sum(add, x, mask, divisor):
    column = add("Unsqueeze", mask, add.constant([2]))
    return add("Div", add("ReduceSum", add("Mul", x, column), add.constant([1]), keepdims=0), divisor)


def counted(add, mask):
    return add("ReduceSum", mask, add.constant([1]), keepdims=1)


GOOD = {
    "sum of the mask": lambda add, x, mask: [by_sum(add, x, mask, counted(add, mask))],
    "at least a little": lambda add, x, mask: [by_sum(add, x, mask, add("Max", counted(add, mask), add.constant(np.float32(1e-9))))],
    "a little more": lambda add, x, mask: [by_sum(add, x, mask, add("Add", counted(add, mask), add.constant(np.float32(1e-9))))],
}
BAD = {
    "a constant": lambda add, x, mask: [by_sum(add, x, mask, add.constant(np.float32(6)))],
    "another mask": lambda add, x, mask: [by_sum(add, x, mask, counted(add, add("Relu", mask)))],
    "the mask summed along samples": lambda add, x, mask: [
        by_sum(add, x, mask, add("ReduceMean", add("ReduceSum", mask, add.constant([0])), add.constant([1])))
    ],
    "the sum itself": lambda add, x, mask: [add("ReduceSum", add("Mul", x, add("Unsqueeze", mask, add.constant([2]))), add.constant([1]))],
    "the other way round": lambda add, x, mask: [
        add(
            "Div",
            add.constant(np.float32(1)),
            add("ReduceSum", add("Mul", x, add("Unsqueeze", mask, add.constant([2]))), add.constant([1]), keepdims=0),
        )
    ],
}


def given_out_too(add, x, mask):
    count = counted(add, mask)
    return [by_sum(add, x, mask, count), count]


@pytest.mark.parametrize("tail", GOOD.values(), ids=GOOD)
def test_divisors_that_count_the_tokens(tail, run):
    model = pooled(tail)
    assert PruneTokens(method="random", layers=(0,), keep=0.5).apply(model, Context(generator=np.random.default_rng(0))) == 1
    kept = np.asarray(next(value for name, value in model.graph.initializers.items() if name.endswith("kept")).const_value.numpy())[0]
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(2, 6, 8)).astype(np.float32), np.array([[1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 1, 1]], np.float32)
    q = x.reshape(2, 6, 2, 4).transpose(0, 2, 1, 3).astype(np.float64)
    weights = np.exp(q @ q.swapaxes(-1, -2) / 2)
    stream = x + ((weights / weights.sum(-1, keepdims=True)) @ q).transpose(0, 2, 1, 3).reshape(2, 6, 8)
    expected = (stream * mask[..., None])[:, kept].sum(1) / mask[:, kept].sum(1, keepdims=True)
    np.testing.assert_allclose(run(model, {"x": x, "mask": mask})[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("tail", [*BAD.values(), given_out_too], ids=[*BAD, "given out too"])
def test_divisors_that_do_not(tail, refusal):
    assert "ReduceSum over the tokens depends on how many there are" in refusal(pooled(tail), method="random", layers=(0,), keep=0.5)[1]


def test_a_count_that_comes_before_the_tokens(run):
    """The count of a mask stands first in the graph; its entries are taken when it is known which tokens stay."""
    model = pooled(GOOD["sum of the mask"])
    count = next(node for node in model.graph if node.op_type == "ReduceSum" and node.inputs[0].name == "mask")
    model.graph.remove(count)
    model.graph.insert_before(next(iter(model.graph)), count)
    feeds = {"x": np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32), "mask": np.ones((2, 6), np.float32)}
    expected = ir.from_proto(ir.to_proto(model))
    PruneTokens(method="attention-received", layers=(0,), keep=0.5).apply(model, Context())
    assert tuple(count.inputs[0].shape) == (2, 3)
    assert run(model, feeds)[0].shape == run(expected, feeds)[0].shape
