"""Which operators went and came between two graphs, grouped by the module that they belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from edgekit.graph.cost import cost

NO_MODULE = "(graph)"
"""The module of nodes that neither say theirs nor have it in their name."""


@dataclass(frozen=True)
class Totals:
    """What a module, or a whole graph, is made of.

    Attributes:
        operators: Number of nodes by operator; operators of other domains are `DOMAIN.NAME`.
        parameters: Parameters.
        macs: Multiply-accumulates of one inference.
        bytes: Bytes of the constants that its nodes are the first to use.
    """

    operators: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    macs: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Change:
    """A module, or the whole graph, in both graphs.

    Attributes:
        module: Its path.
        before: In the first graph.
        after: In the second.
    """

    module: str
    before: Totals
    after: Totals

    @property
    def operators(self) -> dict[str, tuple[int, int]]:
        """Numbers of each operator in both graphs, sorted by name, only where they differ."""
        names = sorted({*self.before.operators, *self.after.operators})
        counts = {name: (self.before.operators.get(name, 0), self.after.operators.get(name, 0)) for name in names}
        return {name: pair for name, pair in counts.items() if pair[0] != pair[1]}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        numbers = {key: {"a": getattr(self.before, key), "b": getattr(self.after, key)} for key in ("parameters", "macs", "bytes")}
        return {"module": self.module, "operators": {name: {"a": a, "b": b} for name, (a, b) in self.operators.items()}, **numbers}


@dataclass(frozen=True)
class Diff:
    """What differs between two graphs.

    Attributes:
        modules: The modules in which something differs, in the order of the graphs.
        unchanged: Number of modules in which nothing does.
        total: Both graphs as a whole.
    """

    modules: tuple[Change, ...]
    unchanged: int
    total: Change

    @property
    def same(self) -> bool:
        """Whether both graphs have the same operators, parameters, MACs and bytes in every module."""
        return not self.modules

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them."""
        total = self.total.to_dict()
        total.pop("module")
        return {"modules": [change.to_dict() for change in self.modules], "unchanged": self.unchanged, "total": total}


def diff_models(before: ir.Model, after: ir.Model, depth: int | None = None) -> Diff:
    """Compares two graphs by what each module is made of; the graphs are only read.

    Nodes are counted and not paired: a node that was renamed, or rewritten into one of the same operator, is no difference.
    The nodes of subgraphs count like others, the bodies of functions do not.

    Args:
        before: The first graph, with static shapes where MACs are to be counted.
        after: The second.
        depth: How many parts of a module's path count: with 2, `blocks.0.attn.qkv` belongs to `blocks.0`; None: all.
    """
    old, new = _by_module(before, depth), _by_module(after, depth)
    empty = Totals()
    changes = [Change(name, old.get(name, empty), new.get(name, empty)) for name in _merged(list(old), list(new))]
    different = tuple(change for change in changes if change.before != change.after)
    total = Change("", _sum(old.values()), _sum(new.values()))
    return Diff(different, len(changes) - len(different), total)


def module_of(node_name: str, module: str) -> str:
    """The module path of a node: what it was marked with, or else the beginning of its name.

    TorchScript names nodes by nested scopes that repeat their parents (`/blocks/blocks.3/attn/MatMul`): this is `blocks.3.attn`.
    """
    if module:
        return module
    scopes = [scope for scope in node_name.split("/")[:-1] if scope]
    own = [outer for outer, inner in pairwise([*scopes, ""]) if not inner.startswith(f"{outer}.")]
    return ".".join(own) or NO_MODULE


def operator_name(node: ir.Node) -> str:
    """The operator of a node; of another domain than ONNX's own `DOMAIN.NAME`."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"


def _by_module(model: ir.Model, depth: int | None) -> dict[str, Totals]:
    counts: dict[str, Counter[str]] = {}
    sums: dict[str, Counter[str]] = {}
    for node, row in zip(model.graph.all_nodes(), cost(model).per_node, strict=True):
        name = ".".join(module_of(node.name or "", row.module).split(".")[:depth])
        counts.setdefault(name, Counter())[operator_name(node)] += 1
        sums.setdefault(name, Counter()).update(parameters=row.parameters, macs=row.macs, bytes=row.bytes)
    return {name: Totals(dict(sorted(counts[name].items())), **dict(sums[name])) for name in counts}


def _sum(parts: Iterable[Totals]) -> Totals:
    operators: Counter[str] = Counter()
    parameters = macs = size = 0
    for part in parts:
        operators.update(part.operators)
        parameters, macs, size = parameters + part.parameters, macs + part.macs, size + part.bytes
    return Totals(dict(sorted(operators.items())), parameters, macs, size)


def _merged(first: list[str], second: list[str]) -> list[str]:
    """The names of both lists, each once: those of the first in their order, and each new one after the one that precedes it."""
    known = set(first)
    after: dict[str | None, list[str]] = {}
    last: str | None = None
    for name in second:
        if name in known:
            last = name
        else:
            after.setdefault(last, []).append(name)
    return [*after.get(None, []), *(item for name in first for item in (name, *after.get(name, [])))]
