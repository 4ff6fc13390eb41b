"""What the user may type as a model, and what is said when it is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from edgekit.contracts import ZooModel, models
from edgekit.errors import SourceError, UsageError
from edgekit.inputs import InputSpec
from edgekit.source import from_module, open_source


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.linear(left + right)


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(
        "import torch\n"
        "def net(): return torch.nn.Linear(3, 2)\n"
        "def with_inputs(): return torch.nn.Linear(3, 2), torch.ones(4, 3)\n"
        "def broken(): raise RuntimeError('no weights')\n"
        "def leaves(): raise SystemExit(3)\n"
        "def number(): return 3\n"
        "MODULE = torch.nn.Linear(3, 2)\n"
    )
    monkeypatch.chdir(tmp_path)
    return name


def test_a_factory(factory: str) -> None:
    source = open_source(f"{factory}:net", [InputSpec("input", (5, 3))])
    assert source.name == "net"
    assert source.example_inputs[0].shape == (5, 3)
    assert source.parameters() == 8
    assert open_source(f"{factory}:with_inputs").example_inputs[0].shape == (4, 3)
    assert open_source(f"{factory}:with_inputs", [InputSpec("", (2, 3))]).example_inputs[0].shape == (2, 3)
    assert open_source(f"{factory}:MODULE", [InputSpec("", (2, 3))]).name == "MODULE"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("net", "give --input"),
        ("broken", "no weights"),
        ("leaves", "SystemExit: 3"),
        ("number", "returned a int"),
        ("nett", "did you mean 'net'?"),
    ],
)
def test_factories_that_are_wrong(factory: str, name: str, says: str) -> None:
    with pytest.raises(SourceError) as caught:
        open_source(f"{factory}:{name}")
    assert says in str(caught.value)


def test_inputs_that_do_not_fit(factory: str) -> None:
    with pytest.raises(SourceError, match="no input 'imput'") as caught:
        open_source(f"{factory}:net", [InputSpec("imput", (1, 3))])
    assert "did you mean 'input'?" in str(caught.value)
    module = Two()
    with pytest.raises(SourceError, match="also needs the input left"):
        from_module(module, {"right": torch.ones(1, 3)})
    with pytest.raises(SourceError, match="not a tensor"):
        from_module(module, (torch.ones(1, 3), object()))


def test_example_inputs_by_name_are_put_in_order() -> None:
    left, right = torch.zeros(1, 3), torch.ones(1, 3)
    assert from_module(Two(), {"right": right, "left": left}).example_inputs == (left, right)


def test_a_module_that_leaves_while_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "leaving_nets.py").write_text("import sys\nsys.exit(3)\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="'leaving_nets' cannot be imported: SystemExit: 3"):
        open_source("leaving_nets:net")


def test_a_zoo_model_that_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> torch.nn.Module:
        raise OSError("no weights")

    monkeypatch.setitem(models._local, "broken", ZooModel("broken", build, (1, 3)))
    with pytest.raises(SourceError, match="OSError: no weights"):
        open_source("broken")


def test_missing_modules_and_names() -> None:
    with pytest.raises(SourceError, match="cannot be imported"):
        open_source("no_such_package.nets:net")
    with pytest.raises(SourceError) as caught:
        open_source("vit_digit")
    assert "did you mean 'vit_digits'?" in str(caught.value)


@pytest.mark.parametrize("suffix", ["pt", "pth", "pkl", "bin", "safetensors"])
def test_weights_without_a_network(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model.{suffix}"
    torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(SourceError, match="without a network") as caught:
        open_source(str(path))
    assert "--weights" in str(caught.value)


def test_a_pickle_is_never_run(tmp_path: Path, factory: str) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "bomb.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SourceError):
        open_source(str(tmp_path / "bomb.pt"))
    with pytest.raises(SourceError, match="cannot be read safely"):
        open_source(f"{factory}:net", [InputSpec("", (1, 3))], weights=str(tmp_path / "bomb.pt"))
    assert not (tmp_path / "ran").exists()


def test_weights_are_loaded(tmp_path: Path, factory: str) -> None:
    from safetensors.torch import save_file

    state = {"weight": torch.full((2, 3), 7.0), "bias": torch.zeros(2)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.safetensors", "w.pt"):
        source = open_source(f"{factory}:net", [InputSpec("", (1, 3))], weights=str(tmp_path / name))
        assert source.module is not None
        torch.testing.assert_close(source.module.weight, state["weight"])
    save_file({"weight": torch.zeros(5)}, tmp_path / "other.safetensors")
    with pytest.raises(SourceError, match="do not fit"):
        open_source(f"{factory}:net", [InputSpec("", (1, 3))], weights=str(tmp_path / "other.safetensors"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:20])
    with pytest.raises(SourceError, match="cannot be read safely"):
        open_source(f"{factory}:net", [InputSpec("", (1, 3))], weights=str(tmp_path / "cut.safetensors"))


def test_an_exported_program(tmp_path: Path) -> None:
    module = Two().eval()
    torch.export.save(torch.export.export(module, (torch.ones(1, 3), torch.ones(1, 3))), tmp_path / "two.pt2")
    source = open_source(str(tmp_path / "two.pt2"))
    assert source.module is not None
    assert [tuple(t.shape) for t in source.example_inputs] == [(1, 3), (1, 3)]
    torch.testing.assert_close(source.module(torch.ones(1, 3), torch.ones(1, 3)), module(torch.ones(1, 3), torch.ones(1, 3)))
    (tmp_path / "cut.pt2").write_bytes((tmp_path / "two.pt2").read_bytes()[:200])
    with pytest.raises(SourceError, match=r"not a torch.export program"):
        open_source(str(tmp_path / "cut.pt2"))
    with pytest.raises(UsageError, match="fixes its input shapes"):
        open_source(str(tmp_path / "two.pt2"), [InputSpec("left", (2, 3))])


def test_options_of_a_model_of_the_zoo() -> None:
    """The number of compressed tokens is chosen when the model is deployed; what is unknown is named."""
    from edgekit.source import open_source

    module = open_source("lookupvit_tiny{tokens=25}").module
    assert module is not None
    assert module.resize.shape == (25, 64)
    with pytest.raises(UsageError, match="no option 'token'") as caught:
        open_source("lookupvit_tiny{token=25}")
    assert "tokens" in str(caught.value.fix)
    with pytest.raises(SourceError, match="square"):
        open_source("lookupvit_tiny{tokens=8}")
