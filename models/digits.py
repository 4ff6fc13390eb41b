"""The dataset `digits`: real handwriting that ships inside scikit-learn, so that nothing has to be downloaded to train, calibrate or test.

The 1,797 digits are those of Alpaydin and Kaynak ("Optical Recognition of Handwritten Digits", UCI repository, 1998): 8x8 counts of
dark pixels, 0 to 16.
"""

from __future__ import annotations

import numpy as np

from edgekit.contracts import Dataset

CLASSES = 10
SIDE = 32
"""Height and width of a sample after resizing, in pixels."""
BACKGROUND = -1.0
"""Value of empty paper after normalisation."""
PARTS = {"train": 1000, "calibrate": 200, "test": 597}
"""Number of samples in each part."""

_DARKEST = 16.0
_SPLIT_SEED = 20231


def load() -> Dataset:
    """Returns the digits in their one fixed split: 1,000 to train, 200 to calibrate and select, 597 to test.

    Every part holds the ten classes in the proportions of the whole. Inputs are float32 `[S, 1, 32, 32]`, from -1 (paper) to
    1 (ink): the 8x8 counts `p` become `p / 8 - 1` and are enlarged bilinearly. Labels are int64 `[S]`.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    labels = bunch.target.astype(np.int64)
    images = normalize(enlarge(bunch.images))
    everything = np.arange(len(labels))
    rest, test = train_test_split(everything, test_size=PARTS["test"], stratify=labels, random_state=_SPLIT_SEED)
    train, calibrate = train_test_split(rest, test_size=PARTS["calibrate"], stratify=labels[rest], random_state=_SPLIT_SEED)
    indices = {"train": train, "calibrate": calibrate, "test": test}
    return Dataset(
        inputs={part: images[chosen] for part, chosen in indices.items()},
        labels={part: labels[chosen] for part, chosen in indices.items()},
    )


def enlarge(images: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Resizes square images `[S, n, n]` to `[S, side, side]` bilinearly, in float64.

    Pixel centres are at half-integers and borders are repeated, as in PyTorch's `interpolate(mode="bilinear", align_corners=False)`.
    """
    weights = _bilinear_weights(images.shape[-1], side)
    enlarged: np.ndarray = weights @ images.astype(np.float64) @ weights.T
    return enlarged


def normalize(images: np.ndarray) -> np.ndarray:
    """Maps counts 0..16 `[S, H, W]` to -1..1 and adds the channel axis: float32 `[S, 1, H, W]`."""
    return (images * (2.0 / _DARKEST) - 1.0).astype(np.float32)[:, None]


def _bilinear_weights(source: int, target: int) -> np.ndarray:
    """Returns the matrix `[target, source]` that interpolates one axis linearly."""
    centres = np.clip((np.arange(target) + 0.5) * source / target - 0.5, 0, source - 1)
    return np.maximum(0.0, 1.0 - np.abs(centres[:, None] - np.arange(source)[None, :]))
