"""How much of each family of vision networks is whole operators in the canonical graph.

    python -m benchmarks.canonical_families [NAME ...] [--exporter torchscript]

Every network of timm has random weights, is traced by edgekit's tracer and canonicalized. What the source computes is counted where it is
called, in PyTorch: a TorchFunctionMode sees every softmax, scaled_dot_product_attention, layer_norm, gelu and the like, so that the count
does not depend on an exporter. Prints, per network:

    attention    `Attention` nodes / calls of softmax and scaled_dot_product_attention in the source
    softmax      softmaxes that stayed
    norm         whole normalizations / calls of normalizations in the source
    act          whole activations / calls in the source
    parts        nodes that a normalization or an activation leaves where it is in parts
    exporter     that wrote the graph: where one fails, the other, as `edgekit compile` does
    error        largest difference between ONNX Runtime on the canonical graph and PyTorch, relative to the largest value
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch.overrides import TorchFunctionMode

from edgekit.errors import TraceError
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.opset import OPSET, to_opset
from edgekit.graph.shapes import infer_shapes
from edgekit.source import Source
from edgekit.trace import EXPORTERS, trace
from tests.timm_support import create_timm

GOAL = 1e-4
FAMILIES = {
    "deit": "deit_tiny_patch16_224",
    "beit": "beit_base_patch16_224",
    "cait": "cait_xxs24_224",
    "swin": "swin_tiny_patch4_window7_224",
    "swinv2": "swinv2_tiny_window8_256",
    "pvt": "pvt_v2_b0",
    "crossvit": "crossvit_9_240",
    "coat": "coat_lite_tiny",
    "xcit": "xcit_nano_12_p16_224",
    "levit": "levit_128s",
    "mobilevit": "mobilevit_xxs",
    "mobilevitv2": "mobilevitv2_050",
    "efficientformer": "efficientformer_l1",
    "efficientvit": "efficientvit_m0",
    "edgenext": "edgenext_xx_small",
    "maxvit": "maxvit_rmlp_pico_rw_256",
    "fastvit": "fastvit_t8",
    "convnext": "convnext_atto",
    "repvit": "repvit_m1",
    "poolformer": "poolformer_s12",
    "mixer": "mixer_s32_224",
    "tiny vit": "test_vit",
}
"""One small network of each family."""
ATTENTION = ("scaled_dot_product_attention", "softmax")
NORMALIZATIONS = {
    "layer_norm": "LayerNormalization",
    "rms_norm": "RMSNormalization",
    "group_norm": "GroupNormalization",
    "batch_norm": "BatchNormalization",
    "instance_norm": "InstanceNormalization",
}
ACTIVATIONS = {"gelu": "Gelu", "hardswish": "HardSwish", "mish": "Mish"}
PARTS = ("Erf", "Pow", "Sqrt", "Reciprocal", "ReduceMean", "Tanh", "Softplus")


@dataclass(frozen=True)
class Row:
    """One network: counts of calls in the source, counts of nodes in the canonical graph, and how far the numbers are apart."""

    calls: Counter[str]
    nodes: Counter[str]
    error: float
    seconds: float
    exporter: str
    model: ir.Model


class _Calls(TorchFunctionMode):
    """Counts calls of functions by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        self.count[name.rstrip("_")] += 1
        return func(*args, **(kwargs or {}))


def stir(module: torch.nn.Module, seed: int = 0) -> None:
    """Gives what is constant at initialization (biases, layer scales of 1e-5, statistics) random values, so that errors show behind it."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.dtype.is_floating_point and tensor.numel() > 1 and (tensor == tensor.flatten()[0]).all():
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.data = noise * 0.2 - 0.1 if tensor.flatten()[0] == 0 else noise + 0.5


def measure(name: str, exporter: str = "dynamo", seed: int = 0) -> Row:
    """Traces and canonicalizes a network with random weights, and runs both on one random image."""
    import onnxruntime

    module, example = create_timm(name, seed)
    stir(module)
    x = torch.randn(example.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), _Calls() as calls:
        expected = module(x).numpy()
    source = Source(name, module=module, example_inputs=(x,))
    begun = time.perf_counter()
    try:
        model = trace(source, exporter).model
    except TraceError:  # as `edgekit compile` does: the other exporter
        (exporter,) = set(EXPORTERS) - {exporter}
        model = trace(source, exporter).model
    infer_shapes(model)
    canonicalize(to_opset(model, OPSET))
    infer_shapes(model)
    seconds = time.perf_counter() - begun
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    error = float(np.abs(result - expected).max() / np.abs(expected).max())
    return Row(calls.count, Counter(node.op_type for node in model.graph), error, seconds, exporter, model)


def attentions(row: Row) -> tuple[int, int]:
    """Attentions in the canonical graph, and softmaxes of every kind in the source."""
    return row.nodes["Attention"], sum(row.calls[name] for name in ATTENTION)


def main() -> int:
    """Prints the table; the exit status is 1 where numbers are further apart than the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FAMILIES.values()), help="names of timm (default: one of each family)")
    parser.add_argument("--exporter", default="dynamo", choices=("dynamo", "torchscript"))
    options = parser.parse_args()
    print(f"{'network':<32}{'attention':>10}{'softmax':>8}{'norm':>9}{'act':>8}{'nodes':>7}{'error':>9}  exporter, parts left")
    failed = False
    for name in options.names:
        row = measure(name, options.exporter)
        found, wanted = attentions(row)
        norms = [sum(row.nodes[op] for op in NORMALIZATIONS.values()), sum(row.calls[call] for call in NORMALIZATIONS)]
        acts = [sum(row.nodes[op] for op in ACTIVATIONS.values()), sum(row.calls[call] for call in ACTIVATIONS)]
        parts = ", ".join(f"{row.nodes[part]} {part}" for part in PARTS if row.nodes[part])
        print(
            f"{name:<32}{f'{found}/{wanted}':>10}{row.nodes['Softmax']:>8}{f'{norms[0]}/{norms[1]}':>9}{f'{acts[0]}/{acts[1]}':>8}"
            f"{row.nodes.total():>7}{row.error:>9.1e}  {', '.join(filter(None, (row.exporter, parts)))}",
            flush=True,
        )
        failed |= row.error > GOAL
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
