"""The target `onnxruntime`: writes the graph as ONNX and runs it on ONNX Runtime's CPU provider in float32."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir

from edgekit.contracts import Executable, Target
from edgekit.errors import EdgekitError, LoweringError, MissingToolError, UnsupportedOpError, UsageError
from edgekit.graph.files import save_model

if TYPE_CHECKING:
    from edgekit.targets.onnxruntime.executable import OnnxRuntimeExecutable

_SATURATING = ("MatMulInteger", "QLinearMatMul")


@dataclass(frozen=True)
class OnnxRuntime(Target):
    """ONNX as it is, optimized by ONNX Runtime when it is loaded."""

    name: ClassVar[str] = "onnxruntime"
    requires: ClassVar[tuple[str, ...]] = ("onnxruntime",)
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)

    def lower(self, model: ir.Model, folder: Path) -> None:
        """Writes `model.onnx` (and `model.onnx.data` when the weights are large) into `folder`, and loads it once to see that it runs.

        An IR version that the runtime does not read yet is lowered: it concerns the file's framing, not the operators.

        Raises:
            UnsupportedOpError: The runtime has no kernel for an operator, or would compute it wrongly on some CPUs.
            LoweringError: The runtime refuses the graph for another reason.
            MissingToolError: The onnxruntime package is not installed.
        """
        _require_onnxruntime()
        _refuse_saturating(model)
        path = folder / "model.onnx"
        written = save_model(model, path)
        try:
            try:
                _open(path, 1, model)
            except _IrVersionError as error:
                before, model.ir_version = model.ir_version, error.newest
                try:
                    written = save_model(model, path)
                finally:
                    model.ir_version = before
                _open(path, 1, model)
        except EdgekitError:
            for file in written:
                file.unlink(missing_ok=True)
            raise

    def load(self, folder: Path, threads: int) -> Executable:
        """Loads `folder/model.onnx`, to run on `threads` threads.

        Raises:
            UsageError: There is no such file, or `threads` is not positive.
            LoweringError: The file cannot be loaded.
            MissingToolError: The onnxruntime package is not installed.
        """
        _require_onnxruntime()
        path = folder / "model.onnx"
        if not path.is_file():
            raise UsageError("model.onnx is missing", where=str(folder), fix="compile the model again with --target onnxruntime")
        if threads < 1:
            raise UsageError(f"{threads} threads cannot run a model", fix="give a positive number of threads")
        return _open(path, threads, None)

    def native_operators(self, folder: Path) -> dict[str, int]:
        """The nodes of `model.onnx` by operator; ONNX Runtime fuses some of them when it loads the file.

        Raises:
            LoweringError: The file cannot be read.
        """
        path = folder / "model.onnx"
        try:
            nodes = ir.load(path).graph.all_nodes()
        except Exception as error:  # onnx_ir and protobuf raise several kinds
            raise LoweringError(f"model.onnx cannot be read: {error}", where=str(path), fix="compile the model again") from error
        return dict(Counter(f"{node.domain}.{node.op_type}" if node.domain else node.op_type for node in nodes).most_common())


class _IrVersionError(EdgekitError):
    """The runtime reads IR versions up to `newest` only."""

    def __init__(self, newest: int) -> None:
        super().__init__(f"ONNX Runtime reads IR versions up to {newest}", fix="save the model with a lower ir_version")
        self.newest = newest


def _open(path: Path, threads: int, model: ir.Model | None) -> OnnxRuntimeExecutable:
    from edgekit.targets.onnxruntime.executable import OnnxRuntimeExecutable

    try:
        return OnnxRuntimeExecutable(path, threads)
    except EdgekitError:
        raise
    except Exception as error:  # ONNX Runtime's exception classes share no base
        raise _explain(str(error), path, model) from error


def _explain(message: str, path: Path, model: ir.Model | None) -> EdgekitError:
    """Makes an error of edgekit from a message of ONNX Runtime."""
    newest = re.search(r"max supported IR version: (\d+)", message)
    if newest:
        return _IrVersionError(int(newest[1]))
    opset = re.search(r"Opset (\d+) is under development.*official support for domain (\S+) is till opset (\d+)", message, re.DOTALL)
    if opset:
        return UnsupportedOpError(
            f"ONNX Runtime reads opset {opset[3]} of {opset[2]} at most; this graph is of opset {opset[1]}",
            where=str(path.name),
            fix=f"export the model with opset_version={opset[3]} or lower",
        )
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", message.strip())
    kernel = (
        re.search(r"implementation for ([\w.:]+)\(\d+\)", text)
        or re.search(r"Failed to find kernel for ([\w.:]+)\(\d+\)", text)
        or re.search(r"Fatal error: ([\w.:]*?)\(-?\d+\) is not a registered function/op", text)
        or re.search(r"No Op registered for (\w+)", text)
    )
    if kernel is None:
        return LoweringError(
            f"ONNX Runtime cannot load the graph: {text.splitlines()[0][:400] if text else 'no message'}",
            where=str(path.name),
            fix="check the model with onnx.checker",
        )
    op_type = re.split(r"[:.]", kernel[1])[-1]
    nodes = [] if model is None else [node for node in model.graph.all_nodes() if node.op_type == op_type]
    return UnsupportedOpError(
        f"ONNX Runtime has no CPU kernel for {kernel[1].lstrip(':')} in the types used: {text.splitlines()[0][:300]}",
        where="; ".join(f"node '{node.name or node.outputs[0].name}' ({op_type})" for node in nodes[:5]) or None,
        fix="express it with other operators",
    )


def _refuse_saturating(model: ir.Model) -> None:
    """Refuses integer products of uint8 by int8: without VNNI the kernels saturate at 16 bits, and no session option prevents it here."""
    for node in model.graph.all_nodes():
        if node.op_type not in _SATURATING or node.domain not in ("", "ai.onnx"):
            continue
        second = node.inputs[1 if node.op_type == "MatMulInteger" else 3]
        first = node.inputs[0]
        if first is None or second is None or first.dtype != ir.DataType.UINT8 or second.dtype not in (ir.DataType.INT8, None):
            continue
        raise UnsupportedOpError(
            f"ONNX Runtime's {node.op_type} of uint8 by int8 saturates on CPUs without VNNI",
            where=f"node '{node.name or node.outputs[0].name}' ({node.op_type})",
            fix="write it as DequantizeLinear, MatMul, QuantizeLinear, which are computed exactly",
        )


def _require_onnxruntime() -> None:
    try:
        import onnxruntime  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise MissingToolError(
            f"the target 'onnxruntime' needs the package onnxruntime: {error}", fix="pip install -c constraints.txt onnxruntime"
        ) from error
