"""Tracing: names that say where a node came from, both exporters, and the check against PyTorch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgekit.errors import TraceError
from edgekit.source import from_module, open_source
from edgekit.trace import run_module, trace


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Linear(4, 2)

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.stem(image).mean((2, 3))
        return {"features": features, "logits": self.head(features)}


def test_names_and_module_paths() -> None:
    model = trace(from_module(Net(), torch.randn(1, 3, 8, 8)), "dynamo").model
    nodes = {node.op_type: node for node in model.graph}
    assert nodes["Conv"].name == "stem.0/Conv"
    assert nodes["BatchNormalization"].metadata_props == {"edgekit.module": "stem.1"}
    assert nodes["Gemm"].outputs[0].name == "output_1"
    assert [value.name for value in model.graph.inputs] == ["image"]
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert "stem.0.weight" in model.graph.initializers


def test_nothing_is_folded_unseen_but_the_baseline_is_the_exporters_default() -> None:
    traced = trace(from_module(Net().eval(), torch.randn(1, 3, 8, 8)), "dynamo")
    assert any(node.op_type == "BatchNormalization" for node in traced.model.graph)
    assert not any(node.op_type == "BatchNormalization" for node in traced.baseline.graph)
    assert traced.model.graph.opset_imports[""] == 23


def test_the_modules_mode_is_given_back() -> None:
    module = Net().train()
    module.stem[1].eval()
    source = from_module(module, torch.randn(1, 3, 8, 8))
    trace(source, "dynamo")
    run_module(source, [{"image": torch.randn(1, 3, 8, 8).numpy()}], ["image"], ["a", "b"])
    assert module.training
    assert module.stem[0].training
    assert not module.stem[1].training


def test_run_module_is_in_evaluation_mode_and_names_outputs() -> None:
    module = Net().train()
    image = torch.randn(1, 3, 8, 8)
    (first,) = run_module(from_module(module, image), [{"image": image.numpy()}], ["image"], ["f", "l"])
    with torch.no_grad():
        expected = module.eval()(image)
    torch.testing.assert_close(torch.from_numpy(first["l"]), expected["logits"])
    with pytest.raises(TraceError, match="gives 2 outputs"):
        run_module(from_module(module, image), [{"image": image.numpy()}], ["image"], ["only"])


def test_an_exported_program_is_traced_with_its_names(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(Net().eval(), (torch.randn(1, 3, 8, 8),)), tmp_path / "net.pt2")
    model = trace(open_source(str(tmp_path / "net.pt2")), "dynamo").model
    assert "stem.0/Conv" in [node.name for node in model.graph]


def test_torchscript_gives_a_graph_with_the_same_outputs() -> None:
    model = trace(from_module(Net(), torch.randn(1, 3, 8, 8)), "torchscript").model
    assert [value.name for value in model.graph.outputs] == ["output_0", "output_1"]


def test_a_module_that_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x
            return -x

    with pytest.raises(TraceError, match="the dynamo exporter failed") as caught:
        trace(from_module(Branching(), torch.randn(3)), "dynamo")
    assert "Traceback" not in str(caught.value)


def test_a_value_that_is_given_out_twice_or_passed_through_keeps_every_output() -> None:
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.linear(x)
            return y, y, x, y.to(torch.bfloat16)

    x = torch.randn(1, 3)
    source = from_module(Repeats(), x)
    names = ["output_0", "output_1", "output_2", "output_3"]
    for exporter in ("dynamo", "torchscript"):
        traced = trace(source, exporter)
        for model in (traced.model, traced.baseline):
            assert [value.name for value in model.graph.outputs] == names
            assert len(set(model.graph.outputs)) == 4
    (outputs,) = run_module(source, [{"x": x.numpy()}], ["x"], names)
    assert list(outputs) == names
    assert outputs["output_3"].dtype.name == "bfloat16"
