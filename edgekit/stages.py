"""The graph of a model at a stage of a compile, without running it: canonical, after any pass, or lowered."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgekit import contracts, native, specs
from edgekit.apply import apply_pass
from edgekit.artifact import OPTIMIZED, REPORT, Artifact, open_artifact
from edgekit.contracts import Context, Pass, Target
from edgekit.data import declared_inputs, load_data
from edgekit.errors import TraceError, UnsupportedOpError, UsageError, nearest
from edgekit.evaluate import in_worker
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.check import check_model
from edgekit.graph.files import save_model
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.shapes import infer_shapes, pin_inputs
from edgekit.inputs import InputSpec, parse_inputs
from edgekit.isolation import Worker
from edgekit.original import example_pins, pin
from edgekit.recipe import Recipe
from edgekit.source import Source, open_source
from edgekit.trace import EXPORTERS, trace

CANONICAL, LOWERED = "canonical", "lowered"


@dataclass
class Opened:
    """A model's graph before anything rewrote it.

    Attributes:
        source: Where it came from.
        graph: The traced graph, or that of the file; checked, sorted, with static inputs and inferred shapes.
        notes: What a reader must know.
        artifact: The artifact whose optimized graph it is, if it is one.
    """

    source: Source
    graph: ir.Model
    notes: list[str] = field(default_factory=list)
    artifact: Artifact | None = None

    @property
    def traced(self) -> bool:
        """Whether it comes from a module, and not from a file."""
        return self.source.model is None


@dataclass
class StageGraph:
    """A graph at a stage.

    Attributes:
        stage: `canonical`, the specification of a pass, or `lowered`.
        graph: The graph.
        passes: Specifications of the passes that were applied, and at how many places each rewrote.
        target: The target that it was lowered to, as a specification; None before.
        native: Operators of the target's own files by type, where the format tells; None before lowering.
        notes: What a reader must know.
    """

    stage: str
    graph: ir.Model
    passes: dict[str, int] = field(default_factory=dict)
    target: str | None = None
    native: dict[str, int] | None = None
    notes: list[str] = field(default_factory=list)


def open_graph(model: str, inputs: Sequence[InputSpec] = (), weights: str | None = None, seed: int = 0) -> Opened:
    """Opens a model, or the optimized graph of an artifact.

    Args:
        model: As on the command line, or the folder of an artifact.
        inputs: The user's descriptions of inputs.
        weights: Weights to load into the module.
        seed: Seed of random weights and example inputs.

    Raises:
        SourceError, TraceError, UnsupportedOpError: The model cannot be read or traced.
    """
    artifact = open_artifact(Path(model)) if names_artifact(model) else None
    source = open_source(model if artifact is None else str(Path(model) / OPTIMIZED), inputs, weights, seed)
    graph = source.model
    if graph is None:
        graph = _traced(source)
        notes = check_model(graph, source.name)
        pin_inputs(graph, example_pins(graph, source))
    else:
        notes = check_model(graph, source.name)
        graph.graph.sort()  # a file may list its nodes in any order
        notes += pin(graph, inputs)
    infer_shapes(graph)
    return Opened(source, graph, [*source.notes, *notes], artifact)


def names_artifact(model: str) -> bool:
    """Whether what stands for a model on the command line is the folder of an artifact."""
    return model not in contracts.models.names() and (Path(model) / REPORT).is_file()


def canonical_graph(graph: ir.Model) -> ir.Model:
    """The canonical form of an opened graph, which may be changed on the way.

    Raises:
        SourceError, UnsupportedOpError: It has none.
    """
    graph = canonicalize(to_opset(graph, OPSET))
    infer_shapes(graph)
    return graph


def graph_at(recipe: Recipe, stage: str) -> StageGraph:
    """Makes the graph at a stage of a compile of `recipe`. Nothing is measured, so no pass is checked or undone.

    The model may be an artifact's folder: its optimized graph takes the place of the canonical one, no pass is applied but those
    that the recipe names, and its own target is the one that it is lowered to unless the recipe names one.

    Args:
        recipe: What to compile and how; the target may be empty where the stage is before lowering.
        stage: `canonical`, `lowered`, or a pass: its whole specification, or its name, which stands for the last one of that name.

    Raises:
        UsageError: There is no such stage, or no target to lower to.
        EdgekitError: The model cannot be opened, or a pass or the target fails.
    """
    notes: list[str] = []
    target = recipe.make_target() if recipe.target else None
    passes = [] if names_artifact(recipe.model) and recipe.passes is None else recipe.make_passes(notes)
    last = _last_pass(stage, passes)
    opened = open_graph(recipe.model, parse_inputs(recipe.inputs), recipe.weights, recipe.seed)
    if target is None and opened.artifact is not None:
        target = opened.artifact.target
    if stage == LOWERED and target is None:
        raise UsageError("no target to lower to", where=f"--stage {LOWERED}", fix="add --target openvino, or another of `edgekit targets`")
    notes += opened.notes
    graph = opened.graph if opened.artifact is not None and stage != CANONICAL else canonical_graph(opened.graph)
    applied = _apply(graph, passes[: last + 1], recipe, "" if target is None else target.name, opened.source)
    if stage != LOWERED or target is None:
        name = CANONICAL if last < 0 else specs.format_spec(passes[last].name, passes[last])
        return StageGraph(name, graph, applied, notes=notes)
    operators = None if opened.artifact is None or applied else _own_operators(opened.artifact, target)
    if operators is None:
        operators = _lowered_operators(graph, target)
    target.legalize(graph)
    infer_shapes(graph)
    return StageGraph(LOWERED, graph, applied, specs.format_spec(target.name, target), operators, notes)


def _traced(source: Source) -> ir.Model:
    failures = []
    for exporter in EXPORTERS:
        try:
            return trace(source, exporter).model
        except (TraceError, UnsupportedOpError) as error:
            failures.append(error)
    raise failures[0]


def _last_pass(stage: str, passes: Sequence[Pass]) -> int:
    """Position of the last pass to apply for `stage`; -1: none.

    Raises:
        UsageError: There is no such stage.
    """
    if stage == CANONICAL:
        return -1
    if stage == LOWERED:
        return len(passes) - 1
    full = [specs.format_spec(item.name, item) for item in passes]
    wanted = [index for index, spec in enumerate(full) if spec == stage] or [
        index for index, item in enumerate(passes) if item.name == stage
    ]
    if not wanted:
        known = [CANONICAL, LOWERED, *full]
        raise UsageError(f"there is no stage '{stage}'", where=f"--stage {stage}", fix=f"{nearest(stage, known)}; --pass NAME adds a pass")
    return wanted[-1]


def _apply(graph: ir.Model, passes: Sequence[Pass], recipe: Recipe, target: str, source: Source) -> dict[str, int]:
    """Applies passes in place; returns their specifications with the number of places each rewrote."""
    if not passes:
        return {}
    data = load_data(
        recipe.data, declared_inputs(graph), calibration=recipe.calibration, seed=recipe.seed, statistics=source.image_statistics
    )
    context = Context(data.calibration, target, np.random.default_rng(recipe.seed), not data.noise)
    applied: dict[str, int] = {}
    for item in passes:
        spec = specs.format_spec(item.name, item)
        rewrites = apply_pass(item, spec, graph, dataclasses.replace(context, refusals=[], rewrites=[]))
        applied[spec] = applied.get(spec, 0) + rewrites
        infer_shapes(graph)
    return applied


def _own_operators(artifact: Artifact, target: Target) -> dict[str, int] | None:
    """What the artifact's own files hold; None where they are another target's."""
    return target.native_operators(artifact.path) if artifact.target == target else None


def _lowered_operators(graph: ir.Model, target: Target) -> dict[str, int]:
    with tempfile.TemporaryDirectory(prefix="edgekit-") as temporary, Worker() as worker:
        source, folder = Path(temporary) / "source.onnx", Path(temporary) / "lowered"
        folder.mkdir()
        save_model(graph, source)
        in_worker(worker, f"lower to {target.name}", native.lower, target, source, folder)
        return target.native_operators(folder)
