"""Whether a target gains from RMSNormalization where LayerNormalization was: the measurement behind `center-norm`'s option `targets`.

    python -m benchmarks.center_norm [--seconds 6] [--depth 12]

Times, for each target, a pre-norm residual stream `[1, 197, 192]` (the size of DeiT-Ti) before and after the pass, in turn in one
run on one thread: once with layer norms and sums alone, which shows the operators, and once with the linear layers of the MLPs as well,
which shows what of it is left in a network. Prints the speed after against before with its 95 % interval, and the kernels of the norms.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgekit.contracts import Context, Executable, targets
from edgekit.graph.shapes import infer_shapes
from edgekit.passes.reparameterize.center_norm import CenterNorm
from edgekit.profile.measure import Latency, summarize, time_in_turn

TARGETS = ("onnxruntime", "openvino")
TOKENS, WIDTH = 197, 192


def stream(depth: int, hidden: int) -> ir.Model:
    """Makes a residual stream of `depth` blocks `x + MatMul(Gelu(MatMul(LayerNormalization(x))))`; without `hidden`, `x + w·norm`.

    The input `[1, TOKENS, WIDTH]` is embedded by a MatMul, so that everything that the norms read is written by weights.
    """
    rng = np.random.default_rng(0)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23}, name="stream")
    x = ir.Value(name="x", shape=ir.Shape([1, TOKENS, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(x)

    def weight(name: str, *shape: int) -> ir.Value:
        array = rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32)
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.Tensor(array, name=name))
        graph.register_initializer(value)
        return value

    def node(op_type: str, *inputs: ir.Value) -> ir.Value:
        made = ir.node(op_type, inputs, name=f"{op_type}_{len(graph)}")
        made.outputs[0].name = f"v{len(graph)}"
        graph.append(made)
        return made.outputs[0]

    value = node("MatMul", x, weight("embed", WIDTH, WIDTH))
    for block in range(depth):
        normal = node("LayerNormalization", value, weight(f"gamma{block}", WIDTH))
        if hidden:
            active = node("Gelu", node("MatMul", normal, weight(f"w1.{block}", WIDTH, hidden)))
            value = node("Add", value, node("MatMul", active, weight(f"w2.{block}", hidden, WIDTH)))
        else:  # a low rank keeps the writer cheap
            thin = node("MatMul", normal, weight(f"w1.{block}", WIDTH, 1))
            value = node("Add", value, node("MatMul", thin, weight(f"w2.{block}", 1, WIDTH)))
    value = node("LayerNormalization", value, weight("gamma", WIDTH))
    value.name, value.type, value.shape = "y", ir.TensorType(ir.DataType.FLOAT), ir.Shape([1, TOKENS, WIDTH])
    graph.outputs.append(value)
    model = ir.Model(graph, ir_version=10)
    infer_shapes(model)
    return model


def load(model: ir.Model, name: str, folder: Path) -> Executable:
    """Lowers a copy of `model` to a target and loads it on one thread."""
    folder.mkdir()
    target = targets.get(name)()
    copy = model.clone()
    target.legalize(copy)
    target.lower(copy, folder)
    return target.load(folder, 1)


def measure(name: str, depth: int, hidden: int, seconds: float) -> Latency:
    """The latency after the pass, beside that before it."""
    before, after = stream(depth, hidden), stream(depth, hidden)
    assert CenterNorm(force=True).apply(after, Context()) == depth + 1
    feeds = {"x": np.random.default_rng(1).normal(size=(1, TOKENS, WIDTH)).astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        layer, rms = load(before, name, Path(folder) / "before"), load(after, name, Path(folder) / "after")
        np.testing.assert_allclose(rms.run(feeds)["y"], layer.run(feeds)["y"], rtol=0, atol=1e-3)
        candidates = {"before": partial(layer.run, feeds), "after": partial(rms.run, feeds)}
        times = time_in_turn(candidates, budget_s=seconds, max_runs=300, rng=np.random.default_rng(0))
    return summarize(times["after"], times["before"], device=name, threads=1, rng=np.random.default_rng(0))


def kernels(name: str, model: ir.Model) -> dict[str, int]:
    """Counts the operators that the target's runtime executes for the norms, after its own optimizations."""
    proto = ir.to_proto(model).SerializeToString()
    if name == "onnxruntime":
        import onnx
        import onnxruntime as ort

        with tempfile.TemporaryDirectory() as folder:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
            names = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    else:
        import openvino as ov

        core = ov.Core()
        compiled = core.compile_model(core.read_model(proto), "CPU")
        names = [str(node.get_rt_info()["layerType"].astype(str)) for node in compiled.get_runtime_model().get_ops()]
    return {kind: count for kind, count in Counter(names).items() if kind.startswith(("Layer", "RMS", "MVN", "Skip", "Simplified"))}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="time per target and network")
    parser.add_argument("--depth", type=int, default=12, help="number of residual blocks")
    options = parser.parse_args()
    print(f"{'target':<13}{'network':<16}{'RMS against layer norm':>28}   kernels before, after")
    for name in TARGETS:
        for label, hidden in (("norms and sums", 0), ("with its MLPs", 4 * WIDTH)):
            latency = measure(name, options.depth, hidden, options.seconds)
            low, high = latency.speedup_ci95 or (0.0, 0.0)
            before, after = stream(options.depth, hidden), stream(options.depth, hidden)
            CenterNorm(force=True).apply(after, Context())
            found = f"{kernels(name, before)}, {kernels(name, after)}"
            print(f"{name:<13}{label:<16}{f'{latency.speedup:.2f}x [{low:.2f}, {high:.2f}]':>28}   {found}", flush=True)


if __name__ == "__main__":
    main()
