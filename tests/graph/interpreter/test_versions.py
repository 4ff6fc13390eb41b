"""Operators whose meaning changed between opsets, at the older ones, against ONNX Runtime."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.graph.interpreter import run

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 4, 5, 6)).astype(np.float32)


def floats(*shape: int) -> np.ndarray:
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


CASES: dict[str, tuple[int, str, list[np.ndarray], dict[str, Any], int]] = {
    # name: opset, operator, inputs, attributes, outputs
    "softmax-of-matrix": (11, "Softmax", [X], {"axis": 1}, 1),
    "softmax-default-axis": (11, "Softmax", [X], {}, 1),
    "softmax-of-last-axis": (11, "Softmax", [X], {"axis": -1}, 1),
    "log-softmax-of-matrix": (11, "LogSoftmax", [X], {"axis": 2}, 1),
    "hardmax-of-matrix": (11, "Hardmax", [X], {"axis": 2}, 1),
    "clip-by-attributes": (6, "Clip", [X], {"min": -0.5, "max": 0.25}, 1),
    "pad-by-attributes": (10, "Pad", [X], {"pads": [0, 0, 1, 2, 0, 0, 2, 1], "mode": "reflect"}, 1),
    "pad-negative": (10, "Pad", [X], {"pads": [0, 0, 1, -2, 0, 0, 2, -1], "value": 3.0}, 1),
    "slice-by-attributes": (9, "Slice", [X], {"starts": [1, -3], "ends": [4, 1000], "axes": [2, 3]}, 1),
    "slice-backwards": (13, "Slice", [X, ints(-1, 4), ints(-1000, 0), ints(3, 2), ints(-2, -1)], {}, 1),
    "top-k-by-attribute": (9, "TopK", [X], {"k": 2, "axis": 2}, 2),
    "top-k-10": (10, "TopK", [X, ints(3)], {"axis": 1}, 2),
    "split-by-attribute": (11, "Split", [X], {"axis": 3, "split": [1, 3, 2]}, 3),
    "split-equal": (13, "Split", [X], {"axis": 1}, 2),
    "split-uneven": (18, "Split", [X], {"axis": 2, "num_outputs": 2}, 2),
    "squeeze-by-attribute": (11, "Squeeze", [X[:1, :, :1]], {"axes": [0, 2]}, 1),
    "unsqueeze-by-attribute": (11, "Unsqueeze", [X], {"axes": [0, -1]}, 1),
    "unsqueeze-unsorted": (13, "Unsqueeze", [X, ints(-1, 1)], {}, 1),
    "reduce-by-attribute": (11, "ReduceSum", [X], {"axes": [1, -1], "keepdims": 0}, 1),
    "reduce-mean-by-attribute": (13, "ReduceMean", [X], {"axes": [2]}, 1),
    "reduce-noop": (18, "ReduceMax", [X], {"noop_with_empty_axes": 1}, 1),
    "upsample-by-attribute": (7, "Upsample", [X], {"scales": [1.0, 1.0, 2.0, 3.0]}, 1),
    "upsample-linear": (9, "Upsample", [X, np.array([1, 1, 2, 3], np.float32)], {"mode": "linear"}, 1),
    "resize-10": (10, "Resize", [X, np.array([1, 1, 2, 0.5], np.float32)], {"mode": "nearest"}, 1),
    "dropout-7": (7, "Dropout", [X], {"ratio": 0.3}, 1),
    "batch-norm-7": (7, "BatchNormalization", [X, floats(4), floats(4), floats(4), floats(4)], {"epsilon": 0.1}, 1),
    "batch-norm-9": (9, "BatchNormalization", [X, floats(4), floats(4), floats(4), floats(4)], {}, 1),
    "group-norm-21": (21, "GroupNormalization", [X, floats(4), floats(4)], {"num_groups": 2}, 1),
    "one-hot-11": (11, "OneHot", [ints(-1, 2, 7), ints(4), np.array([0, 1], np.float32)], {}, 1),
    "average-pool-ceil": (10, "AveragePool", [X], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 0, 1]}, 1),
    "max-pool-ceil": (12, "MaxPool", [X], {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [0, 1, 0, 1]}, 2),
    "max-pool-dilated": (12, "MaxPool", [X], {"kernel_shape": [2, 2], "dilations": [2, 3], "storage_order": 1}, 2),
    "conv-same-lower": (11, "Conv", [X, floats(6, 2, 3, 2)], {"auto_pad": "SAME_LOWER", "group": 2, "strides": [2, 2]}, 1),
    "conv-transpose-shape": (11, "ConvTranspose", [X, floats(4, 3, 3, 3)], {"output_shape": [12, 13], "strides": [2, 2]}, 1),
    "conv-transpose-extra": (
        *(11, "ConvTranspose", [X, floats(4, 3, 3, 3), floats(6)]),
        *({"group": 2, "strides": [2, 3], "output_padding": [1, 2]}, 1),
    ),
    "depth-to-space-1": (1, "DepthToSpace", [X], {"blocksize": 2}, 1),
    "gather-negative": (13, "Gather", [X, ints(-1, 0)], {"axis": 2}, 1),
    "mod-negative": (13, "Mod", [ints(-7, 7, -7), ints(3, -3, -3)], {}, 1),
    "div-negative": (14, "Div", [ints(-7, 7, -7), ints(2, -2, -2)], {}, 1),
    "lrn": (13, "LRN", [X], {"size": 3, "alpha": 0.2}, 1),
    "cumsum": (14, "CumSum", [X, np.array(2, np.int64)], {"exclusive": 1, "reverse": 1}, 1),
    "instance-norm": (6, "InstanceNormalization", [X, floats(4), floats(4)], {}, 1),
    "scatter-9": (9, "Scatter", [X[0, 0], np.zeros((1, 6), np.int64), floats(1, 6)], {"axis": 0}, 1),
    "prelu-7": (7, "PRelu", [X, floats(4, 1, 1)], {}, 1),
    "flatten-0": (9, "Flatten", [X], {"axis": 0}, 1),
    "lp-pool": (18, "LpPool", [X], {"kernel_shape": [2, 2], "p": 3}, 1),
    "shape-part": (15, "Shape", [X], {"start": 1, "end": -1}, 1),
    "gemm-7": (7, "Gemm", [X[0, 0], floats(6, 3), floats(3)], {"alpha": 0.5, "beta": 2.0}, 1),
    "arg-max-last": (12, "ArgMax", [np.sign(X)], {"axis": 2, "select_last_index": 1}, 1),
    "arg-min": (11, "ArgMin", [np.sign(X)], {"axis": -1, "keepdims": 0}, 1),
    "pow-integers": (15, "Pow", [ints(2, 3), np.array([0.5, 2.0], np.float32)], {}, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_matches_onnx_runtime(name: str) -> None:
    opset, operator, inputs, attributes, outputs = CASES[name]
    names = [f"x{index}" for index in range(len(inputs))]
    results = [f"y{index}" for index in range(outputs)]
    node = helper.make_node(operator, names, results, name="node", **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(names[0], helper.np_dtype_to_tensor_dtype(inputs[0].dtype), inputs[0].shape)],
        [helper.make_tensor_value_info(result, TensorProto.UNDEFINED, None) for result in results],
        [numpy_helper.from_array(array, name) for name, array in zip(names[1:], inputs[1:], strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    for output in model.graph.output:
        output.ClearField("type")
    expected = onnxruntime.InferenceSession(
        onnx.shape_inference.infer_shapes(model).SerializeToString(), providers=["CPUExecutionProvider"]
    ).run(None, {names[0]: inputs[0]})
    got = run(onnx_ir_model(model), {names[0]: inputs[0]})
    for result, want in zip(results, expected, strict=True):
        assert got[result].dtype == want.dtype
        np.testing.assert_allclose(got[result], want, rtol=1e-5, atol=1e-6)


def onnx_ir_model(model: onnx.ModelProto) -> Any:
    import onnx_ir as ir

    return ir.from_proto(model)
