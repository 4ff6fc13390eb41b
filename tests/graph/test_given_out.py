"""No fusion takes away a value that a user asked for: every intermediate value in turn becomes a graph output, over all dialects.

All cases of a group stand in one graph and share nothing, so that one round gives out one value of each.
"""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir
import pytest

from edgekit.graph.canonicalize import canonicalize, inline_functions, lift_constants
from edgekit.graph.fusions.matching import FLOATS
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes
from tests.graph.exporter_support import ancestors, run
from tests.graph.test_exporters import GROUPS, QUICK, exported

FEW, TOLERANCE = 3, 1e-5


@functools.cache
def prepared(group: str, exporter: str, opset: int) -> tuple[ir.Model, list[list[str]], dict[str, np.ndarray]]:
    """The exported graph, the values between inputs and outputs by case, and what each value is."""
    model = to_opset(exported(group, exporter, opset).raw.clone())
    inline_functions(model)
    lift_constants(model)
    infer_shapes(model)
    fed = set(model.graph.inputs)
    for node in model.graph:
        if any(value in fed for value in node.inputs):
            fed.update(node.outputs)
    between = []
    for result in model.graph.outputs:
        values = [output for node in ancestors(result) for output in node.outputs if output in fed and not output.is_graph_output()]
        between.append([str(value.name) for value in values if value.dtype in FLOATS and isinstance(value.type, ir.TensorType)])
    everything = model.clone()
    give_out(everything, {name for names in between for name in names})
    return model, between, run(everything, exported(group, exporter, opset).feeds)


def give_out(model: ir.Model, names: set[str]) -> None:
    model.graph.outputs.extend(value for node in model.graph for value in node.outputs if value.name in names)


def holds(group: str, exporter: str, opset: int, rounds: slice) -> None:
    base, between, reference = prepared(group, exporter, opset)
    longest = max(len(names) for names in between)
    for number in range(longest)[rounds]:
        model = base.clone()
        given = {names[number % len(names)] for names in between if names}
        give_out(model, given)
        outputs = [value.name for value in model.graph.outputs]
        canonicalize(model)
        assert [value.name for value in model.graph.outputs] == outputs
        for name, result in run(model, exported(group, exporter, opset).feeds).items():
            expected = reference[name]
            assert result.shape == expected.shape, name
            np.testing.assert_array_equal(np.isfinite(result), np.isfinite(expected), err_msg=name)
            finite = np.isfinite(expected)
            scale = np.abs(expected[finite]).max(initial=0)
            assert np.abs(result - expected)[finite].max(initial=0) <= TOLERANCE * max(scale, 1e-3), name


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("exporter", "opset"), QUICK)
def test_some_values_given_out(group: str, exporter: str, opset: int) -> None:
    longest = max(len(names) for names in prepared(group, exporter, opset)[1])
    holds(group, exporter, opset, slice(0, None, max(1, longest // FEW)))


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("exporter", "opset"), [*QUICK, ("dynamo", 18), ("torchscript", 13)])
def test_every_value_given_out(group: str, exporter: str, opset: int) -> None:
    holds(group, exporter, opset, slice(None))
