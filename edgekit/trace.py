"""From a PyTorch module to an ONNX graph whose names say which module each node came from.

The graph is exported at opset 23 and not optimized: what the exporter would fold silently is left for passes that are
checked and counted. The exporter's own default graph is kept beside it as the baseline of every comparison.
"""

from __future__ import annotations

import ast
import contextlib
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from edgekit.contracts import Arrays
from edgekit.errors import TraceError
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.opset import OPSET
from edgekit.graph.parameters import names_by_parameter, tag_parameters
from edgekit.quiet import muted
from edgekit.source import Source

if TYPE_CHECKING:
    import torch

_NAME_SCOPES = "pkg.torch.onnx.name_scopes"
_TORCHSCRIPT_OPSET = 17


@dataclass
class Traced:
    """The graph of a module.

    Attributes:
        model: The graph as exported, not optimized.
        baseline: The graph that the exporter gives by default, optimized by its own rules.
        exporter: Which of `EXPORTERS` made it.
    """

    model: ir.Model
    baseline: ir.Model
    exporter: str


def trace(source: Source, exporter: str) -> Traced:
    """Exports the module of `source` by one of `EXPORTERS`.

    Raises:
        TraceError: The exporter failed; the message gives its reason.
    """
    with _quiet():
        try:
            model = _EXPORTERS[exporter](source)
        except Exception as error:  # an exporter raises whatever the module's code raises
            if (interrupt := _interrupt_behind(error)) is not None:
                raise interrupt from error
            raise TraceError(
                f"the {exporter} exporter failed: {_reason(error)}",
                where=source.name,
                fix="call the module on the example inputs by hand, and remove control flow that depends on values",
            ) from error
        _name_by_module(model)
        _name_outputs(model)
        baseline = _exporter_default(model)  # before the tags: the exporter's optimizer would keep only some of them
        if source.module is not None:
            tag_parameters(model, names_by_parameter(source.module.named_parameters(remove_duplicate=False)))
        return Traced(model, baseline, exporter)


def run_module(source: Source, feeds: list[Arrays], input_names: list[str], output_names: list[str]) -> list[Arrays]:
    """Runs the PyTorch module once per feed and returns its outputs under the graph's output names.

    Raises:
        TraceError: The module failed, or gives another number of outputs than the graph has.
    """
    import torch

    assert source.module is not None
    results = []
    with _evaluating(source), torch.no_grad():
        for feed in feeds:
            # A copy, since a module may change its input in place.
            tensors = [torch.from_numpy(feed[name].copy()) for name in input_names]
            try:
                outputs = _flatten(source.module(*tensors))
            except Exception as error:  # the user's code
                raise TraceError(
                    f"the module failed on its inputs: {_reason(error)}", where=source.name, fix="check the input shapes and the data"
                ) from error
            if len(outputs) != len(output_names):
                raise TraceError(
                    f"the module gives {len(outputs)} outputs and its graph {len(output_names)}",
                    where=source.name,
                    fix="return tensors, or tuples and dictionaries of tensors",
                )
            results.append({name: _array(tensor) for name, tensor in zip(output_names, outputs, strict=True)})
    return results


def _interrupt_behind(error: BaseException | None) -> BaseException | None:
    """The interrupt that led to an error, if one did: parts of torch turn it into errors of their own."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            return type(error)(*error.args)
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _array(tensor: torch.Tensor) -> np.ndarray:
    import torch

    if tensor.dtype == torch.bfloat16:  # numpy has no such type of its own
        return tensor.detach().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.detach().numpy()


def _flatten(outputs: Any) -> list[torch.Tensor]:
    import torch
    from torch.utils import _pytree

    leaves, _ = _pytree.tree_flatten(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


@contextlib.contextmanager
def _evaluating(source: Source) -> Iterator[None]:
    """Puts the module into evaluation mode and gives back the mode of each of its parts afterwards."""
    if source.program is not None or source.module is None:  # an exported program has its mode built in
        yield
        return
    modes = [(part, part.training) for part in source.module.modules()]
    source.module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _export_dynamo(source: Source) -> ir.Model:
    import torch

    with _evaluating(source):
        exported = source.program if source.program is not None else source.module
        arguments = () if source.program is not None else source.example_inputs
        assert exported is not None
        program = torch.onnx.export(
            exported,  # type: ignore[arg-type]
            arguments,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
        )
    assert program is not None
    return program.model


def _export_torchscript(source: Source) -> ir.Model:
    import torch

    assert source.module is not None
    with tempfile.TemporaryDirectory(prefix="edgekit-trace-") as folder, _evaluating(source):
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            source.module,
            source.example_inputs,
            path,
            dynamo=False,
            opset_version=_TORCHSCRIPT_OPSET,
            do_constant_folding=False,
            verbose=False,
        )
        model = ir.load(path)
        ir.external_data.load_to_model(model)  # the folder goes away
        return model


_EXPORTERS: dict[str, Callable[[Source], ir.Model]] = {"dynamo": _export_dynamo, "torchscript": _export_torchscript}
EXPORTERS = tuple(_EXPORTERS)
"""The exporters in the order in which they are tried."""


def _exporter_default(model: ir.Model) -> ir.Model:
    from onnxscript import optimizer

    baseline = model.clone()
    optimizer.optimize(baseline)
    return baseline


def _name_by_module(model: ir.Model) -> None:
    """Names nodes `blocks.3.attn.qkv/MatMul` and their outputs alike, and keeps the module path as metadata."""
    graph = model.graph
    kept = set(graph.outputs)  # values and not names: the exporter may call a node's output as a buffer is called
    used: dict[str, int] = {}
    for node in ir.traversal.RecursiveGraphIterator(graph):
        path = _module_path(node)
        node.metadata_props.clear()
        if path:
            node.metadata_props[MODULE_KEY] = path
        base = f"{path}/{node.op_type}" if path else node.op_type
        count = used.get(base, 0)
        used[base] = count + 1
        node.name = f"{base}.{count}" if count else base
        for position, output in enumerate(node.outputs):
            output.metadata_props.clear()
            if output.name and output not in kept:
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}:{position}"


def _module_path(node: ir.Node) -> str:
    """Reads the module path that the exporter noted: the scopes, of which the last is the operation itself."""
    text = node.metadata_props.get(_NAME_SCOPES)
    if text is None:
        return ""
    try:
        scopes = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return ""
    return str(scopes[-2]) if len(scopes) >= 2 else ""


def _name_outputs(model: ir.Model) -> None:
    """Names the graph's outputs `output`, or `output_0`, `output_1` where there are several.

    A value that is given out twice, or that no node makes (an input passed through), gets an Identity for each output: one value cannot
    bear two names.
    """
    graph = model.graph
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    names = ["output"] if len(graph.outputs) == 1 else [f"output_{position}" for position in range(len(graph.outputs))]
    seen: set[ir.Value] = set()
    for position, (value, name) in enumerate(zip(list(graph.outputs), names, strict=True)):
        output = value
        if value in seen or value.producer() is None:
            copy = ir.node("Identity", [value], name=f"{name}/Identity")
            graph.append(copy)
            graph.outputs[position] = output = copy.outputs[0]
            output.shape, output.type = value.shape, value.type
        seen.add(value)
        output.name = name if name not in taken else f"{name}_"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' warnings and log lines off the user's terminal."""
    with muted("torch.onnx"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: BaseException) -> str:
    """The first informative line of an error, looking at its cause first: exporters wrap what really happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
