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

from edgekit.adversarial import adversarial_batches
from edgekit.contracts import Context, Effect, Pass
from edgekit.data import Data, Declared
from edgekit.errors import BudgetError, EdgekitError, ParityError, PassError, UsageError
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


@pytest.fixture
def adversarial(worker: Worker, tmp_path: Path):
    """Runs passes on adversarial inputs too."""
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(50, 1, (2, 3)).astype(np.float32)} for _ in range(4)]

    def run(*passes: Pass):
        model = ir.from_proto(onnx.parser.parse_model(MODEL))
        data = Data("test", batches, adversarial=adversarial_batches({"x": Declared((2, 3), np.dtype(np.float32))}, 0))
        evaluator = Evaluator(worker, data, tmp_path, 1)
        return run_passes(model, passes, Context(data.calibration), evaluator, evaluator.run(model, "base"), Reporter())

    return run


def strengths(*columns: int, forbidden: int = -1) -> Pass:
    """A pass that removes the weights of the first `columns` classes; `settings` offers each of them, `forbidden` cannot be done."""

    @dataclass(frozen=True)
    class Zero(Pass):
        name: ClassVar[str] = "zero-columns"
        effect: ClassVar[Effect] = Effect.APPROXIMATE

        count: int = 0

        def settings(self) -> list[Pass]:
            return [Zero(count) for count in columns] if not self.count else [self]

        def apply(self, model: ir.Model, context: Context) -> int:
            if self.count == forbidden:
                raise UsageError("not as many", fix="ask for less")
            value = model.graph.initializers["w"]
            assert value.const_value is not None
            changed = value.const_value.numpy().copy()
            changed[:, : self.count] = -100
            value.const_value = ir.tensor(changed, name="w")
            return 1

    return Zero()


def test_the_strongest_setting_within_the_budget_is_chosen(run) -> None:
    """Every prediction is the last class: three columns can go, four cannot; five cannot be done at all."""
    model, _, (result,) = run(strengths(5, 4, 3, 2, 1, forbidden=5), budget=1.0)
    assert result.spec == "zero-columns{count=3}"
    assert result.undone is None
    assert [(trial.spec, trial.within) for trial in result.trials] == [
        ("zero-columns{count=5}", False), ("zero-columns{count=4}", False), ("zero-columns{count=3}", True),
    ]  # fmt: skip
    assert result.trials[0].macs is None
    assert result.trials[1].metric is not None
    assert result.trials[1].metric.difference < -0.01
    assert any("too few to be sure" in warning for warning in result.warnings)
    weights = model.graph.initializers["w"].const_value
    assert weights is not None
    np.testing.assert_array_equal(weights.numpy()[:, 3], [4, 8, 12])


def test_no_setting_within_the_budget_lists_what_was_tried(run) -> None:
    with pytest.raises(BudgetError) as caught:
        run(strengths(4, 5), budget=1.0)
    assert caught.value.exit_code == 6
    for text in ("zero-columns{count=4}", "zero-columns{count=5}", "MACs", "points ["):
        assert text in caught.value.what


def test_without_a_budget_no_setting_is_tried(run) -> None:
    _, _, (result,) = run(strengths(4, 3))
    assert result.spec == "zero-columns"
    assert result.trials == []


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


def test_an_exact_pass_that_is_wrong_on_zeros_alone_is_named(adversarial) -> None:
    """y · (x / x) is y wherever x is not 0, as on all normal data."""

    def divide(model: ir.Model, _: Context) -> int:
        (relu,) = [node for node in model.graph if node.op_type == "Relu"]
        z = relu.inputs[0]
        ratio = ir.node("Div", [z, z])
        product = ir.node("Mul", [z, ratio.outputs[0]])
        model.graph.insert_before(relu, [ratio, product])
        relu.replace_input_with(0, product.outputs[0])
        return 1

    fine = make(Effect.EXACT, lambda model, _: scale_weights(model, 1.0), "fine")
    with pytest.raises(ParityError, match=r"pass 'x-over-x' made output 'y' NaN or infinite .* 'zeros'") as caught:
        adversarial(fine, make(Effect.EXACT, divide, "x-over-x"))
    assert caught.value.where == "adversarial input 'zeros'"
    _, _, (result,) = adversarial(make(Effect.APPROXIMATE, divide, "x-over-x"))
    assert any("NaN or infinite" in warning for warning in result.warnings)


def test_what_an_exact_pass_does_beyond_rounding_on_adversarial_inputs_alone_is_a_warning(adversarial) -> None:
    """A shift by 1e-3 is rounding where values are of the order of 1000, and everything where they are 0."""

    def shift(model: ir.Model, _: Context) -> int:
        (relu,) = [node for node in model.graph if node.op_type == "Relu"]
        z = relu.inputs[0]
        model.graph.register_initializer(ir.Value(name="shift", const_value=ir.tensor(np.float32(1e-3), name="shift")))
        added = ir.node("Add", [z, model.graph.initializers["shift"]])
        model.graph.insert_before(relu, [added])
        relu.replace_input_with(0, added.outputs[0])
        return 1

    _, _, (result,) = adversarial(make(Effect.EXACT, shift, "shift"))
    assert len(result.warnings) == 2
    for kind, warning in zip(("zeros", "denormals"), result.warnings, strict=True):
        assert f"adversarial input '{kind}'" in warning
        assert "'shift'" in warning


ATTENTION = """
<ir_version: 10, opset_import: ["" : 23]>
net (float[1, 2, 5, 4] q, float[1, 2, 5, 4] k, float[1, 2, 5, 4] v) => (float[1, 2, 5, 4] y)
{ t = Transpose<perm = [0, 1, 2, 3]>(k)  y = Attention(q, t, v) }
"""


def break_attention(model: ir.Model, _: Context) -> int:
    """Attention after a Transpose becomes MatMul, Softmax and MatMul over transposed keys: one Transpose is saved, the kernel lost."""
    (attention,) = [node for node in model.graph if node.op_type == "Attention"]
    q, k, v = attention.inputs
    model.graph.register_initializer(ir.Value(name="root", const_value=ir.tensor(np.float32(0.5), name="root")))
    keys = ir.node("Transpose", [k], {"perm": [0, 1, 3, 2]})
    scores = ir.node("MatMul", [q, keys.outputs[0]])
    scaled = ir.node("Mul", [scores.outputs[0], model.graph.initializers["root"]])
    weights = ir.node("Softmax", [scaled.outputs[0]], {"axis": -1})
    product = ir.node("MatMul", [weights.outputs[0], v], outputs=[ir.Value(name="broken", type=attention.outputs[0].type)])
    model.graph.insert_before(attention, [keys, scores, scaled, weights, product])
    ir.convenience.replace_all_uses_with(attention.outputs[0], product.outputs[0], replace_graph_outputs=True)
    attention.outputs[0].name, product.outputs[0].name = "old", "y"
    model.graph.remove(attention, safe=True)
    return 1


def run_on_attention(worker: Worker, folder: Path, *passes: Pass):
    model = ir.from_proto(onnx.parser.parse_model(ATTENTION))
    for node in model.graph:
        node.name = f"blocks.0.attn/{node.op_type}"
    rng = np.random.default_rng(0)
    data = Data("test", [{name: rng.normal(0, 1, (1, 2, 5, 4)).astype(np.float32) for name in "qkv"}])
    evaluator = Evaluator(worker, data, folder, 1)
    return run_passes(model, passes, Context(data.calibration), evaluator, evaluator.run(model, "base"), Reporter())


def test_an_exact_pass_that_breaks_an_attention_is_named_though_the_numbers_hold(worker: Worker, tmp_path: Path) -> None:
    with pytest.raises(PassError, match="'breaks' broke whole operators into parts: Attention 1 → 0") as caught:
        run_on_attention(worker, tmp_path, make(Effect.EXACT, break_attention, "breaks"))
    assert caught.value.where == "Attention 'blocks.0.attn/Attention'"
    assert "`removes`" in (caught.value.fix or "")
    declared = make(Effect.EXACT, break_attention, "declares")
    type(declared).removes = frozenset({"Attention"})
    for item in (declared, make(Effect.APPROXIMATE, break_attention, "approximates")):
        _, _, (result,) = run_on_attention(worker, tmp_path, item)
        assert result.parity is not None
        assert result.parity.max_rel_error < 1e-6
        assert (result.census_before, result.census_after) == ({"Attention": 1}, {"Softmax": 1})
