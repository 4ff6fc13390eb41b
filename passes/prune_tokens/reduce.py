"""Carries out a schedule: at each step the stream is shortened, and everything after it with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from edgekit.graph.constants import GraphEditor
from edgekit.graph.cost import MODULE_KEY
from edgekit.graph.token_steps import Mark
from edgekit.passes.prune_tokens import merge, select
from edgekit.passes.prune_tokens.blocks import Block, find_blocks
from edgekit.passes.prune_tokens.builder import Builder, shape_of
from edgekit.passes.prune_tokens.ia_red2 import Projection, keep_scores, projection
from edgekit.passes.prune_tokens.resize import Take, check, shrink
from edgekit.passes.prune_tokens.schedule import Step
from edgekit.passes.prune_tokens.scores import KEYS, attention_received, by_head, check_attention, class_attention
from edgekit.passes.prune_tokens.token_axis import Region, follow

CLASS_TOKEN = frozenset({"evit", "ia-red2", "diffrate"})
"""Methods whose scores come from a class token."""
MERGES = frozenset({"tome", "diffrate"})
"""Methods whose tokens stand for several."""
_OWN_SCORES = frozenset({"ia-red2", "random"})
"""Methods that do not read a block's attention."""


@dataclass(frozen=True)
class How:
    """A method with its options.

    Attributes:
        method: Its name.
        prefix: How many tokens at the front always stay.
        fuse: Whether one token is made of those that are dropped.
        proportional: Whether attention counts a merged token as often as it stands for tokens.
        form: How tokens are chosen and moved: "top-k", "scatter" or "rank".
        generator: The source of randomness, for the method "random".
    """

    method: str
    prefix: int
    fuse: bool = False
    proportional: bool = True
    form: str = "top-k"
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    @property
    def merges(self) -> bool:
        """Whether tokens come to stand for several."""
        return self.method in MERGES


def reduce_tokens(
    model: ir.Model, blocks: Sequence[Block], steps: Sequence[Step], how: How, done: Callable[[Block], None] = lambda _: None
) -> int:
    """Shortens the stream at each of the steps; returns at how many it did.

    Args:
        model: The model.
        blocks: Its blocks. A step in a further one is left out.
        steps: The steps. One that nothing but a pick of the first tokens follows is left out: `reparameterize` saves as much.
        how: The method.
        done: Told of each block.

    Raises:
        StandsInTheWayError: Something after the first step does not allow it; the graph is unchanged then.
    """
    editor = GraphEditor(model)
    steps = [step for step in steps if step.block < len(blocks) and (step.before or worth_it(editor.graph, blocks[step.block]))]
    if not steps:
        return 0
    if how.method not in _OWN_SCORES:
        for step in steps:
            check_attention(blocks[step.block].attention)
    starts = _starts(blocks, steps) if how.method == "ia-red2" else {}
    attentions = [block.attention for block in blocks]
    first = blocks[steps[0].block]
    check(follow(editor.graph, _point(first, steps[0])), can_take=not how.merges and not how.fuse)
    sizes: ir.Value | None = None
    for step, following in zip(steps, [*steps[1:], None], strict=True):
        block = _again(editor.graph, attentions[step.block])
        stream = _point(block, step)
        shorter, sizes = _reduce(editor, block, stream, step, how, sizes, starts)
        if sizes is not None and how.proportional:
            end = len(attentions) if following is None else following.block
            ahead = set(attentions[: end + 1]) if following is not None else None
            _weigh(editor, [node for node in follow(editor.graph, shorter).attentions if ahead is None or node in ahead], sizes)
        if sizes is not None and following is None:
            _weigh_pools(editor, follow(editor.graph, shorter), sizes)
        done(block)
    return len(steps)


def _again(graph: ir.Graph, attention: ir.Node) -> Block:
    """The block of an attention, whose values may be others now."""
    return next(block for block in find_blocks(graph) if block.attention is attention)


def worth_it(graph: ir.Graph, block: Block) -> bool:
    """Whether more than a pick of the first tokens is computed of what a block's attention gives."""
    region = follow(graph, block.residual)
    return bool(region.attentions or region.pools or region.softmaxes)


def _point(block: Block, step: Step) -> ir.Value:
    return block.stream if step.before else block.residual


def _starts(blocks: Sequence[Block], steps: Sequence[Step]) -> dict[int, Projection]:
    """For each step the projections that its scorer starts from: those of the block before it, of the first block its own."""
    starts = {}
    for step in steps:
        source = blocks[max(step.block - 1, 0)]
        starts[step.block] = projection(source.attention, source.stream)
    return starts


def _reduce(
    editor: GraphEditor, block: Block, stream: ir.Value, step: Step, how: How, sizes: ir.Value | None, starts: Mapping[int, Projection]
) -> tuple[ir.Value, ir.Value | None]:
    """One step; returns the shorter stream and the sizes of its tokens, None where each stands for itself."""
    region = follow(editor.graph, stream)
    before = set(editor.graph)
    readers = {node for node, _ in stream.uses()}
    first = next(node for node in editor.graph if node in readers)
    module = block.add.metadata_props.get(MODULE_KEY, "")
    mark = Mark(step.block, region.count, how.prefix, "")
    build = Builder(editor, first, f"{block.name}/prune_tokens", module, mark)
    shorter, take, after = _shortened(build, block, stream, step, how, sizes, starts)
    check(region, can_take=take is not None)
    shrink(editor, region, stream, shorter, shape_of(shorter)[1], set(editor.graph) - before, take or _nothing)
    return shorter, after


def _nothing(build: Builder, value: ir.Value, axis: int) -> ir.Value:
    raise AssertionError("there is nothing to take")  # `check` has seen to that


def _shortened(
    build: Builder, block: Block, stream: ir.Value, step: Step, how: How, sizes: ir.Value | None, starts: Mapping[int, Projection]
) -> tuple[ir.Value, Take | None, ir.Value | None]:
    """The shorter stream, how what else has an entry for each token is reduced (None: it cannot be), and the sizes."""
    if how.method == "tome":
        metric = build.reduce("ReduceMean", by_head(build, block.attention, KEYS), 1)
        pairs = step.keep - step.targets
        merged = merge.bipartite(build, stream, metric, sizes or merge.ones(build, stream), pairs, how.prefix, how.form)
        return merged.tokens, None, merged.sizes
    if how.method == "diffrate":
        scores = class_attention(build, block.attention, how.prefix)
        before = sizes or merge.ones(build, stream)
        merged = merge.prune_and_merge(build, stream, scores, before, step.keep, step.targets, how.prefix)
        return merged.tokens, None, merged.sizes
    if how.method == "random":
        places = np.sort(how.generator.choice(shape_of(stream)[1] - how.prefix, step.keep, replace=False))
        selected = select.keep_fixed(build, stream, places, how.prefix)
    else:
        if how.method == "ia-red2":
            scores = keep_scores(build, stream, starts[step.block], how.prefix)
        elif how.method == "evit":
            scores = class_attention(build, block.attention, how.prefix)
        else:
            scores = attention_received(build, block.attention, how.prefix)
        selected = select.keep_highest(build, stream, scores, step.keep, how.prefix, fuse=how.fuse, form=how.form)
    indices: list[ir.Value] = []

    def take(inner: Builder, value: ir.Value, axis: int) -> ir.Value:
        if not indices:  # made where the tokens are chosen, and only if they are needed
            indices.append(build.with_prefix(selected.places, how.prefix))
        return inner.take(value, indices[0], axis)

    return selected.tokens, None if how.fuse else take, None


def _weigh(editor: GraphEditor, attentions: Sequence[ir.Node], sizes: ir.Value) -> None:
    for attention in attentions:
        module = attention.metadata_props.get(MODULE_KEY, "")
        merge.add_log_sizes(Builder(editor, attention, f"{attention.name}/prune_tokens", module), attention, sizes)


def _weigh_pools(editor: GraphEditor, region: Region, sizes: ir.Value) -> None:
    """Lets a mean over tokens count each as often as it stands for tokens: Σ size · x / Σ size."""
    for node, along in region.pools:
        value = node.inputs[0]
        assert value is not None
        build = Builder(editor, node, f"{node.name}/prune_tokens", node.metadata_props.get(MODULE_KEY, ""))
        shape = [1] * len(shape_of(value))
        shape[0], shape[along.axis] = shape_of(sizes)[0], region.count - along.start
        own = build.reshape(build.cut(sizes, 1, along.start, region.count), shape)
        share = build.binary("Div", own, build.reduce("ReduceMean", own, along.axis, keepdims=True))
        node.replace_input_with(0, build.binary("Mul", value, share))
