"""Passes and a target with a fault at one place, among places where they do the right thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Arrays, Context, Effect, Executable, Pass, Target
from edgekit.passes.reparameterize.fold_batch_norm import FoldBatchNorm
from edgekit.passes.reparameterize.merge_branches import MergeBranches

Change = Callable[[ir.Model, ir.Node], None]


@dataclass(frozen=True)
class FaultyFold(FoldBatchNorm):
    """Folds batch norms; one at `at` after its attributes were changed, which a correct pass would never do."""

    name: ClassVar[str] = "faulty-fold"
    at: str = ""
    epsilon: float = 0.1

    def apply(self, model: ir.Model, context: Context) -> int:
        for node in model.graph:
            if node.name == self.at and not context.skips(self.at):
                node.attributes["epsilon"] = ir.AttrFloat32("epsilon", self.epsilon)
        return super().apply(model, context)


@dataclass(frozen=True)
class FaultyMerge(MergeBranches):
    """Merges branches; at one place with the padding on one side only."""

    name: ClassVar[str] = "faulty-merge"
    at: str = ""

    def apply(self, model: ir.Model, context: Context) -> int:
        result = next(node.outputs[0] for node in model.graph if node.name == self.at)
        readers = [use.node for use in result.uses()]
        merged = super().apply(model, context)
        if self.at in context.rewrites:
            producer = readers[0].inputs[0]
            assert producer is not None
            node = producer.producer()
            assert node is not None
            node.attributes["pads"] = ir.AttrInt64s("pads", [2, 2, 0, 0])
        return merged


@dataclass(frozen=True)
class Rewrite(Pass):
    """Rewrites every node of some operators into an equal one (constants of its own, under their old names), and one of them wrongly."""

    name: ClassVar[str] = "test-rewrite"
    effect: ClassVar[Effect] = Effect.EXACT
    operators: tuple[str, ...] = ()
    at: tuple[str, ...] = ()
    change: Change = field(default=lambda model, node: None, compare=False)

    def apply(self, model: ir.Model, context: Context) -> int:
        done = 0
        for node in list(model.graph):
            where = node.name or ""
            if node.op_type not in self.operators or context.skips(where):
                continue
            for value in node.inputs:
                if value is not None and value.is_initializer() and value.const_value is not None:
                    value.const_value = ir.Tensor(value.const_value.numpy().copy(), name=value.name)
            node.doc_string = "rewritten"
            if where in self.at:
                self.change(model, node)
            context.applied(where)
            done += 1
        return done


def weight(index: int, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A fault that changes the constant that is operand `index`."""

    def apply(model: ir.Model, node: ir.Node) -> None:
        value = node.inputs[index]
        assert value is not None
        assert value.const_value is not None
        value.const_value = ir.Tensor(change(value.const_value.numpy()).copy(), name=value.name)

    return apply


def attribute(attr: ir.Attr) -> Change:
    """A fault that sets an attribute."""

    def apply(model: ir.Model, node: ir.Node) -> None:
        node.attributes[attr.name] = attr

    return apply


def exchange(first: int, second: int) -> Change:
    """A fault that exchanges two operands."""

    def apply(model: ir.Model, node: ir.Node) -> None:
        one, two = node.inputs[first], node.inputs[second]
        node.replace_input_with(first, two)
        node.replace_input_with(second, one)

    return apply


def drop(index: int) -> Change:
    """A fault that drops the last operand."""

    def apply(model: ir.Model, node: ir.Node) -> None:
        assert len(node.inputs) == index + 1
        node.resize_inputs(index)

    return apply


def operator(op_type: str) -> Change:
    """A fault that makes another operator of a node."""

    def apply(model: ir.Model, node: ir.Node) -> None:
        node.op_type = op_type

    return apply


@dataclass(frozen=True)
class FaultyTarget(Target):
    """ONNX Runtime, whose kernel of one operator is wrong: it computes `becomes` instead, or only once it read its operand in float16."""

    name: ClassVar[str] = "test-faulty"
    precisions: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    operator: str = ""
    becomes: str = ""
    only_half: bool = False

    def lower(self, model: ir.Model, folder: Path) -> None:
        for node in list(model.graph):
            if node.op_type != self.operator or (self.only_half and self.precision == "fp32"):
                continue
            if self.becomes:
                node.op_type = self.becomes
                continue
            value = node.inputs[0]
            assert value is not None
            half = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16.value})
            back = ir.node("Cast", [half.outputs[0]], {"to": ir.DataType.FLOAT.value})
            model.graph.insert_before(node, [half, back])
            node.replace_input_with(0, back.outputs[0])
        ir.save(model, folder / "model.onnx")

    def load(self, folder: Path, threads: int) -> Executable:
        return _Running(folder / "model.onnx", self.precision)


class _Running(Executable):
    def __init__(self, path: Path, precision: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.facts = {"executed_precision": precision}

    def run(self, inputs: Arrays) -> Arrays:
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, self.session.run(names, inputs), strict=True))
