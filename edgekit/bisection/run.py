"""`edgekit.bisect`: the levels one after the other, from a compile or from two files to a finding."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from edgekit import specs
from edgekit.bisection.finding import Finding
from edgekit.bisection.judge import Judge
from edgekit.bisection.nodes import NodeFound, Pair, find_lowered_node, find_node
from edgekit.bisection.remedy import candidates, try_remedy
from edgekit.bisection.reproduce import is_reproducer, write_reproducer
from edgekit.bisection.rewrites import find_rewrites
from edgekit.bisection.runner import Runner, annotate
from edgekit.bisection.stages import Chain, find_stage
from edgekit.bisection.tensors import TensorFound, find_operand, find_tensor
from edgekit.compiler import Job
from edgekit.contracts import Arrays, Pass
from edgekit.data import Data, declared_inputs, load_data
from edgekit.errors import EdgekitError, OutputError, ParityError, UsageError
from edgekit.evaluate import Evaluator
from edgekit.graph.parts import part
from edgekit.graph.precision import graph_precision, lowest
from edgekit.inputs import parse_inputs
from edgekit.isolation import Worker
from edgekit.machine import available_threads
from edgekit.original import Opener, Original
from edgekit.progress import Reporter
from edgekit.recipe import IN_MEMORY, Recipe, parse_skips

if TYPE_CHECKING:
    import torch


def bisect(
    model: str | Path | torch.nn.Module,
    example_inputs: Any = None,
    *,
    target: str | None = None,
    other: str | Path | None = None,
    passes: Sequence[str | Pass] | None = None,
    data: str | Iterable[Any] | None = None,
    precision: str = "",
    inputs: Sequence[str] = (),
    weights: str | None = None,
    calibration: int = 8,
    seed: int = 0,
    threads: int = 0,
    skip: Sequence[str] = (),
    min_sqnr: float | None = None,
    out: str | Path | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Finding:
    """Finds what makes a compile's numbers differ from the original's, or two ONNX files differ from one another.

    Args:
        model: As `edgekit.compile` takes it; the trusted file where `other` is given.
        example_inputs: For a module.
        target: Name of the target; None: the stages before it are looked at.
        other: An ONNX file that should compute the same as `model`.
        passes: Passes or their specifications; None: the default recipe.
        data: As `edgekit.compile` takes it.
        precision: The precision that the target executes in; empty: the target's own default.
        inputs: Shapes of inputs.
        weights: Weights to load into the module.
        calibration: Number of calibration inputs.
        seed: Seed of every random choice.
        threads: Threads to run on; 0: all.
        skip: Places that a pass leaves alone, each `PASS:PLACE`.
        min_sqnr: The least SQNR in dB that is still good; None: the rounding that the precision allows.
        out: Folder to write a reproducing file to; None: none is written.
        force: Whether an earlier one at `out` is replaced.
        reporter: Told how far it has come.

    Raises:
        EdgekitError: One of its subclasses, where the model or an option cannot be used.
    """
    made = None if passes is None else [specs.make_pass(item) if isinstance(item, str) else item for item in passes]
    named = isinstance(model, str | Path)
    recipe = Recipe(
        model=str(model) if named else f"{IN_MEMORY}{type(model).__module__}.{type(model).__qualname__}",
        target=target or "",
        precision=precision,
        passes=None if made is None else tuple(specs.format_spec(item.name, item) for item in made),
        data=data if data is None or isinstance(data, str) else f"{IN_MEMORY}{type(data).__qualname__}",
        inputs=tuple(inputs),
        weights=weights,
        calibration=calibration,
        seed=seed,
        threads=threads,
        skip=parse_skips(skip),
    )
    job = Job(
        recipe,
        module=None if isinstance(model, str | Path) else (model, example_inputs),
        data=None if isinstance(data, str) else data,
        passes=made,
    )
    folder = None if out is None else Path(out)
    if other is not None:
        return bisect_files(job, Path(other), min_sqnr, folder, force=force, reporter=reporter or Reporter())
    return bisect_job(job, min_sqnr, folder, force=force, reporter=reporter or Reporter())


def bisect_job(
    job: Job, min_sqnr: float | None, out: Path | None, *, force: bool = False, reporter: Reporter, worker: Worker | None = None
) -> Finding:
    """Bisects the stages of a compile; arguments and errors as of `bisect`."""
    recipe = job.recipe
    target = recipe.make_target() if recipe.target else None
    notes: list[str] = []
    passes = recipe.make_passes(notes) if job.passes is None else list(job.passes)
    recipe.require_skipped(passes)
    judge = _judge(min_sqnr)
    _check_out(out, force)
    reporter.expect(len(passes) + 8)
    with _workplace(worker) as (worker, scratch):
        threads = recipe.threads or available_threads()
        data = recipe.data if job.data is None else job.data
        original = Opener(recipe, parse_inputs(recipe.inputs), data, scratch, threads, worker, reporter).open(job.module)
        finding = Finding(recipe.model, notes=[*original.notes, *notes])
        chain = Chain(
            original.model, original.reference, original.outcome.outputs, passes, target,
            Evaluator(worker, Data(original.data.origin, original.data.calibration), scratch, threads), worker, scratch,
            original.data.calibration, recipe.seed, recipe.skip, not original.data.noise,
        )  # fmt: skip
        with reporter.stage("bisect stages"):
            finding.stage = find_stage(chain, judge)
        if finding.stage.position is None:
            finding.agree = True
            return finding
        runner = Runner(worker, scratch, threads)
        with reporter.stage("bisect within the stage"):
            _within_stage(finding, chain, original, judge, runner, out, force)
        with reporter.stage("try remedies"):
            _remedies(finding, chain, judge, recipe, _recalibration(job, original))
    return finding


def _within_stage(finding: Finding, chain: Chain, original: Original, judge: Judge, runner: Runner, out: Path | None, force: bool) -> None:
    assert finding.stage is not None
    position = finding.stage.position
    assert position is not None
    result = chain.result(position)
    batch = None if result.outputs is None else judge.worst_batch(chain.reference, result.outputs, result.precision)
    feed = original.data.calibration[batch or 0]
    if chain.is_lowered(position):
        _lowered(finding, chain, feed, judge, result.precision, runner, out, force)
        return
    narrow = chain if batch is None else _on_batch(chain, original, batch, runner)
    finding.rewrite = found = find_rewrites(narrow, position, judge)
    good, bad = found.good.model, found.bad.model
    if good is None or bad is None:
        finding.notes.append(f"no node can be named: {found.bad.failure or found.good.failure}")
        return
    precision = lowest(graph_precision(original.model), graph_precision(bad))
    _between_graphs(finding, good, bad, feed, judge, precision, runner, out, force)


def _on_batch(chain: Chain, original: Original, batch: int, runner: Runner) -> Chain:
    """The chain on the one batch that is furthest off; its graphs are those that are made already."""
    data = Data(original.data.origin, [original.data.calibration[batch]])
    narrow = dataclasses.replace(
        chain,
        reference=[chain.reference[batch]],
        outcome=[chain.outcome[batch]],
        evaluator=Evaluator(chain.worker, data, chain.folder, runner.threads),
        _results={},
    )
    return narrow


def _between_graphs(
    finding: Finding,
    good: ir.Model,
    bad: ir.Model,
    feed: Arrays,
    judge: Judge,
    precision: str,
    runner: Runner,
    out: Path | None,
    force: bool,
) -> None:
    try:
        pair = Pair.run(good, bad, feed, runner)
    except EdgekitError as error:
        finding.notes.append(f"no node can be named: {error.what}")
        return
    annotate(good, pair.good_values)
    annotate(bad, pair.bad_values)
    places = finding.rewrite.places if finding.rewrite is not None else ()
    found = find_node(pair, judge, precision, places)
    finding.node = found
    if found is None:
        finding.notes.append("every value that both graphs have agrees: no node can be named")
        return
    finding.tensor = find_tensor(found, pair, judge, precision, runner)
    if out is not None:
        given = {name: pair.good_values[other] for name, other in found.inputs.items()}
        expected = pair.good_values[next(o for o in pair.names[found.output.name or ""] if o in pair.good_values)]
        given = {name: array.astype(pair.bad_values[name].dtype) for name, array in given.items()}
        headline = _headline(found, finding.tensor)
        finding.reproducer = write_reproducer(out, found, bad, given, expected, judge, precision, runner, None, headline, force)


def _lowered(
    finding: Finding, chain: Chain, feed: Arrays, judge: Judge, precision: str, runner: Runner, out: Path | None, force: bool
) -> None:
    model, target = chain.rewritten(chain.last).model, chain.target
    assert model is not None
    assert target is not None
    try:
        values = runner.values(model, feed)
    except EdgekitError as error:
        finding.notes.append(f"no node can be named: {error.what}")
        return
    annotate(model, values)
    finding.node = found = find_lowered_node(model, values, feed, target, judge, precision, runner)
    if found is None:
        finding.notes.append(f"no part of the graph by itself is wrong on {target.name}: it differs only when the whole is lowered")
        return
    expected = values[found.output.name or ""]
    wrong = _lowered_value(found, model, values, chain, runner)
    if wrong is not None:
        finding.tensor = find_operand(found, values, wrong, precision, judge, model, runner)
    if out is not None:
        headline = _headline(found, finding.tensor)
        finding.reproducer = write_reproducer(out, found, model, values, expected, judge, precision, runner, target, headline, force)


def _lowered_value(found: NodeFound, model: ir.Model, values: Arrays, chain: Chain, runner: Runner) -> Any:
    named = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None}
    cut = part(model, [found.output], {named[name] for name in found.inputs})
    assert chain.target is not None
    try:
        return runner.lowered(chain.target, cut, {str(value.name): values[str(value.name)] for value in cut.graph.inputs})[
            found.output.name or ""
        ]
    except EdgekitError:
        return None


def _headline(found: NodeFound, tensor: TensorFound | None) -> str:
    text = f"{found.node.op_type} '{found.node.name}' gives a wrong '{found.output.name}'"
    return text if tensor is None else f"{text}: {tensor.role} '{tensor.name}' {tensor.text}"


def _remedies(finding: Finding, chain: Chain, judge: Judge, recipe: Recipe, recalibrate: Callable[[int], list[Arrays]] | None) -> None:
    assert finding.stage is not None
    assert finding.stage.position is not None
    places = finding.rewrite.places if finding.rewrite is not None else ()
    complete = finding.rewrite is not None and finding.rewrite.complete
    nodes = [finding.node.node.name or ""] if finding.node is not None else []
    for remedy in candidates(chain, finding.stage.position, places, complete, nodes, recipe.calibration):
        tried = try_remedy(remedy, chain, judge, recalibrate)
        finding.remedies.append(tried)
        if tried.works:
            return


def _recalibration(job: Job, original: Original) -> Callable[[int], list[Arrays]] | None:
    """Reads more batches of the same data; None where it was handed over in memory."""
    if job.data is not None:
        return None
    recipe, statistics = job.recipe, original.source.image_statistics

    def load(calibration: int) -> list[Arrays]:
        declared = declared_inputs(original.model)
        return load_data(recipe.data, declared, calibration=calibration, seed=recipe.seed, statistics=statistics).calibration

    return load


def bisect_files(
    job: Job,
    other: Path,
    min_sqnr: float | None,
    out: Path | None,
    *,
    force: bool = False,
    reporter: Reporter,
    worker: Worker | None = None,
) -> Finding:
    """Bisects two files that should compute the same; arguments and errors as of `bisect`.

    Inputs and outputs of the second go by the names of the first, in order, where their own are others.

    Raises:
        ParityError: They do not have the same inputs and outputs.
        UsageError: One of them is not an ONNX file.
    """
    for name in (job.recipe.model, str(other)):
        if Path(name).suffix.lower() != ".onnx":
            raise UsageError(f"'{name}' is not an .onnx file", fix="two graphs are compared as files: edgekit bisect A.onnx B.onnx")
    judge = _judge(min_sqnr)
    _check_out(out, force)
    recipe = job.recipe
    finding = Finding(f"{recipe.model} and {other}")
    with _workplace(worker) as (worker, scratch):
        threads = recipe.threads or available_threads()

        def open_file(name: str, data: Any) -> Original:
            own = dataclasses.replace(recipe, model=name)
            return Opener(own, parse_inputs(recipe.inputs), data, scratch, threads, worker, reporter).open()

        first = open_file(recipe.model, recipe.data if job.data is None else job.data)
        second = _opened_alike(first, open_file, other)
        _align(first.model, second.model, str(other))
        reference = first.outcome.outputs
        names = dict(zip(second.outcome.outputs[0], reference[0], strict=True))
        outputs = [{names[name]: array for name, array in batch.items()} for batch in second.outcome.outputs]
        finding.notes += list(dict.fromkeys([*first.notes, *second.notes]))
        precision = lowest(graph_precision(first.model), graph_precision(second.model))
        if not judge.outputs(reference, outputs, precision).bad:
            finding.agree = True
            return finding
        runner = Runner(worker, scratch, threads)
        batch = judge.worst_batch(reference, outputs, precision) or 0
        with reporter.stage("bisect nodes"):
            feed = first.data.calibration[batch]
            _between_graphs(finding, first.model, second.model, feed, judge, precision, runner, out, force)
    return finding


def _opened_alike(first: Original, open_file: Callable[[str, Any], Original], other: Path) -> Original:
    """The second file on the very batches of the first, under its own input names."""
    from edgekit.onnx_file import read_onnx

    names = [value.name or "" for value in read_onnx(other).graph.inputs]
    given = list(first.data.calibration[0])
    if len(names) != len(given):
        raise ParityError(f"the files have {len(given)} and {len(names)} inputs", where=str(other), fix="give two files of one network")
    renamed = dict(zip(given, given if set(names) == set(given) else names, strict=True))
    return open_file(str(other), [{renamed[name]: array for name, array in batch.items()} for batch in first.data.calibration])


def _align(first: ir.Model, second: ir.Model, where: str) -> None:
    """Gives the inputs and outputs of `second` the names of those of `first`."""
    for ours, theirs, what in ((first.graph.inputs, second.graph.inputs, "inputs"), (first.graph.outputs, second.graph.outputs, "outputs")):
        if len(ours) != len(theirs):
            raise ParityError(f"the files have {len(ours)} and {len(theirs)} {what}", where=where, fix="give two files of one network")
        if {value.name for value in ours} == {value.name for value in theirs}:
            continue
        taken = {output.name: output for node in second.graph for output in node.outputs}
        for mine, value in zip(ours, theirs, strict=True):
            if mine.name in taken and taken[mine.name] is not value:
                taken[mine.name].name = f"{mine.name}_of_second"
            value.name = mine.name


def _judge(min_sqnr: float | None) -> Judge:
    if min_sqnr is not None and not 0.0 <= min_sqnr < float("inf"):
        raise UsageError(f"--min-sqnr {min_sqnr:g} is not a number of decibels from 0", fix="give one such as 40")
    return Judge(min_sqnr)


def _check_out(out: Path | None, force: bool) -> None:
    """Refuses an unusable folder before anything slow; the writing itself checks again."""
    if out is None or not out.exists():
        return
    if not force:
        raise OutputError("the output folder exists", where=str(out), fix="give another by --out, or --force to replace it")
    if not out.is_dir() or (any(out.iterdir()) and not is_reproducer(out)):
        raise OutputError("the output place holds something that is not a reproducer", where=str(out), fix="give another by --out")


@contextlib.contextmanager
def _workplace(worker: Worker | None) -> Any:
    """A worker and a folder for temporary files."""
    with contextlib.ExitStack() as stack:
        given = stack.enter_context(Worker()) if worker is None else worker
        yield given, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekit-bisect-")))
