"""Which families of vision networks compile for target `coreml`, and how far the packages are from PyTorch.

    python -m benchmarks.coreml_families [NAME ...] [--keep FOLDER] [--page]

By default one network of each family of timm (benchmarks/coreml_networks.py); those of more than 40 M parameters are left out.

Each network is traced (by torch.export, else by TorchScript, as `edgekit compile` does), canonicalized, legalized, converted twice, saved
and executed by the evaluator of packages. Weights are random, and what makes random weights unlike trained ones is replaced: matrices are
drawn with variance 1/fan-in, what is constant at initialization (biases, layer scales) is drawn too, and the statistics of batch norms are
measured, so that activations keep their scale. Images are smooth random fields of several scales, not white noise.

    error       float32 package: largest difference from PyTorch over two images, relative to the largest logit
    top-1       float16 package: images of 16 whose largest logit is PyTorch's
    clear       the same, of images whose two largest logits are further apart than 1 % of the largest: random weights make near ties, which
                trained ones seldom do, and there any rounding decides
    missed      how far apart these two are, at most, where the largest is another than PyTorch's, relative to the largest
    SQNR        float16 package: energy of the logits over that of the difference, in dB
    PyTorch     where top-1 in float16 misses the goal: the same two numbers of PyTorch itself on the network in float16
    seconds     legalize, convert in float16 and save, given the canonical graph

`--keep` holds canonical graphs and rows in a folder: a row that is there is not measured again. `--page` writes docs/coreml-models.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from benchmarks.coreml_networks import FAMILIES, canonical, images, package, prepare, run_package
from edgekit.errors import EdgekitError
from edgekit.graph.files import save_model
from tests.timm_support import create_timm

PAGE = Path(__file__).parent.parent / "docs" / "coreml-models.md"
MAX_PARAMETERS = 40_000_000
ERROR, AGREEMENT, PASSING, COUNT = 1e-3, 0.99, 0.9, 60
IMAGES, MEASURED, COMPARED = 16, 4, 2
"""Images that the float16 package is run on; that statistics are measured on; that the float32 package is run on."""
TIE = 0.01
MARGINS = (0.0, 0.002, 0.005, TIE)


@dataclass
class Row:
    """What became of one network; `failure` is why it has no package, or why the package could not be run."""

    family: str
    name: str
    parameters: int = 0
    exporter: str = ""
    version: str = ""
    error: float = math.nan
    same: int = 0
    clear: int = 0
    clear_same: int = 0
    missed: float = 0.0
    sqnr: float = math.nan
    seconds: float = math.nan
    reference_same: int = -1
    reference_sqnr: float = math.nan
    failure: str = ""

    @property
    def agreement(self) -> float:
        """The share of images with the same top-1, among those that are no near ties."""
        return self.clear_same / max(self.clear, 1)

    @property
    def good(self) -> bool:
        """Whether both goals are met."""
        return not self.failure and self.error <= ERROR and self.agreement >= AGREEMENT


def measure(family: str, name: str, graphs: Path) -> Row:
    """Compiles a network twice and holds both packages against PyTorch; its canonical graph is kept in the folder `graphs`."""
    row = Row(family, name)
    try:
        _measure(row, graphs)
    except EdgekitError as error:
        row.failure = row.failure or " ".join(f"{error}".split())
    except Exception as error:  # a defect is a row of the table, not its end
        last = traceback.extract_tb(error.__traceback__)[-1]
        row.failure = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {' '.join(str(error).split())}"
    return row


def _measure(row: Row, graphs: Path) -> None:
    module, example = create_timm(row.name)
    row.parameters = sum(parameter.numel() for parameter in module.parameters())
    if row.parameters > MAX_PARAMETERS:
        row.failure = f"left out: more than {MAX_PARAMETERS / 1e6:.0f} M parameters"
        return
    batch = images(example.shape, IMAGES)
    prepare(module, batch[:MEASURED])
    with torch.no_grad():
        expected = torch.cat([module(image[None]) for image in batch]).double().numpy()
    kept = sorted(graphs.glob(f"{row.name}.*.onnx"))
    if not kept:
        model, exporter = canonical(module, batch[:1], row.name)
        kept = [graphs / f"{row.name}.{exporter}.onnx"]
        save_model(model, kept[0])
    row.exporter = kept[0].suffixes[-2][1:]
    with tempfile.TemporaryDirectory() as folder:
        half, full = Path(folder) / "half.mlpackage", Path(folder) / "full.mlpackage"
        model = ir.load(kept[0])
        begun = time.perf_counter()
        row.version = package(model, True, half)
        row.seconds = time.perf_counter() - begun
        package(ir.load(kept[0]), False, full)
        difference = np.abs(run_package(full, batch[:COMPARED].numpy()) - expected[:COMPARED])
        row.error = float(difference.max() / np.abs(expected[:COMPARED]).max())
        got = run_package(half, batch.numpy()).astype(np.float64)
        if not np.isfinite(got).all():
            row.failure = f"float16: {_overflow(half, batch.numpy())} exceeds float16"
            return
    largest = np.sort(expected, axis=1)[:, -2:]
    margin = (largest[:, 1] - largest[:, 0]) / np.abs(expected).max(axis=1)
    same, clear = expected.argmax(axis=1) == got.argmax(axis=1), margin > TIE
    row.same, row.clear, row.clear_same = int(same.sum()), int(clear.sum()), int((same & clear).sum())
    row.missed = float(margin[~same].max(initial=0))
    row.sqnr = _sqnr(expected, got)
    if row.agreement < AGREEMENT:
        with torch.no_grad():
            reference = torch.cat([module.half()(image[None].half()) for image in batch]).double().numpy()
        row.reference_same = int((expected.argmax(axis=1) == reference.argmax(axis=1)).sum())
        row.reference_sqnr = _sqnr(expected, reference)


def _sqnr(expected: np.ndarray, got: np.ndarray) -> float:
    return float(10 * np.log10((expected**2).sum() / ((got - expected) ** 2).sum()))


def _overflow(path: Path, batch: np.ndarray) -> str:
    """The first operation of a package whose result is not finite on some image."""
    from edgekit.targets.coreml.reference.evaluator import Evaluator

    evaluator = Evaluator(path)
    found: list[str] = []

    def observe(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
            found.append(name)

    for image in batch:
        evaluator.run(dict.fromkeys(evaluator.inputs, image[None]), observe=observe)
        if found:
            return f"operation '{found[0]}'"
    return "an operation"


def in_child(family: str, name: str, graphs: Path, limit_s: float) -> Row:
    """`measure` in a forked process, which has all imports already: a crash or an endless run is a row too."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(there, family, name, graphs))
    child.start()
    there.close()
    row = Row(family, name, failure=f"took more than {limit_s:.0f} s")
    if here.poll(limit_s):
        with contextlib.suppress(EOFError):
            row.failure = "the process ended"
            row = here.recv()
    child.kill()
    child.join()
    return row


def _send(connection: Any, family: str, name: str, graphs: Path) -> None:
    warnings.simplefilter("ignore")
    connection.send(measure(family, name, graphs))


def line(row: Row) -> str:
    """A row as text."""
    start = f"{row.family:<26}{row.name:<38}{row.parameters / 1e6:>6.2f}"
    if row.failure:
        return f"{start}  {row.failure[:400]}"
    counts = f"{f'{row.same}/{IMAGES}':>7}{f'{row.clear_same}/{row.clear}':>7}{f'{row.missed:.1%}' if row.missed else '':>6}"
    return f"{start} {row.exporter:<12}{row.version:<6}{row.error:>9.1e}{counts}{row.sqnr:>7.1f}{row.seconds:>7.1f}{_reference(row)}"


def _reference(row: Row) -> str:
    return f"  {row.reference_same}/{IMAGES}, {row.reference_sqnr:.1f} dB" if row.reference_same >= 0 else ""


def summary(rows: list[Row]) -> list[str]:
    """What the table amounts to."""
    tried = [row for row in rows if not row.failure.startswith("left out")]
    exported = [row for row in tried if row.exporter]
    good = [row for row in exported if row.good]
    share = len(good) / max(len(exported), 1)
    run = [row for row in exported if not row.failure]
    within = [sum(row.error <= ERROR and row.missed <= limit for row in run) for limit in MARGINS]
    limits = ", ".join(f"{limit:.1%}" for limit in MARGINS)
    strict = ", ".join(f"{count} ({count / max(len(exported), 1):.1%})" for count in within)
    return [
        f"{len(exported)} networks export (goal {COUNT}); {len(good)} of them, {share:.1%} (goal {PASSING:.0%}), meet both goals: "
        f"float32 error at most {ERROR:g}, and top-1 agreement in float16 of at least {AGREEMENT} on clear images.",
        "How much hangs on what is called clear (the limit of 1 % was set after the first rows were seen): top-1 agrees on "
        f"{sum(row.same for row in run)} of all {IMAGES * len(run)} images. "
        f"Networks where it differs on no image whose two largest logits are further apart than {limits}: "
        f"{strict}.",
    ]


def _cells(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


def _done(row: Row) -> str:
    numbers = (f"{row.error:.1e}", f"{row.same}/{IMAGES}", f"{row.clear_same}/{row.clear}", f"{row.missed:.1%}" if row.missed else "")
    size, last = f"{row.parameters / 1e6:.2f}", (f"{row.sqnr:.1f}", f"{row.seconds:.1f}", _reference(row).strip())
    return _cells(row.family, row.name, size, row.exporter, row.version, *numbers, *last)


COLUMNS = "family, network, M parameters, exporter, needs, float32 error, top-1, clear, missed, SQNR, seconds, PyTorch"
INTRODUCTION = """# Models on target `coreml`

Written by `python -m benchmarks.coreml_families --page`: one small network of each family of timm, with random weights, against PyTorch.
The packages were executed by the [evaluator](coreml.md), not on Apple's devices: float16 means exact operators, each result rounded.

- float32 error: of the float32 package, largest difference over two images, relative to the largest logit
- top-1: of the float16 package, images whose largest logit is PyTorch's
- clear: the same, of images whose two largest logits are further apart than 1 % of the largest
- missed: how far apart they are, at most, where top-1 differs
- SQNR: of the float16 package, in dB
- seconds: from the canonical graph to the saved float16 package, on a busy machine
- PyTorch: top-1 and SQNR of PyTorch itself on the network in float16, where the package misses the goal
"""


def page(rows: list[Row]) -> str:
    """docs/coreml-models.md."""
    failed = [
        _cells(row.family, row.name, f"{row.parameters / 1e6:.2f}", row.failure[:300].replace("|", r"\|")) for row in rows if row.failure
    ]
    text = [
        INTRODUCTION,
        "\n\n".join(summary(rows)),
        "",
        _cells(*COLUMNS.split(", ")),
        "|" + " --- |" * len(COLUMNS.split(", ")),
        *(_done(row) for row in rows if not row.failure),
        "",
        "Without a package that runs:",
        "",
        _cells("family", "network", "M parameters", "reason"),
        "|" + " --- |" * 4,
        *failed,
    ]
    return "\n".join(text) + "\n"


def main() -> int:
    """Prints the table; the exit status is 1 where a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(FAMILIES.values()), help="names of timm (default: one of each family)")
    parser.add_argument("--keep", type=Path, help="folder of canonical graphs and rows")
    parser.add_argument("--page", action="store_true", help=f"write docs/{PAGE.name}")
    parser.add_argument("--limit", type=float, default=1800, help="seconds that one network may take")
    options = parser.parse_args()
    import coremltools  # noqa: F401

    torch.set_num_threads(1)  # no threads before a fork
    create_timm("test_resnet")  # imports timm: the forked processes have all imports already

    families = {name: family for family, name in FAMILIES.items()}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.names:
            file = folder / f"{name}.json"
            if not file.exists():
                row = in_child(families.get(name, name), name, folder, options.limit)
                file.write_text(json.dumps(asdict(row)))
            rows.append(Row(**json.loads(file.read_text())))
            print(line(rows[-1]), flush=True)
    print(*summary(rows), sep="\n")
    if options.page:
        PAGE.write_text(page(rows))
    return int(not all(row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
