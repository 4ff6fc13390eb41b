"""Each exit code of the command line, with its message alone on standard error and nothing written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import onnx

from tests.conftest import edgekit, listing, tiny_model

QUICK = ("--target", "onnxruntime", "--out", "new/out", "--seconds", "0")
ROOT = Path(__file__).parent.parent


WRONG_PASS = """
from dataclasses import dataclass
from edgekit import Context, Effect, Pass, register_pass
import onnx_ir as ir

@register_pass
@dataclass(frozen=True)
class Wrong(Pass):
    name, effect = "wrong", Effect.{effect}

    def apply(self, model, context):
        value = next(node for node in model.graph if node.op_type == "Conv").inputs[1]
        value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)
        return 1
"""


def refused(folder: Path, code: int, *says: str, arguments: tuple[str, ...], before: str = "", **options: Any) -> None:
    """Asserts how the command line refuses; the file system is as before and nothing but the message is printed."""
    at_first = listing(folder)
    done = edgekit(*arguments, before=before, cwd=folder, **options)
    assert done.returncode == code, done.stderr
    message = done.stderr[done.stderr.index("error: ") :]
    for words in (*says, "\n  try:   "):
        assert words in message
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert listing(folder) == at_first


def test_2_usage(tiny: Path) -> None:
    (tiny.parent / "recipe.toml").write_text('model = "tiny.onnx"\ntarget = "onnxruntime"\ncalibrate = 4\n')
    says = ("'calibrate'", "did you mean 'calibration'?", "recipe.toml")
    refused(tiny.parent, 2, *says, arguments=("compile", "--recipe", "recipe.toml", "--out", "new/out"))


def test_3_source(tiny: Path) -> None:
    (tiny.parent / "cut.onnx").write_bytes(tiny.read_bytes()[:-100])
    refused(tiny.parent, 3, "truncated", "cut.onnx", arguments=("compile", "cut.onnx", *QUICK))
    refused(tiny.parent, 3, "truncated", "cut.onnx", arguments=("inspect", "cut.onnx"))
    (tiny.parent / "junk.pt2").write_bytes(b"PK\x03\x04 junk")  # torch would print a traceback of its own
    refused(tiny.parent, 3, "not a torch.export program", "junk.pt2", arguments=("compile", "junk.pt2", *QUICK))


def test_4_unknown_operator_and_crashing_compiler(tiny: Path) -> None:
    model = tiny_model()
    model.graph.node[2].op_type, model.graph.node[2].name = "Rellu", "active/Rellu"
    onnx.save(model, tiny.parent / "unknown.onnx")
    refused(tiny.parent, 4, "'Rellu'", "'active/Rellu'", "'ai.onnx'", arguments=("compile", "unknown.onnx", *QUICK))
    register = "import edgekit; from tests.crashing_target import CrashingTarget; edgekit.register_target(CrashingTarget)"
    arguments = ("compile", "tiny.onnx", "--target", "test-crashing", "--out", "new/out")
    says = ("SIGSEGV", "lower to test-crashing")
    refused(tiny.parent, 4, *says, arguments=arguments, before=register, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_5_parity(tiny: Path) -> None:
    arguments = ("compile", "tiny.onnx", *QUICK, "--pass", "wrong")
    refused(tiny.parent, 5, "pass 'wrong' changed output 'logits'", arguments=arguments, before=WRONG_PASS.format(effect="EXACT"))


def test_6_budget(tiny: Path) -> None:
    # The pass is undone, so that only an artifact that is worse than the graph can miss the budget; none here is.
    before = WRONG_PASS.format(effect="APPROXIMATE")
    before += "\nfrom edgekit.pipeline import Budget\nBudget.exceeded = lambda self, base, now: 'it costs 9 points'\n"
    arguments = ("compile", "tiny.onnx", *QUICK, "--pass", "wrong", "--max-drop", "1")
    refused(tiny.parent, 6, "it costs 9 points", "wrong", "--max-drop", arguments=arguments, before=before)


def test_8_missing_tool(tiny: Path) -> None:
    before = "import edgekit.compiler\nedgekit.compiler.version = lambda package: None\n"
    refused(
        tiny.parent, 8, "'openvino'", "pip install", arguments=("compile", "tiny.onnx", "-t", "openvino", "-o", "new/out"), before=before
    )
    says = ("'onnxruntime'", "pip install -c constraints.txt onnxruntime")  # it belongs to no extra
    refused(tiny.parent, 8, *says, arguments=("compile", "tiny.onnx", *QUICK), before=before)
