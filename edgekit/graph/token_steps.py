"""What became of each token of an input: read from a graph whose stream of tokens was shortened, as it runs.

A pass that leaves out or merges tokens marks the values that hold the indices; this file follows them from step to step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from edgekit.contracts import Arrays

STEP = "edgekit.tokens"
"""Metadata key of a value that holds indices of tokens, `[B, k]`: JSON of `Mark`."""


@dataclass(frozen=True)
class Mark:
    """What a marked value is.

    Attributes:
        block: Number of the block where it is computed.
        tokens: Number of tokens before that step.
        prefix: How many at the front are no part of the image or text.
        role: `kept`: of the tokens after the prefix, those that stay. `fused`: the same, and one more token is made of the others.
            `absorbed`: into which of the kept ones each of the last of them goes. Of a matching of even and odd positions: `stay`, even
            positions that stay; `sources` and `targets`, which even position goes into which odd one.
    """

    block: int
    tokens: int
    prefix: int
    role: str


def mark(value: ir.Value, what: Mark) -> None:
    """Marks a value."""
    value.metadata_props[STEP] = json.dumps(what.__dict__)


def marks(graph: ir.Graph) -> dict[str, Mark]:
    """All marked values of a graph by name, in its order."""
    values = (value for node in graph for value in node.outputs)
    initializers = (value for value in graph.initializers.values())
    found = [(value, value.metadata_props[STEP]) for value in (*initializers, *values) if STEP in value.metadata_props and value.name]
    return {str(value.name): Mark(**json.loads(text)) for value, text in found}


@dataclass(frozen=True)
class Tokens:
    """The tokens after a step.

    Attributes:
        block: Number of the block of the step, -1 before the first.
        groups: Of each token, the original tokens that are in it; originals are numbered with the prefix.
        dropped: Originals that are in no token, or only in the one that was made of all that were dropped.
    """

    block: int
    groups: tuple[tuple[int, ...], ...]
    dropped: frozenset[int] = field(default_factory=frozenset)


def follow_tokens(model: ir.Model, feed: Arrays, sample: int = 0) -> list[Tokens]:
    """Runs the graph and says what its tokens are made of after each step, for one sample of the batch; empty where nothing is marked."""
    from edgekit.graph.interpreter import run
    from edgekit.graph.interpreter.values import to_array

    found = marks(model.graph)
    seen: dict[str, Any] = {}

    def observe(name: str, tensor: Any) -> None:
        if name in found:
            seen[name] = to_array(tensor)

    run(model, feed, hooks=observe)
    steps: dict[int, dict[str, tuple[Mark, np.ndarray]]] = {}
    for name, what in found.items():
        tensor = model.graph.initializers[name].const_value if name in model.graph.initializers else None
        array = seen.get(name) if tensor is None else tensor.numpy()
        if array is not None:
            steps.setdefault(what.block, {})[what.role] = (what, np.asarray(array)[min(sample, len(array) - 1)].astype(int))
    if not steps:
        return []
    first = next(iter(steps[min(steps)].values()))[0]
    state = Tokens(-1, tuple((index,) for index in range(first.tokens)))
    history = [state]
    for block in sorted(steps):
        state = replace(_after({role: array for role, (_, array) in steps[block].items()}, state, first.prefix), block=block)
        history.append(state)
    return history


def _after(indices: Mapping[str, np.ndarray], before: Tokens, prefix: int) -> Tokens:
    if "stay" in indices:
        return _matched(indices, before, prefix)
    kept = [*range(prefix), *(prefix + (indices["kept"] if "kept" in indices else indices["fused"]))]
    gone = [index for index in range(len(before.groups)) if index not in set(kept)]
    lost = frozenset(original for index in gone for original in before.groups[index])
    groups = [before.groups[index] for index in kept]
    if "fused" in indices and gone:
        groups.append(tuple(sorted(lost)))
    if "absorbed" in indices:
        sources = groups[len(groups) - len(indices["absorbed"]) :]
        groups = groups[: len(groups) - len(sources)]
        for target, group in zip(indices["absorbed"], sources, strict=True):
            groups[prefix + target] = (*groups[prefix + target], *group)
    return Tokens(before.block, tuple(groups), before.dropped | lost)


def _matched(indices: Mapping[str, np.ndarray], before: Tokens, prefix: int) -> Tokens:
    even, odd = list(before.groups[0::2]), list(before.groups[1::2])
    for source, target in zip(indices["sources"], indices["targets"], strict=True):
        odd[target] = (*odd[target], *even[source])
    stay = [even[index] for index in indices["stay"]]
    return Tokens(before.block, tuple(_in_order(stay, odd, prefix)), before.dropped)


def _in_order(stay: Sequence[tuple[int, ...]], odd: Sequence[tuple[int, ...]], prefix: int) -> list[tuple[int, ...]]:
    """The prefix, whose even and odd positions take turns, then the others."""
    if prefix < 2:
        return [*stay, *odd]
    front = [(stay, odd)[k % 2][k // 2] for k in range(prefix)]
    return [*front, *stay[(prefix + 1) // 2 :], *odd[prefix // 2 :]]
