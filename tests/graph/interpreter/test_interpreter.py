"""The interpreter's faces: precisions, hooks, bodies, functions, memory, and what it says of bad input."""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgekit.errors import DataError, EdgekitError, SourceError, UnsupportedOpError, UsageError
from edgekit.graph.interpreter import Interpreter, run


def parsed(text: str, opset: int = 23) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}, "own" : 1]> ' + text))


ELEMENTWISE = """
    graph (float[N] x) => (float[N] y, float[N] z) <float[1] c = {0.1}> {
        a = Mul(x, c)
        y = Add(a, x)
        b = Mul(y, x)
        d = Sub(b, c)
        z = Div(d, y)
    }
"""


class TestPrecision:
    def test_float16_is_what_numpy_gives_in_float16(self) -> None:
        scales = 10.0 ** np.arange(-4, 6).repeat(100)
        x = (np.abs(np.random.default_rng(0).standard_normal(1000)) * scales).astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            half = x.astype(np.float16)
            y = half * np.float16(0.1) + half
            z = (y * half - np.float16(0.1)) / y
        got = run(parsed(ELEMENTWISE), {"x": x}, dtype="float16")
        assert got["y"].dtype == np.float32
        np.testing.assert_array_equal(got["y"], y.astype(np.float32))
        np.testing.assert_array_equal(got["z"], z.astype(np.float32))
        assert np.isinf(got["y"]).any()  # beyond 65504

    def test_float64(self) -> None:
        x = np.random.default_rng(0).uniform(1, 2, 10).astype(np.float32)
        got = run(parsed(ELEMENTWISE), {"x": x}, dtype="float64")["z"]
        wide = x.astype(np.float64)
        assert got.dtype == np.float64
        tenth = np.float32(0.1).astype(np.float64)
        y = wide * tenth + wide
        np.testing.assert_allclose(got, (y * wide - tenth) / y, rtol=1e-14)

    def test_float64_holds_what_a_model_casts_to_float16(self) -> None:
        model = parsed("graph (float[N] x) => (float[N] y) { h = Cast<to=10>(x) y = Cast<to=1>(h) }")
        x = np.array([1 / 3], np.float32)
        assert run(model, {"x": x}, dtype="float64")["y"][0] == x[0]
        assert run(model, {"x": x})["y"][0] == np.float32(np.float16(x[0]))

    def test_a_parameter_keeps_its_float32_value_under_float16(self) -> None:
        interpreter = Interpreter(parsed(ELEMENTWISE), dtype="float16", parameters=True)
        assert interpreter.parameters["c"].item() == np.float32(0.1)
        result = interpreter({"x": np.ones(1, np.float32)})
        assert result["y"].item() == np.float32(np.float16(np.float32(np.float16(0.1)) + 1))
        result["y"].sum().backward()
        assert interpreter.parameters["c"].grad is not None
        assert interpreter.parameters["c"].grad.item() == 1

    def test_unknown(self) -> None:
        with pytest.raises(UsageError, match="bfloat"):
            Interpreter(parsed(ELEMENTWISE), dtype="bfloat16")


LOOPS = """
    graph (int64 n, float[2] x) => (float[2] last, float[K, 2] all) {
        yes = Constant<value: tensor = bool {1}>()
        two = Constant<value: tensor = float {2.0}>()
        last, all = Loop<body = step (int64 i, bool go, float[2] state) => (bool more, float[2] next, float[2] each) {
            scaled = Mul(state, two)
            shifted = Add(scaled, x)
            small = ReduceSum<keepdims=0>(shifted)
            limit = Constant<value: tensor = float {40.0}>()
            more = Less(small, limit)
            next = If(more) <then_branch = yes_graph () => (float[2] kept) { kept = Identity(shifted) },
                             else_branch = no_graph () => (float[2] cut) { cut = Sub(shifted, x) }>
            each = Identity(scaled)
        }>(n, yes, x)
    }
"""


class TestBodies:
    @pytest.mark.parametrize("count", [1, 2, 5])
    def test_loop_and_if_with_captures_match_onnx_runtime(self, count: int) -> None:
        model = parsed(LOOPS, 21)
        feeds = {"n": np.array(count, np.int64), "x": np.array([1.0, 2.5], np.float32)}
        session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
        for got, want in zip(run(model, feeds).values(), session.run(None, feeds), strict=True):
            np.testing.assert_allclose(got, want)

    def test_gradient_through_a_loop(self) -> None:
        x = torch.tensor([1.0, 2.5], requires_grad=True)
        result = Interpreter(parsed(LOOPS, 21))({"n": torch.tensor(2), "x": x})
        result["last"].sum().backward()  # 2 (2x + x) + x = 7x
        assert x.grad is not None
        assert x.grad.tolist() == [7, 7]

    def test_no_iteration_is_refused_where_it_has_no_shape(self) -> None:
        with pytest.raises(UnsupportedOpError, match="operator Loop of opset 21: no iteration"):
            run(parsed(LOOPS, 21), {"n": np.array(0, np.int64), "x": np.zeros(2, np.float32)})

    def test_functions_with_attributes_and_functions_inside(self) -> None:
        model = parsed(
            """
            graph (float[N] x) => (float[N] y, float[N] z) {
                y = own.outer<slope = 0.5>(x)
                z = own.outer<slope = 0.25>(x)
            }
            <domain: "own", opset_import: ["" : 23, "own" : 1]>
            outer <slope> (x) => (y) { h = own.inner<alpha: float = @slope>(x) y = Neg(h) }
            <domain: "own", opset_import: ["" : 23]>
            inner <alpha> (x) => (y) { y = LeakyRelu<alpha: float = @alpha>(x) }
            """
        )
        got = run(model, {"x": np.array([-1.0, 2.0], np.float32)})
        assert got["y"].tolist() == [0.5, -2.0]
        assert got["z"].tolist() == [0.25, -2.0]


class TestHooks:
    def test_every_value_by_name(self) -> None:
        seen: dict[str, Any] = {}
        run(parsed(ELEMENTWISE), {"x": np.ones(2, np.float32)}, hooks=lambda name, tensor: seen.update({name: tensor.clone()}))
        assert seen.keys() == {"x", "c", "a", "y", "b", "d", "z"}
        assert seen["b"].tolist() == pytest.approx([1.1, 1.1])

    def test_a_hook_replaces_a_value(self) -> None:
        got = run(parsed(ELEMENTWISE), {"x": np.ones(2, np.float32)}, hooks={"a": lambda tensor: tensor * 0, "y": lambda tensor: None})
        assert got["y"].tolist() == [1, 1]

    def test_values_in_bodies(self) -> None:
        seen: list[str] = []
        feeds = {"n": np.array(2, np.int64), "x": np.ones(2, np.float32)}
        run(parsed(LOOPS, 21), feeds, hooks={"scaled": lambda tensor: seen.append("scaled")})
        assert len(seen) == 2

    def test_unknown_name(self) -> None:
        with pytest.raises(UsageError, match=r"value 'q'"):
            run(parsed(ELEMENTWISE), {"x": np.ones(2, np.float32)}, hooks={"q": lambda tensor: None})


def test_values_are_freed_when_last_used() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    counts: list[int] = []

    def hook(name: str, tensor: torch.Tensor) -> None:
        counts.append(sum(reference() is not None for reference in alive))
        if name.startswith("h"):
            alive.append(weakref.ref(tensor))

    steps = "\n".join(f"h{index + 1} = Neg(h{index})" for index in range(20))
    model = parsed(f"graph (float[4] x) => (float[4] y) {{ h0 = Neg(x) {steps} y = Neg(h20) }}")
    gc.disable()
    try:
        run(model, {"x": np.ones(4, np.float32)}, hooks=hook)
    finally:
        gc.enable()
    assert len(alive) == 21
    assert max(counts) <= 2


def test_broadcasting_by_attribute_of_old_opsets() -> None:
    model = parsed("graph (float[2, 3] x, float[2] b) => (float[2, 3] y) { y = Add<axis = 0, broadcast = 1>(x, b) }", 6)
    got = run(model, {"x": np.zeros((2, 3), np.float32), "b": np.array([1, 2], np.float32)})
    assert got["y"].tolist() == [[1, 1, 1], [2, 2, 2]]


class TestRefusals:
    def test_unknown_operator(self) -> None:
        with pytest.raises(UnsupportedOpError, match=r"operator own::Thing of opset 1") as error:
            Interpreter(parsed("graph (float[N] x) => (float[N] y) { y = own.Thing(x) }"))
        assert "'y'" in (error.value.where or "")

    def test_unknown_attribute(self) -> None:
        with pytest.raises(UnsupportedOpError, match=r"operator Relu of opset 23: attribute 'slope'"):
            Interpreter(parsed("graph (float[N] x) => (float[N] y) { y = Relu<slope = 2>(x) }"))

    def test_opset_from_the_future(self) -> None:
        with pytest.raises(UnsupportedOpError, match="opsets up to 28"):
            Interpreter(parsed("graph (float[N] x) => (float[N] y) { y = Relu(x) }", 99))

    def test_strings(self) -> None:
        model = parsed("graph (string[N] x) => (string[N] y) { y = Transpose(x) }")
        with pytest.raises(UnsupportedOpError, match="operator Transpose of opset 23: tensors of type STRING"):
            run(model, {"x": np.array(["a"], dtype=object)})

    def test_large_uint64_in_an_ordered_operator(self) -> None:
        model = parsed("graph (uint64[N] x) => (uint64[N] y) { y = Max(x, x) }")
        assert run(model, {"x": np.array([7], np.uint64)})["y"].tolist() == [7]
        with pytest.raises(UnsupportedOpError, match=r"2\^63"):
            run(model, {"x": np.array([2**63], np.uint64)})


class TestBadInput:
    MODEL = parsed("graph (float[2, N] x) => (float[2, N] y) <float[3] w = {1, 2, 3}> { y = Mul(x, w) }")

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "input 'x' is missing"),
            ({"x": np.ones((2, 3), np.float32), "q": np.ones(1)}, "no input 'q'"),
            ({"x": np.ones((1, 3), np.float32)}, r"shape \[2, 'N'\] and was given \[1, 3\]"),
            ({"x": np.ones(3, np.float32)}, r"was given \[3\]"),
            ({"x": np.ones((2, 3), np.int64)}, "declared FLOAT and was given INT64"),
        ],
    )
    def test_inputs(self, inputs: dict[str, np.ndarray], message: str) -> None:
        with pytest.raises(DataError, match=message):
            run(self.MODEL, inputs)

    def test_a_node_that_fails_is_named(self) -> None:
        with pytest.raises(SourceError, match=r"operator Mul of opset 23 failed on inputs float\[2, 5\], float\[3\]") as error:
            run(self.MODEL, {"x": np.ones((2, 5), np.float32)})
        assert "'y'" in str(error.value)

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        path = tmp_path / "broken.onnx"
        path.write_bytes(b"not a model")
        with pytest.raises(SourceError, match="cannot be read"):
            run(path, {})
        with pytest.raises(SourceError, match="cannot be read"):
            run(tmp_path / "absent.onnx", {})

    def test_a_file(self, tmp_path: Path) -> None:
        ir.save(self.MODEL, tmp_path / "model.onnx")
        assert run(tmp_path / "model.onnx", {"x": np.ones((2, 3), np.float32)})["y"].tolist() == [[1, 2, 3]] * 2

    def test_index_out_of_range(self) -> None:
        model = parsed("graph (float[3] x, int64[N] i) => (float[N] y) { y = Gather(x, i) }")
        with pytest.raises(EdgekitError, match="operator Gather"):
            run(model, {"x": np.ones(3, np.float32), "i": np.array([3])})
