"""Reductions, running sums and the largest elements as ONNX's reference computes them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import lower, run
from tests.targets.coreml.lowering.expressions import check_all, graph, lower_all, values

REDUCTIONS = [f"Reduce{name}" for name in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")]
EXACT_IN_INTEGERS = [f"Reduce{name}" for name in ("Sum", "Max", "Min", "Prod", "L1", "SumSquare")]


def _all(names: list[str], keep: int, axes: bool = True, noop: int = 0) -> list[str]:
    return [f"{name}<keepdims: int = {keep}, noop_with_empty_axes: int = {noop}>(x{', axes' if axes else ''})" for name in names]


@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("axes", [[0], [-1], [1, 2], [-3, 2], [2, 0, 1]])
def test_floats_over_every_axis(axes: list[int], keep: int) -> None:
    check_all(_all(REDUCTIONS, keep), {"x": np.abs(values(2, 3, 4)) + 0.1}, axes=np.asarray(axes))


@pytest.mark.parametrize("shape", [(4,), (2, 3), ()])
def test_all_axes_where_none_is_given(shape: tuple[int, ...]) -> None:
    x = np.asarray(np.abs(values(*shape)) + 0.1, np.float32)
    names = [name for name in REDUCTIONS if shape or name != "ReduceLogSumExp"]  # ONNX's reference fails on a scalar one
    for keep in (0, 1):
        check_all(_all(names, keep, axes=False), {"x": x})
    check_all(_all(names, 0), {"x": x}, axes=np.zeros(0, np.int64))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 1, 2, 2)])
def test_no_axes_keep_what_else_the_operator_does(shape: tuple[int, ...]) -> None:
    x = np.abs(values(*shape)) + 0.1
    check_all(_all(REDUCTIONS, 1, noop=1), {"x": x}, axes=np.zeros(0, np.int64))


def test_axes_as_attribute() -> None:
    check_all(["ReduceMax<axes: ints = [1], keepdims: int = 0>(x)", "ReduceL2<axes: ints = [-2]>(x)"], {"x": values(2, 3, 4)}, opset=13)


@pytest.mark.parametrize("keep", [0, 1])
def test_integers(keep: int) -> None:
    x = np.random.default_rng(0).integers(-6, 7, (3, 4, 2))
    check_all(_all(EXACT_IN_INTEGERS, keep), {"x": x}, axes=np.asarray([1]))
    mean = run(lower(graph(_all(["ReduceMean"], keep), {"x": x}, axes=np.asarray([1]))), {"x": x})["y0"]
    np.testing.assert_array_equal(mean, np.trunc(x.mean(axis=1, keepdims=bool(keep))))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.bool_])
def test_extremes_of_narrow_types(dtype: Any) -> None:
    x = np.random.default_rng(1).integers(0, 2 if dtype == np.bool_ else 100, (3, 4)).astype(dtype)
    check_all(_all(["ReduceMax", "ReduceMin"], 0), {"x": x}, axes=np.asarray([1]))


def test_float16() -> None:
    check_all(_all(REDUCTIONS, 1), {"x": np.abs(values(2, 5)) + 0.5}, half=True, axes=np.asarray([1]))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.uint8])
def test_places_of_extremes_among_equals(axis: int, dtype: Any) -> None:
    x = np.random.default_rng(3).integers(0, 3, (4, 5, 6)).astype(dtype)
    forms = itertools.product(("ArgMax", "ArgMin"), (0, 1), (0, 1))
    check_all(
        [f"{name}<axis: int = {axis}, keepdims: int = {keep}, select_last_index: int = {last}>(x)" for name, keep, last in forms], {"x": x}
    )


def test_places_of_extremes_with_defaults() -> None:
    check_all(["ArgMax(x)", "ArgMin(x)"], {"x": values(4, 3)})
    check_all(["ArgMax<keepdims: int = 0>(x)"], {"x": values(4)})


@pytest.mark.parametrize("name", ["CumSum", "CumProd"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_running_sums_and_products(name: str, axis: int, dtype: Any) -> None:
    x = np.random.default_rng(4).integers(-2, 4, (3, 7)).astype(dtype)
    forms = itertools.product((0, 1), repeat=2)
    texts = [f"{name}<exclusive: int = {exclusive}, reverse: int = {reverse}>(x, axis)" for exclusive, reverse in forms]
    check_all(texts, {"x": x}, opset=26, axis=np.asarray(axis))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_running_products_of_short_axes(size: int) -> None:
    texts = ["CumProd(x, axis)", "CumProd<exclusive: int = 1>(x, axis)"]
    check_all(texts, {"x": values(size)}, opset=26, axis=np.asarray(0))


@pytest.mark.parametrize("version", ["iOS15", "iOS17"])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("largest", [0, 1])
def test_largest_and_smallest(axis: int, largest: int, version: str) -> None:
    x = np.random.default_rng(5).permutation(60).reshape(3, 4, 5).astype(np.float32)
    for array in (x, x.astype(np.int32)):
        check_all({"v, i": f"TopK<axis: int = {axis}, largest: int = {largest}>(x, k)"}, {"x": array}, version=version, k=np.asarray([2]))


def test_the_order_of_unsorted_results_is_free() -> None:
    x = values(2, 6)
    found = run(lower(graph({"v, i": "TopK<sorted: int = 0>(x, k)"}, {"x": x}, k=np.asarray([3]))), {"x": x})
    np.testing.assert_array_equal(np.sort(found["v"]), np.sort(x)[:, 3:])
    np.testing.assert_array_equal(np.take_along_axis(x, found["i"], 1), found["v"])


REFUSED = [
    ("CumSum(f, x)", np.asarray(1), "computed 'axis'"),
    ("ReduceL2(x)", np.ones(3, np.int32), "integers"),
    ("ReduceSum(x)", np.ones(3, np.uint32), "UINT32"),
    ("CumSum(x, zero)", np.ones(3, np.uint32), "UINT32"),
]


@pytest.mark.parametrize(("text", "x", "what"), REFUSED, ids=[text for text, _, _ in REFUSED])
def test_what_has_no_exact_form_is_refused(text: str, x: np.ndarray, what: str) -> None:
    with pytest.raises(UnsupportedOpError, match=what):
        lower_all([text], {"x": x, "f": values(2, 3)}, zero=np.asarray(0))


@pytest.mark.parametrize(
    ("body", "what"), [("y = ReduceSum<keepdims = 0>(x, n)", "computed 'axes'"), ("y, places = TopK(x, n)", "computed 'K'")]
)
def test_computed_parameters_are_refused(body: str, what: str) -> None:
    text = f'<ir_version: 10, opset_import: ["" : 23]> g (float[3] x, int64[1] n) => (float[1] y) {{ {body} }}'
    with pytest.raises(UnsupportedOpError, match=what):
        lower(onnx.parser.parse_model(text))
