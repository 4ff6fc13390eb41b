"""Reading constants as arrays, and editing a graph so that names, metadata and shared weights survive.

Exporters let several nodes read one initializer, and a caller may override an initializer that is a graph input too. A pass that keeps
to these helpers never changes a weight that somebody else reads, and never renames a graph output.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.parameters import inherit_as_weight


def constant_array(value: ir.Value | None) -> np.ndarray | None:
    """Returns the array of an initializer or a Constant node, or None when the value is not known before the model runs.

    An initializer that is a graph input is not constant: whoever runs the model may override it. The array is the stored one: copy it
    before writing.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def is_used_once(value: ir.Value) -> bool:
    """True when exactly one input of one node reads `value`, and the graph does not give it out."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def common_module(nodes: Iterable[ir.Node]) -> str:
    """Returns the deepest PyTorch module path that contains all `nodes`, `""` when there is none or a node does not tell."""
    paths = [node.metadata_props.get(MODULE_KEY, "").split(".") for node in nodes]
    shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))
    return ".".join(parts[0] for parts in shared)


class GraphEditor:
    """Edits the main graph of a model and hands out names that are unique in the whole model.

    Args:
        model: The model; nothing else may add values to it while the editor is in use.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph
        self._names: set[str | None] = set()
        for graph in model.graphs():
            self._names.update(value.name for value in (*graph.inputs, *graph.initializers.values()))
            for node in graph:
                self._names.add(node.name)
                self._names.update(output.name for output in node.outputs)

    def unique_name(self, wanted: str) -> str:
        """Returns `wanted`, or `wanted_1`, `wanted_2`, … when a node or value bears that name already, and reserves it."""
        name, number = wanted, 0
        while name in self._names:
            number += 1
            name = f"{wanted}_{number}"
        self._names.add(name)
        return name

    def add_initializer(self, name: str, array: np.ndarray, *, made_from: Iterable[ir.Value | None] = ()) -> ir.Value:
        """Adds an initializer of the array's dtype and shape, called `name` or like it, and returns its value.

        A weight that was computed from others names them as `made_from`: it is a parameter where one of them is (`graph/parameters.py`).
        """
        tensor = ir.Tensor(array, name=self.unique_name(name))
        value = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        inherit_as_weight(value, made_from)
        self.graph.register_initializer(value)
        return value

    def set_constant(self, node: ir.Node, index: int, array: np.ndarray, name: str = "") -> None:
        """Makes input `index` of `node` the constant `array`, for this node alone.

        The name of the constant that it replaces passes over to the new one when no one else reads it (so that a weight still leads back to
        its PyTorch parameter). Otherwise, and for an input that was absent, the new one is called `name` or like it. It is a parameter
        where the old one was; where there was none (a bias), where another constant of the node is.
        """
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        heir = old is not None and old.is_initializer() and is_used_once(old) and old.name is not None
        new_name = name or (old.name if old is not None and old.name else f"{node.name}.constant")
        value = self.add_initializer(new_name, array, made_from=node.inputs if old is None else [old])
        node.replace_input_with(index, value)
        if old is not None:
            inherited = old.name
            self.drop_unused([old])
            if heir and inherited not in self.graph.initializers:
                value.name = inherited

    def replace_value(self, old: ir.Value, new: ir.Value) -> None:
        """Lets everything that reads `old` read `new`; where `old` is a graph output, `new` becomes it under the same name.

        `new` must be the output of a node. It takes the type and shape of `old` where it has none.
        """
        if new.type is None and old.dtype is not None:
            new.type = ir.TensorType(old.dtype)
        if new.shape is None and old.shape is not None:
            new.shape = old.shape.copy()
        if not old.is_graph_output():
            old.replace_all_uses_with(new)
            return
        name = old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        old.name = self.unique_name(f"{name}_replaced")
        new.name = name

    def remove(self, nodes: Sequence[ir.Node]) -> None:
        """Removes nodes whose outputs nothing outside `nodes` reads, and the initializers that only they read."""
        inputs = [value for node in nodes for value in node.inputs if value is not None]
        self.graph.remove(nodes, safe=True)
        self.drop_unused(inputs)

    def drop_unused(self, values: Iterable[ir.Value]) -> None:
        """Removes those of `values` that are initializers which nothing reads any more; a mapped weight file is closed."""
        for value in values:
            if not value.is_initializer() or value.uses() or value.is_graph_output() or value.is_graph_input() or value.graph is None:
                continue
            del value.graph.initializers[value.name or ""]
            if isinstance(value.const_value, ir.ExternalTensor):
                with contextlib.suppress(BufferError):  # somebody still looks into the mapped file
                    value.const_value.release()
