"""Sizes that are found by their values, against the numbers that they were made from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from edgekit.targets.coreml.size_expressions import Axis, Size, Sizes, find_size

KNOWN: dict[Sizes, Axis] = {(2, 33, 64): Axis("x", 0), (64, 2, 33): Axis("x", 1), (128, 4, 66): Axis("y", 2)}


def computed(size: Size, known: dict[Sizes, Axis]) -> Sizes:
    lengths = {axis: sizes for sizes, axis in known.items()}
    products = [1] * 3
    for axis in size.axes:
        products = [product * length for product, length in zip(products, lengths[axis], strict=True)]
    return tuple(product * size.factor // size.divisor + size.offset for product in products)


def test_the_simplest_expression() -> None:
    assert find_size((64, 2, 33), KNOWN) == Size((Axis("x", 1),))
    assert find_size((6, 99, 192), KNOWN) == Size((Axis("x", 0),), factor=3)
    assert find_size((32, 1, 16), {(64, 2, 32): Axis("x", 1)}) == Size((Axis("x", 1),), divisor=2)
    assert find_size((3, 34, 65), KNOWN) == Size((Axis("x", 0),), offset=1)
    assert find_size((1, -30, -61), KNOWN) == Size((Axis("x", 0),), factor=-1, offset=3)
    assert find_size((256, 132, 4224), KNOWN) == Size((Axis("x", 0), Axis("x", 1)), factor=2)
    assert find_size((7, 8, 100), KNOWN) is None
    assert find_size((0, 1, 2), KNOWN) is None


THREE = st.tuples(*[st.integers(1, 500)] * 3).filter(lambda sizes: len(set(sizes)) == 3)


@given(st.lists(THREE, min_size=1, max_size=4, unique=True), st.tuples(*[st.integers(0, 900)] * 3))
def test_whatever_is_found_has_the_values_that_were_wanted(lengths: list[Sizes], wanted: Sizes) -> None:
    known = {sizes: Axis("v", number) for number, sizes in enumerate(lengths)}
    found = find_size(wanted, known)
    if found is not None:
        assert computed(found, known) == wanted


@given(st.integers(1, 30), st.integers(-30, 30), THREE)
def test_every_multiple_and_sum_is_found(factor: int, offset: int, sizes: Sizes) -> None:
    wanted = tuple(size * factor + offset for size in sizes)
    found = find_size(wanted, {sizes: Axis("x", 0)})
    assert found is not None
    assert computed(found, {sizes: Axis("x", 0)}) == wanted
