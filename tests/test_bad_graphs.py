"""Graphs with nested parts that are wrong, and shapes that are open: each is told by its own message before anything runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgekit.errors import EdgekitError, SourceError, UnsupportedOpError
from edgekit.isolation import Worker
from tests.test_bad_input import refused, run

N = helper.make_node
FLOAT = TensorProto.FLOAT


def info(name: str, shape: list[int | str | None] | None = None, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def saved(folder: Path, nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto] | None = None, functions=(), domains=()) -> Path:
    graph = helper.make_graph(nodes, "g", inputs or [info("x", [1, 4]), info("c", [], TensorProto.BOOL)], [info("y")])
    opsets = [helper.make_opsetid("", 18), *(helper.make_opsetid(domain, 1) for domain in domains)]
    path = folder / "nested.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10).SerializeToString())
    return path


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [info(nodes[-1].output[0])])


def choice(then: onnx.GraphProto, otherwise: onnx.GraphProto | None = None) -> onnx.NodeProto:
    return N("If", ["c"], ["y"], name="choice", then_branch=then, else_branch=otherwise or branch("e", N("Neg", ["x"], ["e_y"])))


def function(name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("com.acme", 1)]
    return helper.make_function("com.acme", name, ["a"], ["b"], list(nodes), imports)


def acme(op_type: str, source: str, result: str) -> onnx.NodeProto:
    return N(op_type, [source], [result], domain="com.acme", name=f"{op_type}.call")


PING = [function("Ping", acme("Pong", "a", "b")), function("Pong", acme("Ping", "a", "b"))]

NESTED: dict[str, tuple[list[onnx.NodeProto], list[onnx.FunctionProto], type[EdgekitError], tuple[str, ...]]] = {
    "capture of nothing": (
        [choice(branch("t", N("Relu", ["nowhere"], ["t_y"], name="inner")))],
        [],
        SourceError,
        ("'nowhere' is used in a subgraph but neither it nor a graph around it produces it", "'choice'", "'inner'"),
    ),
    "capture from the other branch": (
        [choice(branch("t", N("Relu", ["x"], ["t_y"])), branch("e", N("Neg", ["t_y"], ["e_y"])))],
        [],
        SourceError,
        ("'t_y' is used in a subgraph",),
    ),
    "capture of its own result": ([choice(branch("t", N("Relu", ["y"], ["t_y"])))], [], SourceError, ("cycle", "'choice'")),
    "capture of a later result that needs it": (
        [N("Relu", ["y"], ["later"], name="later"), choice(branch("t", N("Relu", ["later"], ["t_y"])))],
        [],
        SourceError,
        ("cycle", "'later'", "'choice'"),
    ),
    "cycle in a subgraph": (
        [choice(branch("t", N("Add", ["x", "b"], ["a"], name="one"), N("Relu", ["a"], ["b"], name="two"), N("Neg", ["b"], ["t_y"])))],
        [],
        SourceError,
        ("cycle", "body of node 'choice'", "'one'", "'two'"),
    ),
    "unknown operator in a subgraph": (
        [choice(branch("t", N("Rellu", ["x"], ["t_y"], name="inner")))],
        [],
        UnsupportedOpError,
        ("'Rellu'", "'inner'", "did you mean 'Relu'?"),
    ),
    "function that calls itself": (
        [acme("Loop", "x", "y")],
        [function("Loop", acme("Loop", "a", "b"))],
        SourceError,
        ("calls itself", "Loop → Loop"),
    ),
    "functions that call each other": ([acme("Ping", "x", "y")], PING, SourceError, ("calls itself", "Ping", "Pong")),
    "function that reads a value of its caller": (
        [acme("Peek", "x", "y")],
        [function("Peek", N("Add", ["a", "x"], ["b"], name="inner"))],
        SourceError,
        ("'x'", "nothing produces it", "function 'Peek'", "'inner'"),
    ),
    "names twice in a subgraph": (
        [choice(branch("t", N("Relu", ["x"], ["t_y"]), N("Neg", ["x"], ["t_y"])))],
        [],
        SourceError,
        ("'t_y'",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NESTED)
def test_what_is_wrong_within_graphs_and_functions_is_named(name: str, tmp_path: Path, worker: Worker) -> None:
    nodes, functions, kind, says = NESTED[name]
    path = saved(tmp_path, nodes, functions=functions, domains=("com.acme",) if functions else ())
    refused(tmp_path, worker, kind, *says, str(path), model=path)


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_subgraphs_may_capture_outer_values(target: str, tmp_path: Path, worker: Worker) -> None:
    inner = branch("deep", N("Mul", ["doubled", "x"], ["deep_y"]))
    then = branch("t", N("If", ["c"], ["t_y"], then_branch=inner, else_branch=branch("d", N("Identity", ["x"], ["d_y"]))))
    path = saved(tmp_path, [N("Add", ["x", "x"], ["doubled"]), choice(then)])
    artifact = run(tmp_path, worker, path, target=target)
    x = np.array([[1.0, -2.0, 3.0, 0.5]], np.float32)
    for condition, expected in ((True, 2 * x * x), (False, -x)):
        np.testing.assert_allclose(artifact.run({"x": x, "c": np.array(condition)})["y"], expected, rtol=1e-6)


def test_opsets_that_no_operator_is_of_are_noted(tmp_path: Path, worker: Worker) -> None:
    path = saved(tmp_path, [choice(branch("t", N("Relu", ["x"], ["t_y"])))], domains=("com.acme", "ai.onnx.ml"))
    notes = run(tmp_path, worker, path).report["notes"]
    for domain in ("com.acme", "ai.onnx.ml"):
        assert f"opset 1 of domain '{domain}' is imported and no operator is of it" in notes


OPEN: dict[str, tuple[list[int | str | None] | None, tuple[str, ...]]] = {
    "no shape at all": (None, ("input 'x' has no declared shape", "--input x:1,3,224,224")),
    "named dimension": (["n", 3, "height", 32], ("dimension 2 ('height') of input 'x' is symbolic", "--input x:1,3,224,32")),
    "nameless dimension": ([1, 3, None, None], ("dimension 2", "of input 'x'", "--input x:1,3,224,224")),
    "tokens": (["n", "tokens", 16], ("dimension 1 ('tokens') of input 'x'", "--input x:1,128,16")),
}


@pytest.mark.parametrize("name", OPEN)
def test_open_shapes_are_told_with_what_pins_them(name: str, tmp_path: Path, worker: Worker) -> None:
    shape, says = OPEN[name]
    path = saved(tmp_path, [N("Relu", ["x"], ["y"])], [info("x", shape)])
    refused(tmp_path, worker, SourceError, *says, model=path)
    advice = says[-1].removeprefix("--input ")
    report = run(tmp_path, worker, path, tmp_path / "pinned", inputs=(advice,)).report  # the advice works as it stands
    assert report["model"]["inputs"][0]["shape"] == [int(size) for size in advice.partition(":")[2].split(",")]
