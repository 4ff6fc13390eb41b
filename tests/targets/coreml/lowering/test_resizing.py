"""Resize, lowered and run, against ONNX's reference; which operators of MIL it becomes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from edgekit.targets.coreml.lowering.resizing import GRIDS, PLACES, ROUNDED, Axis, Rule, weights
from tests.targets.coreml.lowered import check
from tests.targets.coreml.lowering.moves_support import floats, graph, refused, result

X = floats(1, 2, 5, 6)
COORDINATES = [name for name in PLACES if name != "tf_crop_and_resize"]


def _operators(converted) -> list[str]:
    found = [op.op_type for op in converted.model._mil_program.functions["main"].operations]
    return [name for name in found if name not in ("const", "identity")]


def _attributes(**given) -> str:
    return ", ".join(f'{name}="{value}"' if isinstance(value, str) else f"{name}={value}" for name, value in given.items())


SCALES = [(1, 1, 2, 3), (1, 1, 0.5, 0.7), (1, 1, 1.7, 0.4), (1, 2.5, 1, 1.3)]


def _by_scales(runtime=False, **attributes):
    """All scales in one model."""
    outputs, body, constants = [], [], {}
    for at, scales in enumerate(SCALES):
        shape = ",".join(str(int(np.float32(size) * np.float32(scale))) for size, scale in zip(X.shape, scales, strict=True))
        outputs.append(f"float[{shape}] y{at}")
        body.append(f'y{at} = Resize<{_attributes(**attributes)}>(x, "", s{at})')
        constants[f"s{at}"] = np.array(scales, np.float32)
    check(graph("float[1,2,5,6] x", ", ".join(outputs), " ".join(body)), {"x": X}, runtime=runtime, **constants)


def _by_sizes(sizes, x=X, **attributes):
    shapes = ",".join(map(str, x.shape)), ",".join(map(str, sizes))
    text = graph(f"float[{shapes[0]}] x", f"float[{shapes[1]}] y", f'y = Resize<{_attributes(**attributes)}>(x, "", "", s)')
    return check(text, {"x": x}, s=np.array(sizes))


@pytest.mark.parametrize(("coordinates", "nearest"), itertools.product(COORDINATES, ROUNDED))
def test_nearest(coordinates, nearest):
    """As ONNX Runtime where it computes places in float32: ONNX's reference does in float64, and misses elements that lie on a place."""
    runtime = coordinates in ("half_pixel", "pytorch_half_pixel", "asymmetric")
    _by_scales(mode="nearest", runtime=runtime, coordinate_transformation_mode=coordinates, nearest_mode=nearest)


@pytest.mark.parametrize(("size", "new"), [(9, 3), (6, 2), (10, 2), (30, 3), (7, 1), (21, 14)])
def test_nearest_by_the_scale_of_two_sizes(size, new):
    """PyTorch's `interpolate(scale_factor=1/3)`: every third element, and not the one before it."""
    x = np.arange(size, dtype=np.float32)[None, None, None]
    body = 'y = Resize<mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor">(x, "", s)'
    text = graph(f"float[1,1,1,{size}] x", f"float[1,1,1,{new}] y", body)
    expected = torch.nn.functional.interpolate(torch.from_numpy(x), size=(1, new), mode="nearest")
    np.testing.assert_array_equal(result(text, {"x": x}, s=np.array([1, 1, 1, new / size], np.float32)), expected)


@pytest.mark.parametrize("coordinates", COORDINATES)
@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("antialias", [0, 1])
def test_interpolation(coordinates, mode, antialias):
    _by_scales(mode=mode, coordinate_transformation_mode=coordinates, antialias=antialias)


@pytest.mark.parametrize("antialias", [0, 1])
def test_cubic_with_its_attributes(antialias):
    _by_sizes((1, 2, 3, 11), mode="cubic", cubic_coeff_a=-0.5, exclude_outside=1, antialias=antialias)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_other_ranks(mode):
    for shape, sizes in (((7,), (10,)), ((2, 5), (3, 9)), ((1, 2, 6), (1, 2, 9)), ((1, 2, 3, 4, 5), (1, 2, 4, 3, 7))):
        _by_sizes(sizes, floats(*shape), mode=mode)


OPERATORS = [
    (
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        (1, 2, 10, 18),
        ["upsample_nearest_neighbor"],
    ),
    ({"mode": "nearest"}, (1, 2, 10, 12), ["upsample_nearest_neighbor"]),
    ({"mode": "linear"}, (1, 2, 10, 12), ["resize_bilinear"]),
    ({"mode": "linear"}, (1, 2, 3, 14), ["resize_bilinear"]),
    ({"mode": "linear", "coordinate_transformation_mode": "align_corners"}, (1, 2, 9, 6), ["resize_bilinear"]),
    ({"mode": "linear", "coordinate_transformation_mode": "asymmetric"}, (1, 2, 9, 4), ["resize_bilinear"]),
    ({"mode": "linear", "antialias": 1}, (1, 2, 3, 4), ["matmul", "matmul"]),
    ({"mode": "linear"}, (1, 3, 5, 12), ["matmul", "matmul"]),
    ({"mode": "cubic"}, (1, 2, 8, 6), ["matmul"]),
    ({"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, (1, 2, 5, 3), ["slice_by_index"]),
    ({"mode": "nearest"}, (1, 2, 7, 6), ["gather"]),
]


@pytest.mark.parametrize(("attributes", "sizes", "expected"), OPERATORS)
def test_operators_of_mil_are_used_where_their_documented_grid_is_the_same(attributes, sizes, expected):
    found = _operators(_by_sizes(sizes, **attributes))
    assert sorted(name for name in found if name != "transpose") == expected


def test_documented_grids():
    """The examples of coremltools' documentation of `resize_bilinear`, for an input of 2 elements."""
    grid = {name: GRIDS[name](np.arange(5.0), 2, 5).clip(0, 1).tolist() for name in GRIDS}
    np.testing.assert_allclose(grid["UNALIGN_CORNERS"], [0, 0.1, 0.5, 0.9, 1], atol=1e-12)
    np.testing.assert_allclose(grid["STRICT_ALIGN_CORNERS"], [0, 0.25, 0.5, 0.75, 1], atol=1e-12)
    np.testing.assert_allclose(grid["DEFAULT"], [0, 0.4, 0.8, 1, 1], atol=1e-12)


@pytest.mark.parametrize(("mode", "antialias"), [("bilinear", False), ("bicubic", False), ("bilinear", True), ("bicubic", True)])
@pytest.mark.parametrize("new", [3, 5, 8, 13])
def test_matrices_agree_with_pytorch(mode, antialias, new):
    a = -0.5 if antialias else -0.75  # PyTorch's
    rule = Rule(
        "linear" if mode == "bilinear" else "cubic", "pytorch_half_pixel", cubic_a=a, exclude_outside=antialias, antialias=antialias
    )
    x = torch.eye(7, dtype=torch.float64).reshape(1, 7, 7, 1).repeat(1, 1, 1, 2)
    expected = torch.nn.functional.interpolate(x, size=(new, 2), mode=mode, antialias=antialias)[0, :, :, 0].T
    np.testing.assert_allclose(weights(rule, Axis(7, new, new / 7)), expected, atol=1e-6)


@pytest.mark.parametrize("policy", ["stretch", "not_larger", "not_smaller"])
@pytest.mark.parametrize(("mode", "targets"), [("nearest", (8, 7)), ("linear", (3, 4)), ("linear", (8, 7))])
def test_aspect_ratio_policies_and_axes(policy, mode, targets):
    ratio = {"stretch": None, "not_larger": min, "not_smaller": max}[policy]
    ratios = [target / size for target, size in zip(targets, (6, 5), strict=True)]
    width, height = targets if ratio is None else (int(ratio(ratios) * size + 0.5) for size in (6, 5))
    attributes = _attributes(mode=mode, keep_aspect_ratio_policy=policy)
    text = graph("float[1,2,5,6] x", f"float[1,2,{height},{width}] y", f'y = Resize<axes=[3,2], {attributes}>(x, "", "", s)')
    check(text, {"x": X}, s=np.array(targets))


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("roi", [(0.4, 0.6, 0.6, 0.8), (0.4, -0.3, 1.2, 1.7)])
def test_crop_and_resize(mode, roi):
    attributes = _attributes(mode=mode, coordinate_transformation_mode="tf_crop_and_resize", extrapolation_value=10.0)
    text = graph("float[1,2,5,6] x", "float[1,2,3,4] y", f'y = Resize<axes=[2,3], {attributes}>(x, r, "", s)')
    check(text, {"x": X}, r=np.array(roi, np.float32), s=np.array([3, 4]))


def test_computed_sizes_are_the_static_shape_of_the_result():
    text = graph("float[1,2,5,6] x, int64[4] s", "float[1,2,7,8] y", 'y = Resize<mode="linear">(x, "", "", s)')
    check(text, {"x": X, "s": np.array([1, 2, 7, 8])})


@pytest.mark.parametrize("kind", ["int32", "bool"])
def test_nearest_of_other_types(kind):
    x = (X * 3).astype(kind)
    text = graph(f"{kind}[1,2,5,6] x", f"{kind}[1,2,10,9] y", 'y = Resize(x, "", "", s)')
    rows, columns = np.repeat(np.arange(5), 2), np.ceil((np.arange(9) + 0.5) * 6 / 9 - 1).astype(int)
    np.testing.assert_array_equal(result(text, {"x": x}, s=np.array([1, 2, 10, 9])), x[:, :, rows][..., columns])


def test_half_precision():
    text = graph("float[1,2,5,6] x", "float[1,2,8,9] y", 'y = Resize<mode="cubic">(x, "", "", s)')
    check(text, {"x": X}, half=True, s=np.array([1, 2, 8, 9]))


@pytest.mark.parametrize(
    ("inputs", "attributes", "reason"),
    [
        ("float[1,2,5,6] x, float[4] s", "", "computed 'scales'"),
        ("int32[1,2,5,6] x", 'mode="linear"', "integers in mode 'linear'"),
        ("float[1,2,5,6] x", 'coordinate_transformation_mode="tf_half_pixel_for_nn"', "tf_half_pixel_for_nn"),
        ("float[1,2,5,6] x", "antialias=1", "antialias"),
        ("float[1,2,5,6] x", 'nearest_mode="odd"', "nearest_mode 'odd'"),
    ],
)
def test_refusals(inputs, attributes, reason):
    kind = inputs.split("[")[0]
    body = f'y = Resize<{attributes}>(x, "", s)' if attributes else 'y = Resize(x, "", s)'
    constants = {} if " s" in inputs else {"s": np.array([1, 1, 2, 2], np.float32)}
    refused(graph(inputs, f"{kind}[1,2,10,12] y", body), reason, **constants)
