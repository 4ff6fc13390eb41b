"""Input descriptions as users of other tools write them: `x:1,3,224,224`, `x[1,3,224,224]`, `x:1x3x224x224:float32`.

A dimension may take several sizes: `1..8` is a range, `224|256` are alternatives, the first of each being the default.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from edgekit.errors import UsageError

_DTYPES = {
    "f16": "float16", "float16": "float16", "fp16": "float16", "half": "float16",
    "f32": "float32", "float32": "float32", "fp32": "float32", "float": "float32",
    "f64": "float64", "float64": "float64", "double": "float64",
    "i8": "int8", "int8": "int8", "u8": "uint8", "uint8": "uint8",
    "i32": "int32", "int32": "int32", "i64": "int64", "int64": "int64", "long": "int64",
    "bool": "bool",
}  # fmt: skip

_DIM = r"\d+(?:\.\.\d+|(?:\|\d+)+)?"
_DIMS = rf"{_DIM}(?:\s*[,x]\s*{_DIM})*"
_SPEC = re.compile(rf"(?:(?P<name>.+?)?(?:(?:^|:)(?P<plain>{_DIMS})|\[(?P<bracketed>\s*(?:{_DIMS})?\s*)\]))(?::(?P<dtype>[A-Za-z]+\d*))?")

Sizes = range | tuple[int, ...]
"""The sizes that a dimension may take: every one of a range, or alternatives."""


@dataclass(frozen=True)
class InputSpec:
    """Shape and perhaps dtype of one input.

    Attributes:
        name: The input's name; empty stands for the model's only input.
        shape: All dimensions, batch first; `()` for a scalar. Of a dimension of several sizes, the default.
        dtype: numpy's name of the dtype; None keeps what the model declares (float32 for a module).
        sizes: Per dimension the sizes that it may take; empty where the shape is the only one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    sizes: tuple[Sizes, ...] = ()


def parse_input(text: str) -> InputSpec:
    """Reads one description.

    Raises:
        UsageError: It is not a description, a dimension is zero, or the dtype is unknown.
    """
    match = _SPEC.fullmatch(text.strip())
    fix = (
        "write name:1,3,224,224 or name[1,3,224,224], with :float32 at the end for another dtype; 1..8 is a range of sizes, 224|256 are"
        " alternatives"
    )
    if match is None:
        raise UsageError(f"'{text}' does not describe an input", fix=fix)
    dims = match["plain"] if match["plain"] is not None else match["bracketed"]
    sizes = tuple(_sizes(dim, text) for dim in re.findall(_DIM, dims))
    shape = tuple(each[0] for each in sizes)
    if any(0 in each for each in sizes):
        raise UsageError(f"'{text}' has a dimension of zero", fix=fix)
    dtype = match["dtype"]
    if dtype is not None and dtype.lower() not in _DTYPES:
        raise UsageError(f"'{text}' names an unknown dtype '{dtype}'", fix=f"known: {', '.join(sorted(set(_DTYPES.values())))}")
    several = sizes if any(len(each) > 1 for each in sizes) else ()
    return InputSpec(match["name"] or "", shape, _DTYPES[dtype.lower()] if dtype else None, several)


def _sizes(dim: str, text: str) -> Sizes:
    if ".." in dim:
        low, high = map(int, dim.split(".."))
        if low > high:
            raise UsageError(f"the range {dim} of '{text}' is empty", fix=f"write the smaller size first: {high}..{low}")
        return range(low, high + 1)
    return tuple(map(int, dim.split("|")))


def parse_inputs(texts: Iterable[str]) -> list[InputSpec]:
    """Reads several descriptions; no name may occur twice.

    Raises:
        UsageError: As `parse_input`, or a name occurs twice.
    """
    specs = [parse_input(text) for text in texts]
    names = [spec.name for spec in specs]
    if len(set(names)) != len(names):
        raise UsageError(f"an input is described twice: {', '.join(texts)}", fix="describe each input once")
    return specs
