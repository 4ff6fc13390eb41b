"""Mutates small valid ONNX files and recipes and compiles them: every run must end in success or in one of edgekit's errors.

    python -m tests.fuzz --runs 2000 [--first SEED]

A run is a function of its seed. Runs go through two worker processes that are kept from run to run and replaced only after a
crash. A traceback, a signal, a run over 60 seconds, a file left behind by a refused run: each is a failure, printed with the
seed that repeats it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, numpy_helper

from edgekit.compiler import Job, Timing, run_job
from edgekit.errors import EdgekitError
from edgekit.isolation import Worker, WorkerDiedError, WorkerRaisedError
from edgekit.progress import Reporter
from edgekit.recipe import Recipe, load_recipe

TIMEOUT_S = 60.0
MEMORY_LIMIT = 12 * 2**30
TARGETS = ("onnxruntime", "openvino")
PASSES = (("fold-batch-norm", "merge-branches"), ("fold-batch-norm", "merge-branches", "to-float16"), ())

SOURCES = (
    """
    <ir_version: 10, opset_import: ["" : 18]>
    conv (float[1, 3, 8, 8] x) => (float[1, 4] y)
    <float[4] b = {0.1, 0.2, 0.3, 0.4}, float[4] s = {1, 1, 2, 1}, float[4] m = {0, 0.5, 0, 0}, float[4] v = {1, 2, 1, 1}>
    {
        a = Conv<pads = [1, 1, 1, 1]>(x, w3, b)
        n = BatchNormalization<epsilon = 0.001>(a, s, b, m, v)
        c = Conv(x, w1)
        t = Add(n, c)
        r = Relu(t)
        p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
        g = GlobalAveragePool(p)
        y = Flatten(g)
    }
    """,
    """
    <ir_version: 10, opset_import: ["" : 23]>
    attention (float[1, 5, 8] x) => (float[1, 5, 8] y)
    <int64[4] split = {1, 5, 2, 4}, int64[3] merge = {1, 5, 8}, float[8] one = {1, 1, 1, 1, 1, 1, 1, 1}>
    {
        n = LayerNormalization<axis = -1>(x, one)
        l = MatMul(n, w)
        q0 = Reshape(l, split)
        q = Transpose<perm = [0, 2, 1, 3]>(q0)
        a = Attention(q, q, q)
        t = Transpose<perm = [0, 2, 1, 3]>(a)
        z = Reshape(t, merge)
        g = Gelu(z)
        y = Add(x, g)
    }
    """,
    """
    <ir_version: 10, opset_import: ["" : 18]>
    shapes (float[2, 6] x) => (float[3, 4] y, int64[2] d)
    <int64[1] axes = {0}, int64[1] start = {0}, int64[1] end = {1}>
    {
        d = Shape(x)
        first = Slice(d, start, end, axes)
        two = Constant<value_ints = [3, 4]>()
        r = Reshape(x, two)
        c = ConstantOfShape<value = float[1] {0.5}>(two)
        k = Cast<to = 1>(first)
        e = Expand(k, two)
        s = Softmax<axis = -1>(r)
        p = Pow(s, c)
        m = Mul(p, e)
        y = Clip(m)
    }
    """,
    """
    <ir_version: 10, opset_import: ["" : 18]>
    control (float[2, 2] x) => (float[2, 2] y)
    <int64 trips = {3}, bool go = {1}>
    {
        mean = ReduceMean<keepdims = 0>(x)
        zero = Constant<value = float {0}>()
        positive = Greater(mean, zero)
        chosen = If (positive) <
            then_branch = a () => (float[2, 2] t) { t = Neg(x) },
            else_branch = b () => (float[2, 2] f) { f = Exp(x) }
        >
        y = Loop (trips, go, chosen) <
            body = l (int64 i, bool c, float[2, 2] v) => (bool c2, float[2, 2] v2) { c2 = Identity(c)  v2 = Add(v, x) }
        >
    }
    """,
    """
    <ir_version: 8, opset_import: ["" : 11]>
    old (float[1, 2, 4, 4] x) => (float[1, 32] y)
    <float[0] roi = {}, float[4] scales = {1, 1, 2, 2}>
    {
        u = Resize<mode = "nearest">(x, roi, scales)
        p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(u)
        c = Concat<axis = 1>(p, x)
        s = Softmax<axis = 1>(c)
        d = Dropout<ratio = 0.5>(s)
        q = Unsqueeze<axes = [0]>(d)
        z = Squeeze<axes = [0]>(q)
        flat = Flatten(z)
        y = Slice(flat, from, to, along)
    }
    """,
)
RECIPE = """
model = "model.onnx"
target = "onnxruntime"
passes = ["fold-batch-norm", "to-float16{keep_io=true}"]
inputs = ["x:1,3,8,8"]
calibration = 2
seed = 1
"""


@dataclass(frozen=True)
class Result:
    """How a run ended: `ok`, the name of an error of edgekit, or `FAILED` with the reason."""

    seed: int
    outcome: str
    detail: str = ""


def base_model(index: int) -> onnx.ModelProto:
    """One of the valid models, with seeded weights."""
    rng = np.random.default_rng(index)
    model = onnx.parser.parse_model(SOURCES[index])
    arrays: dict[str, np.ndarray] = {
        "w3": rng.normal(0, 0.4, (4, 3, 3, 3)).astype(np.float32),
        "w1": rng.normal(0, 0.4, (4, 3, 1, 1)).astype(np.float32),
        "w": rng.normal(0, 0.4, (8, 8)).astype(np.float32),
        "from": np.array([0]),
        "to": np.array([32]),
        "along": np.array([1]),
    }
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used)
    return model


def _pick(rng: np.random.Generator, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def _names(model: onnx.ModelProto) -> list[str]:
    graph = model.graph
    return [*(name for node in graph.node for name in (*node.input, *node.output)), *(t.name for t in graph.initializer), "", "nowhere"]


def _operator(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    schemas = onnx.defs.get_all_schemas()
    _pick(rng, model.graph.node).op_type = _pick(rng, [*(schema.name for schema in schemas), "Frobnicate", ""])


def _domain(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    _pick(rng, model.graph.node).domain = _pick(rng, ["com.example", "ai.onnx.ml", "com.microsoft", "edgekit"])


def _rewire(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(rng, model.graph.node)
    side = node.input if rng.random() < 0.7 else node.output
    if side:
        side[int(rng.integers(len(side)))] = _pick(rng, _names(model))


def _arity(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    node = _pick(rng, model.graph.node)
    if rng.random() < 0.5 and node.input:
        del node.input[int(rng.integers(len(node.input)))]
    else:
        node.input.append(_pick(rng, _names(model)))


def _nodes(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    nodes = list(model.graph.node)
    index = int(rng.integers(len(nodes)))
    kind = int(rng.integers(3))
    if kind == 0:
        del nodes[index]
    elif kind == 1:
        nodes.insert(int(rng.integers(len(nodes))), copy.deepcopy(nodes[index]))
    else:
        rng.shuffle(nodes)  # type: ignore[arg-type]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _attribute(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    if not attributes:
        return
    attribute: AttributeProto = _pick(rng, attributes)
    kind = int(rng.integers(5))
    value = int(_pick(rng, [-1, 0, 1, 2, 7, 2**31, -(2**63), 2**62]))
    if kind == 0:
        attribute.i = value
    elif kind == 1 and attribute.ints:
        attribute.ints[int(rng.integers(len(attribute.ints)))] = value
    elif kind == 2:
        attribute.type = int(rng.integers(0, 15))
    elif kind == 3:
        attribute.name = _pick(rng, ["axis", "perm", "to", "auto_pad", "unknown"])
    else:
        attribute.f = float(_pick(rng, [np.nan, np.inf, -1.0, 0.0, 1e38]))


def _dims(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    graph = model.graph
    value = int(_pick(rng, [-1, 0, 1, 2, 3, 9, 1000, 2**31, 2**62]))
    if rng.random() < 0.5 and graph.initializer:
        tensor = _pick(rng, graph.initializer)
        if tensor.dims and rng.random() < 0.8:
            tensor.dims[int(rng.integers(len(tensor.dims)))] = value
        else:
            tensor.dims.append(value)
    else:
        dims = _pick(rng, [*graph.input, *graph.output]).type.tensor_type.shape.dim
        if len(dims):
            dim = _pick(rng, dims)
            if rng.random() < 0.3:
                dim.dim_param = "batch"
            else:
                dim.dim_value = value


def _dtype(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    kind = int(_pick(rng, [0, 1, 2, 7, 8, 9, 10, 11, 16, 17, 22, 99]))
    if rng.random() < 0.5 and model.graph.initializer:
        _pick(rng, model.graph.initializer).data_type = kind
    else:
        _pick(rng, [*model.graph.input, *model.graph.output]).type.tensor_type.elem_type = kind


def _weights(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    tensor: TensorProto = _pick(rng, model.graph.initializer)
    if not tensor.raw_data:
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    content = bytearray(tensor.raw_data)
    if rng.random() < 0.3:
        content = content[: int(rng.integers(len(content) + 1))]
    elif content:
        start = int(rng.integers(len(content)))
        content[start : start + 4] = _pick(rng, [b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff\xff\xff\xff", b"\x7f"])
    tensor.raw_data = bytes(content)


def _opset(model: onnx.ModelProto, rng: np.random.Generator) -> None:
    model.opset_import[0].version = int(_pick(rng, [0, 1, 5, 6, 7, 9, 11, 13, 17, 20, 24, 26, 27, 99, -1]))
    if rng.random() < 0.2:
        model.ir_version = int(_pick(rng, [0, 1, 3, 4, 13, 99]))


MUTATIONS: tuple[Callable[[onnx.ModelProto, np.random.Generator], None], ...] = (
    _operator, _domain, _rewire, _rewire, _arity, _nodes, _attribute, _attribute, _dims, _dims, _dtype, _weights, _opset,
)  # fmt: skip


def mutate_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Flips, inserts, deletes or cuts a few bytes."""
    changed = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        position = int(rng.integers(len(changed))) if changed else 0
        kind = int(rng.integers(4))
        if kind == 0 and changed:
            changed[position] = int(rng.integers(256))
        elif kind == 1:
            changed[position:position] = rng.bytes(int(rng.integers(1, 5)))
        elif kind == 2:
            del changed[position : position + int(rng.integers(1, 9))]
        elif rng.random() < 0.3:
            del changed[position:]
    return bytes(changed)


def mutated_model(rng: np.random.Generator) -> bytes:
    """A mutated file: of bytes in one case of four, of structure otherwise."""
    model = base_model(int(rng.integers(len(SOURCES))))
    if rng.random() < 0.25:
        return mutate_bytes(model.SerializeToString(), rng)
    for _ in range(int(rng.integers(1, 3))):
        try:
            _pick(rng, MUTATIONS)(model, rng)
        except (ValueError, TypeError, IndexError):  # protobuf refuses some values, and earlier mutations leave little to change
            continue
    return model.SerializeToString()


def run_one(seed: int, native: Worker) -> Result:
    """Compiles the mutation of one seed; `native` is the process for native code."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="edgekit-fuzz-") as name:
        folder = Path(name)
        path = folder / "model.onnx"
        out = folder / "out"
        try:
            if rng.random() < 0.15:
                path.write_bytes(base_model(0).SerializeToString())
                (folder / "recipe.toml").write_bytes(mutate_bytes(RECIPE.encode(), rng).replace(b'"model.onnx"', f'"{path}"'.encode()))
                recipe = load_recipe(folder / "recipe.toml")
            else:
                path.write_bytes(mutated_model(rng))
                recipe = Recipe(str(path), _pick(rng, TARGETS), passes=_pick(rng, PASSES), calibration=2, threads=1)
            run_job(Job(recipe, timing=Timing(0)), out, reporter=Reporter(), worker=native)
        except EdgekitError as error:
            if left := sorted(file.name for file in folder.iterdir() if file.name not in ("model.onnx", "recipe.toml")):
                return Result(seed, "FAILED", f"left behind {left} after {error}")
            if not (error.what and error.fix):
                return Result(seed, "FAILED", f"an error without what or fix: {error!r}")
            return Result(seed, type(error).__name__, str(error))
        except Exception:
            return Result(seed, "FAILED", traceback.format_exc())
        return Result(seed, "ok") if (out / "report.json").is_file() else Result(seed, "FAILED", "no report was written")


_native: list[Worker] = []


def _run_in_process(seed: int) -> Result:
    # The process for native code is kept from run to run, as this process is.
    if not _native:
        _native.append(Worker(memory_limit=MEMORY_LIMIT, time_limit=TIMEOUT_S / 4))
    return run_one(seed, _native[0])


def run_share(seeds: range) -> list[Result]:
    """Runs seeds one after the other through one process, which is replaced only after a crash."""
    results = []
    with Worker(time_limit=TIMEOUT_S) as outer:
        for seed in seeds:
            try:
                results.append(outer.call(_run_in_process, seed))
            except (WorkerDiedError, WorkerRaisedError) as error:
                results.append(Result(seed, "FAILED", f"{error} {getattr(error, 'output', '')}"))
    return results


def run_many(first: int, runs: int, processes: int = 2) -> list[Result]:
    """Runs `runs` seeds from `first` on, shared between processes."""
    shares = [range(first + share, first + runs, processes) for share in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        return [result for results in pool.map(run_share, shares) for result in results]


def main() -> int:
    """Prints how the runs ended; the exit status is 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print each error")
    options = parser.parse_args()
    results = run_many(options.first, options.runs)
    for result in results:
        if result.outcome == "FAILED" or options.verbose:
            print(f"seed {result.seed}: {result.outcome}\n{result.detail}")
    print(", ".join(f"{count} {outcome}" for outcome, count in Counter(result.outcome for result in results).most_common()))
    return int(any(result.outcome == "FAILED" for result in results))


if __name__ == "__main__":
    sys.exit(main())
