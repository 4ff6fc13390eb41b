"""What the interpreter covers: the table of docs/interpreter.md, from the table of operators and a run of ONNX's own node tests.

python -m edgekit.graph.interpreter.coverage > docs/interpreter.md
python -m edgekit.graph.interpreter.coverage --check
"""

from __future__ import annotations

import collections
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import numpy_helper

from edgekit.errors import UnsupportedOpError
from edgekit.graph.interpreter import registry
from edgekit.graph.interpreter.api import run
from edgekit.graph.operators import DOMAIN

PAGE = Path(__file__).parents[3] / "docs" / "interpreter.md"

_INTRODUCTION = """# The interpreter

`edgekit.graph.interpreter` runs an ONNX model on torch tensors, differentiably, one small function per operator, written from the
operators' specification. This page is made by `python -m edgekit.graph.interpreter.coverage > docs/interpreter.md`.

    from edgekit.graph.interpreter import Interpreter, run

    outputs = run("model.onnx", {"x": array})                      # numpy in, numpy out
    interpreter = Interpreter("model.onnx", dtype="float64", parameters=True)
    loss = interpreter({"x": tensor})["y"].sum()                   # torch in, torch out
    loss.backward()                                                # interpreter.parameters["head.weight"].grad

| `dtype` | floating-point values |
|---|---|
| `float32` | each in its declared type |
| `float64` | all in float64, whatever the model declares |
| `float16` | all computed in float32, and every one rounded to float16; beyond 65504 they become infinite |

- `hooks={name: function(tensor)}` or `hooks=function(name, tensor)` sees every value; what it returns replaces the value.
- `Round` passes its gradient unchanged, `Sign` where |x| <= 1. Indices that `TopK` selects by scores with a gradient carry it: what is
  gathered by them (`Gather`, `GatherElements`, `GatherND`, also after reshaping, sorting by a second `TopK` or adding an offset) gives the
  scores the gradient of a multiplication by the selection mask.
- What is not in the table, and what the last column says, raises `UnsupportedOpError`.
"""


@dataclass(frozen=True)
class Outcome:
    """How one node test ended.

    Attributes:
        name: Of the test.
        operator: Domain and name of the operator that it tests.
        operators: Names of all operators in its model.
        refused: Message of the refusal, empty if it was not refused.
        failed: What was wrong with the answer, or the error of another class; empty if nothing.
    """

    name: str
    operator: tuple[str, str]
    operators: frozenset[str]
    refused: str
    failed: str

    @property
    def passed(self) -> bool:
        """Whether the answer was right."""
        return not self.refused and not self.failed


def node_cases() -> list[Any]:
    """ONNX's node tests (`onnx.backend.test.case.node`), which take seconds to make."""
    from onnx.backend.test.case.node import collect_testcases

    state = np.random.get_state()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        cases: list[Any] = collect_testcases(None)
    np.random.set_state(state)
    return cases


def outcomes(cases: Sequence[Any]) -> list[Outcome]:
    """Runs node tests, on one thread, and holds the results to the tests' own tolerances."""
    by_name = {case.name: case for case in cases}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_outcome(case, by_name) for case in cases]
    finally:
        torch.set_num_threads(threads)


def _outcome(case: Any, by_name: dict[str, Any]) -> Outcome:
    base = by_name.get(re.sub(r"_expanded.*$", "", case.name), case)  # the function body of an operator tests that operator
    node = base.model.graph.node[-1 if len(base.model.graph.node) == 2 else 0]
    operators = frozenset(_operators(case.model.graph))
    refused = failed = ""
    try:
        _check(case)
    except UnsupportedOpError as error:
        refused = error.what
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
    return Outcome(case.name, (node.domain, node.op_type), operators, refused, failed)


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _operators(attribute.g)


def _check(case: Any) -> None:
    """Runs a test.

    Raises:
        AssertionError: The answer is wrong.
    """
    model = ir.from_proto(case.model)
    for given, expected in case.data_sets:
        inputs = {formal.name: array(value) for formal, value in zip(case.model.graph.input, given, strict=True)}
        results = run(model, inputs)
        for formal, want in zip(case.model.graph.output, expected, strict=True):
            compare(results[formal.name], array(want), case.rtol, case.atol)


def array(value: Any) -> Any:
    """What a test gives or expects, as numpy arrays and lists of them."""
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    return [array(item) for item in value] if isinstance(value, list) else value


def compare(got: Any, want: Any, rtol: float, atol: float) -> None:
    """Holds a result to the expected one, integers and booleans exactly.

    Raises:
        AssertionError: They differ.
    """
    if want is None:
        if got is not None:
            raise AssertionError(f"got {type(got).__name__}, want none")
        return
    if isinstance(want, list):
        if not isinstance(got, list) or len(got) != len(want):
            raise AssertionError(f"want a sequence of {len(want)}")
        for have, item in zip(got, want, strict=True):
            compare(have, item, rtol, atol)
        return
    want = np.asarray(want)
    if got.dtype != want.dtype or got.shape != want.shape:
        raise AssertionError(f"got {got.dtype} {got.shape}, want {want.dtype} {want.shape}")
    if want.dtype.kind in "biuO":
        np.testing.assert_array_equal(got, want)
    else:
        wide = np.complex128 if want.dtype.kind == "c" else np.float64
        np.testing.assert_allclose(got.astype(wide), want.astype(wide), rtol=rtol, atol=atol)


def page(results: Sequence[Outcome]) -> str:
    """The text of docs/interpreter.md."""
    passed, refused = (sum(bool(getattr(result, kind)) for result in results) for kind in ("passed", "refused"))
    lines = [
        _INTRODUCTION,
        f"Of the {len(results)} node tests of onnx {onnx.__version__}, {passed} pass and {refused} are refused; "
        f"{len(results) - passed - refused} give a wrong answer.\n",
        "| operator | functions from opset | tests passed | refused | what is refused |",
        "|---|---|--:|--:|---|",
    ]
    by_operator = collections.defaultdict(list)
    for result in results:
        by_operator[result.operator].append(result)
    known = {key: entries for key, entries in registry.known().items() if key[0] != DOMAIN}  # ONNX has no tests of edgekit's own
    first: dict[tuple[str, str], int] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        key = (schema.domain, schema.name)
        first[key] = min(schema.since_version, first.get(key, schema.since_version))
    for key in sorted({*known, *by_operator}):
        entries, tests = known.get(key, []), by_operator.get(key, [])
        versions = ", ".join(str(max(entry.since, first[key])) for entry in reversed(entries) if not entry.refusal) or "none"
        reasons = {entry.refusal for entry in entries if entry.refusal} | {_reason(test.refused) for test in tests if test.refused}
        good, bad = sum(test.passed for test in tests), sum(bool(test.refused) for test in tests)
        name = "::".join(part for part in key if part)
        lines.append(f"| {name} | {versions} | {good} | {bad} | {'; '.join(sorted(reasons))} |")
    return "\n".join(lines) + "\n"


def _reason(message: str) -> str:
    if " refuses " in message and ": " in message:
        return message.split(": ", 1)[1]
    return (
        "all of it" if "has no" in message and "::" in message else re.sub(r".*has no operator (\S+) of opset (\d+)", r"opset \2", message)
    )


def main(arguments: Sequence[str]) -> int:
    """Writes the page, or with `--check` compares it with the file."""
    text = page(outcomes(node_cases()))
    if "--check" not in arguments:
        sys.stdout.write(text)
        return 0
    if PAGE.is_file() and PAGE.read_text() == text:
        return 0
    sys.stderr.write(f"{PAGE} is out of date: python -m edgekit.graph.interpreter.coverage > docs/interpreter.md\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
