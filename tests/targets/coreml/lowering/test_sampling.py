"""Sampling at computed places, Fourier transforms and windows, lowered and run, against ONNX's reference, PyTorch and numpy."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from tests.targets.coreml.lowered import check, lower, run
from tests.targets.coreml.lowering.moves_support import floats, graph, refused, result

PADDINGS = ["zeros", "border", "reflection"]


def _grid(*shape: int) -> np.ndarray:
    """Places within and far beyond the borders, and some on the edges between elements."""
    grid = np.random.default_rng(1).uniform(-2.6, 2.6, shape).astype(np.float32)
    grid[:, 0] = np.round(grid[:, 0] * 4) / 4
    return grid


@pytest.mark.parametrize(("mode", "padding", "aligned"), itertools.product(["linear", "nearest", "cubic"], PADDINGS, [0, 1]))
def test_grid_sample(mode, padding, aligned):
    """As ONNX Runtime and PyTorch: ONNX's reference takes another view of cubic weights that reach beyond the border."""
    body = f'y = GridSample<mode="{mode}", padding_mode="{padding}", align_corners={aligned}>(x, g)'
    text = graph("float[2,3,4,5] x, float[2,4,3,2] g", "float[2,3,4,3] y", body)
    x, grid = floats(2, 3, 4, 5), _grid(2, 4, 3, 2)
    model = onnx.parser.parse_model(text)
    converted = lower(model)
    (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x, "g": grid})
    np.testing.assert_allclose(run(converted, {"x": x, "g": grid})["y"], expected, atol=2e-5)
    operators = {op.op_type for op in converted.model._mil_program.functions["main"].operations}
    assert ("resample" in operators) == (mode == "linear")


@pytest.mark.parametrize(("mode", "padding", "aligned"), itertools.product(["linear", "nearest"], PADDINGS, [0, 1]))
def test_grid_sample_of_volumes(mode, padding, aligned):
    x, grid = floats(2, 2, 3, 4, 2), _grid(2, 2, 3, 2, 3)
    body = f'y = GridSample<mode="{mode}", padding_mode="{padding}", align_corners={aligned}>(x, g)'
    check(graph("float[2,2,3,4,2] x, float[2,2,3,2,3] g", "float[2,2,2,3,2] y", body), {"x": x, "g": grid})


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_grid_sample_in_half_precision_keeps_places_in_float32(mode):
    body = f'y = GridSample<mode="{mode}", align_corners=1>(x, g)'
    rows, columns = np.meshgrid(np.arange(3), np.arange(1500, 1506), indexing="ij")
    grid = np.stack([columns / 1999 * 2 - 1, rows / 2 * 2 - 1], -1)[None].astype(np.float32)
    check(graph("float[1,1,3,2000] x, float[1,3,6,2] g", "float[1,1,3,6] y", body), {"x": floats(1, 1, 3, 2000), "g": grid}, half=True)


@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize(("theta", "size"), [("2,2,3", (2, 3, 4, 5)), ("2,3,4", (2, 3, 2, 4, 3))])
def test_affine_grid(aligned, theta, size):
    shape = ",".join(map(str, (size[0], *size[2:], len(size) - 2)))
    text = graph(f"float[{theta}] t", f"float[{shape}] y", f"y = AffineGrid<align_corners={aligned}>(t, s)")
    given = floats(*map(int, theta.split(",")))
    expected = torch.nn.functional.affine_grid(torch.from_numpy(given), list(size), bool(aligned))
    np.testing.assert_allclose(result(text, {"t": given}, s=np.array(size)), expected, atol=1e-5)


@pytest.mark.parametrize(("mode", "coordinates", "samples"), itertools.product(["avg", "max"], ["half_pixel", "output_half_pixel"], [1, 2]))
def test_roi_align(mode, coordinates, samples):
    regions = np.array([[0, 0, 9, 9], [-3, 2, 4, 5.5], [6, 6, 30, 31], [2, 2, 2.2, 2.1], [15, 13, 20, 22]], np.float32)
    body = (
        f'y = RoiAlign<mode="{mode}", coordinate_transformation_mode="{coordinates}", sampling_ratio={samples}, '
        "output_height=2, output_width=3, spatial_scale=0.5>(x, r, b)"
    )
    text = graph("float[2,3,8,9] x, float[5,4] r, int64[5] b", "float[5,3,2,3] y", body)
    check(text, {"x": floats(2, 3, 8, 9), "r": regions, "b": np.array([0, 1, 0, 1, 1])})


def _complex(x: np.ndarray) -> np.ndarray:
    return x[..., 0] + 1j * x[..., 1] if x.shape[-1] == 2 else x[..., 0]


@pytest.mark.parametrize("length", [None, 5, 9])
@pytest.mark.parametrize("axis", [1, 2, -2])
@pytest.mark.parametrize(("parts", "inverse", "onesided"), [(1, 0, 0), (1, 0, 1), (2, 0, 0), (2, 1, 0), (1, 1, 0), (2, 1, 1)])
def test_dft(length, axis, parts, inverse, onesided):
    x = floats(2, 6, 7, parts)
    place = axis % 4
    size = length or (2 * (x.shape[place] - 1) if inverse and onesided else x.shape[place])
    name = ("irfft" if onesided else "ifft") if inverse else ("rfft" if onesided else "fft")
    expected = getattr(np.fft, name)(_complex(x), size, place)
    expected = np.stack([expected.real, expected.imag], -1) if np.iscomplexobj(expected) else expected[..., None]
    dims = ",".join(map(str, expected.shape))
    body = f"y = DFT<inverse={inverse}, onesided={onesided}>(x, {'n' if length else chr(34) * 2}, a)"
    constants = {"a": np.array(axis)} | ({"n": np.array(length)} if length else {})
    found = result(graph(f"float[2,6,7,{parts}] x", f"float[{dims}] y", body), {"x": x}, **constants)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("window", ["known", "computed", "none"])
@pytest.mark.parametrize(("parts", "onesided"), [(1, 1), (1, 0), (2, 0)])
def test_stft(window, parts, onesided):
    x, shape = floats(2, 20, parts), np.hanning(8).astype(np.float32)
    bins = 5 if onesided else 8
    frames = np.stack([_complex(x)[:, at : at + 8] for at in range(0, 13, 3)], 1) * (1 if window == "none" else shape)
    spectrum = np.fft.rfft(frames) if onesided else np.fft.fft(frames)
    inputs = f"float[2,20,{parts}] x" + (", float[8] w" if window == "computed" else "")
    names = "x, t, w, n" if window != "none" else 'x, t, "", n'
    constants = {"t": np.array(3), "n": np.array(8)} | ({"w": shape} if window == "known" else {})
    text = graph(inputs, f"float[2,5,{bins},2] y", f"y = STFT<onesided={onesided}>({names})")
    found = result(text, {"x": x} | ({"w": shape} if window == "computed" else {}), **constants)
    np.testing.assert_allclose(found, np.stack([spectrum.real, spectrum.imag], -1), atol=2e-5)


@pytest.mark.parametrize("name", ["BlackmanWindow", "HannWindow", "HammingWindow"])
@pytest.mark.parametrize("periodic", [0, 1])
def test_windows(name, periodic):
    check(graph("float[9] x", "float[9] y", f"w = {name}<periodic={periodic}>(n) y = Mul(x, w)"), {"x": floats(9)}, n=np.array(9))


def test_mel_weight_matrix():
    constants = {"a": np.array(8), "b": np.array(16), "c": np.array(8192), "d": np.array(0, np.float32), "e": np.array(4096, np.float32)}
    check(graph("float[2,9] x", "float[2,8] y", "m = MelWeightMatrix(a, b, c, d, e) y = MatMul(x, m)"), {"x": floats(2, 9)}, **constants)


@pytest.mark.parametrize(
    ("inputs", "outputs", "body", "reason"),
    [
        ("float[1,4,4] b, float[1,1,4] s", "int64[N,3] y", "y = NonMaxSuppression(b, s)", "needs the shape|NonMaxSuppression"),
        ("float[1,1,4,4] x, float[1,4] r, int64[1] i", "float[1,1,1,1] y", "y = RoiAlign(x, r, i)", "sampling_ratio 0"),
        ("float[1,1,4,4] x, float[1,2,2,2] g", "float[1,1,2,2] y", 'y = GridSample<mode="odd">(x, g)', "mode 'odd'"),
        ("float[1,2,3] t", "float[1,1,4,2] y", "y = AffineGrid<align_corners=1>(t, c)", "size 1"),
        ("float[1,8,2] x", "float[1,5,2] y", "y = DFT<onesided=1>(x)", "one-sided DFT"),
        ("float[4] x, int64 n", "float[4] y", "w = HannWindow(n) y = Mul(x, w)", "computed 'size'"),
    ],
)
def test_refusals(inputs, outputs, body, reason):
    refused(graph(inputs, outputs, body), reason, **({"c": np.array([1, 1, 1, 4])} if "(t, c)" in body else {}))
