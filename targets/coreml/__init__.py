"""The Core ML target: writes `model.mlpackage` from ONNX, and runs packages, anybody's, on any system.

coremltools is imported on first use.
"""

from edgekit.targets.coreml.target import CoreMl

__all__ = ["CoreMl", "predict"]


def __getattr__(name: str) -> object:
    if name == "predict":  # PyTorch is imported on first use
        from edgekit.targets.coreml.reference.evaluator import predict

        return predict
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
