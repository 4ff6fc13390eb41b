"""Branches and loops that only the running model decides: blocks within the program.

What is known before the model runs was written out already (`unroll.py`). MIL's `cond` and `while_loop` want results of one shape and
type, whichever way the program goes; what MIL has no form for is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import constant_array
from edgekit.graph.shapes import static_shape
from edgekit.targets.coreml.lowering.builder import Lowering

_INT32_MAX = np.iinfo(np.int32).max


def _if(b: Lowering, node: ir.Node) -> Any:
    condition = b.known(node, 0)
    names = ("then_branch", "else_branch")
    if condition is not None:
        return tuple(_written(b.nested(), node.attributes[names[0 if condition.any() else 1]].as_graph()))
    shapes: list[list[tuple[int, ...]]] = []
    true, false = (_branch(b, node.attributes[name].as_graph(), shapes) for name in names)
    return b.op("cond", pred=_scalar(b, b.x(node)), _true_fn=true, _false_fn=false)


def _branch(b: Lowering, graph: ir.Graph, shapes: list[list[tuple[int, ...]]]) -> Callable[[], Any]:
    """Writes a branch when coremltools asks for it; `shapes` gathers the shapes of each branch's results."""

    def write() -> Any:
        results = [_opaque(b, item, value.name) for item, value in zip(_written(b.nested(), graph), graph.outputs, strict=True)]
        shapes.append([tuple(result.shape) for result in results])
        for value, *pair in zip(graph.outputs, *shapes, strict=True):
            if len(set(pair)) > 1:
                raise b.refuse(
                    f"an If whose branches give {list(pair[0])} and {list(pair[1])} for one result ('{value.name}')",
                    "let both give the same shape, or decide the condition when the model is exported",
                )
        return tuple(results)

    return write


def _written(inner: Lowering, graph: ir.Graph) -> Iterable[Any]:
    """Writes a graph into the open block; gives its results as they are: variables, arrays, or lists of these."""
    inner.write(inner, graph)
    for value in graph.outputs:
        found = inner.values.get(value)
        found = constant_array(value) if found is None else found
        if found is None:
            raise inner.refuse(f"the result '{value.name}' of a graph inside a node, which nothing computes", "remove it")
        yield found


def _opaque(b: Lowering, item: Any, name: str | None) -> Any:
    """A variable of its own in the open block, in the node's precision.

    coremltools takes a variable that it knows at first for known in every iteration; so this one is not known to it.
    """
    variable = b.op("identity", x=b.nested().var(item, name or ""))
    if 0 in variable.shape:
        raise b.refuse(f"the empty tensor '{name}'", "remove it from the results")
    variable._sym_val = None
    return variable


def _scalar(b: Lowering, variable: Any) -> Any:
    return b.op("squeeze", x=variable) if len(variable.shape) else variable


def _loop(b: Lowering, node: ir.Node) -> Any:
    body = node.attributes["body"].as_graph()
    if len(body.outputs) > len(node.inputs) - 1:
        raise b.refuse(
            "a Loop that gives a result for each iteration, when only the running model knows how many there are",
            "make the number of iterations a constant",
        )
    bound, ends = _bound(b, node), b.has(node, 1)
    if bound is None and not ends:
        raise b.refuse("a Loop that never ends", "give it a number of iterations or a condition")
    initial = [np.int32(0), _scalar(b, b.x(node, 1)) if ends else np.True_, *(b.x(node, index) for index in range(2, len(node.inputs)))]
    entrances = [_entrance(b, value) for value in initial]

    def goes_on(number: Any, going: Any, *state: Any) -> Any:
        return b.op("identity", x=going) if bound is None else b.op("logical_and", x=b.op("less", x=number, y=bound), y=going)

    def iterate(number: Any, going: Any, *state: Any) -> Any:
        inner = b.nested()
        for value, variable in zip(body.inputs, (number, going, *state), strict=True):
            inner.values[value] = _as_declared(b, value, variable)
        following, *results = _written(inner, body)
        following = _opaque(b, following if ends else going, body.outputs[0].name)
        carried = [_opaque(b, item, value.name) for item, value in zip(results, body.outputs[1:], strict=True)]
        for value, before, after in zip(body.outputs[1:], state, carried, strict=True):
            if tuple(before.shape) != tuple(after.shape):
                raise b.refuse(
                    f"a Loop whose value '{value.name}' changes its shape, {list(before.shape)} to {list(after.shape)}",
                    "carry a value of the final shape, or make the number of iterations a constant",
                )
        return (b.op("add", x=number, y=np.int32(1)), _scalar(b, following), *carried)

    results = b.op("while_loop", _cond=goes_on, _body=iterate, loop_vars=tuple(entrances))
    return tuple(results[2:])


def _bound(b: Lowering, node: ir.Node) -> Any:
    """The number of iterations: a variable or a number; None where there is none, or one that no counter of 32 bits reaches."""
    if not b.has(node, 0):
        return None
    array = b.known(node, 0)
    if array is None:
        return _scalar(b, b.x(node))
    number = int(array.reshape(-1)[0])
    return None if number > _INT32_MAX else np.int32(max(0, number))


def _entrance(b: Lowering, item: Any) -> Any:
    """A variable that a loop starts with. coremltools calls it `NAME_x0` inside: nothing else may bear that name."""
    variable = _opaque(b, item, "")
    while f"{variable.name}_x0" in b.names:
        variable = _opaque(b, variable, "")
    b.names.add(f"{variable.name}_x0")
    return variable


def _as_declared(b: Lowering, value: ir.Value, variable: Any) -> Any:
    """What the body gets for one of its inputs: a number may be declared as a vector of one."""
    shape, given = static_shape(value), tuple(variable.shape)
    if shape in (None, given):
        return variable
    if shape == (1,) and given == ():
        return b.op("expand_dims", x=variable, axes=[0])
    raise b.refuse(f"a Loop that carries {list(given)} as '{value.name}', which is declared {shape}", "declare the shape that it has")


def _scan(b: Lowering, node: ir.Node) -> Any:
    raise b.refuse("a Scan over a length that is only known when the model runs", "pin the input shapes")


TABLE = {"If": _if, "Loop": _loop, "Scan": _scan}
