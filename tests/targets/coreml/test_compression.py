"""Weights in fewer bits: the arithmetic against float64 formulas, the files against coremltools' own expansion, sizes by the bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgekit
from edgekit.compiler import Timing
from edgekit.contracts import Effect
from edgekit.errors import UsageError
from edgekit.targets.coreml import CoreMl
from edgekit.targets.coreml.compression import pack, palettize, parse_storage, quantize_blocks, quantize_channels
from edgekit.targets.coreml.reference.constants import unpack
from tests.targets.coreml.lowered import lower, run

FORMS = ("palette1", "palette2", "palette4", "palette6", "palette8", "int8", "int4", "int4:16", "sparse")


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 70))
@settings(max_examples=100)
def test_packing_is_that_of_coremltools(seed: int, bits: int, count: int) -> None:
    from coremltools.optimize import _utils

    values = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack(values, bits)
    np.testing.assert_array_equal(packed, _utils.pack_elements_into_bits(values, bits))
    np.testing.assert_array_equal(unpack(packed, bits, count), values)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 8])
def test_palettes_are_at_a_fixed_point_of_k_means(bits: int) -> None:
    """Every element has its nearest value, every value is the mean of its elements, and more bits are better."""
    array = np.random.default_rng(bits).normal(size=(400, 80)).astype(np.float32)
    indices, centres = palettize(array, bits)
    part = array[:20]
    nearest = np.abs(part[..., None] - centres).argmin(-1)
    np.testing.assert_allclose(np.abs(part - centres[indices[:20]]), np.abs(part - centres[nearest]), atol=1e-7)
    means = [array[indices == index].astype(np.float64).mean() for index in range(len(centres)) if (indices == index).any()]
    np.testing.assert_allclose(np.sort(means), np.unique(centres[np.unique(indices)]), atol=0.02 if bits > 4 else 2e-3)
    error = np.mean((array - centres[indices]) ** 2)
    # Panter & Dite: the least mean square error of a fine quantizer of a normal density is sqrt(3) pi / 2 / 4^bits.
    assert error < 1.35 * np.sqrt(3) * np.pi / 2 / 4.0**bits


def test_few_values_are_kept_exactly() -> None:
    array = np.random.default_rng(0).choice([-1.5, 0.0, 0.25, 3.0], (30, 40)).astype(np.float32)
    indices, centres = palettize(array, 2)
    np.testing.assert_array_equal(centres.astype(np.float32)[indices], array)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
@settings(max_examples=50)
def test_scales_per_channel(seed: int, axis: int) -> None:
    array = np.random.default_rng(seed).normal(size=(6, 8, 3)).astype(np.float32)
    array[0] = 0
    data, scale = quantize_channels(array, axis)
    spread = scale.reshape([-1, 1, 1] if axis == 0 else [1, -1, 1])
    assert np.abs(data * spread - array).max() <= (spread / 2).max() * (1 + 1e-6)
    assert data.min() >= -127


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 4, 5, 8, 16, 64]))
@settings(max_examples=50)
def test_scales_per_block(seed: int, block: int) -> None:
    array = np.random.default_rng(seed).normal(size=(6, 16)).astype(np.float32)
    data, scale = quantize_blocks(array, 1, block)
    size = 16 // scale.shape[1]
    assert size <= block
    assert 16 % size == 0
    spread = np.repeat(scale, size, axis=1)
    assert (np.abs(data * spread - array) <= spread / 2 * (1 + 1e-6)).all()
    assert np.abs(data).max() <= 7


NET = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[1,48,5,5] image, float[4,96] tokens) => (float[1,64,3,3] y, float[4,64] z)
{
    y = Conv(image, filters)
    z = MatMul(tokens, matrix)
}
"""


def net() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    model = onnx.parser.parse_model(NET)
    arrays = {"filters": rng.normal(size=(64, 48, 3, 3)), "matrix": rng.normal(size=(96, 64))}
    arrays = {name: array * (np.abs(array) > 1) for name, array in arrays.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items())
    return model


@pytest.mark.parametrize("version", ["iOS16", "iOS18"])
@pytest.mark.parametrize("form", FORMS)
def test_error_follows_the_bits(form: str, version: str) -> None:
    """A normal weight of n bits has a relative error near 2^-n in each product; what is stored is what the evaluator expands."""
    storage = parse_storage(form)
    assert storage is not None
    if storage.version > version:
        pytest.skip("this form needs iOS18")
    rng = np.random.default_rng(1)
    feeds = {"image": rng.normal(size=(1, 48, 5, 5)).astype(np.float32), "tokens": rng.normal(size=(4, 96)).astype(np.float32)}
    exact = run(lower(net(), version=version), feeds)
    found = run(lower(net(), version=version, storage=storage), feeds)
    for name, array in exact.items():
        noise = np.linalg.norm(found[name] - array) / np.linalg.norm(array)
        if storage.kind == "sparse":
            np.testing.assert_allclose(found[name], array, atol=1e-4)
        else:
            assert 2.0 ** -(storage.bits + 3) < noise < 2.0 ** -(storage.bits - 1.3), noise


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_scales_that_vanish_in_float16_leave_weights_as_they_are(form: str) -> None:
    """Weights near 1e-6 are numbers of float16; their scales of 1e-8 and 1e-7 are none, or hardly."""
    storage = parse_storage(form)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> net (float[4,96] tokens) => (float[4,64] z) { z = MatMul(tokens, matrix) }'
    )
    weights = (np.random.default_rng(0).normal(size=(96, 64)) * 1e-6).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weights, "matrix"))
    feeds = {"tokens": np.full((4, 96), 100, np.float32)}
    found = run(lower(model, half=True, storage=storage), feeds)["z"]
    np.testing.assert_array_equal(found, run(lower(model, half=True), feeds)["z"])
    assert np.abs(found).max() > 1e-4


@pytest.mark.parametrize(("form", "shape"), [("int8", (3, 96, 64)), ("int4", (3, 96, 64)), ("int4", (197, 64))])
def test_each_output_of_a_product_has_scales_of_its_own(form: str, shape: tuple[int, ...]) -> None:
    """Outputs differ in size by 1,000: with common scales the small ones would vanish. 197 is prime, and gets no block of 4 bits."""
    rng = np.random.default_rng(0)
    matrix = (rng.normal(size=shape) * 10.0 ** np.linspace(-3, 0, shape[-1])).astype(np.float32)
    batch = "".join(f"{size}," for size in shape[:-2])
    text = f"net (float[{batch}4,{shape[-2]}] x) => (float[{batch}4,{shape[-1]}] y) {{ y = MatMul(x, matrix) }}"
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> {text}')
    model.graph.initializer.append(onnx.numpy_helper.from_array(matrix, "matrix"))
    feeds = {"x": rng.normal(size=(*shape[:-2], 4, shape[-2])).astype(np.float32)}
    exact, found = (run(lower(model, storage=storage), feeds)["y"] for storage in (None, parse_storage(form)))
    error = np.linalg.norm(found - exact, axis=tuple(range(exact.ndim - 1))) / np.linalg.norm(exact, axis=tuple(range(exact.ndim - 1)))
    assert 1e-4 < error.max() < (0.05 if form == "int8" or shape[0] == 197 else 0.3)


def test_wrong_forms() -> None:
    for text in ("palette3", "int5", "int4:x", "palette", "int4:1"):
        with pytest.raises(UsageError, match="weights"):
            CoreMl(weights=text)
    assert CoreMl(weights="int8").effect is Effect.APPROXIMATE
    assert CoreMl(weights="sparse").effect is CoreMl().effect is Effect.EXACT
    assert CoreMl(weights="int8").uncompressed() == CoreMl()


def test_a_compile_measures_compressed_weights(tmp_path: Path) -> None:
    """A compile with compressed weights is not held to rounding: it is measured, told of in the report, and verified against itself."""
    plain = edgekit.compile("vit_digits", target="coreml", out=tmp_path / "plain", timing=Timing(0), calibration=4)
    small = edgekit.compile("vit_digits", target='coreml{weights="palette4"}', out=tmp_path / "small", timing=Timing(0), calibration=4)
    sizes = [sum(file.stat().st_size for file in (item.path / "model.mlpackage").rglob("*.bin")) for item in (plain, small)]
    assert sizes[0] / sizes[1] > 3
    assert 10 < small.report["artifact"]["parity"]["sqnr_db"] < plain.report["artifact"]["parity"]["sqnr_db"]
    small.verify()


@pytest.mark.parametrize(
    ("form", "least"), [("palette8", 1.9), ("int8", 1.9), ("palette4", 3.6), ("int4", 3.3), ("palette2", 6.5), ("palette1", 11)]
)
def test_files_follow_the_bits(form: str, least: float, tmp_path: Path) -> None:
    """Against the same network's own float16 package; a MatMul's weights are not kept beside their compressed form."""
    sizes = []
    for storage in (None, parse_storage(form)):
        lower(net(), half=True, storage=storage).model.save(str(tmp_path / f"{len(sizes)}.mlpackage"))
        sizes.append(sum(file.stat().st_size for file in (tmp_path / f"{len(sizes)}.mlpackage").rglob("*.bin")))
    assert sizes[0] / sizes[1] > least
