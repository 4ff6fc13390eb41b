"""What comes from outside is refused by name before anything runs it."""

from __future__ import annotations

import gc

import numpy as np
import onnx
import onnx_ir as ir
import psutil
import pytest
from onnx import helper, numpy_helper

from edgekit.errors import EdgekitError, SourceError, UnsupportedOpError
from edgekit.graph.check import check_model

N = helper.make_node
X = np.zeros((1, 3, 4, 4), np.float32)


def check(proto: onnx.ModelProto) -> list[str]:
    return check_model(ir.from_proto(proto), "model.onnx")


def test_a_valid_model_passes_without_warnings(make):
    weight = np.ones((2, 3, 1, 1), np.float32)
    assert check(make([N("Conv", ["x", "w"], ["c"]), N("Relu", ["c"], ["y"])], {"x": X}, initializers={"w": weight})) == []


def test_light_networks_pass(light_nets):
    for name, path in light_nets.items():
        assert len(check_model(ir.load(path), name)) == 1  # initializers that are inputs


@pytest.mark.parametrize(
    ("node", "words"),
    [
        (N("Covn", ["x"], ["y"], name="first"), ["'Covn'", "'first'", "'Conv'"]),
        (N("Fancy", ["x"], ["y"], name="first", domain="com.acme"), ["'Fancy'", "com.acme", "'first'", "not import"]),
        (N("Gelu", ["x"], ["y"], name="first"), ["'Gelu'", "opset 17", "from opset 20"]),
        (N("Upsample", ["x", "x"], ["y"], name="first"), ["'Upsample'", "deprecated", "'first'"]),
    ],
)
def test_unknown_operators_are_named(node, words, make):
    with pytest.raises(UnsupportedOpError) as caught:
        check(make([node], {"x": X}, opset=17))
    for word in words:
        assert word in str(caught.value)


BAD_NODES = {
    "undefined value": ([N("Add", ["x", "nowhere"], ["y"], name="sum")], "'nowhere'"),
    "missing required input": ([N("Conv", ["x", ""], ["y"], name="sum")], "'W'"),
    "too few inputs": ([N("Add", ["x"], ["y"], name="sum")], "2 inputs"),
    "too many inputs": ([N("Relu", ["x", "x"], ["y"], name="sum")], "1 inputs"),
    "too many outputs": ([N("Relu", ["x"], ["y", "z"], name="sum")], "1 outputs"),
    "unknown attribute": ([N("Softmax", ["x"], ["y"], name="sum", axes=1)], "'axes'"),
    "attribute of the wrong type": ([N("Softmax", ["x"], ["y"], name="sum", axis=1.5)], "'axis'"),
    "missing attribute": ([N("Concat", ["x", "x"], ["y"], name="sum")], "'axis'"),
    "constant without value": ([N("Constant", [], ["k"], name="sum"), N("Add", ["x", "k"], ["y"])], "Constant"),
}


@pytest.mark.parametrize("case", BAD_NODES)
def test_malformed_nodes_are_named(case, make):
    nodes, word = BAD_NODES[case]
    with pytest.raises(SourceError) as caught:
        check(make(nodes, {"x": X}))
    assert word in caught.value.what
    assert "'sum'" in (caught.value.where or "")
    assert "model.onnx" in (caught.value.where or "")
    assert caught.value.fix


def test_cycle(make):
    nodes = [N("Add", ["x", "b"], ["a"], name="one"), N("Relu", ["a"], ["b"], name="two"), N("Relu", ["b"], ["y"])]
    with pytest.raises(SourceError, match="cycle") as caught:
        check(make(nodes, {"x": X}))
    assert "'one'" in str(caught.value)
    assert "'two'" in str(caught.value)


def test_wrong_order_is_a_warning(make):
    assert "order" in check(make([N("Relu", ["a"], ["y"]), N("Neg", ["x"], ["a"])], {"x": X}))[0]


def test_duplicate_names(make):
    model = ir.from_proto(make([N("Relu", ["x"], ["a"]), N("Neg", ["a"], ["y"])], {"x": X}))
    model.graph[0].outputs[0].name = "y"
    with pytest.raises(SourceError, match="two values are named 'y'"):
        check_model(model, "model.onnx")


def test_output_that_nothing_produces(make):
    with pytest.raises(SourceError, match="'z'"):
        check(make([N("Relu", ["x"], ["y"])], {"x": X}, outputs=("y", "z")))


def test_no_outputs(make):
    with pytest.raises(SourceError, match="no outputs"):
        check(make([N("Relu", ["x"], ["y"])], {"x": X}, outputs=()))


def branch(nodes, name="b"):
    return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(f"{name}_out", 1, None)])


def conditional(make, then_input):
    then_branch = branch([N("Relu", [then_input], ["t_out"])], "t")
    else_branch = branch([N("Neg", ["x"], ["e_out"])], "e")
    node = N("If", ["c"], ["y"], then_branch=then_branch, else_branch=else_branch)
    return make([node], {"x": X, "c": (onnx.TensorProto.BOOL, [])})


def test_subgraphs_capture_outer_values_but_no_undefined_ones(make):
    assert check(conditional(make, "x")) == []
    with pytest.raises(SourceError, match="'nowhere'"):
        check(conditional(make, "nowhere"))


def function(name, nodes):
    return helper.make_function("com.acme", name, ["a"], ["b"], nodes, [helper.make_opsetid("", 23), helper.make_opsetid("com.acme", 1)])


def call(name, source, result):
    return N(name, [source], [result], domain="com.acme")


def test_functions_are_operators_and_may_not_recurse(make):
    fine = function("Outer", [N("Relu", ["a"], ["b"])])
    assert check(make([call("Outer", "x", "y")], {"x": X}, functions=[fine])) == []
    loop = [function("Ping", [call("Pong", "a", "b")]), function("Pong", [call("Ping", "a", "b")])]
    with pytest.raises(SourceError, match="calls itself"):
        check(make([call("Ping", "x", "y")], {"x": X}, functions=loop))


def test_functions_that_unfold_without_end_are_refused(make):
    doubling = [function("F0", [N("Relu", ["a"], ["b"])])]
    doubling += [function(f"F{i}", [call(f"F{i - 1}", "a", "m"), call(f"F{i - 1}", "m", "b")]) for i in range(1, 40)]
    with pytest.raises(SourceError, match="unfold"):
        check(make([call("F39", "x", "y")], {"x": X}, functions=doubling))


def weights(make, array):
    return make([N("Add", ["x", "w"], ["y"])], {"x": (1, None)}, initializers={"w": array})


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16", "float8_e5m2"])
def test_nan_is_named(dtype, make):
    import ml_dtypes

    array = np.ones((3, 5)).astype(getattr(ml_dtypes, dtype, dtype))
    assert check(weights(make, array)) == []
    array[1, 2] = np.nan
    with pytest.raises(SourceError, match="'w' contains NaN"):
        check(weights(make, array))


def test_nan_in_the_last_chunk_and_in_constants(make):
    array = np.ones(5_000_001, np.float32)
    array[-1] = np.nan
    with pytest.raises(SourceError, match="NaN"):
        check(weights(make, array))
    constant = N("Constant", [], ["k"], name="konst", value=numpy_helper.from_array(array[-2:]))
    with pytest.raises(SourceError, match="NaN") as caught:
        check(make([constant, N("Add", ["x", "k"], ["y"])], {"x": (1, None)}))
    assert "'konst'" in str(caught.value)


def test_infinity_is_for_masks_only(make):
    mask = np.triu(np.full((4, 4), -np.inf, np.float32), 1)
    assert check(weights(make, mask)) == []
    assert check(weights(make, np.float32([np.inf]))) == []
    mask[0, 0] = 0.5
    with pytest.raises(SourceError, match="'w' contains infinite"):
        check(weights(make, mask))
    large = np.full(3_000_000, 0.5, np.float32)
    large[-1] = -np.inf
    with pytest.raises(SourceError, match="'w' contains infinite"):
        check(weights(make, large))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: setattr(t, "raw_data", t.raw_data[:-3]),
        lambda t: setattr(t, "raw_data", t.raw_data + b"1234"),
        lambda t: t.dims.append(1 << 40),
        lambda t: t.dims.__setitem__(0, -2),
        lambda t: setattr(t, "raw_data", b""),
        lambda t: t.ClearField("raw_data"),
    ],
)
def test_data_that_does_not_fit_the_shape(change, make):
    proto = weights(make, np.ones((2, 3), np.float32))
    change(proto.graph.initializer[0])
    with pytest.raises(SourceError, match="'w'"):
        check(proto)


def test_typed_fields_fit_too(make):
    proto = weights(make, np.ones((2, 3), np.float32))
    tensor = helper.make_tensor("w", onnx.TensorProto.FLOAT16, [4], [1.0, 2.0, 3.0, 4.0])
    proto.graph.initializer[0].CopyFrom(tensor)
    assert check(proto) == []
    proto.graph.initializer[0].int32_data.append(1)
    with pytest.raises(SourceError, match="holds 5 numbers"):
        check(proto)


@pytest.fixture
def external(tmp_path, make):
    def build(array, **location):
        model = ir.from_proto(weights(make, np.zeros(1, np.float32)))
        array.tofile(tmp_path / "w.bin")
        place = {"location": "w.bin", "offset": 0, "length": array.nbytes, **location}
        value = model.graph.initializers["w"]
        value.const_value = ir.ExternalTensor(
            place["location"], place["offset"], place["length"], ir.DataType.FLOAT, shape=ir.Shape(array.shape), name="w", base_dir=tmp_path
        )
        return model

    return build


def test_external_data(external):
    array = np.ones((64, 64), np.float32)
    assert check_model(external(array), "model.onnx") == []
    for place in ({"offset": 4}, {"location": "gone.bin"}, {"offset": -4}, {"length": 100}, {"location": "../w.bin"}):
        with pytest.raises(SourceError, match="'w'"):
            check_model(external(array, **place), "model.onnx")
    array[3, 3] = np.nan
    with pytest.raises(SourceError, match="'w' contains NaN"):
        check_model(external(array), "model.onnx")


def test_external_data_is_not_held_in_memory(external):
    model = external(np.ones((40, 1 << 20), np.float32))  # 160 MB
    gc.collect()
    process = psutil.Process()
    before = process.memory_info().rss
    assert check_model(model, "model.onnx") == []
    assert process.memory_info().rss - before < 64 << 20


def test_any_mutation_of_a_valid_file_ends_in_a_verdict(make):
    nodes = [N("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1], name="conv"), N("Relu", ["c"], ["r"]), N("Add", ["r", "r"], ["y"])]
    data = bytearray(make(nodes, {"x": X}, initializers={"w": np.ones((3, 3, 3, 3), np.float32)}).SerializeToString())
    rng = np.random.default_rng(0)
    verdicts = set()
    for _ in range(300):
        mutant = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            mutant[rng.integers(len(mutant))] = rng.integers(256)
        try:
            model = ir.from_proto(onnx.ModelProto.FromString(bytes(mutant)))
        except Exception:  # the loader's concern
            continue
        try:
            check_model(model, "mutant.onnx")
            verdicts.add("ok")
        except EdgekitError as error:
            verdicts.add(type(error).__name__)
    assert {"ok", "SourceError", "UnsupportedOpError"} <= verdicts
