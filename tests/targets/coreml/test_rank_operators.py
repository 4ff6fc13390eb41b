"""Each kind of operator on tensors of high rank, against ONNX's reference evaluator: bit by bit where nothing is rounded."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgekit.targets.coreml.rank_contractions import read_equation
from edgekit.targets.coreml.rank_rules import RULES
from tests.targets.coreml.ranked import build, check, node, operators, whole

RNG = np.random.default_rng(0)
SOME = settings(max_examples=100, deadline=None, derandomize=True)


# Operators

X = (2, 3, 1, 2, 3, 2)
"""Six axes, one of length 1."""
LONG = (2, 1, 2, 3, 1, 2, 2, 3)

CASES: dict[str, tuple[onnx.NodeProto | list[onnx.NodeProto], dict[str, np.ndarray], dict[str, Any]]] = {
    "unary": (node("Relu", "x"), {"x": whole(*X)}, {}),
    "cast": (node("Cast", "x", to=TensorProto.INT32), {"x": whole(*X)}, {}),
    "cast like": (node("CastLike", "x t"), {"x": whole(*X), "t": np.zeros((1,) * 7, np.int64)}, {}),
    "clip by numbers": (node("Clip", "x _ high"), {"x": whole(*X)}, {"high": np.float32(2)}),
    "one shape": (node("Add", "x z"), {"x": whole(*X), "z": whole(*X)}, {}),
    "a vector": (node("Mul", "x z"), {"x": whole(*X)}, {"z": whole(2)}),
    "a scalar": (node("Div", "x z"), {"x": whole(*X)}, {"z": np.float32(2)}),
    "rank 4 to 7": (node("Sub", "x z"), {"x": whole(3, 1, 2, 2), "z": whole(2, 2, 1, 3, 2, 1, 2)}, {}),
    "outer": (node("Add", "x z"), {"x": whole(2, 3, 2, 1, 1, 1), "z": whole(2, 2, 3)}, {}),
    "both broadcast, torn": (node("Add", "x z"), {"x": whole(2, 1, 2, 1, 3, 1, 2, 1), "z": whole(1, 2, 1, 2, 1, 3, 1, 2)}, {}),
    "constant of high rank": (node("Mul", "x z"), {"x": whole(*X)}, {"z": whole(2, 1, 1, 2, 1, 2)}),
    "where": (node("Where", "c x z"), {"c": RNG.random((2, 1, 1, 2, 1, 2)) > 0.5, "x": whole(*X), "z": whole(3, 1)}, {}),
    "three operands": (node("Max", "x z t"), {"x": whole(*X), "z": whole(2, 1, 1, 1, 1, 1), "t": whole(3, 2)}, {}),
    "comparison": (node("Less", "x z"), {"x": whole(*X), "z": whole(3, 1, 2, 1, 2)}, {}),
    "power": (node("Pow", "x z"), {"x": whole(*X)}, {"z": np.array(2, np.int64)}),
    "prelu": (node("PRelu", "x z"), {"x": whole(*X)}, {"z": whole(3, 1, 1, 1, 1)}),
    "reduce one": (node("ReduceSum", "x axes", keepdims=0), {"x": whole(*X)}, {"axes": np.array([-2])}),
    "reduce neighbours": (node("ReduceMean", "x axes"), {"x": whole(*X)}, {"axes": np.array([3, 4])}),
    "reduce all": (node("ReduceMax", "x", keepdims=0), {"x": whole(*X)}, {}),
    "reduce nothing": (node("ReduceSum", "x", noop_with_empty_axes=1), {"x": whole(*X)}, {}),
    "reduce a 1": (node("ReduceSumSquare", "x axes"), {"x": whole(*X)}, {"axes": np.array([2])}),
    "reduce torn axes": (node("ReduceSum", "x axes"), {"x": whole(*LONG)}, {"axes": np.array([0, 3, 6])}),
    "reduce every second": (node("ReduceMin", "x axes", keepdims=0), {"x": whole(2, 2, 2, 2, 2, 2)}, {"axes": np.array([0, 2, 4])}),
    "argmax": (node("ArgMax", "x", axis=4, keepdims=0), {"x": whole(*X)}, {}),
    "argmin, last": (node("ArgMin", "x", axis=-1, select_last_index=1), {"x": whole(*X)}, {}),
    "hardmax": (node("Hardmax", "x", axis=1), {"x": whole(*X)}, {}),
    "top": (node("TopK", "x k", "y i", axis=4), {"x": RNG.permutation(72).astype(np.float32).reshape(X)}, {"k": np.array([2])}),
    "cumulative": (node("CumSum", "x axis"), {"x": whole(*X)}, {"axis": np.array(-2)}),
    "slice": (node("Slice", "x s e a"), {"x": whole(*X)}, {"s": np.array([1]), "e": np.array([3]), "a": np.array([4])}),
    "slices, torn": (
        node("Slice", "x s e a t"),
        {"x": whole(3, 2, 3, 2, 3, 2, 3)},
        {"s": np.array([1, 0, -1, 0]), "e": np.array([3, 3, -9, 2**60]), "a": np.array([0, 2, 4, -1]), "t": np.array([1, 2, -1, 2])},
    ),
    "flip": (
        node("Slice", "x s e a t"), {"x": whole(*X)},
        {"s": np.array([-1]), "e": np.array([-99]), "a": np.array([1]), "t": np.array([-1])},
    ),
    "slice of nothing": (node("Slice", "x s e"), {"x": whole(*X)}, {"s": np.array([0, 0]), "e": np.array([9, 9])}),
    "pad": (node("Pad", "x p v"), {"x": whole(*X)}, {"p": np.array([0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]), "v": np.float32(7)}),
    "pad every second": (node("Pad", "x p _ a"), {"x": whole(2, 3, 2, 3, 2, 3, 2)}, {"p": np.arange(6) % 3, "a": np.array([1, 3, 5])}),
    "pad by reflection": (
        node("Pad", "x p _ a", mode="reflect"),
        {"x": whole(3, 2, 3, 2, 3, 2, 2)},
        {"p": np.array([1, 1, 1, 1, 0, 2]), "a": np.array([0, 2, -3])},
    ),
    "tile": (node("Tile", "x r"), {"x": whole(*X)}, {"r": np.array([1, 2, 3, 1, 1, 2])}),
    "tile, torn": (node("Tile", "x r"), {"x": whole(2, 2, 2, 2, 2, 2, 2)}, {"r": np.array([2, 1, 2, 1, 2, 1, 2])}),
    "expand": (node("Expand", "x s"), {"x": whole(2, 1, 3, 1)}, {"s": np.array([2, 3, 1, 4, 1, 2])}),
    "expand, torn": (node("Expand", "x s"), {"x": whole(2, 1, 2, 1, 2, 1, 2)}, {"s": np.array([3, 1, 3, 1, 2, 1])}),
    "concat": (node("Concat", "x z c", axis=3), {"x": whole(*X), "z": whole(2, 3, 1, 3, 3, 2)}, {"c": whole(2, 3, 1, 1, 3, 2)}),
    "concat, stacked": (node("Concat", "x z x", axis=0), {"x": whole(1, *X), "z": whole(1, *X)}, {}),
    "split": (node("Split", "x s", "y z", axis=4), {"x": whole(*X)}, {"s": np.array([1, 2])}),
    "split in equal parts": (node("Split", "x", "y z", axis=-1, num_outputs=2), {"x": whole(*X)}, {}),
    "gather an element": (node("Gather", "x i", axis=3), {"x": whole(*X)}, {"i": np.array(1)}),
    "gather a vector": (node("Gather", "x i", axis=-2), {"x": whole(*X)}, {"i": np.array([2, -1, 0, 2])}),
    "gather to rank 7": (node("Gather", "x i", axis=1), {"x": whole(2, 3, 2), "i": RNG.integers(-3, 3, (2, 1, 2, 2, 1))}, {}),
    "gather elements": (node("GatherElements", "x i", axis=1), {"x": whole(*X), "i": RNG.integers(-3, 3, (2, 4, 1, 2, 3, 2))}, {}),
    "gather by tuples": (node("GatherND", "x i"), {"x": whole(*X), "i": RNG.integers(0, 2, (3, 2, 2))}, {}),
    "gather by tuples in batches": (
        node("GatherND", "x i", batch_dims=2), {"x": whole(2, 3, 2, 2, 3, 2), "i": RNG.integers(0, 2, (2, 3, 4, 1, 2))}, {}
    ),
    "scatter elements": (
        node("ScatterElements", "x i u", axis=1), {"x": whole(*X), "u": whole(2, 1, 1, 2, 3, 2)},
        {"i": RNG.integers(0, 3, (2, 1, 1, 2, 3, 2))},
    ),
    "scatter by tuples": (node("ScatterND", "x i u"), {"x": whole(*X), "u": whole(2, 1, 2, 3, 2)}, {"i": np.array([[1, 2], [0, 1]])}),
    "views": (
        [node("Unsqueeze", "x a", "b"), node("Squeeze", "b c", "d"), node("Flatten", "d", "e", axis=2), node("Reshape", "e f")],
        {"x": whole(2, 3, 2, 3, 2, 1)},
        {"a": np.array([0, 3]), "c": np.array([0]), "f": np.array([3, 2, 2, 1, 6, 1])},
    ),
    "shape": (node("Shape", "x", start=1, end=-1), {"x": whole(*X)}, {}),
    "size": (node("Size", "x"), {"x": whole(*X)}, {}),
    "a filled tensor": (
        [node("ConstantOfShape", "s", "f", value=helper.make_tensor("v", TensorProto.FLOAT, [1], [3.0])), node("Add", "x f")],
        {"x": whole(2)},
        {"s": np.array([2, 1, 3, 1, 2, 2])},
    ),
    "a constant": (
        [node("Constant", "", "c", value=numpy_helper.from_array(whole(2, 1, 3, 1, 2, 2))), node("Add", "x c")], {"x": whole(2)}, {}
    ),
    "transposed constant": ([node("Transpose", "c", "t"), node("Add", "x t")], {"x": whole(2)}, {"c": whole(2, 2, 1, 3, 1, 2)}),
    "matmul": (node("MatMul", "x z"), {"x": whole(2, 3, 1, 2, 3, 2), "z": whole(2, 3, 1, 2, 2, 4)}, {}),
    "matmul by a matrix": (node("MatMul", "x z"), {"x": whole(*X)}, {"z": whole(2, 4)}),
    "matmul by a vector": (node("MatMul", "x z"), {"x": whole(*X), "z": whole(2)}, {}),
    "a vector by matrices": (node("MatMul", "z x"), {"x": whole(*X), "z": whole(3)}, {}),
    "matmul, broadcast": (node("MatMul", "x z"), {"x": whole(2, 1, 3, 1, 2, 3), "z": whole(2, 1, 3, 3, 2)}, {}),
    "matmul, torn": (node("MatMul", "x z"), {"x": whole(2, 1, 2, 1, 2, 2, 3), "z": whole(1, 2, 1, 3, 1, 3, 2)}, {}),
    "lower triangle": (node("Trilu", "x k", upper=0), {"x": whole(2, 1, 2, 2, 3, 4)}, {"k": np.array(-1)}),
    "quantize": (node("QuantizeLinear", "x s z"), {"x": whole(*X)}, {"s": np.float32(0.5), "z": np.uint8(3)}),
    "quantize per channel": (
        node("QuantizeLinear", "x s z", axis=4), {"x": whole(*X)},
        {"s": np.array([0.5, 1, 2], np.float32), "z": np.array([1, 2, 3], np.int8)},
    ),
    "quantize in blocks": (
        node("QuantizeLinear", "x s", axis=4, block_size=3), {"x": whole(*X)},
        {"s": np.exp2(RNG.integers(-1, 3, (2, 3, 1, 2, 1, 2))).astype(np.float32)},
    ),
    "dequantize": (
        node("DequantizeLinear", "x s", axis=-2), {"x": RNG.integers(-9, 9, X).astype(np.int8)}, {"s": np.array([0.5, 1, 2], np.float32)}
    ),
}  # fmt: skip

ROUNDED: dict[str, tuple[onnx.NodeProto, dict[str, np.ndarray], dict[str, Any]]] = {
    "softmax": (node("Softmax", "x", axis=3), {"x": whole(*X)}, {}),
    "softmax, last": (node("Softmax", "x"), {"x": whole(*X)}, {}),
    "log softmax": (node("LogSoftmax", "x", axis=1), {"x": whole(*X)}, {}),
    "exponential sum": (node("ReduceLogSumExp", "x axes", keepdims=0), {"x": whole(*X)}, {"axes": np.array([1, 5])}),
    "norm": (node("LpNormalization", "x", axis=1), {"x": whole(*X, low=1)}, {}),
    "layer norm": (node("LayerNormalization", "x s b"), {"x": whole(2, 3, 1, 2, 2, 6)}, {"s": whole(6), "b": whole(6)}),
    "layer norm of two axes": (
        node("LayerNormalization", "x s b", "y m d", axis=-2), {"x": whole(2, 3, 1, 2, 3, 4)}, {"s": whole(3, 4), "b": whole(3, 4)}
    ),
    "layer norm, broadcast scale": (node("LayerNormalization", "x s", axis=-2), {"x": whole(2, 3, 1, 2, 3, 4)}, {"s": whole(3, 1)}),
    "layer norm of ones": (node("LayerNormalization", "x s b", axis=-1), {"x": whole(2, 3, 1, 2, 3, 1)}, {"s": whole(1), "b": whole(1)}),
    "rms norm": (node("RMSNormalization", "x s"), {"x": whole(2, 3, 2, 2, 2, 6)}, {"s": whole(6)}),
    "batch norm": (
        node("BatchNormalization", "x s b m v"), {"x": whole(2, 3, 2, 2, 2, 2)},
        {"s": whole(3), "b": whole(3), "m": whole(3), "v": whole(3, low=1)},
    ),
    "instance norm": (node("InstanceNormalization", "x s b"), {"x": whole(2, 3, 2, 2, 2, 2)}, {"s": whole(3), "b": whole(3)}),
    "group norm": (
        node("GroupNormalization", "x s b", num_groups=2), {"x": whole(2, 4, 2, 2, 2, 2)}, {"s": whole(4), "b": whole(4)}
    ),
    "mean pool": (node("GlobalAveragePool", "x"), {"x": whole(2, 3, 2, 2, 3, 2)}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_operators(name: str) -> None:
    nodes, inputs, constants = CASES[name]
    nodes = [nodes] if isinstance(nodes, onnx.NodeProto) else nodes
    outputs = " ".join(nodes[-1].output)
    graph, count = check(build(nodes, inputs, constants, outputs), inputs)
    assert count >= len(nodes)
    assert len([item for item in graph.graph if item.op_type == nodes[-1].op_type]) <= (9 if nodes[-1].op_type == "Reshape" else 3)


@pytest.mark.parametrize("name", ROUNDED)
def test_operators_that_round(name: str) -> None:
    item, inputs, constants = ROUNDED[name]
    check(build([item], inputs, constants, " ".join(item.output)), inputs, 1e-5)


def test_every_rule_is_tested() -> None:
    tested = {
        item.op_type
        for nodes, *_ in [*CASES.values(), *ROUNDED.values()]
        for item in ([nodes] if isinstance(nodes, onnx.NodeProto) else nodes)
    }
    alike = {name for name, rule in RULES.items() if any(RULES[other] is rule for other in tested)}
    assert set(RULES) - alike == {"Einsum"}  # below


EINSUMS: dict[str, tuple[str, list[tuple[int, ...]]]] = {
    "attention of windows": ("bnwhic,bnwhjc->bnwhij", [(2, 2, 1, 2, 3, 2), (2, 2, 1, 2, 4, 2)]),
    "grid by channels": ("bhgwkc,cd->bhgwkd", [(2, 2, 3, 1, 2, 4), (4, 3)]),
    "torn": ("abcdef,bgdhf->acegh", [(2, 2, 2, 2, 2, 2), (2, 2, 2, 2, 2)]),
    "outer": ("acegik,bdf->abcdefgik", [(2, 1, 2, 2, 1, 2), (2, 2, 1)]),
    "one operand": ("abcdef->fbd", [(2, 3, 2, 2, 2, 2)]),
    "transpose": ("abcdefg->gfedcba", [(2, 1, 2, 3, 2, 2, 2)]),
    "one side is summed": ("abcdef,fgd->gcae", [(2, 3, 2, 2, 2, 2), (2, 2, 2)]),
    "ellipsis": ("...ij,...jk->...ik", [(2, 3, 1, 2, 2, 3), (3, 1, 1, 3, 2)]),
    "ellipsis, result not given": ("...ij,jk", [(2, 3, 1, 2, 2, 3), (3, 2)]),
    "result not given": ("abcdef,fedcbz", [(2, 2, 1, 2, 2, 2), (2, 2, 2, 1, 2, 3)]),
    "three operands": ("abcdef,abc,def->abdef", [(2, 2, 2, 2, 2, 2), (2, 2, 2), (2, 2, 2)]),
    "to a scalar": ("abcdef,abcdef->", [(2, 2, 1, 2, 2, 2), (2, 2, 1, 2, 2, 2)]),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum(name: str) -> None:
    equation, shapes = EINSUMS[name]
    inputs = {f"x{index}": whole(*shape) for index, shape in enumerate(shapes)}
    check(build([node("Einsum", " ".join(inputs), equation=equation)], inputs), inputs)


def test_equations() -> None:
    assert read_equation("b...i, j...->i...", [3, 4]) == (
        [("b", "...2", "i"), ("j", "...0", "...1", "...2")],
        ("i", "...0", "...1", "...2"),
    )
    assert read_equation("ba,cb", [2, 2]) == ([("b", "a"), ("c", "b")], ("a", "c"))


# Random operands


@st.composite
def broadcasts(draw: st.DrawFn) -> list[tuple[int, ...]]:
    """Shapes that broadcast together to 6 to 9 axes; some lack leading axes."""
    shape = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=6, max_size=9))
    shapes = []
    for _ in range(draw(st.integers(2, 3))):
        kept = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        shapes.append(tuple(size if keep else 1 for size, keep in zip(shape, kept, strict=True))[draw(st.integers(0, 4)) :])
    return [*shapes, (1,) * len(shape)]


@SOME
@given(broadcasts())
def test_any_broadcast(shapes: list[tuple[int, ...]]) -> None:
    inputs = {f"x{index}": np.arange(math.prod(shape), dtype=np.float32).reshape(shape) for index, shape in enumerate(shapes)}
    check(build([node("Sum", " ".join(inputs))], inputs), inputs)


@st.composite
def axes_of(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """A shape of 6 to 9 axes and some of them."""
    shape = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=6, max_size=9))
    return shape, sorted(draw(st.sets(st.integers(0, len(shape) - 1), min_size=1)))


@SOME
@given(axes_of(), st.booleans())
def test_any_reduction(case: tuple[list[int], list[int]], keep: bool) -> None:
    shape, axes = case
    inputs = {"x": np.arange(math.prod(shape), dtype=np.float32).reshape(shape) % 17}
    graph, _ = check(build([node("ReduceSum", "x axes", keepdims=int(keep))], inputs, {"axes": np.array(axes)}), inputs)
    assert operators(graph).count("ReduceSum") == 1


@SOME
@given(axes_of())
def test_any_flip_and_pad(case: tuple[list[int], list[int]]) -> None:
    shape, axes = case
    inputs = {"x": np.arange(math.prod(shape), dtype=np.float32).reshape(shape)}
    nodes = [node("Slice", "x s e a t", "f"), node("Pad", "f p _ a", mode="edge")]
    ends = {"s": np.full(len(axes), -1), "e": np.full(len(axes), -99), "t": np.full(len(axes), -1)}
    model = build(nodes, inputs, {**ends, "a": np.array(axes), "p": np.arange(2 * len(axes)) % 3})
    check(model, inputs)


@st.composite
def products(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    first, second = draw(broadcasts())[:2]
    m, k, n = draw(st.tuples(*[st.integers(1, 3)] * 3))
    return (*first, m, k), (*second, k, n)


@SOME
@given(products())
def test_any_matmul(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    inputs = {f"x{index}": np.arange(math.prod(shape), dtype=np.float32).reshape(shape) % 7 for index, shape in enumerate(shapes)}
    graph, _ = check(build([node("MatMul", "x0 x1")], inputs), inputs)
    assert operators(graph).count("MatMul") == 1
