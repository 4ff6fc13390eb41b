"""Networks of timm in the canonical form: no attention and no normalization is left in parts, and the numbers are PyTorch's."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from benchmarks.canonical_families import ACTIVATIONS, GOAL, NORMALIZATIONS, attentions, measure
from benchmarks.light_networks import NAMES, image, randomized
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.opset import to_opset
from tests.graph.exporter_support import run


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_vit", "mobilevit_xxs", "convnext_atto"])
def test_family(name: str) -> None:
    row = measure(name)
    found, wanted = attentions(row)
    assert found == wanted
    assert row.nodes["Softmax"] == row.nodes["Erf"] == row.nodes["Pow"] == row.nodes["Resize"] == 0
    for calls, operators in ((NORMALIZATIONS, NORMALIZATIONS.values()), (ACTIVATIONS, ACTIVATIONS.values())):
        assert sum(row.calls[call] for call in calls) == sum(row.nodes[operator] for operator in operators)
    assert row.error <= GOAL


LARGE = ("vgg19", "bvlc_alexnet", "zfnet512")  # layers that the others have too; whole compiles of them are tested elsewhere


@pytest.mark.parametrize(
    "name",
    [name if name in ("shufflenet", "squeezenet") else pytest.param(name, marks=pytest.mark.slow) for name in NAMES if name not in LARGE],
)
def test_light_networks_keep_their_numbers(name: str) -> None:
    proto: onnx.ModelProto = randomized(name)
    model = ir.from_proto(proto)
    feeds = {value.name: image(value.shape.numpy(), np.random.default_rng(1)) for value in model.graph.inputs if not value.is_initializer()}
    (expected,) = run(model, feeds).values()
    (result,) = run(canonicalize(to_opset(model)), feeds).values()
    assert np.abs(result - expected).max() <= 1e-4 * np.abs(expected).max()
