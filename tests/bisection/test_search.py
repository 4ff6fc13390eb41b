"""The binary search finds the first bad position and counts what it evaluates."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.bisection.search import Search, first_bad


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.data())
def test_the_first_bad_position_within_the_bound(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5000))
    first = data.draw(st.integers(0, count + 1))
    asked: list[int] = []

    def is_bad(position: int) -> bool:
        asked.append(position)
        return position >= first

    search = Search(count, is_bad)
    assert search.first_bad() == (None if first > count else first)
    assert len(asked) == len(set(asked)) == search.evaluations
    assert search.evaluations + 1 <= math.ceil(math.log2(count)) + 3 == search.bound  # one is left for the confirmation


def test_what_is_known_is_not_evaluated() -> None:
    def never(position: int) -> bool:
        raise AssertionError(position)

    assert first_bad(1, never, {0: False, 1: True}) == 1
    assert first_bad(9, never, {9: False}) is None
    with pytest.raises(ValueError, match="nothing to search"):
        Search(0, never)
