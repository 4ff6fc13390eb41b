"""What an operator of the domain `edgekit` is: a name, an ONNX function, a shape rule and perhaps a fast torch function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
import onnx.parser
import onnx_ir as ir

from edgekit.errors import UsageError

if TYPE_CHECKING:
    import torch

DOMAIN = "edgekit"
VERSION = 1
"""Version of the domain."""
OPSET = 23
"""Opset of ONNX that the bodies are written in. Their operators mean the same in all later ones that the installed onnx knows."""

Shape: TypeAlias = tuple[int, ...]
Attributes: TypeAlias = Mapping[str, Any]
Evaluate: TypeAlias = "Callable[[Sequence[torch.Tensor], Attributes], tuple[torch.Tensor, ...]]"


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: Its operator type.
        build_function: Makes its ONNX function. What it takes as keywords are the attributes of the operator; each setting of them is a
            function of its own overload.
        infer_shape: Shapes of the inputs and the attributes to the shapes of the outputs; raises UsageError where they do not fit.
        infer_dtype: Types of the inputs (None where unknown) to those of the outputs.
        evaluate: Tensors of the inputs and the attributes to those of the outputs, equal to what the body gives; None: the body is run.
    """

    name: str
    build_function: Callable[..., ir.Function]
    infer_shape: Callable[[Sequence[Shape], Attributes], tuple[Shape, ...]]
    infer_dtype: Callable[[Sequence[ir.DataType | None]], tuple[ir.DataType | None, ...]]
    evaluate: Evaluate | None = None


def parse_function(text: str) -> ir.Function:
    """Reads `Name (inputs) => (outputs) { nodes }` in ONNX's text form as a function of the domain `edgekit`."""
    header = f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>'
    return ir.serde.deserialize_function(onnx.parser.parse_function(header + text))


def shape_error(name: str, expected: str, shapes: Sequence[Shape]) -> UsageError:
    """The error of a shape rule: `expected` says in words which shapes the operator takes."""
    given = ", ".join(str(list(shape)) for shape in shapes) or "nothing"
    return UsageError(f"operator '{DOMAIN}::{name}' takes {expected}, it was given {given}", fix="reshape the inputs before it")
