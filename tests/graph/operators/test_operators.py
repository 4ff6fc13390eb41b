"""What holds of every operator of the domain `edgekit`, and the values of each against NumPy."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes import common

from edgekit.errors import UsageError
from edgekit.graph.canonicalize import OWN_DOMAIN, canonicalize
from edgekit.graph.constants import GraphEditor
from edgekit.graph.operators import DOMAIN, FAST, OPERATORS, add_function, insert
from edgekit.graph.operators.pack_bits import pack
from edgekit.graph.shapes import infer_shapes

SPECIAL = (0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45)
"""Values at which signs are easily taken wrongly."""


def rows(rng: np.random.Generator, dtype=np.float32) -> tuple[np.ndarray, ...]:
    """One tensor of rank 1 to 4 that contains the special values; its last axis is often no multiple of 8."""
    shape = (*rng.integers(1, 4, rng.integers(0, 4)), rng.integers(1, 35))
    x = rng.normal(0, 1, shape).astype(dtype)
    x.reshape(-1)[rng.permutation(x.size)[: len(SPECIAL)]] = SPECIAL[: x.size]
    return (x,)


def tokens(rng: np.random.Generator, dtype=np.float32) -> tuple[np.ndarray, ...]:
    batch, count, channels, kept = (int(size) for size in rng.integers(1, 7, 4))
    return rng.normal(0, 1, (batch, count, channels)).astype(dtype), rng.integers(-count, count, (batch, kept))


def gather(tokens: np.ndarray, indices: np.ndarray) -> np.ndarray:
    return np.stack([sample[chosen] for sample, chosen in zip(tokens, indices, strict=True)])


# name: (inputs from a generator, the result by NumPy)
CASES = {
    "GatherTokens": (tokens, gather),
    "PackBits": (rows, lambda x: np.packbits(x < 0, axis=-1, bitorder="little")),
    "Sign": (rows, lambda x: np.where(x < 0, -1, 1).astype(x.dtype)),
}


def model_of(name: str, arrays: tuple[np.ndarray, ...], *, opset: int = 23, static: bool = True) -> ir.Model:
    """A graph of one node of the operator, whose inputs are x0, x1, …; not static: with dimensions of unknown size."""
    inputs = []
    for index, array in enumerate(arrays):
        shape = array.shape if static else [f"d{index}_{axis}" for axis in range(array.ndim)]
        inputs.append(ir.Value(name=f"x{index}", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)), shape=ir.Shape(shape)))
    model = ir.Model(ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name="graph"), ir_version=11)
    node = insert(model, name, inputs)
    model.graph.outputs.extend(node.outputs)
    return model


def run(model: ir.Model | str, arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    source = model if isinstance(model, str) else ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {f"x{index}": array for index, array in enumerate(arrays)})
    return result


def test_every_operator_has_a_case():
    assert set(CASES) == set(OPERATORS)
    assert all(name == operator.name for name, operator in OPERATORS.items())
    assert set(FAST) == {name for name, operator in OPERATORS.items() if operator.evaluate}
    assert DOMAIN == OWN_DOMAIN, "canonicalization would inline the functions"


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("seed", range(6))
def test_function_shape_rule_and_evaluate_agree(name, seed, tmp_path):
    make, reference = CASES[name]
    arrays = make(np.random.default_rng(seed))
    expected = reference(*arrays)
    model = model_of(name, arrays)
    output = model.graph.outputs[0]

    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    path = tmp_path / "model.onnx"
    ir.save(model, path)
    loaded = ir.load(path)
    inlined = ir.load(path)
    common.InlinePass()(inlined)
    canonical = canonicalize(ir.load(path))
    simplified = ir.load(path)
    common.InlinePass()(simplified)
    canonicalize(simplified)

    assert [node.domain for node in canonical.graph] == [DOMAIN]
    assert not inlined.functions
    assert all(node.domain == "" for node in inlined.graph)
    ways = {"function": model, "file": str(path), "loaded": loaded, "inlined": inlined, "canonical": canonical, "simplified": simplified}
    for way, item in ways.items():
        result = run(item, arrays)
        assert result.dtype == expected.dtype, way
        np.testing.assert_array_equal(result, expected, err_msg=way)

    assert tuple(output.shape) == expected.shape
    assert output.dtype == ir.DataType.from_numpy(expected.dtype)
    (evaluated,) = OPERATORS[name].evaluate([torch.from_numpy(array) for array in arrays], {})
    assert evaluated.numpy().dtype == expected.dtype
    np.testing.assert_array_equal(evaluated.numpy(), expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_body_needs_no_static_shapes(name):
    make, reference = CASES[name]
    for seed in range(3):
        arrays = make(np.random.default_rng(seed))
        model = model_of(name, arrays, static=False)
        assert model.graph.outputs[0].shape is None
        np.testing.assert_array_equal(run(model, arrays), reference(*arrays))


@pytest.mark.parametrize("name", OPERATORS)
def test_shape_rule_agrees_with_inference_through_the_inlined_body(name):
    arrays = CASES[name][0](np.random.default_rng(1))
    model = model_of(name, arrays)
    expected = tuple(model.graph.outputs[0].shape)
    common.InlinePass()(model)
    model.graph.outputs[0].shape = None
    canonicalize(model)
    infer_shapes(model)
    assert tuple(model.graph.outputs[0].shape) == expected


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types(name, dtype):
    make, reference = CASES[name]
    arrays = make(np.random.default_rng(2), dtype)
    expected = reference(*arrays)
    (evaluated,) = OPERATORS[name].evaluate([torch.from_numpy(array) for array in arrays], {})
    np.testing.assert_array_equal(evaluated.numpy(), expected)
    result = run(model_of(name, arrays), arrays)
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("name", OPERATORS)
def test_body_takes_the_opset_of_a_newer_model(name):
    make, reference = CASES[name]
    arrays = make(np.random.default_rng(3))
    model = model_of(name, arrays, opset=24)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    common.InlinePass()(model)
    np.testing.assert_array_equal(run(model, arrays), reference(*arrays))


@pytest.mark.parametrize("name", ["PackBits", "Sign"])
def test_empty_axes(name):
    for shape in [(3, 0), (0, 5)]:
        x = np.zeros(shape, np.float32)
        (evaluated,) = OPERATORS[name].evaluate([torch.from_numpy(x)], {})
        expected = CASES[name][1](x)
        assert evaluated.shape == expected.shape == run(model_of(name, (x,)), (x,)).shape


def test_sign_has_a_straight_through_gradient():
    x = torch.tensor([-2.0, -1.0, -0.3, -0.0, 0.0, 1e-30, 0.7, 1.0, 1.5, torch.nan, torch.inf], requires_grad=True)
    (y,) = OPERATORS["Sign"].evaluate([x], {})
    y.backward(torch.arange(1.0, 12.0))
    assert y.tolist() == [-1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1]
    assert x.grad.tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0]


def test_gathered_tokens_pass_gradients_back():
    tokens = torch.zeros(2, 3, 2, requires_grad=True)
    (picked,) = OPERATORS["GatherTokens"].evaluate([tokens, torch.tensor([[2, 2], [0, -1]])], {})
    picked.sum().backward()
    assert tokens.grad[..., 0].tolist() == [[0, 0, 2], [1, 0, 1]]


@pytest.mark.parametrize("word", [np.uint8, np.uint16, np.uint32, np.uint64])
def test_wider_words_hold_the_same_bits_and_multiply(word):
    rng = np.random.default_rng(4)
    bits = np.dtype(word).itemsize * 8
    for columns in (1, 8, 63, 64, 70, 129):
        a, b = rng.normal(0, 1, (2, 3, columns))
        packed_a, packed_b = pack(a, word), pack(b, word)
        assert packed_a.shape == (3, -(-columns // bits))
        for index in range(columns):
            np.testing.assert_array_equal(packed_a[:, index // bits] >> word(index % bits) & word(1), a[:, index] < 0)
        octets = packed_a.view(np.uint8)
        np.testing.assert_array_equal(octets[:, : -(-columns // 8)], pack(a))
        assert not octets[:, -(-columns // 8) :].any()
        product = columns - 2 * np.bitwise_count(packed_a ^ packed_b).sum(-1, dtype=np.int64)
        np.testing.assert_array_equal(product, (np.where(a < 0, -1, 1) * np.where(b < 0, -1, 1)).sum(-1))


def test_functions_are_added_once_and_names_are_unique():
    model = model_of("Sign", (np.zeros((2, 3), np.float32),))
    first = model.graph[0]
    editor = GraphEditor(model)
    second = insert(model, "Sign", [first.outputs[0]], node_name=first.name, editor=editor)
    third = insert(model, "Sign", [model.graph.inputs[0]], before=first, editor=editor)
    assert list(model.functions) == [(DOMAIN, "Sign", "")] == [add_function(model, "Sign")]
    assert list(model.graph) == [third, first, second]
    assert len({node.name for node in model.graph} | {node.outputs[0].name for node in model.graph}) == 6


def test_bad_requests_are_refused_by_name():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(UsageError, match="no operator 'Sing'"):
        model_of("Sing", (x,))
    with pytest.raises(UsageError, match="needs opset 23, the model is at 17"):
        model_of("Sign", (x,), opset=17)
    with pytest.raises(UsageError, match=r"takes tokens \[B, N, C\] and indices \[B, k\], it was given \[2, 3\], \[2, 3\]"):
        model_of("GatherTokens", (x, x))
    with pytest.raises(UsageError, match="indices"):
        model_of("GatherTokens", (np.zeros((2, 3, 4), np.float32), np.zeros((1, 2), np.int64)))
    with pytest.raises(UsageError, match=r"one tensor \[..., K\]"):
        model_of("PackBits", (np.float32(0).reshape(()),))


def test_operators_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPERATORS["Sign"].name = "Other"
