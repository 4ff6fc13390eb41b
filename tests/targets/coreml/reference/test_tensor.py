"""Operators that make, join, cut, order and count tensors: against coremltools' value inference, numpy and the documentation's examples."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from coremltools.converters.mil.mil import Builder as mb

from edgekit.targets.coreml.reference.operators import elementwise
from edgekit.targets.coreml.reference.operators.tensor import TABLE
from tests.targets.coreml.reference.mil_support import call, check_signatures, inferred, run


def _values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).normal(0, 2, shape), np.float32)


def _same(name: str, target: str = "iOS15", **arguments: Any) -> Any:
    """Calls an operator and holds its result against the one that coremltools infers."""
    result = call(TABLE[name], **arguments)
    expected = inferred(name, target, **arguments)
    for ours, theirs in zip(*((item if isinstance(item, tuple) else (item,)) for item in (result, expected)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    return result


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_argsort(kind: Any, axis: int, ascending: bool) -> None:
    x = np.random.default_rng(0).permutation(60).reshape(3, 4, 5).astype(kind)
    assert _same("argsort", x=x, axis=axis, ascending=ascending).dtype == np.int32


def test_argsort_by_default_and_with_equal_values() -> None:
    assert call(TABLE["argsort"], x=np.array([1.0, 3.0, 1.0, 3.0], np.float32)).tolist() == [1, 3, 0, 2]
    assert call(TABLE["argsort"], x=np.array([1.0, 3.0, 1.0, 3.0], np.float32), ascending=True).tolist() == [0, 2, 1, 3]


@pytest.mark.parametrize(("lower", "upper"), [(-1, -1), (0, -1), (-1, 0), (0, 0), (1, 2), (2, 0), (10, 1)])
@pytest.mark.parametrize("shape", [(4, 4), (2, 3, 5), (1, 2, 5, 3)])
def test_band_part(shape: tuple[int, ...], lower: int, upper: int) -> None:
    _same("band_part", x=_values(*shape), lower=lower, upper=upper)


def test_band_part_by_default_of_other_types() -> None:
    for x in (np.arange(6, dtype=np.int32).reshape(2, 3), np.ones((2, 3), bool), np.full((2, 3), np.inf, np.float32)):
        np.testing.assert_array_equal(call(TABLE["band_part"], x=x), x)
    np.testing.assert_array_equal(
        call(TABLE["band_part"], x=np.full((2, 2), np.inf, np.float32), lower=0, upper=0), [[np.inf, 0], [0, np.inf]]
    )
    assert call(TABLE["band_part"], x=np.ones((2, 2), bool), lower=0).tolist() == [[True, True], [False, True]]


IN1, IN2 = np.array([[1, 2], [3, 4], [5, 6]], np.int32), np.array([[7, 8], [9, 10], [11, 12]], np.int32)


def test_concat_as_documented() -> None:
    joined = call(TABLE["concat"], values=[IN1, IN2], axis=0, interleave=False)
    assert joined.tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10], [11, 12]]
    interleaved = call(TABLE["concat"], values=[IN1, IN2], axis=0, interleave=True)
    assert interleaved.tolist() == [[1, 2], [7, 8], [3, 4], [9, 10], [5, 6], [11, 12]]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_concat(axis: int) -> None:
    parts = [_values(*(size if index == axis % 3 else 2 for index in range(3)), seed=size) for size in (1, 3, 2)]
    _same("concat", values=parts, axis=axis)
    same = [_values(2, 2, 2, seed=seed) for seed in range(3)]
    expected = np.empty([6 if index == axis % 3 else 2 for index in range(3)], np.float32)
    for start, part in enumerate(same):
        np.moveaxis(expected, axis, 0)[start::3] = np.moveaxis(part, axis, 0)
    np.testing.assert_array_equal(
        call(TABLE["concat"], values=same, axis=axis, interleave=True), expected
    )  # inferred as if not interleaved


def test_concat_of_one_and_of_scalars() -> None:
    _same("concat", values=[_values(2, 3)], axis=-1)
    assert call(TABLE["concat"], values=[np.int32(3), np.int32(4)], axis=0).tolist() == [3, 4]
    assert call(TABLE["concat"], values=[np.array([True]), np.array([False])], axis=0).tolist() == [True, False]


@pytest.mark.parametrize(
    ("exclusive", "reverse", "expected"),
    [(False, False, [4, 10, 17]), (True, False, [0, 4, 10]), (False, True, [17, 13, 7]), (True, True, [13, 7, 0])],
)
def test_cumsum_of_the_example_in_the_documentation(exclusive: bool, reverse: bool, expected: list[int]) -> None:
    # NeuralNetwork.proto, CumSumLayerParams. coremltools' value inference fails on exclusive sums.
    for kind in (np.float32, np.int32):
        assert call(TABLE["cumsum"], x=np.array([4, 6, 7], kind), exclusive=exclusive, reverse=reverse).tolist() == expected


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("reverse", [False, True])
def test_cumsum(axis: int, reverse: bool) -> None:
    x = np.random.default_rng(1).integers(-9, 9, (3, 4, 5)).astype(np.float32)
    _same("cumsum", x=x, axis=axis, reverse=reverse)
    ours = call(TABLE["cumsum"], x=x, axis=axis, reverse=reverse, exclusive=True)
    np.testing.assert_array_equal(ours, call(TABLE["cumsum"], x=x, axis=axis, reverse=reverse) - x)
    np.testing.assert_array_equal(call(TABLE["cumsum"], x=x), np.cumsum(x, 0))


@pytest.mark.parametrize("value", [np.float32(2.5), np.int32(3), np.bool_(True)])
def test_fill(value: Any) -> None:
    result = _same("fill", shape=np.array([2, 1, 3], np.int32), value=value)
    assert result.dtype == value.dtype
    result = _same("fill_like", "iOS16", ref_tensor=_values(2, 3), value=value)
    assert result.dtype == value.dtype
    assert not call(TABLE["fill"], shape=np.array([2, 3], np.int32)).any()
    assert call(TABLE["fill_like"], ref_tensor=np.zeros((2, 3), np.int32)).dtype == np.float32


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [((3,), -1, (1, 3)), ((3,), 1, (3, 1)), ((4, 3), -1, (4, 3)), ((2, 3, 2), -1, (6, 2)), ((5, 5, 2), 1, (5, 10)), ((2, 3), 0, (1, 6))],
)
def test_flatten2d_as_documented(shape: tuple[int, ...], axis: int, expected: tuple[int, int]) -> None:
    x = _values(*shape)
    np.testing.assert_array_equal(call(TABLE["flatten2d"], x=x, axis=axis), x.reshape(expected))
    if 0 < axis < len(shape):  # of no dimensions coremltools infers a size of 1.0
        _same("flatten2d", x=x, axis=axis)


def test_flatten2d_by_default_identity_and_shape() -> None:
    x = _values(2, 1, 3)
    assert call(TABLE["flatten2d"], x=x).shape == (2, 3)
    assert call(TABLE["identity"], x=x).tolist() == x.tolist()
    assert TABLE["identity"](x=["a list"]) == ["a list"]
    assert _same("shape", x=x).dtype == np.int32
    assert call(TABLE["shape"], x=np.float32(1)).shape == (0,)


def test_non_zero() -> None:
    x = np.array([[3, 0, 0], [0, 4, 0], [5, 6, 0]], np.float32)
    for kind in (np.float32, np.int32, np.bool_):
        _same("non_zero", x=x.astype(kind))
    assert call(TABLE["non_zero"], x=np.zeros((2, 3), np.float32)).shape == (0, 2)


@pytest.mark.parametrize("indices", [[2, 0], [2, -1], [2, 4]])
def test_one_hot_of_the_examples_in_the_documentation(indices: list[int]) -> None:
    # NeuralNetwork.proto, OneHotLayerParams. coremltools infers no values.
    result = call(TABLE["one_hot"], indices=np.array(indices, np.int32), one_hot_vector_size=4, on_value=5, off_value=-1)
    assert result.tolist() == [[-1, -1, 5, -1], [5, -1, -1, -1] if indices[1] == 0 else [-1, -1, -1, -1]]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_one_hot_along_an_axis(axis: int) -> None:
    indices = np.random.default_rng(2).integers(0, 5, (2, 3)).astype(np.int32)
    on, off = np.float32(1.5), np.float32(-2)
    result = call(TABLE["one_hot"], indices=indices, one_hot_vector_size=np.int32(5), axis=axis, on_value=on, off_value=off)
    np.testing.assert_array_equal(result, np.moveaxis(np.where(np.eye(5, dtype=bool)[indices], on, off), -1, axis))


def test_one_hot_by_default_and_of_a_scalar() -> None:
    assert call(TABLE["one_hot"], indices=np.array([1, 0], np.int32), one_hot_vector_size=3).tolist() == [[0, 1, 0], [1, 0, 0]]
    assert call(TABLE["one_hot"], indices=np.int32(1), one_hot_vector_size=3).tolist() == [0, 1, 0]


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize(
    ("shape", "pad"),
    [
        ((4,), [2, 3]),
        ((3, 4), [1, 2]),
        ((3, 4), [2, 0, 0, 3]),
        ((2, 3, 4, 5), [1, 2, 3, 1]),
        ((2, 3, 4, 5), [1, 0, 2, 2, 3, 3, 4, 1]),
        ((3, 4), [0, 0]),
    ],
)
def test_pad(shape: tuple[int, ...], pad: list[int], mode: str) -> None:
    _same("pad", x=_values(*shape), pad=np.array(pad, np.int32), mode=mode)


def test_pad_with_a_constant() -> None:
    x = _values(2, 3)
    _same("pad", x=x, pad=np.array([1, 1, 2, 0], np.int32), mode="constant", constant_val=np.float32(-7))
    np.testing.assert_array_equal(call(TABLE["pad"], x=x, pad=np.array([1, 1], np.int32)), np.pad(x, ((0, 0), (1, 1))))


@pytest.mark.parametrize(("mode", "pad"), [("reflect", [3, 0]), ("reflect", [0, 3]), ("replicate", [4, 0]), ("symmetric", [1, 1])])
def test_pad_outside_its_documented_limits(mode: str, pad: list[int]) -> None:
    with pytest.raises(ValueError, match=mode):
        call(TABLE["pad"], x=_values(2, 3), pad=np.array(pad, np.int32), mode=mode)


@pytest.mark.parametrize(("start", "end", "step"), [(0, 5, 1), (2, 9, 3), (9, 2, -3), (0, 9, 3), (5, 5, 1), (-4, 3, 2)])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_range_1d(kind: Any, start: int, end: int, step: int) -> None:
    assert _same("range_1d", start=kind(start), end=kind(end), step=kind(step)).dtype == kind


def test_range_1d_with_fractions_and_empty() -> None:
    result = call(TABLE["range_1d"], start=np.float32(0.5), end=np.float32(1.5), step=np.float32(0.25))
    assert result.tolist() == [0.5, 0.75, 1.0, 1.25]
    assert len(call(TABLE["range_1d"], start=np.float32(0), end=np.float32(1), step=np.float32(0.1))) == 10
    assert len(call(TABLE["range_1d"], start=np.int32(3), end=np.int32(1), step=np.int32(1))) == 0


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_split(axis: int) -> None:
    x = _values(4, 6)
    _same("split", x=x, axis=axis, num_splits=2)
    sizes = np.array([1, 3, 0, x.shape[axis] - 4], np.int32)
    assert len(_same("split", x=x, axis=axis, split_sizes=sizes)) == 4
    assert len(call(TABLE["split"], x=x, axis=axis, split_sizes=sizes, num_splits=4)) == 4
    (whole,) = call(TABLE["split"], x=x, axis=axis, num_splits=1)
    np.testing.assert_array_equal(whole, x)


def test_split_that_does_not_divide() -> None:
    with pytest.raises(RuntimeError):
        call(TABLE["split"], x=_values(4, 5), axis=1, num_splits=2)
    with pytest.raises(ValueError, match="num_splits"):
        call(TABLE["split"], x=_values(4, 5), axis=1)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_stack(axis: int) -> None:
    parts = [_values(2, 3, seed=seed) for seed in range(4)]
    np.testing.assert_array_equal(call(TABLE["stack"], values=parts, axis=axis), np.stack(parts, axis))
    assert call(TABLE["stack"], values=[np.int32(1), np.int32(2)], axis=0).tolist() == [1, 2]


@pytest.mark.parametrize("reps", [[1, 2, 3], [2, 1, 1]])
def test_tile(reps: list[int]) -> None:
    for x in (_values(2, 1, 3), np.arange(6, dtype=np.int32).reshape(1, 2, 3), np.ones((1, 1, 1), bool)):
        _same("tile", x=x, reps=np.array(reps, np.int32))


@pytest.mark.parametrize("ascending", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1, -3])
@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_topk(kind: Any, axis: int, ascending: bool) -> None:
    x = np.random.default_rng(5).permutation(60).reshape(3, 4, 5).astype(kind)
    for target in ("iOS15", "iOS16", "iOS17"):
        _same("topk", target, x=x, k=2, axis=axis, ascending=ascending)
    _same("topk", "iOS16", x=x, k=3, axis=axis, ascending=ascending, sort=False, return_indices=False)
    _same("topk", "iOS17", x=x, k=np.int8(3), axis=axis, ascending=ascending, output_indices_dtype="uint16")


def test_topk_by_default_of_all_and_of_equal_values() -> None:
    x = np.array([[1, 3, 2], [5, 4, 5]], np.float32)
    values, indices = call(TABLE["topk"], x=x)
    assert (values.tolist(), indices.tolist()) == ([[3], [5]], [[1], [0]])
    values, indices = call(TABLE["topk"], x=x, k=-1)  # coremltools infers all but the last
    assert (values.tolist(), indices.tolist()) == ([[3, 2, 1], [5, 5, 4]], [[1, 2, 0], [0, 2, 1]])


def test_classify() -> None:
    probabilities = torch.tensor([[0.25, 0.5, 0.25]])
    assert TABLE["classify"](probabilities=probabilities, classes=["a", "b", "c"]) == ("b", {"a": 0.25, "b": 0.5, "c": 0.25})
    label, found = TABLE["classify"](probabilities=probabilities[0], classes=[torch.tensor(7), torch.tensor(-1), torch.tensor(2**40)])
    assert (label, found) == (-1, {7: 0.25, -1: 0.5, 2**40: 0.25})
    with pytest.raises(ValueError):
        TABLE["classify"](probabilities=probabilities, classes=["a", "b"])


@pytest.mark.parametrize(("labels", "best"), [(["a", "b", "c"], "b"), ([7, -1, 2**40], -1)])
def test_classify_in_a_saved_package(labels: list[Any], best: Any) -> None:
    result = run(lambda x: mb.identity(x=x), {"x": np.array([[0.25, 0.5, 0.125]], np.float32)}, "iOS15", TABLE, labels)
    assert result == [best, dict(zip(labels, [0.25, 0.5, 0.125], strict=True))]


def test_results_of_declared_types_in_a_saved_package() -> None:
    def build(x: Any) -> Any:
        first, second = mb.split(x=x, axis=1, split_sizes=[1, 3])
        values, indices = mb.topk(x=second, k=2, output_indices_dtype="uint16")
        joined = mb.concat(values=[first, mb.cast(x=indices, dtype="fp32"), values], axis=-1)
        return mb.pad(x=joined, pad=[1, 0], constant_val=np.float32(9)), mb.one_hot(
            indices=mb.cast(x=indices, dtype="int32"), one_hot_vector_size=3
        )

    padded, hot = run(build, {"x": np.array([[1, 5, 7, 6]], np.float32)}, "iOS17", {**TABLE, **elementwise.TABLE})
    assert padded.tolist() == [[9, 1, 1, 2, 7, 6]]
    assert (hot.dtype, hot.tolist()) == (np.int32, [[[0, 1, 0], [0, 0, 1]]])


def _boxes(count: int, classes: int, images: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    boxes = np.concatenate([rng.uniform(0, 100, (images, count, 2)), rng.uniform(5, 60, (images, count, 2))], -1)
    return boxes.astype(np.float32), rng.permutation(images * count * classes).reshape(images, count, classes).astype(np.float32)


NMS = """
<ir_version: 10, opset_import: ["" : 18]>
nms (float[1, n, 4] boxes, float[1, c, n] scores, int64 limit, float iou, float score) => (int64[k, 3] kept)
{
    kept = NonMaxSuppression<center_point_box = 1>(boxes, scores, limit, iou, score)
}
"""


@pytest.fixture(scope="module")
def nms() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(onnx.parser.parse_model(NMS).SerializeToString())


def _kept(
    session: onnxruntime.InferenceSession, boxes: np.ndarray, scores: np.ndarray, iou: float, score: float, per_class: bool
) -> np.ndarray:
    """Indices that ONNX Runtime keeps, by falling score; of several classes each box takes part in that of its largest score.

    ONNX keeps what lies above the threshold of the score, MIL what is not below it; the scores here are whole numbers.
    """
    best = scores.max(1)
    rows = np.where(best == scores.T, scores.T, np.float32(-1e9)) if per_class else best[None]
    scalars = {"limit": np.array(len(boxes)), "iou": np.array(iou, np.float32), "score": np.array(score - 0.5, np.float32)}
    kept: np.ndarray = session.run(None, {"boxes": boxes[None], "scores": rows[None], **scalars})[0][:, 2]
    return kept[np.argsort(-best[kept])]


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize(("iou", "score"), [(0.1, -1.0), (0.5, -1.0), (0.3, 100.0), (0.99, 60.0)])
@pytest.mark.parametrize(("count", "classes", "images", "limit"), [(10, 1, 1, 7), (30, 4, 2, 37), (60, 3, 3, 5), (1, 1, 1, 3)])
def test_non_maximum_suppression(
    count: int, classes: int, images: int, limit: int, iou: float, score: float, per_class: bool, nms: onnxruntime.InferenceSession
) -> None:
    boxes, scores = _boxes(count, classes, images, count)
    given: dict[str, Any] = {"iou_threshold": np.float32(iou), "max_boxes": limit, "per_class_suppression": per_class}
    found_boxes, found_scores, indices, counts = call(
        TABLE["non_maximum_suppression"], boxes=boxes, scores=scores, score_threshold=np.float32(score), **given
    )
    assert (found_boxes.shape, found_scores.shape) == ((images, limit, 4), (images, limit, classes))
    for image in range(images):
        kept = _kept(nms, boxes[image], scores[image], iou, score, per_class)[:limit]
        kept = kept if len(kept) else np.array([scores[image].max(1).argmax()])
        assert indices[image].tolist() == kept.tolist() + [-1] * (limit - len(kept))
        assert counts[image] == len(kept)
        np.testing.assert_array_equal(found_boxes[image, : len(kept)], boxes[image, kept])
        np.testing.assert_array_equal(found_scores[image, : len(kept)], scores[image, kept])
        assert not found_boxes[image, len(kept) :].any()
        assert not found_scores[image, len(kept) :].any()
    if score == -1.0:  # iOS17's form: boxes last, no threshold of the score, no count
        last = call(TABLE["non_maximum_suppression"], boxes=boxes.transpose(0, 2, 1), scores=scores.transpose(0, 2, 1), **given)
        for ours, first in zip(last, (found_boxes.transpose(0, 2, 1), found_scores.transpose(0, 2, 1), indices), strict=True):
            np.testing.assert_array_equal(ours, first)


def test_non_maximum_suppression_keeps_the_best_box_when_all_scores_are_too_low() -> None:
    boxes, scores = _boxes(6, 2, 1, 9)
    result = call(
        TABLE["non_maximum_suppression"],
        boxes=boxes,
        scores=scores,
        iou_threshold=np.float32(0.5),
        score_threshold=np.float32(1000),
        max_boxes=np.int32(3),
    )
    assert result[2].tolist() == [[int(scores[0].max(1).argmax()), -1, -1]]
    assert result[3].tolist() == [1]


def test_parameters_of_every_version() -> None:
    check_signatures(TABLE)
