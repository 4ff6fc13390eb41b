"""Each batch of the data is run once, whatever parts of the data it belongs to."""

from __future__ import annotations

import traceback
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.data import Data
from edgekit.errors import LoweringError
from edgekit.evaluate import Evaluator, in_worker
from edgekit.isolation import Worker

MODEL = '<ir_version: 10, opset_import: ["" : 23]> net (float[2, 3] x) => (float[2, 3] y) { y = Identity(x) }'


def test_a_batch_of_several_parts_is_run_once(worker: Worker, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(0, 1, (2, 3)).astype(np.float32)} for _ in range(6)]
    picks = np.concatenate([batch["x"].argmax(1) for batch in batches])
    right = rng.integers(0, 2, 12).astype(bool)
    labels = np.where(right, picks, (picks + 1) % 3)
    cases = [
        (batches[:2], batches, batches, 6),
        (batches[:2], batches[2:4], batches[4:], 6),
        (batches[4:], batches[:3], batches[1:3], 5),
        ([batches[0], batches[0]], batches[:1], [], 2),
    ]
    for calibration, selection, test, runs in cases:
        places = [next(index for index, one in enumerate(batches) if one is batch) for batch in (*selection, *test)]
        of = [slice(2 * place, 2 * place + 2) for place in places]
        chosen, tested = of[: len(selection)], of[len(selection) :]
        data = Data("test", calibration, selection=selection, selection_labels=np.concatenate([labels[one] for one in chosen]))
        data.test, data.test_labels = test, np.concatenate([labels[one] for one in tested]) if test else None
        evaluator = Evaluator(worker, data, tmp_path, 1)
        assert len(evaluator.feeds) == runs
        outcome = evaluator.run(ir.from_proto(onnx.parser.parse_model(MODEL)), "stage")
        assert len(outcome.outputs) == len(calibration)
        for batch, outputs in zip(calibration, outcome.outputs, strict=True):
            np.testing.assert_array_equal(outputs["y"], batch["x"])
        np.testing.assert_array_equal(outcome.selection, np.concatenate([right[one] for one in chosen]))
        if test:
            np.testing.assert_array_equal(outcome.test, np.concatenate([right[one] for one in tested]))


def refuse() -> None:
    raise RuntimeError("the first line\nthe second line")


def test_what_a_worker_raised_stays_readable_in_full(worker: Worker) -> None:
    with pytest.raises(LoweringError, match="RuntimeError: the first line") as raised:
        in_worker(worker, "some stage", refuse)
    told = "".join(traceback.format_exception(raised.value))
    assert "the second line" in told
    assert "in refuse" in told
