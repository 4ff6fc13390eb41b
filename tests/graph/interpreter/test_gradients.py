"""Gradients: of an exported transformer block against PyTorch's, and the straight-through ones against their formulas."""

import logging
import math

import numpy as np
import onnx_ir as ir
import onnxscript
import pytest
import torch
from onnxscript import FLOAT, INT64
from onnxscript import opset23 as op
from torch import Tensor, nn

from edgekit.graph.interpreter import Interpreter


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, dim))


class Block(nn.Module):
    """A convolution, batch normalization and one encoder block."""

    def __init__(self, dim: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, 2, 2)
        self.bn = nn.BatchNorm2d(dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 32), nn.GELU(), nn.Linear(32, dim))
        self.head = nn.Linear(dim, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.stem(x)).flatten(2).transpose(1, 2)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean(1))


def exported(module: nn.Module, x: Tensor) -> ir.Model:
    logging.disable(logging.WARNING)
    try:
        program = torch.onnx.export(module, (x,), dynamo=True, opset_version=23, optimize=False, verbose=False)
    finally:
        logging.disable(logging.NOTSET)
    assert program is not None
    return program.model


def test_gradients_of_an_exported_block() -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(2, 3, 8, 8)
    interpreter = Interpreter(exported(module, x), dtype="float64", parameters=True)
    module.double()
    weights = torch.randn(2, 5, dtype=torch.float64)
    (name,), (output,) = interpreter.input_names, interpreter.output_names
    result, want = interpreter({name: x})[output], module(x.double())
    assert (result - want).abs().max() <= 1e-12
    (result * weights).sum().backward()
    (want * weights).sum().backward()
    parameters = dict(module.named_parameters())
    assert parameters.keys() <= interpreter.parameters.keys()
    for path, parameter in parameters.items():
        gradient = interpreter.parameters[path].grad
        assert gradient is not None
        assert parameter.grad is not None
        expected = parameter.grad
        if path == "attn.qkv.bias":  # softmax does not see a bias of the keys: its true gradient is zero
            query = expected[:16].norm()
            assert gradient[16:32].norm() <= 1e-5 * query
            gradient, expected = torch.cat([gradient[:16], gradient[32:]]), torch.cat([expected[:16], expected[32:]])
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), path


def test_an_optimizer_trains_the_parameters() -> None:
    torch.manual_seed(0)
    module, x = Block().eval(), torch.randn(4, 3, 8, 8)
    interpreter = Interpreter(exported(module, x), parameters={"head.weight", "head.bias"})
    assert interpreter.parameters.keys() == {"head.weight", "head.bias"}
    (name,), (output,) = interpreter.input_names, interpreter.output_names
    target, losses = torch.tensor([0, 1, 2, 3]), []
    optimizer = torch.optim.Adam(interpreter.parameters.values(), 0.1)
    for _ in range(20):
        loss = nn.functional.cross_entropy(interpreter({name: x})[output], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def model_of(function: onnxscript.OnnxFunction) -> ir.Model:
    return ir.from_proto(function.to_model_proto())


@onnxscript.script(default_opset=op)
def signs_and_rounds(x: FLOAT[...]) -> FLOAT[...]:
    return op.Add(op.Sign(x), op.Mul(op.Round(x), op.Constant(value_float=3.0)))


def test_sign_and_round_are_straight_through() -> None:
    x = torch.tensor([-2.0, -1.0, -0.2, 0.0, 0.7, 1.5], requires_grad=True)
    (result,) = Interpreter(model_of(signs_and_rounds))({"x": x}).values()
    assert result.tolist() == [-7, -4, -1, 0, 4, 7]  # 1.5 rounds to 2: halves go to the even number
    result.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 4, 4, 4, 4, 3]


@onnxscript.script(default_opset=op)
def keeps_tokens(scores: FLOAT[...], tokens: FLOAT[...], k: INT64[...]) -> FLOAT[...]:
    _, chosen = op.TopK(scores, k, axis=1)
    ordered, _ = op.TopK(chosen, k, axis=1, largest=0)
    index = op.Expand(op.Unsqueeze(ordered, op.Constant(value_ints=[2])), op.Constant(value_ints=[1, 1, 4]))
    return op.GatherElements(tokens, index, axis=1)


@onnxscript.script(default_opset=op)
def keeps_rows(scores: FLOAT[...], tokens: FLOAT[...], k: INT64[...]) -> FLOAT[...]:
    _, chosen = op.TopK(scores, k, axis=0)
    first = op.Constant(value_ints=[0])
    index = op.Concat(first, op.Add(chosen, op.Constant(value_int=1)), axis=0)
    return op.Gather(tokens, index, axis=0)


def test_selected_tokens_pass_their_gradient_to_the_scores() -> None:
    torch.manual_seed(1)
    scores = torch.randn(2, 6, requires_grad=True)
    tokens = torch.randn(2, 6, 4, requires_grad=True)
    weights = torch.randn(2, 3, 4)
    (result,) = Interpreter(model_of(keeps_tokens))({"scores": scores, "tokens": tokens, "k": torch.tensor([3])}).values()
    index = scores.topk(3).indices.sort(1).values
    torch.testing.assert_close(result, tokens.gather(1, index[..., None].expand(-1, -1, 4)))
    (result * weights).sum().backward()
    want = torch.zeros(2, 6).scatter(1, index, (weights * result).sum(-1).detach())  # d/dm of sum(w m x) at m = 1
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, want)
    assert tokens.grad is not None
    torch.testing.assert_close(tokens.grad, torch.zeros(2, 6, 4).scatter(1, index[..., None].expand(-1, -1, 4), weights))


def test_selection_with_a_class_token() -> None:
    torch.manual_seed(2)
    scores, tokens, weights = torch.randn(5, requires_grad=True), torch.randn(6, 3), torch.randn(3, 3)
    (result,) = Interpreter(model_of(keeps_rows))({"scores": scores, "tokens": tokens, "k": torch.tensor([2])}).values()
    index = scores.topk(2).indices
    torch.testing.assert_close(result, torch.cat([tokens[:1], tokens[1:][index]]))
    (result * weights).sum().backward()
    assert scores.grad is not None
    torch.testing.assert_close(scores.grad, torch.zeros(5).scatter(0, index, (weights * result)[1:].sum(-1)))


@onnxscript.script(default_opset=op)
def smooth(x: FLOAT[...], w: FLOAT[...]) -> FLOAT[...]:
    h = op.MatMul(op.LayerNormalization(x, op.Constant(value_floats=[1.0, 2.0, 0.5, 1.5]), axis=-1, epsilon=0.1), w)
    h = op.Mul(op.Softplus(h), op.Tanh(op.ReduceMean(h, op.Constant(value_ints=[1]))))
    return op.Softmax(op.Gelu(h, approximate="tanh"), axis=1)


def test_gradients_against_differences() -> None:
    torch.manual_seed(3)
    interpreter = Interpreter(model_of(smooth), dtype="float64")
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: next(iter(interpreter({"x": x, "w": w}).values())), (x, w))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_no_gradient_is_kept_without_need(dtype: str) -> None:
    interpreter = Interpreter(model_of(smooth), dtype=dtype)
    (result,) = interpreter({"x": np.ones((3, 4), np.float32), "w": np.ones((4, 5), np.float32)}).values()
    assert not result.requires_grad
    assert math.isclose(float(result.sum()), 3.0, rel_tol=1e-2)


@onnxscript.script(default_opset=op)
def quantized(x: FLOAT[...], scale: FLOAT[...]) -> FLOAT[...]:
    zero = op.Cast(op.Constant(value_int=3), to=3)
    q = op.QuantizeLinear(x, scale, zero)
    moved = op.Transpose(op.Reshape(q, op.Constant(value_ints=[2, -1])), perm=[1, 0])
    return op.DequantizeLinear(moved, scale, zero)


def test_quantization_passes_its_gradient_through() -> None:
    torch.manual_seed(4)
    x = (40 * torch.randn(4, 25)).requires_grad_()
    scale = torch.tensor(0.5, requires_grad=True)
    weights = torch.randn(50, 2)
    (result,) = Interpreter(model_of(quantized))({"x": x, "scale": scale}).values()
    same = x.detach().clone().requires_grad_()
    want = torch.fake_quantize_per_tensor_affine(same, 0.5, 3, -128, 127)
    torch.testing.assert_close(result, want.reshape(2, 50).t())
    (result * weights).sum().backward()
    (want.reshape(2, 50).t() * weights).sum().backward()
    assert x.grad is not None
    assert scale.grad is not None
    torch.testing.assert_close(x.grad, same.grad)
    ratio = x.detach() / 0.5  # equation 3 of LSQ, with the zero point
    low, high = ratio.round() + 3 < -128, ratio.round() + 3 > 127
    slope = torch.where(low, -131.0, torch.where(high, 124.0, ratio.round() - ratio))
    torch.testing.assert_close(scale.grad, (slope.reshape(2, 50).t() * weights).sum())


def test_gradients_of_vit_digits() -> None:
    from edgekit.models.vit_digits import MODEL

    torch.manual_seed(5)
    module, x = MODEL.build().eval(), torch.randn(4, *MODEL.input_shape[1:])
    interpreter = Interpreter(exported(module, x), dtype="float64", parameters=True)
    module.double()
    (name,), (output,) = interpreter.input_names, interpreter.output_names
    weights = torch.randn(4, 10, dtype=torch.float64)
    (interpreter({name: x})[output] * weights).sum().backward()
    (module(x.double()) * weights).sum().backward()
    for path, parameter in module.named_parameters():
        gradient = interpreter.parameters[path].grad
        assert gradient is not None
        assert parameter.grad is not None
        parts = zip(gradient.chunk(3), parameter.grad.chunk(3), strict=True) if path.endswith("qkv.bias") else [(gradient, parameter.grad)]
        query = parameter.grad.chunk(3)[0].norm() if path.endswith("qkv.bias") else None
        for index, (got, want) in enumerate(parts):
            if query is not None and index == 1:  # key biases, whose true gradient is zero
                assert got.norm() <= 1e-5 * query
            else:
                assert (got - want).norm() <= 1e-5 * want.norm(), path
