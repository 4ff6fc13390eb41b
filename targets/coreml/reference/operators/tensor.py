"""MIL's operators that make, join, cut, order and count tensors, and the one that names a classifier's result."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from edgekit.targets.coreml.reference.operators.arguments import dims, ints, number

Number = torch.Tensor | int | float | bool
"""A scalar argument, or the default value of one."""


def _axis(axis: Number, rank: int) -> int:
    return dims([int(number(axis))], rank)[0]


def _argsort(x: torch.Tensor, axis: Number = -1, ascending: Number = False) -> torch.Tensor:
    """The indices that sort; equal values keep their order."""
    return torch.argsort(x, dim=int(number(axis)), descending=not number(ascending), stable=True).to(torch.int32)


def _band_part(x: torch.Tensor, lower: Number = -1, upper: Number = -1) -> torch.Tensor:
    below, above = int(number(lower)), int(number(upper))
    distance = torch.arange(x.shape[-2])[:, None] - torch.arange(x.shape[-1])
    kept = torch.ones_like(distance, dtype=torch.bool)
    if below >= 0:
        kept &= distance <= below
    if above >= 0:
        kept &= -distance <= above
    return torch.where(kept, x, torch.zeros((), dtype=x.dtype))


def _classify(probabilities: torch.Tensor, classes: Any) -> tuple[Any, dict[Any, float]]:
    """The label of the largest probability, and the probabilities by label."""
    labels = [number(label) if isinstance(label, torch.Tensor) else label for label in classes]
    values = probabilities.reshape(-1)
    return labels[int(torch.argmax(values))], dict(zip(labels, values.tolist(), strict=True))


def _concat(values: list[torch.Tensor], axis: Number, interleave: Number = False) -> torch.Tensor:
    parts = [value if value.dim() else value.reshape(1) for value in values]
    along = _axis(axis, parts[0].dim())
    if number(interleave):
        return torch.stack(parts, along + 1).flatten(along, along + 1)
    return torch.cat(parts, along)


def _cumsum(x: torch.Tensor, axis: Number = 0, exclusive: Number = False, reverse: Number = False) -> torch.Tensor:
    along = _axis(axis, x.dim())
    if number(reverse):
        x = x.flip(along)
    sums = torch.cumsum(x, along)
    if number(exclusive):
        sums = torch.cat([torch.zeros_like(sums.narrow(along, 0, 1)), sums.narrow(along, 0, x.shape[along] - 1)], along)
    return sums.flip(along) if number(reverse) else sums


def _fill(shape: torch.Tensor, value: Number = 0.0) -> torch.Tensor:
    return torch.as_tensor(value).expand(ints(shape)).contiguous()


def _fill_like(ref_tensor: torch.Tensor, value: Number = 0.0) -> torch.Tensor:
    return torch.as_tensor(value).expand(ref_tensor.shape).contiguous()


def _flatten2d(x: torch.Tensor, axis: Number = 1) -> torch.Tensor:
    at = int(number(axis))
    return x.reshape(math.prod(x.shape[:at]), math.prod(x.shape[at:]))


def _identity(x: Any) -> Any:
    return x


def _non_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.nonzero(x).to(torch.int32)


def _one_hot(
    indices: torch.Tensor, one_hot_vector_size: Number, axis: Number = -1, on_value: Number = 1, off_value: Number = 0
) -> torch.Tensor:
    """Vectors with `on_value` at the indices; an index outside of them, a negative one too, makes a vector of `off_value` alone."""
    along = _axis(axis, indices.dim() + 1)
    positions = torch.arange(int(number(one_hot_vector_size))).reshape([-1] + [1] * (indices.dim() - along))
    return torch.where(indices.unsqueeze(along) == positions, torch.as_tensor(on_value), torch.as_tensor(off_value))


def _reflected(positions: torch.Tensor, size: int) -> torch.Tensor:
    return (size - 1) - ((size - 1) - positions.abs()).abs()


def _replicated(positions: torch.Tensor, size: int) -> torch.Tensor:
    return positions.clamp(0, size - 1)


_PADDED: dict[str, tuple[Callable[[torch.Tensor, int], torch.Tensor], int]] = {"reflect": (_reflected, 1), "replicate": (_replicated, 0)}
"""Where the elements of a padded dimension come from, and by how many less than its size it can be padded."""


def _pad(x: torch.Tensor, pad: torch.Tensor, mode: str = "constant", constant_val: Number = 0.0) -> torch.Tensor:
    """Pads the last dimensions of `x`, as many as there are pairs `(before, after)` in `pad`."""
    amounts = ints(pad)
    pairs = list(zip(amounts[::2], amounts[1::2], strict=True))
    if mode == "constant":
        return functional.pad(x, [amount for pair in reversed(pairs) for amount in pair], value=number(constant_val))
    if mode not in _PADDED:
        raise ValueError(f"pad has no mode '{mode}'")
    source, margin = _PADDED[mode]
    for axis, (before, after) in enumerate(pairs, x.dim() - len(pairs)):
        size = x.shape[axis]
        if max(before, after) > size - margin:
            raise ValueError(f"a dimension of {size} elements cannot be padded by {max(before, after)} in mode '{mode}'")
        if before or after:
            x = x.index_select(axis, source(torch.arange(-before, size + after), size))
    return x


def _range_1d(end: torch.Tensor, start: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """`start + i * step` up to `end`, which is excluded."""
    count = math.ceil(float((end - start) / step))
    return start + torch.arange(max(0, count), dtype=start.dtype) * step


def _shape(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor(x.shape, dtype=torch.int32)


def _split(
    x: torch.Tensor, axis: Number, num_splits: Number | None = None, split_sizes: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    along = _axis(axis, x.dim())
    if split_sizes is not None:
        return torch.split(x, ints(split_sizes), along)
    if num_splits is None:
        raise ValueError("split needs num_splits or split_sizes")
    count = int(number(num_splits))
    return torch.split(x, [x.shape[along] // count] * count, along)


def _stack(values: list[torch.Tensor], axis: Number) -> torch.Tensor:
    return torch.stack(values, int(number(axis)))


def _tile(x: torch.Tensor, reps: torch.Tensor) -> torch.Tensor:
    return x.repeat(ints(reps))


def _topk(
    x: torch.Tensor,
    k: Number = 1,
    axis: Number = -1,
    ascending: Number = False,
    sort: Number = True,
    return_indices: Number = True,
    output_indices_dtype: str = "int32",
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """The `k` largest or smallest values, all for -1, sorted in any case; the first of equal ones. The executor types the indices."""
    along, count = int(number(axis)), int(number(k))
    values, indices = torch.sort(x, dim=along, descending=not number(ascending), stable=True)
    count = x.shape[along] if count == -1 else count
    values, indices = values.narrow(along, 0, count), indices.narrow(along, 0, count).to(torch.int32)
    return (values, indices) if number(return_indices) else values


def _overlap(box: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Intersection over union of a box with others, each `(center x, center y, width, height)`."""
    low = torch.maximum(box[:2] - box[2:] / 2, others[:, :2] - others[:, 2:] / 2)
    high = torch.minimum(box[:2] + box[2:] / 2, others[:, :2] + others[:, 2:] / 2)
    shared = (high - low).clamp(min=0).prod(1)
    return shared / (box[2:].prod() + others[:, 2:].prod(1) - shared)


def _survivors(boxes: torch.Tensor, scores: torch.Tensor, iou: float, score: float, limit: int, per_class: bool) -> torch.Tensor:
    """Indices of the boxes of one image that survive, by falling score. If all scores are too low the best box does."""
    best, label = scores.max(1)
    order = torch.argsort(best, descending=True, stable=True)
    left = order[best[order] >= score]
    kept: list[torch.Tensor] = []
    while len(left) and len(kept) < limit:
        first, left = left[0], left[1:]
        kept.append(first)
        hidden = _overlap(boxes[first], boxes[left]) > iou
        if per_class:
            hidden &= label[left] == label[first]
        left = left[~hidden]
    return torch.stack(kept) if kept else order[:1]


def _non_maximum_suppression(
    boxes: torch.Tensor,
    scores: torch.Tensor,
    iou_threshold: torch.Tensor,
    max_boxes: torch.Tensor,
    score_threshold: torch.Tensor | None = None,
    per_class_suppression: Number = False,
) -> tuple[torch.Tensor, ...]:
    """Boxes that no better box overlaps much, padded to `max_boxes` with zeros, and their indices with -1.

    iOS15's form has `score_threshold` and counts the boxes; iOS17's has neither, and the boxes in the last dimension.
    """
    boxes_last = score_threshold is None
    if boxes_last:
        boxes, scores = boxes.transpose(1, 2), scores.transpose(1, 2)
    iou, limit = float(number(iou_threshold)), int(number(max_boxes))
    score = -math.inf if score_threshold is None else float(number(score_threshold))
    coordinates = boxes.new_zeros(boxes.shape[0], limit, 4)
    values = scores.new_zeros(scores.shape[0], limit, scores.shape[2])
    indices = torch.full((boxes.shape[0], limit), -1, dtype=torch.int32)
    counts = torch.zeros(boxes.shape[0], dtype=torch.int32)
    for image in range(boxes.shape[0]):
        kept = _survivors(boxes[image], scores[image], iou, score, limit, bool(number(per_class_suppression)))
        counts[image] = len(kept)
        coordinates[image, : len(kept)] = boxes[image, kept]
        values[image, : len(kept)] = scores[image, kept]
        indices[image, : len(kept)] = kept.to(torch.int32)
    if boxes_last:
        return coordinates.transpose(1, 2), values.transpose(1, 2), indices
    return coordinates, values, indices, counts


TABLE: dict[str, Callable[..., Any]] = {
    "argsort": _argsort,
    "band_part": _band_part,
    "classify": _classify,
    "concat": _concat,
    "cumsum": _cumsum,
    "fill": _fill,
    "fill_like": _fill_like,
    "flatten2d": _flatten2d,
    "identity": _identity,
    "non_maximum_suppression": _non_maximum_suppression,
    "non_zero": _non_zero,
    "one_hot": _one_hot,
    "pad": _pad,
    "range_1d": _range_1d,
    "shape": _shape,
    "split": _split,
    "stack": _stack,
    "tile": _tile,
    "topk": _topk,
}
