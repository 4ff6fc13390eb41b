"""Specification strings: what is printed parses to the same, and what is wrong is said."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit import specs
from edgekit.errors import RecipeError


@dataclass(frozen=True)
class Options:
    keep: float | tuple[float, ...] = 0.7
    layers: tuple[int, ...] = (3, 6)
    method: Literal["evit", "tome"] = "evit"
    note: str = ""
    count: int = 1
    fused: bool = False
    limit: float | None = None


def test_the_documented_form() -> None:
    name, options = specs.split_spec('prune-tokens{keep=[0.9,0.7,0.5],method="evit"}')
    assert name == "prune-tokens"
    assert options == {"keep": [0.9, 0.7, 0.5], "method": "evit"}
    assert specs.make(Options, options, "pass").keep == (0.9, 0.7, 0.5)


def test_a_name_alone_takes_the_defaults() -> None:
    assert specs.split_spec("fold-batch-norm") == ("fold-batch-norm", {})
    assert specs.split_spec(" fold-batch-norm{} ") == ("fold-batch-norm", {})


finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(deadline=None, derandomize=True)
@given(
    st.builds(
        Options,
        keep=st.one_of(finite, st.lists(finite).map(tuple)),
        layers=st.lists(st.integers(-(2**63), 2**63 - 1)).map(tuple),
        method=st.sampled_from(["evit", "tome"]),
        note=st.text(st.characters(codec="utf-8")),
        count=st.integers(-(2**63), 2**63 - 1),
        fused=st.booleans(),
        limit=st.one_of(st.none(), finite),
    )
)
def test_what_is_printed_parses_to_the_same(options: Options) -> None:
    name, values = specs.split_spec(specs.format_spec("some-pass", options))
    assert name == "some-pass"
    assert specs.make(Options, values, "pass") == options


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("prune tokens", "not a specification"),
        ("", "not a specification"),
        ("prune{keep=0.5", "not a specification"),
        ("prune{method=evit}", "strings in quotes"),
        ("prune{keep=0.9,0.7}", "lists in brackets"),
        ("prune{a=1,a=2}", "cannot be read"),
        ("prune{a=1}\nb = {}", "more than one table"),
        ("prune{a=1}\nother = {b=1}", "more than one table"),
    ],
)
def test_malformed(spec: str, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        specs.split_spec(spec)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"kep": 0.5}, "did you mean 'keep'?"),
        ({"keep": "0.5"}, "takes a number | list of numbers,"),
        ({"count": True}, "a whole number"),
        ({"count": 1.5}, "a whole number"),
        ({"fused": 1}, "true or false"),
        ({"method": "other"}, '"evit" | "tome"'),
        ({"layers": [1, "a"]}, "takes list of whole numbers,"),
    ],
)
def test_wrong_options_are_named(values: dict[str, object], says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        specs.make(Options, values, "pass 'x'")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (tuple[str, ...], "list of quoted strings"),
        (tuple[tuple[float, ...], ...], "list of lists of numbers"),
        (tuple[Literal["a", "b"], ...], 'list of "a" | "b"'),
        (int | None, "a whole number"),
    ],
)
def test_types_are_named_for_people(annotation: object, name: str) -> None:
    assert specs.type_name(annotation) == name


def test_a_whole_number_serves_as_a_number() -> None:
    made = specs.make(Options, {"keep": 1}, "pass")
    assert isinstance(made.keep, float)
    assert math.isclose(made.keep, 1.0)


def test_a_missing_required_option_is_named() -> None:
    @dataclass(frozen=True)
    class Needs:
        ratio: float

    with pytest.raises(RecipeError, match="needs the option ratio"):
        specs.make(Needs, {}, "pass 'needs'")
