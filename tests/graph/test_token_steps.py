"""What tokens are made of after each step: small graphs whose indices are known, worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.graph.token_steps import Mark, Tokens, follow_tokens, mark, marks


def graph_of(*steps: tuple[int, int, int, dict[str, list[int]]]) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A graph that gives out its inputs, which are marked as (block, tokens, prefix, {role: indices})."""
    feeds, nodes = {}, []
    for block, _, _, roles in steps:
        for role, indices in roles.items():
            feeds[f"{role}{block}"] = np.array([indices])
            nodes.append(f"marked_{role}{block} = Identity({role}{block})")
    inputs = ", ".join(f"int64[1,{array.shape[1]}] {name}" for name, array in feeds.items())
    outputs = ", ".join(f"int64[1,{array.shape[1]}] marked_{name}" for name, array in feeds.items())
    text = f'<ir_version: 10, opset_import: ["" : 23]> net ({inputs}) => ({outputs}) {{ {" ".join(nodes)} }}'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text))
    values = {value.name: value for node in model.graph for value in node.outputs}
    for block, tokens, prefix, roles in steps:
        for role in roles:
            mark(values[f"marked_{role}{block}"], Mark(block, tokens, prefix, role))
    return model, feeds


def test_a_graph_without_marks() -> None:
    model, feeds = graph_of((0, 4, 1, {"kept": [0]}))
    for node in model.graph:
        node.outputs[0].metadata_props.clear()
    assert marks(model.graph) == {}
    assert follow_tokens(model, feeds) == []


def test_tokens_that_are_dropped_twice() -> None:
    """A class token and five patches: patches 4, 1 and 3 stay, then the first and last of those."""
    history = follow_tokens(*graph_of((2, 6, 1, {"kept": [4, 1, 3]}), (5, 4, 1, {"kept": [0, 2]})))
    assert history == [
        Tokens(-1, ((0,), (1,), (2,), (3,), (4,), (5,))),
        Tokens(2, ((0,), (5,), (2,), (4,)), frozenset({1, 3})),
        Tokens(5, ((0,), (5,), (4,)), frozenset({1, 2, 3})),
    ]


def test_one_token_of_those_that_go() -> None:
    """It is one of the tokens of the next step, here the second after the class token, and goes there."""
    history = follow_tokens(*graph_of((0, 4, 1, {"fused": [1]}), (1, 3, 1, {"fused": [0]})))
    assert history[1].groups == ((0,), (2,), (1, 3))
    assert history[2].groups == ((0,), (2,), (1, 3))
    assert history[2].dropped == {1, 3}


def test_even_positions_merge_into_odd_ones() -> None:
    """Of seven tokens, 2 goes into 5 and 6 into 5 too; the rest of the even ones come first."""
    model, feeds = graph_of((0, 7, 1, {"stay": [0, 2], "sources": [1, 3], "targets": [2, 2]}))
    assert follow_tokens(model, feeds)[-1].groups == ((0,), (4,), (1,), (3,), (5, 2, 6))


def test_a_prefix_of_two_stays_in_front() -> None:
    model, feeds = graph_of((0, 6, 2, {"stay": [0, 1], "sources": [2], "targets": [1]}))
    assert follow_tokens(model, feeds)[-1].groups == ((0,), (1,), (2,), (3, 4), (5,))


def test_the_last_of_the_kept_are_absorbed() -> None:
    """Four patches in order 3, 0, 2; the last of them goes into the first."""
    model, feeds = graph_of((1, 5, 1, {"kept": [3, 0, 2], "absorbed": [0]}))
    assert follow_tokens(model, feeds)[-1] == Tokens(1, ((0,), (4, 3), (1,)), frozenset({2}))


def test_marks_survive_a_file(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, feeds = graph_of((2, 6, 1, {"kept": [4, 1, 3]}))
    ir.save(model, tmp_path / "net.onnx")
    assert follow_tokens(ir.load(tmp_path / "net.onnx"), feeds) == follow_tokens(model, feeds)
