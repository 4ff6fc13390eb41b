"""Composite operators written out by their definitions, against ONNX's reference."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.graph.shapes import infer_shapes
from edgekit.targets.coreml.functions import expand_functions
from edgekit.targets.coreml.lowering import OPERATORS
from tests.targets.coreml.lowered import check

RANDOM = np.random.default_rng(0)


def text(inputs: str, outputs: str, body: str, opset: int = 23) -> str:
    return f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => ({outputs}) {{ {body} }}'


def floats(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("attributes", ["", ", ignore_index = 2"])
def test_negative_log_likelihood(reduction: str, weighted: bool, attributes: str) -> None:
    shape = "[3,2]" if reduction == "none" else "[]"
    body = f'y = NegativeLogLikelihoodLoss<reduction = "{reduction}"{attributes}>(x, t{", w" if weighted else ""})'
    inputs = {"x": floats(3, 5, 2), "t": RANDOM.integers(0, 5, (3, 2))} | ({"w": np.abs(floats(5))} if weighted else {})
    declared = "float[3,5,2] x, int64[3,2] t" + (", float[5] w" if weighted else "")
    check(text(declared, f"float{shape} y", body), inputs)


def test_a_definition_in_terms_of_a_definition() -> None:
    body = 'y, p = SoftmaxCrossEntropyLoss<reduction = "mean">(x, t)'
    check(text("float[3,5] x, int64[3] t", "float y, float[3,5] p", body), {"x": floats(3, 5), "t": np.array([0, 4, 2])})


def test_two_calls_of_one_operator_keep_their_attributes() -> None:
    body = 'a = NegativeLogLikelihoodLoss<reduction = "sum">(x, t) b = NegativeLogLikelihoodLoss<reduction = "mean">(x, t) y = Sub(a, b)'
    check(text("float[3,5] x, int64[3] t", "float y", body), {"x": floats(3, 5), "t": np.array([0, 4, 2])})


def test_lengths_of_sequences_in_attention() -> None:
    body = "y = Attention(q, k, v, , , , n)"
    declared = "float[2,3,4,8] q, float[2,3,6,8] k, float[2,3,6,8] v, int64[2] n"
    inputs = {"q": floats(2, 3, 4, 8), "k": floats(2, 3, 6, 8), "v": floats(2, 3, 6, 8), "n": np.array([6, 2])}
    check(text(declared, "float[2,3,4,8] y", body, 24), inputs)


def test_what_has_a_lowering_or_no_definition_stays() -> None:
    model = ir.from_proto(onnx.parser.parse_model(text("float[2,3] x", "float[2,3] y", "h = Gelu(x) y = Other(h)")))
    infer_shapes(model)
    assert "Gelu" in OPERATORS
    assert expand_functions(model) == 0
    assert [node.op_type for node in model.graph] == ["Gelu", "Other"]


def test_nodes_lead_back_to_where_they_come_from() -> None:
    model = ir.from_proto(onnx.parser.parse_model(text("float[3,5] x, int64[3] t", "float[] y", "y = NegativeLogLikelihoodLoss(x, t)")))
    infer_shapes(model)
    next(iter(model.graph)).metadata_props["module"] = "loss"
    assert expand_functions(model) == 1
    assert not model.functions
    assert all(
        node.metadata_props.get("module") == "loss" for node in model.graph if node.op_type in ("GatherElements", "Neg", "ReduceMean")
    )
