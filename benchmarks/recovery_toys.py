"""A small trained teacher and three ways to spoil it, for `benchmarks.recover` and the tests of `edgekit.recover`.

The teacher is a ViT of 4 blocks on images of 16 classes: smooth templates, shifted and flipped, in strong noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import torch
from torch.nn import functional

from edgekit.contracts import Arrays
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.constants import GraphEditor
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.shapes import infer_shapes, pin_inputs
from edgekit.models.vit import VisionTransformer
from edgekit.source import from_module
from edgekit.trace import EXPORTERS, trace

CLASSES, SIDE = 16, 16


def images(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[count, 1, 16, 16]` and their classes `[count]`."""
    templates = torch.randn(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(7))
    smooth = functional.interpolate(templates, size=(SIDE, SIDE), mode="bicubic")
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    found = smooth[labels]
    shifts = torch.randint(-3, 4, (count, 2), generator=generator)
    found = torch.stack([torch.roll(image, (int(dy), int(dx)), (1, 2)) for image, (dy, dx) in zip(found, shifts, strict=True)])
    flips = torch.rand(count, generator=generator) < 0.5
    found[flips] = found[flips].flip(-1)
    return found + 1.1 * torch.randn(found.shape, generator=generator), labels


def teacher(steps: int = 700) -> ir.Model:
    """The trained teacher's canonical graph, of batches of one image."""
    torch.manual_seed(0)
    module = VisionTransformer(side=SIDE, patch=4, channels=1, dim=64, depth=4, heads=4, mlp_ratio=4, classes=CLASSES)
    x, y = images(8192, 1)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    order = torch.Generator().manual_seed(2)
    for _ in range(steps):
        chosen = torch.randint(0, len(x), (128,), generator=order)
        optimizer.zero_grad()
        functional.cross_entropy(module(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    source = from_module(module.eval(), torch.zeros(1, 1, SIDE, SIDE))
    traced = trace(source, EXPORTERS[0])
    pin_inputs(traced.model, {str(traced.model.graph.inputs[0].name): ((1, 1, SIDE, SIDE), None)})
    model = canonicalize(to_opset(traced.model, OPSET))
    infer_shapes(model)
    return model


def feeds(model: ir.Model, count: int, seed: int) -> list[Arrays]:
    """Unlabelled batches of one image."""
    name = str(model.graph.inputs[0].name)
    return [{name: image[None].numpy()} for image in images(count, seed)[0]]


def _products(model: ir.Model) -> list[ir.Node]:
    """Products with weights of the blocks."""
    return [
        node for node in model.graph
        if node.op_type == "MatMul" and node.inputs[1] is not None and node.inputs[1].is_initializer() and "blocks" in (node.name or "")
    ]  # fmt: skip


def two_bits(model: ir.Model) -> None:
    """Rounds the weights of all blocks to four levels, with a scale for each output; rounding stays in the graph."""
    editor = GraphEditor(model)
    for node in _products(model):
        weight = node.inputs[1]
        assert weight is not None
        assert weight.const_value is not None
        array = weight.const_value.numpy()
        scale = np.abs(array).max(0, keepdims=True) / 1.5
        factor = editor.add_initializer(f"{weight.name}.scale", scale.astype(np.float32))
        value = weight
        steps = [("Div", [factor]), ("Round", []), ("Clip", [_number(editor, -2.0), _number(editor, 1.0)]), ("Mul", [factor])]
        for kind, others in steps:
            new = ir.node(kind, [value, *others])
            new.name = editor.unique_name(f"{node.name}/{kind}")
            new.outputs[0].name = new.name
            new.outputs[0].shape, new.outputs[0].type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
            model.graph.insert_before(node, new)
            value = new.outputs[0]
        node.replace_input_with(1, value)


def _number(editor: GraphEditor, number: float) -> ir.Value:
    return editor.add_initializer("number", np.array(number, np.float32))


def quarter_ffn(model: ir.Model) -> None:
    """Keeps a quarter of the hidden channels of every MLP: those whose weights are largest."""
    editor = GraphEditor(model)
    products = _products(model)
    for first, second in itertools.pairwise(products):
        if "fc1" not in (first.name or ""):
            continue
        up, down = (node.inputs[1].const_value.numpy() for node in (first, second))  # type: ignore[union-attr]
        order = np.argsort(-np.linalg.norm(up, axis=0) * np.linalg.norm(down, axis=1))
        kept = np.sort(order[: up.shape[1] // 4])
        editor.set_constant(first, 1, up[:, kept].copy())
        editor.set_constant(second, 1, down[kept].copy())
        (add, _), = first.outputs[0].uses()  # fmt: skip
        bias = next(index for index, value in enumerate(add.inputs) if value is not None and value.is_initializer())
        editor.set_constant(add, bias, add.inputs[bias].const_value.numpy()[kept].copy())  # type: ignore[union-attr]
        node = add
        while True:
            for value in (first.outputs[0], node.outputs[0]):
                value.shape = ir.Shape([*list(value.shape or ())[:-1], len(kept)])
            (node, _), = node.outputs[0].uses()  # fmt: skip
            if node is second:
                break


def linear_attention(model: ir.Model) -> None:
    """Replaces softmax attention by that of the kernel elu(x) + 1 in every block (Katharopoulos et al. 2020, equation 7)."""
    editor = GraphEditor(model)
    for node in [node for node in model.graph if node.op_type == "Attention"]:
        query, key, value = (operand for operand in node.inputs[:3] if operand is not None)
        shape = list(query.shape or ())

        def op(kind: str, inputs: list[ir.Value], dims: list[object], at: ir.Node = node, **attributes: object) -> ir.Value:
            new = ir.node(kind, inputs, attributes=attributes)  # type: ignore[arg-type]
            new.name = editor.unique_name(f"{at.name}/{kind}")
            new.outputs[0].name = new.name
            new.outputs[0].shape, new.outputs[0].type = ir.Shape(dims), ir.TensorType(ir.DataType.FLOAT)  # type: ignore[arg-type]
            model.graph.insert_before(at, new)
            return new.outputs[0]

        one = _number(editor, 1.0)
        q, k = (op("Add", [op("Elu", [operand], shape), one], shape) for operand in (query, key))
        swapped = [shape[0], shape[1], shape[3], shape[2]]
        mixed = op("MatMul", [op("Transpose", [k], swapped, perm=[0, 1, 3, 2]), value], [*shape[:2], shape[3], shape[3]])
        axes = editor.add_initializer("axes", np.array([2], np.int64))
        total = op("ReduceSum", [k, axes], [*shape[:2], 1, shape[3]], keepdims=1)
        weight = op("MatMul", [q, op("Transpose", [total], [*shape[:2], shape[3], 1], perm=[0, 1, 3, 2])], [*shape[:3], 1])
        result = op("Div", [op("MatMul", [q, mixed], shape), weight], shape)
        name = node.outputs[0].name
        node.outputs[0].replace_all_uses_with(result)
        model.graph.remove(node, safe=True)
        result.name = name


SPOILED: dict[str, tuple[Callable[[ir.Model], None], float]] = {
    "2-bit weights": (two_bits, 0.92),
    "linear attention": (linear_attention, 0.88),
    "FFN cut to 25 %": (quarter_ffn, 0.95),
}
"""Ways to spoil the teacher, and the agreement that recovery is to reach."""
