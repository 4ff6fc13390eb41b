"""The command line as a user meets it: help at once, exit codes, JSON alone on standard output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import edgekit

HEAVY = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino", "numpy", "sklearn", "PIL", "psutil", "cloudpickle")


@pytest.mark.parametrize("arguments", [["--help"], ["compile", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "sys.argv = ['edgekit'] + sys.argv[1:]\n"
        "from edgekit.cli.app import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('LOADED', sorted(name for name in sys.modules if name in {HEAVY!r}), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout
    assert done.stderr.strip() == "LOADED []"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["compile"], 2, "the model is missing"),
        (["compile", "vit_digits"], 2, "the target is missing"),
        (["compile", "vit_digits", "--target", "openvin"], 2, "did you mean 'openvino'?"),
        (["compile", "vit_digits", "--target", "openvino", "--precision", "fp8"], 2, "fp32"),
        (["compile", "vit_digits", "--target", "openvino", "--pass", "fold-batchnorm"], 2, "did you mean 'fold-batch-norm'?"),
        (["compile", "vit_digits", "--target", "openvino", "--pass", "to-float16{keepio=true}"], 2, "did you mean 'keep_io'?"),
        (["compile", "vit_digits", "--target", "openvino", "--pass", "to-float16{keep_io=1}"], 2, "true or false"),
        (["compile", "vit_digit", "--target", "openvino"], 3, "did you mean 'vit_digits'?"),
        (["compile", "none.onnx", "--target", "openvino"], 3, "no such file"),
        (["compile", "model.pt", "--target", "openvino"], 3, "pickle"),
        (["compile", "--recipe", "none.toml"], 2, "cannot be read"),
        (["compile", "vit_digits", "--target", "openvino", "--bogus"], 2, "--bogus"),
        (["compile", "vit_digits", "--target", "openvino", "--input", "x:1,a"], 2, "does not describe an input"),
        (["verify", "nowhere"], 3, "no such artifact"),
        (["profile", "nowhere"], 3, "no such artifact"),
        (["inspect", "nothing.onnx"], 3, "no such file"),
        (["nonsense"], 2, "nonsense"),
    ],
)
def test_bad_usage(arguments: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = edgekit(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["passes", "targets", "models", "doctor"])
def test_listings(command: str) -> None:
    found = json.loads(edgekit(command, "--json").stdout)
    assert found
    for item in found:
        assert all(value != "" or key in ("source", "needed_by", "summary") for key, value in item.items())
    shown = edgekit(command)
    assert shown.returncode == 0
    assert str(found[0].get("name", found[0].get("item"))) in shown.stdout


def test_passes_show_each_option_with_type_and_default() -> None:
    found = {item["name"]: item for item in json.loads(edgekit("passes", "--json").stdout)}
    options = {option["name"]: option for option in found["to-float16"]["options"]}
    assert options["keep_io"] == {"name": "keep_io", "type": "true or false", "default": "true"}
    assert found["fold-batch-norm"]["effect"] == "exact"


def test_inspect_counts() -> None:
    found = json.loads(edgekit("inspect", "vit_digits", "--json").stdout)
    assert found["operators"]["Attention"] >= 2
    assert found["complete"]
    assert found["largest"][0]["macs"] >= found["largest"][-1]["macs"] > 0
    assert "largest layers" in edgekit("inspect", "vit_digits").stdout
