"""The networks that faults are seeded into: small, with several places for every rewrite."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

HEADER = '<ir_version: 10, opset_import: ["" : 23]>\n'
BLOCKS = 4


def _finish(text: str, arrays: dict[str, np.ndarray]) -> onnx.ModelProto:
    model = onnx.parser.parse_model(HEADER + text)
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in arrays.items())
    for node in model.graph.node:
        node.name = f"{node.output[0]}/{node.op_type}"
    return model


def convolutional(seed: int = 0) -> onnx.ModelProto:
    """Conv–BN–Relu blocks, each followed by a 3x3 and a 1x1 branch that are added; group norm and a classifier; 31 nodes."""
    rng = np.random.default_rng(seed)
    lines, arrays, x = [], {}, "x"
    for i in range(BLOCKS):
        lines += [
            f"c{i} = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>({x}, c{i}_weight, c{i}_bias)",
            f"n{i} = BatchNormalization(c{i}, n{i}_scale, n{i}_shift, n{i}_mean, n{i}_variance)",
            f"r{i} = Relu(n{i})",
            f"a{i} = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(r{i}, a{i}_weight, a{i}_bias)",
            f"b{i} = Conv<kernel_shape = [1, 1]>(r{i}, b{i}_weight)",
            f"s{i} = Add(a{i}, b{i})",
            f"t{i} = Tanh(s{i})",
        ]
        arrays |= {f"{name}{i}_weight": rng.normal(0, 0.3, (4, 4, 3, 3)) for name in "ca"}
        arrays |= {f"{name}{i}_bias": rng.normal(0, 0.5, 4) for name in "ca"} | {f"b{i}_weight": rng.normal(0, 0.3, (4, 4, 1, 1))}
        arrays |= {f"n{i}_{name}": rng.normal(0.3, 0.5, 4) for name in ("scale", "shift", "mean")}
        arrays |= {f"n{i}_variance": rng.uniform(0.1, 0.5, 4)}
        x = f"t{i}"
    lines += [
        f"g = GroupNormalization<num_groups = 4, epsilon = 0.00001>({x}, g_scale, g_shift)",
        "f = Flatten(g)",
        "y = Gemm(f, y_weight, y_bias)",
    ]
    arrays |= {"g_scale": rng.normal(1, 0.2, 4), "g_shift": rng.normal(0, 0.2, 4)}
    arrays |= {"y_weight": rng.normal(0, 0.1, (144, 5)), "y_bias": rng.normal(0, 0.1, 5)}
    return _finish("net (float[1, 4, 6, 6] x) => (float[1, 5] y) {\n" + "\n".join(lines) + "\n}", arrays)


def tokens(seed: int = 0) -> onnx.ModelProto:
    """Transformer blocks on eight tokens of eight channels, with a softmax gate and a transposition; 38 nodes."""
    rng = np.random.default_rng(seed)
    lines, arrays, x = [], {}, "x"

    def linear(name: str, source: str) -> None:
        lines.extend([f"{name}_m = MatMul({source}, {name}_weight)", f"{name} = Add({name}_m, {name}_bias)"])
        arrays[f"{name}_weight"], arrays[f"{name}_bias"] = rng.normal(0, 0.35, (8, 8)), rng.normal(0, 0.3, 8)

    for i in range(2):
        lines.append(f"l{i} = LayerNormalization<axis = -1, epsilon = 0.00001>({x}, l{i}_scale, l{i}_shift)")
        arrays |= {f"l{i}_scale": rng.normal(1, 0.2, 8), f"l{i}_shift": rng.normal(0, 0.2, 8)}
        for name in "qkv":
            linear(f"{name}{i}", f"l{i}")
        lines.append(f"o{i} = Attention<q_num_heads = 2, kv_num_heads = 2>(q{i}, k{i}, v{i})")
        linear(f"p{i}", f"o{i}")
        lines.append(f"h{i} = Add({x}, p{i})")
        linear(f"u{i}", f"h{i}")
        lines += [f"z{i} = Tanh(u{i})", f"w{i} = Softmax<axis = -1>(z{i})", f"m{i} = Mul(w{i}, m{i}_factor)"]
        lines += [f"e{i} = Mul(m{i}, h{i})", f"d{i} = Transpose<perm = [0, 2, 1]>(e{i})"]
        arrays[f"m{i}_factor"] = np.float32(7.0)
        x = f"d{i}"
    lines += [f"y = Sigmoid({x})"]
    return _finish("net (float[1, 8, 8] x) => (float[1, 8, 8] y) {\n" + "\n".join(lines) + "\n}", arrays)


def ranges(large: float, small: float) -> onnx.ModelProto:
    """A chain of layers with one value near `large`, brought back by a division, and one near `small`, brought back by a product."""
    rng = np.random.default_rng(0)
    lines, arrays, x = [], {}, "x"
    for i in range(6):
        lines += [f"a{i} = MatMul({x}, a{i}_weight)", f"t{i} = Tanh(a{i})"]
        arrays[f"a{i}_weight"] = rng.normal(0, 0.5, (8, 8))
        x = f"t{i}"
        if i == 2:
            lines += ["up = Mul(t2, up_factor)", "more = Mul(up, more_factor)", "down = Div(more, down_factor)"]
            arrays |= {"up_factor": np.float32(large / 100), "more_factor": np.float32(100.0), "down_factor": np.float32(large)}
            x = "down"
        if i == 3:
            lines += [
                "thin = Mul(t3, thin_factor)",
                "less = Mul(thin, less_factor)",
                "back = Mul(less, back_factor)",
                "again = Mul(back, again_factor)",
            ]
            arrays |= {"thin_factor": np.float32(1e-3), "less_factor": np.float32(small * 1e3)}
            arrays |= {"back_factor": np.float32(1e3), "again_factor": np.float32(1e-3 / small)}
            x = "again"
    lines.append(f"y = Sigmoid({x})")
    return _finish("net (float[2, 8] x) => (float[2, 8] y) {\n" + "\n".join(lines) + "\n}", arrays)
