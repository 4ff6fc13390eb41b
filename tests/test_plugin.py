"""A pass of another package is found by its entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent / "plugin_package"


def test_a_third_party_pass(tiny: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    info = site / "edgekit_example-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgekit-example\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[edgekit.passes]\ndrop-relu = edgekit_example:DropRelu\n")
    path = os.pathsep.join([str(site), str(PACKAGE)])
    command = [sys.executable, "-c", "from edgekit.cli.app import main; main()"]

    def run(*arguments: str) -> str:
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run([*command, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    listed = {item["name"]: item for item in json.loads(run("passes", "--json"))}
    assert listed["drop-relu"]["options"] == [{"name": "keep", "type": "a whole number", "default": "0"}]
    report = json.loads(run("compile", str(tiny), "-t", "onnxruntime", "--pass", "drop-relu{keep=0}", "--seconds", "0", "--json"))
    assert [(item["spec"], item["rewrites"]) for item in report["passes"]] == [("drop-relu", 1)]
