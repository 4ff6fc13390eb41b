"""Runs an OpenVINO model on the CPU with every precision setting stated, and reports what the plugin really does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit.contracts import Arrays, Executable
from edgekit.errors import LoweringError, UsageError
from edgekit.graph.feeds import check_feeds
from edgekit.targets.openvino.convert import INTERFACE
from edgekit.targets.openvino.refusals import fits_int32

if TYPE_CHECKING:
    import openvino as ov

_HINTS = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
_PRECISIONS = {hint: name for name, hint in _HINTS.items()}
_EXACT_INT8 = ("DL Boost", "AMX", "AVX10", "AVX 10")
"""Parts of the plugin's name of an x86 instruction set that sums 8-bit products in 32 bits; older ones saturate at 16."""


def settings(precision: str, threads: int) -> dict[str, Any]:
    """Properties of the CPU plugin for one model at a time, with no precision left to its defaults.

    Defaults in OpenVINO 2026.4: bf16 or f16 wherever the CPU has it, activations of compressed matrix products quantized to 8 bits in
    groups of 32, an 8-bit KV cache.
    """
    hint = _HINTS[precision]
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "EXECUTION_MODE_HINT": "ACCURACY" if precision == "fp32" else "PERFORMANCE",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        "KV_CACHE_PRECISION": hint,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
    }


class OpenVinoExecutable(Executable):
    """A compiled model. Inputs and outputs bear the ONNX names; outputs are copies that stay valid after the next run."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        """Compiles `path` (model.xml) for the CPU.

        Raises:
            LoweringError: The file cannot be read or compiled.
        """
        import openvino as ov

        core = ov.Core()
        config = settings(precision, threads)
        try:
            model = core.read_model(path)
            compiled = core.compile_model(model, "CPU", config)
            int8 = ""
            if any(op.get_type_name() == "FakeQuantize" for op in model.get_ops()):
                int8 = "8-bit"
                if not _sums_int8_exactly(compiled):
                    compiled = core.compile_model(model, "CPU", {**config, "LP_TRANSFORMS_MODE": False})
                    int8 = "in floating point: 8-bit products saturate on this CPU"
        except Exception as error:  # the binding raises RuntimeError for everything
            raise LoweringError(
                f"OpenVINO cannot load the model: {str(error).strip()[:400]}", where=str(path), fix="compile the model again"
            ) from error
        self.facts = _facts(compiled, precision, int8, model)
        self._request = compiled.create_infer_request()
        interface = json.loads(model.get_rt_info(INTERFACE).astype(str))
        self._inputs = {name: index for index, name in enumerate(interface["inputs"])}
        self._outputs = {name: index for index, name in enumerate(interface["outputs"])}
        self._declared = {name: _declared(port) for name, port in zip(interface["inputs"], compiled.inputs, strict=True)}
        self._wide = [name for name, (dtype, _) in self._declared.items() if dtype in (np.int64, np.uint64, np.uint32)]

    def run(self, inputs: Arrays) -> Arrays:
        """Runs the model once.

        Raises:
            UsageError: An input is missing, unknown, of another dtype or shape, or holds an integer beyond 32 bits (in which the CPU
                plugin computes all integers).
        """
        check_feeds(self._declared, inputs)
        for name in self._wide:
            if not fits_int32(inputs[name]):
                raise UsageError(
                    f"input '{name}' holds integers beyond 32 bits, in which OpenVINO's CPU plugin computes",
                    where=f"input '{name}'",
                    fix="keep the values within int32, or use the target onnxruntime",
                )
        feeds = {self._inputs[name]: np.asarray(array, order="C") for name, array in inputs.items()}
        results = self._request.infer(feeds)
        return {name: np.array(results[index], copy=True) for name, index in self._outputs.items()}


def _declared(port: ov.ConstOutput) -> tuple[np.dtype[Any], tuple[int | None, ...]]:
    shape = tuple(dim.get_length() if dim.is_static else None for dim in port.get_partial_shape())
    return np.dtype(port.get_element_type().to_dtype()), shape


def _sums_int8_exactly(compiled: ov.CompiledModel) -> bool:
    isa = _isa(compiled)
    return "Intel" not in isa or any(part in isa for part in _EXACT_INT8)


def _isa(compiled: ov.CompiledModel) -> str:
    requirements: str = compiled.get_property("RUNTIME_REQUIREMENTS")
    return next((part.removeprefix("isa=") for part in requirements.split(";") if part.startswith("isa=")), "unknown")


def _facts(compiled: ov.CompiledModel, asked: str, int8: str, model: ov.Model) -> dict[str, str]:
    """What the plugin made of the request.

    The precision is the one that the compiled model reads back: the plugin puts float32 there where the CPU lacks the one asked for.
    The `runtimePrecision` of single operators is no measure of it, since an operator with compressed weights gives that of its weights.
    """
    hint: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    facts = {"asked_precision": asked, "executed_precision": _PRECISIONS.get(hint, hint), "instruction_set": _isa(compiled)}
    if asked == "fp16":
        facts["weights_precision"] = "fp16"
    if int8:
        facts["quantized_operators"] = int8
    if any(port.get_element_type().get_type_name() == "f64" for op in model.get_ops() for port in op.outputs()):
        facts["float64"] = "executed as float32"
    return facts
