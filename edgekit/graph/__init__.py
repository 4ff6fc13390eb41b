"""Helpers over onnx_ir graphs that passes, targets and the driver share."""
