"""A graph that runs on many samples at once, with gradients, and gives out values from inside."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgekit.contracts import Arrays
from edgekit.errors import UsageError, nearest
from edgekit.graph.interpreter import Interpreter

Samples: TypeAlias = "dict[str, Tensor]"
"""Values of several samples, `[S, ...]` each, the rest being the shape that the graph gives the value."""

_LEAST = 2
"""Constants of fewer elements are numbers such as an attention's scale, and no weights."""


class Network:
    """A graph made ready to run; all samples of a call are computed together.

    Args:
        model: The graph.
        trainable: Names of the initializers that get gradients.
    """

    def __init__(self, model: ir.Model, trainable: Collection[str] = ()) -> None:
        self._interpreter = Interpreter(model, parameters=list(trainable))
        self.input_names = list(self._interpreter.input_names)
        self.output_names = list(self._interpreter.output_names)
        self.parameters: dict[str, torch.nn.Parameter] = self._interpreter.parameters

    def __call__(self, inputs: Mapping[str, Tensor], observe: Sequence[str] = ()) -> tuple[Samples, Samples]:
        """Runs all samples `[S, ...]`; returns the outputs, and the values named in `observe`."""
        names = list(inputs)

        def one(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            seen: dict[str, Tensor] = {}

            def look(name: str, tensor: Tensor) -> None:
                if name in wanted:
                    seen[name] = tensor

            outputs = self._interpreter(dict(zip(names, tensors, strict=True)), look if wanted else None)
            return tuple(outputs[name] for name in self.output_names), tuple(seen[name] for name in observe)

        wanted = frozenset(observe)
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel for processors is not vectorized over samples
            outputs, seen = torch.func.vmap(one, randomness="different")(*(inputs[name] for name in names))
        return dict(zip(self.output_names, outputs, strict=True)), dict(zip(observe, seen, strict=True))

    def run(self, inputs: Mapping[str, Tensor], observe: Sequence[str] = (), chunk: int = 32) -> tuple[Samples, Samples]:
        """As a call, without gradients and in parts that fit into memory."""
        count = len(next(iter(inputs.values())))
        with torch.no_grad():
            parts = [
                self({name: tensor[start : start + chunk] for name, tensor in inputs.items()}, observe) for start in range(0, count, chunk)
            ]
        return _joined([outputs for outputs, _ in parts]), _joined([seen for _, seen in parts])

    def state(self) -> dict[str, Tensor]:
        """A copy of the trainable weights."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Sets the trainable weights."""
        with torch.no_grad():
            for name, tensor in state.items():
                self.parameters[name].copy_(tensor)


def _joined(parts: Sequence[Samples]) -> Samples:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def stack(feeds: Sequence[Arrays], names: Sequence[str]) -> Samples:
    """Batches as samples, `[S, ...]`."""
    return {name: torch.from_numpy(np.stack([feed[name] for feed in feeds])) for name in names}


def floats(model: ir.Model) -> dict[str, ir.Value]:
    """The floating-point weights of the main graph by name; single numbers, and initializers that a caller may override, are none."""
    found = {}
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and not value.is_graph_input() and tensor.size >= _LEAST and value.dtype in (
            ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE,
        ):  # fmt: skip
            found[str(name)] = value
    return found


def chosen(model: ir.Model, patterns: Sequence[str]) -> list[str]:
    """Names of the weights that match one of the patterns (`*norm*`, `blocks.3.*`).

    Raises:
        UsageError: A pattern matches none.
    """
    names = list(floats(model))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(f"no weight is called like '{pattern}'", where="what is trainable", fix=nearest(pattern, names))
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def write(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Puts weights into the graph, in the types that it holds them in."""
    for name, tensor in weights.items():
        value = model.graph.initializers[name]
        assert value.dtype is not None
        value.const_value = ir.Tensor(tensor.detach().numpy().astype(value.dtype.numpy()), name=name)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within the block, torch computes on `count` threads; 0 leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
