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


def test_an_input_described_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_inputs(["x:1,2", "x[1,3]"])
