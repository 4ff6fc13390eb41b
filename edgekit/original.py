"""The uncompressed model: opened, traced, checked against PyTorch, and run on the user's data."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit.adversarial import adversarial_batches
from edgekit.collection import collected_later
from edgekit.contracts import Arrays
from edgekit.data import Data, Origin, declared_inputs, load_data
from edgekit.errors import EdgekitError, LoweringError, SourceError, TraceError, UnsupportedOpError
from edgekit.evaluate import Evaluator, Outcome
from edgekit.graph.check import check_model
from edgekit.graph.cost import cost
from edgekit.graph.files import spill_weights
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.precision import graph_precision
from edgekit.graph.shapes import infer_shapes, pin_inputs, static_shape
from edgekit.inputs import InputSpec
from edgekit.isolation import Worker
from edgekit.progress import Reporter
from edgekit.recipe import IN_MEMORY, Recipe
from edgekit.source import Source, from_module, open_source
from edgekit.trace import EXPORTERS, Traced, run_module, trace
from edgekit.verify import assert_close, outputs_vary

if TYPE_CHECKING:
    import torch


_OLDEST_RUNNABLE_OPSET = 7
"""ONNX Runtime has few kernels for operators of earlier opsets."""

_NEWEST_RUNNABLE_IR_VERSION = 13
"""ONNX Runtime looks at the number alone; onnx writes its own newest, whatever the model needs."""


@dataclass
class Original:
    """The uncompressed model.

    Attributes:
        source: As it came.
        model: Its graph, as exported or read.
        baseline: The graph that its latency is measured on: what the exporter gives by default, or the file as it was given.
        data: The user's data in the shapes of its inputs.
        reference: Its own outputs on the calibration batches: PyTorch's, or ONNX Runtime's on the file as it was given.
        reference_adversarial: Its own outputs on the adversarial inputs; None where there are none.
        outcome: What its graph computes in ONNX Runtime.
        notes: What the report must say.
    """

    source: Source
    model: ir.Model
    baseline: ir.Model
    data: Data
    reference: list[Arrays]
    outcome: Outcome
    notes: list[str] = field(default_factory=list)
    reference_adversarial: list[Arrays] | None = None


@dataclass(frozen=True)
class Opener:
    """Opens models under one recipe.

    Attributes:
        recipe: The recipe.
        inputs: Its input descriptions.
        data: The data: the recipe's, an iterable in memory, or a function that makes it.
        folder: An existing folder for temporary files.
        threads: Threads to run on.
        worker: The process for native code.
        reporter: Told how far it has come.
    """

    recipe: Recipe
    inputs: Sequence[InputSpec]
    data: Origin
    folder: Path
    threads: int
    worker: Worker
    reporter: Reporter

    def open(self, module: tuple[torch.nn.Module, Any] | None = None) -> Original:
        """Opens the recipe's model, or the module and example inputs that are given.

        Raises:
            SourceError, TraceError, ParityError, DataError: The model or its data cannot be used.
        """
        with self.reporter.stage("open"):
            source = self.source(module)
        original = self._from_graph(source) if source.module is None else self._from_module(source)
        original.notes = [*source.notes, *original.notes, *original.data.notes, *_warnings(original.reference)]
        return original

    def source(self, module: tuple[torch.nn.Module, Any] | None = None) -> Source:
        """What the recipe names, or the module and example inputs that are given, before it is traced.

        Raises:
            SourceError: It cannot be opened.
        """
        recipe = self.recipe
        if module is not None:
            return from_module(*module, self.inputs, recipe.seed)
        if recipe.model.startswith(IN_MEMORY):
            raise SourceError(
                "this recipe's model was a module in memory, which a file cannot name",
                where=recipe.model,
                fix="set `model` in the recipe to a file or to package.module:factory",
            )
        return open_source(recipe.model, self.inputs, recipe.weights, recipe.seed)

    def _load(self, source: Source, model: ir.Model) -> tuple[Data, Evaluator]:
        data = load_data(
            self.data,
            declared_inputs(model),
            calibration=self.recipe.calibration,
            seed=self.recipe.seed,
            statistics=source.image_statistics,
        )
        data.adversarial = adversarial_batches(declared_inputs(model), self.recipe.seed, cost(model).macs)
        return data, Evaluator(self.worker, data, self.folder, self.threads)

    def _from_graph(self, source: Source) -> Original:
        assert source.model is not None
        with self.reporter.stage("check"):
            notes = check_model(source.model, self.recipe.model)
            model = spill_weights(source.model, self.folder)
            if model is not source.model:
                source.model = model
                gc.collect()  # a graph is a web of cycles: the weights in memory go only now
            model.ir_version = min(model.ir_version, _NEWEST_RUNNABLE_IR_VERSION)
            model.graph.sort()  # a file may list its nodes in any order; everything from here on reads them in this one
            notes += pin(model, self.inputs)
            if (opset := model.opset_imports.get("", _OLDEST_RUNNABLE_OPSET)) < _OLDEST_RUNNABLE_OPSET:
                model = to_opset(model, OPSET)
                notes.append(f"the file is of opset {opset}, older than ONNX Runtime supports: parity refers to its form in opset {OPSET}")
            infer_shapes(model)
        with self.reporter.stage("run original"):
            data, evaluator = self._load(source, model)
            try:
                outcome = evaluator.run(model, "run original")
            except LoweringError as error:  # nothing of edgekit's has touched the graph yet
                raise SourceError(
                    error.what, where=self.recipe.model, fix="check it by `python -m onnx.checker FILE`, or export the model again"
                ) from error
            notes += _keep_runnable(data, outcome.adversarial)
        return Original(source, model, model, data, outcome.outputs, outcome, notes, outcome.adversarial)

    def _from_module(self, source: Source) -> Original:
        failures: list[EdgekitError] = []
        for exporter in EXPORTERS:
            try:
                return self._traced(source, exporter, failures)
            except (TraceError, UnsupportedOpError, LoweringError) as error:
                failures.append(error)
        first, second = failures
        raise TraceError(f"the model cannot be traced: {first.what}", where=f"{first.where}; then {second.what}", fix=first.fix) from first

    def _traced(self, source: Source, exporter: str, failures: list[EdgekitError]) -> Original:
        with self.reporter.stage("trace"):
            traced = trace(source, exporter)
            notes = check_model(traced.model, source.name)
            for model in (traced.model, traced.baseline):
                pin_inputs(model, example_pins(model, source))
                infer_shapes(model)
        with self.reporter.stage("check trace"), collected_later():
            data, evaluator = self._load(source, traced.model)
            input_names = [str(value.name) for value in traced.model.graph.inputs]
            output_names = [str(value.name) for value in traced.model.graph.outputs]
            reference = run_module(source, data.calibration, input_names, output_names)
            extremes = _run_adversarial(source, data, input_names, output_names)
            notes += _keep_runnable(data, extremes)
            outcome = evaluator.run(traced.model, "check trace")
            _assert_traced(traced, reference, outcome)
        notes += [f"{failure.what}; the {exporter} exporter was used" for failure in failures]
        return Original(source, traced.model, traced.baseline, data, reference, outcome, notes, extremes)


def _run_adversarial(source: Source, data: Data, input_names: list[str], output_names: list[str]) -> list[Arrays] | None:
    """The module's outputs on the adversarial inputs; None where it fails on one, which calls for no error: nobody gave them."""
    try:
        return run_module(source, list(data.adversarial.values()), input_names, output_names) or None
    except TraceError:
        return None


def _keep_runnable(data: Data, outputs: list[Arrays] | None) -> list[str]:
    """Drops the adversarial inputs where the original gave no outputs on them, and says so."""
    if outputs is not None or not data.adversarial:
        return []
    data.adversarial = {}
    return ["the original model fails on adversarial inputs (zeros, large magnitudes or denormals): parity was not measured on them"]


def _assert_traced(traced: Traced, reference: list[Arrays], outcome: Outcome) -> None:
    from edgekit.errors import ParityError

    stage = f"the {traced.exporter} exporter"
    try:
        assert_close(reference, outcome.outputs, stage=stage, precision=graph_precision(traced.model))
    except ParityError as error:
        raise TraceError(
            f"{stage} gave a graph that computes something else than PyTorch: {error.what}", where=error.where, fix="report it to PyTorch"
        ) from error


def pins(model: ir.Model, inputs: Sequence[InputSpec]) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """The user's shapes and dtypes by input name; a description without a name stands for the only input."""
    if len(inputs) == 1 and not inputs[0].name and len(model.graph.inputs) == 1:
        return {str(model.graph.inputs[0].name): (inputs[0].shape, inputs[0].dtype)}
    return {spec.name: (spec.shape, spec.dtype) for spec in inputs}


def pin(model: ir.Model, inputs: Sequence[InputSpec]) -> list[str]:
    """Makes the graph's inputs static by the user's shapes; returns a note where a dynamic first dimension, given by nobody, became 1."""
    given = pins(model, inputs)
    open_ones = [value for value in model.graph.inputs if value.name not in given and value.shape and not isinstance(value.shape[0], int)]
    pin_inputs(model, given)
    shapes = {str(value.name): static_shape(value) or () for value in open_ones}
    return [
        f"the first dimension of '{name}' is dynamic: it was set to 1 (--input {name}:{','.join(['N', *map(str, shape[1:])])} sets another)"
        for name, shape in shapes.items()
        if shape[0] == 1
    ]


def example_pins(model: ir.Model, source: Source) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """The shapes of the example inputs that a graph was traced with, by input name."""
    shapes = [tuple(tensor.shape) for tensor in source.example_inputs]
    return {str(value.name): (shape, None) for value, shape in zip(model.graph.inputs, shapes, strict=False)}


def _warnings(reference: list[Arrays]) -> list[str]:
    notes = []
    if any(array.dtype.kind == "f" and not np.isfinite(array).all() for outputs in reference for array in outputs.values()):
        notes.append("the original model gives NaN or infinite outputs: parity is only measured where they are finite")
    if len(reference) > 1 and not outputs_vary(reference):
        notes.append("the original model gives the same outputs on all calibration inputs: parity proves little")
    return notes
