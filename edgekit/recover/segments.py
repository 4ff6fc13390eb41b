"""The student and the teacher in parts, from one sum of the residual stream to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from torch import Tensor

from edgekit.graph.constants import constant_array
from edgekit.graph.parts import part
from edgekit.graph.token_steps import Mark
from edgekit.recover.network import Network, Samples, floats
from edgekit.recover.pairs import Pair, find_pairs, kept_rows, token_marks
from edgekit.recover.task import Task


@dataclass(frozen=True)
class Segment:
    """What is computed between two sums of the stream, in both graphs.

    Attributes:
        pair: The sum at its end.
        before: The sum at its beginning; None: the graph's inputs.
        model: The student.
        end: The student's value at its end.
        stops: The student's value at its beginning.
        teacher: The part of the teacher.
        marks: The steps in it that leave tokens out, in order.
        trainable: Names of the weights in it that may change, and that no segment before it has.
        linear: The product that is added to the stream at its end, or None.
    """

    pair: Pair
    before: Pair | None
    model: ir.Model
    end: ir.Value
    stops: tuple[ir.Value, ...]
    teacher: ir.Model
    marks: tuple[tuple[str, Mark], ...]
    trainable: tuple[str, ...]
    linear: Linear | None

    @property
    def student(self) -> ir.Model:
        """The part of the student, with its weights as they are now: what chooses tokens may be computed from earlier ones too."""
        return part(self.model, [self.end], self.stops)

    @property
    def whole_rows(self) -> bool:
        """Whether the student has all of the teacher's tokens at the end."""
        return self.pair.shape == self.pair.teacher_shape


@dataclass(frozen=True)
class Linear:
    """x · weight + bias, which is added to the stream.

    Attributes:
        x: Name of x, `[B, N, d]`.
        stream: Name of what it is added to.
        weight: Name of the weight `[d, C]`.
        bias: Name of the bias `[C]`, or None.
    """

    x: str
    stream: str
    weight: str
    bias: str | None


@dataclass
class Stream:
    """Where the samples are between two segments.

    Attributes:
        student: The student's sum, `[S, B, n, C]`; None before the first.
        teacher: The teacher's.
        rows: The teacher's rows that the student's tokens are; None: all.
    """

    student: Tensor | None = None
    teacher: Tensor | None = None
    rows: Tensor | None = None


def segments(task: Task) -> list[Segment]:
    """The segments in order; empty where no sums correspond."""
    values = {str(value.name): value for node in task.student.graph for value in node.outputs}
    others = {str(value.name): value for node in task.teacher.graph for value in node.outputs}
    found: list[Segment] = []
    before: Pair | None = None
    taken: set[str] = set()
    steps = token_marks(task.student)
    done: set[str] = set()
    for pair in find_pairs(task.student, task.teacher):
        stops = [] if before is None else [values[before.name]]
        names = _names_between(values[pair.name], stops)
        here = tuple((name, mark) for name, mark in steps.items() if name in names and name not in done)
        done.update(name for name, _ in here)
        student = part(task.student, [values[pair.name]], stops)
        teacher = part(task.teacher, [others[pair.name]], [] if before is None else [others[before.name]])
        trainable = tuple(sorted(name for name in floats(student) if name in task.names and name not in taken))
        taken.update(trainable)
        found.append(
            Segment(pair, before, task.student, values[pair.name], tuple(stops), teacher, here, trainable, _linear(values[pair.name]))
        )
        before = pair
    return found


def _names_between(end: ir.Value, stops: Sequence[ir.Value]) -> set[str]:
    seen: set[ir.Value] = set()
    stack = [end]
    while stack:
        value = stack.pop()
        if value in seen or value in stops:
            continue
        seen.add(value)
        producer = value.producer()
        if producer is not None:
            stack += [operand for operand in producer.inputs if operand is not None]
    return {str(value.name) for value in seen}


def _linear(end: ir.Value) -> Linear | None:
    """The product with constant weights at the end of a branch that is added to the stream."""
    node = end.producer()
    assert node is not None
    for index, branch in enumerate(node.inputs):
        stream = node.inputs[1 - index]
        last = branch.producer() if branch is not None else None
        bias = None
        if last is not None and last.op_type == "Add":
            constants = [value for value in last.inputs if value is not None and constant_array(value) is not None]
            rest = [value for value in last.inputs if value is not None and constant_array(value) is None]
            if len(constants) == len(rest) == 1 and constants[0].is_initializer() and len(constants[0].shape or ()) == 1:
                bias, last = constants[0], rest[0].producer()
        if last is None or last.op_type != "MatMul" or stream is None:
            continue
        x, weight = last.inputs
        if x is not None and weight is not None and weight.is_initializer() and len(weight.shape or ()) == 2:
            return Linear(str(x.name), str(stream.name), str(weight.name), None if bias is None else str(bias.name))
    return None


def inputs_of(segment: Segment, model: ir.Model, samples: Samples, value: Tensor | None) -> Samples:
    """What a part reads: inputs of the graph, and the sum at its beginning."""
    inputs = {str(one.name): one for one in model.graph.inputs}
    given = {name: tensor for name, tensor in samples.items() if name in inputs}
    if segment.before is not None and segment.before.name in inputs and value is not None:
        given[segment.before.name] = value
    return given


def advanced_rows(segment: Segment, rows: Tensor | None, seen: Samples) -> Tensor | None:
    """The rows after the segment's steps; None: all."""
    if segment.whole_rows:
        return None
    for name, mark in segment.marks:
        rows = kept_rows(rows, seen[name], mark)
    return rows


@dataclass
class Walk:
    """Goes through the segments with the samples of one split.

    Attributes:
        samples: The inputs.
        stream: Where they are.
    """

    samples: Samples
    stream: Stream = field(default_factory=Stream)

    def teacher_after(self, segment: Segment) -> Tensor:
        """The teacher's sum at the segment's end."""
        outputs, _ = Network(segment.teacher).run(inputs_of(segment, segment.teacher, self.samples, self.stream.teacher))
        return outputs[segment.pair.name]

    def student_inputs(self, segment: Segment) -> Samples:
        """What the student's part reads."""
        return inputs_of(segment, segment.student, self.samples, self.stream.student)

    def advance(self, segment: Segment, teacher: Tensor) -> None:
        """Goes to the end of the segment, with the student's weights as they are in its part."""
        names = [name for name, _ in segment.marks]
        outputs, seen = Network(segment.student).run(self.student_inputs(segment), names)
        self.stream = Stream(outputs[segment.pair.name], teacher, advanced_rows(segment, self.stream.rows, seen))
