"""Exports many small modules as one graph, so that one run of an exporter serves a whole group of cases."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes
from tests.graph.exporter_modules import Case

DYNAMO, SCRIPT = "dynamo", "torchscript"


class Together(nn.Module):
    """Runs every module on inputs of its own and returns all results."""

    def __init__(self, modules: Mapping[str, nn.Module], counts: list[int]) -> None:
        super().__init__()
        self.cases = nn.ModuleList(modules.values())
        self.counts = counts

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results, position = [], 0
        for module, count in zip(self.cases, self.counts, strict=True):
            results.append(module(*inputs[position : position + count]))
            position += count
        return tuple(results)


@dataclass(frozen=True)
class Exported:
    """The cases of one group as one canonical graph.

    Attributes:
        raw: The graph as exported.
        canonical: The graph at opset 23 in the canonical form.
        feeds: The inputs of both.
        expected: What PyTorch computes, by case.
        outputs: The name of the graph's output, by case.
    """

    raw: ir.Model
    canonical: ir.Model
    feeds: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]
    outputs: dict[str, str]

    def nodes(self, case: str) -> Counter[str]:
        """Counts the operators that the output of a case depends on."""
        (result,) = [value for value in self.canonical.graph.outputs if value.name == self.outputs[case]]
        return Counter(node.op_type for node in ancestors(result))


def ancestors(value: ir.Value) -> list[ir.Node]:
    """The nodes that a value depends on."""
    found: dict[ir.Node, None] = {}
    waiting = [value.producer()]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found[node] = None
            waiting.extend(operand.producer() for operand in node.inputs if operand is not None)
    return list(found)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings and log lines of the exporters out of the test report."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def export(module: nn.Module, inputs: tuple[Tensor, ...], exporter: str, opset: int) -> ir.Model:
    """The graph of a module as an exporter writes it, neither optimized nor folded."""
    with quiet():
        if exporter == DYNAMO:
            program = torch.onnx.export(module, inputs, dynamo=True, opset_version=opset, optimize=False, verbose=False)
            assert program is not None
            return program.model
        file = io.BytesIO()
        torch.onnx.export(module, inputs, file, dynamo=False, opset_version=opset, do_constant_folding=False, verbose=False)
        return ir.from_proto(onnx.load_from_string(file.getvalue()))


def export_cases(cases: Mapping[str, Case], exporter: str, opset: int) -> Exported:
    """Exports all cases in one graph and canonicalizes it."""
    torch.manual_seed(0)
    modules = {name: case.build() for name, case in cases.items()}
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for case in cases.values():
        drawn = [torch.randn(shape, generator=generator) + 0.2 for shape in case.shapes]
        inputs += [tensor > 0 if index in case.boolean else tensor for index, tensor in enumerate(drawn)]
    together = Together(modules, [len(case.shapes) for case in cases.values()]).eval()
    with torch.no_grad():
        expected = [result.numpy() for result in together(*inputs)]
    raw = export(together, tuple(inputs), exporter, opset)
    names = [str(value.name) for value in raw.graph.outputs]
    feeds = {str(value.name): tensor.numpy() for value, tensor in zip(raw.graph.inputs, inputs, strict=True)}
    canonical = canonicalize(to_opset(raw.clone()))
    infer_shapes(canonical)
    return Exported(raw, canonical, feeds, dict(zip(cases, expected, strict=True)), dict(zip(cases, names, strict=True)))


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What ONNX Runtime computes without its own optimizations, by output."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))
