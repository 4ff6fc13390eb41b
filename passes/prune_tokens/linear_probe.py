"""The matrix of a linear part of a graph, measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from edgekit.graph import run
from edgekit.graph.constants import constant_array
from edgekit.graph.opset import OPSET
from edgekit.passes.prune_tokens.token_axis import StandsInTheWayError

_ROUNDING = 1e-3
"""Difference of results for the same token at two places that may be rounding, as a share of the largest result."""


def probe(path: Sequence[ir.Node], value: ir.Value, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Measures `y = x · weight + bias` of every token.

    Args:
        path: Nodes from the tokens `[B, N, C]` to `value`, each reading the one before it and constants.
        value: Queries or keys, `[B, H, N, d]` or `[B, N, H · d]`.
        shape: `[B, N, C]`.

    Returns:
        Weight `[C, H · d]` and bias `[H · d]`, from runs with a unit vector for each token.

    Raises:
        StandsInTheWayError: They are others for each token, as with a table of positions on the way.
    """
    _, tokens, width = shape
    rows = np.concatenate([np.zeros((1, width)), np.eye(width)])
    padded = np.concatenate([rows, np.zeros((-len(rows) % tokens, width))]).reshape(-1, tokens, width)
    model, name = _model(path, value, shape)

    def mapped(batch: np.ndarray) -> np.ndarray:
        feed = np.broadcast_to(batch, shape).astype(np.float32)
        (result,) = run(model, {name: np.ascontiguousarray(feed)}).values()
        first: np.ndarray = np.asarray(result)[0]
        return first.transpose(1, 0, 2).reshape(tokens, -1) if first.ndim == 3 else first

    for alike in (np.zeros((1, width)), np.ones((1, width))):
        result = mapped(alike)
        if np.abs(result - result[:1]).max() > _ROUNDING * max(np.abs(result).max(), 1.0):
            raise StandsInTheWayError(
                value.name or "", "a token's queries or keys depend on its place, from which no scorer can be started"
            )
    measured = np.concatenate([mapped(batch) for batch in padded])[: len(rows)].astype(np.float64)
    return measured[1:] - measured[0], measured[0]


def _model(path: Sequence[ir.Node], value: ir.Value, shape: tuple[int, ...]) -> tuple[ir.Model, str]:
    """The path as a model of its own, in float32, and the name of its input."""
    tokens = ir.Value(name="tokens", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    made: dict[ir.Value, ir.Value] = {}
    nodes: list[ir.Node] = []
    initializers: list[ir.Value] = []
    for node in path:
        if node.op_type == "Cast":
            source = node.inputs[0]
            assert source is not None
            made[node.outputs[0]] = made.get(source, tokens)
            continue
        inputs: list[ir.Value | None] = []
        for given in node.inputs:
            if given is not None and given not in made:
                array = constant_array(given)
                if array is None:
                    made[given] = tokens
                else:
                    wide = array.astype(np.float32) if given.dtype is not None and given.dtype.is_floating_point() else array
                    tensor = ir.Tensor(wide, name=f"constant_{len(initializers)}")
                    made[given] = ir.Value(
                        name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
                    )
                    initializers.append(made[given])
            inputs.append(None if given is None else made[given])
        copy = ir.node(node.op_type, inputs, attributes=dict(node.attributes), num_outputs=len(node.outputs))
        for index, output in enumerate(node.outputs):
            copy.outputs[index].name = f"value_{len(nodes)}_{index}"
            copy.outputs[index].type, copy.outputs[index].shape = ir.TensorType(ir.DataType.FLOAT), output.shape
            made[output] = copy.outputs[index]
        nodes.append(copy)
    graph = ir.Graph([tokens], [made.get(value, tokens)], nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name="part")
    return ir.Model(graph, ir_version=10), "tokens"
