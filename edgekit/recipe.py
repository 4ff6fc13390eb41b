"""A recipe: everything that a compile depends on, as a TOML file that repeats it."""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from edgekit import contracts, specs
from edgekit.contracts import Pass, Target
from edgekit.errors import RecipeError, nearest

IN_MEMORY = "(in memory) "
"""Prefix of `Recipe.model` for a module that was handed over in Python: such a recipe names it but cannot open it."""

_SEEDS = 2**63
"""TOML and PyTorch hold seeds in 64 bits with a sign."""

_MOST_THREADS = 4096
"""Runtimes take any number, and run out of memory."""


@dataclass(frozen=True)
class Recipe:
    """What to compile and how. Its fields are the keys of the file.

    Attributes:
        model: A zoo name, `timm:NAME`, a file, or `package.module:factory`.
        target: Name of the target, with options in braces where it has some.
        precision: The precision that the target executes in; empty: the target's own default.
        passes: Pass specifications in order; None stands for every pass that belongs to the default recipe.
        data: A dataset name, a folder of images, an `.npz`, or `package.module:iterable`; None: seeded noise.
        inputs: Shapes of inputs, such as `x:1,3,224,224`.
        weights: A `.safetensors` file or a state dict, loaded into the module before tracing.
        calibration: Number of calibration inputs.
        max_drop: The most that approximate passes may cost, in percentage points of the metric.
        seed: Seed of every random choice.
        threads: Threads that the target runs on; 0: all that this process may use.
        skip: Per name of a pass, the places (node names) that it leaves alone, as `edgekit bisect` proposes them.
        recover: Minutes to train the graph towards what it was before the first approximate pass; None: not at all.
        recover_steps: Steps of each level of that training, which a compile turns its minutes into; given, they repeat it.
    """

    model: str
    target: str
    precision: str = ""
    passes: tuple[str, ...] | None = None
    data: str | None = None
    inputs: tuple[str, ...] = ()
    weights: str | None = None
    calibration: int = 8
    max_drop: float | None = None
    seed: int = 0
    threads: int = 0
    skip: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    recover: float | None = None
    recover_steps: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.calibration < 1:
            raise RecipeError(f"calibration = {self.calibration}: at least one input is needed", fix="give a whole number from 1")
        if self.threads < 0:
            raise RecipeError(f"threads = {self.threads} is negative", fix="give 0 for all threads, or their number")
        if self.threads > _MOST_THREADS:
            raise RecipeError(f"threads = {self.threads} is more than {_MOST_THREADS}", fix="give 0 for all threads, or their number")
        if self.max_drop is not None and not 0.0 <= self.max_drop < math.inf:
            raise RecipeError(f"max_drop = {self.max_drop:g} is not a number from 0", fix="give percentage points, such as 0.5")
        if self.recover is not None and not 0.0 < self.recover < math.inf:
            raise RecipeError(f"recover = {self.recover:g} is no time", fix="give minutes, such as 3")
        if not 0 <= self.seed < _SEEDS:
            raise RecipeError(f"seed = {self.seed} is not a whole number from 0 to 2^63 - 1", fix="give one of those")

    def require_skipped(self, passes: Sequence[Pass]) -> None:
        """Checks that `skip` names passes that run.

        Raises:
            RecipeError: It names another.
        """
        names = [item.name for item in passes]
        for name in self.skip:
            if name not in names:
                raise RecipeError(f"places of pass '{name}' are to be skipped, which does not run", fix=nearest(name, names))

    def make_target(self) -> Target:
        """Makes the target.

        Raises:
            RecipeError, UsageError: The target, one of its options or the precision does not exist.
        """
        name, options = specs.split_spec(self.target)
        cls = contracts.targets.get(name)
        if self.precision and options.get("precision", self.precision) != self.precision:
            raise RecipeError(
                f"two precisions are asked for: {self.precision}, and {options['precision']} in '{self.target}'",
                fix="leave one of them out",
            )
        precision = {"precision": self.precision} if self.precision else {}
        return specs.make(cls, {**precision, **options}, f"target '{name}'")

    def make_passes(self, notes: list[str] | None = None) -> list[Pass]:
        """Makes the passes in order; without `passes`, those of the default recipe.

        Args:
            notes: Told of passes that cannot be imported, which the default recipe leaves out.

        Raises:
            RecipeError, UsageError: A pass or one of its options does not exist.
        """
        if self.passes is None:
            found, errors = contracts.passes.load_all()
            if notes is not None:
                notes += [f"{error.what} ({error.where}); the default recipe was made without it" for error in errors]
            defaults = [cls for cls in found.values() if cls.default_order is not None]
            return [cls() for cls in sorted(defaults, key=lambda cls: (cls.default_order or 0, cls.name))]
        return [specs.make_pass(spec) for spec in self.passes]


def load_recipe(path: Path) -> Recipe:
    """Reads a recipe file. Relative paths of files beside it become absolute, so that it means the same wherever it is read from.

    Raises:
        RecipeError: The file cannot be read, is not TOML, has an unknown key or a value of the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}", where=str(path), fix="check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the recipe is not valid TOML: {error}", where=str(path), fix="correct the file at that line") from error
    table.pop("versions", None)
    try:
        skip, steps = _read_skip(table.pop("skip", {})), _read_steps(table.pop("recover_steps", {}))
        recipe = dataclasses.replace(specs.make(Recipe, table, "the recipe"), skip=skip, recover_steps=steps)
    except RecipeError as error:
        raise RecipeError(error.what, where=str(path), fix=error.fix) from error
    return _with_absolute_paths(recipe, path.parent)


def parse_skips(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Reads `PASS:PLACE` as the command line takes it; everything after the first colon is the place.

    Raises:
        RecipeError: One of them is not of that form.
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in texts:
        name, colon, place = text.partition(":")
        if not name or not colon or not place:
            raise RecipeError(f"'{text}' does not name a place of a pass", fix="write PASS:PLACE, such as fold-batch-norm:features.0/Conv")
        found[name] = (*found.get(name, ()), place)
    return found


def _read_skip(table: Any) -> dict[str, tuple[str, ...]]:
    fix = 'write [skip] and below it a line a pass: fold-batch-norm = ["PLACE"]'
    if not isinstance(table, dict):
        raise RecipeError("'skip' of the recipe is not a table", fix=fix)
    for name, places in table.items():
        if not isinstance(places, list) or not all(isinstance(place, str) for place in places):
            raise RecipeError(f"'{name}' under [skip] is not a list of places", fix=fix)
    return {name: tuple(places) for name, places in table.items()}


def _read_steps(table: Any) -> dict[str, int]:
    if not isinstance(table, dict) or not all(type(count) is int and count >= 0 for count in table.values()):
        raise RecipeError("'recover_steps' of the recipe is not a table of steps", fix="leave it out: minutes are turned into steps again")
    return dict(table)


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with every path that leads from `folder` to something made absolute; names of models and datasets stay."""

    def absolute(value: str, names: Sequence[str] = ()) -> str:
        path = os.path.abspath(folder / value)
        return path if value and value not in names and os.path.exists(path) else value

    model = absolute(recipe.model, contracts.models.names())
    return dataclasses.replace(
        recipe,
        model=recipe.model if os.path.isdir(model) else model,
        data=None if recipe.data is None else absolute(recipe.data, contracts.datasets.names()),
        weights=None if recipe.weights is None else absolute(recipe.weights),
    )


def dump_recipe(recipe: Recipe, versions: dict[str, str]) -> str:
    """Prints a recipe as TOML that `load_recipe` reads, with paths from the current folder made absolute; `versions` are for the reader."""
    recipe = _with_absolute_paths(recipe, Path())
    table: dict[str, Any] = {key: value for key, value in dataclasses.asdict(recipe).items() if value is not None}
    for key in ("passes", "inputs"):
        if key in table:
            table[key] = list(table[key])
    skip = {name: list(places) for name, places in table.pop("skip").items() if places}
    if skip:
        table["skip"] = skip
    if not table["recover_steps"]:
        del table["recover_steps"]
    return tomli_w.dumps({**table, "versions": versions})
