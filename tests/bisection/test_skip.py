"""Places that a pass leaves alone: in a compile, in its recipe, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgekit
from edgekit.compiler import Timing
from edgekit.errors import RecipeError
from edgekit.recipe import Recipe, dump_recipe, load_recipe, parse_skips
from edgekit.stages import canonical_graph, open_graph
from tests.conftest import edgekit as run_edgekit

QUICK = Timing(budget_s=0.0)


def test_a_compile_leaves_places_alone_and_keeps_them_in_its_recipe(tiny: Path, tmp_path: Path) -> None:
    whole = edgekit.compile(tiny, target="onnxruntime", passes=["fold-batch-norm"], timing=QUICK)
    (done,) = whole.report["passes"]
    assert done["rewrites"] == 1
    (place,) = (node.name for node in canonical_graph(open_graph(str(tiny)).graph).graph if node.op_type == "BatchNormalization")
    names = [f"fold-batch-norm:{name}" for name in (place, "none/here")]
    artifact = edgekit.compile(tiny, target="onnxruntime", passes=["fold-batch-norm"], skip=names, timing=QUICK, out=tmp_path / "out")
    (done,) = artifact.report["passes"]
    assert done["rewrites"] == 0
    assert any("met no place 'none/here'" in note for note in artifact.report["notes"])
    recipe = load_recipe(tmp_path / "out" / "recipe.toml")
    assert recipe.skip == parse_skips(names)
    assert "[skip]" in (tmp_path / "out" / "recipe.toml").read_text()


def test_round_trip(tmp_path: Path) -> None:
    recipe = Recipe("m", "t", skip={"a": ("x/Conv:0", 'q"uote'), "b-c": ("y",)})
    (tmp_path / "recipe.toml").write_text(dump_recipe(recipe, {"torch": "2"}))
    assert load_recipe(tmp_path / "recipe.toml") == recipe


@pytest.mark.parametrize(
    ("lines", "says"),
    [("skip = 3", "not a table"), ("[skip]\nfold-batch-norm = 'x'", "not a list of places"), ("[skip]\na = [1]", "not a list of places")],
)
def test_wrong_tables(lines: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(f'model = "m"\ntarget = "t"\n{lines}\n')
    with pytest.raises(RecipeError, match=says):
        load_recipe(tmp_path / "recipe.toml")


def test_wrong_names(tiny: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'reparameterize'"):
        edgekit.compile(tiny, target="onnxruntime", skip=["reparametrize:x"])
    for text in ("fold-batch-norm", ":x", "fold-batch-norm:"):
        with pytest.raises(RecipeError, match="PASS:PLACE"):
            parse_skips([text])


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    """Agreement ends with 0, a culprit with 5, and a mistake with 2; JSON stands alone."""
    agree = run_edgekit("bisect", str(tiny), "--target", "onnxruntime", "--quiet")
    assert (agree.returncode, agree.stdout) == (0, "")
    changed = tmp_path / "changed.onnx"
    import onnx

    model = onnx.load(tiny)
    next(node for node in model.graph.node if node.op_type == "BatchNormalization").attribute.append(
        onnx.helper.make_attribute("epsilon", 0.5)
    )
    onnx.save(model, changed)
    found = run_edgekit("bisect", str(tiny), str(changed), "--json", "--out", str(tmp_path / "out"))
    assert found.returncode == 5, found.stderr
    finding = json.loads(found.stdout)
    assert finding["node"]["operator"] == "BatchNormalization"
    assert (finding["tensor"]["role"], finding["tensor"]["name"]) == ("attribute", "epsilon")
    assert finding["reproducer"]["shows"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"reproduce.onnx", "inputs.npz", "expected.npz", "README.md"}
    shown = run_edgekit("bisect", str(tiny), str(changed), "--out", str(tmp_path / "out"), "--force")
    assert shown.returncode == 5
    assert "epsilon: 0.5 instead of the default" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--min-sqnr", "-3"), "not a number of decibels"),
        (("--skip", "reparametrise:x"), "did you mean 'reparameterize'"),
        (("other.pt",), "not an .onnx file"),
        (("other.onnx", "--target", "openvino"), "compared as they are"),
        (("--target", "openvin"), "did you mean 'openvino'"),
        (("--out", "."), "the output folder exists"),
    ],
)
def test_mistakes(arguments: tuple[str, ...], says: str, tiny: Path) -> None:
    done = run_edgekit("bisect", str(tiny), *arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
