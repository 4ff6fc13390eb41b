"""What a pass, a target, a zoo model and a dataset are, and the registries that find them.

The driver knows none of them by name. Each is found under an entry-point group of an installed package
(`edgekit.passes`, `edgekit.targets`, `edgekit.models`, `edgekit.datasets`) or was registered in this process by the decorator.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib.metadata
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from edgekit.errors import UsageError, nearest

if TYPE_CHECKING:  # heavy imports stay out of `edgekit --help`
    import numpy as np
    import onnx_ir as ir
    import torch

Arrays = dict[str, "np.ndarray"]
"""Arrays by input or output name."""


class Effect(enum.Enum):
    """What a pass promises about the numbers."""

    EXACT = "exact"
    """Equal up to rounding: the pipeline checks, and a violation stops the compile."""
    APPROXIMATE = "approximate"
    """Changes the numbers on purpose: the pipeline measures by how much."""


@dataclass(frozen=True)
class Refusal:
    """A place that a pass looked at and left alone, with the condition that failed."""

    where: str
    why: str


@dataclass
class Context:
    """What a pass may use besides the graph; it takes nothing from global state.

    Attributes:
        calibration: Batches of inputs, each `{input name: array}` in the shapes of the graph's inputs.
        target: Name of the target that the graph is compiled for.
        generator: The seeded source of randomness.
        has_data: Whether the batches are the user's data, and not noise.
        skip: Places that the pass leaves alone because somebody asked for it, such as a search for a culprit.
        rewrites: Places that were rewritten, in order; filled by `applied`.
        rules: Of a pass that has several rules, how many places each rewrote; filled by `applied`.
        refusals: Places that nearly matched; filled by `refuse`.
    """

    calibration: Sequence[Arrays] = ()
    target: str = ""
    generator: np.random.Generator | None = None
    has_data: bool = False
    skip: frozenset[str] = frozenset()
    rewrites: list[str] = field(default_factory=list)
    rules: Counter[str] = field(default_factory=Counter)
    refusals: list[Refusal] = field(default_factory=list)

    def skips(self, where: str) -> bool:
        """Whether the place `where` (a node name) is to be left alone; asked before each rewrite."""
        return where in self.skip

    def applied(self, where: str, rule: str = "") -> None:
        """Notes that the place `where` (a node name) was rewritten (by `rule`), so that it can be reported, and skipped the next time."""
        self.rewrites.append(where)
        if rule:
            self.rules[rule] += 1

    def refuse(self, where: str, why: str) -> None:
        """Notes that the place `where` (a node name) was left alone and which condition failed."""
        self.refusals.append(Refusal(where, why))


class Pass(ABC):
    """A rewriting of the graph. Subclasses are frozen dataclasses: their fields are the pass's options.

    The docstring draws the graph before and after and names the source.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    default_order: ClassVar[int | None] = None
    """Place in the recipe that is used when none is given; None: the pass runs only when asked for."""
    removes: ClassVar[frozenset[str]] = frozenset()
    """Whole operators (see `edgekit.graph.census`) that an exact pass removes together with their computation; it must keep all others."""

    def settings(self) -> Sequence[Pass]:
        """The settings that an accuracy budget chooses among, the strongest first; itself alone where its strength was given."""
        return [self]

    @abstractmethod
    def apply(self, model: ir.Model, context: Context) -> int:
        """Rewrites `model` in place and returns at how many places; 0 leaves the model unchanged."""


class Executable(ABC):
    """A lowered model that is loaded and can run on this machine."""

    facts: Mapping[str, str] = {}
    """What the target's runtime says of itself, such as the precision that it executes in."""
    inputs: tuple[str, ...] = ()
    """Names of the inputs, of what `Target.load_file` opened."""
    outputs: tuple[str, ...] = ()
    """Names of the outputs, of what `Target.load_file` opened."""

    @abstractmethod
    def run(self, inputs: Arrays) -> Arrays:
        """Runs the model once. Arrays are in the dtypes and shapes of the graph's inputs and outputs."""


@dataclass(frozen=True)
class Shapes:
    """The shapes of the inputs that a model takes; each input either way, dimensions of one size included.

    Attributes:
        ranges: By input name, smallest and largest size of each dimension; empty where shapes are listed.
        listed: Shapes by input name, the default first; empty where ranges are given.
    """

    ranges: Mapping[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    listed: tuple[Mapping[str, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Target(ABC):
    """A format and runtime that a graph is lowered to. Subclasses are frozen dataclasses with the target's options as fields."""

    name: ClassVar[str]
    requires: ClassVar[tuple[str, ...]] = ()
    """Names on PyPI of the packages that the target needs; the report gives their versions."""
    extra: ClassVar[str] = ""
    """The extra of edgekit that installs them."""
    precisions: ClassVar[tuple[str, ...]] = ("fp32",)
    """The precisions that the target can execute in."""
    flexible: ClassVar[bool] = False
    """Whether it has `lower_sizes`, for a model that takes inputs of several shapes."""
    suffix: ClassVar[str] = ""
    """End of the names of files that the target's format has everywhere (`.mlpackage`), where `load_file` opens anybody's."""

    precision: str = "fp32"

    def __post_init__(self) -> None:
        if self.precision not in self.precisions:
            raise UsageError(
                f"target '{self.name}' does not execute in precision '{self.precision}'",
                fix=f"choose one of: {', '.join(self.precisions)}; half the weight bytes on any target: --pass to-float16",
            )

    def legalize(self, model: ir.Model) -> None:  # noqa: B027 (most targets need nothing)
        """Replaces, in place, operators that the target lacks by ones that it has."""

    @abstractmethod
    def lower(self, model: ir.Model, folder: Path) -> None:
        """Writes the target's native files into `folder`.

        Raises:
            UnsupportedOpError: The graph has an operator that the target cannot express.
            LoweringError: The target's compiler failed.
        """

    def lower_sizes(self, models: Sequence[ir.Model], shapes: Shapes, folder: Path) -> None:
        """Writes one model for inputs of several shapes into `folder`; only called where `flexible` says that it is there.

        Args:
            models: The legalized graph at several of the shapes. Where `shapes` lists them, at each in that order.
            shapes: The shapes that the model must take.
            folder: Where to write.

        Raises:
            UnsupportedOpError: A value depends on the shape in a way that the target cannot express.
            LoweringError: The target's compiler failed.
        """
        raise NotImplementedError

    @abstractmethod
    def load(self, folder: Path, threads: int) -> Executable:
        """Loads what `lower` wrote, to run on `threads` threads."""

    @property
    def effect(self) -> Effect:
        """Whether `lower` keeps the numbers up to the rounding of the precision, or changes them on purpose, as compressed weights do."""
        return Effect.EXACT

    @property
    def executes_here(self) -> bool:
        """Whether `load` executes on this machine as a device of the target does, so that latency measured here means something."""
        return True

    def uncompressed(self) -> Target:
        """The target without compression, which is what a baseline is lowered at."""
        return dataclasses.replace(self, precision=self.precisions[0])

    def annotate(self, folder: Path, recipe: str) -> None:  # noqa: B027 (most formats have no room for it)
        """Writes the text of the recipe into the native files in `folder`, where the format keeps such things."""

    @classmethod
    def load_file(cls, path: Path, threads: int) -> Executable:
        """Opens a file of the target's format that anybody wrote; only called for names that end in `suffix`.

        Raises:
            SourceError: It cannot be read.
        """
        raise NotImplementedError

    @classmethod
    def describe_file(cls, path: Path) -> dict[str, Any]:
        """What the target can tell of a file that anybody wrote, as plain data; only called for names that end in `suffix`.

        `operators` counts them by name, `findings` lists `{where, operator, what, why, source}`, `facts` holds anything else.

        Raises:
            SourceError: It cannot be read.
        """
        return {}

    def native_operators(self, folder: Path) -> dict[str, int]:
        """Counts the operators in the native files that `lower` wrote, by the target's own names; empty where the format does not tell."""
        return {}


@dataclass(frozen=True)
class Dataset:
    """Labelled or unlabelled inputs, split once and for all.

    Attributes:
        inputs: Per part (`train`, `calibrate`, `test`), the samples without their batch axis, `[S, ...]`.
        labels: Per part, the class of each sample, `[S]`; empty when there are none.
    """

    inputs: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class ZooModel:
    """A model of the zoo.

    Attributes:
        name: Its name on the command line.
        build: Makes the module with its trained weights, in evaluation mode; its parameters, which have defaults, are options of the
            model, as in `lookupvit{tokens=49}`.
        input_shape: Shape of the one input, batch axis first, `[B, C, H, W]`.
        dataset: Name of the dataset that it was trained on, if any.
        accuracy: Top-1 on that dataset's test part, as measured by the training command.
        source: Paper or origin.
        parameters: Its parameters, for a model that takes long to trace; with `macs` known, listing the zoo does not build it.
        macs: Multiply-accumulates of one inference at `input_shape`.
    """

    name: str
    build: Callable[..., torch.nn.Module]
    input_shape: tuple[int, ...]
    dataset: str | None = None
    accuracy: float | None = None
    source: str = ""
    parameters: int | None = None
    macs: int | None = None


T = TypeVar("T")


class Registry(Generic[T]):
    """Named things, from this process and from entry points; an entry point is imported when it is first asked for."""

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._local: dict[str, T] = {}

    def add(self, name: str, item: T) -> None:
        """Adds `item`; a second registration of the same name replaces the first (as a notebook cell run twice does)."""
        self._local[name] = item

    def _entry_points(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self.group)}

    def names(self) -> list[str]:
        """All names, sorted, without importing anything."""
        return sorted({*self._local, *self._entry_points()})

    def get(self, name: str) -> T:
        """Returns the thing called `name`.

        Raises:
            UsageError: There is no such name (the message gives the nearest), or its package cannot be imported.
        """
        if name in self._local:
            return self._local[name]
        point = self._entry_points().get(name)
        if point is None:
            raise UsageError(f"unknown {self.kind} '{name}'", fix=nearest(name, self.names()))
        try:
            loaded: T = point.load()
        except (Exception, SystemExit) as error:  # importing runs anybody's code
            raise UsageError(
                f"{self.kind} '{name}' cannot be imported: {type(error).__name__}: {error}",
                where=f"entry point {point.value} of group {self.group}",
                fix="reinstall the package that provides it",
            ) from error
        return loaded

    def load_all(self) -> tuple[dict[str, T], list[UsageError]]:
        """Returns all things that can be imported, by sorted name, and an error for each that cannot."""
        found, errors = {}, []
        for name in self.names():
            try:
                found[name] = self.get(name)
            except UsageError as error:
                errors.append(error)
        return found, errors


passes: Registry[type[Pass]] = Registry("pass", "edgekit.passes")
targets: Registry[type[Target]] = Registry("target", "edgekit.targets")
models: Registry[ZooModel] = Registry("model", "edgekit.models")
datasets: Registry[Callable[[], Dataset]] = Registry("dataset", "edgekit.datasets")

P = TypeVar("P", bound=type[Pass])
G = TypeVar("G", bound=type[Target])


def _require_dataclass(cls: type[Any]) -> None:
    if not dataclasses.is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__name__} must be a frozen dataclass: its fields are its options")


def register_pass(cls: P) -> P:
    """Class decorator that makes a pass known in this process under `cls.name`."""
    _require_dataclass(cls)
    if not isinstance(getattr(cls, "effect", None), Effect):
        raise TypeError(f"{cls.__name__} must declare `effect`: Effect.EXACT or Effect.APPROXIMATE")
    passes.add(cls.name, cls)
    return cls


def register_target(cls: G) -> G:
    """Class decorator that makes a target known in this process under `cls.name`."""
    _require_dataclass(cls)
    targets.add(cls.name, cls)
    return cls
