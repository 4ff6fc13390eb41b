"""Which of the teacher's tokens a student's stand for, and which sums of the stream correspond."""

from __future__ import annotations

import numpy as np
import torch

from edgekit.graph.token_steps import Mark
from edgekit.recover.pairs import aligned, find_pairs, kept_rows
from tests.recover.residual_networks import network


def test_rows_after_steps() -> None:
    """Six tokens with a class token: the third and first patch stay, then the second of those; one is made of the rest."""
    first = kept_rows(None, torch.tensor([[[2, 0]]]), Mark(0, 6, 1, "kept"))
    assert first.tolist() == [[[0, 3, 1]]]
    second = kept_rows(first, torch.tensor([[[1]]]), Mark(1, 3, 1, "fused"))
    assert second.tolist() == [[[0, 1, -1]]]
    third = kept_rows(second, torch.tensor([[[1, 0]]]), Mark(2, 3, 1, "kept"))
    assert third.tolist() == [[[0, -1, 1]]]


def test_values_are_taken_from_those_rows() -> None:
    teacher = torch.arange(12.0).reshape(1, 1, 6, 2)
    student, found, counts = aligned(torch.zeros(1, 1, 3, 2), teacher, torch.tensor([[[0, 3, -1]]]))
    assert student.shape == found.shape
    assert found[0, 0, 1].tolist() == [6, 7]
    assert counts is not None
    assert counts.flatten().tolist() == [True, True, False]
    assert aligned(teacher, teacher, None)[2] is None


def test_sums_of_the_same_name() -> None:
    assert [pair.name for pair in find_pairs(network(), network())] == ["sum0", "sum1", "sum2"]
    other = network()
    for node in other.graph:
        if node.outputs[0].name == "sum1":
            node.outputs[0].name = "another"
    assert [pair.name for pair in find_pairs(network(), other)] == ["sum0", "sum2"]
    assert np.prod(find_pairs(network(), other)[0].shape) == 6 * 12
