"""Random small graphs of the operators that `drop-dead-work` follows, ending in random slices and gathers."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from edgekit.graph.shapes import infer_shapes


class Builder:
    """Adds random operators to a graph; values are known by name with their shapes."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.values: list[tuple[str, tuple[int, ...]]] = []
        self.weights: dict[tuple[int, ...], str] = {}

    def constant(self, array: np.ndarray) -> str:
        """Adds an initializer."""
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, *shape: int) -> str:
        """Adds a float32 weight, or now and then returns one of that shape that another node reads."""
        if shape not in self.weights or self.rng.random() < 0.9:
            self.weights[shape] = self.constant(self.rng.normal(size=shape).astype(np.float32))
        return self.weights[shape]

    def ints(self, *numbers: int) -> str:
        """Adds an int64 vector."""
        return self.constant(np.array(numbers, dtype=np.int64))

    def node(self, op_type: str, inputs: list[str], shape: tuple[int, ...], **attributes: object) -> tuple[str, tuple[int, ...]]:
        """Adds a node of one output of `shape`."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"{op_type}_{len(self.nodes)}", **attributes))
        return name, shape

    def below(self, high: int) -> int:
        """A random number from 0 to `high` − 1."""
        return int(self.rng.integers(high))

    def choice(self, options: list[object]) -> object:
        """One of the options."""
        return options[self.below(len(options))]


def _linear(b: Builder, x: str, s: tuple[int, ...]):
    width = b.below(5) + 1
    x, s = b.node("MatMul", [x, b.weight(s[-1], width)], (*s[:-1], width))
    if b.below(2):
        x, s = b.node("Add", [x, b.weight(width)], s)
    return x, s


def _elementwise(b: Builder, x: str, s: tuple[int, ...]):
    return b.node(str(b.choice(["Relu", "Gelu", "Tanh", "Sigmoid", "Neg", "HardSwish"])), [x], s)


def _with_constant(b: Builder, x: str, s: tuple[int, ...]):
    shape = tuple(size if b.below(2) else 1 for size in s)[b.below(len(s)) :]
    operands = [x, b.weight(*shape)]
    return b.node(str(b.choice(["Add", "Mul", "Sub"])), operands if b.below(2) else operands[::-1], s)


def _with_other(b: Builder, x: str, s: tuple[int, ...]):
    same = [name for name, shape in b.values if shape == s]
    return b.node("Add", [x, str(b.choice(same))], s)


def _norm(b: Builder, x: str, s: tuple[int, ...]):
    if b.below(3) == 0:
        return b.node("Softmax", [x], s, axis=b.below(len(s)))
    axis = b.below(len(s))
    if b.below(2):
        return b.node("LayerNormalization", [x, b.weight(*s[axis:]), b.weight(*s[axis:])], s, axis=axis)
    return b.node("RMSNormalization", [x, b.weight(*s[axis:])], s, axis=axis, epsilon=1e-3)


def _attention(b: Builder, x: str, s: tuple[int, ...]):
    if len(s) != 3:
        return None
    batch, rows, width = s
    heads, size = b.below(2) + 1, b.below(2) + 1
    x, _ = b.node("MatMul", [x, b.weight(width, 3 * heads * size)], (batch, rows, 3 * heads * size))
    x, _ = b.node("Add", [x, b.weight(3 * heads * size)], (batch, rows, 3 * heads * size))
    if b.below(2):
        x, t = b.node("Reshape", [x, b.ints(batch, rows, 3, heads, size)], (batch, rows, 3, heads, size))
        x, t = b.node("Transpose", [x], (3, batch, heads, rows, size), perm=[2, 0, 3, 1, 4])
        parts = []
        for index in range(3):
            if b.below(2):
                parts.append(b.node("Gather", [x, b.constant(np.array(index - 3 * b.below(2)))], t[1:], axis=0)[0])
            else:
                part, _ = b.node("Slice", [x, b.ints(index), b.ints(index + 1), b.ints(0)], (1, *t[1:]))
                parts.append(b.node("Squeeze", [part, b.ints(0)], t[1:])[0])
    else:
        names = [f"v{len(b.nodes)}_{index}" for index in range(3)]
        b.nodes.append(helper.make_node("Split", [x], names, name=f"Split_{len(b.nodes)}", axis=2, num_outputs=3))
        parts = []
        for name in names:
            part, _ = b.node("Reshape", [name, b.ints(batch, rows, heads, size)], (batch, rows, heads, size))
            parts.append(b.node("Transpose", [part], (batch, heads, rows, size), perm=[0, 2, 1, 3])[0])
    if b.below(3) == 0:
        parts.append(b.weight(*[(rows, rows), (1, rows), (heads, rows, rows), (batch, 1, rows, rows)][b.below(4)]))
    x, t = b.node("Attention", parts, (batch, heads, rows, size), is_causal=int(b.below(4) == 0))
    x, t = b.node("Transpose", [x], (batch, rows, heads, size), perm=[0, 2, 1, 3])
    return b.node("Reshape", [x, b.ints(batch, rows, heads * size)], (batch, rows, heads * size))


def _product(b: Builder, x: str, s: tuple[int, ...]):
    if len(s) < 2:
        return None
    others = [(name, shape) for name, shape in b.values if len(shape) == len(s) and shape[:-2] == s[:-2] and shape[-2] == s[-1]]
    if not others:
        return None
    name, shape = others[b.below(len(others))]
    return b.node("MatMul", [x, name], (*s[:-1], shape[-1]))


def _concat(b: Builder, x: str, s: tuple[int, ...]):
    axis = b.below(len(s))
    fitting = [
        (name, shape)
        for name, shape in b.values
        if len(shape) == len(s) and all(p == q for a, (p, q) in enumerate(zip(shape, s, strict=True)) if a != axis)
    ]
    name, shape = fitting[b.below(len(fitting))]
    if b.below(3) == 0:
        shape = (*s[:axis], 2, *s[axis + 1 :])
        name = b.weight(*shape)
    return b.node("Concat", [x, name], (*s[:axis], s[axis] + shape[axis], *s[axis + 1 :]), axis=axis)


def _transpose(b: Builder, x: str, s: tuple[int, ...]):
    order = b.rng.permutation(len(s)).tolist()
    return b.node("Transpose", [x], tuple(s[axis] for axis in order), perm=order)


def _reshape(b: Builder, x: str, s: tuple[int, ...]):
    if b.below(2) and len(s) > 1:
        axis = b.below(len(s) - 1)
        shape = (*s[:axis], s[axis] * s[axis + 1], *s[axis + 2 :])
        if axis == 0 and len(s) > 2 and b.below(2):
            return b.node("Flatten", [x], (s[0] * s[1], math.prod(s[2:])), axis=2)
    else:
        axis = b.below(len(s))
        first = next((d for d in (2, 3) if s[axis] % d == 0), 1)
        shape = (*s[:axis], first, s[axis] // first, *s[axis + 1 :])
        if b.below(3) == 0:
            return b.node("Unsqueeze", [x, b.ints(axis)], (*s[:axis], 1, *s[axis:]))
    return b.node("Reshape", [x, b.ints(*shape)], shape)


def _convolution(b: Builder, x: str, s: tuple[int, ...]):
    if len(s) != 3:
        return None
    groups = int(b.rng.choice([g for g in range(1, s[1] + 1) if s[1] % g == 0]))
    out = groups * (b.below(2) + 1)
    x, s = b.node("Conv", [x, b.weight(out, s[1] // groups, 3), b.weight(out)], (s[0], out, s[2]), group=groups, pads=[1, 1])
    if b.below(2):
        variance = b.constant(b.rng.uniform(0.5, 1, out).astype(np.float32))
        x, s = b.node("BatchNormalization", [x, b.weight(out), b.weight(out), b.weight(out), variance], s)
    return b.node("AveragePool", [x], s, kernel_shape=[3], pads=[1, 1]) if b.below(3) == 0 else (x, s)


def _reduce(b: Builder, x: str, s: tuple[int, ...]):
    axis = b.below(len(s))
    if b.below(2) or len(s) == 1:
        return b.node("ReduceMean", [x, b.ints(axis)], (*s[:axis], 1, *s[axis + 1 :]), keepdims=1)
    return b.node("ReduceMax", [x, b.ints(axis - len(s))], (*s[:axis], *s[axis + 1 :]), keepdims=0)


def _pad(b: Builder, x: str, s: tuple[int, ...]):
    axis = b.below(len(s))
    pads = [0] * (2 * len(s))
    pads[axis] = 1
    return b.node("Pad", [x, b.ints(*pads)], (*s[:axis], s[axis] + 1, *s[axis + 1 :]))


def _expand(b: Builder, x: str, s: tuple[int, ...]):
    shape = (b.below(2) + 1, *(size if size > 1 else b.below(2) + 1 for size in s))
    return b.node("Expand", [x, b.ints(*shape)], shape)


def select(b: Builder, x: str, s: tuple[int, ...]):
    """A Slice, Gather or Split that leaves a part: steps of either sign, places out of order and twice, one place without its axis."""
    axis = b.below(len(s))
    size = s[axis]
    rest = lambda count: (*s[:axis], count, *s[axis + 1 :])  # noqa: E731
    kind = b.below(5)
    if kind == 0:
        start = b.below(size)
        count = len(range(size)[start::2])
        return b.node("Slice", [x, b.ints(start), b.ints(2**62), b.ints(axis), b.ints(2)], rest(count))
    if kind == 1:
        start = b.below(size)
        return b.node("Slice", [x, b.ints(start), b.ints(-(2**62)), b.ints(axis - len(s)), b.ints(-1)], rest(start + 1))
    if kind == 2:
        places = b.rng.integers(-size, size, b.below(3) + 1)
        return b.node("Gather", [x, b.constant(places)], rest(places.size), axis=axis)
    if kind == 3:
        if len(s) > 1 and b.below(2):
            return b.node("Gather", [x, b.constant(np.array(b.below(size)))], (*s[:axis], *s[axis + 1 :]), axis=axis)
        places = b.rng.integers(0, size, (2, 2))
        return b.node("Gather", [x, b.constant(places)], (*s[:axis], 2, 2, *s[axis + 1 :]), axis=axis)
    if size < 2:
        return x, s
    first = b.below(size - 1) + 1
    names = [f"v{len(b.nodes)}_{index}" for index in range(2)]
    sizes = b.ints(first, size - first)
    b.nodes.append(helper.make_node("Split", [x, sizes], names, name=f"Split_{len(b.nodes)}", axis=axis))
    chosen = b.below(2)
    if b.below(2):
        b.values.append((names[1 - chosen], rest((size - first, first)[chosen])))
    return names[chosen], rest((first, size - first)[chosen])


OPERATORS = [
    _linear, _linear, _linear, _elementwise, _with_constant, _with_other, _norm, _attention, _attention, _product, _concat, _transpose,
    _reshape, _convolution, _reduce, _pad, _expand, select,
]  # fmt: skip


def random_model(seed: int) -> ir.Model:
    """A graph of up to a dozen random operators on an input `[B, N, C]`, of which parts are given out."""
    b = Builder(seed)
    shape = (b.below(2) + 1, b.below(4) + 2, b.below(4) + 2)
    b.values.append(("x", shape))
    for _ in range(b.below(9) + 3):
        x, s = b.values[-1 - b.below(min(3, len(b.values)))]
        made = OPERATORS[b.below(len(OPERATORS))](b, x, s)
        if made is not None and len(made[1]) < 6 and math.prod(made[1]) < 400:
            b.values.append(made)
    outputs = []
    for _ in range(b.below(2) + 1):
        x, s = b.values[-1 - b.below(min(2, len(b.values)))]
        made = select(b, x, s) if s else (x, s)
        if made[1] and b.below(2):
            made = _linear(b, *made)
        if b.below(8) == 0 and made[1]:
            made = select(b, *made)
        if made[0] in {"x", *(output.name for output in outputs)}:
            made = b.node("Neg", [made[0]], made[1])
        outputs.append(helper.make_tensor_value_info(made[0], TensorProto.FLOAT, made[1]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    if b.below(4):  # mostly without nodes that are dead from the start
        needed = {output.name for output in outputs}
        for node in reversed(b.nodes):
            if needed & set(node.output):
                needed.update(node.input)
        b.nodes = [node for node in b.nodes if needed & set(node.output)]
    used = {name for node in b.nodes for name in node.input}
    graph = helper.make_graph(b.nodes, "random", inputs, outputs, [c for c in b.initializers if c.name in used])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10))
    infer_shapes(model)
    return model
