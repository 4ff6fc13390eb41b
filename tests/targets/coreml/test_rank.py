"""Rewrites to rank 5 hold the same numbers, with few transposes: rearrangements, whole regions, refusals and real networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import UnsupportedOpError
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.parameters import PARAMETER
from edgekit.graph.shapes import infer_shapes
from edgekit.targets.coreml.rank import lower_ranks
from edgekit.targets.coreml.rank_groups import align, group_axes, transposes
from tests.targets.coreml.ranked import build, check, evaluate, lowered, node, operators, whole

RNG = np.random.default_rng(0)
MANY = settings(max_examples=300, deadline=None, derandomize=True)


# Rearrangements


def rearrange(shape: Sequence[int], split: Sequence[int], perm: Sequence[int], result: Sequence[int]) -> tuple[onnx.ModelProto, np.ndarray]:
    array = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    nodes = [node("Reshape", "x split", "a"), node("Transpose", "a", "b", perm=list(perm)), node("Reshape", "b result")]
    return build(nodes, {"x": array}, {"split": np.array(split), "result": np.array(result)}), array


@st.composite
def rearrangements(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int]]:
    """A shape, the axes that it is split into, their permutation, and the shape of the result."""
    split = draw(st.lists(st.sampled_from([1, 2, 2, 3]), min_size=6, max_size=8))
    perm = draw(st.permutations(range(len(split))))

    def joined(sizes: list[int]) -> list[int]:
        cuts = sorted(draw(st.sets(st.integers(1, len(sizes) - 1), max_size=4)))
        return [math.prod(sizes[first:last]) for first, last in itertools.pairwise([0, *cuts, len(sizes)])]

    return joined(split), split, perm, joined([split[axis] for axis in perm])


@MANY
@given(rearrangements())
def test_any_rearrangement(case: tuple[list[int], list[int], list[int], list[int]]) -> None:
    shape, split, perm, result = case
    model, array = rearrange(shape, split, perm, result)
    proto, graph, _ = lowered(model)
    np.testing.assert_array_equal(evaluate(proto, {"x": array})[0], array.reshape(split).transpose(perm).reshape(result))
    assert operators(graph).count("Transpose") <= 2
    assert operators(graph).count("Reshape") <= 3


@pytest.mark.parametrize(("rank", "most"), [(5, 1), (6, 2), (8, 2), (9, 3), (12, 4)])
def test_number_of_transposes(rank: int, most: int) -> None:
    for _ in range(20 if rank < 12 else 3):
        shape, perm = tuple(RNG.integers(1, 4, rank).tolist()), RNG.permutation(rank).tolist()
        array = np.arange(math.prod(shape))
        steps = transposes(shape, perm)
        result = array
        for sizes, order in steps:
            assert len(sizes) <= 5
            result = result.reshape(sizes).transpose(order)
        np.testing.assert_array_equal(result.reshape(-1), array.reshape(shape).transpose(perm).reshape(-1))
        assert len(steps) <= most


B, H, W, C, G, R = 2, 6, 9, 4, 3, 3
REARRANGEMENTS: dict[str, tuple[list[int], list[int], list[int], list[int]]] = {
    "Swin: windows": ([B, H, W, C], [B, H // G, G, W // G, G, C], [0, 1, 3, 2, 4, 5], [B * H * W // G**2, G * G, C]),
    "Swin: back": ([B * H * W // G**2, G, G, C], [B, H // G, W // G, G, G, C], [0, 1, 3, 2, 4, 5], [B, H, W, C]),
    "CrossFormer: short distance": ([B, H * W, C], [B, H // G, G, W // G, G, C], [0, 1, 3, 2, 4, 5], [B, H * W // G**2, G * G, C]),
    "CrossFormer: long distance": ([1, H * W, C], [1, G, H // G, G, W // G, C], [0, 2, 4, 1, 3, 5], [H * W // G**2, G * G, C]),
    "CrossFormer: 8 axes": ([1, H, W, C], [1, 1, H // G, G, 1, W // G, G, C], [0, 1, 4, 2, 5, 3, 6, 7], [H * W // G**2, G * G, C]),
    "pixel shuffle": ([B, C * R * R, H, W], [B, C, R, R, H, W], [0, 1, 4, 2, 5, 3], [B, C, H * R, W * R]),
    "pixel unshuffle": ([B, C, H, W], [B, C, H // R, R, W // R, R], [0, 1, 3, 5, 2, 4], [B, C * R * R, H // R, W // R]),
    "qkv of windows": ([B, 3, 5, 24], [B, 3, 5, 3, 2, 4], [3, 0, 1, 4, 2, 5], [3, B * 3, 2, 5, 4]),
    "MaxViT: grid": ([B, H, W, C], [B, G, H // G, G, W // G, C], [0, 2, 4, 1, 3, 5], [B * H * W // G**2, G, G, C]),
}
TORN = {"MaxViT: grid": 2}
"""Where 6 groups change places. Elsewhere one transpose is enough."""


@pytest.mark.parametrize("name", REARRANGEMENTS)
def test_known_rearrangements(name: str) -> None:
    model, array = rearrange(*REARRANGEMENTS[name])
    graph, count = check(model, {"x": array})
    assert count == 3
    steps = TORN.get(name, 1)
    assert operators(graph).count("Transpose") == steps
    assert operators(graph).count("Reshape") <= 1 + steps


def test_a_transpose_of_ones_is_none() -> None:
    model, array = rearrange([1, 4, 5], [1, 1, 4, 1, 1, 5], [4, 2, 0, 1, 5, 3], [4, 5])
    graph, _ = check(model, {"x": array})
    assert operators(graph) == ["Reshape"]


# What is left of a region


def test_a_region_has_no_reshape_that_the_original_does_not_need() -> None:
    """Window attention: operators between two rearrangements read what holds the value as it is."""
    nodes = [
        node("Reshape", "x split", "a"),
        node("Transpose", "a", "b", perm=[0, 1, 3, 2, 4, 5]),
        node("Relu", "b", "c"),
        node("Mul", "c scale", "d"),
        node("Transpose", "d", "e", perm=[0, 1, 3, 2, 4, 5]),
        node("Reshape", "e joined"),
    ]
    inputs = {"x": whole(2, 6, 9, 4)}
    constants = {"split": np.array([2, 2, 3, 3, 3, 4]), "scale": np.float32(3), "joined": np.array([2, 6, 9, 4])}
    graph, count = check(build(nodes, inputs, constants), inputs)
    assert count == 6
    assert operators(graph) == ["Reshape", "Transpose", "Relu", "Mul", "Transpose", "Reshape"]


def test_qkv_in_six_axes() -> None:
    """Heads of windows, taken apart by Gather: one transpose, and no operator more than there was."""
    nodes = [node("Reshape", "x split", "a"), node("Transpose", "a", "b", perm=[3, 0, 1, 4, 2, 5])]
    nodes += [node("Gather", f"b i{index}", f"y{index}", axis=0) for index in range(3)]
    inputs = {"x": whole(2, 3, 5, 24)}
    constants = {"split": np.array([2, 3, 5, 3, 2, 4]), **{f"i{index}": np.array(index) for index in range(3)}}
    graph, _ = check(build(nodes, inputs, constants, "y0 y1 y2"), inputs)
    assert operators(graph).count("Transpose") == 1
    assert operators(graph).count("Gather") == 3


def test_low_values_between_and_two_readers() -> None:
    """A value that is read in two shapes, is a graph output in a third, and leaves high rank in between."""
    nodes = [
        node("Reshape", "x split", "a"),
        node("Reshape", "a flat", "y"),
        node("Reshape", "y split", "b"),
        node("ReduceSum", "b axes", "s", keepdims=0),
        node("Add", "s one", "z"),
        node("Squeeze", "a none", "u"),
        node("Reshape", "a flat", "w"),
    ]
    inputs = {"x": whole(2, 3, 8)}
    constants = {
        "split": np.array([2, 1, 3, 2, 2, 2]),
        "flat": np.array([6, 8]),
        "axes": np.array([5]),
        "one": np.float32(1),
        "none": np.array([1]),
    }
    graph, _ = check(build(nodes, inputs, constants, "y z u w"), inputs)
    assert [value.name for value in graph.graph.outputs] == ["y", "z", "u", "w"]


def test_metadata_names_and_marks_are_kept() -> None:
    nodes = [
        node("Mul", "x scale", "scaled"),
        node("Transpose", "scaled", "turned", perm=[5, 0, 1, 2, 3, 4]),
        node("Reshape", "turned flat", "y"),
    ]
    for item, name in zip(nodes, ("mul", "turn", "flatten"), strict=True):
        item.name = name
        item.metadata_props.add(key=MODULE_KEY, value=f"block.{name}")
    inputs = {"x": whole(2, 1, 3, 2)}
    model = build(nodes, inputs, {"scale": whole(2, 3, 2, 1, 1, 1), "flat": np.array([2, -1])})
    graph = ir.from_proto(model)
    graph.graph.initializers["scale"].metadata_props[PARAMETER] = "1"
    infer_shapes(graph)
    lower_ranks(graph)
    made = {item.name: item for item in graph.graph}
    assert {"mul", "turn"} <= set(made)
    assert made["mul"].outputs[0].name == "scaled"
    assert made["turn"].outputs[0].name == "turned"
    assert {item.metadata_props[MODULE_KEY] for item in graph.graph} <= {"block.mul", "block.turn", "block.flatten"}
    assert made["mul"].metadata_props[MODULE_KEY] == "block.mul"
    scale = made["mul"].inputs[1]
    assert scale is graph.graph.initializers["scale"]
    assert PARAMETER in scale.metadata_props


def test_a_graph_of_low_rank_is_left_alone() -> None:
    model = build([node("Relu", "x")], {"x": whole(2, 3)})
    graph = ir.from_proto(model)
    before = ir.to_proto(graph).SerializeToString()
    assert lower_ranks(graph) == 0
    assert ir.to_proto(graph).SerializeToString() == before


def test_groups() -> None:
    grouping = group_axes([(2, 3, 1, 4, 5), align((4, 1), 5)], ["free"] * 5)
    assert grouping.groups == ((0, 1), (3,), (4,))
    assert grouping.shape((2, 3, 1, 4, 5)) == (6, 4, 5)
    assert group_axes([(1,) * 6], ["free"] * 6).shape((1,) * 6) == (1,)
    alone = group_axes([(2, 3, 4, 5)], ["free", "free", 2, "free"])
    finer = alone.refined((2, 3, 4, 5), (2, 3, 4, 5))
    assert finer is not None
    assert finer.place(2) == 2
    assert alone.refined((2, 3, 4, 5), (6, 20)) is None


# Refusals


def refused(nodes: list[onnx.NodeProto], inputs: dict[str, np.ndarray], constants: dict[str, Any] | None = None) -> str:
    graph = ir.from_proto(build(nodes, inputs, constants))
    infer_shapes(graph)
    with pytest.raises(UnsupportedOpError) as caught:
        lower_ranks(graph)
    assert caught.value.where
    assert caught.value.fix
    return str(caught.value)


@pytest.mark.parametrize("side", ["input", "output"])
def test_the_interface_has_five_axes(side: str) -> None:
    high, low = "float[1,2,1,2,1,2] {}", "float[8] {}"
    ends = (high.format("x"), low.format("y")) if side == "input" else (low.format("x"), high.format("y"))
    target = "{8}" if side == "input" else "{1,2,1,2,1,2}"
    size = 1 if side == "input" else 6
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23]> g ({ends[0]}) => ({ends[1]}) <int64[{size}] s = {target}> {{ y = Reshape(x, s) }}'
    )
    with pytest.raises(UnsupportedOpError, match=f"{side} '[xy]' has rank 6") as caught:
        lower_ranks(ir.from_proto(model))
    assert "reshape it inside the model" in str(caught.value)


REFUSALS: dict[str, tuple[onnx.NodeProto, dict[str, np.ndarray], dict[str, Any], str]] = {
    "convolution": (node("Conv", "x w"), {"x": whole(1, 2, 3, 3, 3, 3)}, {"w": whole(2, 2, 1, 1, 1, 1)}, "3 spatial axes"),
    "no rule": (node("Det", "x"), {"x": whole(2, 2, 2, 2, 2, 2)}, {}, "reshape its operands to 5 axes"),
    "diagonal": (node("Einsum", "x", equation="aabcde->abcde"), {"x": whole(2, 2, 2, 2, 2, 2)}, {}, "diagonal"),
    "three torn operands": (
        node("Einsum", "x z t", equation="abcdef,fbz,dza->ce"),
        {"x": whole(2, 2, 2, 2, 2, 2), "z": whole(2, 2, 2), "t": whole(2, 2, 2)}, {}, "two operands at a time",
    ),
    "tuples of 6": (node("GatherND", "x i"), {"x": whole(2, 2, 2, 2, 2, 2)}, {"i": np.zeros((3, 6), np.int64)}, "tuples of 6"),
    "computed axes": (node("ReduceSum", "x a"), {"x": whole(2, 2, 2, 2, 2, 2), "a": np.array([1])}, {}, "computed 'axes'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_name_node_operator_rank_and_a_way(name: str) -> None:
    item, inputs, constants, reason = REFUSALS[name]
    item.name = "here"
    text = refused([item], inputs, constants)
    assert reason in text
    assert f"'{item.op_type}' on rank 6" in text
    assert "node 'here'" in text


def test_subgraphs_are_refused() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 10, opset_import: ["": 23]> g (bool c, float[8] x) => (float[8] y) <int64[6] s = {1,2,1,2,1,2}, int64[1] f = {8}> {
        y = If(c) <
            then_branch = t () => (float[8] p) { a = Reshape(x, s) b = Relu(a) p = Reshape(b, f) },
            else_branch = e () => (float[8] q) { q = Identity(x) }
        > }"""
    )
    graph = ir.from_proto(model)
    infer_shapes(graph)
    with pytest.raises(UnsupportedOpError, match="subgraph"):
        lower_ranks(graph)


# Real networks


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), [("swin_tiny_patch4_window7_224", 224)])
def test_networks_of_timm(name: str, size: int) -> None:
    import onnxruntime as ort

    from edgekit.inputs import parse_inputs
    from edgekit.stages import canonical_graph, open_graph
    from tests.timm_support import create_timm

    create_timm(name)  # makes timm importable
    graph = canonical_graph(open_graph(f"timm:{name}", parse_inputs([f"x:1,3,{size},{size}"])).graph)
    inputs = {graph.graph.inputs[0].name: np.random.default_rng(0).normal(0, 1, (1, 3, size, size)).astype(np.float32)}
    results, kinds = [], []
    for lower in (False, True):
        if lower:
            assert lower_ranks(graph) > 0
            assert all(len(output.shape or ()) <= 5 for item in graph.graph for output in item.outputs)
        session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
        results.append(session.run(None, inputs))
        kinds.append(operators(graph))
    assert sorted(kinds[1]) == sorted(kinds[0])  # in a batch of one, no operator is added
    for before, after in zip(*results, strict=True):
        np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
