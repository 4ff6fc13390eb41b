"""Small graphs with tensors of high rank, and what must hold after their ranks were lowered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgekit.graph.shapes import infer_shapes, static_shape
from edgekit.targets.coreml.rank import lower_ranks

RNG = np.random.default_rng(0)


def whole(*shape: int, low: int = -4) -> np.ndarray:
    """Whole numbers, whose sums and products are exact in any order."""
    return RNG.integers(low, 5, shape).astype(np.float32)


def node(op_type: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op_type, ["" if name == "_" else name for name in inputs.split()], outputs.split(), **attributes)


def build(
    nodes: Sequence[onnx.NodeProto], inputs: dict[str, np.ndarray], constants: dict[str, Any] | None = None, outputs: str = "y"
) -> onnx.ModelProto:
    """A model whose inputs and outputs of rank over 5 are flat outside and reshaped inside."""
    body, declared, initializers = list(nodes), [], [numpy_helper.from_array(np.asarray(a), name) for name, a in (constants or {}).items()]
    for name, array in inputs.items():
        flat = array.ndim > 5
        shape = (array.size,) if flat else array.shape
        declared.append(helper.make_tensor_value_info(f"{name}_in" if flat else name, helper.np_dtype_to_tensor_dtype(array.dtype), shape))
        if flat:
            initializers.append(numpy_helper.from_array(np.array(array.shape, np.int64), f"{name}_shape"))
            body.insert(0, node("Reshape", f"{name}_in {name}_shape", name))
    probe = helper.make_graph(body, "probe", declared, [onnx.ValueInfoProto(name=name) for name in outputs.split()], initializers)
    found = evaluate(helper.make_model(probe, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), inputs)
    known, results = [], []
    initializers.append(numpy_helper.from_array(np.array([-1], np.int64), "minus_one"))
    for name, array in zip(outputs.split(), found, strict=True):
        dtype = helper.np_dtype_to_tensor_dtype(array.dtype)
        if array.ndim > 5:
            known.append(helper.make_tensor_value_info(name, dtype, array.shape))
            body.append(node("Reshape", f"{name} minus_one", f"{name}_out"))
        flat = array.ndim > 5
        results.append(helper.make_tensor_value_info(f"{name}_out" if flat else name, dtype, (array.size,) if flat else array.shape))
    graph = helper.make_graph(body, "g", declared, results, initializers, value_info=known)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def lowered(model: onnx.ModelProto) -> tuple[onnx.ModelProto, ir.Model, int]:
    """The rewritten graph, of which everything is checked but the numbers."""
    graph = ir.from_proto(model)
    infer_shapes(graph)
    count = lower_ranks(graph)
    values = [
        *graph.graph.inputs,
        *graph.graph.initializers.values(),
        *(output for item in graph.graph for output in item.outputs if output.name),
    ]
    for value in values:
        shape = static_shape(value)
        assert len(shape if shape is not None else [0] * 9) <= 5, value
        assert value.dtype is not None, value
    names = [value.name for value in values]
    assert len(set(names)) == len(names)
    assert len({item.name for item in graph.graph}) == len(list(graph.graph))
    assert not any("_replaced" in (name or "") for name in names)
    proto = ir.to_proto(graph)
    onnx.checker.check_model(proto, full_check=True)  # what is declared is what ONNX infers
    return proto, graph, count


def evaluate(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    feeds = {value.name: inputs[value.name.removesuffix("_in")] for value in model.graph.input}
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    return list(ReferenceEvaluator(model).run(None, {name: array.reshape(shapes[name]) for name, array in feeds.items()}))


def check(model: onnx.ModelProto, inputs: dict[str, np.ndarray], tolerance: float = 0.0) -> tuple[ir.Model, int]:
    """Lowers the ranks and holds the result against the evaluation of what was before."""
    expected = evaluate(model, inputs)
    proto, graph, count = lowered(model)
    for got, wanted in zip(evaluate(proto, inputs), expected, strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        if tolerance:
            np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)
        else:
            np.testing.assert_array_equal(got, wanted)
    return graph, count


def operators(graph: ir.Model) -> list[str]:
    return [item.op_type for item in graph.graph]
