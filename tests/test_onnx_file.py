"""Files that somebody else made: each way in which they can be wrong has an error of its own."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekit.errors import SourceError
from edgekit.onnx_file import read_onnx

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def _model() -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


def test_negative_sizes_are_unknown_ones(tmp_path: Path) -> None:
    model = _model()
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = -1
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = -5
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    graph = read_onnx(path).graph
    assert [value.shape for value in (graph.inputs[0], graph.outputs[0])] == [[1, None], [None, 4]]


def _external(folder: Path, location: str, length: int | None = None, offset: int | None = None) -> Path:
    model = _model()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("length", length), ("offset", offset)):
        if value is not None:
            entry = tensor.external_data.add()
            entry.key, entry.value = key, str(value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _refused(path: Path, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        read_onnx(path)
    assert says in caught.value.what
    assert str(path) in str(caught.value)
    assert caught.value.fix
    assert caught.value.exit_code == 3


def test_external_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "w.bin").write_bytes(b"1234" + WEIGHT.tobytes())
    model = read_onnx(_external(tmp_path, "sub/w.bin", WEIGHT.nbytes, 4))
    value = model.graph.initializers["w"].const_value
    assert value is not None
    np.testing.assert_array_equal(value.numpy(), WEIGHT)


def test_external_weights_do_not_depend_on_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    _external(tmp_path, "w.bin")
    monkeypatch.chdir(tmp_path)
    model = read_onnx(Path("model.onnx"))
    monkeypatch.chdir("/")
    value = model.graph.initializers["w"].const_value
    assert value is not None
    np.testing.assert_array_equal(value.numpy(), WEIGHT)


def test_missing_folder_empty(tmp_path: Path) -> None:
    _refused(tmp_path / "none.onnx", "no such file")
    _refused(tmp_path, "a folder")
    (tmp_path / "empty.onnx").touch()
    _refused(tmp_path / "empty.onnx", "empty")


@pytest.mark.parametrize("content", [b"hello, world", b"\x00" * 64, b"PK\x03\x04" + b"\x01" * 60, b"\x08\x07"])
def test_not_onnx(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    _refused(path, "not a")


def test_every_truncation_is_refused_or_reads_a_whole_model(tmp_path: Path) -> None:
    content = _model().SerializeToString()
    path = tmp_path / "m.onnx"
    refused = 0
    for length in range(len(content)):
        path.write_bytes(content[:length])
        try:
            read_onnx(path)
        except SourceError:
            refused += 1
    assert refused >= len(content) - 12  # the opset import comes last, and its value has a default


@pytest.mark.parametrize("location", ["../w.bin", "sub/../../w.bin", "/etc/passwd", "..\\w.bin", "C:\\w.bin", ""])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    path = _external(folder, location)
    with pytest.raises(SourceError, match=r"outside|malformed"):
        read_onnx(path)


def test_links_out_of_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    secret = tmp_path / "secret.bin"
    secret.write_bytes(WEIGHT.tobytes())
    path = _external(folder, "w.bin")
    (folder / "w.bin").symlink_to(secret)
    _refused(path, "symbolic link")
    (folder / "w.bin").unlink()
    os.link(secret, folder / "w.bin")
    _refused(path, "hard link")
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to("w.bin")
    _refused(path, "cannot be reached")
    (folder / "w.bin").unlink()
    (folder / "real.bin").write_bytes(WEIGHT.tobytes())
    (folder / "w.bin").symlink_to("real.bin")  # a link within the folder is fine
    assert read_onnx(path).graph.initializers["w"].const_value is not None


def test_external_data_missing_short_or_of_another_size(tmp_path: Path) -> None:
    _refused(_external(tmp_path, "w.bin"), "is missing")
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes()[:-1])
    _refused(_external(tmp_path, "w.bin"), "too short")
    (tmp_path / "w.bin").write_bytes(WEIGHT.tobytes())
    _refused(_external(tmp_path, "w.bin", WEIGHT.nbytes - 4), "does not hold")
    _refused(_external(tmp_path, "w.bin", WEIGHT.nbytes, 4), "too short")
    (tmp_path / "w.bin").unlink()
    (tmp_path / "w.bin").mkdir()
    _refused(_external(tmp_path, "w.bin"), "not a regular file")
