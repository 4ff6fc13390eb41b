"""The pass `mask-aware`: a convolutional network that takes a mask and looks at nothing under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Effect, Pass
from edgekit.errors import UsageError
from edgekit.graph.constants import GraphEditor
from edgekit.graph.fusions.matching import insert
from edgekit.graph.shapes import static_shape
from edgekit.passes.masking.rules import Rule, rule

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class MaskAware(Pass):
    """Give a convolutional network a second input, a keep-mask, and make it independent of the image where the mask is zero.

    Before:  image ─ Conv ─────────────────────────────────────── Relu ─ GlobalAveragePool ─► y
    After:   image ─ Mul(m) ─ fill ─ Conv ─ Mul(m') ───────────── Relu ─ GlobalAveragePool ─ Div(mean(m')) ─► y
             mask ── m = [mask > 0] ──┴─ MaxPool ─ m' ────────────────────────────────────────┘

    `mask` is `[B, 1, H, W]` of the image's type: above zero where the image is known. It has a default of ones, with which the network
    computes what it did before; runtimes let a caller give another. Layer by layer, with x zero wherever m is:

    1. convolution: unknown places next to known ones are filled with the mean of their known neighbours, ring by ring, in (k−1)·dilation
       rounds for a kernel of k (more rounds reach nothing that the kernel sees from a known place); the result is masked by
       m' = MaxPool(m) of the same kernel, stride, pads and dilation. A kernel of 1 needs no filling;
    2. batch norm, sigmoid, a constant that is added: masked again; activations that leave zero alone and products are not touched;
    3. pooling: m' = MaxPool(m) of the same window; the mean over the image is taken over known places;
    4. sum or product of two maps: known where both are; concatenation: known in more than half of them, or with `concat = "union"` in any;
    5. where the map is flattened for a linear layer, the mask ends.

    All or nothing: one layer that has no rule, and the graph stays as it is, with the reason. What is computed of the mask alone is shared
    between layers and does not depend on the image. Fold batch norms first: the result is the same with fewer nodes.

    Source: Balasubramanian & Feizi 2023, "Towards Improved Input Masking for Convolutional Neural Networks", section 3.
    """

    name: ClassVar[str] = "mask-aware"
    effect: ClassVar[Effect] = Effect.EXACT

    image: str = ""
    """Name of the input that is masked; not needed where one input only has the shape of an image."""
    mask: str = "mask"
    """Name of the new input."""
    rounds: int | None = None
    """Rounds of filling before every convolution; none given: as many as its kernel reaches; 0: unknown places stay zero."""
    epsilon: float = 1e-5
    """What is added to the number of known neighbours before it divides."""
    concat: Literal["majority", "union"] = "majority"
    """Where a concatenation of maps is known: in more than half of them, or in any."""

    def __post_init__(self) -> None:
        if self.rounds is not None and self.rounds < 0:
            raise UsageError(f"{self.rounds} rounds of filling", where="option 'rounds'", fix="give 0 or more, or leave it out")
        if not self.epsilon > 0:
            raise UsageError(f"an epsilon of {self.epsilon:g}", where="option 'epsilon'", fix="give a positive number, such as 1e-5")
        if self.concat not in ("majority", "union"):
            raise UsageError(f"unknown rule '{self.concat}'", where="option 'concat'", fix="'majority' or 'union'")

    def apply(self, model: ir.Model, context: Context) -> int:
        """Rewrites the main graph as a whole; returns the number of layers that were given a mask, 0 where it cannot be done.

        Raises:
            UsageError: `image` is no input of the graph.
        """
        taken = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
        if self.mask in taken:
            context.refuse(
                self.mask, "the graph has an input or a weight of this name: it has a mask already, or needs another name for it"
            )
            return 0
        image = self._image(model, context)
        if image is None or not _all_have_rules(model.graph, image, context):
            return 0
        return _Masking(self, model, image).run(context)

    def _image(self, model: ir.Model, context: Context) -> ir.Value | None:
        inputs = [value for value in model.graph.inputs if not value.is_initializer()]
        if self.image:
            found = [value for value in inputs if value.name == self.image]
            if not found:
                names = ", ".join(value.name or "" for value in inputs)
                raise UsageError(f"the graph has no input '{self.image}'", where="option 'image'", fix=f"its inputs are: {names}")
        else:
            found = [value for value in inputs if len(static_shape(value) or ()) == 4 and value.dtype in _FLOATS]
        if len(found) == 1 and len(static_shape(found[0]) or ()) == 4 and found[0].dtype in _FLOATS:
            return found[0]
        names = ", ".join(value.name or "" for value in found)
        why = (
            f"several inputs are images: {names}; say which with the option 'image'"
            if len(found) > 1
            else "no input is an image [B, C, H, W]"
        )
        context.refuse(model.graph.name or "graph", why)
        return None


def _all_have_rules(graph: ir.Graph, image: ir.Value, context: Context) -> bool:
    """Follows the map through the graph without changing it; notes the nodes that stop it."""
    masked, stopped = {image}, False
    for node in graph:
        where = node.name or node.op_type
        if not any(x in masked for x in node.inputs):
            continue
        found = "it was asked to be left alone" if context.skips(where) else rule(node, masked)
        if isinstance(found, str):
            context.refuse(where, f"the network cannot be masked: {found}")
            stopped = True
        elif found not in (Rule.MEAN, Rule.END):
            masked.update(node.outputs)
    return not stopped


class _Masking:
    """The rewriting of one graph, node by node in the order of the graph.

    Args:
        options: The pass.
        model: The model.
        image: The input that is masked.
    """

    def __init__(self, options: MaskAware, model: ir.Model, image: ir.Value) -> None:
        self._options, self._model, self._image = options, model, image
        self._editor = GraphEditor(model)
        self._masks: dict[ir.Value, ir.Value] = {}
        self._filled: dict[tuple[ir.Value, int], ir.Value] = {}
        self._shares: dict[ir.Value, ir.Value] = {}
        self._numbers: dict[float, ir.Value] = {}
        self._pooled: dict[tuple[object, ...], ir.Value] = {}
        assert image.dtype is not None
        self._dtype = image.dtype

    def run(self, context: Context) -> int:
        """Adds the mask and rewrites; returns how many layers that took."""
        nodes = list(self._model.graph)
        if not any(self._image in node.inputs for node in nodes):
            return 0
        self._begin(nodes[0])
        count = 0
        for node in nodes:
            maps = [x for x in node.inputs if x in self._masks]
            if not maps:
                continue
            found = rule(node, self._masks)
            assert isinstance(found, Rule)
            _APPLY[found](self, node)
            count += 1
            context.applied(node.name or node.op_type)
        return count

    def _begin(self, first: ir.Node) -> None:
        """image ─► image · [mask > 0], which all readers read instead."""
        batch, _, *size = static_shape(self._image) or ()
        shape = (batch, 1, *size)
        ones = ir.Tensor(np.ones(shape, self._dtype.numpy()), name=self._options.mask)
        mask = ir.Value(name=self._options.mask, shape=ir.Shape(shape), type=ir.TensorType(self._dtype), const_value=ones)
        self._model.graph.register_initializer(mask)
        self._model.graph.inputs.append(mask)
        known = insert(self._editor, first, [first], "Greater", [mask, self._number(0.0)], shape)
        known.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
        m = insert(self._editor, first, [first], "Cast", [known.outputs[0]], shape, {"to": int(self._dtype)}).outputs[0]
        m.type = ir.TensorType(self._dtype)
        uses = list(self._image.uses())
        x = insert(self._editor, first, [first], "Mul", [self._image, m], self._image.shape).outputs[0]
        for user, index in uses:
            user.replace_input_with(index, x)
        self._masks[x] = m

    def keep(self, node: ir.Node) -> None:
        """The outputs have the mask of the map."""
        m = next(self._masks[x] for x in node.inputs if x in self._masks)
        self._masks.update((output, m) for output in node.outputs)

    def mask(self, node: ir.Node) -> None:
        """The output is multiplied by the mask of the map."""
        m = next(self._masks[x] for x in node.inputs if x in self._masks)
        self._multiply(node, m)

    def conv(self, node: ir.Node) -> None:
        """Fills what the kernel sees, and multiplies by the pooled mask."""
        x = node.inputs[0]
        assert x is not None
        kernel = (static_shape(node.inputs[1]) or ())[2:]
        dilations = tuple(node.attributes.get_ints("dilations", ())) or (1, 1)
        reach = max((size - 1) * step for size, step in zip(kernel, dilations, strict=True))
        rounds = 0 if reach == 0 else reach if self._options.rounds is None else self._options.rounds
        m = self._masks[x]
        if rounds:
            node.replace_input_with(0, self._fill(x, m, rounds, node))
        pooled = self._pool(m, node, kernel, dilations)
        if pooled is m and not rounds and (len(node.inputs) < 3 or node.inputs[2] is None):  # 1×1 without bias: zero stays zero
            self._masks[node.outputs[0]] = m
        else:
            self._multiply(node, pooled)

    def pool(self, node: ir.Node) -> None:
        """Multiplies by the mask, pooled with the same window."""
        x = node.inputs[0]
        assert x is not None
        dilations = tuple(node.attributes.get_ints("dilations", ())) or (1, 1)
        self._multiply(node, self._pool(self._masks[x], node, tuple(node.attributes.get_ints("kernel_shape", ())), dilations))

    def mean(self, node: ir.Node) -> None:
        """mean(x) ─► mean(x) / max(mean(m), tiny); the paper adds 1e-8 instead, with which a mask of ones would not be exact."""
        x, y = node.inputs[0], node.outputs[0]
        assert x is not None
        keep = node.op_type == "GlobalAveragePool" or bool(node.attributes.get_int("keepdims", 1))
        batch = (static_shape(x) or (1,))[0]
        axes = self._editor.add_initializer(f"{node.name}.axes", np.array([2, 3]))
        shape = (batch, 1, 1, 1) if keep else (batch, 1)
        share = insert(self._editor, node, [node], "ReduceMean", [self._masks[x], axes], shape, {"keepdims": int(keep)}).outputs[0]
        share = insert(self._editor, node, [node], "Max", [share, self._number(_TINY)], shape).outputs[0]
        self._after(node, "Div", [y, share])

    def meet(self, node: ir.Node) -> None:
        """Known where all maps are; products are zero elsewhere anyway."""
        masks = list(dict.fromkeys(self._masks[x] for x in node.inputs if x is not None))
        m = masks[0]
        for other in masks[1:]:
            m = self._combined("Mul", m, other, node)
        if len(masks) == 1 or node.op_type == "Mul":
            self._masks[node.outputs[0]] = m
        else:
            self._multiply(node, m)

    def join(self, node: ir.Node) -> None:
        """Known in more than half of the maps, or in any."""
        every = [self._masks[x] for x in node.inputs if x is not None]
        masks = list(dict.fromkeys(every))
        if len(masks) == 1:
            self._masks[node.outputs[0]] = masks[0]
            return
        union = self._options.concat == "union"
        total = every[0]
        for other in every[1:]:
            total = self._combined("Max" if union else "Add", total, other, node)
        if union:
            self._masks[node.outputs[0]] = total
            return
        more = insert(self._editor, node, [node], "Greater", [total, self._number(len(every) / 2)], total.shape)
        more.outputs[0].type = ir.TensorType(ir.DataType.BOOL)
        m = insert(self._editor, node, [node], "Cast", [more.outputs[0]], total.shape, {"to": int(self._dtype)}).outputs[0]
        m.type = ir.TensorType(self._dtype)
        self._multiply(node, m)

    def pad(self, node: ir.Node) -> None:
        """Pads the mask with zeros too."""
        x, pads = node.inputs[0], node.inputs[1]
        out = static_shape(node.outputs[0]) or ()
        assert x is not None
        assert pads is not None
        padded = insert(self._editor, node, [node], "Pad", [self._masks[x], pads], (out[0], 1, *out[2:]))
        self._masks[node.outputs[0]] = padded.outputs[0]

    def end(self, node: ir.Node) -> None:
        """Nothing: what follows has no mask."""

    def _fill(self, x: ir.Value, m: ir.Value, rounds: int, before: ir.Node) -> ir.Value:
        """x + (1 − m)·box(x)/(box(m) + ε), m ← MaxPool(m), so many times, with box the sum over 3×3.

        Both boxes are taken as averages, so that ε becomes ε/9. The factor of each round depends on the mask alone.
        """
        for number in range(1, rounds + 1):
            key = (x, number)
            if key not in self._filled:
                inner = x if number == 1 else self._filled[x, number - 1]
                mean = insert(self._editor, before, [before], "AveragePool", [inner], x.shape, _BOX | {"count_include_pad": 1}).outputs[0]
                part = insert(self._editor, before, [before], "Mul", [mean, self._share(m, before)], x.shape).outputs[0]
                self._filled[key] = insert(self._editor, before, [before], "Add", [inner, part], x.shape).outputs[0]
            m = self._grown(m, before)
        return self._filled[x, rounds]

    def _share(self, m: ir.Value, before: ir.Node) -> ir.Value:
        """(1 − m) / (average of m over 3×3 + ε/9)."""
        if m not in self._shares:
            mean = insert(self._editor, before, [before], "AveragePool", [m], m.shape, _BOX | {"count_include_pad": 1}).outputs[0]
            below = insert(self._editor, before, [before], "Add", [mean, self._number(self._options.epsilon / 9)], m.shape).outputs[0]
            rest = insert(self._editor, before, [before], "Sub", [self._number(1.0), m], m.shape).outputs[0]
            self._shares[m] = insert(self._editor, before, [before], "Div", [rest, below], m.shape).outputs[0]
        return self._shares[m]

    def _grown(self, m: ir.Value, before: ir.Node) -> ir.Value:
        key = (m, "grown")
        if key not in self._pooled:
            self._pooled[key] = insert(self._editor, before, [before], "MaxPool", [m], m.shape, _BOX).outputs[0]
        return self._pooled[key]

    def _pool(self, m: ir.Value, node: ir.Node, kernel: tuple[int, ...], dilations: tuple[int, ...]) -> ir.Value:
        """The mask after a window: a place is known where any input of it is."""
        batch, _, *size = static_shape(node.outputs[0]) or ()
        strides = tuple(node.attributes.get_ints("strides", ())) or (1, 1)
        pads = tuple(node.attributes.get_ints("pads", ())) or (0, 0, 0, 0)
        auto_pad, ceil = node.attributes.get_string("auto_pad", "NOTSET"), node.attributes.get_int("ceil_mode", 0)
        key = (m, kernel, strides, pads, dilations, auto_pad, ceil)
        if max(kernel) == max(strides) == 1 and not any(pads):
            return m
        if key not in self._pooled:
            source = m
            if any(pads):  # not as pads of MaxPool: runtimes refuse those that are as wide as the kernel, as with dilation
                shape = static_shape(m) or ()
                grown = (batch, 1, *(n + pads[axis] + pads[axis + 2] for axis, n in enumerate(shape[2:])))
                limits = self._editor.add_initializer(f"{node.name}.mask_pads", np.array([0, 0, *pads[:2], 0, 0, *pads[2:]]))
                source = insert(self._editor, node, [node], "Pad", [m, limits], grown).outputs[0]
            attributes: dict[str, int | str | tuple[int, ...]] = {
                "kernel_shape": kernel,
                "strides": strides,
                "dilations": dilations,
                "ceil_mode": ceil,
            }
            if auto_pad != "NOTSET":
                attributes["auto_pad"] = auto_pad
            self._pooled[key] = insert(self._editor, node, [node], "MaxPool", [source], (batch, 1, *size), attributes).outputs[0]
        return self._pooled[key]

    def _combined(self, op_type: str, first: ir.Value, second: ir.Value, before: ir.Node) -> ir.Value:
        return insert(self._editor, before, [before], op_type, [first, second], first.shape).outputs[0]

    def _multiply(self, node: ir.Node, m: ir.Value) -> None:
        self._masks[self._after(node, "Mul", [node.outputs[0], m])] = m

    def _after(self, node: ir.Node, op_type: str, inputs: list[ir.Value]) -> ir.Value:
        """Adds a node that takes the output of `node` as its first input, and the place of it everywhere else, under its name."""
        y = node.outputs[0]
        added = insert(self._editor, node, [node], op_type, inputs, y.shape)
        self._editor.graph.remove(added)
        self._editor.graph.insert_after(node, added)
        new, name = added.outputs[0], y.name
        y.replace_all_uses_with(new, replace_graph_outputs=True)
        added.replace_input_with(0, y)
        y.name = self._editor.unique_name(f"{name}_unmasked")
        new.name = name
        return new

    def _number(self, number: float) -> ir.Value:
        if number not in self._numbers:
            self._numbers[number] = self._editor.add_initializer(f"{self._options.mask}.{number:g}", np.array(number, self._dtype.numpy()))
        return self._numbers[number]


_TINY = 2.0**-24
"""The smallest number of float16: less than the share of one place in any image, so that only a mask of zeros is met."""
_BOX: dict[str, int | tuple[int, ...]] = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}

_APPLY = {
    Rule.KEEP: _Masking.keep,
    Rule.MASK: _Masking.mask,
    Rule.CONV: _Masking.conv,
    Rule.POOL: _Masking.pool,
    Rule.MEAN: _Masking.mean,
    Rule.MEET: _Masking.meet,
    Rule.JOIN: _Masking.join,
    Rule.PAD: _Masking.pad,
    Rule.END: _Masking.end,
}
