"""Sequences and optionals of known length against ONNX's reference."""

from __future__ import annotations

import numpy as np
import pytest

from edgekit.errors import UnsupportedOpError
from tests.targets.coreml.lowered import check, lower, run
from tests.targets.coreml.node_text import floats, model_of, text

BODIES = {
    "construct": "s = SequenceConstruct(a, b) y = SequenceAt(s, last)",
    "concat": "s = SequenceConstruct(a, b) y = ConcatFromSequence<axis = 1>(s)",
    "stack": "s = SequenceConstruct(a, b, a) y = ConcatFromSequence<axis = -1, new_axis = 1>(s)",
    "insert": "s = SequenceConstruct(a, a) t = SequenceInsert(s, b, last) u = SequenceInsert(t, b) y = ConcatFromSequence<axis = 0>(u)",
    "erase": "s = SequenceConstruct(a, b, b) t = SequenceErase(s, one) u = SequenceErase(t) y = SequenceAt(u, zero)",
    "empty": "s = SequenceEmpty() t = SequenceInsert(s, b) y = SequenceAt(t, zero)",
    "split": "s = SplitToSequence<axis = 1>(a, two) y = SequenceAt(s, zero)",
    "split unevenly": "s = SplitToSequence<axis = 1>(a, parts) y = SequenceAt(s, one)",
    "split in ones": "s = SplitToSequence<axis = 0, keepdims = 0>(a) y = SequenceAt(s, one)",
    "split in ones that stay": "s = SplitToSequence<axis = 1>(a) y = SequenceAt(s, last)",
    "constant": "s = SequenceConstruct(c, a) t = SequenceAt(s, zero) y = Add(t, a)",
}
SHAPES = {"stack": "2,4,3", "concat": "2,8", "insert": "8,4", "split": "2,2", "split unevenly": "2,3", "split in ones": "4"}
SHAPES |= {"split in ones that stay": "2,1"}
CONSTANTS = {"zero": 0, "one": 1, "two": 2, "last": -1}


@pytest.mark.parametrize("name", BODIES)
def test_sequences(name: str) -> None:
    body = BODIES[name]
    constants = {key: np.array(value) for key, value in CONSTANTS.items() if f" {key})" in body}
    constants |= {"parts": np.array([1, 3])} if "parts" in body else {}
    constants |= {"c": floats(2, 4, seed=5)} if "(c" in body else {}
    check(
        text(body, "float[2,4] a, float[2,4] b", f"float[{SHAPES.get(name, '2,4')}] y"),
        {"a": floats(2, 4), "b": floats(2, 4, seed=1)},
        **constants,
    )


def test_length() -> None:
    body = "s = SequenceConstruct(a, a, a) n = SequenceLength(s) f = Cast<to = 1>(n) y = Mul(a, f)"
    check(text(body, "float[2] a", "float[2] y"), {"a": floats(2)})


def test_optional() -> None:
    body = "o = Optional(a) h = OptionalHasElement(o) f = Cast<to = 1>(h) e = OptionalGetElement(o) y = Mul(e, f)"
    a = floats(2)
    np.testing.assert_array_equal(run(lower(model_of(text(body, "float[2] a", "float[2] y"))), {"a": a})["y"], a)


REFUSED = {
    "computed 'position'": ("s = SequenceConstruct(a, a) y = SequenceAt(s, i)", "float[2] a, int64 i"),
    "position 2": ("two = Constant<value_int = 2>() s = SequenceConstruct(a, a) y = SequenceAt(s, two)", "float[2] a"),
    "only known when": ("s = SequenceConstruct(a, a) t = Identity(s) z = Constant<value_int = 0>() y = SequenceAt(t, z)", "float[2] a"),
    "empty sequence": ("s = SequenceEmpty() y = ConcatFromSequence<axis = 0>(s)", "float[2] a"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    body, inputs = REFUSED[name]
    with pytest.raises(UnsupportedOpError, match=name):
        lower(model_of(text(body, inputs, "float[2] y")))
