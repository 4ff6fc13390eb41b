"""Which initializers are parameters of the source module, and how that is kept while weights are folded and rewritten.

Tracing marks every initializer that is a parameter of the module. From then on a weight is a parameter because it was one, and not
because of how it looks: masks, tables of indices and zero biases that an exporter invents are none, and a table that constant folding
spreads out over positions is counted by what was trained. Marks are metadata of values and are written into files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable

import onnx_ir as ir

PARAMETER = "edgekit.parameter"
"""Metadata key of an initializer whose elements are parameters; its value is "1"."""
FOLDED_FROM = "edgekit.folded_from"
"""Metadata key of a constant that was computed from parameters: JSON of the name and number of elements of each."""


def tag_parameters(model: ir.Model, names: Iterable[Iterable[str]]) -> int:
    """Marks the initializers of the main graph that are parameters; returns how many were found.

    Args:
        model: The graph of a module.
        names: Per parameter all names that it bears in the module: several where modules share it. Where more than one of them became
            an initializer, the others are marked as made from the first, so that it counts once.
    """
    found = 0
    for aliases in names:
        values = [model.graph.initializers[name] for name in aliases if name in model.graph.initializers]
        for value in values[:1]:
            value.metadata_props[PARAMETER] = "1"
            found += 1
        for value in values[1:]:
            value.metadata_props[FOLDED_FROM] = json.dumps(origins(values[0]))
    return found


def is_marked(value: ir.Value | None) -> bool:
    """True for a parameter and for a constant made from parameters."""
    return value is not None and not value.metadata_props.keys().isdisjoint((PARAMETER, FOLDED_FROM))


def origins(value: ir.Value) -> dict[str, int]:
    """Names and numbers of elements of the parameters that `value` is or was made from; empty for other values."""
    if PARAMETER in value.metadata_props:
        return {value.name or "": value.const_value.size if value.const_value is not None else 0}
    try:
        found = json.loads(value.metadata_props.get(FOLDED_FROM, "{}"))
    except ValueError:  # a file may hold anything
        return {}
    return {str(name): size for name, size in found.items() if isinstance(size, int)} if isinstance(found, dict) else {}


def inherit_as_weight(new: ir.Value, sources: Iterable[ir.Value | None]) -> None:
    """Marks `new`, a weight that a pass computed from `sources`, as a parameter where any of them is marked.

    The elements of the new weight are the parameters of the rewritten network (a branch merged into a convolution, a pruned weight). A
    copy of one marked source in another type or layout has that one's mark instead.
    """
    marked = _marked(sources)
    if len(marked) == 1 and _size(new) == _size(marked[0]):
        _copy(marked[0], new)
    elif marked:
        new.metadata_props[PARAMETER] = "1"


def inherit_by_folding(outputs: Iterable[ir.Value], inputs: Iterable[ir.Value | None], op_type: str) -> None:
    """Marks the constants `outputs` that a node of `op_type` with constant inputs was folded into, once that node is gone.

    1. An output that took over the name and size of a marked input (a weight transposed, reshaped or cast): it has the input's mark.
    2. The parts of a Split, where nothing else reads the input: they have its mark.
    3. Otherwise (a table that a Gather spreads out, a weight times a scale, a copy): the output is made from the parameters of the inputs.
    """
    marked = _marked(inputs)
    if not marked:
        return
    made_from = json.dumps({name: size for value in marked for name, size in origins(value).items()})
    first = marked[0]
    for output in outputs:
        moved = output.name == first.name and _size(output) == _size(first)
        if len(marked) == 1 and (moved or (op_type == "Split" and not first.uses() and not first.is_graph_output())):
            _copy(first, output)
        else:
            output.metadata_props[FOLDED_FROM] = made_from


def names_by_parameter(named: Iterable[tuple[str, object]]) -> list[list[str]]:
    """Groups `module.named_parameters(remove_duplicate=False)` by parameter: the names of each."""
    groups: dict[int, list[str]] = {}
    for name, parameter in named:
        groups.setdefault(id(parameter), []).append(name)
    return list(groups.values())


def count_marked(values: Collection[ir.Value]) -> dict[ir.Value, int]:
    """Returns for each marked one of `values`, the initializers in the order of their use, how many parameters it is the first to hold."""
    counted = {value.name for value in values if PARAMETER in value.metadata_props}
    found: dict[ir.Value, int] = {}
    for value in values:
        if PARAMETER in value.metadata_props:
            found[value] = _size(value)
        elif FOLDED_FROM in value.metadata_props:
            new = {name: size for name, size in origins(value).items() if name not in counted}
            counted.update(new)
            found[value] = sum(new.values())
    return found


def _marked(values: Iterable[ir.Value | None]) -> list[ir.Value]:
    return list(dict.fromkeys(value for value in values if value is not None and is_marked(value)))


def _size(value: ir.Value) -> int:
    return value.const_value.size if value.const_value is not None else 0


def _copy(source: ir.Value, to: ir.Value) -> None:
    for key in (PARAMETER, FOLDED_FROM):
        if key in source.metadata_props:
            to.metadata_props[key] = source.metadata_props[key]
