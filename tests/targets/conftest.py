"""Small graphs for the target tests, and the two ways to run them: through a target, and through plain ONNX Runtime as the reference."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper


def build(nodes, inputs, outputs=("y",), constants=None, opset=23, ir_version=10, functions=(), domains=()):
    """An ONNX model; `inputs` are arrays that give dtype and shape, output types are inferred unless given as (dtype, shape)."""
    declared = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in inputs.items()]
    results = [onnx.ValueInfoProto(name=name) for name in outputs]
    initializers = [numpy_helper.from_array(np.asarray(v), k) for k, v in (constants or {}).items()]
    graph = helper.make_graph(nodes, "g", declared, results, initializers)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))
    inferred = onnx.shape_inference.infer_shapes(model)
    for result, known in zip(model.graph.output, inferred.graph.output, strict=True):
        result.CopyFrom(known)
    return model


def reference(model, inputs):
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))


@pytest.fixture
def graphs():
    class Graphs:
        pass

    Graphs.build, Graphs.reference = staticmethod(build), staticmethod(reference)
    return Graphs


@pytest.fixture
def through(tmp_path):
    """Legalizes, lowers and loads a model; returns the executable."""

    def run(target, model, threads=1):
        graph = ir.from_proto(model)
        target.legalize(graph)
        target.lower(graph, tmp_path)
        return target.load(tmp_path, threads)

    return run
