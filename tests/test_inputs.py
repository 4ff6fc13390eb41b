"""Input descriptions in the forms of other tools."""

from __future__ import annotations

import pytest

from edgekit.errors import UsageError
from edgekit.inputs import InputSpec, parse_input, parse_inputs


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x:1,3,224,224", InputSpec("x", (1, 3, 224, 224))),
        ("x[1,3,224,224]", InputSpec("x", (1, 3, 224, 224))),
        ("x[1, 3, 224, 224]", InputSpec("x", (1, 3, 224, 224))),
        ("x:1x3x224x224", InputSpec("x", (1, 3, 224, 224))),
        ("x:1,3,224,224:float32", InputSpec("x", (1, 3, 224, 224), "float32")),
        ("ids[1,128]:i64", InputSpec("ids", (1, 128), "int64")),
        ("input:0:1,3", InputSpec("input:0", (1, 3))),
        ("serving/in.x:2,2", InputSpec("serving/in.x", (2, 2))),
        ("1,3,32,32", InputSpec("", (1, 3, 32, 32))),
        ("[1,3]", InputSpec("", (1, 3))),
        ("s[]", InputSpec("s", ())),
        ("x:1..8,3", InputSpec("x", (1, 3), None, (range(1, 9), (3,)))),
        ("x[1,224|256x192]:f16", InputSpec("x", (1, 224, 192), "float16", ((1,), (224, 256), (192,)))),
        ("x:4..4,2", InputSpec("x", (4, 2))),
    ],
)
def test_forms(text: str, expected: InputSpec) -> None:
    assert parse_input(text) == expected


@pytest.mark.parametrize("text", ["", "x", "x:", "x:a,b", "x[1,", "x:1,-3", "x:1,0", "x:1,3:floaty", "x:1,,2"])
def test_malformed(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_input(text)
    assert caught.value.exit_code == 2
    assert caught.value.fix


@pytest.mark.parametrize("text", ["x:3..1", "x:0..4", "x:1|0", "x:1..", "x:|2", "x:1...3", "x:1..2..3"])
def test_malformed_sizes(text: str) -> None:
    test_malformed(text)


def test_an_input_described_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_inputs(["x:1,2", "x[1,3]"])
