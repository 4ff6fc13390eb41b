"""`drop-monotonic` against the graph before it in float64: random chains before ArgMax and TopK, and every condition that stops it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.contracts import Context, Effect
from edgekit.graph import interpreter
from edgekit.passes.reparameterize.argmax import DropMonotonic


def test_declaration():
    assert (DropMonotonic.name, DropMonotonic.effect, DropMonotonic.default_order) == ("drop-monotonic", Effect.EXACT, None)
    assert DropMonotonic.removes == {"Softmax", "LogSoftmax"}


SHAPE = (3, 4, 5)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_chain(build, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    axis = data.draw(st.integers(0, 2))
    even = tuple(1 if place == axis else size for place, size in enumerate(SHAPE))
    arrays, nodes, value, kept = {}, [], "x", False
    droppable = 0  # the nodes from the last one that must stay to the reader
    for step in range(data.draw(st.integers(1, 4))):
        kind = data.draw(st.sampled_from(["soft", "log", "scale", "divide", "add", "sub", "row", "negative", "uneven", "other", "from"]))
        constant, out = f"c{step}", f"v{step}"
        if kind in ("soft", "log", "other"):
            over = (axis + 1) % 3 if kind == "other" else axis
            nodes.append(f"{out} = {'LogSoftmax' if kind == 'log' else 'Softmax'}<axis={over}>({value})")
        elif kind == "row":
            arrays["axes"] = np.array([axis])
            nodes.append(f"m{step} = ReduceMax({value}, axes)  {out} = Sub({value}, m{step})")
        else:
            shape = SHAPE if kind == "uneven" else data.draw(st.sampled_from([(), even]))
            array = rng.uniform(0.5, 2, shape) * (-1 if kind == "negative" else 1)
            arrays[constant] = array.astype(np.float32)
            operator = {"scale": "Mul", "divide": "Div", "add": "Add", "negative": "Mul", "uneven": "Add"}.get(kind, "Sub")
            pair = (
                f"{constant}, {value}"
                if kind == "from" or (kind in ("scale", "add") and data.draw(st.booleans()))
                else f"{value}, {constant}"
            )
            nodes.append(f"{out} = {operator}({pair})")
        droppable = 0 if kind in ("negative", "uneven", "other", "from") else droppable + 1
        kept = kept or kind == "row"
        value = out
    top = data.draw(st.booleans())
    if top:
        arrays["k"] = np.array([2])
        nodes.append(f"values, y = TopK<axis={axis}>({value}, k)")
    else:
        nodes.append(f"y = ArgMax<axis={axis - 3}, select_last_index={data.draw(st.integers(0, 1))}>({value})")
    model = build(f"g (float[3,4,5] x) => (int64[a,b,c] y) {{ {'  '.join(nodes)} }}", arrays)
    x = rng.integers(-4, 4, SHAPE) if data.draw(st.booleans()) else rng.normal(size=SHAPE)  # with ties and without
    feeds = {"x": x.astype(np.float32)}
    (reference,) = interpreter.run(model, feeds, dtype="float64").values()
    found = DropMonotonic().apply(model, Context())
    if not kept:  # a row's maximum is a second reader of what it is taken of
        assert found == droppable
    (result,) = interpreter.run(model, feeds, dtype="float64").values()
    np.testing.assert_array_equal(result, reference)
    text = ir.to_proto(model).SerializeToString()
    assert DropMonotonic().apply(model, Context()) == 0
    assert ir.to_proto(model).SerializeToString() == text


def test_classifier(build, run, operators):
    """Temperature, bias of the row and softmax before ArgMax: the class stays (ONNX Runtime is the reference)."""
    text = """g (float[7,5] x) => (int64[7,1] y) {
        s = Div(x, t)  m = ReduceMax(s, axes)  d = Sub(s, m)  p = Softmax(d)  y = ArgMax<axis=1>(p) }"""
    model = build(text, {"t": np.array(0.7, np.float32), "axes": np.array([1])})
    feeds = {"x": np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)}
    reference = run(model, feeds)
    assert DropMonotonic().apply(model, Context()) >= 2
    assert "Softmax" not in operators(model)
    np.testing.assert_array_equal(run(model, feeds)[0], reference[0])


REFUSED = {
    "is read elsewhere": "g (float[3,5] x) => (int64[3,1] y, float[3,5] p) { p = Softmax(x)  y = ArgMax<axis=1>(p) }",
    "over another axis than 1": "g (float[3,5] x) => (int64[3,1] y) { p = Softmax<axis=0>(x)  y = ArgMax<axis=1>(p) }",
    "is not one positive number": "g (float[3,5] x) => (int64[3,1] y) { p = Mul(x, c)  y = ArgMax<axis=1>(p) }",
    "scale of Div": "g (float[3,5] x) => (int64[3,1] y) { p = Div(x, n)  y = ArgMax<axis=1>(p) }",
    "": "g (float[3,5] x, float[3,1] r) => (int64[3,1] y) { p = Mul(x, r)  y = ArgMax<axis=1>(p) }",  # its sign is not known
    " ": "g (float[3,5] x) => (float[3,2] v, int64[3,2] y) { p = Softmax(x)  v, y = TopK(p, k) }",
    "  ": "g (float[3,5] x) => (int64[3,1] y) { p = Softmax(x)  y = ArgMin<axis=1>(p) }",
    "   ": "g (float[3,5] x) => (int64[3,2] y) { p = Softmax(x)  v, y = TopK<largest=0>(p, k) }",
    "    ": "g (float[3,5] x) => (int64[3,1] y) { p = Add(x, i)  y = ArgMax<axis=1>(p) }",  # infinite
    "     ": "g (float[3,5] x) => (int64[3,1] y) { p = Relu(x)  y = ArgMax<axis=1>(p) }",
}


@pytest.mark.parametrize("why", REFUSED)
def test_refused(build, why):
    arrays = {
        "c": np.array([1, 2, 1, 1, 1], np.float32),
        "n": np.array(-1, np.float32),
        "k": np.array([2]),
        "i": np.array(np.inf, np.float32),
    }
    model = build(REFUSED[why], {name: a for name, a in arrays.items() if f", {name})" in REFUSED[why]})
    before, context = ir.to_proto(model).SerializeToString(), Context()
    assert DropMonotonic().apply(model, context) == 0
    assert ir.to_proto(model).SerializeToString() == before
    if why.strip():
        assert any(why in refusal.why for refusal in context.refusals), context.refusals


def test_skipped_place_is_left_alone(build):
    model = build("g (float[3,5] x) => (int64[3,1] y) { p = Softmax(x)  y = ArgMax<axis=1>(p) }", {})
    assert DropMonotonic().apply(model, Context(skip=frozenset({"ArgMax_1"}))) == 0
