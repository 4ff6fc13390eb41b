"""Graphs in half precision: every method makes of them what it makes of the float32 graph, up to the rounding of half precision."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.contracts import Context
from edgekit.graph.interpreter import run as interpret
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.to_float16 import ToFloat16
from tests.passes.prune_tokens.vit_graphs import Vit, graph, random_feeds

VIT = Vit(batch=2, depth=5, patches=30)
METHODS = {
    "evit": {"method": "evit"},
    "evit, rank": {"method": "evit", "form": "rank"},
    "attention-received": {"method": "attention-received"},
    "ia-red2": {"method": "ia-red2"},
    "tome": {"method": "tome", "r": 4},
    "tome, scatter": {"method": "tome", "r": 4, "form": "scatter"},
    "tome, rank": {"method": "tome", "r": 4, "form": "rank"},
    "diffrate": {"method": "diffrate", "prune": (31, 28, 25, 22, 20), "merge": (31, 26, 23, 20, 18)},
    "random": {"method": "random"},
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("pruned_first", [True, False])
def test_half_precision(options, pruned_first, prune, run):
    """Pruned before or after everything became half precision; edgekit's interpreter rounds every value to it, ONNX Runtime does not."""
    feeds = random_feeds(VIT)
    reference, _ = prune(graph(VIT), **options)
    expected = run(reference, feeds)[0]
    model = reference if pruned_first else graph(VIT)
    assert ToFloat16(keep_io=False).apply(model, Context(calibration=[feeds]))
    infer_shapes(model)
    if not pruned_first:
        model, _ = prune(model, **options)
    halves = {name: array.astype(model.graph.inputs[0].dtype.numpy()) for name, array in feeds.items()}
    (found,) = interpret(model, halves).values()
    assert np.asarray(found).dtype == np.float16
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=1e-2)
    assert np.abs(expected).max() > 0.5
