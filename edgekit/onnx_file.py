"""Reading an ONNX file that somebody else made: what it says is checked before any byte of its weights is used."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from edgekit.errors import SourceError
from edgekit.quiet import muted

_PROTO_LIMIT = 2**31 - 1


def read_onnx(path: Path) -> ir.Model:
    """Reads an ONNX file; external weights stay on disk and are mapped when read.

    Raises:
        SourceError: The file is missing, unreadable, not ONNX or truncated, or its external data is missing, too short,
            or outside the model's folder.
    """
    proto = _parse(path)
    _check_initializer_names(proto.graph, path)
    try:
        with muted("onnx_ir"):
            model = ir.serde.deserialize_model(proto)
    except Exception as error:  # onnx_ir raises many kinds for malformed content
        raise SourceError(
            f"the file holds a model that is malformed: {_first_line(error)}", where=str(path), fix="export the model again"
        ) from error
    folder = path.resolve().parent
    for tensor in _external_tensors(model):
        _check_external(tensor, folder, path)
        tensor.base_dir = str(folder)
    _drop_weight_inputs(model.graph)
    _forget_negative_sizes(model)
    model.ir_version = max(model.ir_version or 0, 4)  # before 4 every initializer had to be an input
    return model


def _check_initializer_names(graph: onnx.GraphProto, path: Path) -> None:
    """Of two initializers of one name the IR would keep the last without a word."""
    seen: set[str] = set()
    for name in (*(tensor.name for tensor in graph.initializer), *(tensor.values.name for tensor in graph.sparse_initializer)):
        if name in seen:
            raise SourceError(f"two initializers are named '{name}'", where=str(path), fix="rename one of them, or export the model again")
        seen.add(name)


def _drop_weight_inputs(graph: ir.Graph) -> None:
    """Old files list every initializer as an input too, which nobody feeds: it would count as an input that may change."""
    fed = [value for value in graph.inputs if not value.is_initializer()]
    if len(fed) != len(graph.inputs):
        graph.inputs[:] = fed


def _forget_negative_sizes(model: ir.Model) -> None:
    """A declared size of -1 is how some tools write "unknown"; onnx's shape inference ends the process on it."""
    for graph in [*model.graphs(), *(function.graph for function in model.functions.values())]:
        for value in (*graph.inputs, *graph.outputs, *(output for node in graph for output in node.outputs)):
            if value.shape is not None and any(isinstance(size, int) and size < 0 for size in value.shape):
                value.shape = ir.Shape([None if isinstance(size, int) and size < 0 else size for size in value.shape])


def _parse(path: Path) -> onnx.ModelProto:
    where = str(path)
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise SourceError("the model is a folder, not a file", where=where, fix="name the .onnx file inside it")
        if not path.is_file():
            raise SourceError("the model is not a regular file", where=where, fix="save it to a file first")
        content = path.read_bytes() if size <= _PROTO_LIMIT else b""
    except FileNotFoundError as error:
        raise SourceError("there is no such file", where=where, fix="check the path") from error
    except OSError as error:
        raise SourceError(f"the file cannot be read: {error.strerror}", where=where, fix="check its name and permissions") from error
    except ValueError as error:  # a zero byte in the name
        raise SourceError(f"the file cannot be read: {error}", where=where, fix="check its name") from error
    if size == 0:
        raise SourceError("the file is empty", where=where, fix="export or copy the model again")
    if size > _PROTO_LIMIT:
        raise SourceError(
            f"the file is {size:,} bytes; ONNX cannot hold more than 2 GiB in one file",
            where=where,
            fix="save the model with external data",
        )
    proto = onnx.ModelProto()
    try:
        proto.ParseFromString(content)
    except DecodeError as error:
        raise SourceError("the file is not an ONNX model, or is truncated", where=where, fix="export or copy the model again") from error
    if not proto.HasField("graph") or not proto.opset_import or not proto.graph.output:
        raise SourceError("the file is not a complete ONNX model: no graph, opset or output", where=where, fix="export the model again")
    return proto


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for root in graphs:
        if isinstance(root, ir.Graph):
            yield from _initializers(root)
        for node in ir.traversal.RecursiveGraphIterator(root):
            for attribute in node.attributes.values():
                if attribute.is_ref():
                    continue
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    yield attribute.value
                elif attribute.type == ir.AttributeType.TENSORS:
                    yield from (tensor for tensor in attribute.value if isinstance(tensor, ir.ExternalTensor))
                elif attribute.type == ir.AttributeType.GRAPH:
                    yield from _initializers(attribute.value)
                elif attribute.type == ir.AttributeType.GRAPHS:
                    for graph in attribute.value:
                        yield from _initializers(graph)


def _initializers(graph: ir.Graph) -> Iterator[ir.ExternalTensor]:
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value.const_value


def _check_external(tensor: ir.ExternalTensor, folder: Path, model_path: Path) -> None:
    location = os.fspath(tensor.location)
    where = f"weights '{tensor.name}' of {model_path}"

    def refuse(what: str, fix: str) -> SourceError:
        return SourceError(f"{what}: '{location}'", where=where, fix=fix)

    pure = PurePosixPath(location.replace("\\", "/"))
    if not location or pure.is_absolute() or ".." in pure.parts or (len(location) > 1 and location[1] == ":"):
        raise refuse("external data lies outside the model's folder", "keep the weights beside the .onnx file")
    try:
        target = (folder / pure).resolve(strict=True)
        status = target.stat()
    except FileNotFoundError as error:
        raise refuse("external data is missing", f"put the file into {folder}") from error
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name too long, a zero byte in the name
        raise refuse("external data cannot be reached", "keep the weights beside the .onnx file") from error
    if not target.is_relative_to(folder):
        raise refuse("external data is a symbolic link out of the model's folder", "copy the weights beside the .onnx file")
    if not stat.S_ISREG(status.st_mode):
        raise refuse("external data is not a regular file", "keep the weights beside the .onnx file")
    if status.st_nlink > 1:
        raise refuse("external data is a hard link, which may lead out of the model's folder", "make a copy of the file: cp A B && mv B A")
    offset = tensor.offset or 0
    try:
        needed = math.ceil(tensor.dtype.bitwidth * math.prod(tensor.shape.numpy()) / 8)
    except (TypeError, ValueError) as error:
        raise refuse("external data of a type that has no fixed size", "export the model again") from error
    length = needed if tensor.length is None else tensor.length
    if offset < 0 or length != needed:
        raise refuse(f"external data of {length} bytes at {offset} does not hold the {needed} bytes of its shape", "export the model again")
    if offset + needed > status.st_size:
        raise refuse(
            f"external data is too short ({status.st_size:,} bytes, {offset + needed:,} are needed)", "copy or download the file again"
        )


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # onnx_ir wraps what really happened once a level
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
