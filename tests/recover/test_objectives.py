"""Objectives by their identities, and against formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from edgekit.recover.objectives.features import alignment, dynamic_alignment, reconstruction, start_mixing, whitened
from edgekit.recover.objectives.logits import distance
from edgekit.recover.objectives.relations import diversity, relations


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_logits_are_compared_by_their_softened_probabilities() -> None:
    student, teacher = normal(6, 1, 9), normal(6, 1, 9, seed=1)
    p, q = (log_softmax(x.numpy()[:, 0] / 2, -1) for x in (teacher, student))
    expected = 4 * (np.exp(p) * (p - q)).sum(-1).mean()
    assert float(distance({"y": student}, {"y": teacher})) == pytest.approx(expected)
    assert float(distance({"y": teacher}, {"y": teacher})) == pytest.approx(0, abs=1e-12)


def test_other_outputs_are_compared_by_energy() -> None:
    teacher = normal(3, 1, 4, 4)
    assert float(distance({"y": 1.1 * teacher}, {"y": teacher})) == pytest.approx(0.01)


def test_features_are_compared_after_a_norm() -> None:
    """Scale and shift of the channels together do not matter; what does not count does not either."""
    teacher = normal(2, 1, 5, 8)
    assert float(alignment(3 * teacher + 1, teacher)) == pytest.approx(0, abs=1e-4)
    student, counts = teacher.clone(), torch.ones(2, 1, 5, 1, dtype=torch.bool)
    student[:, :, 3] = 9 * normal(2, 1, 8, seed=2)
    assert float(alignment(student, teacher)) > 0.05
    counts[:, :, 3] = False
    assert float(alignment(student, teacher, counts)) == pytest.approx(0, abs=1e-6)


def test_a_block_that_does_nothing_has_an_error_of_one() -> None:
    before, after = normal(2, 1, 5, 8), normal(2, 1, 5, 8, seed=1)
    energy = float((after - before).square().mean())
    assert float(reconstruction(before, after, energy)) == pytest.approx(1)
    assert float(reconstruction(after, after, energy)) == 0


def test_mixed_layers_start_near_the_layers_themselves() -> None:
    layers = [whitened(normal(2, 1, 5, 8, seed=k)) for k in range(3)]
    assert float(dynamic_alignment(layers, torch.eye(3, dtype=torch.float64), layers)) == pytest.approx(0, abs=1e-9)
    mixing = start_mixing(3).double()
    np.testing.assert_allclose(mixing.numpy(), np.eye(3) + 0.01)
    assert 0 < float(dynamic_alignment(layers, mixing, layers)) < 0.01


def test_relations_do_not_depend_on_the_basis() -> None:
    """An orthogonal change of channels leaves relations and changes features; widths may differ."""
    teacher, student = normal(2, 1, 5, 8), normal(2, 1, 5, 8, seed=1)
    turn = torch.linalg.qr(normal(8, 8, seed=2))[0]
    assert float(relations(teacher, teacher)) == pytest.approx(0, abs=1e-12)
    assert float(relations(student @ turn, teacher)) == pytest.approx(float(relations(student, teacher)))
    assert float(alignment(student @ turn, teacher)) != pytest.approx(float(alignment(student, teacher)))
    assert float(relations(normal(2, 1, 5, 3), teacher)) > 0


def test_diversity_of_attention() -> None:
    """0 where every query looks alike, 1 where each looks at a key of its own."""
    rows = torch.softmax(normal(6), 0).expand(6, 6)
    assert float(diversity(rows)) == pytest.approx(0, abs=1e-6)
    assert float(diversity(torch.eye(6)[torch.randperm(6)])) == pytest.approx(1, abs=1e-6)
    assert 0 < float(diversity(torch.softmax(2 * normal(6, 6), -1))) < 1
