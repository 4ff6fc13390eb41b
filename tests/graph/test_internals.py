"""`expose_internals`: what is written out in the place of a whole operator computes the same, and beside it changes nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from edgekit.graph.internals import expose_internals
from edgekit.graph.interpreter import run
from edgekit.graph.shapes import infer_shapes

CASES = {
    "LayerNormalization": "y = LayerNormalization<axis=-2, epsilon=1e-3>(x, s, b)",
    "RMSNormalization": "y = RMSNormalization<epsilon=1e-3>(x, v)",
    "InstanceNormalization": "y = InstanceNormalization(x, c, d)",
    "GroupNormalization": "y = GroupNormalization<num_groups=2>(x, c, d)",
    "LpNormalization": "y = LpNormalization<axis=1>(x)",
    "ReduceMean": "y = ReduceMean<keepdims=0>(x, axes)",
    "GlobalAveragePool": "y = GlobalAveragePool(x)",
    "ReduceL2": "y = ReduceL2(x, axes)",
    "ReduceSumSquare": "y = ReduceSumSquare<keepdims=0>(x)",
    "Softmax": "y = Softmax<axis=2>(x)",
    "Softplus": "y = Softplus(x)",
    "Mish": "y = Mish(x)",
    "Gelu": 'y = Gelu<approximate="tanh">(x)',
}


def graph(body: str) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]> g (float[2,4,5,6] x) => (float[a,b,c,d] y) {{ {body} }}')
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    rng = np.random.default_rng(0)
    arrays = {"s": rng.normal(size=(5, 6)), "b": rng.normal(size=(5, 6)), "v": rng.normal(size=6), "c": rng.normal(size=4)}
    arrays |= {"d": rng.normal(size=4)}
    for name, array in [*((n, a.astype(np.float32)) for n, a in arrays.items()), ("axes", np.array([1, -1]))]:
        if name in body.replace("axis", "").split("(")[1]:
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    proto.graph.node[0].name = "whole"
    model = ir.from_proto(proto)
    infer_shapes(model)
    return model


@pytest.mark.parametrize("operator", CASES)
def test_written_out_operators_compute_the_same(operator):
    model = graph(CASES[operator])
    feeds = {"x": np.random.default_rng(1).normal(0.5, 2, (2, 4, 5, 6)).astype(np.float32)}
    reference = run(model, feeds, dtype="float64")["y"]
    replaced, _ = expose_internals(model, replace=True)
    assert operator not in [node.op_type for node in replaced.graph]
    np.testing.assert_allclose(run(replaced, feeds, dtype="float64")["y"], reference, rtol=1e-6, atol=1e-7)
    beside, found = expose_internals(model)
    assert operator in [node.op_type for node in beside.graph]
    assert {item.node for item in found.values()} == {"whole"}
    np.testing.assert_array_equal(run(beside, feeds)["y"], run(model, feeds)["y"])
    assert [node.op_type for node in model.graph] == [operator]


def test_squares_of_a_layer_norm_are_seen_by_name():
    model = graph("y = LayerNormalization(x, v)")
    exposed, found = expose_internals(model)
    seen = {}
    x = np.random.default_rng(2).normal(0, 300, (2, 4, 5, 6)).astype(np.float32)
    run(exposed, {"x": x}, hooks=lambda name, tensor: seen.update({name: tensor.numpy()}))
    centred = x - x.mean(-1, keepdims=True)
    np.testing.assert_allclose(seen["y/square"], centred**2, rtol=1e-4)
    np.testing.assert_allclose(seen["y/sum_of_squares"], (centred**2).sum(-1, keepdims=True), rtol=1e-4)
    assert found["y/square"].label == "square"


def test_operators_that_cannot_be_written_out_stay():
    model = graph('y = Gelu<approximate="none">(x)')
    exposed, found = expose_internals(model, replace=True)
    assert ([node.op_type for node in exposed.graph], found) == (["Gelu"], {})
