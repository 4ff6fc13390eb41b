"""The table of operators: by domain and name, one function for each version at which the operator's meaning changed."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from edgekit.graph.interpreter.values import Precision

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

NEWEST_OPSET = {"": 28, "ai.onnx.preview": 1, "ai.onnx.ml": 5, "ai.onnx.preview.training": 1}
"""The opsets that the operators were written for; a newer one may have changed their meaning, so it is refused."""
MODULES = (
    *(
        "attention",
        "control_flow",
        "convolution",
        "conversion",
        "elementwise",
        "extensions",
        "image",
        "indexing",
        "legacy",
        "loss",
        "matrix",
        "normalization",
    ),
    *("pooling", "quantization", "random", "recurrent", "reduction", "resize", "sequence", "shape", "signal"),
)
"""The files of operators, one subject each."""


@dataclass(frozen=True)
class Call:
    """What a function may know of the node that it computes, if it has a parameter `call`.

    Attributes:
        outputs: For each output of the node, whether anything uses it.
        precision: In what type floating-point values are held.
    """

    outputs: tuple[bool, ...]
    precision: Precision

    def wants(self, index: int) -> bool:
        """Whether the node has output `index` and gives it a name."""
        return index < len(self.outputs) and self.outputs[index]


@dataclass(frozen=True)
class Operator:
    """One function of the table.

    Attributes:
        domain: Domain of the operator, empty for the standard one.
        name: Its type, such as `Softmax`.
        since: The first version of which the function is true.
        function: Takes the inputs by position (None for one that is absent) and the attributes by keyword; returns a tensor, or a tuple.
        raw: Whether it takes values as they are (`values.Carried`, sequences) and gives them so.
        attributes: Attributes that it knows; a node with another one is refused.
        wants_call: Whether it has the parameter `call`.
        refusal: Why the operator is refused; empty if it is not.
    """

    domain: str
    name: str
    since: int
    function: Function
    raw: bool
    attributes: frozenset[str]
    wants_call: bool
    refusal: str = ""


@dataclass
class _Table:
    entries: dict[tuple[str, str], list[Operator]] = field(default_factory=dict)

    def add(self, entry: Operator) -> None:
        versions = self.entries.setdefault((entry.domain, entry.name), [])
        versions.append(entry)
        versions.sort(key=lambda operator: -operator.since)


_TABLE = _Table()


def operator(*names: str, since: int = 1, domain: str = "", raw: bool = False, like: Function | None = None) -> Callable[[F], F]:
    """Decorator that enters a function into the table under each of `names`, from version `since` on (see `Operator`).

    Attributes are the function's parameters that have a name, and those of `like` to which it passes them on.
    """

    def enter(function: F) -> F:
        attributes, wants_call = _parameters(function)
        if like is not None:
            attributes |= _parameters(like)[0]
        for name in names:
            _TABLE.add(Operator(domain, name, since, function, raw, attributes, wants_call))
        return function

    return enter


def _parameters(function: Function) -> tuple[frozenset[str], bool]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # a function of torch, which takes inputs only
        return frozenset(), False
    nameless = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = {parameter.name for parameter in parameters if parameter.kind not in nameless}
    return frozenset(names - {"call"}), "call" in names


def refuse(*names: str, reason: str, domain: str = "") -> None:
    """Enters operators that are known and refused, with the reason that the error gives."""
    for name in names:
        _TABLE.add(Operator(domain, name, 1, _refused, False, frozenset(), False, reason))


def _refused(*inputs: Any) -> None:
    raise AssertionError("a refused operator was called")


@functools.cache
def load() -> None:
    """Imports the files of operators."""
    for module in MODULES:
        importlib.import_module(f"edgekit.graph.interpreter.{module}")


def find(domain: str, name: str, version: int) -> Operator | None:
    """The function that is true at opset `version` of `domain`; None if there is none."""
    load()
    return next((entry for entry in _TABLE.entries.get((domain, name), ()) if entry.since <= version), None)


def known() -> dict[tuple[str, str], list[Operator]]:
    """The whole table: (domain, name) to the functions, newest first."""
    load()
    return {key: list(entries) for key, entries in sorted(_TABLE.entries.items())}
