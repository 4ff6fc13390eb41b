"""Pruned transformers against whole ones: speed on two runtimes, and accuracy without training.

    python -m benchmarks.prune_tokens [--seconds S] [--threads T] [--targets openvino onnxruntime] [--profile]
    python -m benchmarks.prune_tokens --digits [--fewer 1.4 2] [--seeds 5]

The first times a ViT of DeiT-S's size (224 pixels, patches of 16, width 384, 12 blocks, 6 heads; random weights) in turn with what each
method makes of it, all after the pass `reparameterize`. Where a goal is missed, or with `--profile`, ONNX Runtime's own profile says what
the choosing of tokens costs by operator, and what the others gain.

The second prunes the zoo's trained `vit_digits` to so many times fewer MACs by each method, with one share for all layers and with
schedules that are searched on calibration digits. It prints the accuracy on the 597 digits that nothing was chosen on, what that is in
points against the whole network, and the divergence of class scores from the whole network's. Random places are the mean over several
seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from edgekit import native
from edgekit.contracts import Arrays, Context, Target, datasets, models, targets
from edgekit.evaluate import in_worker
from edgekit.graph.canonicalize import canonicalize
from edgekit.graph.cost import cost
from edgekit.graph.files import save_model
from edgekit.graph.opset import to_opset
from edgekit.graph.shapes import infer_shapes
from edgekit.isolation import Worker
from edgekit.models.vit import VisionTransformer
from edgekit.native import Timed
from edgekit.passes.prune_tokens.prune_tokens import PruneTokens
from edgekit.passes.reparameterize.reparameterize import Reparameterize
from edgekit.profile.statistics import bootstrap_ratio, paired_difference
from edgekit.source import Source
from edgekit.trace import trace

COUNTS = (  # Chen et al. 2023, DeiT-S at 2.9 G
    (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
    (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
)
OWN = "/prune_tokens/"
"""In the names of the nodes that choose tokens."""


@dataclass(frozen=True)
class Candidate:
    """A setting of the pass, and the speed on each target that is the goal."""

    options: Mapping[str, Any]
    goals: Mapping[str, float]


BOTH = ("openvino", "onnxruntime")
CANDIDATES = {
    "ia-red2 .9 .7 .5": Candidate({"method": "ia-red2", "keep": (0.9, 0.7, 0.5)}, dict.fromkeys(BOTH, 1.25)),
    "ia-red2 .7 .5 .3": Candidate({"method": "ia-red2", "keep": (0.7, 0.5, 0.3)}, dict.fromkeys(BOTH, 1.5)),
    "evit .7": Candidate({"method": "evit", "keep": 0.7}, {}),
    "evit .7, rank": Candidate({"method": "evit", "keep": 0.7, "form": "rank"}, {}),
    "evit .7, no fuse": Candidate({"method": "evit", "keep": 0.7, "fuse": False}, {}),
    "attention-received .7": Candidate({"method": "attention-received", "keep": 0.7}, {}),
    "random .7": Candidate({"method": "random", "keep": 0.7}, {}),
    "tome 13": Candidate({"method": "tome", "r": 13}, {"openvino": 1.25, "onnxruntime": 1.35}),
    "tome 13, scatter": Candidate({"method": "tome", "r": 13, "form": "scatter"}, {}),
    "tome 13, rank": Candidate({"method": "tome", "r": 13, "form": "rank"}, {}),
    "diffrate 2.9 G": Candidate({"method": "diffrate", "prune": COUNTS[0], "merge": COUNTS[1]}, {}),
}


def canonical(module: torch.nn.Module, shape: tuple[int, ...]) -> ir.Model:
    """The canonical graph of a module with one input."""
    model = trace(Source("vit", module=module.eval(), example_inputs=(torch.zeros(shape),)), "dynamo").model
    infer_shapes(model)
    model = canonicalize(to_opset(model))
    infer_shapes(model)
    return model


def pruned(model: ir.Model, options: Mapping[str, Any], seed: int = 0, calibration: tuple[Arrays, ...] = ()) -> ir.Model:
    """A copy that the pass was applied to."""
    copy = model.clone()
    context = Context(calibration, generator=np.random.default_rng(seed), has_data=bool(calibration))
    if not PruneTokens(**options).apply(copy, context):
        raise SystemExit(f"nothing was pruned: {context.refusals}")
    infer_shapes(copy)
    return copy


def lowered(model: ir.Model, target: Target, folder: Path) -> Path:
    """What a target makes of a graph."""
    folder.mkdir(parents=True)
    copy = model.clone()
    target.legalize(copy)
    target.lower(copy, folder)
    return folder


def speed(names: list[str], target_names: list[str], seconds: float, threads: int, profile: bool) -> int:
    """Prints the table of speeds; returns how many goals were missed."""
    torch.manual_seed(0)
    network = VisionTransformer(side=224, patch=16, channels=3, dim=384, depth=12, heads=6, mlp_ratio=4, classes=1000)
    whole = canonical(network, (1, 3, 224, 224))
    Reparameterize().apply(whole, Context())
    graphs = {"whole": whole} | {name: pruned(whole, CANDIDATES[name].options) for name in names}
    feed = {"x": np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)}
    missed = set()
    with tempfile.TemporaryDirectory() as scratch, Worker() as worker:
        for target_name in target_names:
            target = targets.get(target_name)()
            timed = {
                name: Timed(target, lowered(graph, target, Path(scratch) / target_name / str(number)), feed)
                for number, (name, graph) in enumerate(graphs.items())
            }
            times = in_worker(worker, "latency", native.time_lowered, timed, threads, seconds, 100_000, 0)
            print(f"\n{target_name}, {threads} threads, {len(times['whole'])} runs each in turn")
            print(f"{'':24}{'GMACs':>8}{'fewer':>8}{'median ms':>11}{'speed':>8}  95 % interval   goal")
            for name, graph in graphs.items():
                macs, low, high = cost(graph).macs, *bootstrap_ratio(times["whole"], times[name], rng=np.random.default_rng(0))
                ratio = float(np.median(times["whole"]) / np.median(times[name]))
                goal = CANDIDATES[name].goals.get(target_name) if name in CANDIDATES else None
                verdict = "" if goal is None else f"{goal:.2f} {'met' if ratio >= goal else 'MISSED'}"
                if goal is not None and ratio < goal:
                    missed.add(name)
                print(
                    f"{name:24}{macs / 1e9:8.3f}{cost(whole).macs / macs:7.2f}x{np.median(times[name]):11.2f}{ratio:7.2f}x"
                    f"  [{low:.2f}, {high:.2f}]   {verdict}",
                    flush=True,
                )
        for name in names if profile else sorted(missed):
            profiles = {kind: onnxruntime_profile(graphs[kind], feed, threads, Path(scratch)) for kind in ("whole", name)}
            print_profile(name, profiles["whole"], profiles[name])
    return len(missed)


def onnxruntime_profile(model: ir.Model, feed: Arrays, threads: int, scratch: Path, runs: int = 30) -> dict[tuple[bool, str], float]:
    """Milliseconds per run of each operator, those that choose tokens (True) apart from the others, by ONNX Runtime's profiler."""
    import onnxruntime as ort  # type: ignore[import-untyped]

    path = scratch / "profiled.onnx"
    save_model(model, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "profile")
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    for _ in range(runs):
        session.run(None, feed)
    found: dict[tuple[bool, str], list[float]] = defaultdict(list)
    per_node: dict[str, list[float]] = defaultdict(list)
    kinds = {}
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            node = event["name"].removesuffix("_kernel_time")
            kinds[node] = (OWN in f"{node}/", event["args"]["op_name"])
            per_node[node].append(event["dur"] / 1e3)
    for node, durations in per_node.items():
        found[kinds[node]].append(float(np.median(durations[len(durations) // 3 :])))  # the first third warms up
    return {kind: sum(values) for kind, values in found.items()}


def print_profile(name: str, whole: Mapping[tuple[bool, str], float], other: Mapping[tuple[bool, str], float]) -> None:
    """Prints what choosing costs by operator, and the time of all other operators in both."""
    choosing = {op: ms for (own, op), ms in other.items() if own}
    rest = {op: ms for (own, op), ms in other.items() if not own}
    print(f"\n{name} in ONNX Runtime's profile: {sum(whole.values()):.1f} ms whole, {sum(rest.values()):.1f} ms pruned", end="")
    print(f" and {sum(choosing.values()):.2f} ms to choose tokens (medians of nodes, added up)")
    print("  choosing: " + ", ".join(f"{op} {ms:.2f}" for op, ms in sorted(choosing.items(), key=lambda item: -item[1]) if ms >= 0.005))
    print("  others: " + ", ".join(f"{op} {whole.get((False, op), 0.0):.1f} > {ms:.1f}" for op, ms in rest.items() if ms >= 0.2))


SCHEDULES: dict[str, Callable[[int], Mapping[str, Any]]] = {
    "evit": lambda part: {"method": "evit", "keep": 1 - part / 101},
    "evit, no fuse": lambda part: {"method": "evit", "keep": 1 - part / 101, "fuse": False},
    "attention-received": lambda part: {"method": "attention-received", "keep": 1 - part / 101},
    "ia-red2": lambda part: {"method": "ia-red2", "keep": tuple(1 - step * part / 101 for step in (0.2, 0.6, 1.0))},
    "tome": lambda part: {"method": "tome", "r": part},
    "random": lambda part: {"method": "random", "keep": 1 - part / 101},
}
SEARCHED = ("diffrate", "tome", "evit", "ia-red2", "attention-received")


def weakest(model: ir.Model, schedule: Callable[[int], Mapping[str, Any]], fewer: float) -> Mapping[str, Any] | None:
    """The first of ever stronger settings, numbered 1 to 100, with so many times fewer MACs; None: no such setting."""
    low, high = 1, 100
    whole = cost(model).macs
    while low < high:
        middle = (low + high) // 2
        if whole >= fewer * cost(pruned(model, schedule(middle))).macs:
            high = middle
        else:
            low = middle + 1
    options = schedule(high)
    return options if whole >= fewer * cost(pruned(model, options)).macs else None


@dataclass(frozen=True)
class Digits:
    """The trained network and the digits that it is tried on.

    Attributes:
        whole: Its graph.
        images: `[S, 1, 32, 32]`.
        labels: `[S]`.
        batch: How many it takes at once.
        scores: What it gives, `[S, 10]`.
    """

    whole: ir.Model
    images: np.ndarray
    labels: np.ndarray
    batch: int
    scores: np.ndarray

    def row(self, name: str, graphs: list[ir.Model]) -> None:
        """Prints accuracy and divergence of pruned graphs, of several their means."""
        results = [scores_of(graph, self.images, self.batch) for graph in graphs]
        right = [result.argmax(-1) == self.labels for result in results]
        base = self.scores.argmax(-1) == self.labels
        accuracy = 100 * float(np.mean(right))
        spread = f"{100 * min(map(np.mean, right)):.2f} to {100 * max(map(np.mean, right)):.2f} %"
        if len(right) == 1:
            _, low, high = paired_difference(base, right[0])
            spread = f"[{100 * low:+.2f}, {100 * high:+.2f}]"
        ratio = cost(self.whole).macs / cost(graphs[0]).macs
        nats = float(np.mean([divergence(self.scores, result) for result in results]))
        print(f"{name:40}{ratio:10.2f}x{accuracy:9.2f}%{accuracy - 100 * base.mean():+8.2f}{nats:9.4f}  {spread}", flush=True)


def digits(fewer: float, seeds: int) -> None:
    """Prints the table of accuracies."""
    data, zoo = datasets.get("digits")(), models.get("vit_digits")
    images, labels, batch = data.inputs["test"], data.labels["test"], 199  # 597 are three of it
    whole = canonical(zoo.build(), (batch, *zoo.input_shape[1:]))
    tried = Digits(whole, images, labels, batch, scores_of(whole, images, batch))
    accuracy = 100 * (tried.scores.argmax(-1) == labels).mean()
    print(f"\nvit_digits, {len(labels)} held-out digits: {accuracy:.2f} % of {cost(whole).macs / batch / 1e6:.2f} MMACs")
    print(
        f"{'at least ' + format(fewer, 'g') + ' times fewer MACs':40}{'fewer':>11}{'accuracy':>10}{'points':>8}{'nats':>9}  95 % interval"
    )
    for name, schedule in SCHEDULES.items():
        options = weakest(whole, schedule, fewer)
        if options is None:
            print(f"{name:40} cannot")
            continue
        number = seeds if name == "random" else 1
        label = name + (f", mean of {seeds}, from and to" if name == "random" else "")
        tried.row(label, [pruned(whole, options, seed) for seed in range(number)])
    calibration = ({"x": data.inputs["calibrate"][:batch]},)
    for name in SEARCHED:
        tried.row(f"{name}, schedule searched", [pruned(whole, {"method": name, "target_macs": 1 / fewer}, calibration=calibration)])


def divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """KL(expected ‖ found) of class scores `[S, K]` in nats, mean over samples."""
    first, second = (torch.from_numpy(scores).double().log_softmax(-1) for scores in (expected, found))
    return float(torch.nn.functional.kl_div(second, first, log_target=True, reduction="batchmean"))


def scores_of(model: ir.Model, images: np.ndarray, batch: int) -> np.ndarray:
    """What a graph gives for the images, `[S, K]`, in ONNX Runtime."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "net.onnx"
        save_model(model, path)
        feeds = [{"x": images[start : start + batch]} for start in range(0, len(images), batch)]
        return np.concatenate([next(iter(outputs.values())) for outputs in native.run_onnx(path, feeds, 1)])


def main() -> None:
    """Prints the tables; the exit status is 1 where a goal of speed is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(CANDIDATES), help="settings to time, as the table names them")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds to measure for on each target")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=list(BOTH), choices=BOTH)
    parser.add_argument("--profile", action="store_true", help="profile every setting, not only those that miss a goal")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--fewer", type=float, nargs="+", default=[1.4], help="how many times fewer MACs")
    parser.add_argument("--seeds", type=int, default=5, help="seeds of random places")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in CANDIDATES]:
        parser.error(f"unknown setting '{unknown[0]}'; there are: {', '.join(CANDIDATES)}")
    if options.digits:
        for fewer in options.fewer:
            digits(fewer, options.seeds)
    elif speed(options.names, options.targets, options.seconds, options.threads, options.profile):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
