"""Which shapes a model for several input shapes is compiled and checked at."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import UsageError
from edgekit.flexible import Plan, plan_shapes
from edgekit.inputs import parse_inputs
from edgekit.targets.coreml import CoreMl
from edgekit.targets.onnxruntime import OnnxRuntime


def planned(*texts: str) -> Plan:
    plan = plan_shapes(parse_inputs(texts), CoreMl())
    assert plan is not None
    return plan


def shapes(points: tuple, number: int = 0) -> list[tuple[int, ...]]:
    return [point[number].shape for point in points]


def test_one_shape_needs_no_plan() -> None:
    assert plan_shapes(parse_inputs(["x:1,3,224,224", "y:2"]), OnnxRuntime()) is None


def test_ranges() -> None:
    """The largest sizes first, both ends and their neighbours, the middle; the smallest, where it is 1, is only checked, as others are."""
    plan = planned("x:1..8,3")
    assert shapes(plan.points) == [(8, 3), (2, 3), (7, 3), (3, 3), (5, 3)]
    assert set(shapes(plan.probes)) == {(1, 3), (4, 3), (6, 3)}
    assert not plan.listed


def test_sizes_have_different_remainders() -> None:
    """What holds for every second, third, fourth or eighth size must not look like a rule."""
    sizes = [shape[0] for shape in shapes(planned("x:4..36").points)]
    assert all(len({size % factor for size in sizes}) > 1 for factor in (2, 3, 4, 7, 8))
    checked = sorted(shape[0] for shape in shapes(planned("x:4..100").probes))
    assert any(checked[k + 5] - checked[k] <= 7 for k in range(len(checked) - 5))  # a run, less what was written for


def test_listed_shapes_correspond() -> None:
    plan = planned("x:1,224|256,224|192", "y:5|7:int64")
    assert shapes(plan.points) == [(1, 224, 224), (1, 256, 192)]
    assert shapes(plan.points, 1) == [(5,), (7,)]
    assert {spec.dtype for point in plan.points for spec in point} == {None, "int64"}
    assert (plan.probes, plan.listed) == ((), True)


def test_a_range_too_large_to_build_is_looked_at_from_below() -> None:
    plan = planned("x:1..100000,1000")
    assert max(shape[0] for shape in shapes(plan.points)) <= 64
    assert (parse_inputs(["x:1,1000"])[0],) in plan.probes


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=6))
def test_dimensions_can_be_told_apart(spans: list[tuple[int, int]]) -> None:
    """Every point is within the ranges, and no two dimensions have the same sizes at all points."""
    plan = planned("x:" + ",".join(f"{low}..{low + extent}" for low, extent in spans))
    found = shapes(plan.points) + shapes(plan.probes)
    assert all(low <= size <= low + extent for shape in found for size, (low, extent) in zip(shape, spans, strict=True))
    columns = list(zip(*shapes(plan.points), strict=True))
    assert len(set(columns)) == len(columns)
    if math.prod(low + extent for low, extent in spans) < 2**20:
        assert found[0] == tuple(low + extent for low, extent in spans)


@pytest.mark.parametrize("texts", [["x:1|2,3|4|5"], ["x:1|2,3..5"], ["x:1|2", "y:1|2|3"], ["x:" + ",".join(["1..9"] * 7)]])
def test_what_cannot_be_planned(texts: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        planned(*texts)
    assert caught.value.fix


def test_a_target_of_one_shape_refuses() -> None:
    with pytest.raises(UsageError, match="onnxruntime"):
        plan_shapes(parse_inputs(["x:1..8,3"]), OnnxRuntime())
