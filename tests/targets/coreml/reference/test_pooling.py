"""Pools of the evaluator against windows written out, PyTorch, ONNX Runtime and coremltools' shapes."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.pooling import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred_shape, run

Array = np.ndarray[Any, Any]


def _random(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _reduced(operator: str, window: Array, exclude: bool) -> Array:
    """A window, NaN where it is padding."""
    axes = tuple(range(2, window.ndim))
    if operator == "max_pool":
        return np.asarray(np.nanmax(window, axis=axes))
    if operator == "l2_pool":
        return np.asarray(np.sqrt(np.nansum(window * window, axis=axes)))
    return np.asarray(np.nanmean(window, axis=axes) if exclude else np.nan_to_num(window).mean(axis=axes))


def _direct(operator: str, x: Array, kernel: Any, strides: Any, pads: Any, exclude: bool) -> Array:
    wide = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *pads], constant_values=np.nan)
    sizes = [(size - width) // step + 1 for size, width, step in zip(wide.shape[2:], kernel, strides, strict=True)]
    result = np.zeros((*x.shape[:2], *sizes))
    for at in np.ndindex(*sizes):
        window = tuple(slice(i * step, i * step + width) for i, step, width in zip(at, strides, kernel, strict=True))
        result[(..., *at)] = _reduced(operator, wide[(slice(None), slice(None), *window)], exclude)
    return result


def _pads(kind: str, sizes: Any, kernel: Any, strides: Any, custom: list[int]) -> list[tuple[int, int]]:
    if kind == "custom":
        return [(custom[2 * at], custom[2 * at + 1]) for at in range(len(sizes))]
    found = []
    for size, width, stride in zip(sizes, kernel, strides, strict=True):
        total = max(0, (int(np.ceil(size / stride)) - 1) * stride + width - size) if kind != "valid" else 0
        found.append((total // 2, total - total // 2) if kind == "same" else (total - total // 2, total // 2))
    return found


CASES: list[tuple[Any, ...]] = [
    ((9,), (3,), (2,), [1, 0]),
    ((8,), (4,), (1,), [2, 3]),
    ((7, 6), (3, 2), (2, 2), [1, 2, 0, 1]),
    ((5, 5), (1, 3), (3, 1), [0, 0, 2, 2]),
    ((4, 5, 6), (2, 3, 2), (1, 2, 2), [1, 0, 2, 1, 0, 1]),
]


def test_signatures() -> None:
    check_signatures(TABLE)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize("kind", ["valid", "same", "same_lower", "custom"])
@pytest.mark.parametrize(("sizes", "kernel", "strides", "pad"), CASES)
@pytest.mark.parametrize("operator", TABLE)
def test_pad_types(operator: str, sizes: Any, kernel: Any, strides: Any, pad: list[int], kind: str, exclude: bool) -> None:
    x = _random(2, 3, *sizes)
    given: dict[str, Any] = {"kernel_sizes": np.array(kernel, np.int32), "strides": np.array(strides, np.int32), "pad_type": kind}
    if kind == "custom":
        given["pad"] = np.array(pad, np.int32)
    if operator == "avg_pool":
        given["exclude_padding_from_average"] = exclude
    result = call(TABLE[operator], x=x, **given)
    np.testing.assert_allclose(result, _direct(operator, x, kernel, strides, _pads(kind, sizes, kernel, strides, pad), exclude), atol=1e-5)
    if operator != "l2_pool" or len(sizes) < 3:
        assert result.shape == inferred_shape(operator, "iOS16", x=x, **given)


@pytest.mark.parametrize("operator", TABLE)
def test_strides_are_1_by_default(operator: str) -> None:
    x = _random(1, 2, 5, 4)
    result = call(TABLE[operator], x=x, kernel_sizes=np.array([2, 3], np.int32), pad_type="VALID")
    np.testing.assert_allclose(result, _direct(operator, x, (2, 3), (1, 1), [(0, 0)] * 2, False), atol=1e-5)


@pytest.mark.parametrize("exclude", [False, True])
@pytest.mark.parametrize(("size", "width", "step", "pad"), list(itertools.product([6, 7, 9], [2, 3, 4], [1, 2, 3], [0, 1])))
@pytest.mark.parametrize("rank", [1, 2])
def test_ceil_mode_is_that_of_pytorch(rank: int, size: int, width: int, step: int, pad: int, exclude: bool) -> None:
    x = _random(1, 2, *[size] * rank)
    given: dict[str, Any] = {
        "kernel_sizes": np.array([width] * rank, np.int32), "strides": np.array([step] * rank, np.int32), "pad_type": "custom",
        "pad": np.array([pad] * 2 * rank, np.int32), "ceil_mode": True,
    }  # fmt: skip
    shape = inferred_shape("max_pool", x=x, **given)
    tensor = torch.from_numpy(x)
    sizes: Any = ([width] * rank, [step] * rank, [pad] * rank)
    maximum = (functional.max_pool1d if rank == 1 else functional.max_pool2d)(tensor, *sizes, ceil_mode=True)
    if shape != tuple(maximum.shape):  # without padding the documentation keeps a last window that PyTorch drops, as it is empty
        assert pad == 0
        assert step > width
        with pytest.raises(ValueError, match="no element"):
            call(TABLE["max_pool"], x=x, **given)
        return
    np.testing.assert_array_equal(call(TABLE["max_pool"], x=x, **given), maximum.numpy())
    average = (functional.avg_pool1d if rank == 1 else functional.avg_pool2d)(tensor, *sizes, ceil_mode=True, count_include_pad=not exclude)
    result = call(TABLE["avg_pool"], x=x, **given, exclude_padding_from_average=exclude)
    np.testing.assert_allclose(result, average.numpy(), atol=1e-5)
    norm = functional.avg_pool2d if rank == 2 else functional.avg_pool1d
    squares = functional.pad(tensor.double() ** 2, [pad, pad + step + width] * rank)
    expected = (norm(squares, sizes[0], sizes[1]) * width**rank).sqrt()[(..., *[slice(count) for count in shape[2:]])]
    np.testing.assert_allclose(call(TABLE["l2_pool"], x=x, **given), expected.numpy(), atol=1e-5)


@pytest.mark.parametrize(("kind", "auto_pad"), [("same", "SAME_UPPER"), ("same_lower", "SAME_LOWER")])
@pytest.mark.parametrize(("operator", "name"), [("avg_pool", "AveragePool"), ("max_pool", "MaxPool")])
def test_same_is_that_of_onnx(operator: str, name: str, kind: str, auto_pad: str) -> None:
    x = _random(1, 2, 8, 9)
    node = onnx.helper.make_node(name, ["x"], ["y"], kernel_shape=[3, 4], strides=[2, 3], auto_pad=auto_pad)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, x.shape)], [value("y", 1, [None] * 4)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    (expected,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
    given: dict[str, Any] = {"kernel_sizes": np.array([3, 4], np.int32), "strides": np.array([2, 3], np.int32), "pad_type": kind}
    if operator == "avg_pool":
        given["exclude_padding_from_average"] = True
    np.testing.assert_allclose(call(TABLE[operator], x=x, **given), expected, atol=1e-5)


@pytest.mark.parametrize("operator", ["max_pool", "avg_pool"])
def test_a_window_without_elements_is_refused(operator: str) -> None:
    given = {"exclude_padding_from_average": True} if operator == "avg_pool" else {}
    with pytest.raises(ValueError, match="no element"):
        call(TABLE[operator], x=_random(1, 1, 4), kernel_sizes=np.array([2]), pad_type="custom", pad=np.array([2, 0]), **given)


def test_in_a_program() -> None:
    from coremltools.converters.mil.mil import Builder as mb

    x = _random(1, 2, 6, 6)

    def build(x: Any) -> Any:
        pooled = mb.max_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid")
        return mb.avg_pool(x=pooled, kernel_sizes=[3, 3], pad_type="same", exclude_padding_from_average=True)

    (result,) = run(build, {"x": x}, "iOS15", TABLE)
    pooled = _direct("max_pool", x, (2, 2), (2, 2), [(0, 0)] * 2, False)
    np.testing.assert_allclose(result, _direct("avg_pool", pooled, (3, 3), (1, 1), [(1, 1)] * 2, True), atol=1e-5)
