"""Running a graph on the user's data at any stage of a compile, to see what a stage did to the numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgekit import metrics, native
from edgekit.contracts import Arrays, Target
from edgekit.data import Data, declared_inputs
from edgekit.errors import LoweringError
from edgekit.graph.files import save_model
from edgekit.graph.precision import graph_precision
from edgekit.isolation import Worker, WorkerDiedError, WorkerRaisedError
from edgekit.staging import FULL, full_error

_INLINE_IN_STAGE = 2**20
"""Bytes of weights in the file of a stage that is only run; beside it they are written, and read, without being packed into a message."""


@dataclass
class Outcome:
    """What a stage computes.

    Attributes:
        outputs: Outputs on the calibration batches.
        selection: Per sample of the selection data, whether the prediction is right; None without labels.
        test: The same on the test data.
        adversarial: Outputs on the adversarial inputs; None where the stage failed on one, or there are none.
        facts: What the runtime says of itself.
    """

    outputs: list[Arrays]
    selection: np.ndarray | None = None
    test: np.ndarray | None = None
    facts: dict[str, str] | None = None
    adversarial: list[Arrays] | None = None


class Evaluator:
    """Runs stages on the data of a compile, in the worker process.

    Args:
        worker: The process that native code runs in.
        data: The data of the compile.
        folder: An existing folder for temporary files.
        threads: Threads to run on.
    """

    def __init__(self, worker: Worker, data: Data, folder: Path, threads: int) -> None:
        self._worker = worker
        self._data = data
        self._folder = folder
        self._threads = threads

    @property
    def adversarial(self) -> tuple[str, ...]:
        """The kinds of adversarial inputs, in the order of `Outcome.adversarial`."""
        return tuple(self._data.adversarial)

    @property
    def feeds(self) -> list[Arrays]:
        """The batches in the order that `outcome` takes the outputs in: calibration, then those of selection and test that are others."""
        feeds = list(self._data.calibration)
        known = {id(feed) for feed in feeds}
        for feed in (*self._data.selection, *self._data.test):
            if id(feed) not in known:
                known.add(id(feed))
                feeds.append(feed)
        return feeds

    def outcome(self, outputs: list[Arrays], facts: dict[str, str] | None = None) -> Outcome:
        """Splits outputs on `feeds` into those of the calibration batches and the labelled parts' correctness."""
        data = self._data
        of_feed = {id(feed): output for feed, output in zip(self.feeds, outputs, strict=True)}
        outcome = Outcome(outputs[: len(data.calibration)], facts=facts)
        if data.selection_labels is not None:
            outcome.selection = metrics.top1([of_feed[id(feed)] for feed in data.selection], data.selection_labels)
        if data.test_labels is not None:
            outcome.test = metrics.top1([of_feed[id(feed)] for feed in data.test], data.test_labels)
        return outcome

    def run(self, model: ir.Model, stage: str, labelled: bool = True) -> Outcome:
        """Runs a graph in ONNX Runtime, or in the interpreter where it holds values of half precision.

        Args:
            model: The graph.
            stage: Its name, for errors.
            labelled: Whether to run it on the selection and test data too, or on the calibration batches alone.

        Raises:
            UnsupportedOpError, LoweringError: ONNX Runtime refused the graph or crashed.
        """
        path = self._folder / "stage.onnx"
        files = save_model(model, path, _INLINE_IN_STAGE)
        try:
            feeds = self.feeds if labelled else self._data.calibration
            run = native.run_rounded if graph_precision(model) in ("fp16", "bf16") else native.run_onnx

            def call(feeds: list[Arrays]) -> list[Arrays]:
                return in_worker(self._worker, stage, run, path, cast_feeds(feeds, model), self._threads)  # type: ignore[no-any-return]

            outputs, adversarial = self._also_adversarial(feeds, call)
        finally:
            for file in files:
                file.unlink(missing_ok=True)
        outcome = self.outcome(outputs) if labelled else Outcome(outputs)
        return dataclasses.replace(outcome, adversarial=adversarial)

    def run_lowered(self, target: Target, folder: Path, model: ir.Model, stage: str, feeds: Sequence[Arrays] | None = None) -> Outcome:
        """Runs what `target` wrote into `folder` for `model`, on `feeds` alone where they are given; else as `run`."""
        facts: dict[str, str] = {}

        def run(feeds: list[Arrays]) -> list[Arrays]:
            cast = cast_feeds(feeds, model)
            outputs, said = in_worker(self._worker, stage, native.run_lowered, target, folder, cast, self._threads)
            facts.update(said)
            return outputs  # type: ignore[no-any-return]

        if feeds is not None:
            return Outcome(run(list(feeds)), facts=facts)
        outputs, adversarial = self._also_adversarial(self.feeds, run)
        return dataclasses.replace(self.outcome(outputs, facts), adversarial=adversarial)

    def _also_adversarial(
        self, feeds: list[Arrays], run: Callable[[list[Arrays]], list[Arrays]]
    ) -> tuple[list[Arrays], list[Arrays] | None]:
        """Runs `feeds` and the adversarial inputs in one call, which loads the model once; a failure of the latter is no failure."""
        extremes = list(self._data.adversarial.values())
        if not extremes:
            return run(feeds), None
        try:
            outputs = run([*feeds, *extremes])
        except LoweringError:
            return run(feeds), None
        return outputs[: len(feeds)], outputs[len(feeds) :]


def cast_feeds(feeds: Sequence[Arrays], model: ir.Model) -> list[Arrays]:
    """The feeds in the dtypes of the graph's inputs, which a pass may have changed (`to-float16{keep_io=false}`)."""
    dtypes = {name: declared.dtype for name, declared in declared_inputs(model).items()}
    return [{name: array.astype(dtypes[name], copy=False) for name, array in feed.items()} for feed in feeds]


def in_worker(worker: Worker, stage: str, function, *arguments):  # type: ignore[no-untyped-def]
    """Calls `function(*arguments)` in the worker and turns a crash there into an error that names the stage.

    Raises:
        LoweringError: The worker crashed, or the function raised something that is not an error of edgekit.
        OutputError: The disk is full.
    """
    try:
        return worker.call(function, *arguments)
    except WorkerDiedError as error:
        raise LoweringError(
            f"the process that ran '{stage}' {error.reason}" + (f"; it last said: {error.output.splitlines()[-1]}" if error.output else ""),
            where=f"stage {stage}",
            fix="try another target or precision, or leave out the last pass",
        ) from error
    except WorkerRaisedError as error:
        if error.errno in FULL:
            raise full_error(f"stage {stage}", error.message) from error
        raise LoweringError(
            f"'{stage}' failed: {error.kind}: {error.message.splitlines()[0][:300] if error.message else ''}",
            where=f"stage {stage}",
            fix="try another target or precision; -v prints the whole error",
        ) from error
