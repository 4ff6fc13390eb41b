"""Runs an ONNX file on ONNX Runtime's CPU provider, with no precision lowered unasked."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekit.contracts import Arrays, Executable
from edgekit.graph.feeds import check_feeds

_DTYPES = {
    "float": "float32", "float16": "float16", "double": "float64", "bool": "bool",
    "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64",
    "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
}  # fmt: skip

_ENTRIES = {
    # By default products with dequantized weights quantize their activations to 8 bits (level 4); 1 is float32.
    "session.qdq_matmulnbits_accuracy_level": "1",
    # By default 8-bit products saturate at 16 bits on x86 CPUs without VNNI.
    "session.x64quantprecision": "1",
}


class OnnxRuntimeExecutable(Executable):
    """A session of ONNX Runtime, sequential, with all graph optimizations on (nothing of them is written to disk)."""

    def __init__(self, path: Path, threads: int) -> None:
        """Opens `path` (model.onnx); exceptions are those of ONNX Runtime."""
        import onnxruntime as ort  # type: ignore[import-untyped]

        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4
        for key, value in _ENTRIES.items():
            options.add_session_config_entry(key, value)
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._declared = {
            value.name: (_dtype(value.type), tuple(dim if isinstance(dim, int) else None for dim in value.shape))
            for value in self._session.get_inputs()
        }
        self._outputs = [value.name for value in self._session.get_outputs()]
        self.facts = {"provider": self._session.get_providers()[0]}  # each operator executes in the types that the graph gives it

    def run(self, inputs: Arrays) -> Arrays:
        """Runs the model once.

        Raises:
            UsageError: An input is missing, unknown, or of another dtype or shape.
        """
        check_feeds(self._declared, inputs)
        return dict(zip(self._outputs, self._session.run(self._outputs, inputs), strict=True))


def _dtype(name: str) -> np.dtype[np.generic]:
    """The numpy dtype of ONNX Runtime's `tensor(float)`."""
    inner = name.removeprefix("tensor(").removesuffix(")")
    if inner not in _DTYPES:
        raise TypeError(f"inputs of type {name} cannot be fed as numpy arrays")
    return np.dtype(_DTYPES[inner])
