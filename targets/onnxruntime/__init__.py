"""The ONNX Runtime target: the reference that other targets are compared with. The onnxruntime package is imported on first use."""

from edgekit.targets.onnxruntime.target import OnnxRuntime

__all__ = ["OnnxRuntime"]
