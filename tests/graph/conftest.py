"""Fixtures that build small graphs and run them in ONNX Runtime, the independent reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper


@pytest.fixture
def make():
    """Returns a function that builds a ModelProto; `inputs` and `outputs` map names to arrays or to (dtype, shape)."""

    def build(nodes, inputs, outputs=("y",), initializers=None, opset=23, ir_version=8, functions=(), **kwargs) -> onnx.ModelProto:
        def info(name, spec):
            if isinstance(spec, np.ndarray):
                spec = (helper.np_dtype_to_tensor_dtype(spec.dtype), spec.shape)
            return helper.make_tensor_value_info(name, *spec)

        outputs = outputs if isinstance(outputs, dict) else dict.fromkeys(outputs, (onnx.TensorProto.FLOAT, None))
        graph = helper.make_graph(
            nodes,
            "graph",
            [info(*item) for item in inputs.items()],
            [info(*item) for item in outputs.items()],
            [numpy_helper.from_array(array, name) for name, array in (initializers or {}).items()],
            **kwargs,
        )
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(f.domain, 1) for f in functions)]
        return helper.make_model(graph, opset_imports=imports, ir_version=ir_version, functions=list(functions))

    return build


@pytest.fixture
def run():
    """Returns a function that runs an ir.Model or ModelProto in ONNX Runtime without its optimizations."""
    import onnxruntime

    def execute(model, feeds, outputs=None):
        proto = model if isinstance(model, onnx.ModelProto) else ir.to_proto(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(outputs, feeds)

    return execute


@pytest.fixture
def light_nets() -> dict[str, Path]:
    """The nine networks of 2017 to 2019 inside the onnx package, by name."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    return {path.stem.removeprefix("light_"): path for path in sorted(folder.glob("*.onnx"))}
