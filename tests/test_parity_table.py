"""The parity table: every stage has a row, and its numbers are those of float64 formulas."""

from __future__ import annotations

import io
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from rich.console import Console
from torch import nn

import edgekit
from edgekit.cli.parity import census_table, parity_tables
from edgekit.evaluate import Outcome
from edgekit.parity_table import ParityTable
from edgekit.verify import Parity
from tests.test_compile import QUICK, SCHEMA


def outcome(rng: np.random.Generator, noise: float, kinds: int = 2) -> Outcome:
    def one(scale: float) -> dict[str, np.ndarray]:
        exact = np.random.default_rng(7).normal(0, scale, (6, 5))
        return {"y": (exact + noise * rng.normal(0, scale, (6, 5))).astype(np.float32)}

    return Outcome([one(1.0), one(3.0)], adversarial=[one(10.0**k) for k in range(kinds)])


def expected(reference: list[dict[str, np.ndarray]], result: list[dict[str, np.ndarray]]) -> dict[str, float]:
    ref = np.concatenate([batch["y"].astype(np.float64) for batch in reference])
    res = np.concatenate([batch["y"].astype(np.float64) for batch in result])
    error = ref - res
    return {
        "max_abs_error": np.abs(error).max(),
        "max_rel_error": np.abs(error).max() / np.abs(ref).max(),
        "sqnr_db": 10 * np.log10((ref**2).sum() / (error**2).sum()),
        "cosine": (ref * res).sum() / np.sqrt((ref**2).sum() * (res**2).sum()),
        "top1_agreement": (ref.argmax(1) == res.argmax(1)).mean(),
    }


def holds(parity: Parity | None, reference: list[dict[str, np.ndarray]], result: list[dict[str, np.ndarray]]) -> None:
    assert parity is not None
    for name, value in expected(reference, result).items():
        assert getattr(parity, name) == pytest.approx(value, rel=1e-9), name


def test_rows_are_float64_formulas_on_the_data_and_on_each_adversarial_input() -> None:
    rng = np.random.default_rng(0)
    stages = {"torch": outcome(rng, 0.0), "traced": outcome(rng, 1e-3), "canonical": outcome(rng, 1e-2), "lowered": outcome(rng, 0.5)}
    table = ParityTable(("zeros", "large"))
    for name, item in stages.items():
        table.add(name, item)
    assert [row.stage for row in table.rows] == list(stages)
    first, *others = table.rows
    assert first.data.original is None
    assert first.data.previous is None
    original, last = stages["torch"], stages["torch"]
    for row in others:
        now = stages[row.stage]
        holds(row.data.original, original.outputs, now.outputs)
        holds(row.data.previous, last.outputs, now.outputs)
        assert row.adversarial is not None
        assert list(row.adversarial) == ["zeros", "large"]
        for index, compared in enumerate(row.adversarial.values()):
            assert original.adversarial is not None
            assert last.adversarial is not None
            assert now.adversarial is not None
            holds(compared.original, [original.adversarial[index]], [now.adversarial[index]])
            holds(compared.previous, [last.adversarial[index]], [now.adversarial[index]])
        last = now
    assert others[-1].data.original is not None
    assert others[-1].data.original.top1_agreement < 1.0  # the formula for agreement was put to the test


def test_a_stage_that_changed_nothing_is_not_compared_with_the_one_before() -> None:
    rng = np.random.default_rng(0)
    table = ParityTable(("zeros", "large"))
    table.add("torch", outcome(rng, 0.0))
    same = outcome(rng, 1e-3)
    table.add("canonical", same)
    row = table.add("fold-batch-norm", same)
    assert row.data.original == table.rows[1].data.original
    assert row.data.previous is None
    assert row.adversarial is not None
    assert all(compared.previous is None for compared in row.adversarial.values())


def test_stages_that_failed_on_adversarial_inputs_or_changed_shapes_have_gaps() -> None:
    rng = np.random.default_rng(0)
    table = ParityTable(("zeros", "large"))
    table.add("file", outcome(rng, 0.0))
    table.add("canonical", Outcome(outcome(rng, 0.0).outputs))
    odd = outcome(rng, 0.0)
    assert odd.adversarial is not None
    odd.adversarial[0] = {"y": np.zeros((2, 5), np.float32)}
    row = table.add("lowered", odd)
    assert table.rows[1].adversarial is None
    assert table.rows[1].to_dict()["adversarial"] is None
    assert row.adversarial is not None
    assert row.adversarial["zeros"].original is None
    assert row.adversarial["large"].original is not None


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


PASSES = ["fold-batch-norm", "merge-branches"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    torch.manual_seed(0)
    out = tmp_path_factory.mktemp("parity") / "out"
    return edgekit.compile(Network(), torch.randn(2, 3, 8, 8), target="openvino", passes=PASSES, out=out, timing=QUICK).report


def test_the_table_of_a_compile(report: dict) -> None:
    jsonschema.validate(report, SCHEMA)
    rows = report["parity_table"]
    assert [row["stage"] for row in rows] == ["torch", "traced", "canonical", "fold-batch-norm", "merge-branches", "lowered"]
    by_stage = {row["stage"]: row for row in rows}
    assert by_stage["canonical"]["data"]["previous"] == report["canonical"]["parity"]
    assert by_stage["fold-batch-norm"]["data"]["previous"] == report["passes"][0]["parity"]
    assert by_stage["merge-branches"]["data"]["previous"] is None
    assert by_stage["lowered"]["data"]["original"] == report["artifact"]["parity"]
    for row in rows[1:]:
        assert [item["input"] for item in row["adversarial"]] == ["zeros", "large", "denormals"]
        for compared in (row["data"], *row["adversarial"]):
            assert set(compared["original"]) >= {"max_abs_error", "max_rel_error", "sqnr_db", "cosine", "top1_agreement"}
            assert compared["original"]["max_rel_error"] < 1e-4
    assert report["passes"][0]["census"] == {"before": {"BatchNormalization": 1, "Conv": 1}, "after": {"Conv": 1}}


def printed(renderable: object, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_fits_a_terminal(report: dict) -> None:
    text = printed(parity_tables(report))
    assert max(map(len, text.splitlines())) <= 80
    for words in ("on data", "on zeros", "on large", "on denormals", "fold-batch-norm", "lowered", "reference", "SQNR", "cosine", "="):
        assert words in text
    assert "BatchNormalization 1 → 0" in printed(census_table(report))
    assert "all kept" in printed(census_table(report))


def test_a_stage_that_did_not_run_on_adversarial_inputs_is_shown_as_such(report: dict) -> None:
    rows = [{**row, "adversarial": None} if row["stage"] == "merge-branches" else row for row in report["parity_table"]]
    lines = printed(parity_tables({"parity_table": rows})).splitlines()
    gaps = [index for index, line in enumerate(lines) if "did not run" in line]
    assert len(gaps) == 3
    for index in gaps:
        assert "merge-branches" in lines[index]
        assert "lowered" in lines[index + 1]
        assert lines[index + 1].split("│")[-2].strip() == ""  # there is no stage before it to compare with


def test_reports_of_earlier_versions_say_what_they_lack(report: dict) -> None:
    old = {key: value for key, value in report.items() if key != "parity_table"}
    old["passes"] = [{key: value for key, value in item.items() if key != "census"} for item in report["passes"]]
    assert "no parity table" in printed(parity_tables(old))
    assert "no pass" in printed(census_table(old))


def test_a_file_that_cannot_take_adversarial_inputs_is_measured_on_the_data_alone(tmp_path: Path) -> None:
    text = (
        '<ir_version: 10, opset_import: ["" : 23]> g (float[1, 4] x, int64[1, 2] i) => (float[1, 1, 2] y) '
        "<int64[1] nine = {9}> { j = Mul(i, nine) y = Gather<axis = 1>(x, j) }"  # the index 1, of an adversarial input, leads outside
    )
    path = tmp_path / "picky.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    np.savez(tmp_path / "d.npz", x=np.ones((1, 4), np.float32), i=np.zeros((1, 2), np.int64))
    report = edgekit.compile(path, target="onnxruntime", data=str(tmp_path / "d.npz"), calibration=1, passes=[], timing=QUICK).report
    jsonschema.validate(report, SCHEMA)
    assert [row["stage"] for row in report["parity_table"]] == ["file", "canonical", "lowered"]
    assert all(row["adversarial"] is None for row in report["parity_table"])
    assert any("fails on adversarial inputs" in note for note in report["notes"])
    assert "on zeros" not in printed(parity_tables(report))
