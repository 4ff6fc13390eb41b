"""ONNX's node tests through the target: each one gives the right answer, or is refused with a reason and a way out.

A sample of them here; all of them by `python -m edgekit.targets.coreml.coverage --check`.
"""

import re

import numpy as np
import onnx
import pytest

from edgekit.targets.coreml import coverage
from edgekit.targets.coreml.coverage import Outcome
from edgekit.targets.coreml.executable import CoreMlExecutable

SAMPLE = coverage.sample(250)
MUST_MATCH = 1100


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    return {outcome.name: outcome for outcome in coverage.outcomes(SAMPLE)}


@pytest.mark.parametrize("name", SAMPLE)
def test_right_or_refused(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert outcome.ending in ("match", "constants", "refused"), outcome.reason
    if outcome.ending == "refused":
        assert all((outcome.reason, outcome.where, outcome.fix))


def test_the_page_tells_of_no_wrong_answer_and_enough_matches() -> None:
    text = coverage.PAGE.read_text("utf-8")
    found = re.search(
        r"Of the (\d+) node tests of onnx (\S+), (\d+) match: (\d+) as they are and (\d+) .*? (\d+) are refused; (\d+) give a wrong answer",
        text,
    )
    assert found
    every, match, plain, constants, refused, wrong = (int(found[index]) for index in (1, 3, 4, 5, 6, 7))
    assert wrong == 0
    assert match >= MUST_MATCH
    assert (plain + constants, match + refused) == (match, every)
    if found[2] == onnx.__version__:
        assert every == len(coverage.node_cases())


def test_the_table_adds_up_to_the_totals() -> None:
    text = coverage.PAGE.read_text("utf-8")
    rows = np.array(re.findall(r"^\| \S+ \| \d+ \| (\d+) \| (\d+) \| (\d+) \|", text, re.M), int)
    line = next(line for line in text.splitlines() if line.startswith("Of the "))
    assert all(f" {count} " in line for count in rows.sum(axis=0))


@pytest.mark.parametrize(
    ("name", "ending"),
    [("test_sigmoid", "match"), ("test_top_k", "constants"), ("test_string_concat", "refused"), ("test_clip_expanded", "match")],
)
def test_endings(name: str, ending: str) -> None:
    (outcome,) = coverage.outcomes([name])
    assert outcome.ending == ending, outcome.reason


def test_a_wrong_answer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run = CoreMlExecutable.run
    monkeypatch.setattr(CoreMlExecutable, "run", lambda self, inputs: {name: value + 0.01 for name, value in run(self, inputs).items()})
    (outcome,) = coverage.outcomes(["test_sigmoid"])
    assert outcome.ending == "failed"
    assert "Wrong answers:" in coverage.page([outcome])
