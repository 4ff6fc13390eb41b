"""What the tests of attention share: exporting, parsing, and holding a fused graph against what it was before."""

from __future__ import annotations

import io
import logging
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from edgekit.graph.canonicalize import STEPS
from edgekit.graph.fusions.attention import fuse_attention
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes

FUSIONS = ("merge_layout", "fuse_normalizations", "fuse_activations", "fuse_attention", "unify_linear")
DYNAMO, SCRIPT = "dynamo", "torchscript"
MINUS_INFINITY, LOWEST = float("-inf"), float(np.finfo(np.float32).min)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(0.3, 1, shape).astype(np.float32)


def tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(random(*shape, seed=seed))


def export(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], exporter: str, opset: int) -> ir.Model:
    """The graph as the fusion of attention meets it, at opset 23, of a module that an exporter wrote at another."""
    torch.manual_seed(0)
    module.eval()
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == DYNAMO:
            model = torch.onnx.export(module, arguments, dynamo=True, opset_version=opset, optimize=False, verbose=False).model
        else:
            file = io.BytesIO()
            torch.onnx.export(module, arguments, file, dynamo=False, opset_version=opset, do_constant_folding=False, verbose=False)
            model = ir.from_proto(onnx.load_from_string(file.getvalue()))
    return prepare(model)


def prepare(model: ir.Model) -> ir.Model:
    to_opset(model, 23)
    infer_shapes(model)
    for step in STEPS:
        if step.__name__ not in FUSIONS:
            step(model)
    infer_shapes(model)
    return model


def parse(text: str, initializers: dict[str, np.ndarray] | None = None) -> ir.Model:
    """A graph from `(inputs) => (outputs) { nodes }`."""
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]> g {text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in (initializers or {}).items())
    return prepare(ir.from_proto(proto))


def count(model: ir.Model, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph)


def the_attention(model: ir.Model) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == "Attention"]
    return node


def attributes(model: ir.Model) -> dict:
    return {name: attr.value for name, attr in the_attention(model).attributes.items()}


@pytest.fixture
def fused(run):
    """Returns a function that fuses a model and holds it against what it was before."""

    def check(model: ir.Model, feeds, expected: int = 1, tolerance: float = 1e-5) -> ir.Model:
        if not isinstance(feeds, dict):
            feeds = {value.name: np.asarray(array) for value, array in zip(model.graph.inputs, feeds, strict=True)}
        before = run(model, feeds)
        made = fuse_attention(model)
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        names = [node.name for node in model.graph]
        assert len(set(names)) == len(names)
        assert made == expected == count(model, "Attention")
        assert count(model, "Softmax") == 0
        assert not [node for node in model.graph if not any(out.uses() or out.is_graph_output() for out in node.outputs)]
        for old, new in zip(before, run(model, feeds), strict=True):
            assert old.shape == new.shape
            assert old.dtype == new.dtype
            assert np.isfinite(old).all()
            assert np.abs(old.astype(np.float64) - new).max() <= tolerance * np.abs(old).max()
        return model

    return check


@pytest.fixture
def unchanged():
    """Returns a function that sees that nothing is fused and nothing else touched."""

    def check(model: ir.Model) -> None:
        before = ir.to_proto(model).SerializeToString(deterministic=True)
        assert fuse_attention(model) == 0
        assert ir.to_proto(model).SerializeToString(deterministic=True) == before

    return check
