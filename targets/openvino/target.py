"""The target `openvino`: a legalized graph becomes `model.xml` and `model.bin`, which run on the CPU in a stated precision."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import onnx_ir as ir

from edgekit.contracts import Executable, Target
from edgekit.errors import LoweringError, MissingToolError, UsageError
from edgekit.graph.files import save_model
from edgekit.graph.shapes import infer_shapes


@dataclass(frozen=True)
class OpenVino(Target):
    """OpenVINO IR for the CPU.

    `fp32` and `bf16` keep float32 weights on disk, `fp16` stores them as float16. The precision is always stated to the plugin; on a CPU
    that lacks it the plugin falls back to float32, and `Executable.facts` says so.
    """

    name: ClassVar[str] = "openvino"
    requires: ClassVar[tuple[str, ...]] = ("openvino",)
    extra: ClassVar[str] = "openvino"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16", "bf16")

    def legalize(self, model: ir.Model) -> None:
        """Inlines functions (those of the domain `edgekit` too) and rewrites what OpenVINO would refuse or get wrong."""
        from edgekit.targets.openvino.legalize import legalize

        legalize(model)

    def lower(self, model: ir.Model, folder: Path) -> None:
        """Writes `model.xml` and `model.bin` into `folder`.

        Raises:
            UnsupportedOpError: OpenVINO does not know an operator, or would compute it wrongly.
            LoweringError: OpenVINO failed in another way.
            MissingToolError: The openvino package is not installed.
        """
        _require_openvino()
        import openvino as ov

        from edgekit.targets.openvino.convert import convert
        from edgekit.targets.openvino.refusals import refuse_wrong_operators

        infer_shapes(model)
        refuse_wrong_operators(model)
        # OpenVINO maps the weights of the temporary file; it must outlive the conversion and lie on the same disk as the result.
        with tempfile.TemporaryDirectory(dir=folder, prefix="onnx-") as temporary:
            path = Path(temporary) / "model.onnx"
            save_model(model, path)
            converted = convert(path, model)
            try:
                ov.save_model(converted, folder / "model.xml", compress_to_fp16=self.precision == "fp16")
            except Exception as error:  # the binding raises RuntimeError for everything
                raise LoweringError(
                    f"OpenVINO cannot write the model: {str(error).strip()[:400]}", where=str(folder), fix="check the free space"
                ) from error
            del converted

    def load(self, folder: Path, threads: int) -> Executable:
        """Compiles `folder/model.xml` for the CPU, to run on `threads` threads.

        Raises:
            UsageError: There is no such file, or `threads` is not positive.
            LoweringError: The file cannot be read or compiled.
            MissingToolError: The openvino package is not installed.
        """
        _require_openvino()
        from edgekit.targets.openvino.executable import OpenVinoExecutable

        path = folder / "model.xml"
        if not path.is_file() or not path.with_suffix(".bin").is_file():
            raise UsageError("model.xml or model.bin is missing", where=str(folder), fix="compile the model again with --target openvino")
        if threads < 1:
            raise UsageError(f"{threads} threads cannot run a model", fix="give a positive number of threads")
        return OpenVinoExecutable(path, self.precision, threads)

    def native_operators(self, folder: Path) -> dict[str, int]:
        """The layers of `model.xml` by type, without constants, inputs and outputs; those of nested bodies count too.

        Raises:
            LoweringError: The file cannot be read.
        """
        path = folder / "model.xml"
        try:
            kinds = Counter(layer.get("type", "") for layer in ElementTree.parse(path).iter("layer"))
        except (OSError, ElementTree.ParseError) as error:
            raise LoweringError(f"model.xml cannot be read: {error}", where=str(path), fix="compile the model again") from error
        return {kind: number for kind, number in kinds.most_common() if kind not in ("Const", "Parameter", "Result")}


def _require_openvino() -> None:
    try:
        importlib.import_module("openvino")
    except ImportError as error:
        raise MissingToolError(
            f"the target 'openvino' needs the package openvino: {error}", fix="pip install -c constraints.txt 'edgekit[openvino]'"
        ) from error
