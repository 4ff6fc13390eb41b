"""The target `coreml`: a legalized graph becomes `model.mlpackage`, an ML Program for iOS and macOS."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import onnx_ir as ir

from edgekit.contracts import Effect, Executable, Shapes, Target
from edgekit.errors import LoweringError, MissingToolError, UsageError, nearest
from edgekit.graph.shapes import infer_shapes
from edgekit.targets.coreml.compression import parse_storage
from edgekit.targets.coreml.images import parse_images
from edgekit.targets.coreml.interface import METADATA, NEEDS, RECIPE, Wishes, parse_states, read_labels
from edgekit.targets.coreml.versions import VERSIONS

if TYPE_CHECKING:
    from edgekit.targets.coreml.convert import Converted, Options


@dataclass(frozen=True)
class CoreMl(Target):
    """Core ML's ML Program format, written from ONNX.

    Attributes:
        precision: `fp16` computes and stores floats in float16, as the Neural Engine does; `fp32` keeps float32.
        weights: How weights are stored: `palette1`, `palette2`, `palette4`, `palette6`, `palette8`, `int8`, `int4`, `int4:64` (in blocks of
            64), `sparse`; empty: in the precision.
        deployment_target: The oldest system that the package runs on; empty: the oldest that has all the operators that the graph needs.
        image_inputs: Inputs that take images, each `NAME:SCALE,BIAS,COLOUR` (RGB, BGR or GRAYSCALE; three biases joined by `/`): the
            graph is given scale · pixel + bias.
        class_labels: A text file with one class a line: the model then gives a label and the score of each class.
        states: Values kept between calls, each `INPUT=OUTPUT`, as for the caches of keys and values.
        author: Metadata of the package.
        license: Metadata of the package.
        description: Metadata of the package.
    """

    name: ClassVar[str] = "coreml"
    requires: ClassVar[tuple[str, ...]] = ("coremltools",)
    extra: ClassVar[str] = "coreml"
    precisions: ClassVar[tuple[str, ...]] = ("fp16", "fp32")

    flexible: ClassVar[bool] = True
    suffix: ClassVar[str] = ".mlpackage"

    precision: str = "fp16"
    weights: str = ""
    deployment_target: str = ""
    image_inputs: tuple[str, ...] = ()
    class_labels: str = ""
    states: tuple[str, ...] = ()
    author: str = ""
    license: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_storage(self.weights)
        parse_images(self.image_inputs)
        parse_states(self.states)
        if self.deployment_target and self.deployment_target not in VERSIONS:
            raise UsageError(f"there is no deployment target '{self.deployment_target}'", fix=nearest(self.deployment_target, VERSIONS))

    @property
    def effect(self) -> Effect:
        """Weights in fewer bits change the numbers; the sparse form does not."""
        storage = parse_storage(self.weights)
        return Effect.EXACT if storage is None or storage.kind == "sparse" else Effect.APPROXIMATE

    @property
    def executes_here(self) -> bool:
        """Core ML itself runs on Apple's systems; elsewhere the evaluator executes the package, at the speed of PyTorch."""
        return sys.platform == "darwin"

    def uncompressed(self) -> Target:
        """With weights in the precision that they are computed in."""
        return replace(self, weights="")

    def legalize(self, model: ir.Model) -> None:
        """Inlines functions, unrolls static loops and brings every value to a rank of 5 at most."""
        from edgekit.targets.coreml.legalize import legalize

        legalize(model)

    def lower(self, model: ir.Model, folder: Path) -> None:
        """Writes `model.mlpackage` into `folder`.

        Raises:
            UnsupportedOpError: Core ML cannot express an operator.
            LoweringError: coremltools failed.
            MissingToolError: The coremltools package is not installed.
        """
        _require_coremltools()
        from edgekit.targets.coreml.convert import convert

        infer_shapes(model)
        self._save(convert(model, self._options()), folder)

    def lower_sizes(self, models: Sequence[ir.Model], shapes: Shapes, folder: Path) -> None:
        """Writes `model.mlpackage` into `folder`, for every shape of the inputs in `shapes`.

        Raises:
            UnsupportedOpError: As of `lower`, or the program depends on the shapes in more than sizes.
            LoweringError, MissingToolError: As of `lower`.
        """
        _require_coremltools()
        from edgekit.targets.coreml.flexible import convert_sizes

        for model in models:
            infer_shapes(model)
        self._save(convert_sizes(models, self._options(), shapes), folder)

    def _options(self) -> Options:
        from edgekit.targets.coreml.convert import Options

        wishes = Wishes(parse_images(self.image_inputs), parse_states(self.states), read_labels(self.class_labels))
        return Options(self.precision == "fp16", self.deployment_target, parse_storage(self.weights), wishes)

    def _save(self, converted: Converted, folder: Path) -> None:
        converted.model.author, converted.model.license = self.author, self.license
        converted.model.short_description = self.description
        converted.model.user_defined_metadata[METADATA] = converted.interface.to_json()
        converted.model.user_defined_metadata[NEEDS] = json.dumps({"deployment_target": converted.version, "needed_by": converted.needs})
        try:
            converted.model.save(str(folder / "model.mlpackage"))
        except (OSError, RuntimeError) as error:
            raise LoweringError(
                f"coremltools cannot write the package: {str(error).strip()[:400]}", where=str(folder), fix="check the free space"
            ) from error

    def load(self, folder: Path, threads: int) -> Executable:
        """Opens `folder/model.mlpackage`, to run on `threads` threads.

        Raises:
            UsageError: There is none, or `threads` is not positive.
            SourceError: It cannot be read.
            MissingToolError: The coremltools package is not installed.
        """
        _require_coremltools()
        from edgekit.targets.coreml.executable import load_package

        path = folder / "model.mlpackage"
        if not path.is_dir():
            raise UsageError("model.mlpackage is missing", where=str(folder), fix="compile the model again with --target coreml")
        if threads < 1:
            raise UsageError(f"{threads} threads cannot run a model", fix="give a positive number of threads")
        return load_package(path, threads)

    def annotate(self, folder: Path, recipe: str) -> None:
        """Puts the recipe into the package's metadata, under `edgekit.recipe`."""
        from edgekit.targets.coreml.reference.package import open_package

        package = open_package(folder / "model.mlpackage")
        package.spec.description.metadata.userDefined[RECIPE] = recipe
        (package.weights / package.file).write_bytes(package.spec.SerializeToString())

    @classmethod
    def load_file(cls, path: Path, threads: int) -> Executable:
        """Opens any `.mlpackage` with an ML Program; arrays are in the dtypes and ranks that the package declares.

        Raises:
            SourceError, UnsupportedOpError: It cannot be read or executed.
            MissingToolError: The coremltools package is not installed.
        """
        _require_coremltools()
        from edgekit.targets.coreml.executable import load_package

        return load_package(path, threads)

    @classmethod
    def describe_file(cls, path: Path) -> dict[str, Any]:
        """Operators of any `.mlpackage`, and what is documented or reported of where they run and of float16.

        Raises:
            SourceError, UnsupportedOpError: It cannot be read, or holds no ML Program.
            MissingToolError: The coremltools package is not installed.
        """
        _require_coremltools()
        from edgekit.targets.coreml.placement import placement

        return placement(path).describe()

    def native_operators(self, folder: Path) -> dict[str, int]:
        """The operations of the program by type, without constants; those of nested blocks count too."""
        from edgekit.targets.coreml.reference.package import open_package

        spec = open_package(folder / "model.mlpackage").spec
        counts: Counter[str] = Counter()
        for function in spec.mlProgram.functions.values():
            for block in function.block_specializations.values():
                _count(block, counts)
        return dict(counts.most_common())


def _count(block: Any, counts: Counter[str]) -> None:
    for operation in block.operations:
        if operation.type != "const":
            counts[operation.type] += 1
        for inner in operation.blocks:
            _count(inner, counts)


def _require_coremltools() -> None:
    try:
        importlib.import_module("coremltools")
    except ImportError as error:
        raise MissingToolError(
            f"the target 'coreml' needs the package coremltools: {error}", fix="pip install -c constraints.txt 'edgekit[coreml]'"
        ) from error
