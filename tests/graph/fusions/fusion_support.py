"""What the tests of fusions share: a fused graph is held against the graph before, in ONNX Runtime and in float64."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from edgekit.graph.canonicalize import STEPS
from edgekit.graph.shapes import infer_shapes

SCRIPT_OPSETS, DYNAMO_OPSETS = (11, 13, 15, 17), (18, 20, 23)
FUSIONS = ("merge_layout", "fuse_normalizations", "fuse_activations", "fuse_attention", "unify_linear")
EXPORTS = [("torchscript", opset) for opset in SCRIPT_OPSETS] + [("dynamo", opset) for opset in DYNAMO_OPSETS]


def random(*shape: int, seed: int = 0, mean: float = 0.7) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).normal(mean, 1.3, shape).astype(np.float32)


def graph(text: str, opset: int = 23, **initializers: np.ndarray) -> ir.Model:
    """The graph of `(inputs) => (outputs) { nodes }` as the fusions meet it; float arrays become float32."""
    proto = onnx.parser.parse_model(f'<ir_version: 11, opset_import: ["" : {opset}]> g {text}')
    for name, array in initializers.items():
        array = np.asarray(array)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32) if array.dtype == np.float64 else array, name))
    for info in proto.graph.output:
        if not info.type.tensor_type.shape.dim:  # `float y` says that nothing is declared
            info.type.tensor_type.ClearField("shape")
    model = ir.from_proto(proto)
    infer_shapes(model)
    return simplified(model)


def simplified(model: ir.Model) -> ir.Model:
    """Takes every step of the canonical form but the fusions."""
    for step in STEPS:
        if step.__name__ not in FUSIONS:
            step(model)
    infer_shapes(model)
    return model


def operators(model: ir.Model) -> dict[str, int]:
    return dict(Counter(node.op_type for node in model.graph))


def one(model: ir.Model, op_type: str) -> ir.Node:
    (node,) = [node for node in model.graph if node.op_type == op_type]
    return node


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def in_float64(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What the graph gives in float64, by ONNX's reference implementation."""
    proto = ir.to_proto(model)
    double, single = onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT
    for info in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if info.type.tensor_type.elem_type == single:
            info.type.tensor_type.elem_type = double
    for tensor in proto.graph.initializer:
        if tensor.data_type == single:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    wide = {name: array.astype(np.float64) if array.dtype == np.float32 else array for name, array in feeds.items()}
    return ReferenceEvaluator(proto).run(None, wide)


def feeds_of(model: ir.Model, seed: int = 1) -> dict[str, np.ndarray]:
    return {value.name: random(*value.shape, seed=seed) for value in model.graph.inputs}


def names(values) -> list[str]:
    return [value.name for value in values]


def check(fuse, model: ir.Model, expected: dict[str, int], count: int | None = None, tolerance: float = 1e-5, feeds=None) -> ir.Model:
    """Fuses, and sees that the operators are the expected ones, the numbers the same, and that a second time nothing happens."""
    feeds = feeds or feeds_of(model)
    floats = {value.dtype for value in model.graph.inputs} == {ir.DataType.FLOAT}
    before, outputs = run(model, feeds), names(model.graph.outputs)
    wide = in_float64(model, feeds) if floats else before
    made = fuse(model)
    assert operators(model) == expected
    assert made >= 1 if count is None else made == count
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert names(model.graph.outputs) == outputs
    everything = [node.name for node in model.graph] + [output.name for node in model.graph for output in node.outputs]
    assert len(set(names(model.graph))) == len(list(model.graph))
    assert all(everything)
    assert all(value.uses() or value.is_graph_output() for value in model.graph.initializers.values())
    for node in model.graph:
        assert all(output.shape is not None and output.dtype is not None for output in node.outputs)
    for old, new, exact in zip(before, run(model, feeds), wide, strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        scale = np.abs(exact.astype(np.float64)).max()
        assert np.abs(exact.astype(np.float64) - new).max() <= tolerance * scale
        assert np.abs(old.astype(np.float64) - new).max() <= tolerance * scale
    unchanged(fuse, model)
    return model


def unchanged(fuse, model: ir.Model) -> None:
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    assert fuse(model) == 0
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
