"""Chains of reshapes and transposes are merged, and the elements stay where they belong."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgekit.graph.fusions.layout import merge_layout
from edgekit.graph.fusions.layout_state import Step, follow, shortest


def _beside(name: str):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


support, exporting = _beside("fusion_support"), _beside("attention_support")


def chain(source: tuple[int, ...], *steps: tuple[str, tuple[int, ...]], tail: str = "") -> ir.Model:
    """A graph x ─ steps ─ Relu ─► y of ("reshape", shape), ("transpose", perm), ("squeeze" or "unsqueeze", axes)."""
    lines, arrays, name = [], {}, "x"
    for index, (kind, values) in enumerate(steps):
        if kind == "transpose":
            lines.append(f"v{index} = Transpose<perm = {list(values)}>({name})")
        else:
            arrays[f"c{index}"] = np.array(values, np.int64)
            lines.append(f"v{index} = {kind.capitalize()}({name}, c{index})")
        name = f"v{index}"
    outputs = "float y" + (", float z" if "z =" in tail else "")
    return support.graph(
        f"(float[{', '.join(map(str, source))}] x) => ({outputs}) {{ {' '.join(lines)} y = Relu({name}) {tail} }}", **arrays
    )


R, T, S, U = "reshape", "transpose", "squeeze", "unsqueeze"
WINDOWS = ((R, (1, 2, 2, 2, 3, 3)), (T, (0, 1, 3, 2, 4, 5)), (R, (4, 6, 3)))
CHAINS = {
    "reshapes": (chain((2, 3, 4), (R, (6, 4)), (R, (2, 12))), {"Reshape": 1}),
    "a reshape to the same shape": (chain((2, 3, 4), (R, (2, 3, 4))), {}),
    "there and back": (chain((2, 3, 4), (R, (6, 4)), (R, (0, -1)), (R, (2, 3, 4))), {}),
    "transposes": (chain((2, 3, 4), (T, (1, 2, 0)), (T, (1, 0, 2))), {"Transpose": 1}),
    "inverse transposes": (chain((2, 3, 4), (T, (1, 2, 0)), (T, (2, 0, 1))), {}),
    "an identity": (chain((2, 3, 4), (T, (0, 1, 2))), {}),
    "channels last and flat": (chain((2, 3, 4, 5), (T, (0, 2, 3, 1)), (R, (2, 20, 3)), (T, (0, 2, 1))), {"Reshape": 1}),
    "tokens to channels last": (chain((2, 3, 4, 5), (R, (2, 3, 20)), (T, (0, 2, 1)), (R, (2, 4, 5, 3))), {"Transpose": 1}),
    "a split that is not used": (chain((2, 20, 3), (R, (2, 4, 5, 3)), (T, (0, 3, 1, 2)), (R, (2, 3, 20))), {"Transpose": 1}),
    "axes of length one": (chain((2, 3, 4), (U, (0,)), (T, (0, 1, 3, 2)), (S, (0,))), {"Transpose": 1}),
    "a move of length one": (chain((2, 1, 4), (T, (1, 0, 2)), (R, (2, 4))), {"Reshape": 1}),
    "squeeze": (chain((2, 1, 4), (S, (1,))), {"Reshape": 1}),
    "unsqueezes": (chain((2, 4), (U, (0,)), (U, (3,))), {"Reshape": 1}),
    "heads": (chain((2, 5, 12), (R, (2, 5, 3, 4)), (T, (0, 2, 1, 3))), {"Reshape": 1, "Transpose": 1}),
    "heads merged": (chain((2, 3, 5, 4), (T, (0, 2, 1, 3)), (R, (2, 5, 12))), {"Reshape": 1, "Transpose": 1}),
    "windows": (chain((1, 4, 6, 3), *WINDOWS), {"Reshape": 2, "Transpose": 1}),
    "windows there and back": (chain((1, 4, 6, 3), *WINDOWS, (R, (1, 2, 2, 2, 3, 3)), (T, (0, 1, 3, 2, 4, 5)), (R, (1, 4, 6, 3))), {}),
}  # fmt: skip
STAYING = ("heads", "heads merged", "windows")


@pytest.mark.parametrize("name", CHAINS)
def test_chains(name):
    model, expected = CHAINS[name]
    if name in STAYING:
        support.unchanged(merge_layout, model)
        assert support.operators(model) == {**expected, "Relu": 1}
    else:
        support.check(merge_layout, model, {**expected, "Relu": 1}, tolerance=0)


def test_flatten_becomes_a_reshape():
    model = support.graph("(float[2, 3, 4] x) => (float[2, 12] y) { f = Flatten(x) y = Relu(f) }")
    support.check(merge_layout, model, {"Reshape": 1, "Relu": 1}, 1, tolerance=0)


def test_idle_operators_go():
    body = "a = Cast<to = 1>(x) b = Expand(a, shape) c = CastLike(b, x) y = Relu(c)"
    model = support.graph(f"(float[2, 3] x) => (float[2, 3] y) {{ {body} }}", shape=np.array([2, 1]))
    support.check(merge_layout, model, {"Relu": 1}, tolerance=0)
    busy = support.graph("(float[2, 1] x) => (float[2, 3] y) { b = Expand(x, shape) y = Relu(b) }", shape=np.array([2, 3]))
    support.unchanged(merge_layout, busy)


def test_views_of_integers_stay():
    model = support.graph("(int64[2, 1] x) => (int64[2] y) { s = Squeeze(x, axis) y = Neg(s) }", axis=np.array([1]))
    support.unchanged(merge_layout, model)


def test_unknown_shapes_stay():
    model = support.graph("(float[N, 3, 4] x) => (float y) { a = Reshape(x, k) b = Reshape(a, l) y = Relu(b) }",
                          k=np.array([-1, 4]), l=np.array([-1, 12]))  # fmt: skip
    support.unchanged(merge_layout, model)


def test_a_value_that_is_read_elsewhere_is_not_computed_twice():
    model = chain((2, 3, 4), (R, (2, 12)), (T, (1, 0)), (R, (4, 6)), tail="z = Neg(v1)")
    support.unchanged(merge_layout, model)


def test_the_inverse_of_a_transpose_that_is_read_elsewhere_goes():
    model = chain((2, 3, 4), (T, (0, 2, 1)), (T, (0, 2, 1)), tail="z = Neg(v0)")
    support.check(merge_layout, model, {"Transpose": 1, "Relu": 1, "Neg": 1}, 1, tolerance=0)


def test_graph_inputs_and_outputs_keep_their_names():
    model = support.graph("(float[2, 3] x) => (float[2, 3] y) { y = Reshape(x, s) }", s=np.array([2, 3]))
    support.unchanged(merge_layout, model)  # without a node between them, one of the names would be lost
    model = support.graph("(float[2, 3] x) => (float[2, 3] y) { r = Relu(x) t = Transpose(r) y = Transpose(t) }")
    support.check(merge_layout, model, {"Relu": 1}, tolerance=0)
    body = "r = Relu(x) t = Transpose(r) y = Transpose(t)"
    support.unchanged(merge_layout, support.graph(f"(float[2, 3] x) => (float[2, 3] y, float[2, 3] r) {{ {body} }}"))


def test_depth_to_space():
    n, c, h, w, r = 2, 3, 4, 5, 2
    image, small = (n, c, h * r, w * r), (n, c * r * r, h, w)
    for middle, perm, mode in (((n, c, r, r, h, w), (0, 1, 4, 2, 5, 3), "CRD"), ((n, r, r, c, h, w), (0, 3, 4, 1, 5, 2), "DCR")):
        model = support.check(
            merge_layout, chain(small, (R, middle), (T, perm), (R, image)), {"DepthToSpace": 1, "Relu": 1}, 1, tolerance=0
        )
        node = support.one(model, "DepthToSpace")
        assert (node.attributes["mode"].value, node.attributes["blocksize"].value) == (mode, r)
    flat = (n * c, r, r, h, w)  # the batch and the channels as one axis
    model = chain(small, (R, flat), (T, (0, 3, 1, 4, 2)), (R, image))
    support.check(merge_layout, model, {"DepthToSpace": 1, "Relu": 1}, 1, tolerance=0)


def test_space_to_depth_and_pixel_unshuffle():
    n, c, h, w, r = 2, 3, 4, 5, 2
    image, small, split = (n, c, h * r, w * r), (n, c * r * r, h, w), (n, c, h, r, w, r)
    model = chain(image, (R, split), (T, (0, 3, 5, 1, 2, 4)), (R, small))
    support.check(merge_layout, model, {"SpaceToDepth": 1, "Relu": 1}, 1, tolerance=0)
    model = chain(image, (R, split), (T, (0, 1, 3, 5, 2, 4)), (R, small))
    support.check(merge_layout, model, {"SpaceToDepth": 1, "Gather": 1, "Relu": 1}, 1, tolerance=0)
    one = chain((n, 1, h * r, w * r), (R, (n, 1, h, r, w, r)), (T, (0, 1, 3, 5, 2, 4)), (R, (n, r * r, h, w)))
    support.check(merge_layout, one, {"SpaceToDepth": 1, "Relu": 1}, 1, tolerance=0)


def test_other_permutations_of_blocks_stay():
    n, c, h, w, r = 2, 3, 4, 6, 2
    image, small = (n, c, h * r, w * r), (n, c * r * r, h, w)
    for perm in ((0, 1, 4, 3, 5, 2), (0, 2, 4, 1, 5, 3)):
        middle = (n, c, r, r, h, w)
        shape = tuple(middle[axis] for axis in perm)
        assert math.prod(shape[1:2]) in (c, r)
        support.unchanged(merge_layout, chain(small, (R, middle), (T, perm), (R, image)))
    support.unchanged(merge_layout, chain(image, (R, (n, c, h, r, w, r)), (T, (0, 1, 5, 3, 2, 4)), (R, small)))


@st.composite
def chains(draw):
    """A shape and a chain of reshapes and transposes of it."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4, 6]), min_size=1, max_size=5))
    shape = source = tuple(factors)
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        if draw(st.booleans()):
            perm = tuple(draw(st.permutations(range(len(shape)))))
            shape = tuple(shape[axis] for axis in perm)
            steps.append((T, perm))
        else:
            left, dims = math.prod(shape), []
            while left > 1 and len(dims) < 5:
                dim = draw(st.sampled_from([size for size in range(1, left + 1) if left % size == 0]))
                dims.append(dim)
                left //= dim
            shape = (*dims, left) if left > 1 or not dims else tuple(dims)
            steps.append((R, shape))
    return source, steps


def apply(array: np.ndarray, steps) -> np.ndarray:
    for step in steps:
        array = array.reshape(step.shape) if step.perm is None else array.transpose(step.perm)
        assert array.shape == step.shape
    return array


@settings(max_examples=300, deadline=None, derandomize=True)
@given(case=chains())
def test_the_shortest_chain_moves_elements_alike(case):
    source, raw = case
    array = np.arange(math.prod(source)).reshape(source)
    expected, steps = array, []
    for kind, values in raw:
        expected = expected.transpose(values) if kind == T else expected.reshape(values)
        steps.append(Step(expected.shape, values if kind == T else None))
    layout = follow(source, steps)
    if layout is None:  # some reshape cuts through a factor, such as 4 and 6 of 24
        return
    short = shortest(layout)
    np.testing.assert_array_equal(apply(array, short), expected)
    assert len(short) <= 3
    again = follow(source, short)
    assert again is not None
    assert again.key == layout.key
    assert len(shortest(again)) == len(short)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=chains(), read=st.integers(0, 5), given_out=st.booleans())
def test_random_chains_stay_equal(case, read, given_out):
    source, steps = case
    tail = f"z = Neg(v{read})" if read < len(steps) - 1 and given_out else ""
    model = chain(source, *steps, tail=tail)
    feeds = support.feeds_of(model)
    before, nodes = support.run(model, feeds), len(model.graph)
    merge_layout(model)
    for old, new in zip(before, support.run(model, feeds), strict=True):
        np.testing.assert_array_equal(old, new)
    assert len(model.graph) <= nodes
    support.unchanged(merge_layout, model)


class Shuffle(nn.Module):
    """Pixel shuffle as einops and older exporters write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 4, 2 * h, 2 * w)


class TokensAndBack(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        return torch.relu(tokens.transpose(1, 2).reshape(x.shape))


MODULES = {
    "pixel shuffle": (nn.PixelShuffle(2), (2, 8, 3, 3), {"DepthToSpace": 1}),
    "shuffle by hand": (Shuffle(), (2, 8, 3, 3), {"DepthToSpace": 1}),
    "pixel unshuffle": (nn.PixelUnshuffle(2), (2, 3, 4, 4), {"SpaceToDepth": 1, "Gather": 1}),
    "pixel unshuffle of one channel": (nn.PixelUnshuffle(2), (2, 1, 4, 4), {"SpaceToDepth": 1}),
    "tokens and back": (TokensAndBack(), (2, 3, 4, 4), {"Relu": 1}),
}


@pytest.mark.parametrize(("exporter", "opset"), support.EXPORTS)
def test_exported_modules(exporter, opset):
    for name, (module, shape, expected) in MODULES.items():
        x = torch.from_numpy(support.random(*shape, seed=5))
        model = exporting.export(module, (x,), exporter, opset)
        merge_layout(model)
        assert support.operators(model) == expected, name
        (actual,) = support.run(model, {model.graph.inputs[0].name: x.numpy()})
        np.testing.assert_array_equal(actual, module(x).numpy(), err_msg=name)
        support.unchanged(merge_layout, model)
