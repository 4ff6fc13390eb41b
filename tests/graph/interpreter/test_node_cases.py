"""ONNX's node tests: each one gives the right answer or is refused by name."""

import pytest

from edgekit.graph.interpreter import coverage
from edgekit.graph.interpreter.coverage import Outcome

CASES = coverage.node_cases()
MUST_PASS = 1400


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in coverage.outcomes(CASES)}


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_right_or_refused(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert not outcome.failed, outcome.failed
    if outcome.refused:
        assert any(f"operator {operator} " in outcome.refused or f"::{operator} " in outcome.refused for operator in outcome.operators)


def test_enough_pass(outcomes: dict[str, Outcome]) -> None:
    assert sum(outcome.passed for outcome in outcomes.values()) >= MUST_PASS


def test_the_page_is_up_to_date(outcomes: dict[str, Outcome]) -> None:
    import onnx

    text = coverage.page(list(outcomes.values()))
    if f"node tests of onnx {onnx.__version__}," not in coverage.PAGE.read_text():
        pytest.skip("the page was made with another version of onnx")
    assert coverage.PAGE.read_text() == text, "python -m edgekit.graph.interpreter.coverage > docs/interpreter.md"


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (case for case in CASES if case.name == "test_sigmoid")
    run = coverage.run
    monkeypatch.setattr(coverage, "run", lambda model, inputs: {name: value + 0.01 for name, value in run(model, inputs).items()})
    (outcome,) = coverage.outcomes([case])
    assert outcome.failed
