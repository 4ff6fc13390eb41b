"""A small residual network on tokens as a graph, and the same with its weights disturbed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from edgekit.contracts import Arrays
from edgekit.graph.shapes import infer_shapes

WIDTH, HIDDEN, TOKENS, BLOCKS, CLASSES = 12, 24, 6, 3, 5


def network(seed: int = 0, disturbed: float = 0.0) -> ir.Model:
    """`x` `[1, 6, 12]` to `scores` `[1, 5]`; `disturbed` adds noise to the blocks' weights, of that size relative to each one's own."""
    rng, noise = np.random.default_rng(seed), np.random.default_rng(100)
    weights: dict[str, np.ndarray] = {}
    lines, stream = [], "x"
    for block in range(BLOCKS):
        weights |= {
            f"scale{block}": 1 + rng.normal(size=WIDTH) / 5, f"shift{block}": rng.normal(size=WIDTH) / 5,
            f"up{block}": rng.normal(size=(WIDTH, HIDDEN)) / WIDTH**0.5, f"ub{block}": rng.normal(size=HIDDEN) / 5,
            f"down{block}": rng.normal(size=(HIDDEN, WIDTH)) / HIDDEN**0.5, f"db{block}": rng.normal(size=WIDTH) / 5,
        }  # fmt: skip
        lines += [
            f"n{block} = LayerNormalization<axis = -1>({stream}, scale{block}, shift{block})",
            f"p{block} = MatMul(n{block}, up{block})", f"u{block} = Add(p{block}, ub{block})", f"g{block} = Gelu(u{block})",
            f"q{block} = MatMul(g{block}, down{block})", f"d{block} = Add(q{block}, db{block})", f"sum{block} = Add({stream}, d{block})",
        ]  # fmt: skip
        stream = f"sum{block}"
    weights |= {"head": rng.normal(size=(WIDTH, CLASSES))}
    lines += [f"pooled = ReduceMean<keepdims = 0>({stream}, axes)", "scores = MatMul(pooled, head)"]
    interface = f"(float[1,{TOKENS},{WIDTH}] x) => (float[1,{CLASSES}] scores)"
    text = f'<ir_version: 10, opset_import: ["" : 23]> net {interface} {{ {" ".join(lines)} }}'
    proto = onnx.parser.parse_model(text)
    for number, node in enumerate(proto.graph.node):
        node.name = f"node{number}"
    for name, array in weights.items():
        spoiled = array if name == "head" else array + disturbed * array.std() * noise.normal(size=array.shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(spoiled.astype(np.float32), name))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axes"))
    model = ir.serde.deserialize_model(proto)
    infer_shapes(model)
    return model


def batches(count: int = 60, seed: int = 3) -> list[Arrays]:
    rng = np.random.default_rng(seed)
    return [{"x": rng.normal(size=(1, TOKENS, WIDTH)).astype(np.float32)} for _ in range(count)]


def arrays(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        str(name): value.const_value.numpy().copy() for name, value in model.graph.initializers.items() if value.const_value is not None
    }
