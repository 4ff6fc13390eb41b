"""Sizes on disk of a network's Core ML package by how its weights are stored, and what that costs.

    python -m benchmarks.coreml_sizes [NAME]

The network is timm's mobilenetv2_100 with random weights, its batch norms set from noise, after `reparameterize`. Sizes are of the whole
package; the error is that of the package in the evaluator against PyTorch, on noise. Random weights have no redundancy: the errors of
trained networks are smaller.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.reparameterize import settle
from edgekit.contracts import Context
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.reparameterize import Reparameterize
from edgekit.source import Source
from edgekit.targets.coreml.compression import parse_storage
from edgekit.targets.coreml.convert import Options, convert
from edgekit.targets.coreml.executable import load_package
from edgekit.targets.coreml.interface import METADATA
from edgekit.targets.coreml.legalize import legalize
from edgekit.trace import trace
from tests.timm_support import create_timm

FORMS = ("", "palette8", "int8", "palette6", "palette4", "int4", "palette2", "palette1")


def main() -> None:
    """Prints a row per storage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="mobilenetv2_100")
    name = parser.parse_args().name
    module, example = create_timm(name)
    settle(module, example)
    graph = trace(Source(name, module=module, example_inputs=(example,)), "dynamo").model
    infer_shapes(graph)
    graph = canonicalize(to_opset(graph))
    infer_shapes(graph)
    Reparameterize().apply(graph, Context(target="coreml"))
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = module(x).numpy().astype(np.float64)
    print(f"{'weights':10}{'bytes':>12}{'of fp16':>10}{'SQNR dB':>10}  deployment target")
    whole = 0
    for form in FORMS:
        model = graph.clone()
        legalize(model)
        converted = convert(model, Options(half=True, storage=parse_storage(form)))
        converted.model.user_defined_metadata[METADATA] = converted.interface.to_json()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.mlpackage"
            converted.model.save(str(path))
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            (found,) = load_package(path, 1).run({graph.graph.inputs[0].name or "": x.numpy()}).values()
        whole = whole or size
        sqnr = 10 * np.log10((expected**2).sum() / ((found - expected) ** 2).sum())
        print(f"{form or 'fp16':10}{size:12,}{f'1/{whole / size:.2f}':>10}{sqnr:10.1f}  {converted.version}", flush=True)


if __name__ == "__main__":
    main()
