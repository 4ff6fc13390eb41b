"""`edgekit compile`: from a model to a checked and timed artifact, one stage after the other."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekit import native, specs
from edgekit.adversarial import findings
from edgekit.artifact import (
    BASELINE,
    OPTIMIZED,
    PARITY,
    RECIPE,
    REPORT,
    TOKENS,
    Artifact,
    KeptParity,
    is_artifact,
    save_parity,
)
from edgekit.collection import collected_later
from edgekit.contracts import Arrays, Context, Effect, Pass, Target
from edgekit.data import declared_inputs
from edgekit.errors import BudgetError, LoweringError, MissingToolError, ParityError, UnsupportedOpError
from edgekit.evaluate import Evaluator, Outcome, cast_feeds, in_worker
from edgekit.flexible import Several, Variant, plan_shapes
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.cost import cost
from edgekit.graph.files import save_model
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.precision import graph_precision, lowest
from edgekit.graph.shapes import infer_shapes
from edgekit.inputs import parse_inputs
from edgekit.isolation import Worker
from edgekit.machine import available_threads, install_command, version, versions
from edgekit.native import Timed
from edgekit.original import Opener, Original
from edgekit.parity_table import ParityTable
from edgekit.pipeline import Budget, PassResult, run_passes
from edgekit.profile.host import latency
from edgekit.progress import Reporter
from edgekit.recipe import IN_MEMORY, Recipe, dump_recipe, parse_skips
from edgekit.recovery import Wish, checkpoint_of, recover_graph, require_possible
from edgekit.report.build import Compiled, build_report, write_report
from edgekit.report.token_picture import token_picture
from edgekit.staging import full_error, lacks_room, staged
from edgekit.verify import assert_close, compare

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch


RECOVERY_INPUTS = 256
"""Calibration inputs where none are asked for and the graph is to be recovered."""


@dataclass(frozen=True)
class Timing:
    """How long to measure latency.

    Attributes:
        budget_s: Seconds at most; 0: not at all.
        max_runs: Runs at most of each side.
    """

    budget_s: float = 10.0
    max_runs: int = 1000


@dataclass(frozen=True)
class Job:
    """A compile as the Python API gives it: a recipe and what a recipe cannot hold.

    Attributes:
        recipe: What to compile and how.
        module: A module in memory with its example inputs, or None.
        data: An iterable of samples in memory, or None.
        passes: The passes in memory, or None for those of the recipe.
        timing: How long to measure latency.
        resume: Whether to take up a recovery that was killed.
    """

    recipe: Recipe
    module: tuple[torch.nn.Module, Any] | None = None
    data: Iterable[Any] | None = None
    passes: Sequence[Pass] | None = None
    timing: Timing = Timing()
    resume: bool = False


def compile(
    model: str | Path | torch.nn.Module,
    example_inputs: Any = None,
    *,
    target: str,
    passes: Sequence[str | Pass] | None = None,
    data: str | Iterable[Any] | None = None,
    precision: str = "",
    out: str | Path | None = None,
    inputs: Sequence[str] = (),
    weights: str | None = None,
    calibration: int | None = None,
    max_drop: float | None = None,
    recover: float | None = None,
    seed: int = 0,
    threads: int = 0,
    skip: Sequence[str] = (),
    force: bool = False,
    timing: Timing | None = None,
    reporter: Reporter | None = None,
) -> Artifact:
    """Compiles a model for a target.

    Args:
        model: A module, a path, or any name that the command line takes.
        example_inputs: For a module: a tensor or array, a sequence of them, or a mapping by argument name.
        target: Name of the target, with options in braces where it has some.
        passes: Passes or their specification strings, in order; None: the default recipe.
        data: A dataset name, a folder of images, an `.npz`, `package.module:iterable`, or an iterable of samples;
            None: seeded noise, and the report says so.
        precision: The precision that the target executes in; empty: the target's own default.
        out: The artifact's folder; None: a temporary one that lives as long as the returned artifact.
        inputs: Shapes of inputs, such as `x:1,3,224,224`.
        weights: A `.safetensors` file or state dict to load into the module.
        calibration: Number of calibration inputs; None: 8, and 256 where the graph is to be recovered.
        max_drop: The most that approximate passes may cost, in percentage points.
        recover: Minutes to train the graph towards what it was before the first approximate pass.
        seed: Seed of every random choice.
        threads: Threads that the target runs on; 0: all that this process may use.
        skip: Places that a pass leaves alone, each `PASS:PLACE`.
        force: Whether an earlier artifact at `out` is replaced.
        timing: How long to measure latency; None: ten seconds.
        reporter: Told how far the compile has come.

    Raises:
        EdgekitError: One of its subclasses, see `edgekit.errors`.
    """
    named = isinstance(model, str | Path)
    made = None if passes is None else [specs.make_pass(item) if isinstance(item, str) else item for item in passes]
    recipe = Recipe(
        model=str(model) if named else f"{IN_MEMORY}{type(model).__module__}.{type(model).__qualname__}",
        target=target,
        precision=precision,
        passes=None if made is None else tuple(specs.format_spec(item.name, item) for item in made),
        data=data if data is None or isinstance(data, str) else f"{IN_MEMORY}{type(data).__qualname__}",
        inputs=tuple(inputs),
        weights=weights,
        calibration=calibration or (8 if recover is None else RECOVERY_INPUTS),
        max_drop=max_drop,
        recover=recover,
        seed=seed,
        threads=threads,
        skip=parse_skips(skip),
    )
    job = Job(
        recipe,
        module=None if isinstance(model, str | Path) else (model, example_inputs),
        data=None if isinstance(data, str) else data,
        passes=made,
        timing=timing or Timing(),
    )
    keep = None
    if out is None:
        keep = tempfile.TemporaryDirectory(prefix="edgekit-")
        out = Path(keep.name) / "artifact"
    artifact = run_job(job, Path(out), force=force, reporter=reporter or Reporter())
    artifact.keep = keep
    return artifact


def run_job(job: Job, out: Path, *, force: bool = False, reporter: Reporter, worker: Worker | None = None) -> Artifact:
    """Compiles and writes the artifact to `out`.

    Args:
        job: What to compile and how.
        out: The artifact's folder.
        force: Whether an earlier artifact at `out` is replaced.
        reporter: Told how far the compile has come.
        worker: The process for native code; None: one is started and ended.

    Raises:
        EdgekitError: One of its subclasses.
    """
    # Everything that may have been mistyped is looked at before anything slow.
    recipe = job.recipe
    target = recipe.make_target()
    notes: list[str] = []
    passes = recipe.make_passes(notes) if job.passes is None else list(job.passes)
    recipe.require_skipped(passes)
    inputs = parse_inputs(recipe.inputs)
    shapes = plan_shapes(inputs, target)
    require_possible(recipe.recover, shapes is not None, job.resume)
    _require_installed(target)
    recipe = dataclasses.replace(recipe, precision=target.precision, passes=tuple(specs.format_spec(item.name, item) for item in passes))
    threads = recipe.threads or available_threads()
    timed = job.timing.budget_s > 0 and target.executes_here
    reporter.expect(len(passes) + (8 if timed else 6) + (0 if shapes is None else shapes.stages) + (recipe.recover is not None))
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(Worker()) if worker is None else worker
        folder = stack.enter_context(staged(out, is_artifact if force else None))
        # Beside what is written, on the same file system: it is removed before the folder is renamed in.
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".scratch-", dir=folder)))
        opener = Opener(recipe, inputs, recipe.data if job.data is None else job.data, scratch, threads, worker, reporter)
        original = opener.open(job.module)
        original.notes += notes
        if job.timing.budget_s and not timed:
            original.notes.append(f"latency was not measured: {target.name} executes on its own devices, not on this machine")
        evaluator = Evaluator(worker, original.data, scratch, threads)
        several = None if shapes is None else Several(shapes, opener, job.module, scratch)
        wish = None
        if recipe.recover is not None:
            wish = Wish(recipe.recover, recipe.recover_steps, recipe.seed, threads, checkpoint_of(out), job.resume)
        compiled = _optimize_and_lower(recipe, target, passes, original, evaluator, folder, several, wish, worker, reporter)
        if compiled.recovered is not None:
            recipe = dataclasses.replace(recipe, recover_steps=compiled.recovered.steps)
        if timed:
            result = Timed(target, folder, compiled.feed)
            compiled.latency = _measure(original, result, folder / BASELINE, threads, job.timing, recipe.seed, worker, reporter)
        found = versions(target.requires)
        text = dump_recipe(recipe, found)
        (folder / RECIPE).write_text(text, encoding="utf-8")
        in_worker(worker, "recipe", native.annotate, target, folder, text)
        report = build_report(recipe, original, compiled, reporter.stages, found, folder)
        write_report(folder / REPORT, report)
    return Artifact(out, report, recipe)


def _optimize_and_lower(
    recipe: Recipe,
    target: Target,
    passes: list[Pass],
    original: Original,
    evaluator: Evaluator,
    folder: Path,
    several: Several | None,
    wish: Wish | None,
    worker: Worker,
    reporter: Reporter,
) -> Compiled:
    table = _table(original, evaluator)
    with reporter.stage("canonicalize"), collected_later():
        graph = canonicalize(to_opset(original.model.clone(), OPSET))
        infer_shapes(graph)
        canonical = evaluator.run(graph, "canonicalize", labelled=False)
        parity = assert_close(original.outcome.outputs, canonical.outputs, stage="canonicalize", precision=graph_precision(graph))
        base = dataclasses.replace(original.outcome, outputs=canonical.outputs, adversarial=canonical.adversarial)
        table.add("canonical", base, parity)
        notes = _adversarial_notes("canonicalize", evaluator, original.outcome, base, graph_precision(graph))
    context = Context(original.data.calibration, target.name, np.random.default_rng(recipe.seed), not original.data.noise)
    budget = None if recipe.max_drop is None else Budget(recipe.max_drop)
    if budget is not None:
        budget.require_measure(base)
    teachers: list[ir.Model] = []
    keep = None if wish is None else teachers.append
    graph, optimized, results = run_passes(graph, passes, context, evaluator, base, reporter, budget, table, recipe.skip, keep)
    recovered = None
    if wish is not None and not teachers:
        notes.append("there is nothing to recover: no approximate pass ran")
    elif wish is not None:
        optimized, recovered = recover_graph(graph, teachers[0], original.data.calibration, wish, evaluator, reporter)
        table.add("recover", optimized, compare(base.outputs, optimized.outputs))
    notes += [warning for result in results for warning in result.warnings]
    variants: list[Variant] = []
    if several is not None:
        kept = [item for item, result in zip(passes, results, strict=True) if result.undone is None]
        variants = several.variants(original, kept, context, recipe.skip)
    stage = f"lower to {target.name}"
    with reporter.stage(stage):
        save_model(graph, folder / OPTIMIZED)
        if several is None:
            _lower(worker, stage, [folder / OPTIMIZED], folder, native.lower, target, folder / OPTIMIZED, folder)
        else:
            paths = [several.folder / f"variant-{number}.onnx" for number in range(len(variants))]
            for variant, path in zip(variants, paths, strict=True):
                save_model(variant.graph, path)
            _lower(worker, stage, paths, folder, native.lower_sizes, target, paths, several.shapes(variants), folder)
    with reporter.stage("run artifact"):
        feeds = cast_feeds(original.data.calibration, graph)
        lowered = evaluator.run_lowered(target, folder, graph, "run artifact")
        assert lowered.facts is not None
        precision = _executed_precision(graph_precision(graph), target, lowered.facts, original.notes)
        stage = f"lowering to {target.name}"
        exact = target.effect is Effect.EXACT
        close = assert_close(optimized.outputs, lowered.outputs, stage=stage, precision=precision) if exact else None
        row = table.add("lowered", lowered, close)
        whole = exact and all(result.parity is None or result.effect is Effect.EXACT for result in results)
        if whole:
            assert_close(original.reference, lowered.outputs, stage="the whole compile", precision=precision)
        if exact:
            notes += _adversarial_notes(stage, evaluator, optimized, lowered, precision)
        original.notes += notes
        _hold_budget(budget, base, lowered, results)
        held = precision if whole else ""
        checks = [] if several is None else several.check(variants, original, evaluator, target, folder, graph, held)
        save_parity(folder / PARITY, KeptParity(feeds, original.reference, optimized.outputs if exact else lowered.outputs))
        pictures = [] if original.data.noise else _draw_tokens(graph, feeds, folder)
    return Compiled(
        original_cost=cost(original.baseline),
        canonical=parity,
        passes=results,
        base=base,
        lowered=lowered,
        parity=row.data.original or compare(original.reference, lowered.outputs),
        precision=precision,
        inputs=declared_inputs(graph),
        feed=feeds[0],
        parity_table=table.rows,
        shapes=checks,
        pictures=pictures,
        recovered=recovered,
    )


def _draw_tokens(graph: ir.Model, feeds: list[Arrays], folder: Path) -> list[str]:
    """Writes the picture of which tokens were kept, where the graph leaves some out; returns its name."""
    picture = token_picture(graph, feeds)
    if picture is None:
        return []
    picture.save(folder / TOKENS)
    return [TOKENS]


def _table(original: Original, evaluator: Evaluator) -> ParityTable:
    """The table with the rows of the original and, where it is a module, of its traced graph."""
    table = ParityTable(evaluator.adversarial)
    if original.source.module is None:
        table.add("file", original.outcome)
    else:
        table.add("torch", Outcome(original.reference, adversarial=original.reference_adversarial))
        table.add("traced", original.outcome)
    return table


def _adversarial_notes(stage: str, evaluator: Evaluator, before: Outcome, after: Outcome, precision: str) -> list[str]:
    if before.adversarial is None:
        return []
    if after.adversarial is None:
        return [f"the graph does not run on adversarial inputs after {stage}"]
    found = findings(evaluator.adversarial, before.adversarial, after.adversarial, stage=stage, precision=precision)
    return [finding.text for finding in found]


def _executed_precision(graph: str, target: Target, facts: dict[str, str], notes: list[str]) -> str:
    """The lowest precision that takes part, as the runtime tells of itself; adds a note where it is not the one asked for."""
    executed = facts.get("executed_precision", target.precision)
    if executed != target.precision:
        notes.append(f"{target.precision} was asked for, {target.name} executes in {executed} on this processor")
    return lowest(graph, executed, facts.get("weights_precision", executed))


def _lower(worker: Worker, stage: str, sources: Sequence[Path], folder: Path, function: Callable[..., None], *arguments: Any) -> None:
    """Calls `function`, which lowers the graphs in `sources` into `folder`."""
    try:
        in_worker(worker, stage, function, *arguments)
    except LoweringError as error:
        # Targets write the graph twice at most: for their compiler, and what it makes of it.
        files = [file for source in sources for file in (source, source.with_name(f"{source.name}.data")) if file.exists()]
        if lacks_room(folder, 2 * sum(file.stat().st_size for file in files)):
            raise full_error(f"stage {stage}", error.what) from error
        raise


def _hold_budget(budget: Budget | None, base: Outcome, lowered: Outcome, results: list[PassResult]) -> None:
    if budget is None or (excess := budget.exceeded(base, lowered)) is None:
        return
    undone = [f"{result.spec}: {result.undone}" for result in results if result.undone]
    raise BudgetError(
        f"the compiled model misses the accuracy budget: {excess}",
        where="; ".join(undone) or None,
        fix="raise --max-drop, or choose another precision or weaker passes",
    )


def _measure(
    original: Original, result: Timed, folder: Path, threads: int, timing: Timing, seed: int, worker: Worker, reporter: Reporter
) -> dict[str, Any]:
    timed = {"result": result}
    with reporter.stage("lower baseline"):
        baseline = Timed(result.target.uncompressed(), folder, original.data.calibration[0])
        try:
            _lower_baseline(original, baseline, threads, worker)
            timed["baseline"] = baseline
        except (LoweringError, UnsupportedOpError, ParityError) as error:
            shutil.rmtree(folder)
            original.notes.append(f"the uncompressed model could not be timed beside the result: {error.what}")
    with reporter.stage("latency", timing.budget_s):
        return latency(worker, timed, threads, timing.budget_s, timing.max_runs, seed)


def _lower_baseline(original: Original, baseline: Timed, threads: int, worker: Worker) -> None:
    """Lowers the uncompressed model as the exporter gives it by default, and checks that it computes what the original does."""
    baseline.folder.mkdir()
    files = save_model(original.baseline, baseline.folder / "source.onnx")
    _lower(worker, "lower baseline", files[:1], baseline.folder, native.lower, baseline.target, files[0], baseline.folder)
    for file in files:
        file.unlink()
    outputs, _ = in_worker(worker, "run baseline", native.run_lowered, baseline.target, baseline.folder, [baseline.feed], threads)
    precision = lowest(graph_precision(original.baseline), baseline.target.precision)
    assert_close(original.reference[:1], outputs, stage="the baseline", precision=precision)


def _require_installed(target: Target) -> None:
    missing = [package for package in target.requires if version(package) is None]
    if missing:
        raise MissingToolError(f"target '{target.name}' needs the package '{missing[0]}'", fix=install_command(target.extra, missing))
