"""MACs, parameters and bytes against hand formulas and PyTorch's own counter."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import helper
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from edgekit.contracts import Context
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.constants import GraphEditor
from edgekit.graph.cost import cost
from edgekit.graph.parameters import FOLDED_FROM, PARAMETER
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from edgekit.passes.reparameterize.merge_branches import MergeBranches
from edgekit.source import Source
from edgekit.trace import trace

N = helper.make_node
F32 = np.float32


def zeros(*shape: int, dtype=F32) -> np.ndarray:
    return np.zeros(shape, dtype)


# name: (nodes, inputs, initializers, MACs by the formula)
FORMULAS = {
    "grouped conv": ([N("Conv", ["x", "w"], ["y"], group=2)], {"x": zeros(2, 4, 8, 8)}, {"w": zeros(6, 2, 3, 3)}, 2 * 6 * 6 * 6 * 2 * 9),
    "conv transpose": (
        [N("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2], group=2)],
        {"x": zeros(1, 4, 5, 5)},
        {"w": zeros(4, 3, 3, 3)},
        4 * 25 * 3 * 9,
    ),
    "matmul": ([N("MatMul", ["x", "w"], ["y"])], {"x": zeros(2, 1, 5, 7)}, {"w": zeros(3, 7, 4)}, 2 * 3 * 5 * 4 * 7),
    "vector times matrix": ([N("MatMul", ["x", "w"], ["y"])], {"x": zeros(7)}, {"w": zeros(7, 4)}, 28),
    "gemm": ([N("Gemm", ["x", "w", "b"], ["y"], transA=1, transB=1)], {"x": zeros(7, 5)}, {"w": zeros(4, 7), "b": zeros(4)}, 5 * 7 * 4),
    "attention 4-d, grouped": (
        [N("Attention", ["q", "k", "v"], ["y"])],
        {"q": zeros(2, 8, 5, 16), "k": zeros(2, 2, 9, 16), "v": zeros(2, 2, 9, 12)},
        {},
        2 * 8 * 5 * 9 * (16 + 12),
    ),
    "attention 3-d, grouped": (
        [N("Attention", ["q", "k", "v"], ["y"], q_num_heads=8, kv_num_heads=2)],
        {"q": zeros(2, 5, 8 * 16), "k": zeros(2, 9, 2 * 16), "v": zeros(2, 9, 2 * 16)},
        {},
        2 * 8 * 5 * 9 * 32,
    ),
    "einsum": ([N("Einsum", ["a", "b"], ["y"], equation="...ik, kj -> ...ij")], {"a": zeros(3, 5, 7), "b": zeros(7, 2)}, {}, 3 * 5 * 7 * 2),
    "lstm": (
        [N("LSTM", ["x", "w", "r"], ["y"], hidden_size=6, direction="bidirectional")],
        {"x": zeros(9, 2, 5)},
        {"w": zeros(2, 24, 5), "r": zeros(2, 24, 6)},
        9 * 2 * 2 * 4 * 6 * (5 + 6),
    ),
    "gru": (
        [N("GRU", ["x", "w", "r"], ["y"], hidden_size=6)],
        {"x": zeros(9, 2, 5)},
        {"w": zeros(1, 18, 5), "r": zeros(1, 18, 6)},
        18 * 18 * 11,
    ),
    "rnn": (
        [N("RNN", ["x", "w", "r"], ["y"], hidden_size=6)],
        {"x": zeros(9, 2, 5)},
        {"w": zeros(1, 6, 5), "r": zeros(1, 6, 6)},
        18 * 6 * 11,
    ),
    "integer conv": (
        [N("ConvInteger", ["x", "w"], ["y"])],
        {"x": zeros(1, 3, 8, 8, dtype=np.uint8)},
        {"w": zeros(4, 3, 3, 3, dtype=np.uint8)},
        4 * 36 * 27,
    ),
    "integer matmul": (
        [N("MatMulInteger", ["x", "w"], ["y"])],
        {"x": zeros(5, 7, dtype=np.uint8)},
        {"w": zeros(7, 4, dtype=np.uint8)},
        140,
    ),
    "nothing": ([N("Relu", ["x"], ["r"]), N("Add", ["r", "b"], ["y"])], {"x": zeros(5, 7)}, {"b": zeros(7)}, 0),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_macs_by_formula(name, make):
    nodes, inputs, initializers, macs = FORMULAS[name]
    outputs = {"y": (onnx.TensorProto.INT32 if "integer" in name else onnx.TensorProto.FLOAT, None)}
    model = ir.from_proto(make(nodes, inputs, outputs, initializers))
    infer_shapes(model)
    result = cost(model)
    assert result.macs == macs
    assert result.complete
    assert result.parameters == sum(array.size for array in initializers.values())
    assert result.bytes == sum(array.nbytes for array in initializers.values())


def export(module: nn.Module, *inputs: torch.Tensor) -> ir.Model:
    program = torch.onnx.export(module.eval(), inputs, dynamo=True, opset_version=23, optimize=False, verbose=False)
    model = canonicalize(program.model)
    infer_shapes(model)
    return model


class Block(nn.Module):
    """A transformer block with two attention heads."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1, groups=16),
        nn.ConvTranspose2d(16, 8, 2, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


@pytest.mark.parametrize(("module", "shape"), [(convolutions(), (2, 3, 16, 16)), (Block(), (2, 9, 32))])
def test_macs_and_parameters_of_exported_modules(module, shape):
    x = torch.zeros(shape)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        module.eval()(x)
    result = cost(export(module, x))
    assert result.macs == counter.get_total_flops() / 2
    assert result.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert result.complete


def test_rows_add_up_and_shared_weights_count_once(make):
    nodes = [N("MatMul", ["x", "w"], ["a"], name="one"), N("MatMul", ["a", "w"], ["y"], name="two")]
    model = ir.from_proto(make(nodes, {"x": zeros(3, 4)}, initializers={"w": zeros(4, 4)}))
    model.graph[0].metadata_props["edgekit.module"] = "blocks.0"
    infer_shapes(model)
    result = cost(model)
    assert result.parameters == 16
    assert result.bytes == 64
    assert [(row.name, row.module, row.macs, row.parameters, row.output_shape) for row in result.per_node] == [
        ("one", "blocks.0", 48, 16, (3, 4)),
        ("two", "", 48, 0, (3, 4)),
    ]


def test_statistics_scalars_and_scales_are_not_parameters_but_quantized_weights_are(make):
    nodes = [
        N("DequantizeLinear", ["q", "scale"], ["w"], axis=0),
        N("Conv", ["x", "w"], ["c"]),
        N("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"]),
        N("Mul", ["n", "half"], ["y"]),
    ]
    statistics = {name: np.ones(4, F32) for name in "gbmv"}
    initializers = {"q": zeros(4, 3, 1, 1, dtype=np.int8), "scale": np.ones(4, F32), "half": F32([0.5]), **statistics}
    model = ir.from_proto(make(nodes, {"x": zeros(1, 3, 5, 5)}, initializers=initializers))
    infer_shapes(model)
    assert cost(model).parameters == 12 + 8


def test_unknown_shapes_are_reported(make):
    model = ir.from_proto(make([N("MatMul", ["x", "w"], ["y"], name="mm")], {"x": (1, ["n", 4])}, initializers={"w": zeros(4, 4)}))
    infer_shapes(model)
    result = cost(model)
    assert not result.complete
    assert result.unknown == ("mm",)


def traced(module: nn.Module, *inputs: torch.Tensor, exporter: str = "dynamo") -> ir.Model:
    model = canonicalize(trace(Source("module", module=module, example_inputs=inputs), exporter).model)
    infer_shapes(model)
    return model


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


class Awkward(nn.Module):
    """Parameters and constants that cannot be told apart by their looks."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 24, bias=False)
        self.gain = nn.Parameter(torch.tensor(1.5))  # a single number that is trained
        self.table = nn.Parameter(torch.randn(5, 2))  # spread out over 5 x 5 places
        self.scaled = nn.Parameter(torch.randn(8))  # used as 1 + scaled
        self.register_buffer("places", (torch.arange(5)[:, None] - torch.arange(5)[None]).abs())
        self.register_buffer("mask", torch.randn(5, 8))  # as large as a weight, and none
        self.conv = nn.Conv1d(8, 8, 1, bias=False)  # for which the exporter writes a bias of zeros

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.linear(x).chunk(3, dim=-1)  # [B, 5, 8] each
        scores = q @ k.transpose(1, 2) + self.table[self.places].sum(-1)
        x = (scores @ v) * self.gain * (1 + self.scaled) + self.mask
        return self.conv(x.transpose(1, 2))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_parameters_are_those_of_the_module(exporter, tmp_path):
    module = Awkward()
    model = traced(module, torch.randn(2, 5, 8), exporter=exporter)
    result = cost(model)
    assert result.parameters == parameters_of(module) == 8 * 24 + 1 + 10 + 8 + 64
    spread = [value for value in model.graph.initializers.values() if FOLDED_FROM in value.metadata_props]
    assert 25 in [value.const_value.size for value in spread], "the table was spread out"
    assert result.folded_bytes == sum(value.const_value.nbytes for value in spread)
    assert result.folded_bytes < result.bytes
    ir.save(model, tmp_path / "model.onnx")
    again = cost(ir.load(tmp_path / "model.onnx"))
    assert (again.parameters, again.folded_bytes) == (result.parameters, result.folded_bytes)


class Tied(nn.Module):
    """One matrix as the embedding and, transposed, as the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_shared_parameters_count_once(exporter):
    assert cost(traced(Tied(), torch.tensor([[1, 2, 3]]), exporter=exporter)).parameters == 66


def test_parameters_of_an_exported_program():
    module = Awkward().eval()
    example = (torch.randn(2, 5, 8),)
    program = torch.export.export(module, example)
    source = Source("program", module=program.module(), program=program, example_inputs=example)
    assert cost(canonicalize(trace(source, "dynamo").model)).parameters == parameters_of(module)


class Branches(nn.Module):
    """A 3x3, a 1x1 and an identity branch, each with batch norm, that are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.Conv2d(6, 6, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(3))
        for norm in self.norms:
            nn.init.ones_(norm.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norms[0](self.wide(x)) + self.norms[1](self.narrow(x)) + self.norms[2](x)


def test_weights_made_by_passes_are_the_parameters_of_the_rewritten_network():
    module = Branches()
    model = traced(module, torch.zeros(1, 6, 5, 5))
    assert cost(model).parameters == parameters_of(module) == 6 * 6 * 10 + 36
    assert FoldBatchNorm().apply(model, Context()) == 2
    assert cost(model).parameters == 6 * 6 * 10 + 2 * 6 + 12, "each convolution got a bias"
    assert MergeBranches().apply(model, Context()) == 1
    assert cost(model).parameters == cost(model).bytes / 4 == 6 * 6 * 9 + 6


def test_constants_that_passes_add_count_only_when_made_from_parameters(make):
    model = ir.from_proto(make([N("MatMul", ["x", "w"], ["y"])], {"x": zeros(3, 4)}, initializers={"w": zeros(4, 4)}))
    weight = model.graph.initializers["w"]
    weight.metadata_props[PARAMETER] = "1"
    editor = GraphEditor(model)
    node = model.graph[0]
    mask = editor.add_initializer("mask", zeros(3, 4))
    made = editor.add_initializer("made", zeros(3, 4), made_from=[weight, mask])
    for constant in (mask, made):
        model.graph.append(ir.node("Add", [node.outputs[0], constant]))
    infer_shapes(model)
    assert cost(model).parameters == 16 + 12
    editor.set_constant(node, 1, zeros(4, 2))
    assert cost(model).parameters == 8 + 12


@pytest.mark.parametrize(
    "name",
    [
        "resnet50",
        "deit_small_patch16_224",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("mobileone_s0", "mobileone_s0 merged", "swin_tiny_patch4_window7_224", "convnext_tiny", "crossvit_15_240")
        ),
    ],
)
def test_published_figures(name):
    from benchmarks.cost_figures import FIGURES, count, ratios

    counted = count(FIGURES[name])
    assert counted.complete
    for what, number, published in ratios(FIGURES[name], counted):
        assert number == pytest.approx(published, rel=0.01), what
