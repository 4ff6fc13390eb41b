"""Input descriptions as users of other tools write them: `x:1,3,224,224`, `x[1,3,224,224]`, `x:1x3x224x224:float32`."""

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

_SPEC = re.compile(
    r"(?:(?P<name>.+?)?(?:(?:^|:)(?P<plain>\d+(?:\s*[,x]\s*\d+)*)|\[(?P<bracketed>\s*(?:\d+(?:\s*[,x]\s*\d+)*)?\s*)\]))"
    r"(?::(?P<dtype>[A-Za-z]+\d*))?"
)


@dataclass(frozen=True)
class InputSpec:
    """Shape and perhaps dtype of one input.

    Attributes:
        name: The input's name; empty stands for the model's only input.
        shape: All dimensions, batch first; `()` for a scalar.
        dtype: numpy's name of the dtype; None keeps what the model declares (float32 for a module).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None


def parse_input(text: str) -> InputSpec:
    """Reads one description.

    Raises:
        UsageError: It is not a description, a dimension is zero, or the dtype is unknown.
    """
    match = _SPEC.fullmatch(text.strip())
    fix = "write name:1,3,224,224 or name[1,3,224,224], with :float32 at the end for another dtype"
    if match is None:
        raise UsageError(f"'{text}' does not describe an input", fix=fix)
    dims = match["plain"] if match["plain"] is not None else match["bracketed"]
    shape = tuple(int(dim) for dim in re.findall(r"\d+", dims))
    if 0 in shape:
        raise UsageError(f"'{text}' has a dimension of zero", fix=fix)
    dtype = match["dtype"]
    if dtype is not None and dtype.lower() not in _DTYPES:
        raise UsageError(f"'{text}' names an unknown dtype '{dtype}'", fix=f"known: {', '.join(sorted(set(_DTYPES.values())))}")
    return InputSpec(match["name"] or "", shape, _DTYPES[dtype.lower()] if dtype else None)


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
