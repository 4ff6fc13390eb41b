"""Inputs for calibration and evaluation: a named dataset, a folder of images, an `.npz`, an iterable, or seeded noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit import contracts
from edgekit.contracts import Arrays
from edgekit.errors import DataError, EdgekitError, nearest
from edgekit.graph.shapes import static_shape
from edgekit.source import USER_ERRORS, import_object

if TYPE_CHECKING:
    import onnx_ir as ir
    from PIL.Image import Image

_LARGEST_INPUT = 2**31
_LARGEST_CALIBRATION = 2**33
"""Bytes; calibration inputs are held in memory."""
_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif"}


@dataclass(frozen=True)
class Declared:
    """What the graph declares of an input.

    Attributes:
        shape: All dimensions, batch first.
        dtype: numpy's dtype.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]


@dataclass
class Data:
    """Batches in the shapes of the graph's inputs.

    Attributes:
        origin: Where the data came from, for the report.
        calibration: Batches for calibration and parity.
        selection: Batches on which a setting may be chosen, with `selection_labels`.
        test: Batches that final figures are measured on, with `test_labels`.
        held_out: Whether nothing else uses the samples of `test`.
        adversarial: Extreme inputs that every stage also runs on, by kind (see `edgekit.adversarial`).
        notes: What the report must say about the data.
        noise: Whether nothing was given, and the batches are made up.
    """

    origin: str
    calibration: list[Arrays]
    selection: list[Arrays] = field(default_factory=list)
    selection_labels: np.ndarray | None = None
    test: list[Arrays] = field(default_factory=list)
    test_labels: np.ndarray | None = None
    held_out: bool = False
    adversarial: dict[str, Arrays] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    noise: bool = False


Origin = str | Iterable[Any] | Callable[[dict[str, Declared], int], list[Arrays]] | None


def declared_inputs(model: ir.Model) -> dict[str, Declared]:
    """Shapes and dtypes of the graph's inputs, which must be static, by name."""
    declared = {}
    for value in model.graph.inputs:
        shape = static_shape(value)
        assert value.name is not None
        assert shape is not None
        assert value.dtype is not None
        declared[value.name] = Declared(shape, np.dtype(value.dtype.numpy()))
    return declared


def load_data(
    origin: Origin,
    declared: dict[str, Declared],
    *,
    calibration: int,
    seed: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> Data:
    """Reads the data that the user named.

    Args:
        origin: As on the command line, an iterable of samples, or a function that makes a number of batches; None: noise.
        declared: What the graph declares of its inputs.
        calibration: Number of calibration batches.
        seed: Seed of noise, and of which images of a folder are taken.
        statistics: Mean and standard deviation per channel for images.

    Raises:
        DataError: The data cannot be read or does not fit the inputs.
    """
    _require_bounded(declared, calibration)
    if origin is None:
        return _noise(declared, calibration, seed)
    if callable(origin):
        return Data("batches made for the shapes", origin(declared, calibration))
    if not isinstance(origin, str):
        return Data("an iterable in memory", _from_iterable(origin, "the data", declared, calibration))
    if origin in contracts.datasets.names():
        return _from_dataset(origin, declared, calibration)
    path = Path(origin)
    if path.is_dir():
        return _from_images(path, declared, calibration, seed, statistics)
    if path.suffix == ".npz":
        return _from_npz(path, declared, calibration)
    if ":" in origin and not path.exists():
        made = import_object(origin, DataError)
        if callable(made):
            try:
                made = made()
            except EdgekitError:
                raise
            except USER_ERRORS as error:
                raise DataError(f"the data raised {type(error).__name__}: {error}", where=origin, fix="correct it") from error
        return Data(origin, _from_iterable(made, origin, declared, calibration))
    raise DataError(
        f"there is no data '{origin}'",
        fix=f"{nearest(origin, contracts.datasets.names())}; or a folder of images, FILE.npz, package.module:iterable",
    )


def _require_bounded(declared: dict[str, Declared], calibration: int) -> None:
    for name, what in declared.items():
        if (size := math.prod(what.shape) * what.dtype.itemsize) > _LARGEST_INPUT:
            raise DataError(
                f"one input '{name}' {list(what.shape)} takes {size:,} bytes, the limit is {_LARGEST_INPUT:,}",
                fix="pin the input to a smaller shape, or correct the model",
            )
    batch = sum(math.prod(what.shape) * what.dtype.itemsize for what in declared.values())
    if calibration * batch > _LARGEST_CALIBRATION:
        raise DataError(
            f"{calibration} calibration inputs take up to {calibration * batch:,} bytes, the limit is {_LARGEST_CALIBRATION:,}",
            fix=f"--calibration {_LARGEST_CALIBRATION // batch} or fewer",
        )


def _noise(declared: dict[str, Declared], calibration: int, seed: int) -> Data:
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(calibration):
        batch = {}
        for name, what in declared.items():
            if what.dtype.kind in "iu":
                batch[name] = rng.integers(0, 2, what.shape).astype(what.dtype)
            elif what.dtype.kind in "OUST":
                raise DataError(f"input '{name}' takes text: there is no noise of that", fix=f"give --data FILE.npz with '{name}'")
            elif what.dtype.kind == "b":
                batch[name] = rng.integers(0, 2, what.shape).astype(bool)
            else:
                # The mean is not zero, so that a fault that a symmetric input hides is seen.
                batch[name] = rng.normal(0.25, 1.0, what.shape).astype(what.dtype)
        batches.append(batch)
    return Data("seeded noise", batches, notes=["no data was given: parity was measured on seeded noise, accuracy was not"],
                noise=True)  # fmt: skip


def _single_input(declared: dict[str, Declared], origin: str) -> tuple[str, Declared]:
    if len(declared) != 1:
        raise DataError(
            f"the data holds one array a sample, the model takes {len(declared)} inputs",
            where=origin,
            fix=f"give an .npz with the arrays {', '.join(declared)}",
        )
    return next(iter(declared.items()))


def _batches(arrays: dict[str, np.ndarray], declared: dict[str, Declared], origin: str) -> list[Arrays]:
    """Cuts arrays of samples `[S, ...]` into batches of the size that the graph declares; what does not fill a batch is left out."""
    sizes = {name: max(what.shape[0], 1) if what.shape else 1 for name, what in declared.items()}
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len({Fraction(lengths[name], sizes[name]) for name in sizes}) > 1:
        held = ", ".join(f"{length} of '{name}'" for name, length in lengths.items())
        wanted = ", ".join(f"{size} of '{name}'" for name, size in sizes.items())
        raise DataError(f"the arrays do not hold equally many batches: {held}", where=origin, fix=f"give for each batch {wanted}")
    count = min(lengths[name] // sizes[name] for name in sizes)
    if not count:
        raise DataError("the data holds too few samples for one batch", where=origin, fix=f"give at least {max(sizes.values())}")
    batches = []
    for index in range(count):
        batch = {}
        for name, what in declared.items():
            size = sizes[name]
            part = arrays[name][index * size : (index + 1) * size] if what.shape else arrays[name][index]
            batch[name] = _fit(part, what, name, origin)
        batches.append(batch)
    return batches


def _fit(array: np.ndarray, what: Declared, name: str, origin: str) -> np.ndarray:
    """Holds a batch to the declared shape and casts it to the declared dtype."""
    if array.shape != what.shape:
        raise DataError(
            f"a batch of '{name}' is {list(array.shape)}, the model takes {list(what.shape)}",
            where=origin,
            fix=f"give the data in that shape, or the model the shape of the data: --input {name}:{_dims(what, array)}",
        )
    return _cast(array, what, name, origin)


def _dims(what: Declared, array: np.ndarray) -> str:
    return ",".join(str(dim) for dim in (what.shape[0] if what.shape else 1, *array.shape[1:]))


def _cast(array: np.ndarray, what: Declared, name: str, origin: str) -> np.ndarray:
    """Casts between float types, and between integer types where the values fit; anything else is an error."""
    if array.dtype.kind in "fV" or what.dtype.kind in "fV":
        if array.dtype.kind not in "fiuV" or what.dtype.kind not in "fV":
            raise DataError(f"'{name}' is {array.dtype}, the model takes {what.dtype}", where=origin, fix=f"convert it to {what.dtype}")
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                cast = np.asarray(array, dtype=what.dtype, order="C")
        except (TypeError, ValueError) as error:  # records, and types that .npz files do not keep, such as bfloat16
            raise DataError(f"'{name}' is {array.dtype}, not numbers", where=origin, fix=f"convert it to {what.dtype}") from error
        if not np.isfinite(cast).all():
            if np.isfinite(array).all():
                raise DataError(f"values of '{name}' do not fit {what.dtype}", where=origin, fix="scale them, or remove these samples")
            raise DataError(f"'{name}' holds NaN or infinite values", where=origin, fix="remove these samples")
        return cast
    cast = array.astype(what.dtype)
    if not np.array_equal(cast, array):
        raise DataError(f"values of '{name}' do not fit {what.dtype}", where=origin, fix=f"convert the data to {what.dtype}")
    return np.asarray(cast, order="C")


def _from_dataset(name: str, declared: dict[str, Declared], calibration: int) -> Data:
    make = contracts.datasets.get(name)
    try:
        dataset = make()
    except EdgekitError:
        raise
    except USER_ERRORS as error:  # a dataset may be anybody's code
        raise DataError(f"dataset '{name}' raised {type(error).__name__}: {error}", fix="correct it, or name other data") from error
    input_name, _ = _single_input(declared, name)
    parts = {part: _batches({input_name: array}, declared, name) for part, array in dataset.inputs.items() if part != "train"}

    def labels(part: str) -> np.ndarray | None:
        if part not in dataset.labels:
            return None
        size = declared[input_name].shape[0]
        return dataset.labels[part][: len(parts[part]) * size]

    return Data(
        name,
        parts["calibrate"][:calibration],
        selection=parts["calibrate"],
        selection_labels=labels("calibrate"),
        test=parts["test"],
        test_labels=labels("test"),
        held_out="test" in dataset.labels,
    )


def _from_npz(path: Path, declared: dict[str, Declared], calibration: int) -> Data:
    origin = str(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise DataError("there is no such file", where=origin, fix="check the path") from error
    except Exception as error:  # zip and header errors of many kinds, refused pickles
        raise DataError(f"the file is not an .npz of plain arrays: {error}", where=origin, fix="write it by numpy.savez") from error
    labels = arrays.pop("labels", None)
    if len(declared) == 1 and len(arrays) == 1:
        arrays = {next(iter(declared)): next(iter(arrays.values()))}
    for name in declared:
        if name not in arrays:
            raise DataError(f"the file has no array '{name}'", where=origin, fix=f"it holds: {', '.join(arrays) or 'nothing'}")
    batches = _batches({name: arrays[name] for name in declared}, declared, origin)
    data = Data(origin, batches[:calibration])
    if labels is not None:
        samples = max(len(arrays[name]) for name in declared)
        if labels.ndim != 1 or labels.dtype.kind not in "iu" or len(labels) != samples:
            raise DataError(
                f"'labels' must be {samples} whole numbers, it is {labels.dtype} {list(labels.shape)}",
                where=origin,
                fix="one class a sample",
            )
        data.selection = data.test = batches
        whole = len(batches) * max(what.shape[0] if what.shape else 1 for what in declared.values())
        data.selection_labels = data.test_labels = labels[:whole]
        data.notes.append(f"{origin} has one part: calibration and accuracy use the same samples")
    return data


def _from_iterable(items: Any, origin: str, declared: dict[str, Declared], calibration: int) -> list[Arrays]:
    """Takes batches from an iterable of arrays, tensors, tuples of them, or mappings by input name."""
    try:
        batches = [_named(item, origin, declared) for item in islice(items, calibration)]
    except EdgekitError:
        raise
    except USER_ERRORS as error:
        raise DataError(f"the data raised {type(error).__name__}: {error}", where=origin, fix="it must be an iterable of arrays") from error
    if not batches:
        raise DataError("the data is empty", where=origin, fix="give at least one sample")
    return batches


def _named(item: Any, origin: str, declared: dict[str, Declared]) -> Arrays:
    if isinstance(item, dict):
        given = item
    elif len(declared) == 1:
        # Loaders of labelled data give (input, label).
        given = {next(iter(declared)): item[0] if isinstance(item, tuple | list) and len(item) else item}
    elif isinstance(item, Sequence) and len(item) >= len(declared):
        given = dict(zip(declared, item, strict=False))
    else:
        raise DataError(f"a sample has no arrays for {', '.join(declared)}", where=origin, fix="give mappings by input name")
    arrays = {}
    for name, what in declared.items():
        if name not in given:
            raise DataError(f"a sample has no '{name}'", where=origin, fix=f"it holds: {', '.join(map(str, given))}")
        array = np.asarray(given[name])
        # A sample may come without its batch axis.
        whole = array[None] if array.ndim == len(what.shape) - 1 and what.shape[0] == 1 else array
        arrays[name] = _fit(whole, what, name, origin)
    return arrays


def _from_images(
    folder: Path,
    declared: dict[str, Declared],
    calibration: int,
    seed: int,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None,
) -> Data:
    origin = str(folder)
    name, what = _single_input(declared, origin)
    if len(what.shape) != 4 or what.shape[1] not in (1, 3) or what.dtype.kind not in "fu":
        raise DataError(
            f"the input '{name}' {list(what.shape)} does not take images", where=origin, fix="images need an input [B, 1 or 3, H, W]"
        )
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not files:
        raise DataError("the folder holds no images", where=origin, fix=f"known endings: {', '.join(sorted(_IMAGE_SUFFIXES))}")
    notes = []
    if statistics is None and what.dtype.kind == "f":
        notes.append("the mean and deviation that the model expects of images are not known: pixels were scaled to 0..1")
    # The first files in order are often all of one class.
    taken = np.random.default_rng(seed).choice(len(files), min(calibration * what.shape[0], len(files)), replace=False)
    images = np.stack([_image(files[index], what, statistics) for index in sorted(taken)])
    return Data(origin, _batches({name: images}, declared, origin), notes=notes)


def _image(path: Path, what: Declared, statistics: tuple[tuple[float, ...], tuple[float, ...]] | None) -> np.ndarray:
    """Reads an image as `[C, H, W]`: turned upright, the shorter side resized, the centre cropped, scaled to 0..1 and normalized."""
    from PIL import Image, ImageOps

    _, channels, height, width = what.shape
    try:
        with Image.open(path) as opened:
            image = _eight_bit(ImageOps.exif_transpose(opened), path).convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC)
    except DataError:
        raise
    except Exception as error:  # broken files raise many kinds
        raise DataError(f"the image cannot be read: {error}", where=str(path), fix="remove or replace it") from error
    pixels = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    if what.dtype.kind == "u":
        return pixels.astype(what.dtype)
    scaled = pixels.astype(np.float64) / 255.0
    if statistics is not None:
        mean, deviation = (np.asarray(values, dtype=np.float64).reshape(-1, 1, 1) for values in statistics)
        scaled = (scaled - mean) / deviation
    return scaled.astype(what.dtype)


def _eight_bit(image: Image, path: Path) -> Image:
    """Scales 16 bits a pixel to 8, which PIL's own conversion would cut off at 255."""
    if image.mode.startswith("I;16"):
        from PIL.Image import fromarray

        return fromarray(np.round(np.asarray(image) / 257.0).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise DataError(
            "the image has 32 bits a pixel, whose range is not known", where=str(path), fix="save it with 8 or 16 bits, or as an .npz"
        )
    return image
