"""Folding of the operators that onnx's reference implementation computes slowly or not at all: by the interpreter, on torch.

A resized position embedding, for example: a Resize of constants that some targets refuse, and whose loops in Python take seconds. What such
a node makes is bounded before it runs, by ONNX's own shape inference on the node alone and not by what the graph declares; operators that
may need much more memory on the way than they give back (pooling with huge kernels, control flow) and those that are random or say
how a weight is stored (quantization) are not here, and stay nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

WORK_LIMIT = 1 << 28
"""Multiplications, at most, that one node may take."""
_SMALL_BYTES = 1 << 12

_ELEMENTWISE = (
    *("Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Celu", "Cosh", "Elu", "Erf", "Gelu", "Hardmax", "HardSigmoid", "HardSwish"),
    *("LeakyRelu", "LogSoftmax", "LpNormalization", "Mish", "PRelu", "Selu", "Shrink", "Sinh", "Softplus", "Softsign", "Swish"),
    *("ThresholdedRelu",),
)
_NORMALIZATIONS = ("BatchNormalization", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
_OTHERS = (
    *("DepthToSpace", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceSumSquare", "Resize", "ReverseSequence"),
    *("SpaceToDepth", "TopK"),
)
_PRODUCTS = ("Conv", "Einsum", "Gemm")
GENERAL = frozenset({*_ELEMENTWISE, *_NORMALIZATIONS, *_OTHERS, *_PRODUCTS})
"""The operators that are folded so."""


def output_elements(node: ir.Node, opset: int) -> int | None:
    """Returns how many elements a node of `GENERAL` with constant inputs makes; None when that is not known or takes too much work."""
    shapes = _output_shapes(node, opset)
    if shapes is None:
        return None
    elements = sum(math.prod(shape) for shape in shapes)
    sizes = [value.const_value.size for value in node.inputs if value is not None and value.const_value is not None]
    return elements if _work(node, elements, sizes) <= WORK_LIMIT else None


def _work(node: ir.Node, elements: int, sizes: Sequence[int]) -> int:
    if node.op_type == "Einsum":
        return math.prod(sizes)
    if node.op_type == "Gemm":
        return elements * max(sizes, default=1)
    if node.op_type == "Conv":
        image, kernel = (
            value.const_value.shape.numpy() if value is not None and value.const_value is not None else () for value in node.inputs[:2]
        )
        padded = image[1] * math.prod(size + sum(abs(pad) for pad in node.attributes.get_ints("pads", ())) for size in image[2:])
        return max(padded * image[0], elements * math.prod(kernel[1:]))
    return elements + 8 * sum(sizes)


def _output_shapes(node: ir.Node, opset: int) -> list[tuple[int, ...]] | None:
    """Infers the shapes of a node's outputs from its constants, the small ones of which (sizes, axes) are read."""
    proto = onnx.ModelProto(ir_version=10, opset_import=[onnx.helper.make_opsetid("", opset)])
    proto.graph.name = "alone"
    names = {}
    for index, value in enumerate(node.inputs):
        if value is None or value in names or value.const_value is None:
            continue
        tensor = value.const_value
        names[value] = name = f"input_{index}"
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, tensor.dtype.value, list(tensor.shape.numpy())))
        if tensor.nbytes <= _SMALL_BYTES:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), name))
    outputs = [f"output_{index}" if output.name else "" for index, output in enumerate(node.outputs)]
    alone = onnx.NodeProto(op_type=node.op_type, input=["" if value is None else names[value] for value in node.inputs], output=outputs)
    alone.attribute.extend(ir.to_proto(attr) for attr in node.attributes.values())
    proto.graph.node.append(alone)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    known = {info.name: info.type.tensor_type for info in inferred.graph.value_info}
    shapes = []
    for name in filter(None, outputs):
        if name not in known or not known[name].HasField("shape"):
            return None
        dims = known[name].shape.dim
        if not all(dim.HasField("dim_value") and dim.dim_value >= 0 for dim in dims):
            return None
        shapes.append(tuple(dim.dim_value for dim in dims))
    return shapes


def evaluate(node: ir.Node, opset: int) -> list[np.ndarray]:
    """Computes a node of `GENERAL` whose inputs are constants; an array per output.

    Raises:
        EdgekitError: The interpreter refuses the node.
    """
    from edgekit.graph.interpreter import run

    values = {
        value: ir.Value(name=f"input_{index}", shape=ir.Shape(value.const_value.shape.numpy()), type=ir.TensorType(value.const_value.dtype),
                        const_value=value.const_value)
        for index, value in enumerate(node.inputs) if value is not None and value.const_value is not None
    }  # fmt: skip
    inputs = [None if value is None else values[value] for value in node.inputs]
    outputs = [ir.Value(name=f"output_{index}") for index, _ in enumerate(node.outputs)]
    alone = ir.Node("", node.op_type, inputs, attributes=list(node.attributes.values()), outputs=outputs, name="folded")
    graph = ir.Graph([], outputs, nodes=[alone], initializers=list(values.values()), opset_imports={"": opset}, name="folded")
    results = run(ir.Model(graph, ir_version=11), {})
    return [np.asarray(results[f"output_{index}"]) for index, _ in enumerate(node.outputs)]
