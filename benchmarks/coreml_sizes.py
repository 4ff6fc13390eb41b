"""Sizes on disk of a network's Core ML package by how its weights are stored, and what that costs.

    python -m benchmarks.coreml_sizes [NAME]

The network is timm's mobilenetv2_100 with random weights, its batch norms set from noise. Sizes are of the whole package; the error is that
of the package in the evaluator against PyTorch, on noise. Random weights have no redundancy: errors of trained networks are smaller.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.reparameterize import settle
from edgekit.compiler import Timing, compile
from tests.timm_support import create_timm

FORMS = ("", "palette8", "int8", "palette6", "palette4", "int4", "palette2", "palette1")


def main() -> None:
    """Prints a row per storage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="mobilenetv2_100")
    module, example = create_timm(parser.parse_args().name)
    settle(module, example)
    print(f"{'weights':10}{'bytes':>12}{'of fp16':>10}{'SQNR dB':>10}  deployment target")
    whole = 0
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            target = f'coreml{{weights="{form}"}}' if form else "coreml"
            artifact = compile(module, example, target=target, calibration=1, timing=Timing(0), out=Path(folder) / "a")
            size = sum(file.stat().st_size for file in (Path(folder) / "a" / "model.mlpackage").rglob("*") if file.is_file())
        whole = whole or size
        facts, parity = artifact.report["target"]["facts"], artifact.report["artifact"]["parity"]
        ratio = f"1/{whole / size:.2f}"
        print(f"{form or 'fp16':10}{size:12,}{ratio:>10}{parity['sqnr_db']:10.1f}  {facts['deployment_target']}", flush=True)


if __name__ == "__main__":
    main()
