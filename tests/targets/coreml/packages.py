"""Small packages written by coremltools' own builder, not by edgekit's lowering."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


def save(program: Any, path: Path, version: str, **options: Any) -> Path:
    """Saves a MIL program as it is."""
    import coremltools as ct

    model = ct.convert(
        program,
        source="milinternal",
        convert_to="mlprogram",
        minimum_deployment_target=getattr(ct.target, version),
        compute_precision=ct.precision.FLOAT32,
        pass_pipeline=ct.PassPipeline.EMPTY,
        skip_model_load=True,
        **options,
    )
    model.save(str(path))
    return path


def conv_package(path: Path) -> Path:
    """A 3x3 convolution and a ReLU: `x` [1, 3, 8, 8] to `y` [1, 16, 8, 8]; its weights lie in the weight file."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types

    rng = np.random.default_rng(0)
    with Function({"x": Placeholder((1, 3, 8, 8), dtype=types.fp32)}, opset_version=ct.target.iOS15) as function:
        weight = rng.normal(size=(16, 3, 3, 3)).astype(np.float32)
        inner = mb.conv(x=function.inputs["x"], weight=weight, pad_type="same", name="inner")
        function.set_outputs([mb.relu(x=inner, name="y")])
    program = Program()
    program.add_function("main", function)
    return save(program, path, "iOS15")


def half_package(path: Path) -> Path:
    """In float16: `y` [4] is x + small + small in two additions, `norm` [1] the L2 norm of x in one operator."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types

    inputs = {name: Placeholder((4,), dtype=types.fp16) for name in ("x", "small")}
    with Function(inputs, opset_version=ct.target.iOS16) as function:
        x, small = function.inputs["x"], function.inputs["small"]
        y = mb.add(x=mb.add(x=x, y=small), y=small, name="y")
        function.set_outputs([y, mb.reduce_l2_norm(x=x, axes=[0], keep_dims=True, name="norm")])
    program = Program()
    program.add_function("main", function)
    return save(program, path, "iOS16")


def state_package(path: Path) -> Path:
    """Adds `x` [1, 4] to the state `total` and gives twice the sum as `y`, all in float16."""
    import coremltools as ct
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, Placeholder, Program, types
    from coremltools.converters.mil.mil.program import StateTensorPlaceholder

    inputs = {"x": Placeholder((1, 4), dtype=types.fp16), "total": StateTensorPlaceholder((1, 4), dtype=types.fp16)}
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        total = mb.add(x=mb.read_state(input=function.inputs["total"]), y=function.inputs["x"])
        mb.coreml_update_state(state=function.inputs["total"], value=total)
        function.set_outputs([mb.mul(x=total, y=np.float16(2), name="y")])
    program = Program()
    program.add_function("main", function)
    return save(program, path, "iOS18")
