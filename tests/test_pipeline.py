"""The pipeline holds EXACT passes to their promise, measures APPROXIMATE ones, and names what broke."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from edgekit.contracts import Context, Effect, Pass
from edgekit.data import Data
from edgekit.errors import EdgekitError, ParityError, PassError
from edgekit.evaluate import Evaluator, Outcome
from edgekit.isolation import Worker
from edgekit.pipeline import Budget, run_passes
from edgekit.progress import Reporter

MODEL = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[2, 3] x) => (float[2, 4] y)
<float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
{ z = MatMul(x, w)  y = Relu(z) }
"""


def scale_weights(model: ir.Model, factor: float) -> int:
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float32), name="w")
    return 1


def make(effect: Effect, rewrite: Callable[[ir.Model, Context], int], label: str = "test-pass") -> Pass:
    @dataclass(frozen=True)
    class TestPass(Pass):
        name: ClassVar[str] = label
        effect: ClassVar[Effect]

        def apply(self, model: ir.Model, context: Context) -> int:
            return rewrite(model, context)

    TestPass.effect = effect
    return TestPass()


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as worker:
        yield worker


@pytest.fixture
def run(worker: Worker, tmp_path: Path):
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(0.5, 1, (2, 3)).astype(np.float32)} for _ in range(20)]

    def run(*passes: Pass, budget: float | None = None):
        model = ir.from_proto(onnx.parser.parse_model(MODEL))
        everything = Evaluator(worker, Data("test", batches), tmp_path, 1).run(model, "labels").outputs
        labels = np.concatenate([outputs["y"].argmax(-1) for outputs in everything])  # the uncompressed model is always right
        data = Data("test", batches[:4], selection=batches, selection_labels=labels, test=batches, test_labels=labels)
        evaluator = Evaluator(worker, data, tmp_path, 1)
        base = evaluator.run(model, "base")
        return run_passes(model, passes, Context(data.calibration), evaluator, base, Reporter(), None if budget is None else Budget(budget))

    return run


def test_an_exact_pass_that_keeps_the_numbers(run) -> None:
    _, outcome, (result,) = run(make(Effect.EXACT, lambda model, _: scale_weights(model, 1 + 1e-7)))
    assert result.rewrites == 1
    assert result.parity is not None
    assert result.parity.max_abs_error < 1e-4
    assert result.metric is not None
    assert result.metric.value == 1.0
    assert isinstance(outcome, Outcome)


def test_an_exact_pass_that_does_not_is_named(run) -> None:
    fine = make(Effect.EXACT, lambda model, _: scale_weights(model, 1.0), "fine")
    wrong = make(Effect.EXACT, lambda model, _: scale_weights(model, 1.001), "wrong")
    with pytest.raises(ParityError, match="'wrong'") as caught:
        run(fine, wrong)
    assert caught.value.exit_code == 5


def test_an_approximate_pass_is_measured(run) -> None:
    _, _, (result,) = run(make(Effect.APPROXIMATE, lambda model, _: scale_weights(model, 1.001)))
    assert result.parity is not None
    assert result.parity.sqnr_db == pytest.approx(60, abs=0.1)  # 20 log10(1 / 0.001)
    assert result.undone is None


def test_no_match_is_said_and_costs_no_check(run) -> None:
    _, _, (result,) = run(make(Effect.EXACT, lambda model, context: context.refuse("node", "why") or 0))
    assert result.rewrites == 0
    assert result.parity is None
    assert [(refusal.where, refusal.why) for refusal in result.refusals] == [("node", "why")]


def test_a_pass_that_hides_what_it_did_is_named(run) -> None:
    with pytest.raises(PassError, match="rewrote nothing"):
        run(make(Effect.EXACT, lambda model, _: scale_weights(model, 2.0) * 0))


def test_the_budget_undoes_what_costs_too_much(run) -> None:
    def negate(model: ir.Model, _: Context) -> int:
        return scale_weights(model, -1.0)

    model, outcome, results = run(
        make(Effect.APPROXIMATE, negate, "too-much"), make(Effect.APPROXIMATE, lambda m, _: scale_weights(m, 2.0), "free"), budget=1.0
    )
    assert results[0].undone is not None
    assert "points of accuracy" in results[0].undone
    assert results[1].undone is None
    weights = model.graph.initializers["w"].const_value
    assert weights is not None
    assert weights.numpy()[0, 0] == 2.0
    assert outcome.test is not None
    assert outcome.test.all()


@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), SystemExit(0)])
def test_a_pass_that_raises_is_named(run, error: BaseException) -> None:
    def broken(model: ir.Model, context: Context) -> int:
        raise error

    with pytest.raises(PassError, match=f"'test-pass' failed: {type(error).__name__}"):
        run(make(Effect.EXACT, broken))


def test_a_pass_that_leaves_a_broken_graph_is_named(run) -> None:
    def unsort(model: ir.Model, context: Context) -> int:
        next(iter(model.graph)).op_type = "NoSuchOperator"
        return 1

    with pytest.raises(EdgekitError, match="test-pass"):
        run(make(Effect.EXACT, unsort))
