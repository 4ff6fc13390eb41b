"""What the target `coreml` covers: the table of docs/coreml-operators.md, from a run of ONNX's own node tests.

Each test's model goes through the stages of `edgekit compile`: opset 23, canonical form, legalizer, lowering in float32, package. The
package then runs in the evaluator, and its results are held to the test's expected ones by the test's own tolerances.

python -m edgekit.targets.coreml.coverage > docs/coreml-operators.md
python -m edgekit.targets.coreml.coverage --check
"""

from __future__ import annotations

import collections
import random
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from edgekit.errors import UnsupportedOpError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.interpreter.coverage import array, compare, node_cases
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.shapes import infer_shapes, pin_inputs
from edgekit.targets.coreml.convert import Converted, Options, convert
from edgekit.targets.coreml.executable import CoreMlExecutable
from edgekit.targets.coreml.legalize import legalize
from edgekit.targets.coreml.reference.package import Package

PAGE = Path(__file__).parents[3] / "docs" / "coreml-operators.md"

PARAMETERS = frozenset({
    *("axes", "axis", "block_shape", "delta", "depth", "image_shape", "K", "k", "limit", "output_shape", "pads", "position", "repeats"),
    *("roi", "scales", "shape", "size", "sizes", "split", "start", "starts", "ends", "steps", "values"),
    *("ratio", "training_mode", "max_output_boxes_per_class", "iou_threshold", "score_threshold", "sequence_lens", "cond", "M"),
    *("dft_length", "frame_step", "frame_length", "num_mel_bins", "sample_rate", "lower_edge_hertz", "upper_edge_hertz"),
    *("scale", "Scale", "y_scale", "y_zero_point", "x_scale", "x_zero_point", "w_scale", "w_zero_point"),
    *("a_scale", "a_zero_point", "b_scale", "b_zero_point", "W", "R", "w", "weight", "bias", "slope", "theta", "mean", "var"),
    *("input_mean", "input_var", "target_type"),
})  # fmt: skip
"""Inputs, by the names that ONNX's specification gives them, that say what an operator does or are weights: constants in a model."""
ALSO = {
    "Compress": ("condition",),
    "ConstantOfShape": ("input",),
    "BatchNormalization": ("B",),
    "LSTM": ("B", "P"),
    "GRU": ("B",),
    "RNN": ("B",),
}
"""The same, where the name alone does not tell."""

_INTRODUCTION = """# What the target `coreml` covers

This page is made by `python -m edgekit.targets.coreml.coverage > docs/coreml-operators.md`. Each of ONNX's node tests goes through the
stages of `edgekit compile --target coreml` in float32: opset 23, canonical form, legalizer, lowering. The package is executed by the
evaluator, and its results are held to the test's own by the test's own tolerances (at least two roundings of the type, 16-bit types
included); integers and booleans must be equal. Refused means an `UnsupportedOpError` that names the operator, the reason and the nearest
rewrite.

The tests give all inputs when the model runs, also those that say what an operator does. A test that is refused so is tried again with
these inputs as constants of the graph, with the test's values, and counted apart: {parameters}.
"""


_COMPARISON = """For comparison: `onnxsim.coreml_export` of onnxsim 0.8.1 converts 287 of the same 1,884 tests, by its own figure.
"""


@dataclass(frozen=True)
class Outcome:
    """How one node test ended.

    Attributes:
        name: Of the test.
        operator: Domain and name of the operator that it tests.
        since: The opset that gave the tested operator its form.
        ending: "match", "constants" (a match with parameters as constants), "refused" or "failed".
        reason: Why it was refused or failed.
        where: The node that was refused.
        fix: The nearest rewrite that the refusal names.
    """

    name: str
    operator: tuple[str, str]
    since: int
    ending: str
    reason: str = ""
    where: str = ""
    fix: str = ""


def sample(count: int, seed: int = 0) -> list[str]:
    """The names of `count` node tests, by chance."""
    return sorted(random.Random(seed).sample(sorted(case.name for case in node_cases()), count))


def outcomes(names: Iterable[str] | None = None, report: Callable[[Outcome], None] = lambda outcome: None) -> list[Outcome]:
    """Runs node tests, all by default."""
    by_name = {case.name: case for case in node_cases()}
    results = []
    for name in by_name if names is None else names:
        results.append(_outcome(by_name[name], by_name))
        report(results[-1])
    return results


def _outcome(case: Any, by_name: Mapping[str, Any]) -> Outcome:
    tested = by_name.get(re.sub(r"_expanded.*$", "", case.name), case)  # the function body of an operator tests that operator
    node, schema = _tested(tested.model)
    ending, error = _attempt(case, frozenset())
    if ending == "refused" and (parameters := _parameters(node, schema, case.model)):
        second, error = _attempt(case, parameters)
        ending = "constants" if second == "match" else second
    told = [str(getattr(error, name, None) or "") for name in ("what", "where", "fix")]
    told[0] = told[0] or (f"{type(error).__name__}: {error}" if error else "")
    return Outcome(case.name, (schema.domain, schema.name), schema.since_version, ending, *told)


def _tested(model: onnx.ModelProto) -> tuple[onnx.NodeProto, Any]:
    """The node that a test is about, and the schema of its operator."""
    node = model.graph.node[-1 if len(model.graph.node) == 2 else 0]
    opset = next(entry.version for entry in model.opset_import if entry.domain == node.domain)
    return node, onnx.defs.get_schema(node.op_type, opset, node.domain)


def _parameters(node: onnx.NodeProto, schema: Any, model: onnx.ModelProto) -> frozenset[str]:
    """Names of the model's inputs that are parameters of the tested node."""
    given = {info.name for info in model.graph.input}
    names = {name for name, formal in zip(node.input, schema.inputs, strict=False) if _is_parameter(schema.name, formal.name)}
    return frozenset(names & given)


def _is_parameter(operator: str, formal: str) -> bool:
    return formal in PARAMETERS or formal in ALSO.get(operator, ())


def _attempt(case: Any, parameters: frozenset[str]) -> tuple[str, Exception | None]:
    try:
        _check(case, parameters)
    except UnsupportedOpError as error:
        return "refused", error
    except Exception as error:
        return "failed", error
    return "match", None


def _check(case: Any, parameters: frozenset[str]) -> None:
    """Runs a test, with those of its inputs that are named as constants of the graph.

    Raises:
        AssertionError: The answer is wrong.
    """
    given, expected = case.data_sets[0]
    feeds = {info.name: _held(array(value)) for info, value in zip(case.model.graph.input, given, strict=True)}
    model = prepare(case.model, feeds, parameters)
    executable = _load(convert(model, Options(half=False)))
    results = executable.run({name: value for name, value in feeds.items() if name not in parameters})
    for info, want in zip(case.model.graph.output, expected, strict=True):
        compare(results[info.name], array(want), *_tolerances(array(want), case))


def _held(value: Any) -> Any:
    """Scalars as arrays, which numpy's own results are not."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def _tolerances(want: Any, case: Any) -> tuple[float, float]:
    """The test's own; at least two roundings of the type, for some tests expect the very roundings of the code that made them."""
    if not isinstance(want, np.ndarray) or not want.size or not _is_float(want.dtype):
        return case.rtol, case.atol
    step = 2 * float(ml_dtypes.finfo(want.dtype).eps)  # type: ignore[no-untyped-call]
    finite = np.abs(want.astype(np.float64))[np.isfinite(want.astype(np.float64))]
    return max(case.rtol, step), max(case.atol, step * float(finite.max(initial=0)) if want.itemsize > 2 else 0)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype.name == "bfloat16"


def prepare(proto: onnx.ModelProto, feeds: Mapping[str, Any], parameters: frozenset[str]) -> ir.Model:
    """The graph as `edgekit compile` would hand it to the lowering."""
    model = ir.from_proto(proto)
    for value in list(model.graph.inputs):
        if value.name in parameters:
            value.const_value = ir.tensor(feeds[value.name], name=value.name)
            model.graph.inputs.remove(value)
            model.graph.register_initializer(value)
    if all(isinstance(value.type, ir.TensorType) for value in model.graph.inputs):
        pin_inputs(model, {str(value.name): (np.shape(feeds[str(value.name)]), None) for value in model.graph.inputs})
    model = canonicalize(to_opset(model, OPSET))
    infer_shapes(model)
    legalize(model)
    infer_shapes(model)
    return model


def _load(converted: Converted) -> CoreMlExecutable:
    """Opens what coremltools wrote into its temporary folder."""
    model = converted.model
    package = Package(Path(model.package_path), model.get_spec(), Path(model.weights_dir).parent, "model.mlmodel")
    return CoreMlExecutable(package, converted.interface, 1)


def totals(results: Sequence[Outcome]) -> str:
    """The line of the page that sums up."""
    count = collections.Counter(result.ending for result in results)
    plain, constants = count["match"], count["constants"]
    return (
        f"Of the {len(results)} node tests of onnx {onnx.__version__}, {plain + constants} match: {plain} as they are and {constants} with "
        f"their parameters as constants. {count['refused']} are refused; {count['failed']} give a wrong answer."
    )


def page(results: Sequence[Outcome]) -> str:
    """The text of docs/coreml-operators.md."""
    names = sorted({*PARAMETERS, *(f"{name} of {operator}" for operator, formals in ALSO.items() for name in formals)}, key=str.casefold)
    lines = [
        _INTRODUCTION.format(parameters=", ".join(f"`{name}`" for name in names)),
        totals(results),
        "",
        _COMPARISON,
        "| operator | since opset | match | with constants | refused | what is refused |",
        "|---|--:|--:|--:|--:|---|",
    ]
    groups = collections.defaultdict(list)
    for result in results:
        groups[(*result.operator, result.since)].append(result)
    for (domain, name, since), group in sorted(groups.items()):
        count = collections.Counter(result.ending for result in group)
        reasons = sorted({_short(result) for result in group if result.ending == "refused"})
        label = "::".join(part for part in (domain, name) if part)
        lines.append(f"| {label} | {since} | {count['match']} | {count['constants']} | {count['refused']} | {'; '.join(reasons)} |")
    failed = [f"- `{result.name}`: {result.reason}" for result in results if result.ending == "failed"]
    return "\n".join([*lines, *(["", "Wrong answers:", "", *failed] if failed else [])]) + "\n"


def _short(result: Outcome) -> str:
    """The reason of a refusal without what is true of one test only: names of values, shapes."""
    text = re.sub(r"^has no ", "no ", re.sub(r"^Core ML (cannot express )?", "", result.reason))
    return re.sub(r"\[[-\d, ]*\]", "[…]", text).replace("|", "\\|").replace("\n", " ")


def main(arguments: Sequence[str]) -> int:
    """Writes the page, or with `--check` compares its totals with those of the file."""
    results = outcomes()
    if "--check" not in arguments:
        sys.stdout.write(page(results))
        return 0
    if PAGE.is_file() and totals(results) in PAGE.read_text("utf-8"):
        return 0
    sys.stderr.write(f"{PAGE} is out of date ({totals(results)}): python -m edgekit.targets.coreml.coverage > docs/coreml-operators.md\n")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
