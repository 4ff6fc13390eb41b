"""Static shapes: pins the symbolic dimensions of inputs and infers what follows from them.

The inference is `onnx.shape_inference` (with data propagation, so that a Reshape whose target is computed from a Shape is resolved);
weights never enter the protobuf that it reads, so models over 2 GB are inferred as fast as small ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.errors import SourceError, nearest

_SMALL_TENSOR_BYTES = 1024
"""Tensors up to this size stay in the protobuf: they may be the shape that a Reshape reads."""

_LONGEST_VECTOR = 1 << 24

_PLACEHOLDER = "weight-left-out"

_LIKE_FIRST_INPUT = frozenset({"GroupNormalization", "MeanVarianceNormalization", "Swish", "TensorScatter"})
"""Operators that onnx 1.23 infers no shape for: they are functions, which are only looked into on request."""


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Returns the shape of `value` when every dimension is a known non-negative integer, else None."""
    if value is None or value.shape is None:
        return None
    dims = tuple(value.shape)
    if all(isinstance(dim, int) and dim >= 0 for dim in dims):
        return tuple(int(dim) for dim in dims)  # type: ignore[arg-type]
    return None


@contextlib.contextmanager
def without_weights(model: ir.Model) -> Iterator[dict[str, ir.TensorProtocol]]:
    """Within the block, large tensors of `model` are placeholders of the same dtype and shape without data; small ones are in memory.

    The model can then be serialized whatever its size. Yields the real tensors by placeholder location, so that a rebuilt model can get
    them back; on exit the model itself has them again.
    """
    real: dict[str, ir.TensorProtocol] = {}
    initializers: list[tuple[ir.Value, ir.TensorProtocol]] = []
    attributes: list[tuple[ir.Node, ir.Attr]] = []

    def stand_in(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
        if tensor.nbytes <= _SMALL_TENSOR_BYTES:  # a protobuf would keep the file's name and forget its folder
            return ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name)
        location = f"{_PLACEHOLDER}-{len(real)}"
        real[location] = tensor
        return ir.ExternalTensor(location, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name or "")

    def leaves(tensor: ir.TensorProtocol) -> bool:
        return tensor.nbytes > _SMALL_TENSOR_BYTES or isinstance(tensor, ir.ExternalTensor)

    try:
        for graph in [*model.graphs(), *(function.graph for function in model.functions.values())]:
            for value in graph.initializers.values():
                tensor = value.const_value
                if tensor is not None and leaves(tensor):
                    initializers.append((value, tensor))
                    value.const_value = stand_in(tensor, value.name)
            for node in graph:
                for attr in list(node.attributes.values()):
                    if attr.type == ir.AttributeType.TENSOR and not attr.is_ref() and leaves(attr.as_tensor()):
                        attributes.append((node, attr))
                        node.attributes[attr.name] = ir.AttrTensor(attr.name, stand_in(attr.as_tensor(), attr.as_tensor().name))
        yield real
    finally:
        for value, tensor in initializers:
            value.const_value = tensor
        for node, attr in attributes:
            node.attributes[attr.name] = attr


def infer_shapes(model: ir.Model) -> None:
    """Fills in, in place, the dtypes and shapes that follow from the inputs; what is known already is kept.

    Nodes that ONNX cannot infer (foreign domains without a function body) leave their outputs unknown.

    Raises:
        SourceError: The graph cannot be serialized or analysed at all.
    """
    _infer(model)
    while _as_first_input(model.graph):
        _infer(model)


def _as_first_input(graph: ir.Graph) -> bool:
    """Gives what onnx infers nothing for, though it has the type and shape of its first input, those; says whether there was any."""
    changed = False
    for node in graph.all_nodes():
        source = node.inputs[0] if node.op_type in _LIKE_FIRST_INPUT and node.domain == "" and node.inputs else None
        if source is not None and source.shape is not None and source.dtype is not None and node.outputs[0].shape is None:
            node.outputs[0].shape, node.outputs[0].type = source.shape.copy(), ir.TensorType(source.dtype)
            changed = True
    return changed


def _infer(model: ir.Model) -> None:
    try:
        with without_weights(model):
            proto = ir.to_proto(model)
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=False)
        if not _has_long_vector(inferred.graph):
            inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except Exception as error:
        raise SourceError(
            f"the shapes of the graph cannot be inferred: {error}",
            where=f"graph '{model.graph.name}'",
            fix="check the file with `python -m onnx.checker FILE`, or export the model again",
        ) from error
    _merge_graph(model.graph, inferred.graph)


def _has_long_vector(graph: onnx.GraphProto) -> bool:
    """Whether some vector is so long that data propagation, which writes out the elements of vectors, would fill the memory."""
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if len(dims) == 1 and dims[0].dim_value > _LONGEST_VECTOR:
            return True
    return False


def _merge_graph(graph: ir.Graph, proto: onnx.GraphProto) -> None:
    infos = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    for node, node_proto in zip(graph, proto.node, strict=True):
        for output in node.outputs:
            if output.name in infos:
                _merge_value(output, infos[output.name])
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            protos = {attr.name: attr for attr in node_proto.attribute}
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.GRAPH:
                    _merge_graph(attr.as_graph(), protos[attr.name].g)
                elif attr.type == ir.AttributeType.GRAPHS:
                    for body, body_proto in zip(attr.as_graphs(), protos[attr.name].graphs, strict=True):
                        _merge_graph(body, body_proto)


def _merge_value(value: ir.Value, info: onnx.TypeProto) -> None:
    if value.type is None:
        value.type = ir.serde.deserialize_type_proto_for_type(info)
    elif value.dtype is not None and value.dtype == ir.DataType.UNDEFINED and info.HasField("tensor_type"):
        value.dtype = ir.DataType(info.tensor_type.elem_type)
    if static_shape(value) is not None or not info.HasField("tensor_type") or not info.tensor_type.HasField("shape"):
        return
    dims = info.tensor_type.shape.dim
    inferred: list[int | str | None] = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims]
    known = value.shape
    if known is not None and len(known) == len(inferred):
        inferred = [old if isinstance(old, int) else new for old, new in zip(known, inferred, strict=True)]
    value.shape = ir.Shape(inferred)


def clear_shapes(model: ir.Model) -> None:
    """Forgets the shapes of all values that nodes produce (dtypes stay), so that inference starts from the inputs alone."""
    for node in model.graph.all_nodes():
        for output in node.outputs:
            output.shape = None


def pin_inputs(model: ir.Model, shapes: Mapping[str, tuple[Sequence[int], object | None]]) -> None:
    """Makes every graph input static, in place, and clears the shapes downstream when that changed one.

    A symbolic dimension gets the size given for it; one of the same name (`batch`) on another input gets the same size. A symbolic first
    dimension that nobody gave is 1.

    Args:
        model: The model whose inputs are pinned.
        shapes: Per input name, the shape and (or None) the dtype: anything that `numpy.dtype` accepts, or an `ir.DataType`.

    Raises:
        SourceError: No such input; the rank, a fixed dimension or the dtype contradicts the declared one; a symbolic dimension stays open.
    """
    inputs = {value.name or "": value for value in model.graph.inputs}
    for name, (_, dtype) in shapes.items():
        if name not in inputs:
            raise SourceError(f"the model has no input '{name}'", where=f"--input {name}", fix=nearest(name, inputs))
        _check_dtype(inputs[name], dtype)
    for value in inputs.values():
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise SourceError(f"input '{value.name}' is not a dense tensor", where=f"input '{value.name}': {value.type}",
                              fix="export the model with tensors as its inputs")  # fmt: skip
        if value.dtype in (None, ir.DataType.UNDEFINED):
            raise SourceError(f"input '{value.name}' has no declared dtype", where=f"input '{value.name}'",
                              fix=f"{_how_to_pin(value)}:float32")  # fmt: skip

    bindings: dict[str, tuple[int, str]] = {}
    for name, (shape, _) in shapes.items():
        _check_shape(inputs[name], shape)
        for dim, size in zip(inputs[name].shape or (), shape, strict=False):
            if not isinstance(dim, ir.SymbolicDim) or dim.value is None:
                continue
            size_before, name_before = bindings.setdefault(dim.value, (size, name))
            if size_before != size:
                raise SourceError(
                    f"dimension '{dim.value}' is {size_before} in input '{name_before}' and {size} in input '{name}'",
                    where=f"input '{name}', declared {inputs[name].shape}",
                    fix=f"give '{dim.value}' one size in every --input",
                )

    changed = False
    for name, value in inputs.items():
        if static_shape(value) is not None:
            continue
        value.shape = ir.Shape(shapes[name][0] if name in shapes else _fill_shape(value, bindings))
        changed = True
    if changed:
        clear_shapes(model)


def _check_dtype(value: ir.Value, dtype: object | None) -> None:
    if dtype is None:
        return
    try:
        wanted = dtype if isinstance(dtype, ir.DataType) else ir.DataType.from_numpy(np.dtype(dtype))  # type: ignore[call-overload]
    except TypeError as error:
        raise SourceError(f"'{dtype}' is not a dtype", where=f"input '{value.name}'", fix="write float32, float16, int64, …") from error
    if value.dtype not in (None, ir.DataType.UNDEFINED, wanted):
        assert value.dtype is not None
        raise SourceError(
            f"input '{value.name}' takes {_dtype_name(value.dtype)}, not {_dtype_name(wanted)}",
            where=f"input '{value.name}'",
            fix=f"leave the dtype out, or write :{_dtype_name(value.dtype)}",
        )
    value.dtype = wanted


def _dtype_name(dtype: ir.DataType) -> str:
    return "string" if dtype == ir.DataType.STRING else str(dtype.numpy())


def _check_shape(value: ir.Value, shape: Sequence[int]) -> None:
    where = f"input '{value.name}'"
    if any(size < 0 for size in shape):
        raise SourceError(f"a dimension of {list(shape)} is negative", where=where, fix=_how_to_pin(value))
    if value.shape is None:
        return
    declared = f"declared {value.shape}"
    if len(value.shape) != len(shape):
        raise SourceError(f"input '{value.name}' has {len(value.shape)} dimensions, {len(shape)} were given", where=f"{where}, {declared}",
                          fix=_how_to_pin(value))  # fmt: skip
    for axis, (dim, size) in enumerate(zip(value.shape, shape, strict=True)):
        if isinstance(dim, int) and dim != size:
            raise SourceError(f"dimension {axis} of input '{value.name}' is fixed to {dim}, {size} was given", where=f"{where}, {declared}",
                              fix=_how_to_pin(value))  # fmt: skip


def _fill_shape(value: ir.Value, bindings: Mapping[str, tuple[int, str]]) -> list[int]:
    if value.shape is None:
        raise SourceError(f"input '{value.name}' has no declared shape", where=f"input '{value.name}'", fix=_how_to_pin(value))
    sizes: list[int] = []
    for axis, dim in enumerate(value.shape):
        if isinstance(dim, int) and dim >= 0:
            sizes.append(dim)
        elif isinstance(dim, ir.SymbolicDim) and dim.value is not None and dim.value in bindings:
            sizes.append(bindings[dim.value][0])
        elif axis == 0:
            sizes.append(1)
        else:
            raise SourceError(
                f"dimension {axis} ('{dim}') of input '{value.name}' is symbolic and was not given",
                where=f"input '{value.name}', declared {value.shape}",
                fix=_how_to_pin(value),
            )
    return sizes


def _how_to_pin(value: ir.Value) -> str:
    """Returns an example such as `--input x:1,3,224,224`: fixed dimensions as declared, likely sizes for the others."""
    if value.shape is None:
        return f"give the shape that the model expects, such as --input {value.name}:1,3,224,224"
    rank = len(value.shape)
    sizes = []
    for axis, dim in enumerate(value.shape):
        likely = 1 if axis == 0 else 3 if rank == 4 and axis == 1 else 224 if rank == 4 else 128
        sizes.append(str(dim if isinstance(dim, int) else likely))
    return f"--input {value.name}:{','.join(sizes)}"
