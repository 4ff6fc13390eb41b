"""Recipe files repeat a compile and name what is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import RecipeError, UsageError
from edgekit.recipe import Recipe, dump_recipe, load_recipe

text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=20)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(
    st.builds(
        Recipe,
        model=text,
        target=text,
        precision=st.sampled_from(["fp32", "fp16"]),
        passes=st.one_of(st.none(), st.lists(text).map(tuple)),
        data=st.one_of(st.none(), text),
        inputs=st.lists(text).map(tuple),
        calibration=st.integers(1, 1000),
        max_drop=st.one_of(st.none(), st.floats(0, 100)),
        seed=st.integers(0, 2**63 - 1),
        threads=st.integers(0, 64),
    )
)
def test_round_trip(recipe: Recipe) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.toml"
        path.write_text(dump_recipe(recipe, {"torch": "2.13.0"}), encoding="utf-8")
        assert load_recipe(path) == recipe


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('model = "a"\ntarget = "b"\npases = []\n', "did you mean 'passes'?"),
        ('model = "a"\n', "needs the option target"),
        ('model = 1\ntarget = "b"\n', "a quoted string"),
        ("model = \n", "not valid TOML"),
        ('model = "a"\ntarget = "b"\ncalibration = 0\n', "at least one"),
        ('model = "a"\ntarget = "b"\nthreads = -1\n', "negative"),
        ('model = "a"\ntarget = "b"\nseed = -1\n', "from 0 to 2^63 - 1"),
        ('model = "a"\ntarget = "b"\nseed = 9223372036854775808\n', "from 0 to 2^63 - 1"),
    ],
)
def test_wrong_recipes(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(content)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_paths_lead_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "there"
    (folder / "images").mkdir(parents=True)
    for name in ("net.onnx", "w.safetensors", "vit_digits", "digits"):
        (folder / name).touch()
    path = folder / "recipe.toml"
    path.write_text('model = "net.onnx"\ntarget = "b"\ndata = "images"\nweights = "../there/w.safetensors"\n')
    monkeypatch.chdir(tmp_path)
    for place in (path, Path("there/recipe.toml")):
        recipe = load_recipe(place)
        assert recipe == Recipe(f"{folder}/net.onnx", "b", data=f"{folder}/images", weights=f"{folder}/w.safetensors")
    path.write_text('model = "vit_digits"\ntarget = "b"\ndata = "digits"\n')
    assert load_recipe(path) == Recipe("vit_digits", "b", data="digits")
    path.write_text('model = "images"\ntarget = "b"\ndata = "none.npz"\n')
    assert load_recipe(path) == Recipe("images", "b", data="none.npz")


def test_existing_paths_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net.onnx").touch()
    (tmp_path / "d.npz").touch()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(dump_recipe(Recipe("net.onnx", "b", data="d.npz", weights="none.pt"), {}))
    (tmp_path / "net.onnx").unlink()  # so that what is read is what was written
    monkeypatch.chdir("/")
    assert load_recipe(tmp_path / "recipe.toml") == Recipe(f"{tmp_path}/net.onnx", "b", data=f"{tmp_path}/d.npz", weights="none.pt")


def test_a_missing_recipe_and_one_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="not valid TOML"):
        load_recipe(tmp_path / "binary.toml")


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe("m", "openvin").make_target()
    assert "did you mean 'openvino'?" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        Recipe("m", "openvino", passes=("fold-batch-nrom",)).make_passes()
    assert "did you mean 'fold-batch-norm'?" in str(caught.value)
    with pytest.raises(UsageError) as caught:
        Recipe("m", "openvino", precision="fp8").make_target()
    assert "fp32, fp16, bf16" in str(caught.value)


def test_the_default_recipe_is_every_exact_pass_in_order() -> None:
    names = [item.name for item in Recipe("m", "openvino").make_passes()]
    assert names == ["reparameterize"]
    assert "to-float16" not in names
    assert Recipe("m", "openvino", passes=()).make_passes() == []
