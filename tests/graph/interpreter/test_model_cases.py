"""Models that the onnx package carries with recorded inputs and outputs, many of them of opsets 6 to 9, exported by PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgekit.errors import UnsupportedOpError
from edgekit.graph.interpreter import run

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
MODELS = sorted(path for kind in ("pytorch-converted", "pytorch-operator", "simple") for path in (DATA / kind).glob("*/model.onnx"))
REFUSED = ("test_strnorm", "test_gradient")


def recorded(path: Path, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        sequence = onnx.SequenceProto.FromString(path.read_bytes())
        return numpy_helper.to_list(sequence)
    return numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))


def test_there_are_models() -> None:
    assert len(MODELS) > 100


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.parent.name)
def test_recorded_outputs(path: Path) -> None:
    graph = onnx.load(path).graph
    for folder in sorted(path.parent.glob("test_data_set_*")):
        files = {formal.name: folder / f"input_{index}.pb" for index, formal in enumerate(graph.input)}
        inputs = {formal.name: recorded(files[formal.name], formal.type) for formal in graph.input if files[formal.name].exists()}
        if path.parent.name.startswith(REFUSED):
            with pytest.raises(UnsupportedOpError):
                run(path, inputs)
            continue
        results = run(path, inputs)
        for index, formal in enumerate(graph.output):
            want = recorded(folder / f"output_{index}.pb", formal.type)
            pairs = zip(results[formal.name], want, strict=True) if isinstance(want, list) else [(results[formal.name], want)]
            for got, expected in pairs:
                assert got.dtype == expected.dtype
                np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
