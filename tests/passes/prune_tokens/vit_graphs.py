"""Canonical graphs of vision transformers in many variants, made node by node: much faster than tracing a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from edgekit.graph.shapes import infer_shapes

Weights = dict[str, np.ndarray]

EPSILON = 1e-6
MASKED = -1e4
"""What a float mask adds to the logits of keys that are padding."""


@dataclass(frozen=True)
class Vit:
    """A transformer from `x` `[batch, patches, patch_width]` to logits `[batch, classes]`.

    Attributes:
        depth: Blocks.
        width: C.
        heads: H.
        patches: Tokens that come from the input.
        batch: B.
        classes: Logits.
        patch_width: Channels of a patch.
        hidden: Width of the MLP, in multiples of C.
        prefix: Tokens at the front that are parameters: class, distillation, register tokens.
        given_prefix: Whether they are no parameters but a second input `front` `[B, prefix, C]`.
        pool: What the head reads: `class`, `distilled` (the first two tokens, each with a head of its own, averaged), `mean` of all
            tokens, `mean-patches` of those after the prefix, `both` (the first token and the mean of all, each with a head of its own).
        table: Whether each block adds a position bias `[1, H, N, N]` to its logits.
        rotary: Whether queries and keys are turned by tables `[N, d]`.
        mask: A second input `mask` `[B, N]`, 1 for tokens and 0 for padding, becomes a `bool` or `float` mask `[B, 1, N, N]`; none: "".
        packed: Whether attention takes `[B, N, C]` with numbers of heads as attributes.
        post_norm: Whether norms come after the residual sums, as in BERT.
    """

    depth: int = 4
    width: int = 32
    heads: int = 4
    patches: int = 16
    batch: int = 1
    classes: int = 7
    patch_width: int = 12
    hidden: int = 2
    prefix: int = 1
    given_prefix: bool = False
    pool: str = "class"
    table: bool = False
    rotary: bool = False
    mask: str = ""
    packed: bool = False
    post_norm: bool = False

    @property
    def tokens(self) -> int:
        """N."""
        return self.prefix + self.patches

    @property
    def head_width(self) -> int:
        """d."""
        return self.width // self.heads


def deit(width: int, heads: int) -> Vit:
    """DeiT at 224 pixels with patches of 16: 192, 384 and 768 wide with 3, 6 and 12 heads are tiny, small and base."""
    return Vit(depth=12, width=width, heads=heads, patches=196, classes=1000, patch_width=768, hidden=4)


def shapes_of(vit: Vit) -> dict[str, tuple[int, ...]]:
    """The shape of each weight by name."""
    c, h = vit.width, vit.hidden * vit.width
    shapes: dict[str, tuple[int, ...]] = {"embed.w": (vit.patch_width, c), "embed.b": (c,), "position": (1, vit.tokens, c)}
    if vit.prefix and not vit.given_prefix:
        shapes["prefix"] = (1, vit.prefix, c)
    if vit.rotary:
        shapes |= {"cos": (vit.tokens, vit.head_width), "sin": (vit.tokens, vit.head_width)}
    for k in range(vit.depth):
        shapes |= {f"{k}.norm1.w": (c,), f"{k}.norm1.b": (c,), f"{k}.norm2.w": (c,), f"{k}.norm2.b": (c,)}
        shapes |= {f"{k}.qkv.w": (c, 3 * c), f"{k}.qkv.b": (3 * c,), f"{k}.proj.w": (c, c), f"{k}.proj.b": (c,)}
        shapes |= {f"{k}.fc1.w": (c, h), f"{k}.fc1.b": (h,), f"{k}.fc2.w": (h, c), f"{k}.fc2.b": (c,)}
        if vit.table:
            shapes[f"{k}.table"] = (1, vit.heads, vit.tokens, vit.tokens)
    shapes |= {"norm.w": (c,), "norm.b": (c,)}
    for name in ("head", "head2")[: 2 if vit.pool in ("distilled", "both") else 1]:
        shapes |= {f"{name}.w": (c, vit.classes), f"{name}.b": (vit.classes,)}
    return shapes


def random_weights(vit: Vit, seed: int = 0) -> Weights:
    """Seeded weights, whose attention is neither even nor all on one token."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, shape in shapes_of(vit).items():
        kind = name.rpartition(".")[2]
        if kind == "w" and len(shape) == 1:
            array = rng.normal(1, 0.2, shape)
        elif kind == "w":
            array = rng.normal(0, (1.3 if "qkv" in name else 0.7) / np.sqrt(shape[0]), shape)
        else:
            array = rng.normal(0, 0.3 if kind == "b" else 1, shape)
        made[name] = array.astype(np.float32)
    if vit.rotary:
        angles = np.arange(vit.tokens)[:, None] * np.array([0.7, 0.2])[np.arange(vit.head_width) % 2]
        made |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    return made


def empty_weights(vit: Vit) -> Weights:
    """Weights that are zero and take no memory, for what only depends on shapes."""
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes_of(vit).items()}


def random_feeds(vit: Vit, seed: int = 1) -> dict[str, np.ndarray]:
    """Seeded inputs; of a masked model each sample has padding at its end, of another length."""
    rng = np.random.default_rng(seed)
    feeds = {"x": rng.normal(size=(vit.batch, vit.patches, vit.patch_width)).astype(np.float32)}
    if vit.given_prefix:
        feeds["front"] = rng.normal(size=(vit.batch, vit.prefix, vit.width)).astype(np.float32)
    if vit.mask:
        length = vit.tokens - 1 - np.arange(vit.batch) % max(vit.tokens // 3, 1)
        feeds["mask"] = (np.arange(vit.tokens) < length[:, None]).astype(np.int64)
    return feeds


class Nodes:
    """Adds nodes and constants to a list.

    Attributes:
        nodes: All nodes in order.
        constants: All initializers.
    """

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def constant(self, numbers: np.ndarray | np.float32 | list[int], name: str = "") -> ir.Value:
        """An initializer, of int64 where it is a list."""
        array = np.array(numbers, np.int64) if isinstance(numbers, list) else np.asarray(numbers)
        tensor = ir.Tensor(array, name=name or f"constant{len(self.constants)}")
        value = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.constants.append(value)
        return value

    def __call__(self, op_type: str, *inputs: ir.Value | None, name: str = "", **attributes: int | float | str | Sequence[int]) -> ir.Value:
        """A node of one output."""
        node = ir.node(op_type, inputs, attributes=attributes)
        node.name = name or f"{op_type}_{len(self.nodes)}"
        node.outputs[0].name = node.name
        self.nodes.append(node)
        return node.outputs[0]

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        """The model, its shapes inferred."""
        graph = ir.Graph(inputs, outputs, nodes=self.nodes, initializers=self.constants, opset_imports={"": 23}, name="net")
        model = ir.Model(graph, ir_version=10)
        infer_shapes(model)
        return model


Between = Callable[[Nodes, ir.Value], ir.Value]


def given(name: str, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    """An input of a graph."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def graph(vit: Vit, weights: Mapping[str, np.ndarray] | None = None, between: Between | None = None) -> ir.Model:
    """The graph, as the canonical form has it after tracing: one product for queries, keys and values, cut by Slice.

    Args:
        vit: What it is made of.
        weights: Its weights; None: random ones.
        between: Puts something between blocks 1 and 2: it gets the stream and returns what the next block reads.
    """
    add = Nodes()
    w = {name: add.constant(array, name) for name, array in (weights or random_weights(vit)).items()}
    x = given("x", (vit.batch, vit.patches, vit.patch_width))
    inputs = [x]
    stream = add("Add", add("MatMul", x, w["embed.w"]), w["embed.b"])
    if vit.prefix:
        front = given("front", (vit.batch, vit.prefix, vit.width)) if vit.given_prefix else w["prefix"]
        if vit.given_prefix:
            inputs.append(front)
        elif vit.batch > 1:
            front = add("Expand", front, add.constant([vit.batch, vit.prefix, vit.width]))
        stream = add("Concat", front, stream, axis=1)
    stream = add("Add", stream, w["position"])
    mask = None
    if vit.mask:
        inputs.append(given("mask", (vit.batch, vit.tokens), ir.DataType.INT64))
        mask = _mask(add, vit, inputs[-1])
    for k in range(vit.depth):
        stream = block(add, vit, w, k, stream, mask)
        if k == 1 and between is not None:
            stream = between(add, stream)
    if not vit.post_norm:
        stream = norm(add, stream, w, "norm")
    logits = head(add, vit, w, stream)
    logits.name = "logits"
    return add.model(inputs, [logits])


def _mask(add: Nodes, vit: Vit, mask: ir.Value) -> ir.Value:
    shape = add.constant([vit.batch, 1, 1, vit.tokens])
    if vit.mask == "bool":
        made = add("Reshape", add("Cast", mask, to=int(ir.DataType.BOOL)), shape)
    else:
        missing = add("Sub", add.constant(np.float32(1)), add("Cast", mask, to=int(ir.DataType.FLOAT)))
        made = add("Reshape", add("Mul", missing, add.constant(np.float32(MASKED))), shape)
    return add("Expand", made, add.constant([vit.batch, 1, vit.tokens, vit.tokens]))


def norm(add: Nodes, x: ir.Value, w: Mapping[str, ir.Value], name: str) -> ir.Value:
    return add("LayerNormalization", x, w[f"{name}.w"], w[f"{name}.b"], axis=-1, epsilon=EPSILON)


def linear(add: Nodes, x: ir.Value, w: Mapping[str, ir.Value], name: str) -> ir.Value:
    return add("Add", add("MatMul", x, w[f"{name}.w"]), w[f"{name}.b"])


def block(add: Nodes, vit: Vit, w: Mapping[str, ir.Value], k: int, x: ir.Value, mask: ir.Value | None) -> ir.Value:
    mixed = attention(add, vit, w, k, x if vit.post_norm else norm(add, x, w, f"{k}.norm1"), mask)
    x = add("Add", x, linear(add, mixed, w, f"{k}.proj"), name=f"block{k}/sum")
    if vit.post_norm:
        x = norm(add, x, w, f"{k}.norm1")
    inner = x if vit.post_norm else norm(add, x, w, f"{k}.norm2")
    x = add("Add", x, linear(add, add("Gelu", linear(add, inner, w, f"{k}.fc1")), w, f"{k}.fc2"))
    return norm(add, x, w, f"{k}.norm2") if vit.post_norm else x


def attention(add: Nodes, vit: Vit, w: Mapping[str, ir.Value], k: int, x: ir.Value, mask: ir.Value | None) -> ir.Value:
    batch, tokens, heads, width = vit.batch, vit.tokens, vit.heads, vit.width
    qkv = linear(add, x, w, f"{k}.qkv")
    if vit.packed:
        parts = [add("Slice", qkv, *map(add.constant, ([n * width], [(n + 1) * width], [2], [1]))) for n in range(3)]
        return add("Attention", *parts, *_masks(add, vit, w, k, mask), name=f"block{k}/attention", q_num_heads=heads, kv_num_heads=heads)
    split = add("Reshape", qkv, add.constant([batch, tokens, 3, heads, width // heads]))
    split = add("Transpose", split, perm=[2, 0, 3, 1, 4])
    parts = []
    for n in range(3):
        part = add("Slice", split, *map(add.constant, ([n], [n + 1], [0], [1])))
        part = add("Reshape", part, add.constant([batch, heads, tokens, width // heads]))
        parts.append(_turned(add, vit, w, part) if vit.rotary and n < 2 else part)
    mixed = add("Attention", *parts, *_masks(add, vit, w, k, mask), name=f"block{k}/attention")
    return add("Reshape", add("Transpose", mixed, perm=[0, 2, 1, 3]), add.constant([batch, tokens, width]))


def _masks(add: Nodes, vit: Vit, w: Mapping[str, ir.Value], k: int, mask: ir.Value | None) -> list[ir.Value]:
    if not vit.table:
        return [] if mask is None else [mask]
    table = w[f"{k}.table"]
    if mask is None:
        return [table]
    return [add("Where", mask, table, add.constant(np.float32(MASKED))) if vit.mask == "bool" else add("Add", mask, table)]


def _turned(add: Nodes, vit: Vit, w: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
    """Rotary embedding of `[B, H, N, d]` in parts: x · cos + (−second half, first half) · sin."""
    half = vit.head_width // 2
    first = add("Slice", x, *map(add.constant, ([0], [half], [3], [1])))
    second = add("Slice", x, *map(add.constant, ([half], [2 * half], [3], [1])))
    turned = add("Concat", add("Neg", second), first, axis=-1)
    return add("Add", add("Mul", x, w["cos"]), add("Mul", turned, w["sin"]))


def head(add: Nodes, vit: Vit, w: Mapping[str, ir.Value], x: ir.Value) -> ir.Value:
    if vit.pool.startswith("mean"):
        if vit.pool == "mean-patches" and vit.prefix:
            x = add("Slice", x, *map(add.constant, ([vit.prefix], [vit.tokens], [1], [1])))
        return linear(add, add("ReduceMean", x, add.constant([1]), keepdims=0), w, "head")
    first = linear(add, add("Gather", x, add.constant(np.array(0)), axis=1), w, "head")
    if vit.pool == "class":
        return first
    if vit.pool == "distilled":
        other = add("Gather", x, add.constant(np.array(1)), axis=1)
    else:
        other = add("ReduceMean", x, add.constant([1]), keepdims=0)
    second = linear(add, other, w, "head2")
    return add("Mul", add("Add", first, second), add.constant(np.float32(0.5)))
