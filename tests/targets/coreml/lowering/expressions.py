"""Many small expressions in one graph, lowered and held against ONNX's reference together.

Saving and running a package is what takes time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekit.targets.coreml.convert import Converted
from tests.targets.coreml.lowered import check, lower


def graph(
    expressions: Sequence[str] | Mapping[str, str], inputs: dict[str, np.ndarray], opset: int = 23, **constants: Any
) -> onnx.ModelProto:
    """A model that gives the results of expressions in the syntax of ONNX's parser, under the names of the mapping or `y0`, `y1`, ...

    Names that begin with `_` are no outputs.
    """
    named = expressions if isinstance(expressions, Mapping) else {f"y{index}": text for index, text in enumerate(expressions)}
    nodes = [onnx.parser.parse_node(f"{names} = {text}") for names, text in named.items()]
    outputs = [onnx.ValueInfoProto(name=name.strip()) for names in named for name in names.split(",") if not name.strip().startswith("_")]
    declared = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape) for name, array in inputs.items()
    ]
    initializers = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", declared, outputs, initializers), opset_imports=[helper.make_opsetid("", opset)], ir_version=10
    )
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for output, known in zip(model.graph.output, inferred.graph.output, strict=True):
        output.CopyFrom(known)
    return model


def check_all(
    expressions: Sequence[str] | Mapping[str, str],
    inputs: dict[str, np.ndarray],
    *,
    opset: int = 23,
    half: bool = False,
    version: str = "",
    tolerance: float = 0.0,
    **constants: Any,
) -> Converted:
    """Lowers, runs and compares the graph of the expressions."""
    return check(graph(expressions, inputs, opset, **constants), inputs, half=half, version=version, tolerance=tolerance)


def lower_all(
    expressions: Sequence[str] | Mapping[str, str], inputs: dict[str, np.ndarray], opset: int = 23, version: str = "", **constants: Any
) -> Converted:
    """Lowers the graph of the expressions without running it."""
    return lower(graph(expressions, inputs, opset, **constants), version=version)


def operators(converted: Converted) -> list[str]:
    """The types of the operators of the program's main function."""
    function = converted.model.get_spec().mlProgram.functions["main"]
    return [operation.type for block in function.block_specializations.values() for operation in block.operations]


def values(*shape: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    """Normal float32 numbers."""
    return np.asarray(np.random.default_rng(seed).normal(0, scale, shape), dtype=np.float32)
