"""A model that takes inputs of several shapes: which shapes it is compiled at, its graphs there, and the check of the result.

Everything before the target works on static shapes. So the graph is made at a few of the shapes, and the target writes what they have in
common; the result is then held to the original model at each of them and at the ends of the ranges.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from edgekit import specs
from edgekit.apply import apply_pass
from edgekit.contracts import Arrays, Context, Pass, Shapes, Target
from edgekit.data import Declared, declared_inputs
from edgekit.errors import EdgekitError, UsageError
from edgekit.evaluate import Evaluator
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.shapes import infer_shapes
from edgekit.inputs import InputSpec
from edgekit.original import Opener, Original
from edgekit.progress import Reporter
from edgekit.trace import run_module
from edgekit.verify import Parity, assert_close, compare

if TYPE_CHECKING:
    import torch

_MOST_RANGES = 6
"""Each costs a compile of its own."""
_SMALL_FACTORS = 2 * 3 * 5 * 7
_RUN = 8
"""Consecutive sizes that the result is checked at."""
_SPREAD = 64
"""Sizes up to which a range is looked at that is too large to be looked at as a whole."""
_SAMPLES = 2
_LARGEST_POINT = 2**22
"""Elements of all inputs together beyond which the graph is not made at the end of a range."""
_LARGEST_PROBE = 2**26
"""Elements of all inputs together beyond which the result is not run at the end of a range."""


@dataclass(frozen=True)
class Plan:
    """The shapes that a model is compiled and checked at.

    Attributes:
        points: The inputs at each shape that the graph is made at.
        probes: The inputs at further shapes that only the result is checked at.
        listed: Whether the user listed the shapes, which `points` then are, instead of giving ranges.
    """

    points: tuple[tuple[InputSpec, ...], ...]
    probes: tuple[tuple[InputSpec, ...], ...] = ()
    listed: bool = False

    @property
    def stages(self) -> int:
        """The stages that they add to a compile."""
        return len(self.points) + len(self.probes)


@dataclass(frozen=True)
class Variant:
    """The model at one combination of input shapes.

    Attributes:
        original: The uncompressed model there.
        graph: Its optimized graph.
    """

    original: Original
    graph: ir.Model

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by input name."""
        return {name: declared.shape for name, declared in declared_inputs(self.original.model).items()}


@dataclass(frozen=True)
class ShapeCheck:
    """How the result compares with the original model at one combination of input shapes."""

    shapes: dict[str, tuple[int, ...]]
    parity: Parity

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"inputs": {name: list(shape) for name, shape in self.shapes.items()}, "parity": self.parity.to_dict()}


def plan_shapes(inputs: Sequence[InputSpec], target: Target) -> Plan | None:
    """Chooses the shapes for input descriptions; None where each names one shape only.

    Raises:
        UsageError: The target takes one shape only, alternatives do not correspond, or alternatives and ranges are mixed.
    """
    several = [size for spec in inputs for size in spec.sizes if len(size) > 1]
    if not several:
        return None
    if not target.flexible:
        raise UsageError(
            f"target '{target.name}' writes models for one shape of the inputs", where="--input", fix="give one size for each dimension"
        )
    alternatives = [size for size in several if isinstance(size, tuple)]
    if alternatives:
        counts = {len(size) for size in alternatives}
        if len(alternatives) < len(several) or len(counts) > 1:
            raise UsageError(
                "the alternatives of the dimensions do not correspond: they are taken in order, the first with the first",
                where="--input",
                fix="write equally many for each dimension that varies, and no range beside them: x:1,3,224|256,224|320",
            )
        return Plan(tuple(_at(inputs, shape) for shape in zip(*alternatives, strict=True)), listed=True)
    if len(several) > _MOST_RANGES:
        raise UsageError(f"{len(several)} dimensions have ranges", where="--input", fix=f"give ranges to {_MOST_RANGES} at most")
    ranges = [size for size in several if isinstance(size, range)]
    whole = _elements(_at(inputs, [size[-1] for size in ranges])) <= _LARGEST_POINT
    points = [_at(inputs, point) for point in _points(ranges, whole)]
    probes = [_at(inputs, probe) for probe in _probes(ranges)]
    return Plan(tuple(points), tuple(probe for probe in probes if probe not in points and _elements(probe) <= _LARGEST_PROBE))


def _elements(inputs: Sequence[InputSpec]) -> int:
    return sum(math.prod(spec.shape) for spec in inputs)


def _points(ranges: Sequence[range], whole: bool) -> list[tuple[int, ...]]:
    """Sizes of all ranges at several points, the largest first.

    Each range has sizes at both its ends, next to them, and between, so that what holds for even sizes only, or every fourth, is seen; and
    any two ranges differ at some point, even equal ones. They span the ranges where `whole`, else their beginnings. The size 1 is left out
    where there are others: axes of length 1 are broadcast, and graphs differ there.
    """
    low = [max(sizes[0], 2) if sizes[-1] > 2 else sizes[0] for sizes in ranges]
    high = [sizes[-1] if whole else min(sizes[-1], max(4 * first, _SPREAD)) for sizes, first in zip(ranges, low, strict=True)]
    spans = list(zip(low, high, strict=True))
    single = [(*high[:axis], first, *high[axis + 1 :]) for axis, first in enumerate(low)]
    inner = [tuple(max(last - 1, first) for first, last in spans), tuple(min(first + 1, last) for first, last in spans)]
    return list(dict.fromkeys([tuple(high), *single, *inner, tuple(_between(first, last) for first, last in spans)]))


def _between(low: int, high: int) -> int:
    """A size near the middle that has no small factor, where there is one."""
    middle = (low + high) // 2
    near = (
        sorted(range(low, high + 1), key=lambda size: abs(size - middle)) if high - low < _SPREAD else range(middle, min(middle + 12, high))
    )
    return next((size for size in near if math.gcd(size, _SMALL_FACTORS) == 1), middle)


def _probes(ranges: Sequence[range]) -> list[tuple[int, ...]]:
    """The smallest and the largest sizes, and a run of consecutive ones that nothing was written for: the result must hold there too."""
    rng = np.random.default_rng([len(sizes) for sizes in ranges])
    starts = [int(rng.integers(0, max(len(sizes) - _RUN, 0) + 1)) for sizes in ranges]

    def run(step: int) -> tuple[int, ...]:
        places = (start + (step + axis) % _RUN for axis, start in enumerate(starts))
        return tuple(sizes[min(place, len(sizes) - 1)] for place, sizes in zip(places, ranges, strict=True))

    ends = [tuple(sizes[end] for sizes in ranges) for end in (0, -1)]
    return list(dict.fromkeys([*ends, *map(run, range(_RUN))]))


def _at(inputs: Sequence[InputSpec], chosen: Iterable[int]) -> tuple[InputSpec, ...]:
    """The inputs with the given sizes, in order, in the dimensions that have several."""
    sizes = iter(chosen)
    return tuple(
        InputSpec(spec.name, tuple(next(sizes) if len(size) > 1 else size[0] for size in spec.sizes) or spec.shape, spec.dtype)
        for spec in inputs
    )


@dataclass(frozen=True)
class Several:
    """Makes a model for several input shapes.

    Attributes:
        plan: The shapes.
        opener: Opens the model at the default shape.
        module: A module in memory with its example inputs, or None.
        folder: An existing folder for temporary files.
    """

    plan: Plan
    opener: Opener
    module: tuple[torch.nn.Module, Any] | None
    folder: Path

    def variants(self, base: Original, passes: Sequence[Pass], context: Context, skip: Mapping[str, Sequence[str]]) -> list[Variant]:
        """The model at each of the plan's points.

        Args:
            base: The model at the default shape, whose data is cut or repeated to other shapes.
            passes: The passes, which were proved at the default shape.
            context: What they may use.
            skip: Per name of a pass, the places that it leaves alone.

        Raises:
            EdgekitError: The model does not run at one of the shapes.
        """
        variants = []
        for number, point in enumerate(self.plan.points):
            with self.opener.reporter.stage(f"inputs {_text(point)}"):
                original = self._open(point, base, f"shape-{number}")
                variants.append(Variant(original, _optimize(original, passes, context, skip)))
        return variants

    def shapes(self, variants: Sequence[Variant]) -> Shapes:
        """The shapes that the result takes, for every input of the graph.

        An input that the user did not describe can vary too, where its dimension bears the name of one that varies.

        Raises:
            UsageError: Such an input varies otherwise than any dimension that was given.
        """
        found = [variant.shapes for variant in variants]
        if self.plan.listed:
            return Shapes(listed=tuple(found))
        ends: dict[tuple[int, ...], tuple[int, int]] = {}
        for number, spec in enumerate(self.opener.inputs):
            for axis, size in enumerate(spec.sizes):
                if len(size) > 1:
                    ends[tuple(point[number].shape[axis] for point in self.plan.points)] = (size[0], size[-1])
        ranges = {}
        for name, shape in found[0].items():
            sizes = [tuple(one[name][axis] for one in found) for axis in range(len(shape))]
            unknown = [axis for axis, size in enumerate(sizes) if len(set(size)) > 1 and size not in ends]
            if unknown:
                raise UsageError(f"dimension {unknown[0]} of input '{name}' varies too", where="--input", fix=f"give the sizes of '{name}'")
            ranges[name] = tuple(ends.get(size, (size[0], size[0])) for size in sizes)
        return Shapes(ranges=ranges)

    def check(
        self,
        variants: Sequence[Variant],
        base: Original,
        evaluator: Evaluator,
        target: Target,
        folder: Path,
        graph: ir.Model,
        precision: str,
    ) -> list[ShapeCheck]:
        """Runs what `target` wrote into `folder` at the plan's points and probes, beside the original model.

        Args:
            variants: The model at the points.
            base: The model at the default shape.
            evaluator: Runs the result.
            target: The target.
            folder: The artifact's folder.
            graph: The optimized graph, of which only the dtypes of inputs are looked at.
            precision: The lowest precision that takes part; empty where the result differs on purpose and is only measured.

        Raises:
            ParityError: The two differ by more than rounding.
        """
        known = [(variant.original.data.calibration, variant.original.reference) for variant in variants]
        for number, probe in enumerate(self.plan.probes):
            with self.opener.reporter.stage(f"inputs {_text(probe)}"):
                known.append(self._expected(probe, base, f"probe-{number}"))
        checks = []
        for feeds, reference in known:
            shapes = {name: array.shape for name, array in feeds[0].items()}
            text = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
            outputs = evaluator.run_lowered(target, folder, graph, f"run artifact at {text}", feeds).outputs
            if precision:
                parity = assert_close(reference, outputs, stage=f"{target.name} at {text}", precision=precision)
            else:
                parity = compare(reference, outputs)
            checks.append(ShapeCheck(shapes, parity))
        return checks

    def _expected(self, inputs: Sequence[InputSpec], base: Original, name: str) -> tuple[list[Arrays], list[Arrays]]:
        """Batches in these shapes and the original model's outputs on them; a module is run, which is faster than tracing it."""
        if base.source.module is None:
            original = self._open(inputs, base, name)
            return original.data.calibration, original.reference
        source = dataclasses.replace(self.opener, inputs=inputs).source(None if self.module is None else (self.module[0], None))
        declared = {
            name: Declared(tuple(example.shape), base.data.calibration[0][name].dtype)
            for name, example in zip(base.data.calibration[0], source.example_inputs, strict=True)
        }
        feeds = _resized(base.data.calibration, declared, _SAMPLES)
        return feeds, run_module(source, feeds, list(declared), list(base.reference[0]))

    def _open(self, inputs: Sequence[InputSpec], base: Original, name: str) -> Original:
        folder = self.folder / name
        folder.mkdir()
        recipe = dataclasses.replace(self.opener.recipe, calibration=_SAMPLES)
        data = partial(_resized, base.data.calibration)
        reporter = Reporter()
        reporter.check = self.opener.reporter.check
        opener = dataclasses.replace(self.opener, recipe=recipe, inputs=inputs, data=data, folder=folder, reporter=reporter)
        try:
            return opener.open(None if self.module is None else (self.module[0], None))
        except EdgekitError as error:
            raise type(error)(error.what, where=f"inputs {_text(inputs)}; {error.where or ''}".strip("; "), fix=error.fix) from error


def _text(inputs: Sequence[InputSpec]) -> str:
    return ", ".join(f"{spec.name} {'×'.join(map(str, spec.shape))}".strip() for spec in inputs)


def _optimize(original: Original, passes: Sequence[Pass], context: Context, skip: Mapping[str, Sequence[str]]) -> ir.Model:
    graph = canonicalize(to_opset(original.model.clone(), OPSET))
    infer_shapes(graph)
    for item in passes:
        left = context.skip | frozenset(skip.get(item.name, ()))
        there = Context(original.data.calibration, context.target, context.generator, context.has_data, left)
        apply_pass(item, specs.format_spec(item.name, item), graph, there)
        infer_shapes(graph)
    return graph


def _resized(feeds: Sequence[Arrays], declared: dict[str, Declared], count: int) -> list[Arrays]:
    """Returns `count` batches in the declared shapes, cut from `feeds`, whose rows are taken one after the other."""
    return [{name: _batch([feed[name] for feed in feeds], what.shape, k) for name, what in declared.items()} for k in range(count)]


def _batch(arrays: Sequence[np.ndarray], shape: Sequence[int], start: int) -> np.ndarray:
    array = np.concatenate(arrays) if arrays[0].ndim else arrays[0]
    for axis, size in enumerate(shape):
        array = np.take(array, (np.arange(size) + start) % array.shape[axis], axis)
    return array
