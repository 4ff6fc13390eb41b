"""Accuracy against scikit-learn and cases by hand."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import top_k_accuracy_score

from edgekit.errors import DataError
from edgekit.metrics import Metric, difference, top1


def batches(scores: np.ndarray, *sizes: int) -> list[dict[str, np.ndarray]]:
    return [{"logits": part} for part in np.split(scores, np.cumsum(sizes)[:-1])]


def test_top1_is_scikit_learns_accuracy():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(40, 7)).astype(np.float32)
    labels = rng.integers(0, 7, 40)
    correct = top1(batches(scores, 16, 16, 8), labels)
    assert correct.shape == (40,)
    assert correct.dtype == np.bool_
    assert correct.mean() == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=range(7)))


def test_top1_by_hand_in_the_order_of_the_samples():
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]], dtype=np.float16)
    assert top1(batches(scores, 1, 3), np.array([1, 1, 0, 0])).tolist() == [True, False, False, True]


def test_of_equal_scores_the_first_counts():
    assert top1([{"y": np.array([[1.0, 1.0], [1.0, 1.0]])}], np.array([0, 1])).tolist() == [True, False]


def test_a_nan_score_is_never_right():
    scores = np.array([[np.nan, 0.0], [0.0, np.nan], [1.0, 0.0]])
    assert top1([{"y": scores}], np.array([0, 1, 0])).tolist() == [False, False, True]


def test_an_infinite_score_counts():
    assert top1([{"y": np.array([[-np.inf, 0.0], [np.inf, 0.0]])}], np.array([1, 0])).all()


def test_bfloat16_scores():
    assert top1([{"y": np.array([[1, 2, 3], [3, 2, 1]], dtype=ml_dtypes.bfloat16)}], np.array([2, 0])).all()


def test_other_outputs_are_ignored():
    batch = {"features": np.zeros((2, 3, 4), np.float32), "logits": np.eye(2, dtype=np.float32), "ids": np.zeros((2, 2), np.int64)}
    assert top1([batch], np.array([0, 1])).all()


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20), st.integers(2, 6))
def test_permuting_the_samples_permutes_the_answers(seed, samples, classes):
    rng = np.random.default_rng(seed)
    scores, labels, order = rng.normal(size=(samples, classes)), rng.integers(0, classes, samples), rng.permutation(samples)
    np.testing.assert_array_equal(top1([{"y": scores[order]}], labels[order]), top1([{"y": scores}], labels)[order])


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ([{"y": np.zeros((2, 3, 4))}], [0, 1], "no output with scores"),
        ([{"y": np.zeros((2, 1))}], [0, 0], "no output with scores"),
        ([{"y": np.zeros((2, 3), np.int64)}], [0, 1], "no output with scores"),
        ([{}], [0], "no output with scores"),
        ([{"a": np.zeros((1, 3)), "b": np.zeros((1, 3))}], [0], "2 outputs that look like class scores"),
        ([{"y": np.zeros((2, 3))}], [0, 3], "label 3 is not one of the model's 3 classes"),
        ([{"y": np.zeros((2, 3))}], [0, -1], "label -1"),
        ([{"y": np.zeros((2, 3))}], [0], "2 samples, there are 1 labels"),
        ([{"y": np.zeros((2, 3))}], [0, 1, 2], "2 samples, there are 3 labels"),
        ([{"y": np.zeros((1, 3))}, {"z": np.zeros((1, 3))}], [0, 1], "every batch"),
        ([{"y": np.zeros((1, 3))}, {"y": np.zeros((1, 4))}], [0, 1], "every batch"),
        ([{"y": np.zeros((1, 3))}], [0.0], "class numbers"),
        ([{"y": np.zeros((1, 3))}], [[0]], "class numbers"),
        ([{"y": np.zeros((0, 3))}], np.zeros(0, np.int64), "no labelled sample"),
        ([], [0], "no labelled sample"),
    ],
)
def test_what_accuracy_cannot_be_measured_on(outputs, labels, message):
    with pytest.raises(DataError, match=message) as caught:
        top1(outputs, np.array(labels))
    assert caught.value.fix


def test_metric():
    metric = Metric.of(np.array([True, True, False, True]))
    assert metric.to_dict() == {"name": "top1", "value": 0.75, "samples": 4}


def test_metric_of_nothing():
    with pytest.raises(DataError, match="no labelled sample"):
        Metric.of(np.zeros(0, bool))


def test_difference_is_negative_where_the_model_is_worse():
    base = np.array([True] * 90 + [False] * 10)
    worse = np.array([True] * 80 + [False] * 20)
    found = difference(base, worse)
    assert (found.value, found.samples) == (pytest.approx(0.8), 100)
    assert found.difference == pytest.approx(-0.1)
    # Cells 80, 10, 0, 10: center -10/102, half width 1.959964 sqrt(11 - 100/102)/102.
    assert found.ci95 == pytest.approx((-0.158867, -0.037211), abs=1e-5)
    assert difference(worse, base).difference == pytest.approx(0.1)


def test_difference_as_json():
    correct = np.array([True, False])
    fields = json.loads(json.dumps(difference(correct, correct).to_dict(), allow_nan=False))
    assert fields.keys() == {"name", "value", "samples", "difference", "ci95"}
    assert fields["difference"] == 0.0
    low, high = fields["ci95"]
    assert low == -high < 0
