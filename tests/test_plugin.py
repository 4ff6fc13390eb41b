"""A pass of another package is found by its entry point, without a change here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import edgekit

PACKAGE = Path(__file__).parent / "plugin_package"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that has the package installed."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(PACKAGE, folder / "package")  # a build writes beside its source
    options = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder / "site"), str(folder / "package")]
    subprocess.run(pip, check=True, capture_output=True, timeout=120)
    return {**os.environ, "PYTHONPATH": str(folder / "site")}


def test_it_is_listed_with_its_options(installed: dict[str, str]) -> None:
    listed = {item["name"]: item for item in json.loads(edgekit("passes", "--json", env=installed).stdout)}
    assert listed["drop-relu"]["options"] == [{"name": "keep", "type": "a whole number", "default": "0"}]
    assert listed["drop-relu"]["effect"] == "approximate"
    assert "drop-relu" not in edgekit("passes", "--json").stdout


def test_it_runs(installed: dict[str, str], tiny: Path) -> None:
    arguments = ("compile", str(tiny), "-t", "onnxruntime", "--seconds", "0", "--json", "--out", str(tiny.parent / "out"), "--force")
    for spec, printed, rewrites in (("drop-relu{keep=0}", "drop-relu", 1), ("drop-relu{keep=1}", "drop-relu{keep=1}", 0)):
        done = edgekit(*arguments, "--pass", spec, env=installed)
        assert done.returncode == 0, done.stderr
        (result,) = json.loads(done.stdout)["passes"]
        assert (result["spec"], result["rewrites"]) == (printed, rewrites)


def test_its_options_are_checked_like_any_other(installed: dict[str, str], tiny: Path) -> None:
    done = edgekit("compile", str(tiny), "-t", "onnxruntime", "--pass", "drop-relu{kep=1}", env=installed)
    assert done.returncode == 2
    assert "did you mean 'keep'?" in done.stderr
