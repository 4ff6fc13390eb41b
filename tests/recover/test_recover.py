"""`edgekit.recover` on a small residual network: it wins back, never loses, repeats and resumes to the same bits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgekit.errors import DataError, EdgekitError, SourceError, UsageError
from edgekit.recover import Progress, Settings, blockwise, distill, recover
from edgekit.recover.settings import LEVELS
from edgekit.recover.training import Schedule
from tests.recover.residual_networks import arrays, batches, network

STEPS = {"blocks": 20, "distill": 30}


def settings(**changes: Any) -> Settings:
    return Settings(**({"steps": STEPS, "threads": 1, "batch": 16} | changes))


def outputs_differ(student: ir.Model, teacher: ir.Model) -> float:
    """Energy of the difference on fresh inputs over that of the output, in ONNX Runtime."""
    import onnxruntime as ort

    sessions = [ort.InferenceSession(ir.serde.serialize_model(model).SerializeToString()) for model in (student, teacher)]
    found, expected = (np.concatenate([session.run(None, feed)[0] for feed in batches(50, seed=9)]) for session in sessions)
    return float(((found - expected) ** 2).sum() / (expected**2).sum())


def test_it_wins_back_what_noise_in_the_weights_cost() -> None:
    student, teacher = network(disturbed=0.2), network()
    before = outputs_differ(student, teacher)
    operators = Counter(node.op_type for node in student.graph)
    shapes = {name: array.shape for name, array in arrays(student).items()}
    done = recover(student, teacher, batches(), settings())
    assert outputs_differ(student, teacher) < before / 4
    assert done.after_db > done.before_db + 6
    assert [level.level for level in done.levels] == list(LEVELS)
    assert done.held_out == 6
    assert done.agreement is not None
    assert Counter(node.op_type for node in student.graph) == operators
    assert {name: array.shape for name, array in arrays(student).items()} == shapes


@pytest.mark.parametrize("level", LEVELS)
def test_each_level_alone_helps(level: Any) -> None:
    student, teacher = network(disturbed=0.2), network()
    before = outputs_differ(student, teacher)
    done = recover(student, teacher, batches(), settings(level=level))
    assert [(one.level, one.accepted) for one in done.levels] == [(level, True)]
    assert outputs_differ(student, teacher) < before / 1.5


def test_what_makes_it_worse_is_undone_bit_by_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "SCHEDULE", Schedule(100.0))
    monkeypatch.setattr(distill, "SCHEDULE", Schedule(100.0))
    monkeypatch.setattr("edgekit.recover.driver.refit", lambda unit: {name: 0 * tensor for name, tensor in unit.network.state().items()})
    student = network(disturbed=0.05)
    before = arrays(student)
    done = recover(student, network(), batches(), settings())
    assert not any(level.accepted for level in done.levels)
    assert done.after_db == done.before_db
    assert all(np.array_equal(array, before[name]) for name, array in arrays(student).items())


def test_an_equal_student_stays_as_it_is() -> None:
    student = network()
    recover(student, network(), batches(), settings())
    assert all(np.array_equal(array, arrays(network())[name]) for name, array in arrays(student).items())


def test_only_what_is_trainable_changes() -> None:
    student = network(disturbed=0.2)
    before = arrays(student)
    recover(student, network(), batches(), settings(trainable=("scale*", "shift2")))
    changed = {name for name, array in arrays(student).items() if not np.array_equal(array, before[name])}
    assert changed
    assert changed <= {"scale0", "scale1", "scale2", "shift2"}


def test_steps_and_seed_repeat_the_same_bits() -> None:
    """Minutes become steps, which say the rest."""
    first, second, other = network(disturbed=0.2), network(disturbed=0.2), network(disturbed=0.2)
    done = recover(first, network(), batches(), settings(steps={}, minutes=0.05))
    assert set(done.steps) == {"blocks", "distill"}
    recover(second, network(), batches(), settings(steps=done.steps, minutes=99.0))
    assert all(np.array_equal(array, arrays(first)[name]) for name, array in arrays(second).items())
    recover(other, network(), batches(), settings(steps=done.steps, seed=1))
    assert not all(np.array_equal(array, arrays(first)[name]) for name, array in arrays(other).items())


class Killed(BaseException):
    """As a signal ends a process."""


@pytest.fixture(scope="module")
def uninterrupted() -> tuple[dict[str, np.ndarray], int]:
    """The weights after a whole recovery, and how often progress was told."""
    student, told = network(disturbed=0.2), Counter[str]()
    recover(student, network(), batches(), settings(), progress=lambda progress: told.update([progress.level]))
    return arrays(student), told.total()


@pytest.mark.parametrize("part", [0.0, 0.05, 0.3, 0.6, 0.7, 0.85, 0.99])
def test_it_can_be_killed_anywhere_and_taken_up(part: float, uninterrupted: tuple[dict[str, np.ndarray], int], tmp_path: Path) -> None:
    whole, count = uninterrupted
    told: list[Progress] = []

    def kill(progress: Progress) -> None:
        told.append(progress)
        if len(told) > part * count:
            raise Killed

    state, often = tmp_path / "state", settings(checkpoint_s=0.0)
    with pytest.raises(Killed):
        recover(network(disturbed=0.2), network(), batches(), often, progress=kill, checkpoint=state)
    resumed = network(disturbed=0.2)
    done = recover(resumed, network(), batches(), often, checkpoint=state, resume=True)
    assert [level.level for level in done.levels] == list(LEVELS)
    assert all(np.array_equal(array, whole[name]) for name, array in arrays(resumed).items())
    assert not state.exists()


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    state = tmp_path / "state"
    torch.save({"key": "another"}, state)
    with pytest.raises(UsageError, match="another model"):
        recover(network(disturbed=0.2), network(), batches(), settings(), checkpoint=state, resume=True)
    state.write_bytes(b"cut")
    with pytest.raises(SourceError, match="cannot be read"):
        recover(network(disturbed=0.2), network(), batches(), settings(), checkpoint=state, resume=True)


def test_bad_input() -> None:
    student = network(disturbed=0.2)
    before = arrays(student)
    poisoned = batches()
    poisoned[3]["x"][0, 0, 0] = np.nan
    for feeds, changes in (([], {}), (batches(1), {}), (poisoned, {}), (batches(), {"trainable": ("nothing*",)})):
        with pytest.raises(EdgekitError) as caught:
            recover(student, network(), feeds, settings(**changes))
        assert isinstance(caught.value, DataError | UsageError)
        assert caught.value.fix
    for wrong in ({"minutes": 0.0}, {"level": "most"}, {"steps": {"most": 3}}, {"batch": 0}):
        with pytest.raises(UsageError):
            settings(**wrong)
    assert all(np.array_equal(array, before[name]) for name, array in arrays(student).items())
