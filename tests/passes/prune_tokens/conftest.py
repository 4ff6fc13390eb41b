"""Applying the pass to a graph, with what holds for every result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.contracts import Context
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.shapes import static_shape
from edgekit.passes.prune_tokens.prune_tokens import PruneTokens

Prune = Callable[..., tuple[ir.Model, Context]]


@pytest.fixture(scope="session")
def prune() -> Prune:
    """Returns `prune(model, seed=0, **options)`: a pruned copy and the context.

    It checks that the shapes of all values are static, that the pass names each place that it rewrote, and that it left the graph as it was
    where it says that there is none.
    """

    def apply(model: ir.Model, seed: int = 0, **options: Any) -> tuple[ir.Model, Context]:
        copy, context = model.clone(), Context(generator=np.random.default_rng(seed))
        before = fingerprint(copy)
        count = PruneTokens(**options).apply(copy, context)
        assert (fingerprint(copy) == before) == (count == 0)
        assert len(context.rewrites) == count
        assert all(static_shape(value) is not None for node in copy.graph for value in node.outputs)
        return copy, context

    return apply


@pytest.fixture(scope="session")
def refusal(prune: Prune) -> Callable[..., tuple[str, str]]:
    """Returns `refusal(model, **options)`: where and why the pass left a graph alone, which must be for one reason."""

    def refused(model: ir.Model, **options: Any) -> tuple[str, str]:
        _, context = prune(model, **options)
        assert context.rewrites == []
        (found,) = context.refusals
        return found.where, found.why

    return refused


@pytest.fixture(scope="session")
def assert_logits(run: Callable[..., list[np.ndarray]]) -> Callable[..., None]:
    """Returns `assert_logits(model, feeds, expected, plain)`: ONNX Runtime gives the expected logits, to 1e-5, not the plain ones."""

    def check(model: ir.Model, feeds: Mapping[str, np.ndarray], expected: np.ndarray, plain: np.ndarray) -> None:
        (found,) = run(model, feeds)
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert np.abs(expected - plain).max() > 1e-3  # the tokens that went were of consequence

    return check
