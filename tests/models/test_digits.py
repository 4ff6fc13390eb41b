"""The dataset against scikit-learn's own arrays and PyTorch's resize."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn import functional

from edgekit.contracts import Dataset, datasets
from edgekit.models import digits

PARTS = {"train": 1000, "calibrate": 200, "test": 597}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return digits.load()


def reference_images() -> np.ndarray:
    """All 1,797 digits `[1797, 1, 32, 32]` by PyTorch's bilinear resize in float64."""
    raw = torch.from_numpy(load_digits().images)[:, None]
    return (functional.interpolate(raw, size=(32, 32), mode="bilinear", align_corners=False) / 8 - 1).float().numpy()


def test_parts_have_the_promised_sizes_shapes_and_types(data: Dataset) -> None:
    assert {part: len(labels) for part, labels in data.labels.items()} == PARTS
    for part, size in PARTS.items():
        assert data.inputs[part].shape == (size, 1, 32, 32)
        assert data.inputs[part].dtype == np.float32
        assert data.labels[part].shape == (size,)
        assert data.labels[part].dtype == np.int64


def test_every_digit_of_scikit_learn_is_in_exactly_one_part(data: Dataset) -> None:
    def key(image: np.ndarray, label: int) -> tuple[bytes, int]:
        return np.round((image.astype(np.float64) + 1) * 128).astype(np.int32).tobytes(), int(label)

    expected = [key(image, label) for image, label in zip(reference_images(), load_digits().target, strict=True)]
    assert len(set(expected)) == 1797  # no two digits are equal, so that a key says which one it is
    found = [key(image, label) for part in PARTS for image, label in zip(data.inputs[part], data.labels[part], strict=True)]
    assert sorted(found) == sorted(expected)


def test_values_lie_between_paper_and_ink(data: Dataset) -> None:
    values = np.concatenate([data.inputs[part] for part in PARTS])
    assert values.min() == digits.BACKGROUND == -1.0
    assert values.max() == 1.0


def test_enlarge_equals_pytorch_bilinear() -> None:
    images = np.random.default_rng(0).uniform(0, 16, (5, 8, 8))
    expected = functional.interpolate(torch.from_numpy(images)[:, None], size=(32, 32), mode="bilinear", align_corners=False)[:, 0]
    np.testing.assert_allclose(digits.enlarge(images), expected.numpy(), rtol=0, atol=1e-12)


def test_parts_are_stratified(data: Dataset) -> None:
    share = np.bincount(load_digits().target) / 1797
    for part, size in PARTS.items():
        assert np.abs(np.bincount(data.labels[part], minlength=10) - share * size).max() <= 1.5


def test_split_is_the_same_every_time(data: Dataset) -> None:
    again = digits.load()
    for part in PARTS:
        np.testing.assert_array_equal(again.inputs[part], data.inputs[part])
        np.testing.assert_array_equal(again.labels[part], data.labels[part])


def test_registry_finds_it() -> None:
    assert datasets.get("digits") is digits.load
