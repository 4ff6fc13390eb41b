"""The OpenVINO target: writes `model.xml` and `model.bin` and runs them on the CPU. The openvino package is imported on first use."""

from edgekit.targets.openvino.target import OpenVino

__all__ = ["OpenVino"]
