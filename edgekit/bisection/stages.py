"""Level 1: the chain of stages of one compile, each made and run only when it is asked for, and none of them judged on the way."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit import native, specs
from edgekit.apply import apply_pass
from edgekit.bisection.judge import Judge
from edgekit.bisection.search import Search
from edgekit.contracts import Arrays, Context, Effect, Pass, Target
from edgekit.errors import LoweringError, ParityError, SourceError, UnsupportedOpError
from edgekit.evaluate import Evaluator, in_worker
from edgekit.graph import canonicalize
from edgekit.graph.files import save_model
from edgekit.graph.fingerprint import fingerprint
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.precision import graph_precision, lowest
from edgekit.graph.shapes import infer_shapes
from edgekit.isolation import Worker

LOWERED = "lowered"


@dataclass(frozen=True)
class Canonicalize(Pass):
    """The canonical form as a pass whose places are the steps that lead to it."""

    name: ClassVar[str] = "canonicalize"
    effect: ClassVar[Effect] = Effect.EXACT

    def apply(self, model: ir.Model, context: Context) -> int:
        """Takes the steps that are not skipped."""
        done = 0
        names: dict[str, int] = {}
        for step in canonicalize.STEPS:
            names[step.__name__] = count = names.get(step.__name__, 0) + 1
            name = step.__name__ if count == 1 else f"{step.__name__}.{count}"
            if context.skips(name):
                continue
            state = fingerprint(model)
            step(model)
            if fingerprint(model) != state:
                context.applied(name)
                done += 1
        return done


@dataclass(frozen=True)
class Rewritten:
    """A graph after a pass.

    Attributes:
        model: The graph; None where the pass failed.
        places: The places that it rewrote, in order, each once; where it failed, those that it had rewritten.
        failure: Why there is none.
        changed: Whether it is another graph than before.
    """

    model: ir.Model | None
    places: tuple[str, ...] = ()
    failure: str = ""
    changed: bool = True


@dataclass(frozen=True)
class Result:
    """What a stage computes.

    Attributes:
        outputs: Its outputs batch after batch; None where it does not run.
        precision: The lowest that it computes in.
        failure: Why it does not run.
    """

    outputs: list[Arrays] | None
    precision: str = "fp32"
    failure: str = ""


@dataclass
class Chain:
    """The stages of one compile: 0 is the original graph, then the canonical one, one a pass, and the last is the lowered artifact.

    Attributes:
        original: The original graph; it is not changed.
        reference: The original's own outputs.
        outcome: What its graph computes.
        passes: The passes.
        target: The target; None: the chain ends before it.
        evaluator: Runs graphs on the data.
        worker: The process for native code.
        folder: An existing folder for temporary files.
        calibration: Batches that passes may use.
        seed: Seed of every random choice.
        skip: Per pass, the places that it leaves alone.
        has_data: Whether the batches are the user's data, and not noise.
    """

    original: ir.Model
    reference: list[Arrays]
    outcome: list[Arrays]
    passes: Sequence[Pass]
    target: Target | None
    evaluator: Evaluator
    worker: Worker
    folder: Path
    calibration: Sequence[Arrays]
    seed: int = 0
    skip: Mapping[str, Sequence[str]] = field(default_factory=dict)
    has_data: bool = False
    _graphs: dict[int, Rewritten] = field(default_factory=dict)
    _results: dict[int, Result] = field(default_factory=dict)
    _generators: dict[int, np.random.Generator] = field(default_factory=dict)

    @property
    def steps(self) -> tuple[Pass, ...]:
        """What leads from one graph to the next."""
        return (Canonicalize(), *self.passes)

    @property
    def names(self) -> list[str]:
        """The stages by position."""
        names = ["original", "canonical", *(specs.format_spec(item.name, item) for item in self.passes)]
        return names if self.target is None else [*names, LOWERED]

    @property
    def last(self) -> int:
        """Position of the last stage."""
        return len(self.names) - 1

    def is_lowered(self, position: int) -> bool:
        """Whether a position is that of the artifact."""
        return position > len(self.steps)

    def rewritten(self, position: int) -> Rewritten:
        """The graph at a position; that of the artifact is the one that it was made from."""
        position = min(position, len(self.steps))
        if position not in self._graphs:
            if position == 0:
                self._graphs[0] = Rewritten(self.original)
                self._generators[0] = np.random.default_rng(self.seed)
            else:
                self._graphs[position] = self.apply(position, frozenset())
        return self._graphs[position]

    def apply(self, position: int, skip: frozenset[str]) -> Rewritten:
        """The graph at a position with more places of its pass skipped."""
        before = self.rewritten(position - 1)
        if before.model is None:
            return before
        item = self.steps[position - 1]
        model, generator = before.model.clone(), copy.deepcopy(self._generators[position - 1])
        if position == 1:
            model = to_opset(model, OPSET)
        context = Context(self.calibration, self.target.name if self.target else "", generator, self.has_data)
        context = dataclasses.replace(context, skip=skip | frozenset(self.skip.get(item.name, ())))
        state = fingerprint(model)
        try:
            apply_pass(item, self.names[position], model, context)
            infer_shapes(model)
        except (ParityError, UnsupportedOpError, SourceError) as error:
            self._generators.setdefault(position, generator)
            return Rewritten(None, tuple(dict.fromkeys(context.rewrites)), failure=error.what)
        if position not in self._graphs:
            self._generators[position] = generator
        return Rewritten(model, tuple(dict.fromkeys(context.rewrites)), changed=position == 1 or fingerprint(model) != state)

    def result(self, position: int) -> Result:
        """What the stage at a position computes."""
        if position not in self._results:
            self._results[position] = self._run(position)
        return self._results[position]

    def _run(self, position: int) -> Result:
        if position == 0:
            return Result(self.outcome, graph_precision(self.original))
        rewritten = self.rewritten(position)
        if self.is_lowered(position) and rewritten.model is not None:
            return self._run_lowered(rewritten.model)
        if not rewritten.changed:
            return self.result(position - 1)
        return self.run(rewritten, self.names[position])

    def run(self, rewritten: Rewritten, stage: str) -> Result:
        """What a graph computes on the calibration batches."""
        if rewritten.model is None:
            return Result(None, failure=rewritten.failure)
        precision = lowest(graph_precision(self.original), graph_precision(rewritten.model))
        try:
            return Result(self.evaluator.run(rewritten.model, stage, labelled=False).outputs, precision)
        except (LoweringError, UnsupportedOpError) as error:
            return Result(None, precision, error.what)

    def _run_lowered(self, model: ir.Model) -> Result:
        assert self.target is not None
        precision = lowest(graph_precision(self.original), graph_precision(model))
        folder = Path(tempfile.mkdtemp(prefix="chain-", dir=self.folder))
        try:
            save_model(model, folder / "source.onnx")
            place = folder / "out"
            place.mkdir()
            in_worker(self.worker, f"lower to {self.target.name}", native.lower, self.target, folder / "source.onnx", place)
            outcome = self.evaluator.run_lowered(self.target, place, model, "run artifact")
        except (LoweringError, UnsupportedOpError) as error:
            return Result(None, precision, error.what)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        facts = outcome.facts or {}
        executed = facts.get("executed_precision", self.target.precision)
        return Result(outcome.outputs, lowest(precision, executed, facts.get("weights_precision", executed)))

    def is_bad(self, result: Result, judge: Judge) -> bool:
        """Whether a result is too far from the original's own outputs."""
        return result.outputs is None or judge.outputs(self.reference, result.outputs, result.precision).bad


@dataclass(frozen=True)
class StageFound:
    """What level 1 found.

    Attributes:
        position: Of the first bad stage in the chain; None: all agree.
        name: Its name.
        stages: The names of all stages.
        why: How far it is off.
        evaluations: How many stages were run.
        bound: The most that it may take.
    """

    position: int | None
    name: str
    stages: tuple[str, ...]
    why: str
    evaluations: int
    bound: int


def find_stage(chain: Chain, judge: Judge) -> StageFound:
    """Finds the first stage whose outputs differ from the original's."""

    def is_bad(position: int) -> bool:
        return chain.is_bad(chain.result(position), judge)

    search = Search(chain.last, is_bad, {0: False})
    position, evaluations = search.first_bad(), search.evaluations
    if position is None and chain.is_lowered(chain.last):
        # A target may compute in more digits than the graph asks for, and so hide what a pass did.
        before = Search(chain.last - 1, is_bad, {0: False})
        position, evaluations = before.first_bad(), evaluations + before.evaluations
    names = tuple(chain.names)
    if position is None:
        return StageFound(None, "", names, "", evaluations, search.bound)
    result = chain.result(position)
    why = result.failure or judge.outputs(chain.reference, result.outputs or [], result.precision).why
    return StageFound(position, names[position], names, why, evaluations, search.bound)
