"""Operators of the domain `edgekit` in the interpreter: their own functions, their own gradients, and the two names of `edgekit.graph`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

import edgekit.graph
from edgekit.graph.interpreter import Interpreter
from edgekit.graph.operators import insert


def _signs() -> ir.Model:
    x = ir.Value(name="x", shape=ir.Shape([5]), type=ir.TensorType(ir.DataType.FLOAT))
    model = ir.Model(ir.Graph([x], [], nodes=[], opset_imports={"": 23}, name="signs"), ir_version=10)
    model.graph.outputs.append(insert(model, "Sign", [x]).outputs[0])
    return model


def test_sign_has_a_straight_through_gradient() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    (y,) = Interpreter(_signs())({"x": x}).values()
    assert y.tolist() == [-1, -1, 1, 1, 1]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


def test_the_package_gives_run_and_cost(tmp_path: Path) -> None:
    model = _signs()
    x = np.array([-2.0, -0.0, 0.0, 0.5, 2.0], np.float32)
    ir.save(model, tmp_path / "signs.onnx")
    (y,) = edgekit.graph.run(tmp_path / "signs.onnx", {"x": x}).values()
    np.testing.assert_array_equal(y, [-1, 1, 1, 1, 1])
    assert edgekit.graph.cost(model).parameters == 0
