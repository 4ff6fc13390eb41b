"""Checks a graph that came from outside before anything executes it.

Files are written by anybody. The C++ libraries behind ONNX assume a valid graph and some crash on others, so this check is pure Python over
the IR and the operator schemas; what it accepts names only values that exist, operators that ONNX defines, and finite weights.
"""

from __future__ import annotations

import difflib
import functools
import graphlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from edgekit.errors import EdgekitError, SourceError, UnsupportedOpError
from edgekit.graph.check_weights import check_tensor

_MAX_INLINED_NODES = 1_000_000
"""A graph whose functions unfold to more nodes is refused: nested calls grow exponentially."""

_DEPRECATED_IN_NAME = frozenset({"GroupNormalization"})
"""Opset 21 changed its inputs and marked the form of opset 18 as deprecated; that one is convertible all the same."""
_REEXPORT = "export the model again with a current exporter"


def check_model(model: ir.Model, where: str) -> list[str]:
    """Refuses graphs that are not well-formed ONNX; returns warnings about what is odd but harmless.

    Args:
        model: The graph as it was deserialized; only read.
        where: The file or source that it came from, for messages.

    Raises:
        UnsupportedOpError: An operator that neither ONNX nor a function of the model defines, or a domain that is not imported.
        SourceError: Anything else that is wrong: undefined or duplicate values, cycles, recursion, inputs or attributes that do not fit the
            operator, weights that are not finite or whose data does not fit their shape.
    """
    checker = _Checker(model, where)
    try:
        checker.check()
    except EdgekitError:
        raise
    except Exception as error:  # lazily deserialized parts (dtypes, attributes) can fail at any access
        raise SourceError(f"the model is malformed: {type(error).__name__}: {error}", where=where, fix=_REEXPORT) from error
    return checker.warnings


def describe_node(node: ir.Node) -> str:
    """Returns `node 'name' (Conv)`, or `node with output 'y' (Conv)` where it has no name."""
    if node.name:
        name = f"'{node.name}'"
    else:
        name = f"with output '{node.outputs[0].name}'" if node.outputs and node.outputs[0].name else "without name"
    operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
    return f"node {name} ({operator})"


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yields the graphs in the attributes of `node` (branches of If, bodies of Loop and Scan)."""
    for attr in node.attributes.values():
        if attr.type == ir.AttributeType.GRAPH and not attr.is_ref():
            yield attr.as_graph()
        elif attr.type == ir.AttributeType.GRAPHS and not attr.is_ref():
            yield from attr.as_graphs()


def check_node(node: ir.Node, opsets: dict[str, int], functions: set[tuple[str, str, str]], where: str) -> None:
    """Holds one node against the schema of its operator.

    Args:
        node: The node.
        opsets: The opset imports in force.
        functions: The identifiers of the functions that the model carries.
        where: The file or source, for messages.

    Raises:
        UnsupportedOpError: No schema and no function for the operator.
        SourceError: Inputs, outputs or attributes that do not fit the schema.
    """
    if node.op_identifier() in functions:
        return
    place = f"{where}, {describe_node(node)}"
    schema = _schema(node, opsets, place)
    _check_arity(node, schema, place)
    _check_attributes(node, schema, place)
    if node.op_type == "Constant" and node.domain == "" and len(node.attributes) != 1:
        raise SourceError("a Constant has one value attribute", where=place, fix=_REEXPORT)


def _imported(opsets: dict[str, int], domain: str) -> int | None:
    version = opsets.get(domain)
    return opsets.get("ai.onnx") if version is None and domain == "" else version


@dataclass(frozen=True)
class _Signature:
    """What the checks need of an operator's schema; reading `onnx.defs` for every node is slow."""

    since_version: int
    deprecated: bool
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    required_inputs: tuple[tuple[int, str], ...]
    required_outputs: tuple[tuple[int, str], ...]
    attribute_types: dict[str, str]
    required_attributes: tuple[str, ...]


@functools.lru_cache(maxsize=4096)
def _signature(op_type: str, domain: str, version: int) -> _Signature | None:
    try:
        schema = onnx.defs.get_schema(op_type, version, domain)
    except Exception:  # onnx.defs.SchemaError is not exported
        return None
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    attributes = schema.attributes
    return _Signature(
        schema.since_version,
        schema.deprecated,
        (schema.min_input, schema.max_input),
        (schema.min_output, schema.max_output),
        tuple((index, formal.name) for index, formal in enumerate(schema.inputs) if formal.option == single),
        tuple((index, formal.name) for index, formal in enumerate(schema.outputs) if formal.option == single),
        {name: attribute.type.name for name, attribute in attributes.items()},
        tuple(name for name, attribute in attributes.items() if attribute.required),
    )


def _schema(node: ir.Node, opsets: dict[str, int], place: str) -> _Signature:
    domain, version = node.domain, _imported(opsets, node.domain)
    if version is None:
        raise UnsupportedOpError(
            f"operator '{node.op_type}' is of domain '{domain or 'ai.onnx'}', which the model does not import",
            where=place,
            fix=f"add an opset import of domain '{domain or 'ai.onnx'}', or {_REEXPORT}",
        )
    signature = _signature(node.op_type, domain, version)
    if signature is None:
        raise UnsupportedOpError(
            f"unknown operator '{node.op_type}' of domain '{domain or 'ai.onnx'}' at opset {version}",
            where=place,
            fix=_nearest_operator(node.op_type, domain) + "carry custom operators as ONNX functions, or export without them",
        )
    if signature.deprecated and node.op_type not in _DEPRECATED_IN_NAME:
        raise UnsupportedOpError(
            f"operator '{node.op_type}' is deprecated since opset {signature.since_version}; the model imports opset {version}",
            where=place,
            fix=_REEXPORT,
        )
    return signature


def _nearest_operator(op_type: str, domain: str) -> str:
    """Returns the start of a hint: the opset from which on ONNX has the operator, or the name that comes nearest."""
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain in (domain, "")}
    if op_type in known and domain == "":
        first = min(
            schema.since_version for schema in onnx.defs.get_all_schemas_with_history() if (schema.name, schema.domain) == (op_type, "")
        )
        return f"ONNX has '{op_type}' from opset {first} on: correct the opset import; otherwise "
    close = difflib.get_close_matches(op_type, sorted(known), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'? otherwise " if close else ""


def _check_arity(node: ir.Node, signature: _Signature, place: str) -> None:
    for kind, count, (least, most) in (("inputs", len(node.inputs), signature.inputs), ("outputs", len(node.outputs), signature.outputs)):
        if not least <= count <= most:
            bounds = str(least) if least == most else f"{least} to {most}" if most < 2**30 else f"at least {least}"
            raise SourceError(f"'{node.op_type}' takes {bounds} {kind}, the node has {count}", where=place, fix=_REEXPORT)
    for index, name in signature.required_inputs:
        if index >= len(node.inputs) or node.inputs[index] is None:
            raise SourceError(f"required input '{name}' of '{node.op_type}' is missing", where=place, fix=_REEXPORT)
    for index, name in signature.required_outputs:
        if index >= len(node.outputs) or not node.outputs[index].name:
            raise SourceError(f"required output '{name}' of '{node.op_type}' has no name", where=place, fix=_REEXPORT)


def _check_attributes(node: ir.Node, signature: _Signature, place: str) -> None:
    types = signature.attribute_types
    for name, attr in node.attributes.items():
        if name not in types:
            if name.startswith("__"):  # runtimes keep private notes there
                continue
            close = difflib.get_close_matches(name, sorted(types), n=1, cutoff=0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(types)) or 'none'}"
            raise SourceError(f"'{node.op_type}' of opset {signature.since_version} has no attribute '{name}'", where=place, fix=hint)
        if attr.type.name != types[name]:
            raise SourceError(
                f"attribute '{name}' of '{node.op_type}' is of type {attr.type.name}, {types[name]} is required", where=place, fix=_REEXPORT
            )
    for name in signature.required_attributes:
        if name not in node.attributes:
            raise SourceError(f"required attribute '{name}' of '{node.op_type}' is missing", where=place, fix=_REEXPORT)


@dataclass
class _Checker:
    model: ir.Model
    where: str
    warnings: list[str] = field(default_factory=list)

    def check(self) -> None:
        model = self.model
        newest = onnx.defs.onnx_opset_version()
        imported = _imported(model.opset_imports, "")
        if imported is not None and not 1 <= imported <= newest:
            raise SourceError(
                f"the model imports ONNX opset {imported}; the installed onnx {onnx.__version__} knows opsets 1 to {newest}",
                where=self.where,
                fix="pip install -U onnx onnxruntime, or export at a lower opset",
            )
        if model.ir_version is not None and model.ir_version > onnx.IR_VERSION:
            raise SourceError(
                f"the file is of IR version {model.ir_version}; the installed onnx {onnx.__version__} knows up to {onnx.IR_VERSION}",
                where=self.where,
                fix="pip install -U onnx onnxruntime, or save it with a lower ir_version",
            )
        if not model.graph.outputs:
            raise SourceError("the graph has no outputs", where=self.where, fix=_REEXPORT)
        self._check_functions()
        for function in model.functions.values():
            opsets = function.opset_imports or model.opset_imports
            self._check_scope(function.graph, f"{self.where}, function '{function.name}'", opsets, [], set())
        self._check_scope(model.graph, self.where, model.opset_imports, [], set())
        self._note_unused_opsets()
        also_inputs = sum(value.is_graph_input() for value in model.graph.initializers.values())
        if also_inputs:
            self.warnings.append(f"{also_inputs} initializers are graph inputs too; their values are taken as constants")

    def _note_unused_opsets(self) -> None:
        """Notes domains that are imported for no operator: what exporters leave behind, or a sign that operators were lost."""
        model = self.model
        graphs = [model.graph, *(function.graph for function in model.functions.values())]
        used = {node.domain for graph in graphs for node in graph.all_nodes()}
        for domain, version in model.opset_imports.items():
            if domain not in ("", "ai.onnx") and domain not in used:
                self.warnings.append(f"opset {version} of domain '{domain}' is imported and no operator is of it")

    def _check_scope(self, graph: ir.Graph, where: str, opsets: dict[str, int], outer: list[set[ir.Value]], outer_names: set[str]) -> None:
        """Checks one graph; `outer` holds the values that it may capture from the graphs around it."""
        own, names = self._declared(graph, where, outer_names)
        scopes = [*outer, own]
        functions = set(self.model.functions)
        for node in graph:
            for value in node.inputs:
                if value is not None and not any(value in scope for scope in scopes):
                    place = "neither it nor a graph around it produces it" if outer else "nothing produces it"
                    raise SourceError(
                        f"value '{value.name}' is used {'in a subgraph ' if outer else ''}but {place}",
                        where=f"{where}, {describe_node(node)}",
                        fix=_REEXPORT,
                    )
            check_node(node, opsets, functions, where)
            for attr in node.attributes.values():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    check_tensor(attr.as_tensor(), f"attribute '{attr.name}'", f"{where}, {describe_node(node)}")
        for value in graph.outputs:
            if value not in own and not (outer and any(value in scope for scope in outer)):
                raise SourceError(f"graph output '{value.name}' is produced by nothing", where=where, fix=_REEXPORT)
        self._check_order(graph, where)
        for name, value in graph.initializers.items():
            if value.const_value is None:
                raise SourceError(f"initializer '{name}' has no data", where=where, fix=_REEXPORT)
            check_tensor(value.const_value, f"initializer '{name}'", where)
        for node in graph:
            for body in subgraphs(node):
                self._check_scope(body, f"{where}, body of {describe_node(node)}", opsets, scopes, names | outer_names)

    def _declared(self, graph: ir.Graph, where: str, outer_names: set[str]) -> tuple[set[ir.Value], set[str]]:
        own: set[ir.Value] = set()
        names: set[str] = set()
        produced = (output for node in graph for output in node.outputs if output.name)
        for value in (*graph.inputs, *graph.initializers.values(), *produced):
            if value in own and not value.is_initializer():
                raise SourceError(f"graph input '{value.name}' is listed twice", where=where, fix=_REEXPORT)
            if value in own:
                continue
            if not value.name:
                raise SourceError("a graph input has no name", where=where, fix=_REEXPORT)
            if value.name in names:
                raise SourceError(
                    f"two values are named '{value.name}'", where=where, fix="values must be assigned once: rename one of them"
                )
            own.add(value)
            names.add(value.name)
        shadowed = sorted(names & outer_names)
        if shadowed:
            self.warnings.append(f"{where}: value '{shadowed[0]}' hides one of the same name outside")
        return own, names

    def _check_order(self, graph: ir.Graph, where: str) -> None:
        """Refuses cycles; nodes that merely stand in the wrong order are sorted later."""
        needs: dict[ir.Node, set[ir.Node]] = {}
        position = {node: index for index, node in enumerate(graph)}
        sorted_already = True
        for node, index in position.items():
            needs[node] = {producer for producer in _producers(node) if producer in position}
            sorted_already = sorted_already and all(position[producer] < index for producer in needs[node])
        if sorted_already:
            return
        try:
            graphlib.TopologicalSorter(needs).prepare()
        except graphlib.CycleError as error:
            cycle = [describe_node(node) for node in error.args[1][:4]]
            raise SourceError("the graph has a cycle", where=f"{where}, {' → '.join(cycle)}", fix=_REEXPORT) from None
        self.warnings.append(f"{where}: nodes are not in topological order; they are sorted")

    def _check_functions(self) -> None:
        functions = self.model.functions
        calls = {
            name: [node.op_identifier() for node in function.all_nodes() if node.op_identifier() in functions]
            for name, function in functions.items()
        }
        try:
            order = list(graphlib.TopologicalSorter(calls).static_order())
        except graphlib.CycleError as error:
            path = " → ".join(name for _, name, _ in error.args[1])
            raise SourceError("a function calls itself", where=f"{self.where}, function {path}", fix=_REEXPORT) from None
        unfolded: dict[ir.OperatorIdentifier, int] = {}
        for name in order:
            unfolded[name] = sum(1 for _ in functions[name].all_nodes()) + sum(unfolded[callee] for callee in calls[name])
        total = sum(unfolded.get(node.op_identifier(), 1) for node in self.model.graph.all_nodes())
        if total > _MAX_INLINED_NODES:
            raise SourceError(f"the functions of the model unfold to {total:.3g} nodes", where=self.where,
                              fix=f"at most {_MAX_INLINED_NODES:,} are accepted")  # fmt: skip


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    """Yields the nodes that `node` needs, through captures of its subgraphs too."""
    for value in node.inputs:
        if value is not None and (producer := value.producer()) is not None:
            yield producer
    for body in subgraphs(node):
        for inner in body.all_nodes():
            for value in inner.inputs:
                if value is not None and (producer := value.producer()) is not None:
                    yield producer
        for value in body.outputs:
            if (producer := value.producer()) is not None:
                yield producer
