"""Data from every place that the user may name, and what is said when it does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from edgekit.contracts import Dataset, datasets
from edgekit.data import Data, Declared, load_data
from edgekit.errors import DataError

F32 = np.dtype(np.float32)
IMAGE = {"x": Declared((1, 3, 8, 6), F32)}
VECTOR = {"x": Declared((2, 3), F32)}


def _load(origin, declared, calibration: int = 4, **more) -> Data:
    return load_data(origin, declared, calibration=calibration, seed=0, **more)


def test_noise_is_seeded_and_of_the_declared_types() -> None:
    declared = {"x": Declared((1, 3), F32), "ids": Declared((1, 4), np.dtype(np.int64)), "mask": Declared((1, 4), np.dtype(bool))}
    first, second = _load(None, declared), _load(None, declared)
    assert len(first.calibration) == 4
    for a, b in zip(first.calibration, second.calibration, strict=True):
        for name, what in declared.items():
            assert (a[name].shape, a[name].dtype) == (what.shape, what.dtype)
            np.testing.assert_array_equal(a[name], b[name])
    assert any("noise" in note for note in first.notes)


def test_calibration_inputs_must_fit_into_memory() -> None:
    declared = {"x": Declared((1, 3, 224, 224), np.dtype("float32"))}
    with pytest.raises(DataError, match="calibration inputs take") as raised:
        load_data(None, declared, calibration=100_000, seed=0)
    assert raised.value.fix == f"--calibration {2**33 // (3 * 224 * 224 * 4)} or fewer"


def test_npz_is_cut_into_batches(tmp_path: Path) -> None:
    samples = np.arange(21, dtype=np.float64).reshape(7, 3)
    np.savez(tmp_path / "d.npz", x=samples, labels=np.arange(7) % 2)
    data = _load(str(tmp_path / "d.npz"), VECTOR, calibration=2)
    assert [batch["x"].shape for batch in data.calibration] == [(2, 3), (2, 3)]
    assert len(data.test) == 3  # the seventh sample fills no batch
    assert data.test_labels is not None
    assert len(data.test_labels) == 6
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in data.test]), samples[:6].astype(np.float32))


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"y": np.zeros((4, 3)), "z": np.zeros((4, 3))}, "no array 'x'"),
        ({"x": np.zeros((4, 5))}, "--input x:2,5"),
        ({"x": np.zeros((1, 3))}, "too few samples"),
        ({"x": np.full((4, 3), np.nan)}, "NaN"),
        ({"x": np.array([["a", "b", "c"]] * 2)}, "convert it to float32"),
        ({"x": np.zeros((4, 3)), "labels": np.zeros(2, int)}, "'labels' must be 4 whole numbers"),
        ({"x": np.zeros((4, 3)), "labels": np.zeros(5, int)}, "'labels' must be 4 whole numbers"),
        ({"x": np.zeros((5, 3)), "labels": np.zeros(4, int)}, "'labels' must be 5 whole numbers"),
        ({"x": np.full((4, 3), 1e300)}, "do not fit float32"),
        ({"x": np.zeros((4, 3), "V2")}, "convert it to float32"),
        ({"x": np.array([object()] * 4)}, "not an .npz of plain arrays"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError) as caught:
        _load(str(tmp_path / "d.npz"), VECTOR)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_inputs_must_hold_equally_many_batches(tmp_path: Path) -> None:
    declared = {"x": Declared((2, 3), F32), "y": Declared((2, 1), F32), "t": Declared((), F32)}
    np.savez(tmp_path / "d.npz", x=np.zeros((6, 3)), y=np.zeros((6, 1)), t=np.arange(3.0), labels=np.arange(6))
    assert [batch["t"] for batch in _load(str(tmp_path / "d.npz"), declared).test] == [0, 1, 2]
    for x, y, t in ((6, 8, 3), (8, 6, 3), (6, 6, 4), (7, 6, 3)):
        np.savez(tmp_path / "d.npz", x=np.zeros((x, 3)), y=np.zeros((y, 1)), t=np.zeros(t))
        with pytest.raises(DataError, match=f"{x} of 'x', {y} of 'y', {t} of 't'"):
            _load(str(tmp_path / "d.npz"), declared)


def test_which_accuracy_is_of_held_out_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez(tmp_path / "d.npz", x=np.zeros((4, 3)), labels=np.zeros(4, int))
    assert not _load(str(tmp_path / "d.npz"), VECTOR).held_out
    assert not _load(None, VECTOR).held_out
    assert _load("digits", {"x": Declared((1, 1, 32, 32), F32)}).held_out
    inputs = {part: np.zeros((4, 3)) for part in ("calibrate", "test")}
    monkeypatch.setitem(datasets._local, "unlabelled", lambda: Dataset(inputs))
    assert not _load("unlabelled", VECTOR).held_out


def test_a_dataset_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (OSError("gone"), SystemExit(3)):

        def fails(error: BaseException = error) -> Dataset:
            raise error

        monkeypatch.setitem(datasets._local, "broken", fails)
        with pytest.raises(DataError, match=f"'broken' raised {type(error).__name__}: {error}"):
            _load("broken", VECTOR)


def test_integers_must_fit(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.array([[300]]))
    with pytest.raises(DataError, match="do not fit uint8"):
        _load(str(tmp_path / "d.npz"), {"x": Declared((1, 1), np.dtype(np.uint8))})


def test_a_folder_of_images(tmp_path: Path) -> None:
    red = np.zeros((8, 6, 3), np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / "b.png")
    Image.fromarray(red[..., 0]).save(tmp_path / "a.png")
    data = _load(str(tmp_path), IMAGE, statistics=((0.5, 0.5, 0.5), (0.25, 0.5, 0.5)))
    assert len(data.calibration) == 2
    np.testing.assert_allclose(data.calibration[0]["x"], np.broadcast_to([[[[2.0]], [[1.0]], [[1.0]]]], (1, 3, 8, 6)))
    np.testing.assert_allclose(data.calibration[1]["x"], np.broadcast_to([[[[2.0]], [[-1.0]], [[-1.0]]]], (1, 3, 8, 6)))
    assert data.notes == []
    plain = _load(str(tmp_path), IMAGE)
    assert plain.calibration[0]["x"].max() == 1.0
    assert any("not known" in note for note in plain.notes)


def test_sixteen_bit_images_are_scaled(tmp_path: Path) -> None:
    pixels = np.linspace(0, 65535, 48).round().astype(np.uint16).reshape(8, 6)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "b.tif")
    for batch in _load(str(tmp_path), IMAGE).calibration:
        for channel in batch["x"][0]:
            np.testing.assert_allclose(channel, pixels / 65535.0, atol=0.5 / 255 + 1e-6)
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "c.tif")
    with pytest.raises(DataError, match="32 bits") as caught:
        _load(str(tmp_path), IMAGE)
    assert "c.tif" in str(caught.value)


def test_images_are_turned_upright(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    turned = Image.Exif()
    turned[0x112] = 6  # the camera was held turned: 90 degrees clockwise shows the picture upright
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=turned)
    upright = np.rot90(pixels, -1).transpose(2, 0, 1) / 255.0
    np.testing.assert_allclose(_load(str(tmp_path), IMAGE).calibration[0]["x"][0], upright, rtol=1e-6)


def test_images_are_a_seeded_sample_in_order(tmp_path: Path) -> None:
    for index in range(40):
        (tmp_path / f"class{index // 20}").mkdir(exist_ok=True)
        Image.new("RGB", (6, 8), (index, 0, 0)).save(tmp_path / f"class{index // 20}" / f"{index:02}.png")

    def taken(seed: int, calibration: int = 6) -> list[int]:
        batches = load_data(str(tmp_path), IMAGE, calibration=calibration, seed=seed).calibration
        return [round(255 * float(batch["x"][0, 0, 0, 0])) for batch in batches]

    assert taken(0) == taken(0)
    assert taken(0) != taken(1)
    for seed in range(3):
        assert taken(seed) == sorted(set(taken(seed)))
        assert taken(seed)[0] < 20 <= taken(seed)[-1]
    assert taken(0, calibration=100) == list(range(40))


def test_images_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        _load(str(tmp_path), IMAGE)
    (tmp_path / "a.jpg").write_bytes(b"not a picture")
    with pytest.raises(DataError, match="cannot be read"):
        _load(str(tmp_path), IMAGE)
    with pytest.raises(DataError, match="does not take images"):
        _load(str(tmp_path), VECTOR)


def test_iterables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.ones((3, 8, 6), np.float32)
    for items in ([image], [image[None]], [(image, 3)], [{"x": image}], iter([image] * 9)):
        data = _load(items, IMAGE)
        assert 1 <= len(data.calibration) <= 4
        np.testing.assert_array_equal(data.calibration[0]["x"], image[None])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_batches.py").write_text(
        "import numpy as np\n"
        "def batches():\n    while True: yield np.ones((1, 3, 8, 6), np.float32)\n"
        "def broken():\n    raise OSError('gone')\n"
        "def leaves():\n    raise SystemExit(3)\n"
        "def leaves_later():\n    yield np.ones((1, 3, 8, 6), np.float32)\n    raise SystemExit(3)\n"
    )
    assert len(_load("my_batches:batches", IMAGE).calibration) == 4
    with pytest.raises(DataError, match="gone"):
        _load("my_batches:broken", IMAGE)
    for name in ("leaves", "leaves_later"):
        with pytest.raises(DataError, match="SystemExit: 3"):
            _load(f"my_batches:{name}", IMAGE)


@pytest.mark.parametrize(
    ("items", "shape", "says"),
    [
        ([], (1, 3), "empty"),
        ([np.ones((2, 2))], (1, 3), "the model takes"),
        ([{"y": np.ones(3)}], (1, 3), "no 'x'"),
        (7, (1, 3), "iterable"),
        (["text"], (), "convert"),
    ],
)
def test_iterables_that_do_not_fit(items, shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(DataError) as caught:
        _load(items, {"x": Declared(shape, F32)})
    assert says in str(caught.value)


def test_scalars(tmp_path: Path) -> None:
    declared = {"t": Declared((), F32)}
    assert _load([0.5, 0.25], declared).calibration[1]["t"] == np.float32(0.25)
    np.savez(tmp_path / "d.npz", t=np.array([1.0, 2.0]))
    assert [batch["t"].shape for batch in _load(str(tmp_path / "d.npz"), declared).calibration] == [(), ()]


def test_unknown_data() -> None:
    with pytest.raises(DataError) as caught:
        _load("digit", IMAGE)
    assert "did you mean 'digits'?" in str(caught.value)
