"""The canonical form computes the same and has the properties that passes rely on."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from torch import nn

from edgekit.errors import SourceError
from edgekit.graph.canonicalize import STEPS, canonicalize
from edgekit.graph.opset import to_opset

N = helper.make_node
RNG = np.random.default_rng(0)
INT64 = np.int64


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def assert_canonical(model: ir.Model) -> None:
    nodes = list(model.graph.all_nodes())
    names = [node.name for node in nodes]
    values = [output.name for node in nodes for output in node.outputs if output.name]
    values += [name for graph in model.graphs() for name in graph.initializers]
    values += [value.name for value in model.graph.inputs if not value.is_initializer()]
    assert all(names)
    assert len(set(names)) == len(names)
    assert len(set(values)) == len(values)
    position = {node: index for index, node in enumerate(model.graph)}
    for node, index in position.items():
        assert all(position.get(value.producer(), -1) < index for value in node.inputs if value is not None)
    used = {value for node in nodes for value in node.inputs}
    assert all(value in used or value.is_graph_output() for value in model.graph.initializers.values())


class Attention(nn.Module):
    """A transformer block over image patches, as the exporter decomposes it."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 32, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.norm, self.qkv, self.proj = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x[:, 0])


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.Hardswish(),
        nn.Dropout(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
        nn.Linear(144, 5),
    )


@pytest.mark.parametrize("build", [Attention, convolutions])
def test_exported_modules(build, run):
    torch.manual_seed(0)
    module, x = build().eval(), torch.randn(2, 1, 12, 12)
    model = torch.onnx.export(module, (x,), dynamo=True, opset_version=23, optimize=False, verbose=False).model
    names = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    before = run(model, {names[0]: x.numpy()})[0]
    canonicalize(model)
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == names
    after = run(model, {names[0]: x.numpy()})[0]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)
    assert_canonical(model)
    assert not {"Constant", "Expand", "CastLike", "Shape", "Identity", "Dropout"} & set(operators(model))
    for node in model.graph:  # weights are constants, not computed
        if node.op_type in ("MatMul", "Gemm", "Conv") and "weight" in str(node.inputs[1].name):
            assert node.inputs[1].is_initializer()
    if build is convolutions:
        assert len(next(node for node in model.graph if node.op_type == "Conv").inputs) == 2


def test_weights_keep_their_names_when_they_are_transposed(make):
    nodes = [N("Transpose", ["head.weight"], ["t"], perm=[1, 0]), N("MatMul", ["x", "t"], ["y"])]
    weight = normal(5, 4)
    model = canonicalize(ir.from_proto(make(nodes, {"x": normal(2, 4)}, initializers={"head.weight": weight})))
    np.testing.assert_array_equal(model.graph.initializers["head.weight"].const_value.numpy(), weight.T)


def test_shape_chains_fold(make, run):
    nodes = [
        N("Shape", ["x"], ["s"]),
        N("Gather", ["s", "zero"], ["n"]),
        N("Constant", [], ["rest"], value_ints=[-1]),
        N("Concat", ["n", "rest"], ["target"], axis=0),
        N("Relu", ["x"], ["r"]),
        N("Reshape", ["r", "target"], ["y"]),
    ]
    x = normal(2, 3, 4)
    model = canonicalize(ir.from_proto(make(nodes, {"x": x}, initializers={"zero": np.array([0])})))
    assert operators(model) == ["Relu", "Reshape"]
    np.testing.assert_array_equal(run(model, {"x": x})[0], np.maximum(x, 0).reshape(2, -1))


HUGE = {
    "constant of shape": ([N("ConstantOfShape", ["n"], ["k"])], {"n": np.array([1 << 20, 1 << 20], INT64)}),
    "expand": ([N("Expand", ["one", "n"], ["k"])], {"one": normal(1), "n": np.array([1 << 40], INT64)}),
    "tile": ([N("Tile", ["one", "n"], ["k"])], {"one": normal(1), "n": np.array([1 << 40], INT64)}),
    "range": ([N("Range", ["zero", "n", "d"], ["k"])], {"zero": np.float32(0), "n": np.float32(1e12), "d": np.float32(1e-3)}),
    "pad": ([N("Pad", ["one", "n"], ["k"])], {"one": normal(1), "n": np.array([1 << 40, 0], INT64)}),
    "outer product": ([N("Mul", ["a", "b"], ["k"])], {"a": normal(1 << 16, 1), "b": normal(1, 1 << 16)}),
    "growing in steps": (
        [N("Concat", ["k0"] * 100, ["k1"], axis=0), N("Concat", ["k1"] * 100, ["k2"], axis=0), N("Concat", ["k2"] * 100, ["k"], axis=0)],
        {"k0": normal(1000)},
    ),
    "empty axis": (
        [N("ReduceSum", ["e", "axes"], ["k"], keepdims=0)],
        {"e": np.zeros((0, 1 << 40), np.float32), "axes": np.array([0], INT64)},
    ),
    "division by zero step": ([N("Range", ["zero", "n", "zero"], ["k"])], {"zero": np.float32(0), "n": np.float32(1)}),
    "negative": ([N("ConstantOfShape", ["n"], ["k"])], {"n": np.array([-5, -5], INT64)}),
    "nonsense": ([N("Concat", ["a", "b"], ["k"], axis=7)], {"a": normal(2), "b": normal(3)}),
    "strings": ([N("Gather", ["a", "i"], ["k"], axis=99)], {"a": normal(2), "i": np.array([1 << 50], INT64)}),
}


@pytest.mark.parametrize("name", HUGE)
def test_huge_and_malformed_constants_stay_nodes(name, make):
    nodes, initializers = HUGE[name]
    model = ir.from_proto(make([*nodes, N("Add", ["x", "k"], ["y"])], {"x": (1, None)}, initializers=initializers))
    canonicalize(model)
    assert len(model.graph) >= 2
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) < 100 << 20


def test_growth_of_the_whole_model_is_bounded(make):
    nodes = [N("Expand", ["one", "n"], [f"k{i}"]) for i in range(12)] + [N("Sum", [f"k{i}" for i in range(12)] + ["x"], ["y"])]
    model = ir.from_proto(make(nodes, {"x": (1, None)}, initializers={"one": normal(1), "n": np.array([6 << 20], INT64)}))
    canonicalize(model)
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) <= 256 << 20


def test_quantized_weights_stay_quantized(make):
    nodes = [N("DequantizeLinear", ["q", "s"], ["w"]), N("MatMul", ["x", "w"], ["y"])]
    initializers = {"q": np.ones((4, 4), np.int8), "s": np.float32(0.1)}
    assert "DequantizeLinear" in operators(canonicalize(ir.from_proto(make(nodes, {"x": normal(2, 4)}, initializers=initializers))))


def test_batch_norm_is_not_folded(make):
    nodes = [N("Conv", ["x", "w"], ["c"]), N("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"])]
    initializers = {"w": normal(4, 3, 1, 1), **{name: np.ones(4, np.float32) for name in "sbmv"}}
    assert operators(canonicalize(ir.from_proto(make(nodes, {"x": normal(1, 3, 2, 2)}, initializers=initializers)))) == [
        "Conv",
        "BatchNormalization",
    ]


IDENTITIES = {
    "input to output": ([N("Identity", ["x"], ["y"])], ["y"], ["Identity"]),
    "chain to output": ([N("Relu", ["x"], ["a"]), N("Identity", ["a"], ["b"]), N("Dropout", ["b"], ["y"])], ["y"], ["Relu"]),
    "one value, two outputs": (
        [N("Relu", ["x"], ["a"]), N("Identity", ["a"], ["y"]), N("Identity", ["a"], ["z"])],
        ["y", "z"],
        ["Relu", "Identity"],
    ),
    "output through identity": ([N("Relu", ["x"], ["y"]), N("Identity", ["y"], ["z"])], ["y", "z"], ["Relu", "Identity"]),
    "constant to output": (
        [N("Constant", [], ["k"], value_float=2.0), N("Identity", ["k"], ["z"]), N("Relu", ["x"], ["y"])],
        ["y", "z"],
        ["Identity", "Relu"],
    ),
    "dropout with training": (
        [
            N("Constant", [], ["r"], value_float=0.5),
            N("Cast", ["one"], ["t"], to=9),
            N("Dropout", ["x", "r", "t"], ["d"]),
            N("Relu", ["d"], ["y"]),
        ],
        ["y"],
        ["Dropout", "Relu"],
    ),
    "unused": ([N("Relu", ["x"], ["y"]), N("Exp", ["x"], ["dead"]), N("Neg", ["dead"], ["deader"])], ["y"], ["Relu"]),
    "wrong order": ([N("Relu", ["a"], ["y"]), N("Neg", ["x"], ["a"])], ["y"], ["Neg", "Relu"]),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_identities_and_the_unused(name, make, run):
    nodes, outputs, expected = IDENTITIES[name]
    x = normal(2, 3)
    proto = make(nodes, {"x": x}, outputs, {"one": np.float32(1)})
    model = canonicalize(ir.from_proto(proto))
    assert operators(model) == expected
    assert [value.name for value in model.graph.outputs] == outputs
    assert_canonical(model)
    if name not in ("dropout with training", "wrong order"):
        for before, after in zip(run(proto, {"x": x}), run(model, {"x": x}), strict=True):
            np.testing.assert_array_equal(after, before)


def branch(nodes, output, initializers=()):
    return helper.make_graph(nodes, output, [], [helper.make_tensor_value_info(output, 1, None)], list(initializers))


@pytest.mark.parametrize("taken", [True, False])
def test_constant_conditions_choose_the_branch(taken, make, run):
    x, inner, outer = normal(2, 3), normal(3), normal(3)
    weight = onnx.numpy_helper.from_array(inner, "w")  # hides the outer `w`, as `a` hides the outer `a`
    then_branch = branch([N("Relu", ["x"], ["a"]), N("Add", ["a", "w"], ["t"])], "t", [weight])
    else_branch = branch([N("Identity", ["x"], ["e"])], "e")
    nodes = [
        N("Sub", ["x", "w"], ["a"]),
        N("If", ["c"], ["i"], then_branch=then_branch, else_branch=else_branch),
        N("Add", ["a", "i"], ["y"]),
    ]
    nodes.append(N("If", ["c"], ["z"], then_branch=then_branch, else_branch=else_branch))
    model = canonicalize(ir.from_proto(make(nodes, {"x": x}, ("y", "z"), {"c": np.array(taken), "w": outer})))
    assert "If" not in operators(model)
    assert_canonical(model)
    chosen = np.maximum(x, 0) + inner if taken else x
    for actual, expected in zip(run(model, {"x": x}), (x - outer + chosen, chosen), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_dynamic_conditions_stay(make, run):
    x = normal(2, 3)
    then_branch = branch([N("Constant", [], ["k"], value_float=3.0), N("Mul", ["x", "k"], ["t"])], "t")
    else_branch = branch([N("Identity", ["x"], ["e"])], "e")
    node = N("If", ["c"], ["y"], then_branch=then_branch, else_branch=else_branch)
    model = canonicalize(ir.from_proto(make([node], {"x": x, "c": (onnx.TensorProto.BOOL, [])})))
    assert operators(model) == ["If"]
    assert_canonical(model)
    np.testing.assert_array_equal(run(model, {"x": x, "c": np.array(True)})[0], 3 * x)
    np.testing.assert_array_equal(run(model, {"x": x, "c": np.array(False)})[0], x)


def function(domain):
    opsets = [helper.make_opsetid("", 23)]
    return helper.make_function(domain, "Twice", ["a"], ["b"], [N("Add", ["a", "a"], ["b"], name="sum")], opsets)


def test_foreign_functions_are_inlined_and_own_ones_stay(make, run):
    x = normal(2, 3)
    for domain, expected in (("com.acme", ["Add", "Add"]), ("edgekit", ["Twice", "Twice"])):
        nodes = [N("Twice", ["x"], ["a"], domain=domain, name="n"), N("Twice", ["a"], ["y"], domain=domain, name="n")]
        model = ir.from_proto(make(nodes, {"x": x}, functions=[function(domain)]))
        canonicalize(model)
        assert operators(model) == expected
        assert ("com.acme" in model.opset_imports, "edgekit" in model.opset_imports) == (False, domain == "edgekit")
        assert_canonical(model)
        np.testing.assert_array_equal(run(model, {"x": x})[0], 4 * x)


def test_functions_of_another_opset_are_refused(make):
    other = function("com.acme")
    other.opset_import[0].version = 22
    with pytest.raises(SourceError, match="inlined"):
        canonicalize(ir.from_proto(make([N("Twice", ["x"], ["y"], domain="com.acme")], {"x": normal(2)}, functions=[other])))


def test_metadata_and_names_survive(make):
    proto = make([N("Relu", ["x"], ["a"], name="same"), N("Neg", ["a"], ["b"], name="same"), N("Exp", ["b"], ["y"])], {"x": normal(2)})
    model = ir.from_proto(proto)
    for node in model.graph:
        node.metadata_props["edgekit.module"] = f"blocks.{node.op_type}"
    canonicalize(model)
    assert [node.metadata_props["edgekit.module"] for node in model.graph] == ["blocks.Relu", "blocks.Neg", "blocks.Exp"]
    assert [node.name for node in model.graph] == ["same", "same_1", "y/Exp"]


def test_light_networks_become_plain_graphs(light_nets):
    for name in ("squeezenet", "vgg19", "shufflenet"):
        model = canonicalize(to_opset(ir.load(light_nets[name])))
        assert operators(model).count("ConstantOfShape") == (1 if name == "vgg19" else 0)  # its 411 MB matrix stays a node
        assert "Dropout" not in operators(model)
        assert_canonical(model)


def test_every_step_says_what_it_does():
    assert all(step.__doc__ for step in STEPS)


UNARY = ("Relu", "Neg", "Abs", "Identity", "Dropout", "Tanh", "Transpose", "Shape+", "Cast64")
BINARY = ("Add", "Mul", "Sub", "Max", "Where+", "Concat+", "MatMul")


@st.composite
def graphs(draw):
    """Random graphs of [3, 3] tensors: inputs, constants of several kinds, one to ten operators, some results as outputs."""
    nodes, values = [], ["x", "w", "v"]
    if draw(st.booleans()):
        nodes.append(N("Constant", [], ["k"], value_floats=[1.0, -2.0, 0.5]))
        values.append("k")
        nodes.append(N("Expand", ["k", "three"], ["k2"]))
        values[-1] = "k2"
    for index in range(draw(st.integers(1, 10))):
        out = f"t{index}"
        a, b = draw(st.sampled_from(values)), draw(st.sampled_from(values))
        operator = draw(st.sampled_from(UNARY + BINARY))
        if operator == "Shape+":
            nodes += [N("Shape", [a], [f"{out}s"]), N("ConstantOfShape", [f"{out}s"], [f"{out}z"]), N("Add", [f"{out}z", b], [out])]
        elif operator == "Cast64":
            nodes += [N("Cast", [a], [f"{out}c"], to=onnx.TensorProto.INT64), N("CastLike", [f"{out}c", b], [out])]
        elif operator == "Where+":
            nodes += [N("Greater", [a, b], [f"{out}c"]), N("Where", [f"{out}c", a, b], [out])]
        elif operator == "Concat+":
            nodes += [N("Concat", [a, b], [f"{out}c"], axis=0), N("Slice", [f"{out}c", "one", "four"], [out])]
        else:
            nodes.append(N(operator, [a] if operator in UNARY else [a, b], [out]))
        values.append(out)
    outputs = [out for out in values if out.startswith("t") and (out == values[-1] or draw(st.booleans()))]
    return nodes, outputs


@settings(max_examples=60, deadline=None, derandomize=True)
@given(graph=graphs())
def test_random_graphs_keep_their_values(graph):
    import onnxruntime

    nodes, outputs = graph
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(3, 3)), "v": rng.normal(size=(3, 3))}
    initializers = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    integers = {"three": [3, 3], "one": [1], "four": [4]}
    initializers += [onnx.numpy_helper.from_array(np.array(value, INT64), name) for name, value in integers.items()]
    infos = [helper.make_tensor_value_info(name, 1, None) for name in outputs]
    proto = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, [3, 3])], infos, initializers)
    model_proto = helper.make_model(proto, opset_imports=[helper.make_opsetid("", 21)], ir_version=8)

    def execute(model):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads, options.log_severity_level = 1, 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, {"x": rng_input})

    rng_input = rng.normal(size=(3, 3)).astype(np.float32)
    model = canonicalize(ir.from_proto(model_proto))
    assert [value.name for value in model.graph.outputs] == outputs
    assert_canonical(model)
    for before, after in zip(execute(model_proto), execute(ir.to_proto(model)), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
