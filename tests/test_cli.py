"""The command line as a user meets it: help at once, exit codes, JSON alone on standard output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import command, edgekit

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
        (["compile", "vit_digits", "--target", "openvino", "--seed", "99999999999999999999999"], 2, "from 0 to 2^63 - 1"),
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


def test_one_broken_package_hides_no_other(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "broken_package.py").write_text("raise RuntimeError('built for another torch')\n")
    (tmp_path / "leaving_package.py").write_text("raise SystemExit(3)\n")
    (tmp_path / "broken-1.0.dist-info").mkdir()
    (tmp_path / "broken-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    groups = "".join(
        f"[edgekit.{group}]\nbroken = broken_package:X\nleaving = leaving_package:X\n" for group in ("passes", "targets", "models")
    )
    (tmp_path / "broken-1.0.dist-info" / "entry_points.txt").write_text(groups)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for listed, kind, other in (("passes", "pass", "to-float16"), ("targets", "target", "openvino"), ("models", "model", "vit_digits")):
        done = edgekit(listed, "--json", env=env)
        assert done.returncode == 0, done.stderr
        names = {item["name"] for item in json.loads(done.stdout)}
        assert other in names
        assert not {"broken", "leaving"} & names
        for words in ("'broken' cannot be imported: RuntimeError: built for", "'leaving' cannot be imported: SystemExit: 3"):
            assert f"warning: {kind} {words}" in done.stderr
    compiling = ("compile", str(tiny), "-t", "onnxruntime", "--seconds", "0", "--json", "-o", str(tmp_path / "out"))
    report = json.loads(edgekit(*compiling, env=env).stdout)
    assert [item["spec"] for item in report["passes"]] == ["reparameterize"]
    assert sum("the default recipe was made without it" in note for note in report["notes"]) == 2
    for arguments in (("compile", str(tiny), "-t", "broken"), ("compile", str(tiny), "-t", "onnxruntime", "-p", "broken")):
        done = edgekit(*arguments, env=env)
        assert done.returncode == 2
        assert "'broken' cannot be imported: RuntimeError" in done.stderr


NOISY = """
import atexit, ctypes, os
import torch

print("noise of an import")
atexit.register(print, "noise of the end")

def net():
    print("noise of a factory")
    os.write(1, b"noise of a library ")
    ctypes.CDLL(None).puts(b"noise that a library holds back")
    return torch.nn.Linear(3, 2), torch.ones(1, 3)
"""


def test_json_is_alone_on_standard_output(tmp_path: Path) -> None:
    (tmp_path / "noisy_nets.py").write_text(NOISY)
    compiling = ("compile", "noisy_nets:net", "-t", "onnxruntime", "--seconds", "0", "-o", "out", "--json")
    for arguments in (compiling, ("inspect", "noisy_nets:net", "--json")):
        done = edgekit(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        for words in ("of an import", "of the end", "of a factory", "of a library", "that a library holds back"):
            assert f"noise {words}" in done.stderr
        if "artifact" in found:
            assert found["artifact"]["path"] == str(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["artifact"]["path"] == "."


@pytest.mark.parametrize("arguments", [["inspect", "vit_digits"], ["passes"], ["targets"], ["models"], ["doctor"]])
def test_quiet_prints_nothing(arguments: list[str]) -> None:
    done = edgekit(*arguments, "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["inspect", "no.onnx", "-qv"], True), (["compile", "--target", "-v"], False), (["verify", "no", "-q"], False)],
)
def test_verbose_errors_come_with_their_traceback(arguments: list[str], told: bool) -> None:
    done = edgekit(*arguments)
    assert done.returncode in (2, 3)
    assert ("Traceback" in done.stderr) == told
    assert "error: " in done.stderr


def test_json_needs_a_standard_output() -> None:
    call = command("passes", "--json")
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *call], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "standard output, which is closed" in done.stderr


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
