"""`value_ranges` against numpy, and which values `risks` names."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from edgekit.graph.ranges import OVERFLOW, SMALLEST_NORMAL, VANISH, risks, value_ranges
from edgekit.graph.shapes import infer_shapes

HEADER = '<ir_version: 10, opset_import: ["" : 23]> '


def graph(text: str, arrays: dict[str, np.ndarray] | None = None) -> ir.Model:
    proto = onnx.parser.parse_model(HEADER + text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (arrays or {}).items())
    for node in proto.graph.node:
        node.name = f"n_{node.output[0]}"
    model = ir.from_proto(proto)
    infer_shapes(model)
    for node in model.graph:
        node.metadata_props["edgekit.module"] = f"blocks.0.{node.outputs[0].name}"
    return model


def by_name(ranges):
    return {item.name: item for item in ranges}


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.lists(st.floats(width=32, allow_nan=False), min_size=3, max_size=3), min_size=1, max_size=4))
def test_ranges_and_shares_are_those_of_numpy(rows):
    model = graph("g (float[3] x) => (float[3] y) { y = Identity(x) }")
    batches = [{"x": np.float32(row)} for row in rows]
    found = by_name(value_ranges(model, batches))["y"]
    values = np.abs(np.concatenate([batch["x"] for batch in batches]).astype(np.float64))
    finite = values[np.isfinite(values) & (values > 0)]
    with np.errstate(over="ignore"):
        half = finite.astype(np.float16)
    assert found.largest == finite.max(initial=0)
    assert found.smallest == (finite.min() if finite.size else 0)
    assert found.overflow == pytest.approx(np.isinf(half).sum() / values.size)
    nonzero = max(finite.size, 1)
    assert found.vanish == pytest.approx((half == 0).sum() / nonzero)
    assert found.subnormal == pytest.approx(((half != 0) & (finite < SMALLEST_NORMAL)).sum() / nonzero)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.floats(min_value=1e-9, max_value=1e9))
def test_thresholds_are_where_numpy_rounds_to_infinity_and_zero(number):
    with np.errstate(over="ignore"):
        half = np.float64(number).astype(np.float16)
    assert (number >= OVERFLOW) == np.isinf(half)
    assert (number <= VANISH) == (half == 0)


def test_each_value_is_named_with_node_operator_and_module():
    model = graph("g (float[2,3] x) => (float[2,3] y) { p = Mul(x, x)  y = MatMul(p, w) }", {"w": np.full((3, 3), 2, np.float32)})
    found = by_name(value_ranges(model, [{"x": np.full((2, 3), 300, np.float32)}]))
    assert list(found) == ["w", "x", "p", "y"]
    assert (found["p"].node, found["p"].operator, found["p"].module) == ("n_p", "Mul", "blocks.0.p")
    assert (found["w"].node, found["w"].constant, found["x"].node) == ("n_y", True, "")
    assert (found["p"].largest, found["p"].overflow, found["y"].largest) == (90000, 1, 540000)
    assert [(risk.range.name, risk.kind) for risk in risks(found.values())] == [("p", "overflow"), ("y", "overflow")]
    assert "it reaches 9e+04" in risks(found.values())[0].why


def test_squares_inside_a_layer_norm_are_seen():
    model = graph("g (float[2,8] x) => (float[2,8] y) { y = LayerNormalization(x, s) }", {"s": np.ones(8, np.float32)})
    x = np.random.default_rng(0).normal(0, 1000, (2, 8)).astype(np.float32)
    found = by_name(value_ranges(model, [{"x": x}]))
    centred = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    square = found["y/square"]
    assert (square.node, square.operator, square.internal) == ("n_y", "LayerNormalization", "square")
    assert square.largest == pytest.approx((centred**2).max())
    named = {risk.range.name for risk in risks(found.values())}
    assert named == {"y/square", "y/sum_of_squares", "y/variance", "y/variance_and_epsilon"}
    assert not risks(value_ranges(model, [{"x": x}], internals=False))


def test_infinite_masks_are_no_overflow_and_finite_ones_are():
    text = "g (float[2,4] x) => (float[2,4] y, float[2,4] z) { a = Add(x, m)  y = Softmax(a)  b = Add(x, n)  z = Softmax(b) }"
    mask = np.float32([0, 0, 1, 1])
    model = graph(text, {"m": np.where(mask, -np.inf, 0).astype(np.float32), "n": (mask * np.finfo(np.float32).min)})
    named = {risk.range.name for risk in risks(value_ranges(model, [{"x": np.zeros((2, 4), np.float32)}]))}
    assert {"n", "b"} <= named
    assert not named & {"m", "a", "y"}


def test_epsilon_that_vanishes_is_named_with_the_divisor_that_it_guards():
    text = "g (float[2,4] x) => (float[2,4] y) { n = ReduceL2<keepdims=1>(x, a)  m = Max(n, e)  y = Div(x, m) }"
    model = graph(text, {"a": np.array([1]), "e": np.float32(1e-12)})
    quiet = {risk.range.name for risk in risks(value_ranges(model, [{"x": np.ones((2, 4), np.float32)}]))}
    assert quiet == {"e"}
    zeros = np.float32([[1, 1, 1, 1], [0, 0, 0, 0]])
    found = {risk.range.name: risk.why for risk in risks(value_ranges(model, [{"x": zeros}]))}
    assert set(found) == {"e", "m"}
    assert "divisor" in found["m"]


def test_small_terms_vanish_without_a_word_and_whole_tensors_do_not():
    text = "g (float[4] x) => (float[4] y, float[4] z) { y = Add(x, t)  z = Mul(x, t) }"
    model = graph(text, {"t": np.full(4, 1e-9, np.float32)})
    assert {risk.range.name for risk in risks(value_ranges(model, [{"x": np.ones(4, np.float32)}]))} == {"t", "z"}
    model = graph("g (float[4] x) => (float[4] y) { y = Add(x, t) }", {"t": np.full(4, 1e-9, np.float32)})
    assert risks(value_ranges(model, [{"x": np.ones(4, np.float32)}])) == []


def test_constants_are_measured_without_data_and_the_model_stays_as_it_is():
    model = graph("g (float[4] x) => (float[4] y) { y = Add(x, t) }", {"t": np.float32([-1e9, 0, 0, 0])})
    before = ir.to_proto(model).SerializeToString()
    (found,) = value_ranges(model, [])
    assert (found.name, found.overflow, found.largest) == ("t", 0.25, 1e9)
    assert ir.to_proto(model).SerializeToString() == before
