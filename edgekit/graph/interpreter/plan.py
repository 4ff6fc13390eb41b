"""A graph made ready to run: for each node the function, its attributes as Python values, and which values are used for the last time.

Everything that can be refused without data is refused here: unknown operators, unknown attributes, opsets newer than the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
from torch import Tensor

from edgekit.errors import SourceError, UnsupportedOpError
from edgekit.graph.interpreter import registry
from edgekit.graph.interpreter.registry import Call, Function
from edgekit.graph.interpreter.straight_through import round_to_float16
from edgekit.graph.interpreter.values import NotSupportedError, Precision, Value, from_array

_FIX = "run this model in ONNX Runtime, or rewrite the node by operators of the table in docs/interpreter.md"


@dataclass(slots=True)
class Step:
    """One node.

    Attributes:
        function: What computes it (see `registry.Operator`).
        raw: Whether the function takes and gives values as they are.
        inputs: Per input the value, None for one that is absent.
        outputs: Per output the value, None for one without a name.
        names: Per output the name under which hooks know it.
        attributes: Keyword arguments of the function.
        bodies: Of these, the ones that are graphs.
        release: Values that nothing needs after this step.
        version: The opset that the node belongs to.
    """

    node: ir.Node
    function: Function
    raw: bool
    inputs: tuple[ir.Value | None, ...]
    outputs: tuple[ir.Value | None, ...]
    names: tuple[str, ...]
    attributes: dict[str, Any]
    bodies: dict[str, Plan]
    version: int
    release: tuple[ir.Value, ...] = ()

    @property
    def wanted(self) -> int:
        """How many outputs the function must give at least: up to the last that has a name."""
        return max((index + 1 for index, value in enumerate(self.outputs) if value is not None), default=0)

    def describe(self) -> str:
        """The operator as errors name it."""
        return describe(self.node, self.version)


@dataclass(slots=True)
class Plan:
    """One graph, body or function.

    Attributes:
        inputs: Formal inputs.
        outputs: What it gives.
        names: Per input the name under which hooks know it.
        steps: The nodes in order.
        constants: Initializers, and the results of Constant nodes.
        constant_names: Per constant the name under which hooks know it.
        parameters: Those of the constants that are parameters.
        captures: Values of the enclosing graphs that it, or a graph inside, uses.
    """

    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    names: tuple[str, ...]
    steps: list[Step] = field(default_factory=list)
    constants: dict[ir.Value, Value] = field(default_factory=dict)
    constant_names: dict[ir.Value, str] = field(default_factory=dict)
    parameters: tuple[ir.Value, ...] = ()
    captures: tuple[ir.Value, ...] = ()

    def value_names(self) -> set[str]:
        """The names of all values, those of bodies and functions included."""
        names = {*self.names, *self.constant_names.values()}
        for step in self.steps:
            names.update(step.names)
            for body in step.bodies.values():
                names |= body.value_names()
        return names - {""}


def describe(node: ir.Node, version: int) -> str:
    """`operator Softmax of opset 13`, with the domain if it is not the standard one."""
    domain = _domain(node.domain)
    return f"operator {domain + '::' if domain else ''}{node.op_type} of opset {version}"


def place(node: ir.Node) -> str:
    """The node as errors name it."""
    return f"node '{node.name}'" if node.name else f"the node that gives '{', '.join(value.name or '' for value in node.outputs)}'"


def _domain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


class Planner:
    """Makes plans of the graphs of one model."""

    def __init__(self, model: ir.Model, precision: Precision) -> None:
        self._functions = model.functions
        self._precision = precision
        self._open: list[ir.OperatorIdentifier] = []

    def graph(self, graph: ir.Graph, opsets: Mapping[str, int], scope: str = "", bound: Mapping[str, ir.Attr] | None = None) -> Plan:
        """Plans a graph or the body of a control-flow operator."""
        plan = self._plan(graph.inputs, graph.outputs, graph, opsets, scope, bound or {})
        for value in graph.initializers.values():
            if value.const_value is None:
                raise SourceError(f"initializer '{value.name}' has no data", where=f"graph '{graph.name}'", fix="export the model again")
            if value not in plan.inputs:
                plan.constant_names[value] = scope + (value.name or "")
            plan.constants[value] = initial(value, self._precision)
        plan.captures = tuple(value for value in plan.captures if value not in plan.constants)
        return plan

    def _function(self, function: ir.Function, node: ir.Node, scope: str, bound: Mapping[str, ir.Attr]) -> Plan:
        identifier = function.identifier()
        if identifier in self._open:
            raise SourceError(f"function '{function.name}' calls itself", where=place(node), fix="export the model without recursion")
        given = {name: attribute for name, attribute in function.attributes.items() if attribute.value is not None}
        for name, attribute in node.attributes.items():
            resolved = bound.get(attribute.ref_attr_name or "") if attribute.is_ref() else attribute
            if resolved is not None:
                given[name] = resolved
        self._open.append(identifier)
        plan = self._plan(function.inputs, function.outputs, function, function.opset_imports, scope, given)
        self._open.pop()
        if plan.captures:
            raise SourceError(f"function '{function.name}' uses '{plan.captures[0].name}', which it does not define", where=place(node))
        return plan

    def _plan(
        self,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        nodes: Iterable[ir.Node],
        opsets: Mapping[str, int],
        scope: str,
        bound: Mapping[str, ir.Attr],
    ) -> Plan:
        versions = {_domain(domain): version for domain, version in opsets.items()}
        plan = Plan(tuple(inputs), tuple(outputs), tuple(scope + (value.name or "") for value in inputs))
        for node in nodes:
            step = self._step(node, versions, scope, bound)
            if step.node.op_type == "Constant" and not _domain(node.domain):
                self._hoist(step, plan)
            else:
                plan.steps.append(step)
        defined = {*inputs, *plan.constants}
        captures: dict[ir.Value, None] = {}
        for step in plan.steps:
            captures.update(dict.fromkeys(value for value in _uses(step) if value not in defined))
            defined.update(value for value in step.outputs if value is not None)
        captures.update(dict.fromkeys(value for value in outputs if value not in defined))
        plan.captures = tuple(captures)
        _release(plan)
        return plan

    def _hoist(self, step: Step, plan: Plan) -> None:
        """Computes a Constant once for all runs."""
        try:
            value = step.function(**step.attributes)
        except NotSupportedError as error:
            raise UnsupportedOpError(f"the interpreter refuses {step.describe()}: {error}", where=place(step.node), fix=_FIX) from error
        for formal, name in zip(step.outputs, step.names, strict=True):
            if formal is not None:
                plan.constants[formal] = round_to_float16(value) if self._rounds(value) else value
                plan.constant_names[formal] = name

    def _rounds(self, value: Value) -> bool:
        return self._precision.rounds and isinstance(value, Tensor) and value.is_floating_point()

    def _step(self, node: ir.Node, versions: Mapping[str, int], scope: str, bound: Mapping[str, ir.Attr]) -> Step:
        domain = _domain(node.domain)
        version = versions.get(domain, 1)
        outputs = tuple(value if value.name else None for value in node.outputs)
        step = Step(
            node,
            _call_body,
            True,
            tuple(node.inputs),
            outputs,
            tuple(scope + value.name if value is not None and value.name else "" for value in outputs),
            {},
            {},
            version,
        )
        function = self._functions.get(node.op_identifier())
        entry = registry.find(domain, node.op_type, version) if function is None or domain else None
        if function is not None and entry is None:
            missing = len(function.inputs) - len(step.inputs)
            step.inputs += (None,) * missing
            step.bodies["body"] = self._function(function, node, f"{scope}{node.name or node.op_type}/", bound)
            return step
        if entry is None:
            raise UnsupportedOpError(f"the interpreter has no {describe(node, version)}", where=place(node), fix=_FIX)
        if entry.refusal or version > registry.NEWEST_OPSET.get(domain, version):
            newest = f"it was written for opsets up to {registry.NEWEST_OPSET.get(domain)}"
            raise UnsupportedOpError(
                f"the interpreter refuses {describe(node, version)}: {entry.refusal or newest}", where=place(node), fix=_FIX
            )
        step.function, step.raw = entry.function, entry.raw
        for attribute in node.attributes.values():
            self._attribute(step, attribute, versions, scope, bound)
        unknown = sorted({*step.attributes, *step.bodies} - entry.attributes)
        if unknown:
            raise UnsupportedOpError(
                f"the interpreter refuses {describe(node, version)}: attribute '{unknown[0]}'", where=place(node), fix=_FIX
            )
        if entry.wants_call:
            step.attributes["call"] = Call(tuple(value is not None for value in outputs), self._precision)
        return step

    def _attribute(self, step: Step, attribute: ir.Attr, versions: Mapping[str, int], scope: str, bound: Mapping[str, ir.Attr]) -> None:
        name = attribute.name
        if attribute.is_ref():
            found = bound.get(attribute.ref_attr_name or "")
            if found is None:  # an optional attribute of the function that the call leaves out
                return
            attribute = found
        kind = attribute.type
        if kind is ir.AttributeType.GRAPH:
            step.bodies[name] = self.graph(attribute.as_graph(), versions, scope, bound)
        elif kind is ir.AttributeType.TENSOR:
            try:
                step.attributes[name] = from_array(attribute.as_tensor().numpy(), self._precision)
            except NotSupportedError as error:
                raise UnsupportedOpError(f"the interpreter refuses {step.describe()}: {error}", where=place(step.node), fix=_FIX) from error
        else:
            step.attributes[name] = attribute.value


def initial(value: ir.Value, precision: Precision) -> Value:
    """The data of an initializer.

    Raises:
        UnsupportedOpError: Its type is none that the interpreter holds.
    """
    assert value.const_value is not None
    try:
        return from_array(value.const_value.numpy(), precision)
    except NotSupportedError as error:
        raise UnsupportedOpError(f"the interpreter refuses {error}", where=f"initializer '{value.name}'", fix=_FIX) from error


def _uses(step: Step) -> list[ir.Value]:
    """The values that a step reads, those that its bodies capture included."""
    return [value for value in step.inputs if value is not None] + [value for body in step.bodies.values() for value in body.captures]


def _release(plan: Plan) -> None:
    """Notes at each step the values that no later one reads, so that memory is that of what is alive."""
    needed = {*plan.outputs, *plan.constants}
    for step in reversed(plan.steps):
        touched = dict.fromkeys([*_uses(step), *(value for value in step.outputs if value is not None)])
        step.release = tuple(value for value in touched if value not in needed)
        needed.update(touched)


def _call_body(*inputs: Value, body: Function) -> tuple[Value, ...]:
    """A call of a model-local function."""
    return tuple(body(*inputs))
